"""Simulated worlds with exact judges: emoji and shapes in motion. They are rendered, captioned, trained on and judged.

It may import every package of `nova_video` but `cli`, which alone imports it.
"""

from nova_worlds.rendering.clips import ClipSpec
from nova_worlds.rendering.world import EmojiWorld

__all__ = ["ClipSpec", "EmojiWorld"]
