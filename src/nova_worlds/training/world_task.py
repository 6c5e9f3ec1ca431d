"""Training the transformer in a world: clips are rendered, encoded and described when the pool is filled.

A step only picks rows of the pool. Looked at with what the world knows: held-out combinations, wrong captions, a judge.
"""

import random
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from nova_video.common.errors import InputError
from nova_video.io.checkpoints import resolve_checkpoint
from nova_video.model import NOVATransformer3DModel
from nova_video.pipeline.loading import load_autoencoder
from nova_video.pipeline.settings import CheckpointSettings
from nova_video.text.features import encode_batch
from nova_video.text.load import load_text_encoder
from nova_video.text.vocabulary import Vocabulary
from nova_video.training.task import LossParts
from nova_video.training.transformer_task import (
    Batch,
    Material,
    TransformerTask,
    Variant,
    draw_latents,
    make_model,
    make_scheduler,
)
from nova_worlds.evaluation.emoji import EmojiSettings, asked_specs, evaluate_emoji, generate
from nova_worlds.evaluation.report import contact_sheet
from nova_worlds.evaluation.world_benchmark import GENERATED, SHEET_CLIPS, describe
from nova_worlds.judging.judge import Judge
from nova_worlds.rendering.clips import CANVAS, FPS, ClipSpec
from nova_worlds.rendering.lexicon import MOTIONS
from nova_worlds.rendering.world import EmojiWorld
from nova_worlds.training.pools import Pools, Rows, describe_world
from nova_worlds.training.recipes import WorldTransformerRecipe

ENCODE = 256  # clips that go through the autoencoder together


def stretch(latents: Tensor, window: int) -> Tensor:
    """Latent frames (B, C, F, h, w) -> (B, C, window, h, w): each clip's first and then a stretch from anywhere."""
    batch, _, frames = latents.shape[:3]
    start = torch.randint(1, frames - window + 2, (batch, 1), device=latents.device)
    index = torch.cat([torch.zeros_like(start), start + torch.arange(window - 1, device=latents.device)], dim=1)
    return latents.gather(2, index[:, None, :, None, None].expand(-1, latents.shape[1], -1, *latents.shape[3:]))


def _vocabulary(recipe: WorldTransformerRecipe, world: EmojiWorld) -> Vocabulary | None:
    """The words of the world and of the model that training starts from; None where that one reads any text."""
    learned = world.vocabulary(recipe.data.frames, recipe.data.pairs > 0)
    if not recipe.init:
        return learned
    known = CheckpointSettings.load(resolve_checkpoint(recipe.init)).vocabulary
    return None if known is None else known + learned


