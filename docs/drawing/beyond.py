"""Pictures of the page on what goes beyond one clip: going on, streaming, a bounded context, steering, editing, saving.

Every clip in them is a real request of a few lines, as the page has it; what a frame is made from is what the sampler's
own `Context` says.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image, ImageDraw

from drawing.samples import cover
from drawing.style import ABSENT, CHOSEN, FAINT, SPACE, TIME, save_photos
from nova_video.io.inputs import InputClip, enlarge, known_tokens
from nova_video.pipeline.events import FrameReady, LatentPreview, PartialFrame
from nova_video.pipeline.pipeline import NovaPipeline
from nova_video.pipeline.request import GenerateRequest
from nova_video.sampling.context import Context

GIVEN, MADE = FAINT, SPACE  # frames' rims: what was given, what was made
SIDE = 0.92  # inches, of a frame in a strip


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Strips of frames -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Strip:
    """A row of pictures under a heading, each with a word above and a rim, if any."""

    heading: str
    pictures: Sequence[Image.Image]
    words: Sequence[str]
    rims: Sequence[str | None]


def draw_strips(strips: Sequence[Strip]) -> Figure:
    """Rows of pictures; all figures of the page that are made of pictures look like this."""
    columns = max(len(strip.pictures) for strip in strips)
    row = SIDE + 0.52  # heading, words, picture
    figure = plt.figure(figsize=(columns * (SIDE + 0.08), len(strips) * row))
    width, height = figure.get_size_inches()
    for number, strip in enumerate(strips):
        top = height - number * row
        figure.text(0.0, (top - 0.14) / height, strip.heading, fontsize=9, va="center")
        for column, (picture, word, rim) in enumerate(zip(strip.pictures, strip.words, strip.rims, strict=True)):
            place = (column * (SIDE + 0.08) / width, (top - 0.42 - SIDE) / height, SIDE / width, SIDE / height)
            axes = figure.add_axes(place)
            _show(axes, picture, rim)
            axes.set_title(word, fontsize=7.5, color=FAINT, pad=2.5)
    return figure


def _show(axes: Axes, picture: Image.Image, rim: str | None) -> None:
    axes.imshow(np.asarray(picture))
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(rim is not None)
    if rim is not None:
        axes.spines[:].set(color=rim, linewidth=2.2)


def strip_of(clip: Sequence[Image.Image], heading: str, every: int, given: int = 0) -> Strip:
    """Every so many frames of a clip that begins with `given` frames."""
    shown = range(0, len(clip), every)
    words = [f"frame {index}" for index in shown]
    return Strip(heading, [clip[i] for i in shown], words, [GIVEN if i < given else MADE for i in shown])


# Going on -------------------------------------------------------------------------------------------------------------

STARTS = (
    ("a whale moving left slowly on a blue background", 0),
    ("a frog bouncing on an orange background", 0),
    ("a doughnut spinning clockwise on a white background", 0),
)
FIRST, WHOLE = 9, 33  # frames given, and frames in all


def draw_going_on(
    pipe: NovaPipeline,
    starts: Sequence[tuple[str, int]] = STARTS,
    first: int = FIRST,
    whole: int = WHOLE,
    **settings: Any,
) -> Figure:
    """Clips that go on from their first frames."""
    strips = []
    for prompt, seed in starts:
        start = pipe(prompt, num_frames=first, generator=seeded(seed), **settings).frames[0]
        clip = pipe(prompt, video=start, num_frames=whole, generator=seeded(seed + 1), **settings).frames[0]
        strips.append(strip_of(clip, prompt, max(1, (whole - 1) // 8), first))
    return draw_strips(strips)


# Streaming ------------------------------------------------------------------------------------------------------------


def record_stream(pipe: NovaPipeline, prompt: str, seed: int, **settings: Any) -> list[tuple[int, Any]]:
    """A stream's events, each with the sets made until then."""
    events: list[tuple[int, Any]] = []
    generation = pipe.start(GenerateRequest(prompt, **settings), seeded(seed))
    for event in generation.stream(preview=True):
        if isinstance(event, PartialFrame):
            covered = cover(event.frame, event.revealed[0].cpu().numpy())
            events.append((generation.state.step, (event, covered)))
        else:
            events.append((generation.state.step, event))
    return events


