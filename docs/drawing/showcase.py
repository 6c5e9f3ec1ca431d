"""The picture of the README: a sheet of clips that move, each under its sentence, all from the same seed.

Its sentences name every motion and every background of the emoji world once at least; none of these combinations of
object, motion and background was trained on.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from drawing.style import INK, font, rgb, save_animation
from nova_video.pipeline.pipeline import NovaPipeline

PROMPTS = (
    "a whale moving left on a blue background",
    "a hedgehog moving right slowly on a red background",
    "a rooster moving up on a black background",
    "a penguin moving down on a cyan background",
    "a panda growing on a pink background",
    "a red apple shrinking on a gray background",
    "a frog bouncing on an orange background",
    "a koala staying still on a purple background",
    "a doughnut spinning clockwise on a white background",
    "a strawberry spinning counterclockwise on a yellow background",
    "a butterfly moving right quickly on a brown background",
    "a lady beetle bouncing slowly on a green background",
)
COLUMNS = 4
SIDE, GAP, LINE = 160, 14, 16  # pixels: of a clip, between clips, of a line of text
LINES = 3  # of text under a clip, at most
MOST_BYTES = 900_000
HOLD = 900  # milliseconds that the last frame stays longer


def make_clips(
    pipe: NovaPipeline, prompts: Sequence[str], seed: int, num_frames: int | None = None
) -> tuple[list[list[Image.Image]], float]:
    """The clips of these sentences, each as `nova generate SENTENCE --seed SEED` makes it, and their frame rate."""
    clips, fps = [], 1.0
    for prompt in prompts:
        result = pipe(prompt, num_frames=num_frames, generator=torch.Generator().manual_seed(seed))
        clips.append(result.frames[0])
        fps = result.fps
    return clips, fps


def draw_sheet(clips: Sequence[Sequence[Image.Image]], prompts: Sequence[str], fps: float, path: Path) -> None:
    """All clips side by side, playing together."""
    pages = [_page([clip[index] for clip in clips], prompts) for index in range(len(clips[0]))]
    durations = [round(1000 / fps)] * len(pages)
    durations[-1] += HOLD
    save_animation(pages, durations, path, MOST_BYTES)


def _page(frames: Sequence[Image.Image], prompts: Sequence[str]) -> Image.Image:
    """One frame of every clip."""
    rows = -(-len(frames) // COLUMNS)
    height = SIDE + LINES * LINE + GAP
    page = Image.new("RGB", (COLUMNS * (SIDE + GAP) + GAP, rows * height + GAP), "white")
    brush = ImageDraw.Draw(page)
    for number, (frame, prompt) in enumerate(zip(frames, prompts, strict=True)):
        left, top = GAP + number % COLUMNS * (SIDE + GAP), GAP + number // COLUMNS * height
        page.paste(frame.resize((SIDE, SIDE), Image.Resampling.BICUBIC), (left, top))
        for line, words in enumerate(_wrap(prompt, brush)):
            brush.text((left, top + SIDE + 4 + line * LINE), words, font=font(12), fill=rgb(INK))
    return page


def _wrap(text: str, brush: ImageDraw.ImageDraw) -> list[str]:
    """Lines that are no wider than a clip."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if brush.textlength(longer, font=font(12)) <= SIDE:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
