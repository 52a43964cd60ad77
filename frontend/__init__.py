"""The frontend-language extension, installed as sglang_ape.frontend."""
