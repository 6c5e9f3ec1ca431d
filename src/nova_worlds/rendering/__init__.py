"""Worlds as pixels and captions: clips are drawn and described exactly, from art or from shapes made by code.

It may import `nova_video` but its `cli`, and nothing else of `nova_worlds`.
"""
