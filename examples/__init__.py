"""What to run first: a small real model, a few documents, and a demo that serves them."""
