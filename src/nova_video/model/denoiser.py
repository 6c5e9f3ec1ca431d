"""The denoiser (`image_decoder`): a small MLP that denoises each token by itself, given its spatial feature."""

from torch import Tensor, nn
from torch.nn import functional

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

    def forward(self, timestep: Tensor, condition: Tensor) -> Tensor:
        """timestep (B,) or (B, S), condition (B, S, width) already projected -> u (B, S, width)."""
        time = self.timestep_proj(timestep_frequencies(timestep).to(condition.dtype))  # (B, [S,] width)
        return (time if time.dim() == 3 else time.unsqueeze(1)) + condition


class AdaLayerNorm(nn.Module):
    """Layer norm without weights, scaled and shifted by the embedding; `chunks` 3 gives the branch's gate too."""

    def __init__(self, width: int, chunks: int) -> None:
        super().__init__()
        self.chunks = chunks
        self.proj = nn.Linear(width, chunks * width)
        self.width = width

    def forward(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor | None]:
        """x, u (B, S, width) -> normalised x, and the gate or None."""
        scale, shift, *gate = self.proj(functional.silu(u)).chunk(self.chunks, dim=-1)
        out = functional.layer_norm(x, (self.width,), eps=1e-6) * (1 + scale) + shift
        return out, gate[0] if gate else None


class DenoiserBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = AdaLayerNorm(width, 3)
        self.proj = Projection(width, width, width)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, u: Tensor) -> Tensor:
        y, gate = self.norm1(x, u)
        assert gate is not None
        return x + gate * self.norm2(self.proj(y))


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

    def forward(self, noisy: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        """noisy (B, S, P), timestep (B,) or (B, S), condition from `project_condition` -> prediction (B, S, P)."""
        x = self.patch_embed.embed_tokens(noisy)  # (B, S, width)
        u = self.time_cond_embed(timestep, condition)  # (B, S, width)
        for block in self.blocks:
            x = block(x, u)
        x, _ = self.norm(x, u)
        return self.head(x)
