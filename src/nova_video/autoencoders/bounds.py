"""Bounds of an autoencoder's config, of whatever class: what is outside would hang, overflow or make black pictures."""

from collections.abc import Mapping
from typing import Any

from nova_video.common.checks import check_number, check_whether, quote
from nova_video.common.errors import InputError

COUNTS = {  # the most of each: released ones have at most 512 channels, 4 levels and 3 layers a block
    "in_channels": 64,
    "out_channels": 64,
    "latent_channels": 4096,
    "layers_per_block": 64,
    "norm_num_groups": 4096,
    "sample_size": 16_384,
}
MOST_LEVELS, MOST_CHANNELS, MOST_SCALE = 16, 16_384, 1e6


def check_autoencoder_config(config: Mapping[str, Any]) -> None:
    """Raises InputError for the first value of a known key that no autoencoder has."""
    for name, most in COUNTS.items():
        values = config.get(name, [])  # layers_per_block may be one number a level
        for value in values if isinstance(values, list | tuple) else [values]:
            check_number(name, value, 1, integer=True, high=most)
    for name in ("block_out_channels", "down_block_types", "up_block_types"):
        values = config.get(name, [1])
        if not isinstance(values, list | tuple) or not 1 <= len(values) <= MOST_LEVELS:
            raise InputError(f"{name} is {quote(values)}: expected a list of 1 to {MOST_LEVELS}")
        if name != "block_out_channels" and not all(isinstance(value, str) for value in config.get(name, ())):
            raise InputError(f"{name} is {quote(values)}: expected names of blocks")
    for channels in config.get("block_out_channels", ()):
        check_number("block_out_channels", channels, 1, integer=True, high=MOST_CHANNELS)
    if "scaling_factor" in config:
        check_number("scaling_factor", config["scaling_factor"], 0, above=True, high=MOST_SCALE)
    if config.get("shift_factor") is not None:
        check_number("shift_factor", config["shift_factor"], -MOST_SCALE, high=MOST_SCALE)
    for name in ("latents_mean", "latents_std"):
        values = config.get(name)
        if values is None:
            continue
        if not isinstance(values, list | tuple) or len(values) != config.get("latent_channels", len(values)):
            raise InputError(f"{name} is {quote(values)}: expected one number a latent channel")
        for value in values:
            deviation = name == "latents_std"
            check_number(name, value, 0 if deviation else -MOST_SCALE, above=deviation, high=MOST_SCALE)
    for name in ("force_upcast", "use_quant_conv", "use_post_quant_conv"):
        check_whether(name, config.get(name))
