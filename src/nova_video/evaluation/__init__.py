"""Benchmarks: what they have in common, from prompts to a table. `cli` runs them; `nova_worlds` has some.

It may import everything of the package but `bench` and `cli`.
"""

from nova_video.evaluation.benchmark import Benchmark, BenchmarkItem, BenchmarkReport, SampleFile, evaluate

__all__ = ["Benchmark", "BenchmarkItem", "BenchmarkReport", "SampleFile", "evaluate"]
