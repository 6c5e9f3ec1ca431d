"""What is particular to training the transformer: its samples, one batch's loss, and how it is looked at.

Clips are rendered, encoded by a trained autoencoder and described by a text encoder when the pool is filled; a step
only picks rows of the pool.
"""

import copy
import random
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor, nn

from nova_video.autoencoders import scale_latents
from nova_video.data.clips import CANVAS, FPS, ClipSpec
from nova_video.data.words import MOTIONS
from nova_video.errors import InputError
from nova_video.evaluation.benchmark import GENERATED, SHEET_CLIPS, describe
from nova_video.evaluation.emoji import EmojiSettings, asked_specs, evaluate_emoji, generate
from nova_video.evaluation.judge import Judge
from nova_video.evaluation.report import contact_sheet
from nova_video.loading import load_autoencoder, load_transformer, resolve_checkpoint
from nova_video.model import NOVATransformer3DModel, mask_ratios
from nova_video.pipeline import NovaPipeline
from nova_video.settings import CheckpointSettings
from nova_video.text.encoders import encode_batch, load_text_encoder
from nova_video.training.loss import NoiseTable, draw, frame_losses, loss_parts
from nova_video.training.pool import Rows
from nova_video.training.recipe import TransformerRecipe
from nova_video.training.task import Task

ENCODE = 256  # clips that go through the autoencoder together

Variant = tuple[int, int]
"""Clip length in frames, revealed tokens."""


def stretch(latents: Tensor, window: int) -> Tensor:
    """Latent frames (B, C, F, h, w) -> (B, C, window, h, w): each clip's first and then a stretch from anywhere."""
    batch, _, frames = latents.shape[:3]
    start = torch.randint(1, frames - window + 2, (batch, 1), device=latents.device)
    index = torch.cat([torch.zeros_like(start), start + torch.arange(window - 1, device=latents.device)], dim=1)
    return latents.gather(2, index[:, None, :, None, None].expand(-1, latents.shape[1], -1, *latents.shape[3:]))


class TransformerTask(Task[NOVATransformer3DModel, Variant]):
    """A variant is a clip length and a number of revealed tokens."""

    loss_names = ("loss", "loss_t2i", "loss_i2i")

    def __init__(self, recipe: TransformerRecipe, device: torch.device) -> None:
        super().__init__(recipe.data, recipe.seed, device)
        self.recipe = recipe
        vae = load_autoencoder(resolve_checkpoint(recipe.autoencoder))
        if vae is None:
            raise InputError(f"autoencoder = {recipe.autoencoder!r}: expected a checkpoint folder with vae/")
        self.vae = vae.to(device).requires_grad_(False)
        dtype = torch.float16 if self.on_gpu else torch.float32
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
        if recipe.compile and self.on_gpu:
            for block in (*self.model.video_encoder.blocks, *self.model.image_encoder.blocks):
                block.compile(dynamic=True)

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

    # Samples ------------------------------------------------------------------------------------------------------

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

    # One step -----------------------------------------------------------------------------------------------------

    def variants(self) -> tuple[list[Variant], list[float]]:
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
        window = None if recipe.data.window is None or frames <= recipe.data.window else recipe.data.window // 4 + 1
        if window is not None:
            latents = stretch(latents, window)
        noise = recipe.history_noise * torch.rand(count, 1, latents.shape[2], 1, 1, device=self.device)
        history = latents + noise * torch.randn_like(latents)
        per_frame = self._frame_losses(
            self.model, latents, history, (rows["text"].float(), lengths, motion), visible, recipe.loss_repeat
        )
        if window is not None:  # the slots before do not know where in the clip they are
            learned = per_frame[window // 2 :]
            return {"loss": learned.sum() * window / len(learned)}
        return {"loss": per_frame.sum()} | {k: v for k, v in loss_parts(per_frame).items() if k != "loss"}

    def _frame_losses(
        self,
        model: NOVATransformer3DModel,
        latents: Tensor,
        history: Tensor,
        condition: tuple[Tensor, Tensor, Tensor],
        visible: int,
        repeats: int,
    ) -> Tensor:
        fps = torch.full_like(condition[2], FPS)
        tokens = model.embed_condition(condition[0], condition[1], condition[2], fps)  # (B, T, D)
        positions = model.positions(latents.shape[2], self.grid)
        draws = draw(self.table, latents.shape[0] * latents.shape[2], self.tokens, self.values, visible, repeats)
        return frame_losses(model, latents, history, tokens, positions, self.table, draws)

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
        unknown = torch.full_like(rows["motion"], self.recipe.defaults.motion_flow)
        losses = {}
        devices = [self.device] if self.on_gpu else []
        for name, shown in told.items():
            text, lengths = self._describe(self.world.captions(shown))
            with torch.random.fork_rng(devices), self.half():
                torch.manual_seed(self.recipe.seed)
                condition = (text.float(), lengths, unknown)
                per_frame = self._frame_losses(model, latents, latents, condition, self.tokens // 8, 1)
            losses[f"held_out_loss{name}"] = per_frame.sum().item()
        return losses

    def sheet(self, model: NOVATransformer3DModel, folder: Path) -> Image.Image:
        """Clips generated from held-out captions, with what the judge sees in them."""
        settings = EmojiSettings(num_clips=SHEET_CLIPS, num_frames=self.data.frames[0])
        spec = asked_specs(self.world, settings)[0].select(slice(SHEET_CLIPS))
        frames = generate(self._open(folder), self.world, spec, settings, 0)
        return contact_sheet(describe(self.world, frames, spec, Judge(self.world)(frames, spec)))

    def score(self, folder: Path, clips: int) -> dict[str, float]:
        """`nova evaluate emoji` on so many clips and half as many pictures of two objects, in percent."""
        settings = EmojiSettings(clips, clips // 2, self.data.frames[0], batch_size=clips)
        report = evaluate_emoji(self._open(folder), self.world, settings)
        return {f"score_{name}": 100 * rate.value for name, rate in report.sources[GENERATED].rates.items()}

    def _open(self, folder: Path) -> NovaPipeline:
        pipe = NovaPipeline.from_pretrained(folder).to(self.device)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def export(self, model: NOVATransformer3DModel, folder: Path) -> None:
        """Write a whole checkpoint but for the text encoder, which `nova.json` names; weights in fp16."""
        half = NOVATransformer3DModel.from_config(model.config)
        half.load_state_dict(model.state_dict())
        half.half().save_pretrained(folder / "transformer")
        copy.deepcopy(self.vae).half().save_pretrained(folder / "vae")
        self.scheduler.save_pretrained(folder / "scheduler")
        CheckpointSettings(self.recipe.text_encoder, self.recipe.defaults).save(folder)
