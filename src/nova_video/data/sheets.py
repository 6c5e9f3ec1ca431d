"""Pages of clips and pictures to look at: strips of frames with their captions, alone or decoded under their source."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from nova_video.io.fonts import drawable, font_for

PAGE, MARGIN, GUTTER = 1360, 40, 40  # pixels: width of a page, its border, between columns
COLUMNS = 2
STRIP_HEIGHT, MOST_FRAMES = 104, 8  # of a strip: what its height is near to, and frames at most
PICTURE_HEIGHT = 190  # what the height of a row of pictures is near to
GAP, CORNER, BELOW = 3, 8, 30  # between frames, of rounded corners, under each entry
TITLE, TEXT, SMALL = 30, 15, 12  # sizes of letters
LINES = 2  # that a caption may take
MOST_LETTERS = 1000  # that are looked at: more than LINES hold in any font
INK, FAINT, PAPER, RULE = "#24292F", "#6E7781", "#FFFFFF", "#D8DEE4"

Frames = NDArray[np.uint8]
"""(F, H, W, 3)."""


@dataclass(frozen=True, eq=False)
class SheetEntry:
    """A clip, or a picture (one frame), with its caption and a note in small letters."""

    frames: Frames
    caption: str
    note: str
    below: Frames | None = None
    """Drawn under the first: the same frames after something was done to them."""


def draw_sheet(title: str, subtitle: str, entries: Sequence[SheetEntry]) -> Image.Image:
    """Clips in two columns of strips, then pictures in rows. Any text can be drawn, whatever it holds."""
    title, subtitle = _plain(title), _plain(subtitle)
    entries = [replace(entry, caption=_plain(entry.caption), note=_plain(entry.note)) for entry in entries]
    clips = [entry for entry in entries if len(entry.frames) > 1]
    pictures = [entry for entry in entries if len(entry.frames) == 1]
    width = (PAGE - 2 * MARGIN - (COLUMNS - 1) * GUTTER) // COLUMNS
    columns: list[list[Image.Image]] = [[] for _ in range(COLUMNS)]
    for clip in clips:  # to the column that is shorter
        min(columns, key=_total).append(_block(_strips(clip, width), clip))
    rows = [_gallery_row(row, height) for row, height in _gallery_rows(pictures)]
    header = _header(title, subtitle)
    tallest = max(map(_total, columns))
    page = Image.new("RGB", (PAGE, header.height + tallest + _total(rows) + MARGIN - BELOW), PAPER)
    page.paste(header, (0, 0))
    for index, column in enumerate(columns):
        _stack(page, column, MARGIN + index * (width + GUTTER), header.height)
    _stack(page, rows, MARGIN, header.height + tallest)
    return page


def spread(count: int, shown: int) -> list[int]:
    """`shown` of `count` frames, evenly spread from the first to the last."""
    return [round(index * (count - 1) / max(shown - 1, 1)) for index in range(min(shown, count))]


def _plain(text: str) -> str:
    """The beginning of a text in one line that can be drawn."""
    return " ".join(drawable(text[:MOST_LETTERS]).split())


def _header(title: str, subtitle: str) -> Image.Image:
    page = Image.new("RGB", (PAGE, MARGIN + TITLE + 68), PAPER)
    brush = ImageDraw.Draw(page)
    for line in _fit(title, TITLE, PAGE - 2 * MARGIN, 1):
        brush.text((MARGIN, MARGIN - 6), line, INK, font_for(line, TITLE))
    brush.text((MARGIN, MARGIN + TITLE + 6), subtitle, FAINT, font_for(subtitle, TEXT))
    rule = MARGIN + TITLE + 38
    brush.line((MARGIN, rule, PAGE - MARGIN, rule), RULE)
    return page


def _strips(entry: SheetEntry, width: int) -> Image.Image:
    """The entry's frames side by side, as wide as that; what is `below` right under them."""
    count, height, side, _ = entry.frames.shape
    fitting = [(width - (shown - 1) * GAP) / shown for shown in range(2, min(count, MOST_FRAMES) + 1)]
    best = min(fitting, key=lambda one: abs(one * height / side - STRIP_HEIGHT))
    shown = spread(count, fitting.index(best) + 2)
    rows = [frames[shown] for frames in (entry.frames, entry.below) if frames is not None]
    each = round(best * height / side)
    strip = Image.new("RGB", (width, len(rows) * each + (len(rows) - 1) * GAP), PAPER)
    for down, row in enumerate(rows):
        for index, frame in enumerate(row):
            left, right = round(index * (best + GAP)), round(index * (best + GAP) + best)
            strip.paste(_scale(frame, (right - left, each)), (left, down * (each + GAP)))
    return strip