class WorldTask(TransformerTask):
    """A size is a clip length in frames."""

    recipe: WorldTransformerRecipe

    def __init__(self, recipe: WorldTransformerRecipe, device: torch.device) -> None:
        vae = load_autoencoder(resolve_checkpoint(recipe.autoencoder))
        if vae is None:
            raise InputError(f"autoencoder = {recipe.autoencoder!r}: expected a checkpoint folder with vae/")
        self.vae = vae.to(device).requires_grad_(False)
        self.tokenizer, self.text_encoder = load_text_encoder(
            recipe.text_encoder, torch.float16 if device.type == "cuda" else torch.float32, device
        )
        self.world = EmojiWorld.load(recipe.data.world, device)
        stride = self.vae.spatial_stride
        channels, width = self.vae.config.latent_channels, self.text_encoder.config.hidden_size
        names = f"autoencoder = {recipe.autoencoder!r} and text_encoder = {recipe.text_encoder!r}"
        model, size = make_model(recipe, Material(channels, stride, width, (CANVAS, CANVAS), names))
        self.grid = (CANVAS // stride, CANVAS // stride)
        self.data, self.pools = recipe.data, Pools(recipe.data, recipe.seed, self.make_rows)
        frames = (max(recipe.data.frames) - 1) // 4 + 1
        self.vocabulary = _vocabulary(recipe, self.world)
        super().__init__(replace(recipe, model=size), model, make_scheduler(recipe), device, frames)

    # Samples ------------------------------------------------------------------------------------------------------

    def prepare(self, step: int) -> None:
        self.pools.prepare(step)

    def refresh_every(self) -> int:
        return self.data.refresh_every

    def variants(self) -> tuple[list[Variant], list[float]]:
        counts: list[int | None] = [None]
        shares = [1.0]
        if self.recipe.mask_ratio == "batch":
            numbers, shares = self.counts(self.tokens(self.grid))
            counts = list(numbers)
        lengths = list(zip(self.data.frames, self.data.probability, strict=True))
        variants = [Variant(frames, count) for frames, _ in lengths for count in counts]
        return variants, [weight * share for _, weight in lengths for share in shares]

    def samples(self, variant: Variant) -> int:
        return self.pools.batch[variant.size]

    def shape(self, variant: Variant) -> tuple[int, tuple[int, int]]:
        return self._shown(variant.size), self.grid

    def _shown(self, frames: int) -> int:
        """Latent frames that a step sees of clips of so many frames."""
        window = self.data.window
        return ((frames if window is None else min(frames, window)) - 1) // 4 + 1

    def draw(self, variant: Variant, micro: int) -> Batch:
        rows = self.pools.draw(variant.size)
        latents, shown = rows["latents"].float(), self._shown(variant.size)
        if shown < latents.shape[2]:
            latents = stretch(latents, shown)
        return self._batch(rows, latents, rows["motion"])

    def _batch(self, rows: Rows, latents: Tensor, motion: Tensor) -> Batch:
        return Batch(latents, rows["text"], rows["lengths"], motion, torch.full_like(rows["motion"], FPS))

    def loss(self, variant: Variant, batch: Batch) -> LossParts:
        found = self.batch_losses(self.model, batch, variant.visible)
        if (window := self._shown(variant.size)) == (variant.size - 1) // 4 + 1:
            return self.named(found)
        learned = found.by_frame[window // 2 :]  # the slots before do not know where in the clip they are
        return {"loss": learned.sum() * window / len(learned)}

    def make_rows(self, frames: int, count: int, seed: int) -> Rows:
        generator, images = self.generator(seed), frames == 1
        pairs = self.data.pairs if images else 0.0
        weights = torch.ones(len(MOTIONS))
        weights[[MOTIONS.index(motion) for motion in self.data.emphasized]] = self.data.emphasis
        spec = self.world.sample(
            count, generator, num_frames=frames, images=images, pairs=pairs, weights=None if images else weights
        )
        return self._encode(spec, generator, random.Random(seed))

    @torch.no_grad()
    def _encode(self, spec: ClipSpec, generator: torch.Generator, wording: random.Random | None) -> Rows:
        text, lengths = self._describe(self.world.captions(spec, wording))
        latents = []
        for start in range(0, len(spec), ENCODE):
            clips = self.world.render(spec.select(slice(start, start + ENCODE)))  # (n, 3, F, H, W)
            with self.half():
                posterior = self.vae.encode(clips).latent_dist
            moments = torch.cat([posterior.mean, posterior.logvar], dim=1)
            latents.append(draw_latents(moments, self.vae, generator).to(text.dtype))
        motion = self.world.motion_scores(spec)
        return {"latents": torch.cat(latents), "text": text, "lengths": lengths, "motion": motion}

    def _describe(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Token features padded to the model's text length (N, T, width), and lengths (N,)."""
        length = self.model.text_embed.token_len
        text, lengths = encode_batch(self.tokenizer, self.text_encoder, captions, length)
        return nn.functional.pad(text, (0, 0, 0, length - text.shape[1])), lengths

    # Looking at it ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def validate(self, model: NOVATransformer3DModel) -> dict[str, float]:
        """Loss on held-out clips with their own caption, with another object's, and (for clips) with another motion's.

        The distance between them is what the model knows of the prompt, long before samples show it.
        """
        frames = self.recipe.data.frames[0]
        generator = torch.Generator(self.device).manual_seed(self.recipe.seed)
        count = 512 if self.on_gpu else 32
        spec = self.world.sample(count, generator, num_frames=frames, split="heldout", images=frames == 1)
        rows = self._encode(spec, generator, None)
        shift = torch.randint(1, len(self.world.names), (count,), generator=generator, device=self.device)
        told = {"": spec, "_wrong_object": replace(spec, object=(spec.object + shift) % len(self.world.names))}
        if frames > 1:
            told["_wrong_motion"] = replace(spec, motion=(spec.motion + 1 + shift % (len(MOTIONS) - 1)) % len(MOTIONS))
        latents = rows["latents"].float()
        unknown = torch.full_like(rows["motion"], self.defaults.motion_flow)
        losses = {}
        devices = [self.device] if self.on_gpu else []
        for name, shown in told.items():
            text, lengths = self._describe(self.world.captions(shown))
            with torch.random.fork_rng(devices), self.half():
                torch.manual_seed(self.recipe.seed)
                batch = self._batch(rows | {"text": text, "lengths": lengths}, latents, unknown)
                found = self.denoising_losses(model, batch, latents, self.tokens(self.grid) // 8, 1)
            losses[f"held_out_loss{name}"] = found.total.item()
        return losses

    def sheet(self, model: NOVATransformer3DModel, folder: Path) -> Image.Image:
        """Clips generated from held-out captions, with what the judge sees in them."""
        settings = EmojiSettings(num_clips=SHEET_CLIPS, num_frames=self.data.frames[0])
        spec = asked_specs(self.world, settings)[0].select(slice(SHEET_CLIPS))
        frames = generate(self.open(folder), self.world, spec, settings, 0)
        return contact_sheet(describe(self.world, frames, spec, Judge(self.world)(frames, spec)))

    def score(self, folder: Path, clips: int) -> dict[str, float]:
        """`nova evaluate emoji` on so many clips and half as many pictures of two objects, in percent."""
        settings = EmojiSettings(clips, clips // 2, self.data.frames[0], batch_size=clips)
        report = evaluate_emoji(self.open(folder), self.world, settings)
        return {f"score_{name}": 100 * rate.value for name, rate in report.sources[GENERATED].rates.items()}

    def learned_from(self) -> str:
        return describe_world(self.data)

    def export(self, model: NOVATransformer3DModel, folder: Path) -> None:
        self.export_parts(model, self.vae, self.recipe.text_encoder, folder)
        if self.vocabulary is not None and not self.recipe.lora.rank:
            self.vocabulary.save(folder)
