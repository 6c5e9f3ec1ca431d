"""The public pipeline: requests, loading and saving, offloading, adapters and finished results.

It may import every package but `training`, `bench` and `cli`.
"""
