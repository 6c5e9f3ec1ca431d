"""Recipes of what is trained in a world: the autoencoder and the transformer."""

from dataclasses import dataclass, field
from typing import Literal

from nova_video.common.checks import check_number
from nova_video.common.errors import InputError
from nova_video.training.recipe import Recipe, TransformerRun, check_shares
from nova_worlds.rendering.lexicon import MOTIONS


@dataclass(frozen=True)
class DataRecipe:
    """The training data: a prepared world, rendered on the device as training goes."""

    world: str = "data/emoji"
    """Folder written by `nova data emoji` or `nova data shapes`."""
    frames: tuple[int, ...] = (17,)
    """Clip lengths, each 4k + 1; 1 is an image."""
    probability: tuple[float, ...] = (1.0,)
    """Share of the steps each length gets."""
    batch: tuple[int, ...] = (64,)
    """Clips of a batch, for each length."""
    pool: tuple[int, ...] = (65536,)
    """Clips of each length held ready on the device."""
    refresh_every: int = 1000
    """Steps after which some of the pool is replaced by new clips; 0: never."""
    refresh: float = 0.05
    """Share of the pool that is replaced then."""
    pairs: float = 0.3
    """Share of the images that show two objects."""
    emphasized: tuple[str, ...] = ()
    """Motions that clips show `emphasis` times as often as the others."""
    emphasis: float = 1.0
    """How many times as often."""
    window: int | None = None
    """Frames that a step takes of longer clips: the first one and a stretch of the rest.

    A bounded context does the same in sampling. Only the second half of the frames is learned: at the beginning of the
    stretch, nothing tells the first ones.
    """

    def __post_init__(self) -> None:
        lengths = {name: len(getattr(self, name)) for name in ("frames", "probability", "batch", "pool")}
        if len(set(lengths.values())) != 1:
            raise InputError(f"data.frames, probability, batch and pool need one entry for each length; got {lengths}")
        if any(frames < 1 or frames % 4 != 1 for frames in self.frames):
            raise InputError(f"data.frames = {self.frames}: expected lengths 4k + 1, such as 1, 9 or 17")
        if self.window is not None and (self.window < 9 or self.window % 4 != 1):
            raise InputError(f"data.window = {self.window}: expected a length 4k + 1 of at least 9")
        for frames, *counts in zip(self.frames, self.batch, self.pool, strict=True):
            for name, count in zip(("batch", "pool"), counts, strict=True):
                check_number(f"data.{name} for {frames} frames", count, 1, integer=True)
        check_shares("data.probability", self.probability)
        check_number("data.refresh_every", self.refresh_every, 0, integer=True)
        for name in ("refresh", "pairs"):
            check_number(f"data.{name}", getattr(self, name), 0, high=1)
        check_number("data.emphasis", self.emphasis, 0, above=True)
        if unknown := [motion for motion in self.emphasized if motion not in MOTIONS]:
            raise InputError(f"data.emphasized has {unknown[0]!r}: expected motions such as {MOTIONS[1]!r}")


@dataclass(frozen=True)
class AutoencoderRecipe(Recipe):
    """Trains `AutoencoderKLCausalTiny`."""

    kind: Literal["autoencoder"] = "autoencoder"
    """Kind of training."""
    data: DataRecipe = field(default_factory=DataRecipe)
    latent_channels: int = 16
    """Channels of a latent."""
    l1: float = 1.0
    """Weight of the absolute error of pixels."""
    mse: float = 2.0
    """Weight of the squared error of pixels."""
    gradient: float = 2.0
    """Weight of the L1 distance of differences between neighbouring pixels."""
    kl: float = 1e-3
    """Weight of the distance of the latents from a normal distribution."""
    foreground: float = 4.0
    """Pixels of the object weigh 1 + this."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("latent_channels", self.latent_channels, 1, integer=True)
        for name in ("l1", "mse", "gradient", "kl", "foreground"):
            check_number(name, getattr(self, name), 0)
        if self.log.score_every:
            raise InputError(f"log.score_every is {self.log.score_every}: expected 0, no judge scores an autoencoder")


@dataclass(frozen=True)
class WorldTransformerRecipe(TransformerRun):
    """In a world: stage one on images, stage two on clips from stage one's weights (`init`)."""

    kind: Literal["world-transformer"] = "world-transformer"
    """Kind of training."""
    data: DataRecipe = field(default_factory=DataRecipe)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.video_loss == "released" and self.data.window is not None:
            raise InputError(
                f"data.window is {self.data.window} and video_loss is 'released': expected 'mean', a window's first"
                " frames are not learned"
            )
