"""Conversion: what the released trainer writes becomes a checkpoint that opens, and a pickle runs nothing."""

import json
import logging
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import CONFORMANCE
from nova_video import NovaPipeline
from nova_video.cli import main as cli
from nova_video.common.errors import InputError
from nova_video.pipeline.convert import convert
from nova_video.pipeline.loading import load_autoencoder, load_transformer

BASE = CONFORMANCE / "published-flow"
BIN = "diffusion_pytorch_model.bin"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def trained_weights() -> dict[str, torch.Tensor]:
    """Those of the base, moved a little as training does."""
    tensors = load_file(BASE / "transformer" / WEIGHTS)
    return {key: value if key == "text_embed.weight" else value.float() + 0.01 for key, value in tensors.items()}


def write_output(folder: Path, weights: Any = None, name: str = BIN) -> Path:
    """A checkpoint-N of the released trainer."""
    (folder / "transformer").mkdir(parents=True)
    shutil.copy(BASE / "transformer" / "config.json", folder / "transformer" / "config.json")
    torch.save(trained_weights() if weights is None else weights, folder / "transformer" / name)
    return folder


def test_the_trainer_s_output_becomes_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_output(tmp_path / "checkpoint-5")
    with pytest.raises(InputError, match=f"nova convert {source} --base MODEL -o NEW_FOLDER"):
        NovaPipeline.from_pretrained(BASE, transformer=source)
    assert cli.main(["convert", str(source), "--base", str(BASE), "-o", str(tmp_path / "new")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "new")
    pipe = NovaPipeline.from_pretrained(tmp_path / "new")
    pipe.set_progress_bar_config(disable=True)
    state = pipe.transformer.state_dict()
    assert all(torch.equal(state[key], value.float()) for key, value in trained_weights().items())
    steps: dict[str, Any] = {"num_inference_steps": 2, "num_diffusion_steps": 2, "output_type": "pt"}
    made = pipe("a red whale", generator=torch.Generator().manual_seed(0), **steps).images
    parts = NovaPipeline.from_pretrained(BASE, transformer=pipe.transformer)
    assert torch.equal(made, parts("a red whale", generator=torch.Generator().manual_seed(0), **steps).images)
    assert not list(tmp_path.glob(".*"))
    mode = (tmp_path / "new" / "transformer" / WEIGHTS).stat().st_mode
    assert mode & 0o777 == (tmp_path / "new" / "transformer" / "config.json").stat().st_mode & 0o777


def test_without_a_base_the_transformer_stands_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    new = convert(write_output(tmp_path / "checkpoint-5"), tmp_path / "new")
    assert [path.name for path in new.iterdir()] == ["transformer"]
    assert f"from_pretrained(MODEL, transformer={str(new)!r})" in caplog.text
    assert NovaPipeline.from_pretrained(BASE, transformer=new).transformer.dtype == torch.float32
    with pytest.raises(InputError, match=f"nova convert {new} --base MODEL -o NEW_FOLDER makes one of it"):
        NovaPipeline.from_pretrained(new)
    whole = convert(new, tmp_path / "whole", str(BASE))  # safetensors that lack the other parts
    assert NovaPipeline.from_pretrained(whole).text_encoder is not None


@pytest.mark.parametrize(
    "place",
    [
        lambda output: output / "ema_checkpoints",
        lambda output: output / "ema_checkpoints" / "checkpoint-5",
        lambda output: output / "ema_checkpoints" / "checkpoint-5" / "transformer" / BIN,
    ],
)
def test_averaged_weights(place: Callable[[Path], Path], tmp_path: Path) -> None:
    """Of a run with both: the source says which."""
    output = write_output(tmp_path / "run")
    zeros = {key: torch.zeros_like(value) for key, value in trained_weights().items()}
    write_output(output / "ema_checkpoints" / "checkpoint-5", zeros)
    state = load_transformer(convert(place(output), tmp_path / "new")).state_dict()
    assert not any(value.any() for value in state.values())
    assert load_transformer(convert(output, tmp_path / "plain")).mask_embed.mask_token.any()


@pytest.mark.parametrize("form", ["nested", "wrapped", "compiled", "legacy", "shards", "fp16 shards", "other name"])
def test_forms_of_pickled_weights(form: str, tmp_path: Path) -> None:
    weights = trained_weights()
    folder = write_output(tmp_path / "run") / "transformer"
    if form == "nested":
        torch.save({"step": 5, "ema": {"decay": 0.9, "module": {"state_dict": weights}}}, folder / BIN)
    elif form == "wrapped":
        torch.save({f"module.{key}": value for key, value in weights.items()}, folder / BIN)
    elif form == "compiled":
        named = {f"transformer.module._orig_mod.{key.replace('.0.', '.0._orig_mod.')}": weights[key] for key in weights}
        torch.save(named, folder / BIN)
    elif form == "legacy":
        torch.save(weights, folder / BIN, _use_new_zipfile_serialization=False)
    elif form == "other name":
        (folder / BIN).rename(folder / "step-5.pth")
    else:
        (folder / BIN).unlink()
        keys, shards = sorted(weights), ["part-1.bin", "part-2.bin"]
        for name, part in zip(shards, (keys[::2], keys[1::2]), strict=True):
            torch.save({key: weights[key] for key in part}, folder / name)
        weight_map = {key: shards[number % 2] for number, key in enumerate(keys)}
        index = f"{BIN}.index.json" if form == "shards" else f"{BIN}.index.fp16.json"
        (folder / index).write_text(json.dumps({"weight_map": weight_map}))
    state = load_transformer(convert(tmp_path / "run", tmp_path / "new")).state_dict()
    assert all(torch.equal(state[key], value.float()) for key, value in weights.items())


@pytest.mark.parametrize("name", [WEIGHTS, "diffusion_pytorch_model.fp16.safetensors"])
def test_a_padding_table_that_was_left_out(name: str, tmp_path: Path) -> None:
    """It is the base's: training leaves it as it was."""
    base = Path(shutil.copytree(BASE, tmp_path / "base"))
    (base / "transformer" / WEIGHTS).rename(base / "transformer" / name)
    weights = trained_weights()
    table = weights.pop("text_embed.weight")
    source = write_output(tmp_path / "run", weights)
    with pytest.raises(InputError, match="has no text_embed.weight.*: expected --base"):
        convert(source, tmp_path / "new")
    state = load_transformer(convert(source, tmp_path / "new", str(base))).state_dict()
    assert torch.equal(state["text_embed.weight"], table.float())


def test_a_pickled_autoencoder_comes_too(tmp_path: Path) -> None:
    source = write_output(tmp_path / "run")
    shutil.copytree(BASE / "vae", source / "vae")
    tensors = load_file(source / "vae" / WEIGHTS)
    (source / "vae" / WEIGHTS).unlink()
    torch.save(tensors, source / "vae" / BIN)
    vae = load_autoencoder(convert(source, tmp_path / "new", str(BASE)))
    assert vae is not None
    assert vae.config.scaling_factor == 0.13025
    kept, expected = vae.state_dict(), load_autoencoder(BASE)
    assert expected is not None
    assert all(torch.equal(kept[key], value) for key, value in expected.state_dict().items())


class Spy:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("form", ["torch", "plain", "legacy"])
def test_a_pickle_runs_nothing(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_output(tmp_path / "run")
    weights = trained_weights() | {"surprise": Spy(tmp_path / "ran")}
    path = source / "transformer" / BIN
    if form == "plain":
        path.write_bytes(pickle.dumps(Spy(tmp_path / "ran")))
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=form == "torch")
    assert cli.main(["convert", str(source), "-o", str(tmp_path / "new")]) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told == f"nova: {path}: is a pickle of more than tensors, which could run code: expected a state dict alone"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("mask_embed.bos_token"), "missing keys mask_embed.bos_token"),
        (lambda w: w.update(surprise=torch.zeros(1)), "extra keys surprise"),
        (lambda w: w.update({"mask_embed.bos_token": torch.zeros(1, 7)}), r"wrong shapes mask_embed\.bos_token"),
        (lambda w: w.update({"mask_embed.bos_token": torch.full((1, 64), torch.nan)}), "values that are not finite"),
        (lambda w: w.update({"mask_embed.bos_token": torch.ones(1, 64, dtype=torch.long)}), "expected dense floating"),
        (lambda w: w.update({"mask_embed.bos_token": torch.ones(1, 64, device="meta")}), "a shape and no values"),
        (lambda w: w.update(step=5), "holds 'step' of type int: expected tensors"),
        (lambda w: [w.pop(key) for key in list(w) if key.startswith("text_embed")], "class-conditional"),
    ],
)
def test_weights_that_do_not_fit(change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path) -> None:
    weights: dict[str, Any] = trained_weights()
    change(weights)
    with pytest.raises(InputError, match=message) as caught:
        convert(write_output(tmp_path / "run", weights), tmp_path / "new", str(BASE))
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize("damage", ["short", "text", "empty"])
def test_damaged_files(damage: str, tmp_path: Path) -> None:
    path = write_output(tmp_path / "run") / "transformer" / BIN
    path.write_bytes({"short": path.read_bytes()[:5000], "text": b"not a pickle at all", "empty": b""}[damage])
    with pytest.raises(InputError, match=f"{BIN}: ") as caught:
        convert(tmp_path / "run", tmp_path / "new")
    assert "\n" not in str(caught.value)


