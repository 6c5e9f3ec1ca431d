"""Pictures of a real request: a frame as it is filled set by set, one set as it is denoised, and what guidance does.

What is shown of an unfinished frame is its latents as they are, decoded; tokens not yet revealed are covered in grey.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image, ImageDraw
from torch import Tensor

from drawing.style import CHOSEN, FAINT, HIDDEN, INK, SPACE, font, rgb, save_animation
from nova_video.autoencoders import unscale_latents
from nova_video.io.pixels import output_form, unit_frames
from nova_video.model import patchify, random_order, set_sizes, unpatchify
from nova_video.pipeline.pipeline import NovaPipeline


@dataclass(frozen=True)
class Moment:
    """After one set."""

    frame: int
    """Latent frame in hand."""
    latents: Tensor
    """(1, C, h, w), zero where nothing is revealed."""
    revealed: np.ndarray
    """(rows, columns) bool."""


@dataclass(frozen=True)
class Filling:
    """A request from its first set to its last."""

    prompt: str
    moments: list[Moment]
    clip: list[Image.Image]
    """The finished pixel frames."""
    fps: float


def record_filling(
    pipe: NovaPipeline,
    prompt: str,
    seed: int,
    num_frames: int | None = None,
    num_sets: int | None = None,
    num_diffusion_steps: int | None = None,
) -> Filling:
    """Run one request and keep what its callback is given."""
    moments: list[Moment] = []

    def keep(_: NovaPipeline, step: int, frame: int, tensors: dict[str, Tensor]) -> None:
        moments.append(Moment(frame, tensors["latents"].clone(), tensors["revealed"][0].numpy().copy()))

    result = pipe(
        prompt,
        num_frames=num_frames,
        num_inference_steps=num_sets,
        num_diffusion_steps=num_diffusion_steps,
        generator=torch.Generator().manual_seed(seed),
        callback_on_step_end=keep,
    )
    return Filling(prompt, moments, (result.frames or [result.images])[0], result.fps or 1.0)


@torch.no_grad()
def decode_last(pipe: NovaPipeline, frames: Sequence[Tensor]) -> Image.Image:
    """The last pixel frame of latent frames (1, C, h, w)."""
    z = unscale_latents(pipe.vae, torch.stack(list(frames), dim=2).to(pipe.vae.dtype))
    pixels = pipe.vae.decode(z if len(frames) > 1 else z[:, :, 0]).sample
    pixels = pixels[:, :, -1:] if pixels.dim() == 5 else pixels.unsqueeze(2)  # (1, 3, 1, H, W)
    picture: Image.Image = output_form(unit_frames(pixels), "pil")[0][0]
    return picture


def cover(picture: Image.Image, revealed: np.ndarray) -> Image.Image:
    """The picture with grey cells where nothing is revealed, revealed (rows, columns) bool."""
    out = picture.copy()
    brush = ImageDraw.Draw(out)
    height, width = picture.height / revealed.shape[0], picture.width / revealed.shape[1]
    grey = rgb(HIDDEN)
    rim = tuple(min(255, value + 26) for value in grey)
    for row, column in np.argwhere(~revealed):
        corners = (column * width, row * height, (column + 1) * width - 1, (row + 1) * height - 1)
        brush.rectangle(tuple(map(round, corners)), fill=grey, outline=rim)
    return out


# A frame being filled ------------------------------------------------------------------------------------------------

LARGE, SMALL, GAP = 256, 96, 16  # pixels
MOST_BYTES = 300_000  # of the animation


def draw_filling(pipe: NovaPipeline, filling: Filling, path: Path) -> None:
    """An animation: the frame in hand, the latent frames so far, then the clip as it plays."""
    finished: list[Tensor] = []
    shown: list[Image.Image] = []
    pictures, durations = [], []
    count = max(moment.frame for moment in filling.moments) + 1
    for moment in filling.moments:
        picture = cover(decode_last(pipe, [*finished, moment.latents]), moment.revealed)
        tokens = f"{int(moment.revealed.sum())} of {moment.revealed.size} tokens"
        share = float(moment.revealed.mean())
        status = f"latent frame {moment.frame}: {tokens}"
        pictures.append(_page(filling.prompt, picture, [*shown, picture], count, status, share))
        done = bool(moment.revealed.all())
        durations.append(700 if done else 170)
        if done:
            finished.append(moment.latents)
            shown.append(picture)
    for index, picture in enumerate(filling.clip):
        status = f"the clip: frame {index + 1} of {len(filling.clip)}"
        pictures.append(_page(filling.prompt, picture, shown, count, status, (index + 1) / len(filling.clip)))
        durations.append(round(1000 / filling.fps))
    durations[-1] += 1500
    save_animation(pictures, durations, path, MOST_BYTES)


def _page(
    prompt: str, large: Image.Image, small: Sequence[Image.Image], count: int, status: str, share: float
) -> Image.Image:
    """One picture of the animation; `share` is how far the bar is filled."""
    scale = LARGE / large.width
    height, low = round(large.height * scale), round(large.height * SMALL / large.width)
    columns = 3
    left = 2 * GAP + LARGE
    width = left + columns * (SMALL + GAP)
    page = Image.new("RGB", (width, height + 3 * GAP + 64), "white")
    brush = ImageDraw.Draw(page)
    brush.text((GAP, GAP - 4), prompt, font=font(15), fill=rgb(INK))
    top = GAP + 26
    page.paste(large.resize((LARGE, height), Image.Resampling.BICUBIC), (GAP, top))
    for index in range(count):
        x, y = left + index % columns * (SMALL + GAP), top + index // columns * (low + GAP + 16)
        brush.text((x, y), str(index), font=font(11), fill=rgb(FAINT))
        if index < len(small):
            page.paste(small[index].resize((SMALL, low), Image.Resampling.BICUBIC), (x, y + 16))
        else:
            brush.rectangle((x, y + 16, x + SMALL - 1, y + 16 + low - 1), outline=rgb(HIDDEN))
    bar = top + height + GAP
    brush.rectangle((GAP, bar, GAP + LARGE - 1, bar + 5), fill=rgb(HIDDEN))
    brush.rectangle((GAP, bar, GAP + max(1, round(LARGE * share)) - 1, bar + 5), fill=rgb(SPACE))
    brush.text((GAP, bar + 10), status, font=font(13), fill=rgb(INK))
    return page


# One set being denoised ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Denoising:
    """One set of an image, from noise to its values."""

    before: Tensor
    """(1, L, P) the frame's tokens before the set."""
    ids: Tensor
    """(S,) the set."""
    known: np.ndarray
    """(rows, columns) bool: revealed before or in this set."""
    chosen: np.ndarray
    """(rows, columns) bool: in this set."""
    timesteps: list[float]
    values: list[Tensor]
    """(1, S, P) before each denoising step, and at last the result."""


