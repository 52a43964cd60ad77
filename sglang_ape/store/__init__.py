"""Contexts known by id: what they are, what of them is cached, and which are pinned."""
