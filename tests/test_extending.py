"""A user's own head, guidance and order, from outside of the package: the examples, in sampling and in training."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import Run
from nova_video import NovaPipeline
from nova_video.common.errors import InputError
from nova_video.data.encode import model_size
from nova_video.model import NOVATransformer3DModel, masking
from nova_video.pipeline.request import GenerateRequest
from nova_video.sampling.guidance import Guidance
from nova_video.sampling.schedulers import new_scheduler

EXAMPLES = Path(__file__).parents[1] / "examples"
CALL: dict[str, Any] = {"num_frames": 5, "seed": 0, "output_type": "latent", "sets": 3, "diffusion_steps": 2}


@pytest.fixture(autouse=True)
def _in_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint: Path) -> NovaPipeline:
    found = NovaPipeline.from_pretrained(tiny_checkpoint)
    found.set_progress_bar_config(disable=True)
    return found


def made(pipe: NovaPipeline, **options: Any) -> torch.Tensor:
    return pipe("a whale", **CALL, **options).frames


def test_an_own_order_by_object_and_by_name(pipe: NovaPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raster is what the paper's order becomes where its random numbers rise; the plain and the fast loop follow."""
    raster = importlib.import_module("own_order").Raster()
    by_object = made(pipe, order=raster)
    assert torch.equal(made(pipe, order="own_order:Raster"), by_object)
    torch.testing.assert_close(made(pipe, order=raster, compile=False), by_object, rtol=1e-3, atol=1e-3)
    assert not torch.equal(made(pipe), by_object)
    monkeypatch.setattr(
        masking, "random_order", lambda uniform: torch.arange(uniform.shape[1]).expand(uniform.shape[:2])
    )
    assert torch.equal(made(pipe), by_object)


