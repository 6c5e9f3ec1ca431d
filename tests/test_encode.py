"""`nova encode` in one process: what it writes, and that a run which was stopped anywhere ends as one that was not."""

import importlib.util
import json
import shutil
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from conftest import another_process_writes
from nova_video.cli import main as cli
from nova_video.common.errors import InputError
from nova_video.common.extras import install_command
from nova_video.data import dataset as dataset_module
from nova_video.data import encode as encode_module
from nova_video.data import stages as stages_module
from nova_video.data.dataset import Bucket, DatasetInfo, list_shards, read_shard
from nova_video.data.encode import decode_settings, encode_dataset, source_settings
from nova_video.data.encode_settings import EncodeSettings
from nova_video.data.encoders import EncodeText
from nova_video.data.sources import SourceSettings, open_source
from nova_video.data.stages import Decode, DecodedClip, DecodeSettings, Item
from nova_video.io import checkpoints, media
from nova_video.io.motion import flow_magnitude
from nova_video.pipeline.loading import load_autoencoder
from nova_video.training.recipe import DatasetRecipe, DatasetTransformerRecipe, LogRecipe, ModelRecipe
from nova_video.training.trainer import train

Encode = Callable[..., tuple[int, str, str]]
SIZE = (64, 96)  # of the tiny checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos, three pictures, and four files that something is wrong with."""
    folder = tmp_path_factory.mktemp("source") / "clips"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number, length in enumerate((19, 12)):
        texture = generator.integers(0, 255, (8, 16, 3), np.uint8)
        wide = np.asarray(Image.fromarray(texture).resize((160, 80), Image.Resampling.BICUBIC))
        frames = np.stack([wide[:64, 2 * k : 2 * k + 96] for k in range(length)])
        media.write_media(frames, folder / f"video-{number}.mp4", 8, {})
        (folder / f"video-{number}.txt").write_text(f"the whale moving left {number}. On blue.")
    for number, shape in enumerate([(64, 96), (70, 105), (128, 64)]):
        pixels = generator.integers(0, 255, (*shape, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"picture-{number}.png")
        (folder / f"picture-{number}.txt").write_text("the apple")
    (folder / "broken.mp4").write_bytes(b"broken")
    (folder / "broken.txt").write_text("the whale")
    (folder / "lonely.txt").write_text("the whale")
    Image.new("RGB", (30, 20)).save(folder / "small.png")
    (folder / "small.json").write_text('{"caption": "the apple"}')
    Image.new("RGB", SIZE).save(folder / "untold.png")
    return folder


REJECTED = {
    "broken.mp4": "broken: it is damaged, or of no known format",
    "lonely.txt": "a caption without media: nothing of its name is beside it",
    "small.png": "is 30x20, too small: it would be enlarged 3.20 times for 96x64, expected at most 1.25",
    "untold.png": "no caption: there is no .txt or .json of its name beside it",
}


@pytest.fixture
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the card, which decodes samples."""
    monkeypatch.setattr(encode_module, "write_card", lambda *given: None)


@pytest.fixture
def encode(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> Encode:
    """`nova encode SOURCE -o OUTPUT` in this process, with the tiny checkpoint."""

    def call(source: object, output: object, *arguments: object) -> tuple[int, str, str]:
        words = ["encode", source, "-o", output, "--no-ray", "--model", tiny_checkpoint, "--device", "cpu", *arguments]
        code = cli.main([str(word) for word in words])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def settings(source: Path, output: Path, model: Path, group: int = 3) -> EncodeSettings:
    return EncodeSettings(
        SourceSettings(str(source), group=group),
        DecodeSettings((5, 9), 8.0, SIZE),
        output,
        model=str(model),
        text=str(model),
        device="cpu",
    )


def content(output: Path) -> dict[str, bytes]:
    return {str(path.relative_to(output)): path.read_bytes() for path in sorted(output.rglob("*")) if path.is_file()}


def test_what_is_written(source: Path, tmp_path: Path, encode: Encode, tiny_checkpoint: Path) -> None:
    """Every row is what the parts give for the frames that decoding gives; what is wrong is told and stops nothing."""
    output = tmp_path / "dataset"
    code, out, err = encode(source, output, "--frames", 5, 9, "--fps", 8, "--size", "96x64")
    assert (code, err) == (0, "")
    assert out == f"{output}: 3 clips and 3 pictures from 9 sources, 4 rejected (rejected.jsonl)\n"
    lines = [json.loads(line) for line in (output / "rejected.jsonl").read_text().splitlines()]
    assert {line["source"]: line["reason"] for line in lines} == REJECTED

    info = DatasetInfo.load(output)
    decoded: dict[str, DecodedClip] = {}
    for item in open_source(source_settings(info.settings)).items():
        found = Decode(decode_settings(info))(item)
        decoded |= {clip.id: clip for clip in found if isinstance(clip, DecodedClip)}
    shards = list_shards(output)
    assert {bucket.name: sum(shard.rows for shard in found) for bucket, found in shards.items()} == {
        "1x64x96": 2,
        "1x128x64": 1,
        "9x64x96": 3,
    }
    samples = [sample for found in shards.values() for shard in found for sample in read_shard(shard.url)]
    assert sorted(sample.id for sample in samples) == sorted(decoded)
    vae = load_autoencoder(tiny_checkpoint)
    text = EncodeText(str(tiny_checkpoint), "cpu")
    for sample in samples:
        clip = decoded[sample.id]
        pixels = torch.from_numpy(clip.frames.copy()).permute(3, 0, 1, 2)[None] / 127.5 - 1  # (1, 3, F, H, W)
        moments = vae.encode(pixels).latent_dist.parameters[0]  # type: ignore[union-attr]
        assert sample.moments.dtype == torch.bfloat16
        torch.testing.assert_close(sample.moments.float(), moments, rtol=0.02, atol=0.02)
        assert sample.moments.shape == info.moments_shape(sample.bucket)
        (features,) = text([clip.caption])
        torch.testing.assert_close(sample.text, features.text, rtol=0.01, atol=0.01)
        assert (sample.text_short is None) == (features.short is None) == (clip.caption == "the apple")
        assert (sample.source, sample.start, sample.end, sample.caption, sample.fps) == (
            *(clip.source, clip.start, clip.end, clip.caption, clip.fps),
        )
        expected = flow_magnitude(clip.frames) if len(clip.frames) > 1 else 0
        assert sample.motion == pytest.approx(expected, rel=1e-5)
        assert (sample.motion > 1) == (len(clip.frames) > 1)
    card = (output / "README.md").read_text()
    assert "9x64x96" in card
    assert Image.open(output / "sheet.png").size[0] > 96


@pytest.mark.usefixtures("no_card")
def test_defaults_are_the_checkpoints(source: Path, tmp_path: Path, encode: Encode) -> None:
    """A checkpoint for pictures of 96x64, no other size, at 12 frames a second, unless something else is said."""
    encode(source, tmp_path / "a", "--text-encoder", "none")
    info = DatasetInfo.load(tmp_path / "a")
    assert (info.settings["size"], info.settings["one_size"]) == ("96x64", True)
    assert (info.settings["fps"], info.settings["frames"]) == (12, [1])
    assert (info.text_encoder, info.text_dim) == (None, None)
    shards = list_shards(tmp_path / "a")
    assert {bucket.name: sum(shard.rows for shard in found) for bucket, found in shards.items()} == {"1x64x96": 4}
    assert all(sample.text is None for found in shards.values() for sample in read_shard(found[0].url))
    encode(source, tmp_path / "b", "--size", 64, "--one-size")
    assert DatasetInfo.load(tmp_path / "b").settings["size"] == "64x64"
    assert list(list_shards(tmp_path / "b")) == [Bucket(1, 64, 64)]


@pytest.mark.usefixtures("no_card")
def test_the_same_from_every_place(source: Path, tmp_path: Path, tiny_checkpoint: Path) -> None:
    """Files beside captions, tar members, rows of bytes, here and through fsspec: the same clips, to the last bit."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    good = sorted(path for path in source.iterdir() if path.suffix in (".mp4", ".png") and path.name not in REJECTED)
    rows = []
    with tarfile.open(tmp_path / "clips.tar", "w") as tar:
        for path in good:
            rows.append({"video": path.read_bytes(), "caption": path.with_suffix(".txt").read_text()})
            tar.add(path.with_suffix(".txt"), f"./{path.stem}.txt")
            tar.add(path, f"./{path.name}")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "clips.parquet")
    memory = fsspec.filesystem("memory")
    memory.put(str(source), "/everywhere/clips", recursive=True)
    memory.put(str(tmp_path / "clips.tar"), "/everywhere/clips.tar")
    places = [
        *(str(source), "memory://everywhere/clips", f"file://{source}"),
        *(f"{tmp_path}/clips.tar", "memory://everywhere/clips.tar", f"{tmp_path}/clips.parquet"),
    ]
    found = []
    for number, place in enumerate(places):
        chosen = settings(source, tmp_path / str(number), tiny_checkpoint)
        encode_dataset(replace(chosen, source=SourceSettings(place), text=None))
        shards = list_shards(tmp_path / str(number))
        samples = [sample for bucket in shards for shard in shards[bucket] for sample in read_shard(shard.url)]
        found.append([(s.caption, s.start, s.motion, s.moments.view(torch.int16).tolist()) for s in samples])
    assert len(found[0]) == 6
    assert all(other == found[0] for other in found[1:])


