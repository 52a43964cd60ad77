"""Warm items: invented texts in the format of the contexts, at the end of the shared prefix."""
