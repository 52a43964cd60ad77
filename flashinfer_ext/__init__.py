"""Attention pieces for parallel contexts, usable without SGLang."""