def draw_stream(events: Sequence[tuple[int, Any]]) -> Figure:
    """When each frame is final, in a stream and in a call, and what there is to see before."""
    ready = [(step, event.index) for step, event in events if isinstance(event, FrameReady)]
    total, count = ready[-1][0], len(ready)
    partial = [(step, picture) for step, (event, picture) in _partials(events) if event.latent_frame < 2]
    chosen = [partial[index] for index in np.linspace(0, len(partial) - 1, 6).round().astype(int)]
    whole = [(step, event.frame) for step, event in events if isinstance(event, LatentPreview)][:2]
    shown = sorted(chosen + whole, key=lambda entry: entry[0])

    figure = plt.figure(figsize=(8.6, 3.7))
    grid = figure.add_gridspec(2, len(shown), height_ratios=(1, 1.9), hspace=0.32, wspace=0.06)
    for column, (step, picture) in enumerate(shown):
        axes = figure.add_subplot(grid[0, column])
        _show(axes, picture, MADE if (step, picture) in whole else CHOSEN)
        final = ", whole" if (step, picture) in whole else ""
        axes.set_title(f"set {step}{final}", fontsize=7.5, color=FAINT, pad=2.5)
    axes = figure.add_subplot(grid[1, :])
    steps, frames = [0, *(step for step, _ in ready), total], [0, *(index + 1 for _, index in ready), count]
    axes.step(steps, frames, where="post", color=SPACE, linewidth=1.8, label="pipe.stream(...)")
    axes.plot([0, total, total], [0, 0, count], color=TIME, linewidth=1.8, linestyle="--", label="pipe(...)")
    axes.set(xlabel="sets made", ylabel="final pixel frames", xlim=(0, total * 1.02), ylim=(0, count * 1.06))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left", fontsize=8.5)
    return figure


def _partials(events: Sequence[tuple[int, Any]]) -> list[tuple[int, tuple[PartialFrame, Image.Image]]]:
    return [(step, entry) for step, entry in events if isinstance(entry, tuple)]


# The context ----------------------------------------------------------------------------------------------------------

CONTEXTS: dict[str, tuple[Context, int]] = {  # latent frames; the second is where another sentence takes over, or 0
    "all frames": (Context(), 0),
    "bounded: context_frames=33": (Context(frames=9), 0),
    "and reanchor_frames=24": (Context(frames=9, reanchor=6), 0),
    "bounded, a new sentence at 10": (Context(frames=9), 10),
}


def slots_read(context: Context, num_frames: int, change: int = 0) -> np.ndarray:
    """(frames made, frames) -> the slot of the temporal encoder that each earlier frame is in, from 1; 0: not read."""
    slots = np.zeros((num_frames, num_frames), int)
    for frame in range(num_frames):
        begin = max(0, change - context.carry) if change and frame >= change else 0
        for slot, earlier in enumerate(context.read(frame, begin), 1):
            slots[frame, earlier] = slot
    return slots


def draw_contexts(contexts: dict[str, tuple[Context, int]] = CONTEXTS, num_frames: int = 20) -> Figure:
    """Which earlier latent frames each frame is made from, and in which slot they stand."""
    colors = LinearSegmentedColormap.from_list("slots", ["#C6DBEF", "#4292C6", "#08306B"]).with_extremes(bad=ABSENT)
    figure, panels = plt.subplots(1, len(contexts), figsize=(2.45 * len(contexts), 2.75), sharey=True, squeeze=False)
    for axes, (title, (context, change)) in zip(panels[0], contexts.items(), strict=True):
        slots = slots_read(context, num_frames, change)
        image = axes.imshow(np.ma.masked_equal(slots, 0), cmap=colors, vmin=1, vmax=num_frames - 1)
        axes.set_title(title, fontsize=8.5)
        axes.set(xlabel="latent frames read", xticks=range(0, num_frames, 5), yticks=range(0, num_frames, 5))
        for frame in range(num_frames):
            axes.add_patch(Rectangle((frame - 0.5, frame - 0.5), 1, 1, color=SPACE))
        axes.tick_params(length=2)
    panels[0, 0].set_ylabel("latent frame made")
    figure.tight_layout(w_pad=0.4)
    bar = figure.colorbar(image, ax=panels, fraction=0.012, pad=0.015)
    bar.set_label("slot", fontsize=8.5)
    return figure


