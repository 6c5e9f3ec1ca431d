"""Encoding on Ray gives the dataset of encoding without it, restarts like it, and leaves nothing behind."""

import importlib.util
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from nova_video.autoencoders import AutoencoderKLCausalTiny
from nova_video.common import ray_session
from nova_video.common.errors import InputError
from nova_video.data import dataset, encode_ray
from nova_video.data.dataset import EncodedSample
from nova_video.data.encode import EncodeProgress, encode_dataset
from nova_video.data.encode_settings import EncodeSettings
from nova_video.data.sources import SourceSettings
from nova_video.data.stages import DecodeSettings

psutil = pytest.importorskip("psutil")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray"),  # not imported before its settings
]

BIN = Path(sys.executable).parent


def write_video(path: Path, frames: int, size: tuple[int, int], seed: int) -> None:
    """Soft colours that move: what a codec and an autoencoder can hold."""
    height, width = size
    y, x = np.mgrid[:height, :width]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for number in range(frames):
            waves = [np.sin((x + seed * y) / 20 + number / 4 + channel) for channel in range(3)]
            pixels = (127 * (1 + np.stack(waves, axis=-1))).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five clips of two shapes, one that is broken, two pictures, one without a caption."""
    folder = tmp_path_factory.mktemp("films")
    for number in range(5):
        write_video(folder / f"clip{number}.mp4", 12 + 7 * number, (64, 96) if number % 2 else (80, 64), number)
        (folder / f"clip{number}.txt").write_text(f"a whale moving left. the apple {'red ' * number}on blue.")
    (folder / "broken.mp4").write_bytes((folder / "clip4.mp4").read_bytes()[:2000])
    (folder / "broken.txt").write_text("a whale")
    for number in range(2):
        Image.new("RGB", (100, 70), (200, 40 * number, 90)).save(folder / f"picture{number}.png")
    (folder / "picture0.txt").write_text("a red apple")
    return folder


@pytest.fixture(scope="module")
def settings(source: Path, tmp_path_factory: pytest.TempPathFactory, tiny_text_encoder: Path) -> EncodeSettings:
    """Without Ray; groups of three."""
    model = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    vae = AutoencoderKLCausalTiny(latent_channels=4, block_out_channels=(8, 8, 8), norm_num_groups=4)
    vae.save_pretrained(model / "vae")
    return EncodeSettings(
        source=SourceSettings(str(source), group=3),
        decode=DecodeSettings(frames=(5, 9), fps=8.0, size=(64, 64)),
        output=tmp_path_factory.mktemp("here") / "films",
        model=str(model),
        text=str(tiny_text_encoder),
        device="cpu",
    )


@pytest.fixture(scope="module")
def expected(settings: EncodeSettings) -> Path:
    encode_dataset(settings)
    return settings.output


def read(place: Path) -> dict[str, EncodedSample]:
    shards = [shard for found in dataset.list_shards(place).values() for shard in found]
    return {sample.id: sample for shard in shards for sample in dataset.iter_shard(shard.url)}


def assert_same(place: Path, expected: Path) -> None:
    """The same shards, samples in the same order, moments to rounding and all else exactly."""
    names = [
        sorted(str(path.relative_to(one)) for path in one.rglob("*") if path.is_file()) for one in (place, expected)
    ]
    assert names[0] == names[1]
    for name in ("dataset.json", "rejected.jsonl", *(n for n in names[0] if n.startswith("progress/"))):
        assert json_of(place / name) == json_of(expected / name), name
    mine, theirs = read(place), read(expected)
    assert list(mine) == list(theirs)
    for key, one in mine.items():
        other = theirs[key]
        plain = ("source", "start", "end", "caption", "fps", "motion", "bucket")
        assert [getattr(one, part) for part in plain] == [getattr(other, part) for part in plain]
        torch.testing.assert_close(one.moments.float(), other.moments.float(), rtol=2**-7, atol=2**-9)
        for text, its in ((one.text, other.text), (one.text_short, other.text_short)):
            assert (text is None) == (its is None)
            if text is not None and its is not None:
                torch.testing.assert_close(text, its, rtol=2**-9, atol=2**-11)


def json_of(path: Path) -> list[object]:
    return (
        [json.loads(line) for line in path.read_text().splitlines()] if path.suffix == ".jsonl" else [path.read_text()]
    )


def open_doors() -> set[str]:
    """Where this process and those it started listen, other than on the loopback device."""
    here = psutil.Process()
    found = set()
    for process in [here, *here.children(recursive=True)]:
        try:
            connections = process.net_connections(kind="inet")
        except psutil.Error:
            continue
        found |= {
            f"{process.name()} {one.laddr.ip}:{one.laddr.port}"
            for one in connections
            if one.status == psutil.CONN_LISTEN and one.laddr.ip not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")
        }
    return found


def ray_folders() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("nova-ray-*"))


def test_ray_gives_the_same_dataset_and_leaves_nothing(
    settings: EncodeSettings, expected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    before = open_doors(), ray_folders()
    doors: set[str] = set()
    helpers = 0

    def look(done: EncodeProgress) -> None:
        nonlocal helpers
        if done.items:
            doors.update(open_doors() - before[0])
            helpers = max(helpers, len(psutil.Process().children(recursive=True)))

    summary = encode_dataset(replace(settings, output=tmp_path / "films", ray="local"), look)
    assert summary.items == summary.encoded == 8
    assert_same(tmp_path / "films", expected)
    assert helpers >= 4  # raylet, tasks, actors: it was Ray that did it
    assert doors == set()
    assert ray_folders() == before[1]
    assert list((tmp_path / "home").iterdir()) == []
    assert not set(ray_session.ENVIRONMENT) & set(os.environ)
    import ray

    assert not ray.is_initialized()
    for _ in range(50):
        if not (left := [child.name() for child in psutil.Process().children(recursive=True) if "ray" in child.name()]):
            break
        time.sleep(0.2)
    assert left == []


def test_a_stopped_run_goes_on_with_ray(settings: EncodeSettings, expected: Path, tmp_path: Path) -> None:
    """Two groups are finished, the last one's shards are half there: only that one is done again."""
    place = tmp_path / "films"
    encode_dataset(replace(settings, output=place))
    (place / "progress" / "00000-00002.json").unlink()
    kept = {path: path.stat().st_mtime_ns for path in place.glob("data/*/00000-0000[01].parquet")}
    assert kept
    lost = list(place.glob("data/*/00000-00002.parquet"))
    assert lost
    lost[0].unlink()
    summary = encode_dataset(replace(settings, output=place, ray="local"))
    assert (summary.encoded, summary.items) == (2, 8)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert_same(place, expected)


