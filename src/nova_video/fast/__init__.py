"""Faster ways to compute what `model`, `sampling` and `autoencoders` compute: kernels, CUDA graphs, fp8.

`arrange.py` puts them into copies of a model. The pipeline and the trainer find this package through
`common/fast_parts.py`; without it everything runs plainly, with the same numbers. Nothing of the paper imports it.
It may import `common`, `model`, `autoencoders` and `sampling`.
"""
