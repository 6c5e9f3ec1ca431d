"""Faster ways to compute `model`, `sampling` and `autoencoders`: kernels, CUDA graphs, fp8.

Without this package everything runs plainly, more slowly, with the same numbers.
"""