# Steering -------------------------------------------------------------------------------------------------------------

STORIES = (
    (
        (0.0, "a penguin moving left slowly on a cyan background"),
        (2.0, "a penguin growing on a cyan background"),
        (4.0, "a penguin spinning clockwise on a cyan background"),
    ),
    (
        (0.0, "a red apple staying still on a white background"),
        (2.0, "a red apple moving up on a white background"),
        (4.0, "a red apple bouncing on a white background"),
    ),
)


def draw_steering(
    pipe: NovaPipeline,
    stories: Sequence[Sequence[tuple[float, str]]] = STORIES,
    seed: int = 0,
    seconds: float = 6.0,
    **settings: Any,
) -> Figure:
    """Clips whose sentence changes."""
    strips = []
    for story in stories:
        clip = pipe(list(story), seconds=seconds, generator=seeded(seed), **settings).frames[0]
        fps = pipe.defaults.fps
        every = max(1, len(clip) // 12)
        told = ", ".join(f"from {at:g} s “{sentence}”" if at else f"“{sentence}”" for at, sentence in story)
        shown = range(0, len(clip), every)
        now = [sum(at * fps <= index for at, _ in story) - 1 for index in shown]
        rims = [(FAINT, CHOSEN, SPACE)[number % 3] for number in now]
        strips.append(Strip(told, [clip[i] for i in shown], [f"{i / fps:.1f} s" for i in shown], rims))
    return draw_strips(strips)


# Editing --------------------------------------------------------------------------------------------------------------


def square_mask(size: int, low: int, high: int) -> Image.Image:
    """White from `low` to `high` both ways, on black."""
    mask = Image.new("L", (size, size))
    ImageDraw.Draw(mask).rectangle((low, low, high - 1, high - 1), fill=255)
    return mask


def draw_editing(pipe: NovaPipeline, seed: int = 0) -> Figure:
    """A hole filled in, more around a picture, a share of the tokens redrawn, and the end of a clip."""
    apple = pipe("a red apple on a white background", num_frames=1, generator=seeded(seed)).images[0]
    size = apple.width
    step = size // 8
    mask = square_mask(size, step, size - step)
    names = ("a strawberry", "an owl", "a butterfly", "a frog")
    holes = [
        pipe(f"{name} on a white background", image=apple, mask_image=mask, generator=seeded(seed)).images[0]
        for name in names
    ]
    rows = [
        Strip(
            "filled in: mask_image=mask, “... on a white background”",
            [apple, mask.convert("RGB"), *holes],
            ["given", "mask", *names],
            [GIVEN, GIVEN, *[MADE] * len(holes)],
        )
    ]
    half = apple.crop((size // 8, size // 4, size // 8 + size // 2, size // 4 + size // 2))
    clip, masks = enlarge(InputClip(np.asarray(half)[None]), None, size // 4)
    known = known_tokens(torch.from_numpy(masks.copy()), 2 * pipe.capabilities.image_stride, 1)[0].numpy()
    wide = [
        pipe("a red apple on a white background", video=clip, mask_image=masks, generator=seeded(seed + n)).images[0]
        for n in range(3)
    ]
    tokens = cover(Image.fromarray(clip.frames[0]), known)
    small = Image.new("RGB", (size, size), "white")
    small.paste(half, (size // 4, size // 4))
    rows.append(
        Strip(
            f"more around it: nova edit part.png “a red apple on a white background” --outpaint {size // 4}",
            [small, tokens, *wide],
            ["given", "tokens known", *(f"seed {seed + n}" for n in range(3))],
            [GIVEN, GIVEN, *[MADE] * 3],
        )
    )
    shares = (0.25, 0.5, 0.75, 0.9, 1.0)
    again = [
        pipe("a strawberry on a white background", image=apple, strength=s, generator=seeded(seed)).images[0]
        for s in shares
    ]
    rows.append(
        Strip(
            "a share of all tokens redrawn: strength=..., “a strawberry on a white background”",
            [apple, *again],
            ["given", *(f"{share:g}" for share in shares)],
            [GIVEN, *[MADE] * len(shares)],
        )
    )
    whale = pipe("a whale moving left slowly on a blue background", num_frames=FIRST, generator=seeded(seed)).frames[0]
    last = np.arange(FIRST) >= FIRST - pipe.vae.temporal_stride
    turned = pipe(
        "a whale moving right on a blue background",
        video=whale,
        mask_image=np.broadcast_to(last[:, None, None], (FIRST, size, size)),
        generator=seeded(seed),
    ).frames[0]
    shown = (0, *range(FIRST - 5, FIRST))
    rows.append(
        Strip(
            "the last four frames of a clip: a mask a frame, “a whale moving right on a blue background”",
            [turned[index] for index in shown],
            [f"frame {index}" for index in shown],
            [MADE if last[index] else GIVEN for index in shown],
        )
    )
    return draw_strips(rows)


# Saving ---------------------------------------------------------------------------------------------------------------


def draw_resuming(pipe: NovaPipeline, prompt: str, seed: int, stop: int, **settings: Any) -> Figure:
    """A generation that is saved after `stop` sets and gone on with, beside one that never stopped."""
    request = GenerateRequest(prompt, **settings)
    never = pipe.start(request, seeded(seed)).run().frames[0]
    before: list[Image.Image] = []
    generation = pipe.start(request, seeded(seed))
    events = generation.stream(preview=True)
    for event in events:
        if isinstance(event, FrameReady):
            before.append(event.frame)
        if isinstance(event, PartialFrame) and generation.state.step == stop:
            before.append(cover(event.frame, event.revealed[0].cpu().numpy()))
            break
    events.close()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.state"
        generation.save(path)
        size = path.stat().st_size
        after = list(pipe.resume(path).stream())
    *before, partial = before
    clip = [*before, *after]
    if any(np.any(np.asarray(one) != np.asarray(other)) for one, other in zip(clip, never, strict=True)):
        raise ValueError("a generation that was gone on with made other frames than one that never stopped")
    every = pipe.vae.temporal_stride
    halves = [strip_of(clip, "", every), strip_of(never, "never stopped: the same pixels", every)]
    seen = sum(index < len(before) for index in range(0, len(clip), every))
    blank = Image.new("RGB", partial.size, "white")
    strips = []
    for half, picture, word, rim in zip(halves, (partial, blank), (f"set {stop}", ""), (CHOSEN, None), strict=True):
        pictures, words, rims = list(half.pictures), list(half.words), list(half.rims)
        pictures.insert(seen, picture)
        words.insert(seen, word)
        rims.insert(seen, rim)
        heading = half.heading or f"saved after set {stop} ({size / 1000:.0f} kB), then gone on with from the file"
        strips.append(Strip(heading, pictures, words, rims))
    return draw_strips(strips)


# All of them ----------------------------------------------------------------------------------------------------------

WHALE = "a whale moving left on a blue background"
TRAINED = ("going-on.webp", "stream.webp", "steering.webp", "editing.webp", "resuming.webp")


def draw_samples(pipe: NovaPipeline, output: Path) -> None:
    """The pictures that need trained weights."""
    figures = (
        draw_going_on(pipe),
        draw_stream(record_stream(pipe, WHALE, 0)),
        draw_steering(pipe),
        draw_editing(pipe),
        draw_resuming(pipe, WHALE, 0, stop=40),
    )
    for name, figure in zip(TRAINED, figures, strict=True):
        save_photos(figure, output / name)
