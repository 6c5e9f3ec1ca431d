"""Latents to tokens and back: the lowest layer of the model, used by everything that handles tokens.

Legend of the whole project: B batch, F latent frames, h w latent grid, L tokens of a frame, S tokens predicted
together, T text tokens, C latent channels, D width, p patch size, P = p * p * C values of one token.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional


def patchify(latents: Tensor, patch: int) -> Tensor:
    """(B, C, h, w) -> (B, L, P): tokens in row-major order, values as (row in patch, column in patch, channel)."""
    batch, channels, height, width = latents.shape
    x = latents.reshape(batch, channels, height // patch, patch, width // patch, patch)  # (B, C, rows, p, columns, p)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # (B, L, P)


def unpatchify(tokens: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """(B, L, P) -> (B, C, h, w) for the latent grid (h, w): the inverse of `patchify`."""
    rows, columns = grid[0] // patch, grid[1] // patch
    x = tokens.reshape(tokens.shape[0], rows, columns, patch, patch, -1)  # (B, rows, columns, p, p, C)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(tokens.shape[0], -1, *grid)


class PatchEmbed(nn.Module):
    """Linear map of non-overlapping patches, stored as the convolution of the checkpoints (kernel = stride = patch).

    It is computed as a matrix product, because a GPU rounds the inputs of float32 convolutions (TF32).
    """

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(channels, width, patch, patch)

    def forward(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, L, D)."""
        return self.embed_tokens(patchify(latents, self.patch))

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """(..., P) values in patchify order -> (..., D): the same map for chosen tokens, without their grid."""
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)  # (D, P) in patchify order
        bias = None if self.proj.bias is None else self.proj.bias.to(tokens.dtype)
        return functional.linear(tokens, weight.to(tokens.dtype), bias)  # weights may be stored in fewer bits


def gather_tokens(tokens: Tensor, ids: Tensor) -> Tensor:
    """Rows `ids` (B, S) of tokens (B, L, D) -> (B, S, D)."""
    return tokens.gather(1, ids.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def scatter_tokens(tokens: Tensor, ids: Tensor, values: Tensor) -> Tensor:
    """tokens (B, L, D) with rows `ids` (B, S) replaced by values (B, S, D); a new tensor."""
    return tokens.scatter(1, ids.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]), values.to(tokens.dtype))


def token_positions(rows: int, columns: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Row and column of each token of a row-major grid, both (rows * columns,) float32."""
    row = torch.arange(rows, dtype=torch.float32, device=device)
    column = torch.arange(columns, dtype=torch.float32, device=device)
    return row.repeat_interleave(columns), column.repeat(rows)
