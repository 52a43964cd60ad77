"""``python -m sglang_ape.calibrate``: T, S and the shared prefix, chosen on data."""
