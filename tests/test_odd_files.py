"""Odd files on their way through `nova encode`: each costs itself and a line, and the card is drawn in any case."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from nova_video.autoencoders import AutoencoderKLCausalTiny
from nova_video.common.errors import InputError
from nova_video.data.encode import encode_dataset
from nova_video.data.encode_settings import EncodeSettings
from nova_video.data.encoders import EncodeText
from nova_video.data.inspect import check_dataset, compare_samples, comparison_sheet
from nova_video.data.sources import SourceSettings
from nova_video.data.stages import DecodeSettings

FAILS = "fails in the text encoder"
NAMES = {
    "two\nlines.png": "a\x85caption\u2028of lines",
    "\x1b[31mred.png": "\x1b[31mred",
    "\u202eright to left.png": "من اليمين",
    "emoji 👩‍🚀.png": "👩‍🚀 鲸鱼",
    "take 1.0.png": "word " * 5000,
    "fails.png": FAILS,
}


@pytest.fixture
def settings(tmp_path: Path, tiny_text_encoder: Path) -> EncodeSettings:
    torch.manual_seed(0)
    vae = AutoencoderKLCausalTiny(latent_channels=4, block_out_channels=(8, 8, 8), norm_num_groups=4)
    vae.save_pretrained(tmp_path / "model" / "vae")
    (tmp_path / "in").mkdir()
    return EncodeSettings(
        source=SourceSettings(str(tmp_path / "in")),
        decode=DecodeSettings(frames=(5,), fps=8.0, size=(64, 64)),
        output=tmp_path / "out",
        model=str(tmp_path / "model"),
        text=str(tiny_text_encoder),
        device="cpu",
    )


def test_the_rest_goes_on(settings: EncodeSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(settings.source.place)
    for name, caption in NAMES.items():
        Image.new("RGB", (64, 64), "red").save(folder / name)
        (folder / name).with_suffix(".txt").write_text(caption, encoding="utf-8")
    (folder / os.fsdecode(b"caf\xe9.png")).write_bytes((folder / "fails.png").read_bytes())
    (folder / "pointer.png").write_text("version https://git-lfs.github.com/spec/v1\n")
    (folder / "pointer.txt").write_text("a pointer")
    os.mkfifo(folder / "pipe.mp4")
    encode = EncodeText.__call__

    def fail(self: EncodeText, captions: Sequence[str]) -> Any:
        if FAILS in captions:
            raise RecursionError("too deep\x1b[0m")
        return encode(self, captions)

    monkeypatch.setattr(EncodeText, "__call__", fail)
    summary = encode_dataset(settings)
    lines = (settings.output / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    assert {line["source"]: line["reason"] for line in map(json.loads, lines)} == {
        "caf\\xe9.png": "its name is not UTF-8: expected one that is",
        "fails.png": "clip 0 failed: RecursionError: too deep\\x1b[0m",
        "pipe.mp4": "is a pipe, a socket or a device: expected a file",
        "pointer.png": "is a Git LFS pointer, not the file itself: expected the file, which `git lfs pull` fetches",
    }
    assert sum(summary.clips.values()) == len(NAMES) - 1
    assert "too deep\\x1b[0m" in (settings.output / "README.md").read_text(encoding="utf-8")
    checked = check_dataset(settings.output)
    assert checked.problems == {}
    compared = compare_samples(settings.output, checked.shards, clips=0, pictures=9, device="cpu")
    assert {one.sample.source for one in compared} == NAMES.keys() - {"fails.png"}
    assert all(one.source is not None for one in compared)
    assert comparison_sheet(settings.output, compared).width == Image.open(settings.output / "sheet.png").width


def test_nothing_is_left(settings: EncodeSettings) -> None:
    """One line, as for other wrong input."""
    folder = Path(settings.source.place)
    (folder / "a.png").touch()
    (folder / "a.txt").write_text("a")
    with pytest.raises(InputError, match=r"nothing could be encoded, all 1 were rejected: a\.png "):
        encode_dataset(settings)
