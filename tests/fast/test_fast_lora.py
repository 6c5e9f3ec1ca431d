"""Adapters in the fast engine: layers within blocks, captured graphs, 8 bit copies and compiled blocks."""
# ruff: noqa: F401, F811  (fixtures of other files are arguments here)

import copy
from pathlib import Path

import pytest
import torch
from test_engine import DirectRecorder
from torch import Tensor

import nova_video.fast.fp8
from nova_video import NovaPipeline
from nova_video.fast.fast_engine import DirectRunner, FastEngine
from nova_video.fast.graphs import GraphRunner
from nova_video.model import NOVATransformer3DModel
from nova_video.model.lora import merge
from nova_video.sampling.engine import PlainEngine
from test_lora import adapted, adapter, close, pipe, sample


def test_the_fast_engine_takes_adapters(tiny_checkpoint: Path) -> None:
    model = adapted(tiny_checkpoint)
    expected = sample(model, PlainEngine(model))
    close(sample(model, FastEngine(model, DirectRunner(set_multiple=8))), expected)


def test_graphs_notice_adapters(tiny_checkpoint: Path) -> None:
    """Recorded work keeps scales: it is let go when they, or what is used, change; not when nothing does."""
    model, recorder = adapted(tiny_checkpoint), DirectRecorder()
    runner = GraphRunner(recorder, compiled=False)

    def quick() -> Tensor:
        runner.use(model)
        held = len(runner)
        out = sample(model, FastEngine(model, runner))
        assert len(runner) >= held
        return out

    quick(), quick()
    held = len(runner)
    assert held > 0
    runner.use(model)
    assert len(runner) == held
    for change in (
        lambda: model.set_adapters(["default"], [0.5]),
        model.disable_adapters,
        model.enable_adapters,
        model.fuse_lora,
        model.unload_lora,
    ):
        quick(), quick()
        assert len(runner) > 0
        change()
        runner.use(model)
        assert len(runner) == 0
        close(quick(), sample(model, PlainEngine(model)))


def test_8_bit_weights_are_made_again_with_the_adapter(
    pipe: NovaPipeline, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of merged weights, whenever those are others; here in all their bits, as there is no GPU."""

    def merged_copy(model: NOVATransformer3DModel) -> NOVATransformer3DModel:
        made = copy.deepcopy(model)
        merge(made)
        return made

    monkeypatch.setattr(nova_video.fast.fp8, "with_fp8_blocks", merged_copy)
    seen = [pipe.engines.fp8_model(pipe.transformer)]
    for change in (
        lambda: pipe.load_lora_weights(adapter, adapter_name="mine"),
        lambda: pipe.set_adapters("mine", 0.5),
        lambda: pipe.fuse_lora(),
        lambda: pipe.unfuse_lora(),
        lambda: pipe.fuse_lora(),
        lambda: pipe.unload_lora_weights(),
    ):
        change()
        seen.append(pipe.engines.fp8_model(pipe.transformer))
        assert pipe.engines.fp8_model(pipe.transformer) is seen[-1]
        expected = copy.deepcopy(pipe.transformer)
        merge(expected)
        found = seen[-1].state_dict()
        assert all(torch.allclose(found[key], value, atol=1e-6) for key, value in expected.state_dict().items())
    weights = [model.video_encoder.blocks[0].mlp.fc1.weight for model in seen]
    assert not torch.allclose(weights[0], weights[1], atol=1e-3)
    assert not torch.allclose(weights[1], weights[2], atol=1e-3)
    assert not torch.allclose(weights[0], weights[-1], atol=1e-3)


@pytest.mark.slow
def test_compiled_blocks_take_adapters(tiny_checkpoint: Path) -> None:
    model = adapted(tiny_checkpoint)
    engine = FastEngine(model, DirectRunner(compiled=True))
    for scale in (1.0, 0.5):
        model.set_adapters(["default"], [scale])
        close(sample(model, engine), sample(model, PlainEngine(model)))