def _gallery_rows(pictures: Sequence[SheetEntry]) -> list[tuple[list[SheetEntry], int]]:
    """Pictures in rows that fill the page's width, and the height of each row."""
    rows: list[tuple[list[SheetEntry], int]] = []
    row: list[SheetEntry] = []
    for picture in pictures:
        row.append(picture)
        if (height := _row_height(row)) <= PICTURE_HEIGHT:
            rows.append((row, height))
            row = []
    return [*rows, (row, PICTURE_HEIGHT)] if row else rows


def _row_height(row: Sequence[SheetEntry]) -> int:
    wide = sum(entry.frames.shape[2] / entry.frames.shape[1] for entry in row)  # at a height of 1
    return int((PAGE - 2 * MARGIN - (len(row) - 1) * GUTTER / 2) / wide)


def _gallery_row(row: Sequence[SheetEntry], height: int) -> Image.Image:
    blocks = []
    for entry in row:
        width = round(height * entry.frames.shape[2] / entry.frames.shape[1])
        both = [frames[0] for frames in (entry.frames, entry.below) if frames is not None]
        picture = Image.new("RGB", (width, len(both) * height + (len(both) - 1) * GAP), PAPER)
        for down, frame in enumerate(both):
            picture.paste(_scale(frame, (width, height)), (0, down * (height + GAP)))
        blocks.append(_block(picture, entry))
    page = Image.new("RGB", (PAGE - 2 * MARGIN, max(block.height for block in blocks)), PAPER)
    left = 0
    for block in blocks:
        page.paste(block, (left, 0))
        left += block.width + GUTTER // 2
    return page


def _block(picture: Image.Image, entry: SheetEntry) -> Image.Image:
    """A picture with round corners, caption and note under it, and room below."""
    caption = _fit(entry.caption, TEXT, picture.width, LINES)
    note = _fit(entry.note, SMALL, picture.width, LINES)
    lines = [(line, INK, font_for(entry.caption, TEXT), 21) for line in caption]
    lines += [(line, FAINT, font_for(entry.note, SMALL), 17) for line in note]
    height = picture.height + 8 + sum(step for *_, step in lines) + BELOW
    block = Image.new("RGB", (picture.width, height), PAPER)
    block.paste(picture, (0, 0), _round_mask(picture.size))
    brush = ImageDraw.Draw(block)
    down = picture.height + 8
    for line, colour, font, step in lines:
        brush.text((0, down), line, colour, font)
        down += step
    return block


def _round_mask(size: tuple[int, int]) -> Image.Image:
    finer = 4
    mask = Image.new("L", (size[0] * finer, size[1] * finer), 0)
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, mask.width - 1, mask.height - 1), CORNER * finer, fill=255)
    return mask.resize(size, Image.Resampling.LANCZOS)


def _fit(text: str, size: int, width: int, lines: int) -> list[str]:
    """The text in at most so many lines; dots stand for what does not fit."""
    font = font_for(text, size)
    words = text.split(" ")
    made: list[str] = []
    while words and len(made) < lines:
        line = words.pop(0)
        while words and font.getlength(f"{line} {words[0]}") <= width:
            line = f"{line} {words.pop(0)}"
        made.append(line)
    if words or (made and font.getlength(made[-1]) > width):
        last = made[-1]
        while last and font.getlength(f"{last}…") > width:
            last = last[:-1]
        made[-1] = f"{last.rstrip(' .,;')}…"
    return [line for line in made if line]


def _scale(frame: NDArray[np.uint8], size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS)


def _total(blocks: Sequence[Image.Image]) -> int:
    return sum(block.height for block in blocks)


def _stack(page: Image.Image, blocks: Sequence[Image.Image], left: int, top: int) -> None:
    for block in blocks:
        page.paste(block, (left, top))
        top += block.height
