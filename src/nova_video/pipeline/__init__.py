"""The public pipeline: requests, opening and saving, generations, offloading, adapters and results.
`pipeline.py` has `NovaPipeline`; `call_parts.py` holds the parts of one call, which everything else takes.

It may import `common`, `io`, `model`, `autoencoders`, `sampling`, `fast` and `text`.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nova_video.pipeline.pipeline import NovaPipeline as NovaPipeline


def __getattr__(name: str) -> object:
    """`NovaPipeline`, as of 0.1.0 imported from here; on first use, since it loads diffusers."""
    if name != "NovaPipeline":
        raise AttributeError(f"module 'nova_video.pipeline' has no attribute {name!r}")
    from nova_video.pipeline.pipeline import NovaPipeline

    return NovaPipeline
