"""The emoji world on drawn shapes: what is held out, what clips show, how captions read, and wrong input."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nova_video.common.errors import InputError
from nova_video.io.motion import flow_magnitude
from nova_worlds.rendering.captions import clip_caption, pair_caption, parse_caption, with_article
from nova_worlds.rendering.clips import CANVAS, SPAN, ClipSpec, object_path, pair_paths
from nova_worlds.rendering.emoji_art import prepare_emoji
from nova_worlds.rendering.lexicon import (
    BACKGROUNDS,
    COLORS,
    MIRRORED_RELATIONS,
    MOTIONS,
    PLAIN,
    RELATIONS,
    SPEEDS,
    STILL,
)
from nova_worlds.rendering.shapes import prepare_shapes
from nova_worlds.rendering.split import held_out_clips, is_held_out
from nova_worlds.rendering.world import ART, TILE, EmojiWorld


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("worlds") / "shapes"
    prepare_shapes(folder, score_clips=1)
    return folder


@pytest.fixture(scope="module")
def world(folder: Path) -> EmojiWorld:
    return EmojiWorld.load(folder)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clips_of(world: EmojiWorld, motion: str, count: int, **changes: torch.Tensor) -> ClipSpec:
    spec = world.sample(count, seeded(1), num_frames=SPAN)
    return replace(spec, motion=torch.full_like(spec.motion, MOTIONS.index(motion)), **changes)


# What is held out


def test_held_out_hash_never_changes() -> None:
    recorded = {
        ("whale", "moving left", "blue"): True,
        ("whale", "staying still", "blue"): True,
        ("cat", "growing", "brown"): True,
        ("star", "moving right", "gray"): True,
        ("whale", "above", "red apple"): True,
        ("cat", "to the left of", "whale"): True,
        ("cat", "growing", "pink"): False,
        ("dog", "spinning clockwise", "cyan"): False,
        ("cat", "above", "dog"): False,
    }
    assert {parts: is_held_out(*parts) for parts in recorded} == recorded


def test_a_tenth_is_held_out() -> None:
    share = held_out_clips([f"object {number}" for number in range(100)]).float().mean().item()
    assert abs(share - 0.1) < 0.01


def test_splits_do_not_leak(world: EmojiWorld) -> None:
    for split, expected in (("train", False), ("heldout", True)):
        clips = world.sample(3000, seeded(), split=split)
        images = world.sample(3000, seeded(), split=split, images=True, pairs=0.5)
        single = images.second < 0
        assert 0.4 < single.float().mean() < 0.6
        assert (images.motion == STILL).all()
        for spec, rows in ((clips, torch.arange(len(clips))), (images, single.nonzero().flatten())):
            for thing, motion, color in {
                (int(spec.object[r]), int(spec.motion[r]), int(spec.background[r])) for r in rows
            }:
                assert is_held_out(world.names[thing], MOTIONS[motion], COLORS[color]) is expected
        for row in (~single).nonzero().flatten().tolist():
            first, second = world.names[images.object[row]], world.names[images.second[row]]
            assert first != second
            assert is_held_out(first, RELATIONS[images.relation[row]], second) is expected


def test_every_allowed_combination_is_drawn(world: EmojiWorld) -> None:
    spec = world.sample(20000, seeded())
    drawn = torch.zeros_like(world.held_out_clips)
    drawn[spec.object, spec.motion, spec.background] = True
    assert torch.equal(drawn, ~world.held_out_clips)
    assert set(spec.speed[spec.motion == STILL].tolist()) == {PLAIN}
    assert torch.bincount(spec.speed[spec.motion != STILL]).min() > 3000


def test_same_seed_same_clips(world: EmojiWorld) -> None:
    first, again, other = (world.sample(8, seeded(seed)) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first.tensors().values(), again.tensors().values(), strict=True))
    assert not torch.equal(first.place, other.place)


# What clips show


def slow_render(world: EmojiWorld, spec: ClipSpec, frame: int) -> np.ndarray:
    """One frame of one clip, pixel by pixel: (H, W, 3) in [0, 1]."""
    path = object_path(spec)
    (cx, cy), size, angle = path.centre[0, frame].tolist(), float(path.size[0, frame]), float(path.angle[0, frame])
    tile = world.atlas[int(spec.object[0])].numpy()  # (4, TILE, TILE)
    color = np.array(BACKGROUNDS[COLORS[int(spec.background[0])]]) / 255
    picture = np.empty((CANVAS, CANVAS, 3))
    for row in range(CANVAS):
        for column in range(CANVAS):
            dx, dy = column + 0.5 - cx, row + 0.5 - cy
            u = (math.cos(angle) * dx + math.sin(angle) * dy) * ART / size + TILE / 2 - 0.5
            v = (math.cos(angle) * dy - math.sin(angle) * dx) * ART / size + TILE / 2 - 0.5
            rgba = np.zeros(4)
            for x in (math.floor(u), math.floor(u) + 1):
                for y in (math.floor(v), math.floor(v) + 1):
                    if 0 <= x < TILE and 0 <= y < TILE:
                        rgba += (1 - abs(u - x)) * (1 - abs(v - y)) * tile[:, y, x]
            picture[row, column] = rgba[:3] + color * (1 - rgba[3])
    return picture


@pytest.mark.parametrize("motion", ["spinning clockwise", "growing"])
def test_render_equals_slow_reference(world: EmojiWorld, motion: str) -> None:
    spec = clips_of(world, motion, 3)
    clips = world.render(spec)
    assert clips.shape == (3, 3, SPAN, CANVAS, CANVAS)
    expected = slow_render(world, spec.select(slice(1, 2)), frame=12)
    np.testing.assert_allclose((clips[1, :, 12].permute(1, 2, 0).numpy() + 1) / 2, expected, atol=2e-4)


def test_render_does_not_depend_on_the_batch(world: EmojiWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = world.sample(5, seeded())
    whole = world.render(spec)
    monkeypatch.setattr("nova_worlds.rendering.world.CPU_FRAMES", 2 * SPAN)
    torch.testing.assert_close(world.render(spec), whole)
    torch.testing.assert_close(world.render(spec.select(slice(3, 4))), whole[3:4])


def test_longer_clips_begin_alike(world: EmojiWorld) -> None:
    spec = world.sample(6, seeded())
    longer = world.render(replace(spec, num_frames=33))
    torch.testing.assert_close(longer[:, :, :SPAN], world.render(spec))


@pytest.mark.parametrize(("motion", "axis", "sign"), [("left", 0, -1), ("right", 0, 1), ("up", 1, -1), ("down", 1, 1)])
def test_movers_turn_round_only_after_the_usual_length(world: EmojiWorld, motion: str, axis: int, sign: int) -> None:
    spec = replace(clips_of(world, f"moving {motion}", 500), num_frames=65)
    spec = replace(spec, speed=torch.arange(500) % len(SPEEDS))
    path = object_path(spec).centre
    steps = path.diff(dim=1) * sign
    assert (steps[:, : SPAN - 1, axis] > 1).all()
    assert (steps[:, :, axis] < 0).any(dim=1)[spec.speed == 2].all()  # quick ones have turned round by then
    assert (steps[:, :, 1 - axis] == 0).all()


@pytest.mark.parametrize("motion", MOTIONS)
def test_objects_stay_in_the_picture(world: EmojiWorld, motion: str) -> None:
    path = object_path(replace(clips_of(world, motion, 500), num_frames=65))
    reach = path.size[..., None] / 2
    if motion.startswith("spinning"):
        reach = reach * math.sqrt(2)
    assert (path.centre - reach).min() > -0.01
    assert (path.centre + reach).max() < CANVAS + 0.01


def test_growing_spinning_and_bouncing(world: EmojiWorld) -> None:
    sizes = object_path(clips_of(world, "growing", 100)).size
    assert (sizes.diff(dim=1) > 0).all()
    assert (object_path(clips_of(world, "shrinking", 100)).size.diff(dim=1) < 0).all()
    assert (object_path(clips_of(world, "spinning clockwise", 100)).angle.diff(dim=1) > 0).all()
    assert (object_path(clips_of(world, "spinning counterclockwise", 100)).angle.diff(dim=1) < 0).all()
    height = object_path(clips_of(world, "bouncing", 100)).centre[..., 1]
    falls = height.diff(dim=1) > 0
    assert (falls.any(dim=1) & (~falls).any(dim=1)).all()
    assert (height.amax(dim=1) - height.amin(dim=1) > 25).all()


def test_pairs_are_apart_and_in_order(world: EmojiWorld) -> None:
    spec = world.sample(500, seeded(), images=True, pairs=1.0)
    first, second = pair_paths(spec)
    apart = (second.centre - first.centre)[:, 0]  # (N, 2)
    along = apart.gather(1, spec.relation[:, None])[:, 0]
    assert (along >= (first.size + second.size)[:, 0] / 2 - 0.01).all()


def test_motion_table(world: EmojiWorld) -> None:
    table = world.motion_table
    assert table.mean.shape == table.std.shape
    assert table.mean[STILL].max() < 0.01
    moving = [index for index in range(len(MOTIONS)) if index != STILL]
    assert (table.mean[moving] > 0.01).all()
    by_speed = table.mean[moving].mean(dim=2)  # (motions, speeds)
    assert (by_speed.mean(dim=0).diff() > 0).all()
    movers = by_speed[[MOTIONS.index(f"moving {way}") - 1 for way in ("left", "right", "up", "down")]]
    assert (movers.diff(dim=1) > 0).all()
    spec = clips_of(world, "moving left", 4)
    assert torch.equal(world.motion_scores(spec), table.mean[spec.motion, spec.speed, ((spec.size - 46) / 7).long()])
    assert (world.motion_scores(world.sample(4, seeded(), images=True)) == 0).all()


def test_flow_of_a_known_shift() -> None:
    texture = np.random.default_rng(0).integers(0, 255, (20, 20, 3)).astype(np.uint8)
    picture = np.asarray(Image.fromarray(texture).resize((160, 160), Image.Resampling.BICUBIC))
    frames = np.stack([picture[16:144, 16 + 2 * step : 144 + 2 * step] for step in range(4)])
    assert flow_magnitude(frames) == pytest.approx(2, abs=0.15)


# How captions read


def test_captions_say_what_is_shown(world: EmojiWorld) -> None:
    clips = world.sample(200, seeded())
    images = world.sample(200, seeded(), images=True, pairs=0.5)
    rng = random.Random(0)
    for spec in (clips, images):
        for rng_or_none in (None, rng):
            for row, caption in enumerate(world.captions(spec, rng_or_none)):
                scene = parse_caption(caption, world.names)
                assert scene is not None, caption
                assert scene.object == world.names[spec.object[row]]
                assert scene.background == COLORS[spec.background[row]]
                assert (scene.motion or MOTIONS[STILL]) == MOTIONS[spec.motion[row]]
                assert scene.speed == SPEEDS[spec.speed[row]]
                assert (scene.second is not None) == (spec.second[row] >= 0)
                if scene.second is not None:
                    assert scene.second == world.names[spec.second[row]]
                    assert scene.relation == RELATIONS[spec.relation[row]]


def test_main_forms() -> None:
    assert clip_caption("whale", "moving left", "", "blue") == "a whale moving left on a blue background"
    assert (
        clip_caption("octopus", "bouncing", "slowly", "orange") == "an octopus bouncing slowly on an orange background"
    )
    assert pair_caption("whale", RELATIONS[0], "red apple", "white") == (
        "a whale to the left of a red apple on a white background"
    )
    assert pair_caption("whale", RELATIONS[1], "red apple", "white", mirrored=True) == (
        f"a red apple {MIRRORED_RELATIONS[1]} a whale on a white background"
    )


@pytest.mark.parametrize(
    ("name", "phrase"),
    [
        ("ox", "an ox"),
        ("unicorn", "a unicorn"),
        ("ewe", "a ewe"),
        ("hourglass done", "an hourglass done"),
        ("one o’clock", "a one o’clock"),
        ("umbrella", "an umbrella"),
        ("cherries", "cherries"),
        ("cooked rice", "cooked rice"),
        ("nest with eggs", "a nest with eggs"),
        ("cactus", "a cactus"),
        ("wine glass", "a wine glass"),
        ("rhinoceros", "a rhinoceros"),
    ],
)
def test_articles(name: str, phrase: str) -> None:
    assert with_article(name) == phrase


def test_other_sentences_are_not_parsed(world: EmojiWorld) -> None:
    assert parse_caption("a submarine moving left on a blue background", world.names) is None
    assert parse_caption("a star moving left on a mauve background", world.names) is None
    assert parse_caption("", world.names) is None


# Preparing


def save_art(folder: Path) -> tuple[Path, Path]:
    """Three pictures and their names, laid out like the packages."""
    assets = folder / "art" / "assets"
    assets.mkdir(parents=True)
    (folder / "art" / "package.json").write_text('{"name": "some-art", "version": "1.2.3", "license": "MIT"}')
    for number, code_point in enumerate(("1f433", "1f34e-fe0f", "1f600")):
        art = Image.new("RGBA", (64, 64))
        art.paste((200, 80 * number, 40, 255), (8, 16, 56 - 8 * number, 48))
        art.save(assets / f"{code_point}.webp", lossless=True)
    names = folder / "data.json"
    entries = [
        {"hexcode": "1F433", "label": "spouting Whale", "group": 3},
        {"hexcode": "1F34E", "label": "red apple", "group": 4},
        {"hexcode": "1F600", "label": "grinning face", "group": 0},
        {"hexcode": "1F1E6", "label": "regional indicator A"},
    ]
    names.write_text(json.dumps(entries))
    return folder / "art", names


def test_prepare_emoji(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nova_worlds.rendering.prepare.flow_magnitude", lambda frames, every: 1.0)
    art, names = save_art(tmp_path)
    world = prepare_emoji(art, names, tmp_path / "world", "core", score_clips=1)
    assert world.names == ["red apple", "spouting whale"]
    assert world.info.groups == ["food-drink", "animals-nature"]
    assert world.info.art == "some-art 1.2.3, MIT"
    tile = world.atlas[1]  # premultiplied, 48 x 32 pixels of art in its bounding square
    assert (tile[:3] <= tile[3:] + 1e-6).all()
    assert tile[3].sum() == pytest.approx(ART * ART * 32 / 48, rel=0.03)
    assert tile[3, :2].max() == 0
    again = prepare_emoji(art / "assets", names, tmp_path / "world", "all", score_clips=1)
    assert again.names == ["red apple", "spouting whale", "grinning face"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert again.render(again.sample(2, seeded())).shape == (2, 3, SPAN, CANVAS, CANVAS)


def test_failed_preparation_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bytes:
        raise OSError(28, "No space left on device")

    art, names = save_art(tmp_path)
    monkeypatch.setattr("nova_worlds.rendering.prepare.flow_magnitude", lambda frames, every: 1.0)
    monkeypatch.setattr("nova_worlds.rendering.prepare.save", fail)
    with pytest.raises(InputError, match="No space left"):
        prepare_emoji(art, names, tmp_path / "new" / "world", score_clips=1)
    assert list((tmp_path / "new").iterdir()) == []


def test_wrong_input_is_named(tmp_path: Path) -> None:
    art, names = save_art(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "names.txt").write_text("no json")
    (tmp_path / "file").write_text("")
    (tmp_path / "list.json").write_text('[{"hexcode": "2603", "label": "snowman", "group": 5}]')
    world = tmp_path / "world"
    with pytest.raises(InputError, match="nowhere is not a folder"):
        prepare_emoji(tmp_path / "nowhere", names, world)
    with pytest.raises(InputError, match="empty has no pictures"):
        prepare_emoji(tmp_path / "empty", names, world)
    with pytest.raises(InputError, match=r"names\.txt is not emojibase-data"):
        prepare_emoji(art, tmp_path / "names.txt", world)
    with pytest.raises(InputError, match=r"absent\.json cannot be read"):
        prepare_emoji(art, tmp_path / "absent.json", world)
    with pytest.raises(InputError, match="names none of the 3 pictures"):
        prepare_emoji(art, tmp_path / "list.json", world)
    with pytest.raises(InputError, match="is not a prepared world"):
        prepare_emoji(art, names, art)
    with pytest.raises(InputError, match="not writable"):
        prepare_emoji(art, names, tmp_path / "file" / "world")
    with pytest.raises(InputError, match="empty is not a prepared world"):
        EmojiWorld.load(tmp_path / "empty")
    (art / "assets" / "1f433.webp").write_bytes(b"not a picture")
    with pytest.raises(InputError, match=r"1f433\.webp is not a picture"):
        prepare_emoji(art, names, world)
    assert not world.exists()