class KilledError(BaseException):
    """In the place of kill -9: nothing catches it."""


@pytest.mark.usefixtures("no_card")
def test_stopped_anywhere(source: Path, tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped within every file that is written, what is there of it left behind: the next run ends with the same
    files, and does no finished group again."""
    stages = encode_module.Stages.load(settings(source, tmp_path, tiny_checkpoint))
    monkeypatch.setattr(encode_module.Stages, "load", classmethod(lambda cls, settings: stages))  # weights load once
    whole = tmp_path / "whole"
    written: list[str] = []
    write = dataset_module.write_file

    def note(place: object, data: object) -> None:
        written.append(str(place))
        write(place, data)  # type: ignore[arg-type]

    for module in (encode_module, dataset_module):
        monkeypatch.setattr(module, "write_file", note)
    encode_dataset(settings(source, whole, tiny_checkpoint))
    expected = content(whole)
    assert len(written) >= 9
    decode = Decode.__call__
    for stop in range(len(written)):
        output = tmp_path / str(stop)
        count = 0

        def die(place: object, data: object, stop: int = stop) -> None:
            nonlocal count
            count += 1
            if count <= stop:
                write(place, data)  # type: ignore[arg-type]
                return
            path = Path(str(place))
            path.parent.mkdir(parents=True, exist_ok=True)
            (path.parent / f".{path.name}.1.part").write_bytes(b"half")
            raise KilledError

        for module in (encode_module, dataset_module):
            monkeypatch.setattr(module, "write_file", die)
        with pytest.raises(KilledError):
            encode_dataset(settings(source, output, tiny_checkpoint))
        finished = {path.stem for path in output.glob("progress/0*.json")}
        seen: list[str] = []

        def watch(self: Decode, item: Item, seen: list[str] = seen) -> object:
            seen.append(item.group)
            return decode(self, item)

        for module in (encode_module, dataset_module):
            monkeypatch.setattr(module, "write_file", write)
        monkeypatch.setattr(Decode, "__call__", watch)
        summary = encode_dataset(settings(source, output, tiny_checkpoint))
        monkeypatch.setattr(Decode, "__call__", decode)
        assert content(output) == expected, stop
        assert not finished & {*seen}
        assert summary.encoded == len(seen)
        shutil.rmtree(output)


@pytest.mark.usefixtures("no_card")
def test_run_again(source: Path, tmp_path: Path, encode: Encode, tiny_checkpoint: Path) -> None:
    """Nothing is done again but what is new. Other settings are named."""
    output = tmp_path / "dataset"
    clips = Path(shutil.copytree(source, tmp_path / "clips"))
    first = encode(clips, output, "--frames", 9)
    before = content(output)
    again = encode(clips, output, "--frames", 9)
    assert again == (0, first[1].removesuffix("\n") + "; all was there, nothing was encoded\n", first[2])
    assert content(output) == before
    for changed, expected in [
        (
            ["--frames", 5, 9],
            f"nova: {output} was encoded with frames 9, got 5, 9: expected the same, or another folder",
        ),
        (["--frames", 9, "--fps", 6], "was encoded with fps 12.0, got 6.0"),
        (["--frames", 9, "--cuts"], "was encoded with cuts False, got True"),
        (["--frames", 9, "--text-encoder", "none"], "was encoded with text_encoder "),
        (["--frames", 9, "--model", "emoji", "--size", "96x64"], "was encoded with autoencoder "),
        (["--frames", 9, "--group", 2], "was encoded with group 256, got 2"),
    ]:
        code, out, err = encode(clips, output, *changed)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert expected in err
    (clips / "new.txt").write_text("the apple")
    code, out, _ = encode(clips, output, "--frames", 9)
    assert code == 0
    assert out.endswith(", 6 rejected (rejected.jsonl); since the last time 1 new, 9 unchanged\n")


def test_lost_shards_are_made_anew(
    source: Path, tmp_path: Path, encode: Encode, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever the records say; and what no shard can be read from counts as lost."""
    output = tmp_path / "dataset"
    encode(source, output, "--frames", 9, "--group", 1)
    whole = content(output)
    first, second = sorted(output.glob("data/*/*.parquet"))[:2]
    first.unlink()
    second.write_bytes(second.read_bytes()[:100])
    code, out, _ = encode(source, output, "--frames", 9, "--group", 1)
    assert code == 0
    assert "nothing was encoded" not in out
    assert "shards of 2 groups are lost or damaged, and made anew" in caplog.text
    assert content(output) == whole


def test_two_runs_do_not_write_to_one_place(source: Path, tmp_path: Path, encode: Encode) -> None:
    output = tmp_path / "dataset"
    with another_process_writes(output):
        code, out, err = encode(source, output, "--frames", 9)
        assert (code, out) == (2, "")
        assert err == f"nova: {output}: another process is writing there: expected it to end first\n"
        assert not (output / "dataset.json").exists()
    assert encode(source, output, "--frames", 9)[0] == 0


@pytest.mark.slow
def test_a_source_is_the_same_however_it_is_typed(
    source: Path, tmp_path: Path, encode: Encode, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "dataset"
    monkeypatch.chdir(source.parent)
    code, first, _ = encode(Path(source.name), output, "--frames", 9)
    assert code == 0
    assert DatasetInfo.load(output).settings["source"] == str(source)
    for typed in (f"../{source.parent.name}/{source.name}", str(source), f"file://{source}"):
        assert encode(typed, output, "--frames", 9)[:2] == (
            0,
            first.rstrip() + "; all was there, nothing was encoded\n",
        )
    code, _, err = encode(f"file://{source}", source / "within", "--frames", 9)
    assert code == 2
    assert f"{source / 'within'} is in the source {source}: expected a folder outside of it" in err


@pytest.mark.usefixtures("no_card")
@pytest.mark.slow
def test_names_hold_in_every_directory(
    source: Path, tmp_path: Path, encode: Encode, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dataset encoded by a checkpoint that was named from where it lies: a run elsewhere finds its parts, and samples
    with its tokenizer. One whose names are as older versions wrote them is gone on with."""
    output, arguments = tmp_path / "dataset", ["--frames", 5, "--size", "96x64"]
    named = ["--model", tiny_checkpoint.name]
    monkeypatch.chdir(tiny_checkpoint.parent)
    assert encode(source, output, *arguments, *named)[0] == 0
    info = DatasetInfo.load(output)
    assert info.autoencoder == info.text_encoder == str(tiny_checkpoint.resolve())
    replace(info, autoencoder="tiny", text_encoder="tiny/text_encoder").save(output)
    assert encode(source, output, *arguments, *named)[0] == 0
    assert DatasetInfo.load(output) == info
    replace(info, text_encoder=f"{tiny_checkpoint}/text_encoder").save(output)
    monkeypatch.chdir(tmp_path)
    recipe = DatasetTransformerRecipe(
        steps=1,
        device="cpu",
        output="run",
        scheduler="flow",
        model=ModelRecipe(("vit_d1w64", "vit_d1w64", "mlp_d1w64"), 4, True, 8, 4),
        dataset=DatasetRecipe("dataset", batch=1, held_out=0.0, workers=0),
        log=LogRecipe(every=1, validate_every=0, sample_every=1, checkpoint_every=0),
    )
    train(recipe)
    info.save(output)
    train(replace(recipe, output="again"))
    assert (tmp_path / "again" / "model" / "samples.png").is_file()


def test_names_of_the_hub_stay(tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "snapshot_download", lambda *args, **options: str(tiny_checkpoint))
    asked = replace(settings(tmp_path, tmp_path, tiny_checkpoint), model="BAAI/nova", text="BAAI/nova")
    info = encode_module.describe_dataset(asked)
    assert (info.autoencoder, info.text_encoder, info.text_dim) == ("BAAI/nova", "BAAI/nova", 32)
    info = encode_module.describe_dataset(replace(asked, model="emoji", text="emoji"))
    assert (info.autoencoder, info.text_encoder) == ("emoji", "sentence-transformers/all-MiniLM-L6-v2")


def test_wrong_input(source: Path, tmp_path: Path, encode: Encode, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line and nothing written."""
    shutil.copytree(source, tmp_path / "clips")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "file").touch()
    (tmp_path / "bad").mkdir()
    monkeypatch.chdir(tmp_path)
    for url in ("s3://bucket/o", "hf://datasets/a/b"):
        code, out, err = encode(source, url)
        said = f"nova: output is {url}: expected a local folder (the source alone may be a URL)\n"
        assert (code, out, err) == (2, "", said)
        assert not Path(url).exists()
    for place, output, arguments, expected in [
        (source, "new", ["--frames", 16], "frames is 16: expected 4k + 1"),
        (source, "new", ["--size", "100"], "size is 100x100: expected width and height in multiples of 32"),
        (source, "new", ["--size", "ten"], "size is 'ten', expected WIDTHxHEIGHT"),
        (source, "new", ["--fps", 0], "fps is 0.0: expected a number of more than 0"),
        (source, "new", ["--ray", "here"], "got --no-ray and --ray here: expected one of them"),
        (source, "new", ["--batch", -1], "batch is -1: expected a whole number of at least 1"),
        (source, "new", ["--batch", 0], "batch is 0: expected a whole number of at least 1"),
        (source, "new", ["--frames", "x"], "--frames is 'x': expected --frames N ... (got: nova encode"),
        (source, "new", ["--fps", "x"], "--fps is 'x': expected --fps N (got: nova encode"),
        (source, "new", ["--model", "nothing"], "model 'nothing' not found"),
        (source, "new", ["--device", "tpu"], "device is 'tpu', expected auto, cpu"),
        (source, "full", [], "full exists and is no encoded dataset: expected a new or empty folder"),
        (tmp_path / "clips", "clips/new", [], "clips/new is in the source"),
        (source, "file", [], "file is a file: expected a folder to write"),
        (tmp_path / "none", "new", [], "none: there is nothing there: expected a folder of media"),
        (tmp_path / "bad", "new", [], "bad: is empty: expected a folder of media"),
    ]:
        code, out, err = encode(place, tmp_path / output, *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert expected in err
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("package", ["cv2", "scenedetect", "pyarrow", "fsspec"])
def test_absent_packages(
    package: str, source: Path, tmp_path: Path, encode: Encode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named before the work, with what brings them."""
    monkeypatch.setitem(sys.modules, package, None)  # importing it fails
    find = importlib.util.find_spec
    monkeypatch.setattr(stages_module, "find_spec", lambda name: None if name == package else find(name))
    code, out, err = encode(source, tmp_path / "new", "--cuts")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert install_command("data") in err
    assert not (tmp_path / "new").exists()


def test_nothing_could_be_encoded(tmp_path: Path, encode: Encode) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.mp4").write_bytes(b"a")
    (tmp_path / "clips" / "a.txt").write_text("a")
    code, _, err = encode(tmp_path / "clips", tmp_path / "new")
    assert code == 2
    assert "clips: nothing could be encoded, all 1 were rejected: a.mp4 broken: it is damaged" in err


def test_pictures_alone(tmp_path: Path, source: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An autoencoder of pictures takes no clips, which is said before anything else."""
    found = encode_module.autoencoder_info(str(tiny_checkpoint))
    pictures = type(found)(found.fingerprint, found.latent_channels, found.spatial_stride, temporal_stride=1)
    monkeypatch.setattr(encode_module, "autoencoder_info", lambda model: pictures)
    with pytest.raises(InputError, match="frames is 5, 9, and the autoencoder of .* takes pictures: expected 1"):
        encode_dataset(settings(source, tmp_path / "new", tiny_checkpoint))
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("no_card")
def test_shards_are_of_a_bounded_size(
    source: Path, tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However large a group is."""
    monkeypatch.setattr(encode_module, "SHARD_BYTES", 1)
    encode_dataset(settings(source, tmp_path / "a", tiny_checkpoint, group=100))
    names = sorted(path.name for path in tmp_path.glob("a/data/9x64x96/*"))
    assert names == ["00000-00000-001.parquet", "00000-00000-002.parquet", "00000-00000.parquet"]
    assert all(shard.rows == 1 for found in list_shards(tmp_path / "a").values() for shard in found)