def test_places_that_are_refused(tmp_path: Path) -> None:
    source = write_output(tmp_path / "checkpoint-1")
    write_output(tmp_path / "checkpoint-2")
    (tmp_path / "there").mkdir()
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ((source, tmp_path / "there"), "there exists: expected a new folder"),
        ((source, tmp_path / "no" / "new"), "there is no folder"),
        ((source, Path("s3://bucket/new")), "expected a local folder"),
        ((tmp_path, tmp_path / "new"), "has weights in .*checkpoint-1/transformer, .*: expected one folder"),
        ((tmp_path / "empty", tmp_path / "new"), "has no weights"),
        ((tmp_path / "nowhere", tmp_path / "new"), "nowhere not found"),
        ((source, tmp_path / "new", "no-such-model"), "'no-such-model' not found"),
        ((source, tmp_path / "new", str(tmp_path / "checkpoint-2")), "has no scheduler/"),
    ):
        with pytest.raises(InputError, match=message):
            convert(*arguments)
    (source / "text_encoder").mkdir()
    config = json.loads((BASE / "text_encoder" / "config.json").read_text()) | {"hidden_size": 64}
    (source / "text_encoder" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="has features of width 64: expected 32"):
        convert(source, tmp_path / "new", str(BASE))


def test_a_base_with_a_pickled_text_encoder_is_refused(tmp_path: Path) -> None:
    base = Path(shutil.copytree(BASE, tmp_path / "base"))
    for path in (base / "text_encoder").glob("model*"):
        path.unlink()
    (base / "text_encoder" / "pytorch_model.bin").touch()
    with pytest.raises(InputError, match=r"has only pickled weights, pytorch_model.bin: expected model.safetensors"):
        convert(write_output(tmp_path / "run"), tmp_path / "new", str(base))
    assert not (tmp_path / "new").exists()


def test_half_precision_names_are_a_source(tmp_path: Path) -> None:
    base = Path(shutil.copytree(BASE, tmp_path / "base"))
    (base / "transformer" / WEIGHTS).rename(base / "transformer" / WEIGHTS.replace(".safe", ".fp16.safe"))
    assert NovaPipeline.from_pretrained(convert(base, tmp_path / "new")).vae is not None
