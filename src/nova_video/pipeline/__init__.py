"""The public pipeline: requests, opening and saving, generations, offloading, adapters and results.
`pipeline.py` has `NovaPipeline`; `call_parts.py` holds the parts of one call, which everything else takes.

It may import `common`, `io`, `model`, `autoencoders`, `sampling`, `fast` and `text`.
"""
