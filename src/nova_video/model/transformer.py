"""NOVA: frame by frame in time, set by set in space, and a per-token denoiser (arXiv 2412.14169).

The order of this file is the order of the paper: the temporal encoder (section 3.1), the spatial encoder (3.2), the
denoiser (3.3, in `denoiser.py`), then the assembled model. Module names are the released checkpoints' keys.
Modules hold weights only: masks, orders, caches and random numbers are the caller's (`sampling` or `training`).

Legend: B batch, F latent frames, h w latent grid, L tokens of a frame, Lc temporal tokens of a frame (L / 4), S tokens
predicted together, T condition tokens, C latent channels, D width, P = p * p * C values of a token.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional

from nova_video.common.checks import check_number
from nova_video.common.errors import InputError
from nova_video.model.attention import Mask, block_causal_mask
from nova_video.model.casting import cast_blocks, is_cast
from nova_video.model.denoiser import Denoiser, DenoiserBlock
from nova_video.model.embeddings import (
    TABLE_LEN,
    MaskEmbed,
    MotionEmbed,
    Rotary,
    TextEmbed,
    VideoPosEmbed,
    rotary_angles,
    space_table,
)
from nova_video.model.patches import PatchEmbed, gather_tokens, token_positions
from nova_video.model.vit import Block, CacheLayer, TemporalCache, heads_for_width, residual_stream

MAX_DEPTH, MAX_WIDTH = 1024, 65536  # of a config that is not a mistake

ApplyBlock = Callable[..., Tensor]
"""Calls a block with what its `forward` takes."""


@dataclass(frozen=True)
class Positions:
    """Where tokens are, for one size and length; once per call. Absolute tables or rotary angles, never both."""

    num_frames: int
    time: Tensor | None  # (F, 1, D)
    video_space: Tensor | None  # (Lc, D)
    image_space: Tensor | None  # (L, D)
    video_rotary: Rotary | None  # (F * Lc, head_dim / 2)
    image_rotary: Rotary | None  # (L, head_dim / 2)


class Mixer(nn.Module):
    """Scale-and-shift of the first frame's feature by the current one's (section 3.2): c_0 * (1 + s) + b."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.lora = nn.Linear(width, rank, bias=False) if rank > 0 else nn.Identity()
        self.proj = nn.Linear(rank if rank > 0 else width, 2 * width)

    def forward(self, first: Tensor, feature: Tensor) -> Tensor:
        """first, feature (..., Lc, D) -> (..., Lc, D)."""
        scale, shift = self.proj(self.lora(functional.silu(feature))).chunk(2, dim=-1)
        return first * (1 + scale) + shift


