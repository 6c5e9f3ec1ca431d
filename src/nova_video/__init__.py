"""NOVA: text to images and video, frame by frame in time and set by set in space, without vector quantisation.

The public object is `NovaPipeline`. It is imported on first use, so that `import nova_video` stays fast.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nova_video.pipeline.pipeline import NovaPipeline

__version__ = "0.1.0"
__all__ = ["NovaPipeline", "__version__"]


def __getattr__(name: str) -> object:
    if name == "NovaPipeline":
        from nova_video.pipeline.pipeline import NovaPipeline

        return NovaPipeline
    raise AttributeError(f"module 'nova_video' has no attribute {name!r}")
