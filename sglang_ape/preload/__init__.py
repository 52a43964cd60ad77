"""``python -m sglang_ape.preload``: a corpus into the context store of a server."""