class VideoEncoder(nn.Module):
    """Temporal encoder: reads text, motion and all earlier frames, causally frame by frame."""

    def __init__(self, depth: int, width: int, channels: int, patch: int, mixer_rank: int | None) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(channels, width, patch)
        self.blocks = nn.ModuleList(Block(width, heads_for_width(width)) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.mixer = Mixer(width, mixer_rank) if mixer_rank else None

    def forward(
        self,
        condition: Tensor,
        frames: Tensor,
        rotary: Rotary | None,
        cache: TemporalCache | None = None,
        mask: Mask | None = None,
        apply: ApplyBlock = Block.__call__,
    ) -> Tensor:
        """All frames at once: condition (B, T, D), frames (B, F, Lc, D) -> features (B, F, Lc, D).

        An empty `cache` is filled, so that `step` can go on from there. `mask` is the block-causal one where the caller
        has it ready. `apply` calls a block.
        """
        text, (num_frames, tokens) = condition.shape[1], frames.shape[1:3]
        if num_frames == 1:
            mask = None  # a single frame forms one block with the condition: nothing to hide
        elif mask is None:
            mask = block_causal_mask(text, tokens, num_frames, frames.device)
        x = residual_stream(torch.cat([condition, frames.flatten(1, 2)], dim=1))  # (B, T + F * Lc, D)
        rotary = None if rotary is None else rotary.after_condition(text)
        for layer, block in enumerate(self.blocks):
            x = apply(block, x, rotary, mask, None if cache is None else CacheLayer(cache, layer))
        if cache is not None:
            cache.advance(x.shape[1])
        return self.norm(x[:, text:]).unflatten(1, (num_frames, tokens))

    def step(self, frame: Tensor, rotary: Rotary | None, cache: TemporalCache) -> Tensor:
        """The next frame alone (B, Lc, D) -> its feature (B, Lc, D)."""
        for layer, block in enumerate(self.blocks):
            frame = block(frame, rotary, None, CacheLayer(cache, layer))
        cache.advance(frame.shape[1])
        return self.norm(frame)


class ImageEncoder(nn.Module):
    """Spatial encoder: bidirectional, first half over what is revealed, second half over the whole frame."""

    def __init__(self, depth: int, width: int, channels: int, patch: int) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(channels, width, patch)
        self.blocks = nn.ModuleList(Block(width, heads_for_width(width)) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(
        self,
        condition: Tensor,
        visible: Tensor,
        visible_ids: Tensor,
        others: Tensor,
        rotary: Rotary | None,
        ids: Tensor | None = None,
        apply: ApplyBlock = Block.__call__,
        revealed: Tensor | None = None,
    ) -> Tensor:
        """condition (B, Lc, D), visible (B, V, D) of the tokens `visible_ids` (B, V), others (L, D) or (B, L, D), read
        where a token is not visible, both with their positions -> z (B, L, D).

        With `ids` (B, S), z of these tokens alone, (B, S, D): the last block is computed for them only. `apply` calls
        a block. With `revealed` (B, V) bool, only those of `visible_ids` are: the others pad samples with fewer.
        """
        count = condition.shape[1]
        half = len(self.blocks) // 2
        x = residual_stream(torch.cat([condition, visible], dim=1))  # (B, Lc + V, D)
        seen = None if rotary is None else rotary.at(visible_ids).after_condition(count)
        there = None  # (B, 1, 1, Lc + V), the columns that are not padding
        if revealed is not None:
            there = functional.pad(revealed, (count, 0), value=True)[:, None, None]
        for block in self.blocks[:half]:
            x = apply(block, x, seen, there)
        known = x[:, count:]
        if revealed is not None:
            known = torch.where(revealed.unsqueeze(-1), known, visible.to(known.dtype))
        x = torch.cat([x[:, :count], others.to(x.dtype).expand(len(x), -1, -1)], dim=1)  # (B, Lc + L, D)
        x.scatter_(1, (visible_ids + count).unsqueeze(-1).expand_as(known), known)
        every = None if rotary is None else rotary.after_condition(count)
        if ids is None:
            for block in self.blocks[half:]:
                x = apply(block, x, every)
            return self.norm(x[:, count:])
        for block in self.blocks[half:-1]:
            x = apply(block, x, every)
        return self.norm(apply(self.blocks[-1], x, every, None, None, ids + count))


def parse_arch(name: str, kind: str) -> tuple[int, int]:
    """Depth and width of an `arch` entry such as `vit_d16w1024`; `kind` is vit or mlp."""
    match = re.fullmatch(rf"{kind}_d(\d{{1,6}})w(\d{{1,6}})", name)
    if match is None:
        raise InputError(f"arch entry {name!r}: expected {kind}_d<depth>w<width>, such as {kind}_d6w1024")
    depth, width = int(match[1]), int(match[2])
    check_number(f"the depth of arch entry {name!r}", depth, 1, high=MAX_DEPTH)
    check_number(f"the width of arch entry {name!r}", width, 1, high=MAX_WIDTH)
    if kind == "vit" and width % 32:
        raise InputError(f"the width of arch entry {name!r} is {width}: expected a multiple of 32, the width of a head")
    return depth, width


def spatial_patch(image_stride: int) -> int:
    """The side of a token of the spatial encoder, in latents."""
    return 15 // image_stride + 1


def check_config(config: Any) -> None:
    """Every value of a transformer's config is of its kind and in its bounds."""
    if config.text_token_dim in (None, 0):
        raise InputError(
            f"text_token_dim is {config.text_token_dim}: expected the width of text features; models that are"
            " class-conditional, without text, are not supported"
        )
    for name in ("image_dim", "image_stride", "text_token_dim"):
        check_number(name, getattr(config, name), 1, integer=True, high=MAX_WIDTH)
    check_number("text_token_len", config.text_token_len, 1, integer=True, high=TABLE_LEN)
    for name, length in (("image_size", 2), ("image_base_size", 2), ("video_base_size", 3)):
        value = getattr(config, name)
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != length:
            raise InputError(f"{name} is {value!r}: expected {length} whole numbers")
        for number in value:
            check_number(name, number, 1, integer=True)
    if config.video_mixer_rank is not None:
        check_number("video_mixer_rank", config.video_mixer_rank, -MAX_WIDTH, integer=True, high=MAX_WIDTH)
    if not isinstance(config.rotary_pos_embed, bool | None):
        raise InputError(f"rotary_pos_embed is {config.rotary_pos_embed!r}: expected true or false")
    arch = config.arch
    names = isinstance(arch, Sequence) and len(arch) == 3 and all(isinstance(name, str) for name in arch)
    if not names or isinstance(arch, str):
        raise InputError(f"arch is {arch!r}: expected three names, such as vit_d16w1024, vit_d32w1024, mlp_d6w1024")


class NOVATransformer3DModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """The whole network. Each method is one step of sampling or training; none keeps anything between calls."""

    _supports_gradient_checkpointing = False
    _no_split_modules = ["Block", "DenoiserBlock"]
    _supports_group_offloading = False  # weights are read by calls that are no `forward`

    @register_to_config
    def __init__(
        self,
        image_dim: int = 4,
        image_size: int | Sequence[int] = (512, 512),
        image_stride: int = 8,
        text_token_dim: int = 2560,
        text_token_len: int = 256,
        image_base_size: Sequence[int] = (32, 32),
        video_base_size: Sequence[int] = (1, 16, 16),
        video_mixer_rank: int | None = None,
        rotary_pos_embed: bool = False,
        arch: Sequence[str] = ("vit_d16w1024", "vit_d32w1024", "mlp_d6w1024"),
    ) -> None:
        """The released config's keys. A number as `image_size` is the side of a square."""
        super().__init__()
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.register_to_config(image_size=size)
        check_config(self.config)
        (video_depth, width), (image_depth, image_width) = parse_arch(arch[0], "vit"), parse_arch(arch[1], "vit")
        if width != image_width:
            raise InputError(f"arch {arch[0]} and {arch[1]}: the two encoders need the same width")
        mlp_depth, mlp_width = parse_arch(arch[2], "mlp")
        self.patch_size = spatial_patch(image_stride)
        if any(side % self.size_multiple for side in size):
            raise InputError(f"image_size is {list(size)}: expected multiples of {self.size_multiple}")
        self.width = width
        self.has_motion = video_base_size[0] > 1
        self.text_embed = TextEmbed(text_token_dim, text_token_len, width)
        self.motion_embed = MotionEmbed(width) if self.has_motion else None
        self.video_pos_embed = None if rotary_pos_embed else VideoPosEmbed(width, video_base_size[0])
        self.mask_embed = MaskEmbed(width)
        self.video_encoder = VideoEncoder(video_depth, width, image_dim, 2 * self.patch_size, video_mixer_rank)
        self.image_encoder = ImageEncoder(image_depth, width, image_dim, self.patch_size)
        self.image_decoder = Denoiser(mlp_depth, mlp_width, width, image_dim, self.patch_size)
        self.initialize_weights()

    def enable_layerwise_casting(
        self,
        storage_dtype: torch.dtype = torch.float8_e4m3fn,
        compute_dtype: torch.dtype | None = None,
        skip_modules_pattern: tuple[str, ...] | None = None,
        skip_modules_classes: tuple[type[nn.Module], ...] | None = None,
        non_blocking: bool = False,
    ) -> None:
        """Store the linear weights of both encoders' blocks in `storage_dtype`, and compute in `compute_dtype`.

        Blocks are cast one at a time, which is slower and takes less memory. It cannot be taken back.
        """
        if skip_modules_pattern is not None or skip_modules_classes is not None:
            raise InputError("skip_modules_pattern or _classes is given: expected none, blocks are cast as a whole")
        if is_cast(self) or getattr(self, "peft_config", None):
            raise InputError(
                "the transformer is cast already or has adapters: expected a plain one; fuse adapters and unload them"
            )
        compute_dtype = compute_dtype or self.dtype
        self.to(compute_dtype)
        blocks: list[nn.Module] = [*self.video_encoder.blocks, *self.image_encoder.blocks]
        cast_blocks(blocks, storage_dtype, compute_dtype, non_blocking)

    def initialize_weights(self) -> None:
        """To train from scratch: normal(0.02) linears; the denoiser's gates and output start at zero, as in DiT."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                zero = name.startswith("image_decoder") and name.endswith(("norm1.proj", "norm.proj", "head"))
                nn.init.zeros_(module.weight) if zero else nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def device(self) -> torch.device:
        """Where it computes. That of diffusers asks every module for hooks of offloading: milliseconds a time."""
        hooked = any("_diffusers_hook" in vars(module) for module in (self, self.image_decoder.head))
        return super().device if hooked else self.mask_embed.mask_token.device

    @property
    def dtype(self) -> torch.dtype:
        """That it computes in, by itself for the same reason: casting by layers leaves this parameter as it is."""
        return self.mask_embed.mask_token.dtype

    @property
    def head_dim(self) -> int:
        """Channels of an attention head, the same in both encoders."""
        return self.width // heads_for_width(self.width)

    @property
    def size_multiple(self) -> int:
        """Height and width in pixels are multiples of it: the side of a token of the temporal encoder."""
        return 2 * self.patch_size * int(self.config.image_stride)

    # Conditioning, once per call ----------------------------------------------------------------------------------

    def embed_condition(self, text: Tensor, lengths: Tensor, motion: Tensor | None, fps: Tensor | None) -> Tensor:
        """Text features (B, T', text_token_dim) with lengths (B,), motion and fps (B,) -> condition tokens (B, T, D).

        A length of 0 is the null prompt. Models of single images have no motion tokens and ignore both numbers.
        """
        tokens = self.text_embed(text, lengths)  # (B, text_token_len, D)
        if self.motion_embed is None:
            return tokens
        if motion is None or fps is None:
            raise ValueError("this model needs a motion score and frames per second")
        return torch.cat([tokens, self.motion_embed(motion, fps)], dim=1)

    def positions(self, num_frames: int, grid: tuple[int, int]) -> Positions:
        """Position tables of `num_frames` latent frames on the latent grid (h, w)."""
        rows, columns = grid[0] // self.patch_size, grid[1] // self.patch_size
        video_rows, video_columns = rows // 2, columns // 2
        if self.video_pos_embed is not None:
            time = self.video_pos_embed(num_frames)
            video_space = space_table(video_rows, video_columns, self.width, self.device).to(self.dtype)
            image_space = space_table(rows, columns, self.width, self.device).to(self.dtype)
            return Positions(num_frames, time, video_space, image_space, None, None)
        row, column = token_positions(video_rows, video_columns, self.device)
        frame = torch.arange(num_frames, device=self.device).repeat_interleave(row.numel())
        video = rotary_angles(frame, row.repeat(num_frames), column.repeat(num_frames), self.head_dim)
        row, column = token_positions(rows, columns, self.device)
        image = rotary_angles(torch.zeros_like(row), row, column, self.head_dim)
        return Positions(num_frames, None, None, None, Rotary.from_angles(video), Rotary.from_angles(image))

    # In time, frame by frame --------------------------------------------------------------------------------------

    def embed_history(
        self, latents: Tensor | None, slot: int, batch: int, positions: Positions, bare: bool = False
    ) -> Tensor:
        """Temporal input of a slot: the frame before it (B, C, h, w), or BOS in slot 0 (latents None) -> (B, Lc, D).

        A slot is a place in the temporal encoder's context: the frame's number, unless the context is bounded. `bare`
        leaves the position tables out (image guidance's second pass).
        """
        if latents is not None:
            tokens = self.video_encoder.patch_embed(latents)
        else:
            count = self.video_tokens(positions)
            tokens = self.mask_embed.bos_token.expand(batch, count, -1)
        if bare:
            return tokens
        if positions.time is None or positions.video_space is None:
            return tokens
        return tokens + positions.time[slot] + positions.video_space

    def encode_context(
        self,
        condition: Tensor,
        tokens: Tensor,
        positions: Positions,
        cache: TemporalCache | None = None,
        apply: ApplyBlock = Block.__call__,
    ) -> Tensor:
        """The first slots in one pass: condition (B, T, D), tokens (B, F, Lc, D) -> all c_f (B, F, Lc, D).

        An empty `cache` is filled with them, for `encode_frame` to go on. `apply` calls a block.
        """
        rotary = positions.video_rotary
        if rotary is not None:
            rotary = rotary.slice(0, tokens.shape[1] * tokens.shape[2])
        return self.video_encoder(condition, tokens, rotary, cache, apply=apply)

    def encode_frame(self, tokens: Tensor, slot: int, positions: Positions, cache: TemporalCache) -> Tensor:
        """The next slot alone: tokens (B, Lc, D) -> c_f (B, Lc, D). Equal to `encode_context` of all so far."""
        rotary = positions.video_rotary
        if rotary is not None:
            rotary = rotary.slice(slot * tokens.shape[1], (slot + 1) * tokens.shape[1])
        return self.video_encoder.step(tokens, rotary, cache)

    def encode_frames(
        self,
        condition: Tensor,
        latents: Tensor,
        positions: Positions,
        mask: Mask | None = None,
        apply: ApplyBlock = Block.__call__,
    ) -> Tensor:
        """All frames at once (training): condition (B, T, D), latents (B, C, F, h, w) -> mixed (B, F, Lc, D).

        `mask` is the block-causal one of these sizes in either form, where the caller has it ready.
        """
        batch, _, num_frames = latents.shape[:3]
        first = self.mask_embed.bos_token.expand(batch, 1, self.video_tokens(positions), -1)
        earlier = self.video_encoder.patch_embed(latents[:, :, :-1].transpose(1, 2).flatten(0, 1))
        frames = torch.cat([first, earlier.unflatten(0, (batch, num_frames - 1))], dim=1)  # (B, F, Lc, D)
        if positions.time is not None and positions.video_space is not None:
            frames = frames + positions.time + positions.video_space
        features = self.video_encoder(condition, frames, positions.video_rotary, None, mask, apply)
        if num_frames == 1:
            return features
        return torch.cat([features[:, :1], self.mix(features[:, :1], features[:, 1:])], dim=1)

    def mix(self, first: Tensor, feature: Tensor) -> Tensor:
        """Spatial condition of a frame f >= 1 from c_0 and c_f, both (..., Lc, D); c_f itself without a mixer."""
        return feature if self.video_encoder.mixer is None else self.video_encoder.mixer(first, feature)

    def new_cache(self, batch: int, positions: Positions) -> TemporalCache:
        """An empty temporal cache with room for the condition tokens and all frames of `positions`."""
        text = self.text_embed.token_len + (2 if self.has_motion else 0)
        capacity = text + positions.num_frames * self.video_tokens(positions)
        heads = heads_for_width(self.width)
        like = self.mask_embed.bos_token
        return TemporalCache(len(self.video_encoder.blocks), batch, heads, capacity, self.head_dim, like)

    def video_tokens(self, positions: Positions) -> int:
        """Lc, the temporal encoder's tokens of a frame."""
        if positions.video_space is not None:
            return positions.video_space.shape[0]
        assert positions.video_rotary is not None
        return positions.video_rotary.cos.shape[0] // positions.num_frames

    # In space, set by set -----------------------------------------------------------------------------------------

    def embed_tokens(self, patches: Tensor) -> Tensor:
        """Token values (B, n, P) in patchify order -> (B, n, D) of the spatial encoder."""
        return self.image_encoder.patch_embed.embed_tokens(patches)

    def encode_tokens(
        self,
        condition: Tensor,
        tokens: Tensor,
        visible_ids: Tensor,
        positions: Positions,
        ids: Tensor | None = None,
        apply: ApplyBlock = Block.__call__,
        revealed: Tensor | None = None,
    ) -> Tensor:
        """condition (B, Lc, D), tokens (B, L, D), visible_ids (B, V) -> features z (B, L, D), or (B, S, D) of `ids`.

        Rows of `tokens` outside `visible_ids` are replaced by the mask token, whatever they hold. `apply` calls a
        block: a compiled one, where that is wanted. With `revealed` (B, V) bool, only those of `visible_ids` are.
        """
        mask_token = self.mask_embed.mask_token.to(tokens.dtype)
        visible = gather_tokens(tokens, visible_ids)
        if revealed is not None:
            visible = torch.where(revealed.unsqueeze(-1), visible, mask_token)
        if positions.image_space is None:
            others = mask_token.repeat(tokens.shape[1], 1)
        else:
            visible = visible + positions.image_space[visible_ids]
            others = mask_token + positions.image_space
        return self.image_encoder(condition, visible, visible_ids, others, positions.image_rotary, ids, apply, revealed)

    # Token by token -----------------------------------------------------------------------------------------------

    def project_features(self, z: Tensor) -> Tensor:
        """Features z (B, S, D) -> the denoiser's condition (B, S, width): once per set, shared by all its steps."""
        return self.image_decoder.project_condition(z)

    def embed_times(self, timestep: Tensor) -> Tensor:
        """timestep (K,) -> (K, width)."""
        return self.image_decoder.embed_times(timestep)

    def denoise(self, noisy: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        """noisy (B, S, P), timestep (B,) or (B, S), condition from `project_features` -> prediction (B, S, P)."""
        return self.image_decoder(noisy, timestep, condition)

    def denoise_under(self, noisy: Tensor, u: Tensor, apply: ApplyBlock = DenoiserBlock.__call__) -> Tensor:
        """The same under u (B, S, width), the sum of `embed_times` and `project_features`. `apply` calls a block."""
        return self.image_decoder.denoise_under(noisy, u, apply)
