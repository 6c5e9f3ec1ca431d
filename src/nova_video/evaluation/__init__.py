"""Benchmarks: their common parts, from prompts to a table. `cli` runs them; `nova_worlds` has some.

It may import `common`, `io`, `model`, `autoencoders`, `sampling`, `fast`, `text` and `pipeline`.
"""

from nova_video.evaluation.benchmark import Benchmark, BenchmarkItem, BenchmarkReport, SampleFile, evaluate

__all__ = ["Benchmark", "BenchmarkItem", "BenchmarkReport", "SampleFile", "evaluate"]
