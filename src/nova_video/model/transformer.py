"""NOVA: frame by frame in time, set by set in space, and a per-token denoiser (arXiv 2412.14169).

The order of this file is the order of the paper: the temporal encoder (section 3.1), the spatial encoder (3.2), the
denoiser (3.3, in `denoiser.py`), then the assembled model. Module names are the released checkpoints' keys.
Modules hold weights only: masks, orders, caches and random numbers are the caller's (`sampling` or `training`).

Legend: B batch, F latent frames, h w latent grid, L tokens of a frame, Lc temporal tokens of a frame (L / 4), S tokens
predicted together, T condition tokens, C latent channels, D width, P = p * p * C values of a token.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ModelMixin  # noqa: F401  (diffusers looks for it beside a class that it is to load)
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional

from nova_video.common.errors import InputError
from nova_video.model.attention import block_causal_mask
from nova_video.model.config import check_config, parse_archs, spatial_patch
from nova_video.model.denoiser import Denoiser
from nova_video.model.diffusers_model import DiffusersModel
from nova_video.model.embeddings import MaskEmbed, Mixer, MotionEmbed, Positions, Rotary, TextEmbed, VideoPosEmbed
from nova_video.model.head import resolve_head
from nova_video.model.patches import PatchEmbed, gather_tokens
from nova_video.model.vit import Block, CacheLayer, TemporalCache, call_block, heads_for_width, residual_stream


class VideoEncoder(nn.Module):
    """Temporal encoder: reads text, motion and all earlier frames, causally frame by frame."""

    def __init__(self, depth: int, width: int, channels: int, patch: int, mixer_rank: int | None) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.patch_embed = PatchEmbed(channels, width, patch)
        self.blocks = nn.ModuleList(Block(width, heads_for_width(width)) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.mixer = Mixer(width, mixer_rank) if mixer_rank else None

    def forward(
        self, condition: Tensor, frames: Tensor, rotary: Rotary | None, cache: TemporalCache | None = None
    ) -> Tensor:
        """All frames at once: condition (B, T, D), frames (B, F, Lc, D) -> features (B, F, Lc, D).

        An empty `cache` is filled, so that `step` can go on from there.
        """
        text, (num_frames, tokens) = condition.shape[1], frames.shape[1:3]
        # a single frame forms one block with the condition: nothing to hide
        mask = None if num_frames == 1 else self.causal_mask(text, tokens, num_frames, frames.device)
        x = residual_stream(torch.cat([condition, frames.flatten(1, 2)], dim=1))  # (B, T + F * Lc, D)
        rotary = None if rotary is None else rotary.after_condition(text)
        for layer, block in enumerate(self.blocks):
            x = call_block(self, block, x, rotary, mask, None if cache is None else CacheLayer(cache, layer))
        if cache is not None:
            cache.advance(x.shape[1])
        return self.norm(x[:, text:]).unflatten(1, (num_frames, tokens))

    def causal_mask(self, condition_tokens: int, frame_tokens: int, num_frames: int, device: torch.device) -> Any:
        """The mask of `forward`, in the form that the blocks take."""
        return block_causal_mask(condition_tokens, frame_tokens, num_frames, device)

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
        self.gradient_checkpointing = False
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
        revealed: Tensor | None = None,
    ) -> Tensor:
        """condition (B, Lc, D), visible (B, V, D) of the tokens `visible_ids` (B, V), others (L, D) or (B, L, D), read
        where a token is not visible, both with their positions -> z (B, L, D).

        With `ids` (B, S), z of these tokens alone, (B, S, D): the last block is computed for them only. With `revealed`
        (B, V) bool, only those of `visible_ids` are visible: the others pad samples with fewer.
        """
        count = condition.shape[1]
        half = len(self.blocks) // 2
        x = residual_stream(torch.cat([condition, visible], dim=1))  # (B, Lc + V, D)
        at_visible = None if rotary is None else rotary.at(visible_ids).after_condition(count)
        mask = None  # (B, 1, 1, Lc + V), the columns that are not padding
        if revealed is not None:
            mask = functional.pad(revealed, (count, 0), value=True)[:, None, None]
        for block in self.blocks[:half]:
            x = call_block(self, block, x, at_visible, mask)
        visible_out = x[:, count:]
        if revealed is not None:
            visible_out = torch.where(revealed.unsqueeze(-1), visible_out, visible.to(visible_out.dtype))
        x = torch.cat([x[:, :count], others.to(x.dtype).expand(len(x), -1, -1)], dim=1)  # (B, Lc + L, D)
        x.scatter_(1, (visible_ids + count).unsqueeze(-1).expand_as(visible_out), visible_out)
        at_all = None if rotary is None else rotary.after_condition(count)
        for block in self.blocks[half:-1]:
            x = call_block(self, block, x, at_all)
        if ids is None:
            return self.norm(call_block(self, self.blocks[-1], x, at_all)[:, count:])
        return self.norm(call_block(self, self.blocks[-1], x, at_all, None, None, ids + count))


class NOVATransformer3DModel(DiffusersModel):
    """The whole network. `forward` is the training pass, other methods are steps of sampling; none keeps anything."""

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
        head: Any = None,
    ) -> None:
        """The released config's keys, and the class of a head of the user's own (`head.py`), which the config names.

        A number as `image_size` is the side of a square.
        """
        super().__init__()
        make_head, head_name = resolve_head(head)
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.register_to_config(image_size=size, head=head_name)
        check_config(self.config)
        (video_depth, width), (image_depth, _), (mlp_depth, mlp_width) = parse_archs(arch)
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
        self.image_decoder: Any = make_head(mlp_depth, mlp_width, width, image_dim, self.patch_size)
        self.initialize_weights()

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
        return torch.cat([tokens, self.motion_embed(motion, fps, tokens.dtype)], dim=1)

    def positions(self, num_frames: int, grid: tuple[int, int]) -> Positions:
        """Positions of `num_frames` latent frames on the latent grid (h, w)."""
        tokens = (grid[0] // self.patch_size, grid[1] // self.patch_size)
        if self.video_pos_embed is None:
            return Positions.rotary(num_frames, tokens, self.head_dim, self.device)
        return Positions.absolute(self.video_pos_embed(num_frames), tokens, self.width)

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
            tokens = self.mask_embed.bos_token.expand(batch, positions.video_tokens, -1)
        if bare or positions.time is None or positions.video_space is None:
            return tokens
        return tokens + positions.time[slot] + positions.video_space

    def encode_context(
        self, condition: Tensor, tokens: Tensor, positions: Positions, cache: TemporalCache | None = None
    ) -> Tensor:
        """The first slots in one pass: condition (B, T, D), tokens (B, F, Lc, D) -> all c_f (B, F, Lc, D).

        An empty `cache` is filled with them, for `encode_frame` to go on.
        """
        rotary = positions.video_rotary
        if rotary is not None:
            rotary = rotary.slice(0, tokens.shape[1] * tokens.shape[2])
        return self.video_encoder(condition, tokens, rotary, cache)

    def encode_frame(self, tokens: Tensor, slot: int, positions: Positions, cache: TemporalCache) -> Tensor:
        """The next slot alone: tokens (B, Lc, D) -> c_f (B, Lc, D). Equal to `encode_context` of all so far."""
        rotary = positions.video_rotary
        if rotary is not None:
            rotary = rotary.slice(slot * tokens.shape[1], (slot + 1) * tokens.shape[1])
        return self.video_encoder.step(tokens, rotary, cache)

    def encode_frames(self, condition: Tensor, latents: Tensor, positions: Positions) -> Tensor:
        """All frames at once (training): condition (B, T, D), latents (B, C, F, h, w) -> mixed (B, F, Lc, D)."""
        batch, _, num_frames = latents.shape[:3]
        bos = self.mask_embed.bos_token.expand(batch, 1, positions.video_tokens, -1)
        earlier = self.video_encoder.patch_embed(latents[:, :, :-1].transpose(1, 2).flatten(0, 1))
        frames = torch.cat([bos, earlier.unflatten(0, (batch, num_frames - 1))], dim=1)  # (B, F, Lc, D)
        if positions.time is not None and positions.video_space is not None:
            frames = frames + positions.time + positions.video_space
        features = self.video_encoder(condition, frames, positions.video_rotary)
        if num_frames == 1:
            return features
        return torch.cat([features[:, :1], self.mix(features[:, :1], features[:, 1:])], dim=1)

    def mix(self, first: Tensor, feature: Tensor) -> Tensor:
        """Spatial condition of a frame f >= 1 from c_0 and c_f, both (..., Lc, D); c_f itself without a mixer."""
        return feature if self.video_encoder.mixer is None else self.video_encoder.mixer(first, feature)

    def new_cache(self, batch: int, positions: Positions) -> TemporalCache:
        """An empty temporal cache with room for the condition tokens and all frames of `positions`."""
        text = self.text_embed.token_len + (2 if self.has_motion else 0)
        capacity = text + positions.num_frames * positions.video_tokens
        layers, heads = len(self.video_encoder.blocks), heads_for_width(self.width)
        return TemporalCache(layers, batch, heads, capacity, self.head_dim, self.mask_embed.bos_token)

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
        revealed: Tensor | None = None,
    ) -> Tensor:
        """condition (B, Lc, D), tokens (B, L, D), visible_ids (B, V) -> features z (B, L, D), or (B, S, D) of `ids`.

        Rows of `tokens` outside `visible_ids` are replaced by the mask token, whatever they hold. With `revealed`
        (B, V) bool, only those of `visible_ids` are visible.
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
        return self.image_encoder(condition, visible, visible_ids, others, positions.image_rotary, ids, revealed)

    # The training pass --------------------------------------------------------------------------------------------

    def forward(
        self,
        condition: Tensor,
        latents: Tensor,
        visible_ids: Tensor,
        ids: Tensor,
        noisy: Tensor,
        timestep: Tensor,
        history: Tensor | None = None,
        revealed: Tensor | None = None,
    ) -> Tensor:
        """Predicts the noisy tokens `ids` of every frame, given the tokens `visible_ids`.

        condition (B, T, D), latents (B, C, F, h, w), visible_ids (B * F, V), ids (B * F, S), noisy (R * B * F, S, P)
        and timestep (R * B * F, S) of R draws of noise -> prediction (R * B * F, S, P). `history`, like latents, is
        what the temporal encoder reads, by default the latents. `revealed` as in `encode_tokens`.
        """
        positions = self.positions(latents.shape[2], (latents.shape[3], latents.shape[4]))
        features = self.encode_frames(condition, latents if history is None else history, positions)
        tokens = self.image_encoder.patch_embed(latents.transpose(1, 2).flatten(0, 1))  # (B * F, L, D)
        z = self.encode_tokens(features.flatten(0, 1), tokens, visible_ids, positions, ids, revealed)  # (B * F, S, D)
        if type(self.image_decoder) is not Denoiser:  # a head of the user's own gets as many rows of z as of tokens
            z = z.repeat(len(noisy) // len(z), 1, 1)
        return self.image_decoder(noisy, timestep, z)
