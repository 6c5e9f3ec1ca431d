"""Training of the autoencoder: its samples, its loss and the quality of its reconstructions."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nova_video.autoencoders import AutoencoderKLCausalTiny
from nova_video.training.task import LossParts, Task
from nova_worlds.rendering.world import EmojiWorld, Split, to_uint8
from nova_worlds.training.pools import Pools, Rows, describe_world
from nova_worlds.training.recipes import AutoencoderRecipe


class AutoencoderTask(Task[AutoencoderKLCausalTiny, int, Rows]):
    """A variant is a clip length."""

    describes = "A causal video autoencoder"
    tags = ("autoencoder", "other")
    usage = "nova train recipes/emoji-image.toml --autoencoder FOLDER"
    loss_names = ("loss", "l1", "mse", "kl")

    def __init__(self, recipe: AutoencoderRecipe, device: torch.device) -> None:
        super().__init__(recipe.seed, device)
        self.recipe, self.data = recipe, recipe.data
        self.world = EmojiWorld.load(recipe.data.world, device)
        self.pools = Pools(recipe.data, recipe.seed, self.make_rows)
        self.model = AutoencoderKLCausalTiny(latent_channels=recipe.latent_channels).to(device)
        self.longest = max(recipe.data.frames)

    def make_rows(self, frames: int, count: int, seed: int) -> Rows:
        images = frames == 1
        spec = self.world.sample(
            count, self.generator(seed), num_frames=frames, images=images, pairs=self.data.pairs if images else 0.0
        )
        return {
            "clip": ((self.world.render(spec) + 1) * 127.5).round().to(torch.uint8),  # (N, 3, F, H, W)
            "background": self.world.colors[spec.background] * 2 - 1,  # (N, 3)
        }

    def prepare(self, step: int) -> None:
        self.pools.prepare(step)

    def refresh_every(self) -> int:
        return self.data.refresh_every

    def variants(self) -> tuple[list[int], list[float]]:
        return list(self.data.frames), list(self.data.probability)

    def samples(self, variant: int) -> int:
        return self.pools.batch[variant]

    def draw(self, variant: int, micro: int) -> Rows:
        return self.pools.draw(variant)

    def loss(self, variant: int, batch: Rows) -> LossParts:
        recipe, rows = self.recipe, batch
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

    def learned_from(self) -> str:
        return describe_world(self.data)

    def _clips(self, count: int, seed: int, split: Split) -> Tensor:
        """(N, 3, F, H, W) in [-1, 1] of the longest length, in steps of a pixel value as files have them."""
        spec = self.world.sample(
            count, self.generator(seed), num_frames=self.longest, split=split, images=self.longest == 1
        )
        return ((self.world.render(spec) + 1) * 127.5).round() / 127.5 - 1

    @torch.no_grad()
    def validate(self, model: AutoencoderKLCausalTiny) -> dict[str, float]:
        """PSNR in dB of reconstructed held-out clips (from the posterior's mean), peak 2 as pixels span [-1, 1]."""
        clips = self._clips(256 if self.on_gpu else 8, self.seed, "heldout")
        errors = [(reconstruct(model, part) - part).square().mean((1, 2, 3, 4)) for part in clips.split(16)]
        return {"psnr": (10 * (4 / torch.cat(errors)).log10()).mean().item()}

    @torch.no_grad()
    def sheet(self, model: AutoencoderKLCausalTiny, folder: Path) -> Image.Image:
        """Held-out clips, and below each its reconstruction; every fourth frame."""
        clips = self._clips(6, self.seed, "heldout")
        rows = torch.stack([clips, reconstruct(model, clips)], dim=1).flatten(0, 1)[:, :, ::4]  # (12, 3, F, H, W)
        pixels = to_uint8(rows).cpu().numpy()  # (12, F, H, W, 3)
        return Image.fromarray(np.concatenate([np.concatenate(list(row), axis=1) for row in pixels]))

    @torch.no_grad()
    def export(self, model: AutoencoderKLCausalTiny, folder: Path) -> None:
        """Write `folder`/vae in fp16, with the statistics of its latents so that a transformer sees unit variance."""
        clips = self._clips(1024 if self.on_gpu else 16, self.seed + 1, "train")
        means = torch.cat([model.encode(part).latent_dist.mean.float() for part in clips.split(16)])
        latents = means.transpose(0, 1).flatten(1)  # (C, everything)
        copy = AutoencoderKLCausalTiny.from_config(model.config)
        copy.register_to_config(latents_mean=latents.mean(1).tolist(), latents_std=latents.std(1).tolist())
        copy.load_state_dict(model.state_dict())
        copy.half().save_pretrained(folder / "vae")


def reconstruct(model: AutoencoderKLCausalTiny, clips: Tensor) -> Tensor:
    """Clips through the mean of their posterior and back, in [-1, 1]."""
    out: Tensor = model.decode(model.encode(clips).latent_dist.mode()).sample
    return out.float().clamp(-1, 1)