def test_halton_reveals_every_token_once_and_far_apart() -> None:
    halton = importlib.import_module("own_order").Halton()
    order = halton.reveal(torch.rand(2, 1440, 1), (30, 48))
    assert torch.equal(order[0].sort().values, torch.arange(1440))
    assert torch.equal(order[0], order[1])
    rows, columns = order[0, :12] // 48, order[0, :12] % 48
    assert [((rows // 15 == i) & (columns // 16 == j)).sum().item() for i in (0, 1) for j in (0, 1, 2)] == [2] * 6


def test_an_own_rule_of_guidance(pipe: NovaPipeline, caplog: pytest.LogCaptureFixture) -> None:
    """Over all noise levels the example is the paper's rule; over none it is without guidance. The record names it."""
    interval = importlib.import_module("own_guidance").Interval
    close = {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(
        made(pipe, guidance_rule=interval(4.0, 0, 1000)), made(pipe, guidance_scale=4.0), **close
    )
    torch.testing.assert_close(
        made(pipe, guidance_rule=interval(4.0, 2000, 3000)), made(pipe, guidance_scale=1.0), **close
    )
    assert torch.equal(made(pipe, guidance_rule="own_guidance:Interval"), made(pipe, guidance_rule=interval()))
    settings = pipe("a whale", **CALL, guidance_rule=interval(4.0)).records[0]["settings"]
    assert settings["guidance_rule"] == "own_guidance:Interval(scale=4.0, low=100.0, high=900.0)"
    assert settings["guidance"] is None


def test_the_paper_s_rule_as_an_object(pipe: NovaPipeline) -> None:
    """Three passes with renorm are what the settings say, also in a stream, whose rule is asked for every frame."""
    settings = {"guidance_scale": 3.0, "image_guidance_scale": 2.0, "guidance_renorm": 0.5}
    expected = made(pipe, **settings)
    rule = Guidance(3.0, renorm=0.5, image_scale=2.0)
    assert torch.equal(made(pipe, guidance_rule=rule), expected)
    frames = list(pipe.stream("a whale", **CALL, guidance_rule=rule))
    assert torch.equal(torch.stack(frames, dim=1), expected[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 3}, "order is int without reveal: expected an object with reveal, sizes"),
        ({"order": "own_order"}, "order is 'own_order': expected module:Name"),
        ({"guidance_rule": Guidance}, "guidance_rule is the class Guidance: expected an object"),
        ({"guidance_rule": Guidance(2.0), "guidance_scale": 3.0}, "got both of guidance_rule and guidance_scale"),
        (
            {"guidance_rule": Guidance(2.0), "image_guidance_scale": 3.0},
            "got both of guidance_rule and image_guidance_scale",
        ),
    ],
)
def test_what_is_no_part_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        GenerateRequest("a whale", **options)


def test_a_saved_state_goes_on_with_the_same_parts_alone(pipe: NovaPipeline, tmp_path: Path) -> None:
    """Their names are in the file, and nothing is imported by them."""
    order, interval = importlib.import_module("own_order"), importlib.import_module("own_guidance").Interval
    own = {"order": order.Halton(), "guidance_rule": interval(4.0)}
    whole = made(pipe, **own)
    request = GenerateRequest("a whale", **CALL, **own)
    pipe.generate(request, None, lambda _pipe, step, *_: step < 3).generation.save(tmp_path / "state")
    again = pipe.resume(tmp_path / "state", order=own["order"], guidance_rule=own["guidance_rule"])
    assert again.state.step == 4
    assert torch.equal(again.run().frames, whole)
    with pytest.raises(InputError, match=r"its order is own_order:Halton\(\): expected the same to be given, got none"):
        pipe.resume(tmp_path / "state")
    with pytest.raises(InputError, match=r"its guidance_rule is .*scale=4.0.*: expected the same .*scale=5.0"):
        pipe.resume(tmp_path / "state", order="own_order:Halton", guidance_rule=interval(5.0))


def test_the_example_head_is_opened_by_its_class_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own_head = importlib.import_module("own_head")
    own_head.main()
    assert "the same latents: True" in capsys.readouterr().out
    model = NOVATransformer3DModel(
        image_size=(64, 64),
        text_token_dim=32,
        text_token_len=8,
        image_base_size=(4, 4),
        video_base_size=(1, 2, 2),
        arch=("vit_d2w64", "vit_d2w64", "mlp_d2w64"),
        head=own_head.PlainMlp,
    )
    NovaPipeline(model, new_scheduler("flow")).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "transformer" / "config.json").read_text())
    assert config["head"] == "own_head:PlainMlp"
    assert model_size(str(tmp_path)) == ((64, 64), True)  # for datasets, which need no head
    with pytest.raises(InputError, match=r"its head is own_head:PlainMlp, .* head=THE_CLASS in Python, --head in"):
        NovaPipeline.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="head is Guidance: expected a class of torch.nn.Module"):
        NovaPipeline.from_pretrained(tmp_path, head=Guidance)  # type: ignore[arg-type]


def test_a_head_is_refused_where_the_checkpoint_has_none(tiny_checkpoint: Path) -> None:
    head = importlib.import_module("own_head").PlainMlp
    with pytest.raises(InputError, match=r"head is PlainMlp, but .*config.json names none: expected no head"):
        NovaPipeline.from_pretrained(tiny_checkpoint, head=head)


def test_own_parts_on_the_command_line(run: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A record names them, and making the file again needs them given again: no name of a file is imported."""
    made = ("--frames", 1, "--sets", 2, "--diffusion-steps", 2, "--seed", 0, "--model", tiny_checkpoint)
    parts = ("--order", "own_order:Halton", "--guidance-rule", "own_guidance:Interval")
    code, _, _ = run("generate", "a whale", *made, *parts, "-o", tmp_path / "first.png")
    assert code == 0
    again = ("generate", "--like", tmp_path / "first.png", "-o", tmp_path / "again.png")
    code, _, error = run(*again)
    assert code != 0
    assert "was made with the order 'own_order:Halton()': expected --order with it" in error
    assert run(*again, *parts)[0] == 0
    pictures = [np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("first", "again")]
    assert np.array_equal(*pictures)
    code, _, error = run("generate", "a whale", *made, "--head", "own_head:PlainMlp")
    assert "head is PlainMlp, but" in error
