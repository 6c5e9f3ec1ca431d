"""Media and captions -> batches: the world of emoji in motion, and how it is prepared from art."""

from nova_video.data.clips import ClipSpec
from nova_video.data.world import EmojiWorld

__all__ = ["ClipSpec", "EmojiWorld"]
