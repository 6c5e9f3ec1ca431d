"""Low memory: parts take turns, results stay. On a CPU the turns are taken where the parts are already."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from conftest import CONFORMANCE
from nova_video import NovaPipeline
from nova_video.common.errors import InputError
from nova_video.pipeline.conditions import encode_prompts
from nova_video.pipeline.offload import LowMemory, OffloadHook, enable_low_memory, quantise, take_turns

QUICK: dict[str, Any] = {"num_inference_steps": 2, "num_diffusion_steps": 2, "num_frames": 5, "output_type": "pt"}


def open_pipe(folder: Path) -> NovaPipeline:
    pipe = NovaPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def made(pipe: NovaPipeline) -> torch.Tensor:
    return pipe("a whale", generator=torch.Generator().manual_seed(0), **QUICK).frames


def test_low_memory_keeps_the_result(tiny_checkpoint: Path) -> None:
    expected = made(open_pipe(tiny_checkpoint))
    pipe = open_pipe(tiny_checkpoint)
    enable_low_memory(pipe, "cpu")
    assert pipe.is_offloaded
    assert pipe.execution_device.type == "cpu"
    assert not pipe.vae.use_tiling
    for _ in range(2):
        assert (made(pipe) - expected).abs().max() < 1e-4
    streamed = pipe.stream("a whale", generator=torch.Generator().manual_seed(0), **QUICK)
    assert (torch.stack(list(streamed)) - expected[0]).abs().max() < 1e-4


def test_graphs_are_told_that_the_transformer_leaves(tiny_checkpoint: Path, monkeypatch) -> None:
    pipe, told = open_pipe(tiny_checkpoint), []
    enable_low_memory(pipe, "cpu")
    hook = pipe.transformer._hf_hook
    hook.on_leave = lambda: told.append(pipe.transformer.device.type)
    assert not hook.to_host()  # it is at home
    assert told == []
    pipe.transformer.to("meta")
    assert all(not tensor.is_cpu for tensor in hook._tensors())
    monkeypatch.setattr(pipe.transformer, "to", lambda device: None)  # nothing comes back from there
    assert hook.to_host()
    assert told == ["meta"]


def test_int8_text_is_close(tiny_checkpoint: Path) -> None:
    pytest.importorskip("torchao")
    pipe = open_pipe(tiny_checkpoint)
    expected = encode_prompts(pipe._parts(), ["a whale"])["a whale"]
    enable_low_memory(pipe, "cpu", text_encoder="int8", tiled=True)
    features = encode_prompts(pipe._parts(), ["a whale"])["a whale"]
    assert pipe.vae.use_tiling
    assert 0 < (features - expected).abs().max() < 0.05 * expected.abs().max()
    assert torch.isfinite(made(pipe)).all()


@pytest.mark.parametrize("asked", [True, "cuda:0", LowMemory(tiled=True), LowMemory(text_encoder="int8")])
def test_from_pretrained_reaches_all_of_it(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, asked: Any) -> None:
    """As if there were a GPU, with the parts on the CPU."""
    devices: list[Any] = []

    def on_cpu(pipe: NovaPipeline, device: Any, *more: Any) -> None:
        devices.append(device)
        enable_low_memory(pipe, "cpu", *more)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("nova_video.pipeline.storage.enable_low_memory", on_cpu)
    monkeypatch.setattr("nova_video.pipeline.offload.quantise", lambda module: setattr(module, "quantised", True))
    pipe = NovaPipeline.from_pretrained(tiny_checkpoint, low_memory=asked)
    assert devices == ["cuda:0" if asked == "cuda:0" else "cuda"]
    assert isinstance(pipe.transformer._hf_hook, OffloadHook)
    assert pipe.vae.use_tiling == (isinstance(asked, LowMemory) and asked.tiled)
    assert hasattr(pipe.text_encoder, "quantised") == (asked == LowMemory(text_encoder="int8"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a computer without a GPU")
@pytest.mark.parametrize(("asked", "message"), [(True, "there is none here"), (LowMemory("cpu"), "got cpu")])
def test_low_memory_needs_a_gpu(asked: Any, message: str) -> None:
    """Said before anything is loaded."""
    with pytest.raises(InputError, match=f"low_memory is for a GPU: {message}"):
        NovaPipeline.from_pretrained(CONFORMANCE / "text-to-image", low_memory=asked)


def test_options_that_would_do_nothing_are_refused(tiny_checkpoint: Path) -> None:
    pipe = open_pipe(tiny_checkpoint)
    bare = NovaPipeline(pipe.transformer, pipe.scheduler)
    with pytest.raises(InputError, match="'int8': expected a checkpoint with a text encoder"):
        enable_low_memory(bare, "cpu", text_encoder="int8")
    with pytest.raises(InputError, match="tiled is True: expected a checkpoint with an autoencoder"):
        enable_low_memory(bare, "cpu", tiled=True)


def test_tiles_are_close(tiny_checkpoint: Path) -> None:
    """Frames of 64x96 in tiles of 32: all that differs is the pixels."""
    expected, pipe = made(open_pipe(tiny_checkpoint)), open_pipe(tiny_checkpoint)
    pipe.vae.tile_size, pipe.vae.tile_overlap = 32, 16
    enable_low_memory(pipe, "cpu", tiled=True)
    difference = (made(pipe) - expected).abs()
    assert 0 < difference.mean() < 0.1


def test_int8_without_torchao_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(InputError, match="needs torchao: expected it to be installed"):
        quantise(nn.Linear(2, 2))


def test_low_memory_is_asked_once(tiny_checkpoint: Path) -> None:
    pipe = open_pipe(tiny_checkpoint)
    with pytest.raises(InputError, match="'float' or 'int8'"):
        enable_low_memory(pipe, "cpu", text_encoder="int4")  # type: ignore[arg-type]
    enable_low_memory(pipe, "cpu")
    with pytest.raises(InputError, match="already"):
        enable_low_memory(pipe, "cpu")


def test_bringing_a_part_sends_the_others_back(monkeypatch) -> None:
    """On a GPU: here what moves is only noted."""
    moves: list[tuple[str, int]] = []
    parts = [nn.Linear(size, size) for size in (1, 2, 3)]
    monkeypatch.setattr(OffloadHook, "to_device", lambda self: moves.append(("to_device", self.module.in_features)))
    monkeypatch.setattr(OffloadHook, "to_host", lambda self: moves.append(("to_host", self.module.in_features)))
    take_turns(parts, torch.device("cpu"))
    parts[1](torch.zeros(1, 2))
    assert moves == [("to_host", 1), ("to_host", 3), ("to_device", 2)]


def test_in_a_stream_parts_change_only_to_decode(tiny_checkpoint: Path, monkeypatch) -> None:
    """A piece of this autoencoder is five latent frames, then four: nothing is moved in between."""
    pipe = open_pipe(tiny_checkpoint)
    enable_low_memory(pipe, "cpu")
    brought: list[str] = []
    come = OffloadHook.to_device

    def note(turn: OffloadHook) -> None:
        come(turn)
        name = "vae" if turn.module is pipe.vae else "transformer"
        brought.extend([name] if brought[-1:] != [name] else [])

    monkeypatch.setattr(OffloadHook, "to_device", note)
    assert len(list(pipe.stream("a whale", **QUICK | {"num_frames": 33}))) == 33
    assert brought == ["transformer", "vae", "transformer", "vae"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_weights_come_back_as_they_were() -> None:
    parts = [nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Conv3d(2, 2, 3)]
    parts[2].weight.data = parts[2].weight.data.contiguous(memory_format=torch.channels_last_3d)
    before = [{name: tensor.clone() for name, tensor in part.state_dict().items()} for part in parts]
    take_turns(parts, torch.device("cuda"))
    for part in (*parts, *parts):
        part._hf_hook.pre_forward(part)
        assert [next(other.parameters()).is_cuda for other in parts] == [other is part for other in parts]
    assert parts[2].weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert parts[2]._hf_hook.to_host()
    assert not parts[2]._hf_hook.to_host()
    for part, state in zip(parts, before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in part.state_dict().items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_graphs_last_until_the_transformer_leaves(tiny_checkpoint: Path) -> None:
    """And the next call, whose weights are elsewhere, has graphs of its own."""
    kept: list[int] = []

    def count(pipe: NovaPipeline, step: int, frame: int, tensors: dict[str, torch.Tensor]) -> None:
        kept.append(pipe.engines.num_graphs)

    pipe = open_pipe(tiny_checkpoint)
    enable_low_memory(pipe, "cuda")
    clips = []
    for _ in range(3):
        generator = torch.Generator().manual_seed(0)
        clips.append(pipe("a whale", generator=generator, callback_on_step_end=count, **QUICK).frames)
        assert kept[0] == 0
        assert kept[-1] > 0
        assert not pipe.engines.num_graphs
        kept.clear()
    plain = made(open_pipe(tiny_checkpoint).to("cuda"))
    for clip in clips:
        assert (clip - plain).abs().mean() < 1e-3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("text_encoder", ["float", "int8"])
def test_gpu_parts_take_turns(tiny_checkpoint: Path, text_encoder: Any) -> None:
    if text_encoder == "int8" and importlib.util.find_spec("torchao") is None:
        pytest.skip("needs torchao")
    expected = made(open_pipe(tiny_checkpoint))
    pipe = open_pipe(tiny_checkpoint)
    enable_low_memory(pipe, "cuda", text_encoder)
    for _ in range(2):
        difference = (made(pipe).cpu() - expected).abs()
        assert difference.mean() < (1e-3 if text_encoder == "float" else 0.1)
    assert (pipe.transformer.device.type, pipe.vae.device.type) == ("cpu", "cuda")
