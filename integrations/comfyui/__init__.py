"""Nodes of nova-video for ComfyUI, by its V3 contract. ComfyUI calls `comfy_entrypoint` when it loads this folder."""

from .nodes import comfy_entrypoint

__all__ = ["comfy_entrypoint"]
