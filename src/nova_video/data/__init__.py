"""Encoded datasets: users' media and captions become latents and text features, which training reads in shards.

It may import `common`, `io`, `model`, `autoencoders`, `sampling`, `fast`, `text` and `pipeline`.
"""
