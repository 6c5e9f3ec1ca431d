"""The denoiser (`image_decoder`): a small MLP that denoises each token by itself, given its spatial feature."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from nova_video.fast.norm import add_gated, modulate
from nova_video.model.embeddings import timestep_frequencies
from nova_video.model.patches import PatchEmbed


class Projection(nn.Module):
    """Linear, SiLU, Linear."""

    def __init__(self, dim_in: int, dim_hidden: int, dim_out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim_in, dim_hidden)
        self.fc2 = nn.Linear(dim_hidden, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.silu(self.fc1(x)))


class TimeCondEmbed(nn.Module):
    """The two things a token is denoised under: its feature, the same at every step, and the timestep."""

    def __init__(self, condition_dim: int, width: int) -> None:
        super().__init__()
        self.timestep_proj = Projection(256, width, width)
        self.condition_proj = Projection(condition_dim, width, width)

    def embed_times(self, timestep: Tensor) -> Tensor:
        """timestep (...) -> (..., width)."""
        return self.timestep_proj(timestep_frequencies(timestep).to(self.timestep_proj.fc1.weight.dtype))

    def forward(self, timestep: Tensor, condition: Tensor) -> Tensor:
        """timestep (B,) or (B, S), condition (B, S, width) already projected -> u (B, S, width)."""
        time = self.embed_times(timestep)  # (B, [S,] width)
        return (time if time.dim() == 3 else time.unsqueeze(1)) + condition


class AdaLayerNorm(nn.Module):
    """Layer norm without weights, scaled and shifted by the embedding; `chunks` 3 gives the branch's gate too.

    What comes of the embedding, the modulation proj(SiLU(u)), does not depend on what is normalised: sampling computes
    it for all steps of a set at once.
    """

    def __init__(self, width: int, chunks: int) -> None:
        super().__init__()
        self.chunks = chunks
        self.proj = nn.Linear(width, chunks * width)

    def forward(self, x: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor | None]:
        """x (B, S, width) and its modulation -> normalised x, and the gate or None."""
        scale, shift, *gate = modulation.chunk(self.chunks, dim=-1)
        return modulate(x, scale, shift, 1e-6), gate[0] if gate else None


class DenoiserBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = AdaLayerNorm(width, 3)
        self.proj = Projection(width, width, width)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, modulation: Tensor | None = None, active: Tensor | None = None) -> Tensor:
        """x (B, S, width) under its modulation (B, S, 3 width), or under SiLU(u) (B, S, width), which that comes of."""
        if modulation is None:
            modulation = self.norm1.proj(active)
        y, gate = self.norm1(x, modulation)
        assert gate is not None
        return add_gated(x, gate, self.norm2, self.proj(y))


class Denoiser(nn.Module):
    """Token-wise: no token sees another, so any subset of a frame can be denoised alone with the same result."""

    def __init__(self, depth: int, width: int, condition_dim: int, channels: int, patch: int) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(channels, width, patch)
        self.time_cond_embed = TimeCondEmbed(condition_dim, width)
        self.blocks = nn.ModuleList(DenoiserBlock(width) for _ in range(depth))
        self.norm = AdaLayerNorm(width, 2)
        self.head = nn.Linear(width, patch * patch * channels)

    def project_condition(self, z: Tensor) -> Tensor:
        """Spatial encoder's features z (B, S, D) -> (B, S, width): once per set, the same at every step."""
        return self.time_cond_embed.condition_proj(z)

    def embed_times(self, timestep: Tensor) -> Tensor:
        """timestep (K,) -> (K, width): the same for all tokens, once a call."""
        return self.time_cond_embed.embed_times(timestep)

    def modulations(self, u: Tensor) -> list[Tensor]:
        """Embeddings u (..., width) -> the modulation of every block (..., 3 width), and the head's (..., 2 width)."""
        active = functional.silu(u)
        norms: list[Any] = [*(block.norm1 for block in self.blocks), self.norm]
        return [norm.proj(active) for norm in norms]

    def predict(self, noisy: Tensor, modulations: Sequence[Tensor]) -> Tensor:
        """noisy (B, S, P) under the modulations of a step, (B, S, 3 or 2 width) each -> prediction (B, S, P)."""
        x = self.patch_embed.embed_tokens(noisy)  # (B, S, width)
        for block, modulation in zip(self.blocks, modulations[:-1], strict=True):
            x = block(x, modulation)
        x, _ = self.norm(x, modulations[-1])
        return self.head(x)

    def denoise_under(self, noisy: Tensor, u: Tensor, apply: Callable[..., Tensor] = DenoiserBlock.__call__) -> Tensor:
        """noisy (B, S, P) under the embeddings u (B, S, width) -> prediction (B, S, P). `apply` calls a block.

        Each block makes its own modulation, so that checkpointing can do without keeping it.
        """
        active = functional.silu(u)
        x = self.patch_embed.embed_tokens(noisy)  # (B, S, width)
        for block in self.blocks:
            x = apply(block, x, None, active)
        x, _ = self.norm(x, self.norm.proj(active))
        return self.head(x)

    def forward(self, noisy: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        """noisy (B, S, P), timestep (B,) or (B, S), condition from `project_condition` -> prediction (B, S, P)."""
        return self.predict(noisy, self.modulations(self.time_cond_embed(timestep, condition)))
