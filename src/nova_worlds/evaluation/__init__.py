"""Judges and benchmarks of the emoji world: scores of generated clips, drift, editing and their reports."""
