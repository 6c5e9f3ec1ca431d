"""Encoded datasets: users' media and captions become latents and text features, read in shards by training.

It may import `io`, `text`, `autoencoders`, `pipeline.loading` and `common`.
"""