def record_denoising(pipe: NovaPipeline, prompt: str, seed: int, num_sets: int, chosen: int) -> Denoising:
    """Make an image in `num_sets` sets and keep every denoising step of the set `chosen`, from 0."""
    seen: list[tuple[float, Tensor]] = []
    steps: list[tuple[float, Tensor]] = []
    frames: list[Tensor] = []
    masks: list[np.ndarray] = []

    def look(_: torch.nn.Module, given: tuple[Tensor, ...]) -> None:
        """Before every step of the plain loop; the tokens are the same in all passes."""
        noisy, timestep, _ = given
        seen.append((float(timestep[0]), noisy[:1].clone()))

    def keep(_: NovaPipeline, step: int, frame: int, tensors: dict[str, Tensor]) -> None:
        frames.append(tensors["latents"].clone())
        masks.append(tensors["revealed"][0].numpy().copy())
        if step == chosen:
            steps.extend(seen)
        seen.clear()

    model = pipe.transformer
    looking = model.image_decoder.register_forward_pre_hook(look)
    try:
        pipe(
            prompt,
            num_frames=1,
            num_inference_steps=num_sets,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
            callback_on_step_end=keep,
            compile=False,
        )
    finally:
        looking.remove()
    tokens = [patchify(frame, model.patch_size) for frame in frames]
    count = masks[0].size
    uniform = torch.rand(1, count, 1, generator=torch.Generator().manual_seed(seed), dtype=model.dtype)
    sizes = set_sizes(count, num_sets)
    first = sum(sizes[:chosen])
    ids = random_order(uniform)[0, first : first + sizes[chosen]]  # the order that the request drew, from the same seed
    before = torch.zeros_like(tokens[0]) if chosen == 0 else tokens[chosen - 1]
    known = masks[chosen]
    in_set = known if chosen == 0 else known & ~masks[chosen - 1]
    values = [x for _, x in steps] + [tokens[chosen][:, ids]]
    return Denoising(before, ids, known, in_set, [t for t, _ in steps], values)


