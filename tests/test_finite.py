"""Values that are not finite never become a picture: one line says where they are, and nothing is written."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import CONFORMANCE
from nova_video import NovaPipeline
from nova_video.cli import main as cli
from nova_video.common.errors import InputError

QUICK: dict[str, Any] = {"num_inference_steps": 2, "num_diffusion_steps": 2, "num_frames": 5}


def open_pipeline() -> NovaPipeline:
    pipe = NovaPipeline.from_pretrained(CONFORMANCE / "text-to-video")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def embeds() -> list[torch.Tensor]:
    return [torch.randn(5, 32, generator=torch.Generator().manual_seed(0))]


def spoil(part: str, name: str, value: float) -> Callable[[NovaPipeline], None]:
    def change(pipe: NovaPipeline) -> None:
        with torch.no_grad():
            getattr(pipe, part).get_parameter(name).view(-1)[0] = value

    return change


SPOILT = [
    (
        spoil("transformer", "image_decoder.head.weight", math.nan),
        "latent frame 0 has values that are not finite: expected finite weights, but the transformer's"
        " image_decoder.head.weight is not",
    ),
    (
        spoil("transformer", "video_encoder.blocks.0.attn.qkv.bias", math.inf),
        "video_encoder.blocks.0.attn.qkv.bias is not",
    ),
    (spoil("transformer", "image_encoder.norm.weight", 3e38), "latent frame 0 has values that are not finite: "),
    (
        spoil("vae", "decoder.conv_out.weight", math.nan),
        "the autoencoder's pixels are not finite: expected finite weights, but its decoder.conv_out.weight is not",
    ),
]


@pytest.mark.parametrize(("change", "message"), SPOILT)
@pytest.mark.parametrize("compile", [True, False])
def test_what_is_not_finite_is_named(change: Callable[[NovaPipeline], None], message: str, compile: bool) -> None:
    pipe = open_pipeline()
    change(pipe)
    with pytest.raises(InputError) as caught:
        pipe(prompt_embeds=embeds(), compile=compile, **QUICK)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError):
        list(pipe.stream(prompt_embeds=embeds(), compile=compile, **QUICK))


def test_a_callback_is_a_function() -> None:
    with pytest.raises(InputError, match="callback_on_step_end is 5: expected a function"):
        open_pipeline()(prompt_embeds=embeds(), callback_on_step_end=5, **QUICK)  # type: ignore[arg-type]


def test_arguments_of_other_kinds(tmp_path: Path) -> None:
    pipe = open_pipeline()
    with pytest.raises(InputError, match="generator: got 5: expected one"):
        pipe(prompt_embeds=embeds(), generator=5, **QUICK)  # type: ignore[arg-type]
    for scale in (math.inf, math.nan, 1e30):
        with pytest.raises(InputError, match="the adapter's scale is .*: expected a number of at least -1000"):
            pipe.load_lora_weights(tmp_path, scale=scale)


def test_nothing_is_written(tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the command, of a checkpoint whose weights are not finite."""
    pipe = NovaPipeline.from_pretrained(tiny_checkpoint)
    spoil("transformer", "image_decoder.head.bias", math.nan)(pipe)
    pipe.save_pretrained(tmp_path / "spoilt")
    made = tmp_path / "made"
    made.mkdir()
    words = ["generate", "a whale", "--model", str(tmp_path / "spoilt"), "--sets", "2", "--diffusion-steps", "2"]
    assert cli.main([*words, "--device", "cpu", "-o", str(made / "clip.mp4")]) != 0
    printed = capsys.readouterr()
    assert "image_decoder.head.bias is not" in printed.err
    assert not list(made.iterdir())


@pytest.mark.parametrize("words", [["words", "--model", ""], ["generate", "a whale", "--image", " "]])
def test_empty_values_of_options_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) != 0
    assert f"{words[-2]} is empty: expected a value" in capsys.readouterr().err
