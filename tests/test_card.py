"""The dataset's card: what it counts is what is there, and the sheet shows it."""

import io
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from nova_video.data import dataset, sheets
from nova_video.data import dataset_card as card
from nova_video.data.dataset import Bucket, DatasetInfo, EncodedSample
from nova_video.data.encoders import DecodeLatents, EncodeLatents, autoencoder_info
from nova_video.data.sheets import SheetEntry, draw_sheet
from nova_video.io import fonts

CLIP, PICTURE = Bucket(5, 32, 48), Bucket(1, 48, 32)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven clips in two shards, three pictures, two rejected sources; latents of the bundled model."""
    folder = tmp_path_factory.mktemp("made") / "films"
    found = autoencoder_info("emoji")
    info = DatasetInfo(
        "emoji", found.fingerprint, found.latent_channels, 8, text_encoder="MiniLM", text_dim=6, settings={"fps": 8}
    )
    info.save(folder)
    generator = torch.Generator().manual_seed(0)

    def sample(bucket: Bucket, index: int) -> EncodedSample:
        return EncodedSample(
            id=f"{bucket.name}-{index}",
            source=f"films/{index % 4}.mp4",
            start=float(index),
            end=index + (0.5 if bucket.frames > 1 else 0),
            caption="A dog runs. It is brown." if index else "A cat",
            fps=8.0,
            motion=float(index) if bucket.frames > 1 else 0.0,
            bucket=bucket,
            moments=torch.randn(info.moments_shape(bucket), generator=generator).bfloat16(),
            text=torch.zeros(4 + index, 6, dtype=torch.float16),
        )

    clips = [sample(CLIP, index) for index in range(11)]
    dataset.write_shard(dataset.shard_url(folder, CLIP, "a"), clips[:7], found.fingerprint)
    dataset.write_shard(dataset.shard_url(folder, CLIP, "b"), clips[7:], found.fingerprint)
    pictures = [sample(PICTURE, index) for index in range(3)]
    dataset.write_shard(dataset.shard_url(folder, PICTURE, "a"), pictures, found.fingerprint)
    (folder / "rejected.jsonl").write_text(
        '{"source": "a|b.mp4", "reason": "no caption"}\n{"source": "c.mp4", "reason": "no caption"}\n'
    )
    return folder


def test_the_card_tells_what_is_there(place: Path) -> None:
    card.write_card(place, "cpu")
    text = (place / "README.md").read_text(encoding="utf-8")
    assert "# films\n\n11 clips, 5.5 seconds, 3 pictures, 4 sources; 2 rejected." in text
    assert "| 5x32x48 | 11 | 5.5 | 2 | 32x2x4x6 |" in text
    assert "| 1x48x32 | 3 |  | 1 | 32x1x6x4 |" in text
    assert "The median is 5.00." in text
    assert "| no caption | 2 | `a\\|b.mp4` |" in text
    assert "2 to 6 words, the median is 6. Features of each token are 6 wide; a caption has 4 to 14 tokens" in text
    assert f"| autoencoder | emoji ({DatasetInfo.load(place).fingerprint}) |" in text
    assert "| fps | 8 |" in text
    bars = text.split("```text\n")[1].split("```")[0].splitlines()
    assert sum(int(line.split()[-1]) for line in bars) == 11
    sheet = Image.open(place / "sheet.png")
    assert sheet.width == sheets.PAGE
    assert len(sheet.getcolors(1 << 24) or []) > 1000
    before = (place / "sheet.png").read_bytes(), text
    card.write_card(place, "cpu")
    assert before == ((place / "sheet.png").read_bytes(), (place / "README.md").read_text(encoding="utf-8"))


def test_samples_are_picked_at_random_and_again_the_same(place: Path) -> None:
    shards = dataset.list_shards(place)
    first = [sample.id for sample in card.pick(shards, 5, 2)]
    assert [sample.id for sample in card.pick(shards, 5, 2)] == first
    assert [name.split("-")[0] for name in first] == [CLIP.name] * 5 + [PICTURE.name] * 2
    assert len(set(first)) == 7
    assert [sample.id for sample in card.pick(shards, 5, 2, seed=1)] != first
    assert len(card.pick(shards, 99, 99)) == 14


@pytest.mark.parametrize(
    "values", [[0.0], [3.0, 3.0], [0.1, 0.2, 0.3], list(range(1000)), [-1.0, 1.0], [1e-3, 5e4], [1.125, 1.125 + 3e-16]]
)
def test_every_value_is_in_one_bar(values: list[float]) -> None:
    bars = list(card.bin_values(values))
    assert 1 <= len(bars) <= card.BARS
    assert sum(count for *_, count in bars) == len(values)
    assert bars[0][0] <= min(values)
    assert all(low < high for low, high, _ in bars)
    assert all(one[1] == pytest.approx(other[0]) for one, other in itertools.pairwise(bars))


def test_far_values_are_in_the_last_bar() -> None:
    bars = list(card.bin_values([index / 100 for index in range(990)] + [500.0] * 5))
    assert bars[-1][1] == math.inf
    assert bars[-1][0] == 10
    assert bars[-1][2] >= 5


def test_moments_are_decoded_to_the_frames_they_stand_for() -> None:
    y, x = np.mgrid[:64, :64].astype(np.float32) / 64
    frame = np.stack([255 * x, 255 * y, np.full_like(x, 90)], axis=-1).astype(np.uint8)
    for frames in (frame[None], np.stack([frame] * 5)):
        moments = EncodeLatents("emoji", "cpu")([SheetEntry(frames, "", "")])[0]
        decoded = DecodeLatents("emoji", "cpu")(moments)
        assert decoded.shape == frames.shape
        assert decoded.dtype == np.uint8
        assert np.abs(decoded.astype(float) - frames).mean() < 12


def test_letters_that_one_font_lacks_come_from_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the fonts there are the first that has all of them, else the one with most; any for no letters."""

    class Font:
        def __init__(self, letters: str) -> None:
            self.letters = letters

        def getmask(self, letter: str) -> NDArray[np.uint8]:
            return np.full((2, 2), ord(letter) % 255 if letter in self.letters else 255, np.uint8)

    plain, wide, widest = Font("abc"), Font("abü"), Font("abcüß日")
    monkeypatch.setattr(fonts, "_fonts", lambda size: [plain, wide, widest])
    found = [fonts.font_for(text, 12) for text in ("a b", "aü", "cü", "日本", "", "xyz")]
    assert found == [plain, wide, widest, widest, plain, plain]


