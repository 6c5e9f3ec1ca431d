"""The door to media files."""

from nova_video.io.pictures import upright_srgb

__all__ = ["upright_srgb"]
