"""Saved generations that were cut, edited or made by somebody else: one clear line each, and nothing silently taken."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import CONFORMANCE
from nova_video import NovaPipeline
from nova_video.common.errors import InputError
from nova_video.pipeline.request import GenerateRequest
from nova_video.pipeline.saving import KEY

Facts, Tensors = dict[str, Any], dict[str, Tensor]


@pytest.fixture(scope="module")
def pipe() -> NovaPipeline:
    pipe = NovaPipeline.from_pretrained(CONFORMANCE / "text-to-video")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def saved(pipe: NovaPipeline, tmp_path_factory: pytest.TempPathFactory) -> tuple[Facts, Tensors]:
    """A clip of four latent frames, stopped within the third."""
    embeds = [torch.randn(5, 32, generator=torch.Generator().manual_seed(0))]
    request = GenerateRequest(
        prompt_embeds=embeds,
        num_frames=13,
        seed=0,
        sets=4,
        diffusion_steps=2,
        guidance_every=2,
        history_noise=0.1,
        output_type="np",
    )
    path = tmp_path_factory.mktemp("states") / "state"
    generation = pipe.start(request)
    generation.run(lambda _pipe, step, *_: step < 8)
    generation.save(path)
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()[KEY])
    assert facts["open"]["sets"] == 1
    return facts, load_file(path)


def write(path: Path, facts: object, tensors: Tensors) -> Path:
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, path, {KEY: json.dumps(facts)})
    return path


def test_as_it_was_saved(pipe: NovaPipeline, saved: tuple[Facts, Tensors], tmp_path: Path) -> None:
    assert np.isfinite(pipe.resume(write(tmp_path / "state", *saved)).run().frames).all()


def set_at(*keys: Any) -> Callable[[Facts, Tensors], None]:
    """The last of `keys` is the value for the entry that the others lead to."""
    *way, last, value = keys

    def change(facts: Facts, _: Tensors) -> None:
        place: Any = facts
        for key in way:
            place = place[key]
        place[last] = value

    return change


def tensor(name: str, change: Callable[[Tensor], Tensor] | None) -> Callable[[Facts, Tensors], None]:
    def changed(_: Facts, tensors: Tensors) -> None:
        old = tensors.pop(name, torch.zeros(3))
        if change is not None:
            tensors[name] = change(old)

    return changed


def spoilt(value: Tensor) -> Tensor:
    value = value.clone()
    value.view(-1)[0] = math.nan
    return value


WRONG: list[tuple[Callable[[Facts, Tensors], None], str]] = [
    (set_at("plan", "height", 0), "height is 0"),
    (set_at("plan", "width", "96"), "plan.width is '96': expected a whole number"),
    (set_at("plan", "batch", 10**9), "batch is 1000000000"),
    (set_at("plan", "grid", [8]), "plan.grid is [8]: expected a list"),
    (set_at("plan", "grid", [4, 12]), "grid is (4, 12)"),
    (set_at("plan", "fps", 0), "fps is 0"),
    (set_at("plan", "num_frames", 10**8), "num_frames is 100000000"),
    (set_at("plan", "num_frames", 0), "num_frames is 0"),
    (set_at("plan", "num_frames", 5), "expected"),
    (set_at("plan", "sets", 10**12), "sets is 1000000000000"),
    (set_at("plan", "diffusion_steps", 10**4), "diffusion_steps is 10000"),
    (set_at("plan", "temporal_stride", 0), "temporal_stride is 0: expected 4"),
    (set_at("plan", "guidance_scale", "x"), "guidance_scale is 'x': expected a finite number"),
    (set_at("plan", "guidance_scale", None), "guidance_scale is None: expected a number"),
    (set_at("plan", "guidance_scale", []), "guidance_scale is an empty timeline"),
    (set_at("plan", "guidance_scale", [[1.0, 3.0]]), "starts at 1 s"),
    (set_at("plan", "motion_flow", [[0.0, -1]]), "motion_flow is -1"),
    (set_at("plan", "solver", "ddim"), "solver is 'ddim'"),
    (set_at("plan", "extra", 1), "has the key 'extra'"),
    (set_at("plan", "context_frames", 5), "context_frames is 5 with 1 first frames kept"),
    (set_at("plan", "sink_frames", 0), "sink_frames is 0"),
    (set_at("plan", None), "plan is None: expected an object"),
    (set_at("plan", "offset", 3), "offset is 3"),
    (set_at("output_type", "gif"), "output_type is 'gif'"),
    (set_at("bare", 1), "bare is 1: expected true or false"),
    (set_at("seeds", []), "seeds are 0"),
    (set_at("seeds", ["a"]), "seeds is 'a': expected a whole number"),
    (set_at("emitted", -1), "emitted is -1"),
    (set_at("emitted", 9), "emitted is 9: expected a whole number of at least 0 and at most 5"),
    (set_at("notes", []), "notes is []: expected an object"),
    (set_at("passes", 3), "passes are 3: expected 2"),
    (set_at("segments", []), "segments do not begin"),
    (set_at("segments", 0, "start", 2), "segments do not begin"),
    (set_at("segments", 0, "text", 7), "segment's text is 7"),
    (set_at("segments", 0, "guidance", "scale", 9.0), "another guidance than the plan"),
    (set_at("sentences", "pictures", 2), "sentences' pictures is 2"),
    (set_at("sentences", "texts", [[0, 0]]), "sentences are not of 1 clips: expected 1 texts"),
    (set_at("sentences", "times", []), "sentences' times are []"),
    (set_at("sentences", "times", [1.0]), "segments do not begin at frame"),
    (set_at("sentences", "times", [-1.0]), "sentences' first time is -1"),
    (set_at("sentences", "negatives", []), "sentences' negatives are 0"),
    (set_at("sentences", "negatives", [9]), "feature of its sentences is 9"),
    (tensor("feature.0", None), "lacks the tensor feature.0"),
    (tensor("feature.0", lambda x: x[:, :3]), "feature.0 is float32 5x3"),
    (tensor("feature.0", lambda x: torch.zeros(999, 32)), "feature.0 is float32 999x32"),
    (tensor("feature.0", spoilt), "feature.0 has values that are not finite"),
    (set_at("given", {"1": 3}), "given frame is '1'"),
    (set_at("given", {"x": 3}), "given frame is 'x'"),
    (set_at("given", {"3": 3}), "lacks the tensor given.3.latents"),
    (set_at("cached", [0, 7]), "cached frames are [0, 7]"),
    (set_at("cached", "all"), "cached is 'all': expected a list"),
    (set_at("built", 99), "built is 99"),
    (set_at("cached_segment", 1), "cached_segment is 1"),
    (set_at("done", 3), "expected"),
    (set_at("done", 10**30), "done is 1000"),
    (set_at("step", 3), "step is 3: expected 9"),
    (set_at("generators", ["mars"]), "generator on 'mars' cannot be restored"),
    (set_at("generators", ["meta"]), "drawn on meta"),
    (set_at("open", "sizes", [24]), "expected"),
    (set_at("open", "known", 5), "expected 24 tokens in all"),
    (set_at("open", "sets", 99), "sets is 99"),
    (set_at("open", None), "belongs to nothing in it"),
    (set_at("model", [1]), "saved with another model (mark [1])"),
    (set_at("dtype", None), "with a model in None"),
    (set_at("format", 1), "saved in format 1: expected 2, finish it with nova-video 0.1, or start anew"),
    (set_at("format", 3), "saved in format 3"),
    (tensor("order", lambda x: torch.zeros_like(x)), "order is no order"),
    (tensor("order", lambda x: x.int()), "order is int32 1x24: expected int64 1x24"),
    (tensor("order", None), "lacks the tensor order"),
    (tensor("open.order", lambda x: x + 1), "open.order is no order"),
    (tensor("open.condition", lambda x: x[:1]), "open.condition is float32 1x6x64: expected float32 2x6x64"),
    (tensor("open.differences", None), "lacks the tensor open.differences"),
    (tensor("open.tokens", spoilt), "open.tokens has values that are not finite"),
    (tensor("text.0", lambda x: x.half()), "text.0 is float16"),
    (tensor("text.0", lambda x: x[:, :3]), "text.0 is float32 2x3x64"),
    (tensor("frames.0", spoilt), "frames.0 has values that are not finite"),
    (tensor("frames.1", None), "lacks the tensor frames.1"),
    (tensor("frames.1", lambda x: x[..., :4]), "frames.1 is float32 1x4x8x4"),
    (tensor("frames.9", lambda x: x), "frames.9' belongs to nothing in it"),
    (tensor("frames.x", lambda x: x), "frames.x' belongs to nothing in it"),
    (tensor("heard.0", lambda x: x[0]), "heard.0 is float32 4x8x12"),
    (tensor("generator.0", lambda x: x[:7]), "generator on 'cpu' cannot be restored"),
    (tensor("generator.0", lambda x: x.float()), "generator.0 is float32"),
    (tensor("generator.0", None), "lacks the tensor generator.0"),
    (tensor("pixels", lambda x: x), "pixels' belongs to nothing in it"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[f"{i}: {m[:30]}" for i, (_, m) in enumerate(WRONG)])
def test_what_does_not_fit_is_named(
    change: Callable[[Facts, Tensors], None],
    message: str,
    pipe: NovaPipeline,
    saved: tuple[Facts, Tensors],
    tmp_path: Path,
) -> None:
    facts, tensors = copy.deepcopy(saved[0]), dict(saved[1])
    change(facts, tensors)
    with pytest.raises(InputError) as caught:
        pipe.resume(write(tmp_path / "state", facts, tensors))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("key", ["plan", "segments", "generators", "notes", "seeds", "done", "open"])
def test_what_is_missing_is_named(key: str, pipe: NovaPipeline, saved: tuple[Facts, Tensors], tmp_path: Path) -> None:
    facts = {name: value for name, value in saved[0].items() if name != key}
    with pytest.raises(InputError, match="belongs to nothing in it" if key == "open" else f"lacks {key}: expected it"):
        pipe.resume(write(tmp_path / "state", facts, saved[1]))


def test_files_that_are_no_state(pipe: NovaPipeline, saved: tuple[Facts, Tensors], tmp_path: Path) -> None:
    nested = tmp_path / "nested"
    save_file({"a": torch.zeros(1)}, nested, {KEY: "[" * 100_000})
    whole = write(tmp_path / "whole", *saved)
    cut = tmp_path / "cut"
    cut.write_bytes(whole.read_bytes()[:-100])
    for path in (nested, cut, write(tmp_path / "list", [1], saved[1])):
        with pytest.raises(InputError, match="not a saved generation"):
            pipe.resume(path)
