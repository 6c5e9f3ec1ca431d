"""`nova data inspect`: a good dataset passes and meets its sources, and all that can be wrong with one is said."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nova_video.autoencoders import AutoencoderKLCausalTiny
from nova_video.cli.main import main
from nova_video.common.errors import InputError
from nova_video.data import dataset
from nova_video.data.dataset import Bucket, DatasetInfo, EncodedSample
from nova_video.data.encode import encode_dataset
from nova_video.data.encode_settings import EncodeSettings
from nova_video.data.inspect import check_dataset, compare_samples, comparison_sheet, psnr
from nova_video.data.sources import SourceSettings
from nova_video.data.stages import DecodeSettings

CLIP, PICTURE = Bucket(5, 64, 64), Bucket(1, 64, 64)


def draw(number: int, frames: int) -> list[Image.Image]:
    y, x = np.mgrid[:64, :64]
    waves = [np.stack([np.sin((x + t * 2 + number * y) / 9 + c) for c in range(3)], -1) for t in range(frames)]
    return [Image.fromarray((127 * (1 + wave)).astype(np.uint8)) for wave in waves]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three lossless clips of 11 frames and a picture."""
    folder = tmp_path_factory.mktemp("films")
    for number in range(3):
        first, *rest = draw(number, 11)
        first.save(
            folder / f"c{number}.webp", save_all=True, append_images=rest, duration=125, lossless=True, exact=True
        )
        (folder / f"c{number}.txt").write_text("a whale moving left. the apple.")
    draw(7, 1)[0].save(folder / "p.png")
    (folder / "p.txt").write_text("a red apple")
    return folder


@pytest.fixture(scope="module")
def made(sources: Path, tmp_path_factory: pytest.TempPathFactory, tiny_text_encoder: Path) -> Path:
    """Their dataset, in two groups."""
    folder = tmp_path_factory.mktemp("dataset")
    torch.manual_seed(0)
    vae = AutoencoderKLCausalTiny(latent_channels=4, block_out_channels=(8, 8, 8), norm_num_groups=4)
    vae.save_pretrained(folder / "model" / "vae")
    settings = EncodeSettings(
        source=SourceSettings(str(sources), group=2),
        decode=DecodeSettings(frames=(5,), fps=8.0, size=(64, 64)),
        output=folder / "films",
        model=str(folder / "model"),
        text=str(tiny_text_encoder),
        device="cpu",
    )
    encode_dataset(settings)
    return folder / "films"


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "films")
    return tmp_path / "films"


def problems(place: Path) -> list[str]:
    """Of all shards, with the shard's path in the dataset before it."""
    found = check_dataset(place).problems
    return [f"{str(where).removeprefix(f'{place}/')}: {what}" for where, said in found.items() for what in said]


def test_a_good_dataset_meets_its_sources(made: Path, sources: Path) -> None:
    checked = check_dataset(made)
    assert checked.problems == {}
    assert checked.rows == 7
    compared = compare_samples(made, checked.shards, clips=9, pictures=9, device="cpu")
    assert len(compared) == 7
    for one in compared:
        name, number = one.sample.source, int(one.sample.id.rsplit("#", 1)[1])
        drawn = draw(7, 1) if name == "p.png" else draw(int(name[1]), 11)[5 * number : 5 * number + 5]
        assert one.source is not None
        assert np.array_equal(one.source, np.stack([np.asarray(frame) for frame in drawn]))
        assert one.psnr == psnr(one.source, one.decoded)
    page = np.asarray(comparison_sheet(made, compared))
    assert page.std() > 10


def test_psnr_of_known_errors() -> None:
    zeros = np.zeros((1, 4, 4, 3), np.uint8)
    assert psnr(zeros, zeros) == float("inf")
    assert psnr(zeros, zeros + 255) == 0
    assert psnr(zeros, zeros + 1) == pytest.approx(48.13, abs=0.01)
    assert psnr(zeros + 255, zeros) == 0  # no wrapping round


