"""Requests: what None means, what every bound refuses, and that the error says what was got and what is expected."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nova_video.common.errors import InputError
from nova_video.pipeline.plan import Capabilities, size_problem
from nova_video.pipeline.request import GenerateRequest
from nova_video.pipeline.settings import CheckpointSettings, Defaults
from nova_video.sampling.guidance import Guidance

VIDEO = Capabilities(
    image_size=(64, 96),
    image_stride=8,
    size_multiple=32,
    any_size=False,
    video=True,
    temporal_stride=4,
    text_dim=32,
    text_len=8,
    shiftable=False,
    max_diffusion_steps=1000,
)
IMAGE = replace(VIDEO, video=False, temporal_stride=1)


def test_released_defaults() -> None:
    plan = GenerateRequest("a whale").resolve(Defaults(), VIDEO)
    assert (plan.num_frames, plan.latent_frames, plan.fps) == (1, 1, 12)
    assert (plan.sets, plan.diffusion_steps) == (64, 25)
    assert (plan.guidance.values, plan.passes) == ((Guidance(5.0, 0.0, 1.0, 0.0),), 2)
    assert (plan.motion.values, plan.flow_shift, plan.batch) == ((5,), None, 1)
    assert (plan.height, plan.width, plan.grid) == (64, 96, (8, 12))


def test_a_checkpoint_s_own_defaults_and_what_is_given() -> None:
    own = Defaults(num_frames=17, fps=8, sets=16, guidance_scale=4.0)
    plan = GenerateRequest("a whale", fps=4, guidance_scale=0.0).resolve(own, VIDEO)
    assert (plan.num_frames, plan.fps, plan.sets, plan.guidance.at(0).scale) == (17, 4, 16, 0.0)
    assert plan.diffusion_steps == 25


@pytest.mark.parametrize(("frames", "latent"), [(1, 1), (2, 2), (5, 2), (6, 3), (9, 3), (17, 5), (18, 6)])
def test_whole_latent_frames(frames: int, latent: int) -> None:
    assert GenerateRequest("a", num_frames=frames).resolve(Defaults(), VIDEO).latent_frames == latent


def test_batch_of_prompts() -> None:
    request = GenerateRequest(["a", "b"], num_images_per_prompt=3)
    assert request.resolve(Defaults(), VIDEO).batch == 6


def test_other_sizes_with_rotary_positions_only() -> None:
    request = GenerateRequest("a", height=96, width=128)
    any_size = replace(VIDEO, any_size=True)
    plan = request.resolve(Defaults(), any_size)
    assert plan.grid == (12, 16)
    assert size_problem(plan, any_size) == "size is 128x96: the model was trained at 96x64, others may look worse"
    assert size_problem(GenerateRequest("a").resolve(Defaults(), any_size), any_size) is None
    with pytest.raises(InputError, match=r"128x96.*96x64"):
        request.resolve(Defaults(), VIDEO)
    with pytest.raises(InputError, match=r"100x64.*multiples of 32"):
        GenerateRequest("a", width=100).resolve(Defaults(), any_size)


FEATURES = torch.zeros(3, 32)
WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "neither of prompt and prompt_embeds"),
    ({"prompt": "a", "prompt_embeds": [FEATURES]}, "both of prompt and prompt_embeds"),
    ({"prompt": ["a", None]}, "prompt is None"),
    ({"prompt": []}, r"prompt is \[\]"),
    ({"prompt": 3}, "prompt is 3"),
    ({"prompt": "a \ud800"}, "prompt is 'a .ud800': expected text that UTF-8 can hold"),
    ({"prompt": "a", "negative_prompt": "\ud800"}, "negative_prompt is '.ud800': expected text that UTF-8 can hold"),
    ({"prompt": "a", "negative_prompt": 3}, "negative_prompt is 3"),
    ({"prompt": ["a", "b", "c"], "negative_prompt": ["d", "e"]}, "got 2 negative prompts: expected 1 or 3"),
    ({"prompt": "a", "negative_prompt": "b", "negative_prompt_embeds": [FEATURES]}, "both of negative"),
    ({"prompt_embeds": FEATURES}, r"prompt_embeds: got \(3, 32\): expected a list"),
    ({"prompt_embeds": [FEATURES[None]]}, r"\(1, 3, 32\) in the list"),
    ({"prompt_embeds": [FEATURES.long()]}, "int64"),
    ({"prompt_embeds": [np.zeros((3, 32))]}, "ndarray in the list"),
    ({"prompt": "a", "num_frames": 0}, "num_frames is 0: expected a whole number of at least 1"),
    ({"prompt": "a", "num_frames": 2.5}, "num_frames is 2.5"),
    ({"prompt": "a", "num_frames": True}, "num_frames is True"),
    ({"prompt": "a", "num_inference_steps": 0}, "sets is 0"),
    ({"prompt": "a", "num_diffusion_steps": 0}, "diffusion_steps is 0"),
    ({"prompt": "a", "guidance_scale": -1.0}, "guidance_scale is -1.0: expected a number of at least 0"),
    ({"prompt": "a", "guidance_scale": float("nan")}, "guidance_scale is nan"),
    ({"prompt": "a", "guidance_scale": "5"}, "guidance_scale is '5'"),
    ({"prompt": "a", "guidance_renorm": 1.5}, "guidance_renorm is 1.5: expected a number of at least 0 and at most 1"),
    ({"prompt": "a", "guidance_trunc": -1}, "guidance_trunc is -1"),
    ({"prompt": "a", "image_guidance_scale": -1}, "image_guidance_scale is -1"),
    ({"prompt": "a", "motion_flow": -1}, "motion_flow is -1"),
    ({"prompt": "a", "flow_shift": 0}, "flow_shift is 0: expected a number of more than 0"),
    ({"prompt": "a", "fps": 0}, "fps is 0: expected a number of at least 0.1 and at most 1000"),
    ({"prompt": "a", "height": 0}, "height is 0"),
    ({"prompt": "a", "num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
    ({"prompt": "a", "seed": -1}, "seed is -1"),
    ({"prompt": "a", "output_type": "jpg"}, "output_type is 'jpg': expected one of pil, np, pt, latent"),
    ({"prompt": "a", "image": "cat.png"}, "image: got str"),
    ({"prompt": "a", "image": np.zeros((8, 8, 3))}, "image: got float64"),
    ({"prompt": "a", "image": np.zeros((8, 8), np.uint8)}, r"image: got uint8 \(8, 8\)"),
]


@pytest.mark.parametrize(("values", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_with_any_model(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        GenerateRequest(**values)
    assert "\n" not in str(caught.value)


WRONG_HERE: list[tuple[dict[str, Any], Capabilities, str]] = [
    ({"prompt": "a", "num_frames": 5}, IMAGE, "num_frames is 5: expected 1, since this model makes images"),
    ({"prompt": "a", "num_frames": 5}, replace(VIDEO, temporal_stride=1), "autoencoder is of images"),
    ({"prompt": "a", "motion_flow": 5}, IMAGE, "motion_flow is 5"),
    ({"prompt": "a", "flow_shift": 2}, VIDEO, "flow_shift is 2"),
    ({"prompt": "a", "diffusion_steps": 1001}, VIDEO, "diffusion_steps is 1001.*at most 1000"),
    ({"prompt": "a", "image": Image.new("RGB", (8, 8))}, VIDEO, "num_frames is 1 with an image"),
    ({"prompt_embeds": [torch.zeros(3, 16)]}, VIDEO, r"got \(3, 16\): expected \(tokens, 32\)"),
    ({"prompt_embeds": [torch.zeros(9, 32)]}, VIDEO, "at most 8 tokens"),
    ({"prompt": "a", "negative_prompt_embeds": [torch.zeros(3, 16)]}, VIDEO, "negative_prompt_embeds: got"),
]


@pytest.mark.parametrize(("values", "model", "message"), WRONG_HERE, ids=[message for *_, message in WRONG_HERE])
def test_wrong_with_this_model(values: dict[str, Any], model: Capabilities, message: str) -> None:
    with pytest.raises(InputError, match=message):
        GenerateRequest(**values).resolve(Defaults(), model)


def test_numbers_of_numpy_are_numbers() -> None:
    plan = GenerateRequest("a", num_frames=np.int64(5), guidance_scale=np.float32(2)).resolve(Defaults(), VIDEO)
    assert (plan.num_frames, plan.guidance.at(0).scale) == (5, 2)


def test_settings_file(tmp_path: Path) -> None:
    assert CheckpointSettings.load(tmp_path) == CheckpointSettings()
    own = CheckpointSettings("sentence-transformers/all-MiniLM-L6-v2", Defaults(num_frames=17, fps=8))
    own.save(tmp_path)
    assert CheckpointSettings.load(tmp_path) == own
    written = json.loads((tmp_path / "nova.json").read_text())
    assert written["text_encoder"] == own.text_encoder
    assert written["defaults"]["num_frames"] == 17


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", r"the file is \[\]"),
        ('{"default": {}}', "unknown key default: expected one of text_encoder, defaults"),
        ('{"defaults": {"frames": 3}}', "unknown key defaults.frames"),
        ('{"defaults": 3}', "defaults is 3"),
        ('{"defaults": {"num_frames": 0}}', "num_frames is 0"),
        ('{"text_encoder": 3}', "text_encoder is 3"),
    ],
)
def test_wrong_settings_file(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "nova.json").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        CheckpointSettings.load(tmp_path)
    assert "nova.json" in str(caught.value)


AMOUNTS = [
    ({"height": 10**6, "width": 10**6}, "height is 1000000.*at most 16,384; of 1000000x1000000 pixels, .* 24 TB"),
    ({"num_frames": 10**9}, "num_frames is 1000000000: .*at most 1,000,000"),
    ({"num_images_per_prompt": 10**9}, "num_images_per_prompt is 1000000000: .*at most 10,000; .* TB of memory"),
    ({"num_images_per_prompt": 10**400}, "num_images_per_prompt is 1000.*more than there is"),
    ({"sets": 10**12}, "sets is 1000000000000: .*at most 65,536"),
    ({"sets": math.inf}, "sets is inf"),
    ({"diffusion_steps": 10**12}, "diffusion_steps is 1000000000000: .*at most 100,000"),
    ({"fps": 1e-5}, "fps is 1e-05: expected a number of at least 0.1 and at most 1000"),
    ({"fps": 1e9}, "fps is 1000000000.0: .*at most 1000"),
    ({"fps": math.inf}, "fps is inf"),
    ({"seconds": 1e300}, "seconds is 1e[+]300"),
    ({"context_frames": math.inf}, "context_frames is inf"),
    ({"context_frames": 10**5000}, "context_frames is a number of about 5000 digits"),
    ({"guidance_scale": math.inf}, "guidance_scale is inf"),
    ({"guidance_scale": 1e30}, "guidance_scale is 1e[+]30: .*at most 1000"),
    ({"history_noise": 1e30}, "history_noise is 1e[+]30"),
    ({"flow_shift": 1e30}, "flow_shift is 1e[+]30"),
    ({"seed": 2**63}, "seed is 9223372036854775808"),
    ({"preset": {}}, "preset is {}: expected one of exact"),
    ({"preset": []}, r"preset is \[\]: expected one of exact"),
    ({"solver": 5}, "solver is 5: expected own or dpm"),
    ({"compile": "yes"}, "compile is 'yes': expected True or False"),
    ({"fp8": 1}, "fp8 is 1: expected True or False"),
    ({"prompt": None, "prompt_embeds": [torch.full((2, 32), math.nan)]}, "prompt_embeds: got values that are not"),
]


@pytest.mark.parametrize(("values", "message"), AMOUNTS, ids=[message[:40] for _, message in AMOUNTS])
def test_amounts_are_bounded_without_a_model(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        GenerateRequest(**{"prompt": "a whale", **values})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


def test_memory_is_estimated() -> None:
    """What cannot be held is refused, with what would take it; `memory_gb` is the bound."""
    model = replace(VIDEO, any_size=True, layers=16, width=1024)
    with pytest.raises(InputError, match=r"16384x16384 would take more memory .* encoders' activations about .* GB"):
        GenerateRequest("a", height=16_384, width=16_384).resolve(Defaults(), model)
    with pytest.raises(InputError, match="memory_gb allows: the cache of earlier frames about 3 GB, .*context_frames"):
        GenerateRequest("a", num_frames=10_000, memory_gb=2).resolve(Defaults(), model)
    plan = GenerateRequest("a", num_frames=10_000, memory_gb=math.inf).resolve(Defaults(), model)
    plan.check_pixels()
    with pytest.raises(InputError, match="its pixels about 1 GB: expected at most 1 GB"):
        replace(plan, memory_gb=1.0).check_pixels()
