"""The denoiser (`image_decoder`, section 3.3): a small MLP that denoises each token by itself, given its feature z.

It is the model's head. A head of another class is called with the same three tensors, in sampling and in training.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from nova_video.model.embeddings import timestep_frequencies
from nova_video.model.patches import PatchEmbed
from nova_video.model.vit import call_block

NORM_EPS = 1e-6  # of the norms without weights


class Projection(nn.Module):
    """Linear, SiLU, Linear."""

    def __init__(self, dim_in: int, dim_hidden: int, dim_out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim_in, dim_hidden)
        self.fc2 = nn.Linear(dim_hidden, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.silu(self.fc1(x)))


class TimeCondEmbed(nn.Module):
    """The embedding u for denoising a token: the sum of its feature, equal at all steps, and the timestep."""

    def __init__(self, condition_dim: int, width: int) -> None:
        super().__init__()
        self.timestep_proj = Projection(256, width, width)
        self.condition_proj = Projection(condition_dim, width, width)

    def embed_times(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        """timestep (...) -> (..., width)."""
        return self.timestep_proj(timestep_frequencies(timestep).to(dtype))

    def forward(self, timestep: Tensor, condition: Tensor) -> Tensor:
        """timestep (R * B,) or (R * B, S), condition (B, S, D) -> u (R * B, S, width)."""
        time = self.embed_times(timestep, condition.dtype)  # (R * B, [S,] width)
        time = time if time.dim() == 3 else time.unsqueeze(1)
        projected = self.condition_proj(condition)  # (B, S, width)
        return (time.unflatten(0, (-1, len(projected))) + projected).flatten(0, 1)


class AdaLayerNorm(nn.Module):
    """Layer norm without weights, scaled and shifted by the embedding; with `chunks` 3 the branch is gated too."""

    def __init__(self, width: int, chunks: int) -> None:
        super().__init__()
        self.chunks = chunks
        self.proj = nn.Linear(width, chunks * width)

    def forward(self, x: Tensor, active: Tensor) -> tuple[Tensor, ...]:
        """x (B, S, width), SiLU(u) (B, S, width) -> LN(x) (1 + s) + b, and with three chunks the gate g."""
        scale, shift, *gate = self.proj(active).chunk(self.chunks, dim=-1)
        return modulate(x, scale, shift), *gate


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """LN(x) (1 + scale) + shift, in the type of x: under autocast norms are float32."""
    normal = functional.layer_norm(x, x.shape[-1:], eps=NORM_EPS)
    return torch.addcmul(shift, normal, 1 + scale).to(x.dtype)


def add_gated(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """x + gate branch, in the type of x."""
    return torch.addcmul(x, gate, branch.to(x.dtype))


class DenoiserBlock(nn.Module):
    """x + g norm2(mlp(LN(x) (1 + s) + b)), with s, b and g from the embedding."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = AdaLayerNorm(width, 3)
        self.proj = Projection(width, width, width)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, active: Tensor) -> Tensor:
        """x (B, S, width), SiLU(u) (B, S, width) -> (B, S, width)."""
        y, gate = self.norm1(x, active)
        return add_gated(x, gate, self.norm2(self.proj(y)))


class Denoiser(nn.Module):
    """Token-wise: no token sees another, so any subset of a frame can be denoised alone with the same result."""

    def __init__(self, depth: int, width: int, condition_dim: int, channels: int, patch: int) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.patch_embed = PatchEmbed(channels, width, patch)
        self.time_cond_embed = TimeCondEmbed(condition_dim, width)
        self.blocks = nn.ModuleList(DenoiserBlock(width) for _ in range(depth))
        self.norm = AdaLayerNorm(width, 2)
        self.head = nn.Linear(width, patch * patch * channels)

    def forward(self, noisy: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        """noisy (B, S, P), timestep (B,) or (B, S), features z of the tokens (B, S, D) -> prediction (B, S, P).

        With fewer rows of z, (B / R, S, D), they are those of each of R draws of noise, and are projected once for all.
        """
        active = functional.silu(self.time_cond_embed(timestep, condition))  # (B, S, width)
        x = self.patch_embed.embed_tokens(noisy)  # (B, S, width)
        for block in self.blocks:
            x = call_block(self, block, x, active)
        (x,) = self.norm(x, active)
        return self.head(x)