def test_nothing_to_do_starts_no_ray(settings: EncodeSettings, expected: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode_ray, "_ray", lambda address: pytest.fail("Ray was started"))
    assert encode_dataset(replace(settings, ray="local")).encoded == 0


def outside() -> dict[str, str]:
    """The environment of a process that has nothing to do with this one's Ray."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return kept | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}


@pytest.fixture
def cluster() -> Iterator[str]:
    """The address of a Ray that is not ours, on this machine."""
    folder = tempfile.mkdtemp(prefix="ray-")
    address = "127.0.0.1:26379"
    command = ["start", "--head", "--block", "--port", "26379", "--num-cpus", "2", "--include-dashboard", "false"]
    head = subprocess.Popen(
        [BIN / "ray", *command, "--temp-dir", folder, "--object-store-memory", str(200 << 20)],
        env=outside(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(120):
            done = subprocess.run(
                [BIN / "ray", "status", "--address", address], env=outside(), capture_output=True, timeout=60
            )
            if done.returncode == 0:
                break
            time.sleep(0.5)
        else:
            pytest.fail(f"no Ray was started at {address}: {done.stderr.decode()[-500:]}")
        yield address
    finally:
        started = psutil.Process(head.pid).children(recursive=True)
        head.terminate()
        head.wait(60)
        for process in started:
            if process.is_running():
                process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def test_a_cluster_by_its_address(settings: EncodeSettings, expected: Path, tmp_path: Path, cluster: str) -> None:
    """In a process of its own, as on the command line: Ray in this one may have been told to stay on this machine."""
    code = (
        "import pickle, sys; from nova_video.data.encode import encode_dataset;"
        " encode_dataset(pickle.load(sys.stdin.buffer))"
    )
    sent = pickle.dumps(replace(settings, output=tmp_path / "films", ray=cluster))
    subprocess.run([sys.executable, "-c", code], input=sent, env=outside(), check=True, timeout=600)
    assert_same(tmp_path / "films", expected)
    done = subprocess.run([BIN / "ray", "status", "--address", cluster], env=outside(), capture_output=True, timeout=60)
    assert done.returncode == 0  # it goes on without us


def test_wrong_input_is_one_line(settings: EncodeSettings, tmp_path: Path) -> None:
    there = replace(settings, output=tmp_path / "films")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="device 'cuda' asked for, but Ray finds no GPU: expected cpu"):
            encode_dataset(replace(there, ray="local", device="cuda"))
    with pytest.raises(InputError, match="expected auto, cpu or cuda on Ray"):
        encode_dataset(replace(there, ray="local", device="cuda:0"))
    with pytest.raises(InputError, match="there is no Ray at 127.0.0.1:1"):
        encode_dataset(replace(there, ray="127.0.0.1:1"))
    with pytest.raises(InputError, match="the address of Ray is 'head': expected HOST:PORT"):
        encode_dataset(replace(there, ray="head"))
