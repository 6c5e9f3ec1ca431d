"""What `docs/figures.py` draws with: one file per kind of picture, arrays and tensors in, figures out."""
