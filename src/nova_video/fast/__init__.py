"""The same computations as `model`, `sampling` and `autoencoders`, made faster: kernels, CUDA graphs, fp8.

Without this package everything runs plainly, more slowly, with the same numbers.
"""
