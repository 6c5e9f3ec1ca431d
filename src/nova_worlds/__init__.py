"""Simulated worlds with exact judges: emoji and shapes in motion. They are rendered, captioned, trained on and judged.

The package may import `nova_video`; of `nova_video`, the command line alone imports it.
"""

from nova_worlds.clips import ClipSpec
from nova_worlds.world import EmojiWorld

__all__ = ["ClipSpec", "EmojiWorld"]