def test_sheets_hold_every_entry() -> None:
    """Each entry has a colour of its own, to be found on the page with its words below."""
    colours = [(40 * index, 255 - 40 * index, 10 * index) for index in range(6)]
    shapes = [(17, 40, 60), (5, 64, 32), (1, 30, 90), (1, 50, 50), (2, 20, 20), (1, 40, 20)]
    entries = [
        SheetEntry(np.full((*shape, 3), colour, np.uint8), "a caption " * 30, "note", None)
        for shape, colour in zip(shapes, colours, strict=True)
    ]
    page = np.asarray(draw_sheet("A title that is far too long " * 9, "words", entries))
    for colour in colours:
        assert (page == colour).all(-1).sum() > 2000
    assert not (page == (1, 2, 3)).all(-1).any()
    below = SheetEntry(entries[0].frames, "", "", np.full_like(entries[0].frames, (1, 2, 3)))
    assert (np.asarray(draw_sheet("", "", [below])) == (1, 2, 3)).all(-1).sum() > 2000
    buffer = io.BytesIO()
    draw_sheet("nothing", "", []).save(buffer, format="png")


@pytest.mark.parametrize(
    "text",
    [
        "two\nlines\r\x1c\x1d\x1e\x85\u2028\u2029",
        "\x00\x1b[31m\x7f\x9b\ud83d",
        "لغة \u202eright to left\u2066 עברית",
        "👩\u200d🚀 \U0010ffff\ue000\ufdd0",
        "e" + "\u0301" * 3000,
        "x" * 1_000_000,
        "a " * 500_000,
    ],
)
def test_any_text_is_drawn(text: str) -> None:
    """Whatever names and captions hold, a page is made of it, and soon."""
    frame = np.zeros((1, 40, 60, 3), np.uint8)
    page = draw_sheet(text, text, [SheetEntry(frame, text, text), SheetEntry(np.repeat(frame, 2, 0), text, text)])
    assert page.width == sheets.PAGE
    assert page.height < 800


def test_names_in_a_card_are_code(place: Path) -> None:
    lines = [("`a`\u2028b\n.png", "no \x1b[1mcaption|"), ("c.png", "<b>")]
    facts = card.gather(place)
    facts.rejected = [{"source": source, "reason": reason} for source, reason in lines]
    text = card.card("films", DatasetInfo.load(place), facts)
    assert "| no \\x1b[1mcaption\\| | 1 | `` `a`\\u2028b\\n.png `` |\n" in text
    assert "| <b> | 1 | `c.png` |\n" in text


def test_frames_are_spread_from_first_to_last() -> None:
    assert sheets.spread(17, 5) == [0, 4, 8, 12, 16]
    assert sheets.spread(2, 4) == [0, 1] or len(sheets.spread(2, 4)) == 2
    assert sheets.spread(5, 1) == [0]