def test_the_command(made: Path, sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["data", "inspect", str(made), "--device", "cpu", "-o", str(tmp_path / "new" / "a.png")]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "7 samples in 3 shards without problems\ndecoded against source: " in printed
    with Image.open(tmp_path / "new" / "a.png") as page:
        assert page.format == "PNG"
    sources.rename(tmp_path / "moved")
    try:
        assert main(command) == 0
        assert "the sources are not there: name their place with --sources" in capsys.readouterr().out
        assert main([*command, "--sources", str(tmp_path / "moved")]) == 0
        assert "decoded against source: " in capsys.readouterr().out
        (tmp_path / "other").mkdir()
        draw(1, 1)[0].save(tmp_path / "other" / "x.png")
        (tmp_path / "other" / "x.txt").write_text("a whale")
        assert main([*command, "--sources", str(tmp_path / "other")]) == 2
        assert "other: holds none of the sources, such as c0.webp" in capsys.readouterr().err
    finally:
        (tmp_path / "moved").rename(sources)
    assert main([*command[:-1], str(tmp_path / "none.png"), "--clips", "0", "--pictures", "0"]) == 0
    assert capsys.readouterr().out.endswith("without problems\n")
    assert not (tmp_path / "none.png").exists()
    assert main([*command, "--clips", "-1"]) == 2
    assert "clips is -1: expected a whole number of at least 0" in capsys.readouterr().err
    assert main([*command, "--model", "emoji"]) == 2
    assert "the autoencoder of emoji is " in capsys.readouterr().err
    assert main(["data", "inspect", str(tmp_path)]) == 2
    assert "has no dataset.json" in capsys.readouterr().err


def rewrite(
    place: Path, bucket: Bucket, group: str, change: Callable[[EncodedSample], EncodedSample], fingerprint: str = ""
) -> Path:
    """A shard again, with its first sample changed."""
    path = Path(dataset.shard_url(place, bucket, group))
    first, *rest = dataset.read_shard(path)
    dataset.write_shard(path, [change(first), *rest], fingerprint or DatasetInfo.load(place).fingerprint)
    return path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda one: replace(one, moments=one.moments * float("nan")), "moments are not finite"),
        (lambda one: replace(one, moments=one.moments[:, :1]), r"moments are (8, 1, 8, 8): expected (8, 2, 8, 8)"),
        (lambda one: replace(one, text=one.text[:, :5]), "text features are 5 wide: expected 32"),
        (lambda one: replace(one, text=one.text / 0), "text features are not finite"),
        (lambda one: replace(one, text=None), "has no text features"),
        (lambda one: replace(one, caption=" "), "has no caption"),
        (lambda one: replace(one, fps=0.0), "fps is 0.0: expected more than 0"),
        (lambda one: replace(one, motion=float("nan")), "motion is nan: expected at least 0"),
        (lambda one: replace(one, end=one.start), "is from 0 to 0 s: expected the end after the start"),
    ],
)
def test_wrong_samples_are_named(copy: Path, change: Callable[[EncodedSample], EncodedSample], said: str) -> None:
    rewrite(copy, CLIP, "00000-00000", change)
    assert problems(copy) == [f"data/5x64x64/00000-00000.parquet: c0.webp#0: {said}"]


def test_wrong_shards_are_named(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = rewrite(copy, CLIP, "00000-00000", lambda one: one, fingerprint="other")
    assert "was made by the autoencoder other: expected " in problems(copy)[0]
    whole = path.read_bytes()

    path.write_bytes(whole[: len(whole) // 2])
    assert problems(copy)[0].startswith("data/5x64x64/00000-00000.parquet: unreadable shard")
    assert main(["data", "inspect", str(copy), "--device", "cpu", "-o", str(copy / "a.png")]) == 2
    out, err = capsys.readouterr()
    assert "unreadable shard" in out
    assert "3 samples in 2 shards without problems" in out
    assert "problem" in err
    assert (copy / "a.png").exists()


def test_an_autoencoder_that_is_gone_can_be_named(
    copy: Path, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replace(DatasetInfo.load(copy), autoencoder="gone").save(copy)
    command = ["data", "inspect", str(copy), "--device", "cpu", "-o", str(tmp_path / "a.png")]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"nova: {copy}/dataset.json names the autoencoder: model 'gone' not found: expected ")
    assert error.endswith("; --model names another\n")
    assert main([*command, "--model", "lost"]) == 2
    assert capsys.readouterr().err.startswith("nova: model 'lost' not found: expected ")
    assert main([*command, "--model", DatasetInfo.load(made).autoencoder]) == 0


def test_shards_in_the_wrong_place_are_named(copy: Path) -> None:
    there = Path(dataset.shard_url(copy, CLIP, "00000-00000"))
    there.with_name("00000-00009.parquet").write_bytes(there.read_bytes())
    assert problems(copy) == [
        "data/5x64x64/00000-00009.parquet: c0.webp#0 and 3 more: its id is in the dataset already",
        f"{copy}: group 00000-00009 is not finished: run the same `nova encode` again",
    ]
    there.unlink()
    assert any("group 00000-00000 has 0 rows in 5x64x64: expected 4, which" in problem for problem in problems(copy))
    moved = Path(dataset.shard_url(copy, Bucket(5, 64, 96), "00000-00009"))
    moved.parent.mkdir()
    there.with_name("00000-00009.parquet").rename(moved)
    assert "c0.webp#0 and 3 more: is of bucket 5x64x64: expected 5x64x96" in "\n".join(problems(copy))


def test_a_dataset_without_records_is_checked_as_well(copy: Path) -> None:
    shutil.rmtree(copy / "progress")
    assert problems(copy) == []
    shutil.rmtree(copy / "data")
    with pytest.raises(InputError, match="holds no shards"):
        check_dataset(copy)
