"""Arguments that `NovaPipeline` does not take, and what to write instead.

Scripts for the released code and for diffusers' other pipelines give arguments that this pipeline has no use for. Each
call refuses them here with the way to get the same; any other unknown name gets the nearest one that exists.
"""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches

from nova_video.errors import InputError

OPEN_HINTS = {
    "custom_pipeline": "none: no code of a checkpoint is ever run",
}
"""For `NovaPipeline.from_pretrained`."""

CALL_HINTS = {
    "max_latent_length": "num_frames, in pixel frames: num_frames = 4 (n - 1) + 1 for n latent frames",
    "latents": "generator for a fixed start, or video with the latents of a clip to go on from",
    "spatiotemporal_guidance_scale": "image_guidance_scale; in the released code this one has no effect",
}
"""For calls of the pipeline."""


def refuse_keywords(call: str, given: Iterable[str], hints: Mapping[str, str], known: Iterable[str]) -> None:
    """`given` is empty, or an InputError says what to give in the first one's place."""
    for name in given:
        near = get_close_matches(name, list(known), n=1)
        expected = hints.get(name) or (near[0] if near else "one of its arguments, which help(...) lists")
        raise InputError(f"{name} is no argument of {call}: expected {expected}")
