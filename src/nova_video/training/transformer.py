"""What is particular to training the transformer: its samples, one batch's loss, and how it is looked at.

Clips are rendered, encoded by a trained autoencoder and described by a text encoder when the pool is filled; a step
only picks rows of the pool.
"""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor, nn

from nova_video.autoencoders import scale_latents
from nova_video.data.clips import CANVAS, FPS, ClipSpec
from nova_video.data.world import EmojiWorld
from nova_video.errors import InputError
from nova_video.loading import load_autoencoder, load_transformer, resolve_checkpoint
from nova_video.model import NOVATransformer3DModel, Positions, mask_ratios
from nova_video.request import CheckpointSettings
from nova_video.text.encoders import encode_batch, load_text_encoder
from nova_video.training.loss import NoiseTable, draw, frame_losses, loss_parts
from nova_video.training.pool import Pool, Rows, fill_seed
from nova_video.training.recipe import TransformerRecipe

ENCODE = 256  # clips that go through the autoencoder together

Variant = tuple[int, int]
"""Clip length in frames, revealed tokens."""


class TransformerTask:
    """Implements `trainer.Task`."""

    def __init__(self, recipe: TransformerRecipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self.world = EmojiWorld.load(recipe.data.world, device)
        vae = load_autoencoder(resolve_checkpoint(recipe.autoencoder))
        if vae is None:
            raise InputError(f"autoencoder = {recipe.autoencoder!r}: expected a checkpoint folder with vae/")
        self.vae = vae.to(device).requires_grad_(False)
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        self.tokenizer, self.text_encoder = load_text_encoder(recipe.text_encoder, dtype, device)
        self.scheduler = (
            FlowMatchEulerDiscreteScheduler()
            if recipe.scheduler == "flow"
            else DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False)
        )
        self.table = NoiseTable.from_scheduler(self.scheduler, device)
        self.model = self._new_model().to(device)
        side = self.model.config.image_size[0] // self.vae.spatial_stride
        self.grid = (side, side)
        self.tokens = (side // self.model.patch_size) ** 2
        self.values = self.model.patch_size**2 * self.vae.config.latent_channels
        if recipe.compile and device.type == "cuda":
            for block in (*self.model.video_encoder.blocks, *self.model.image_encoder.blocks):
                block.compile(dynamic=True)
        data = recipe.data
        self.pools = {
            frames: Pool(lambda count, fill, frames=frames: self._make(count, fill, frames), size, data.refresh)
            for frames, size in zip(data.frames, data.pool, strict=True)
        }
        self.batch = dict(zip(data.frames, data.batch, strict=True))
        self.placed: dict[int, Positions] = {frames: self._positions(frames) for frames in data.frames}
        self.loss_names = ("loss", "loss_t2i", "loss_i2i")

    def _new_model(self) -> NOVATransformer3DModel:
        recipe, stride = self.recipe, self.vae.spatial_stride
        size = CANVAS
        patch = 15 // stride + 1
        rows = size // stride // patch
        model = NOVATransformer3DModel(
            image_dim=self.vae.config.latent_channels,
            image_size=(size, size),
            image_stride=stride,
            text_token_dim=self.text_encoder.config.hidden_size,
            text_token_len=recipe.model.text_token_len,
            image_base_size=(rows, rows),
            video_base_size=(recipe.model.video_base_frames, rows // 2, rows // 2),
            video_mixer_rank=recipe.model.video_mixer_rank,
            rotary_pos_embed=recipe.model.rotary_pos_embed,
            arch=recipe.model.arch,
        )
        if recipe.init:
            start = load_transformer(resolve_checkpoint(recipe.init))
            try:
                model.load_state_dict(start.state_dict())
            except RuntimeError as error:
                raise InputError(f"init = {recipe.init!r} does not fit this recipe's model: {error}") from error
        return model

    def _positions(self, frames: int) -> Positions:
        return self.model.positions((frames - 1) // self.vae.temporal_stride + 1, self.grid)

    # Samples ------------------------------------------------------------------------------------------------------

    def _make(self, count: int, fill: int, frames: int) -> Rows:
        seed = fill_seed(self.recipe.seed, frames, fill)
        generator = torch.Generator(self.device).manual_seed(seed)
        spec = self.world.sample(count, generator, num_frames=frames, images=frames == 1, pairs=self.recipe.data.pairs)
        return self._encode(spec, generator, random.Random(seed))

    @torch.no_grad()
    def _encode(self, spec: ClipSpec, generator: torch.Generator, wording: random.Random | None) -> Rows:
        text, lengths = self._describe(self.world.captions(spec, wording))
        latents = []
        half = torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")
        for start in range(0, len(spec), ENCODE):
            clips = self.world.render(spec.select(slice(start, start + ENCODE)))  # (n, 3, F, H, W)
            with half:
                posterior = self.vae.encode(clips).latent_dist
            mean, std = posterior.mean.float(), (0.5 * posterior.logvar.float()).exp()
            z = mean + std * torch.randn(mean.shape, generator=generator, device=self.device)
            latents.append(scale_latents(self.vae, z).to(text.dtype))
        motion = self.world.motion_scores(spec)
        return {"latents": torch.cat(latents), "text": text, "lengths": lengths, "motion": motion}

    def _describe(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Token features padded to the model's text length (N, T, width), and lengths (N,)."""
        length = self.recipe.model.text_token_len
        text, lengths = encode_batch(self.tokenizer, self.text_encoder, captions, length)
        return nn.functional.pad(text, (0, 0, 0, length - text.shape[1])), lengths

    def prepare(self, step: int) -> None:
        for pool in self.pools.values():
            pool.fill_for(step, self.recipe.data.refresh_every)

    # One step -----------------------------------------------------------------------------------------------------

    def variants(self) -> tuple[list[Any], list[float]]:
        recipe = self.recipe
        counts, shares = list(recipe.visible), list(recipe.visible_probability)
        if not counts:  # the paper's mask ratios, as the share each number of revealed tokens gets of many draws
            ratios = mask_ratios(100_000, torch.Generator().manual_seed(0))
            shown = ((1 - ratios) * self.tokens).round().long()
            counts = shown.unique().tolist()
            shares = [(shown == count).float().mean().item() for count in counts]
        lengths = list(zip(recipe.data.frames, recipe.data.probability, strict=True))
        variants: list[Variant] = [(frames, count) for frames, _ in lengths for count in counts]
        return variants, [weight * share for _, weight in lengths for share in shares]

    def loss(self, variant: Variant) -> dict[str, Tensor]:
        recipe = self.recipe
        frames, visible = variant
        rows = self.pools[frames].draw(self.batch[frames])
        count = len(rows["lengths"])
        chance = torch.rand(2, count, device=self.device)
        lengths = rows["lengths"].masked_fill(chance[0] < recipe.prompt_dropout, 0)
        motion = rows["motion"].masked_fill(chance[1] < recipe.motion_dropout, recipe.defaults.motion_flow)
        latents = rows["latents"].float()  # (B, C, F, h, w)
        noise = recipe.history_noise * torch.rand(count, 1, latents.shape[2], 1, 1, device=self.device)
        history = latents + noise * torch.randn_like(latents)
        per_frame = self._frame_losses(
            self.model, latents, history, (rows["text"].float(), lengths, motion), visible, recipe.loss_repeat, frames
        )
        return {"loss": per_frame.sum()} | {k: v for k, v in loss_parts(per_frame).items() if k != "loss"}

    def _frame_losses(
        self,
        model: NOVATransformer3DModel,
        latents: Tensor,
        history: Tensor,
        condition: tuple[Tensor, Tensor, Tensor],
        visible: int,
        repeats: int,
        frames: int,
    ) -> Tensor:
        fps = torch.full_like(condition[2], FPS)
        tokens = model.embed_condition(condition[0], condition[1], condition[2], fps)  # (B, T, D)
        draws = draw(self.table, latents.shape[0] * latents.shape[2], self.tokens, self.values, visible, repeats)
        return frame_losses(model, latents, history, tokens, self.placed[frames], self.table, draws)

    # Looking at it ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def validate(self, model: nn.Module) -> dict[str, float]:
        """Loss on held-out clips with their own caption, with another object's, and (for clips) with another motion's.

        The distance between them is what the model knows of the prompt, long before samples show it.
        """
        assert isinstance(model, NOVATransformer3DModel)
        frames = self.recipe.data.frames[0]
        generator = torch.Generator(self.device).manual_seed(self.recipe.seed)
        count = 512 if self.device.type == "cuda" else 32
        spec = self.world.sample(count, generator, num_frames=frames, split="heldout", images=frames == 1)
        rows = self._encode(spec, generator, None)
        shift = torch.randint(1, len(self.world.names), (count,), generator=generator, device=self.device)
        told = {"": spec, "_wrong_object": replace(spec, object=(spec.object + shift) % len(self.world.names))}
        if frames > 1:
            told["_wrong_motion"] = replace(spec, motion=(spec.motion + 1 + shift % 8) % 10)
        latents = rows["latents"].float()
        unknown = torch.full_like(rows["motion"], self.recipe.defaults.motion_flow)
        losses = {}
        devices = [self.device] if self.device.type == "cuda" else []
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")
        for name, shown in told.items():
            text, lengths = self._describe(self.world.captions(shown))
            with torch.random.fork_rng(devices), autocast:
                torch.manual_seed(self.recipe.seed)
                condition = (text.float(), lengths, unknown)
                per_frame = self._frame_losses(model, latents, latents, condition, self.tokens // 8, 1, frames)
            losses[f"held_out_loss{name}"] = per_frame.sum().item()
        return losses

    def sheet(self, model: nn.Module, folder: Path) -> Image.Image:
        from nova_video.evaluation.emoji import sample_sheet
        from nova_video.pipeline import NovaPipeline

        pipe = NovaPipeline.from_pretrained(folder).to(self.device)
        return sample_sheet(pipe, self.world, num_frames=self.recipe.data.frames[0], seed=self.recipe.seed)

    def score(self, folder: Path, clips: int) -> dict[str, float]:
        from nova_video.evaluation.emoji import evaluate_emoji
        from nova_video.pipeline import NovaPipeline

        pipe = NovaPipeline.from_pretrained(folder).to(self.device)
        scores = evaluate_emoji(pipe, self.world, num_clips=clips, num_frames=self.recipe.data.frames[0])
        return scores.summary()

    def export(self, model: nn.Module, folder: Path) -> None:
        assert isinstance(model, NOVATransformer3DModel)
        copy = NOVATransformer3DModel.from_config(model.config)
        copy.load_state_dict(model.state_dict())
        copy.to(torch.float16).save_pretrained(folder / "transformer")
        self.vae.save_pretrained(folder / "vae")
        self.scheduler.save_pretrained(folder / "scheduler")
        CheckpointSettings(self.recipe.text_encoder, self.recipe.defaults).save(folder)
