"""What is particular to training the autoencoder: its samples, its loss and how good its reconstructions are."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from nova_video.autoencoders import AutoencoderKLCausalTiny
from nova_video.data.world import EmojiWorld, to_uint8
from nova_video.training.pool import Pool, Rows, fill_seed
from nova_video.training.recipe import AutoencoderRecipe


class AutoencoderTask:
    """Implements `trainer.Task`; a variant is a clip length."""

    def __init__(self, recipe: AutoencoderRecipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self.world = EmojiWorld.load(recipe.data.world, device)
        self.model: AutoencoderKLCausalTiny = AutoencoderKLCausalTiny(latent_channels=recipe.latent_channels).to(device)
        data = recipe.data
        self.pools = {
            frames: Pool(lambda count, fill, frames=frames: self._make(count, fill, frames), size, data.refresh)
            for frames, size in zip(data.frames, data.pool, strict=True)
        }
        self.batch = dict(zip(data.frames, data.batch, strict=True))
        self.loss_names = ("loss", "l1", "mse", "kl")

    def _make(self, count: int, fill: int, frames: int) -> Rows:
        generator = torch.Generator(self.device).manual_seed(fill_seed(self.recipe.seed, frames, fill))
        spec = self.world.sample(count, generator, num_frames=frames, images=frames == 1, pairs=self.recipe.data.pairs)
        return {
            "clip": ((self.world.render(spec) + 1) * 127.5).round().to(torch.uint8),  # (N, 3, F, H, W)
            "background": self.world.colors[spec.background] * 2 - 1,  # (N, 3)
        }

    def prepare(self, step: int) -> None:
        for pool in self.pools.values():
            pool.fill_for(step, self.recipe.data.refresh_every)

    def variants(self) -> tuple[list[Any], list[float]]:
        return list(self.recipe.data.frames), list(self.recipe.data.probability)

    def loss(self, variant: int) -> dict[str, Tensor]:
        recipe, rows = self.recipe, self.pools[variant].draw(self.batch[variant])
        clip = rows["clip"].float() / 127.5 - 1  # (B, 3, F, H, W)
        posterior = self.model.encode(clip).latent_dist
        mean, log_variance = posterior.mean.float(), posterior.logvar.float()
        latents = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        out = self.model.decode(latents).sample.float()
        shown = (clip - rows["background"].view(-1, 3, 1, 1, 1)).abs().amax(1, keepdim=True) > 0.03
        weight = 1 + recipe.foreground * shown
        error = out - clip
        l1, mse = (weight * error.abs()).mean(), (weight * error.square()).mean()
        gradient = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        loss = recipe.l1 * l1 + recipe.mse * mse + recipe.gradient * gradient + recipe.kl * kl
        return {"loss": loss, "l1": l1, "mse": error.square().mean(), "kl": kl}

    def _held_out(self, count: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(self.recipe.seed)
        frames = max(self.recipe.data.frames)
        spec = self.world.sample(count, generator, num_frames=frames, split="heldout", images=frames == 1)
        return ((self.world.render(spec) + 1) * 127.5).round() / 127.5 - 1  # (N, 3, F, H, W)

    @torch.no_grad()
    def validate(self, model: nn.Module) -> dict[str, float]:
        """PSNR in dB of reconstructed held-out clips (from the posterior's mean), peak 2 as pixels span [-1, 1]."""
        clips = self._held_out(128 if self.device.type == "cuda" else 8)
        errors = [(reconstruct(model, part) - part).square().mean((1, 2, 3, 4)) for part in clips.split(16)]
        return {"psnr": (10 * (4 / torch.cat(errors)).log10()).mean().item()}

    @torch.no_grad()
    def sheet(self, model: nn.Module, folder: Path) -> Image.Image:
        """Held-out clips, and below each its reconstruction; every fourth frame."""
        clips = self._held_out(6)
        rows = torch.stack([clips, reconstruct(model, clips)], dim=1).flatten(0, 1)[:, :, ::4]  # (12, 3, F, H, W)
        return Image.fromarray(
            np.concatenate([np.concatenate(list(row), axis=1) for row in to_uint8(rows).cpu().numpy()])
        )

    def score(self, folder: Path, clips: int) -> dict[str, float]:
        return {}

    @torch.no_grad()
    def export(self, model: nn.Module, folder: Path) -> None:
        """Write `folder`/vae in fp16, with the statistics of its latents so that a transformer sees unit variance."""
        generator = torch.Generator(self.device).manual_seed(self.recipe.seed + 1)
        frames = max(self.recipe.data.frames)
        spec = self.world.sample(
            1024 if self.device.type == "cuda" else 16, generator, num_frames=frames, images=frames == 1
        )
        parts = [model.encode(part).latent_dist.mean.float() for part in self.world.render(spec).split(16)]
        latents = torch.cat(parts).transpose(0, 1).flatten(1)  # (C, everything)
        assert isinstance(model, AutoencoderKLCausalTiny)
        model.register_to_config(latents_mean=latents.mean(1).tolist(), latents_std=latents.std(1).tolist())
        copy = AutoencoderKLCausalTiny.from_config(model.config)
        copy.load_state_dict(model.state_dict())
        copy.to(torch.float16).save_pretrained(folder / "vae")


def reconstruct(model: nn.Module, clips: Tensor) -> Tensor:
    return model.decode(model.encode(clips).latent_dist.mode()).sample.float().clamp(-1, 1)