def draw_denoising(pipe: NovaPipeline, run: Denoising, prompt: str, stages: int = 6) -> Figure:
    """The frame with the set at `stages` moments; the set's cells are outlined, later ones grey."""
    config = pipe.transformer.config
    grid = tuple(2 * side for side in run.known.shape)
    picked = np.linspace(0, len(run.values) - 1, stages).round().astype(int)
    figure, panels = plt.subplots(1, stages, figsize=(8.8, 2.0))
    for axes, index in zip(panels, picked, strict=True):
        tokens = run.before.clone()
        tokens[:, run.ids] = run.values[index].to(tokens.dtype)
        latents = unpatchify(tokens, pipe.transformer.patch_size, (grid[0], grid[1]))
        picture = cover(decode_last(pipe, [latents]), run.known)
        axes.imshow(np.asarray(picture))
        cell = config.image_stride * pipe.transformer.patch_size
        for row, column in np.argwhere(run.chosen):
            corner = (column * cell - 0.5, row * cell - 0.5)
            axes.add_patch(Rectangle(corner, cell, cell, fill=False, edgecolor=CHOSEN, linewidth=1.1))
        last = index == len(run.values) - 1
        axes.set_title("fixed" if last else f"t = {run.timesteps[index]:.0f}", fontsize=8.5)
        axes.axis("off")
    figure.suptitle(f"One set of “{prompt}”, from noise to values", fontsize=9.5, y=1.02)
    figure.tight_layout(w_pad=0.4)
    return figure


# Guidance ------------------------------------------------------------------------------------------------------------


def draw_guidance(pipe: NovaPipeline, prompts: Sequence[str], scales: Sequence[float], seed: int) -> Figure:
    """A picture for every prompt (down) and scale (across), each row from the same random numbers."""
    figure, panels = plt.subplots(
        len(prompts), len(scales), figsize=(1.55 * len(scales) + 1.6, 1.6 * len(prompts) + 0.3), squeeze=False
    )
    for row, prompt in zip(panels, prompts, strict=True):
        for axes, scale in zip(row, scales, strict=True):
            generator = torch.Generator().manual_seed(seed)
            picture = pipe(prompt, num_frames=1, guidance_scale=scale, generator=generator).images[0]
            axes.imshow(np.asarray(picture))
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        words = prompt.split()
        half = (len(words) + 1) // 2
        label = " ".join(words[:half]) + "\n" + " ".join(words[half:])
        row[0].set_ylabel(label, rotation=0, ha="right", va="center", labelpad=8)
    for axes, scale in zip(panels[0], scales, strict=True):
        axes.set_title(f"scale {scale:g}" + (" (off)" if scale <= 1 else ""))
    figure.tight_layout(w_pad=0.5, h_pad=0.5)
    return figure
