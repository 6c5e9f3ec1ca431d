"""The network: weights and the maths that need them, without state of any call. It reads like the paper.
`transformer.py` assembles the parts; `lora.py` handles adapters.

It may import `common`.
"""

from nova_video.model.embeddings import Positions
from nova_video.model.masking import RANDOM_ORDER, Order, RandomOrder, mask_ratios, random_order, set_sizes
from nova_video.model.patches import patchify, unpatchify
from nova_video.model.transformer import NOVATransformer3DModel
from nova_video.model.vit import TemporalCache

__all__ = [
    "RANDOM_ORDER",
    "NOVATransformer3DModel",
    "Order",
    "Positions",
    "RandomOrder",
    "TemporalCache",
    "mask_ratios",
    "patchify",
    "random_order",
    "set_sizes",
    "unpatchify",
]
