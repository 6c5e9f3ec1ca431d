"""The causal 3D autoencoder of the released text-to-video checkpoints: four times in time, eight times in space.

The class and the module names are the released ones, so that a released `vae/` folder loads as it is. The encoder's
first levels look at frames one by one, the rest convolves over time too, padded on the left with copies of the first
frame. Statistics of normalisation run over the whole clip, so a clip is not the sum of its frames: long clips are taken
in tiles of 17 frames that share one, and the numbers depend on those tiles.
Axes: B batch, T frames and H W rows and columns at whatever size the level has, C channels, F latent frames, h w
latent grid.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from diffusers import ModelMixin  # noqa: F401  (diffusers looks for it beside a class that it is to load)
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from nova_video.autoencoders.base import VideoAutoencoder
from nova_video.common.errors import InputError

TEMPORAL_LEVELS = 2  # levels at which time halves or doubles: 4x in all


class CausalConv3d(nn.Conv3d):
    """3D convolution that pads time with copies of the first frame, so that no frame sees a later one."""

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int, int] = (3, 3, 3)) -> None:
        super().__init__(inputs, outputs, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))

    def forward(self, x: Tensor) -> Tensor:  # (B, C, T, H, W) -> (B, C', T, H, W)
        if x.shape[2] == 1:  # the same frame under every tap: one tap with their sum does a third of the work
            return F.conv3d(x, self.weight.sum(2, keepdim=True), self.bias, padding=self.padding)
        return F.conv3d(first_frame_padded(x, self.kernel_size[0]), self.weight, self.bias, padding=self.padding)


def first_frame_padded(x: Tensor, kernel: int) -> Tensor:
    """(B, C, T, H, W) -> (B, C, T + kernel - 1, H, W), the first frame repeated in front."""
    if kernel == 1:
        return x
    return torch.cat([x[:, :, :1].expand(-1, -1, kernel - 1, -1, -1), x], dim=2)


def by_frame(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function` over the frames of x (B, C, T, H, W), each by itself."""
    frames = function(x.transpose(1, 2).flatten(0, 1))  # (B*T, C', H', W')
    return frames.unflatten(0, (-1, x.shape[2])).transpose(1, 2)


class ResnetBlock2D(nn.Module):
    """Residual block of single frames, normalised frame by frame."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs, eps=1e-6)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, outputs, eps=1e-6)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        return by_frame(self.forward_frames, x)

    def forward_frames(self, x: Tensor) -> Tensor:  # (B*T, C, H, W)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class ResnetBlock3D(nn.Module):
    """Residual block of a clip, normalised over the whole clip."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs, eps=1e-6)
        self.conv1 = CausalConv3d(inputs, outputs)
        self.norm2 = nn.GroupNorm(groups, outputs, eps=1e-6)
        self.conv2 = CausalConv3d(outputs, outputs)
        self.conv_shortcut = CausalConv3d(inputs, outputs, (1, 1, 1)) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:  # (B, C, T, H, W)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class FrameAttention(nn.Module):
    """One-head attention within each frame; its normalisation runs over the whole clip."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.group_norm(x).permute(0, 2, 3, 4, 1).flatten(2, 3)  # (B, T, H*W, C)
        q, k, v = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        out = self.to_out[0](F.scaled_dot_product_attention(q, k, v))  # (B, T, H*W, C)
        return x + out.unflatten(2, x.shape[3:]).permute(0, 4, 1, 2, 3)


class Downsample2D(nn.Module):
    """Half the rows and columns of each frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, T, H, W) -> (B, C, T, H/2, W/2)
        return by_frame(lambda frames: self.conv(F.pad(frames, (0, 1, 0, 1))), x)


class Downsample3D(nn.Module):
    """Half the rows and columns, and every second frame: 2k + 1 frames become k + 1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, T, H, W) -> (B, C, (T - 1)/2 + 1, H/2, W/2)
        return self.conv(first_frame_padded(F.pad(x, (0, 1, 0, 1)), 3))


class Upsample2D(nn.Module):
    """Twice the rows and columns of each frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, (1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:  # (B, C, T, H, W) -> (B, C, T, 2H, 2W)
        return self.conv(by_frame(lambda frames: F.interpolate(frames, scale_factor=2, mode="nearest"), x))


class Upsample3D(nn.Module):
    """Twice the rows and columns, and two frames for each but the first: k + 1 frames become 2k + 1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, T, H, W) -> (B, C, 2T - 1, 2H, 2W)
        first = F.interpolate(x[:, :, 0], scale_factor=2, mode="bilinear", align_corners=False).unsqueeze(2)
        if x.shape[2] == 1:
            return self.conv(first)
        rest = F.interpolate(x[:, :, 1:], scale_factor=2, mode="trilinear", align_corners=False)
        return self.conv(torch.cat([first, rest], dim=2))


class Level(nn.Module):
    """One resolution of encoder or decoder: ResNet blocks, then a change of size unless it is the last level."""

    def __init__(
        self, resnets: Sequence[nn.Module], downsampler: nn.Module | None = None, upsampler: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.downsamplers = None if downsampler is None else nn.ModuleList([downsampler])
        self.upsamplers = None if upsampler is None else nn.ModuleList([upsampler])

    def forward(self, x: Tensor) -> Tensor:
        for layer in [*self.resnets, *(self.downsamplers or ()), *(self.upsamplers or ())]:
            x = layer(x)
        return x


class MidBlock(nn.Module):
    """The coarsest grid's middle: ResNet, attention, ResNet."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock3D(channels, channels, groups) for _ in range(2))
        self.attentions = nn.ModuleList([FrameAttention(channels, groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class OpenSoraEncoder(nn.Module):
    def __init__(
        self, inputs: int, outputs: int, widths: Sequence[int], volumes: Sequence[bool], layers: int, groups: int
    ) -> None:
        """`volumes` says for each level whether its ResNets are 3D."""
        super().__init__()
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(inputs, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            block = ResnetBlock3D if volumes[i] else ResnetBlock2D
            before = [widths[max(i - 1, 0)], *[width] * (layers - 1)]
            down = Downsample3D if i >= last - TEMPORAL_LEVELS else Downsample2D
            resnets = [block(channels, width, groups) for channels in before]
            self.down_blocks.append(Level(resnets, downsampler=None if i == last else down(width)))
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = CausalConv3d(widths[-1], outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = by_frame(self.conv_in, x)  # (B, C, T, H, W)
        for level in self.down_blocks:
            x = level(x)  # in the end (B, C, F, h, w)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))  # (B, 2 * latent channels, F, h, w)


class OpenSoraDecoder(nn.Module):
    def __init__(self, inputs: int, outputs: int, widths: Sequence[int], layers: int, groups: int) -> None:
        """`widths` from the coarsest level to the finest."""
        super().__init__()
        last = len(widths) - 1
        self.conv_in = CausalConv3d(inputs, widths[0])
        self.mid_block = MidBlock(widths[0], groups)
        self.up_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            before = [widths[max(i - 1, 0)], *[width] * (layers - 1)]
            up = Upsample3D if i < TEMPORAL_LEVELS else Upsample2D
            resnets = [ResnetBlock3D(channels, width, groups) for channels in before]
            self.up_blocks.append(Level(resnets, upsampler=None if i == last else up(width)))
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = CausalConv3d(widths[-1], outputs)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))  # (B, C, F, h, w)
        for level in self.up_blocks:
            x = level(x)  # in the end (B, C, T, H, W)
        return self.conv_out(F.silu(self.conv_norm_out(x)))  # (B, 3, T, H, W)


def map_time_tiles(function: Callable[[Tensor], Tensor], x: Tensor, size: int) -> Tensor:
    """`function` over x (B, C, T, H, W) in tiles of `size` frames that share one with the tile before.

    Each tile starts fresh; later ones drop their first output frame, which the tile before has made. A trailing tile
    may be shorter.
    """
    last = max(x.shape[2] - 1, 1)
    tiles = [function(x[:, :, start : start + size]) for start in range(0, last, size - 1)]
    return torch.cat([tiles[0], *(tile[:, :, 1:] for tile in tiles[1:])], dim=2)


class AutoencoderKLOpenSora(VideoAutoencoder):
    """The released causal video autoencoder, 239 M parameters at its released size."""

    tile_frames = 17
    """Pixel frames of a tile in time: 5 latent frames, one of them shared. Part of the numbers, not a setting."""
    decode_context = 1

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",) * 2 + ("DownEncoderBlock3D",) * 2,
        up_block_types: tuple[str, ...] = ("UpDecoderBlock3D",) * 4,
        block_out_channels: tuple[int, ...] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        act_fn: str = "silu",
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        sample_size: int = 256,
        scaling_factor: float = 0.18215,
        shift_factor: float | None = None,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        force_upcast: bool = True,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
    ) -> None:
        """The released config's keys. `sample_size` is the side of a spatial tile; `force_upcast` tells pipelines
        that fp16 may overflow here."""
        super().__init__()
        levels = len(block_out_channels)
        if levels != 4 or len(down_block_types) != levels or len(up_block_types) != levels:
            got = f"{levels} widths, {len(down_block_types)} down blocks, {len(up_block_types)} up blocks"
            raise InputError(f"this autoencoder has 4 levels, got {got}")
        unknown = {*down_block_types} - {"DownEncoderBlock2D", "DownEncoderBlock3D"}
        unknown |= {*up_block_types} - {"UpDecoderBlock3D"}
        if unknown or act_fn != "silu":
            got = ", ".join(sorted(unknown)) or f"activation {act_fn}"
            raise InputError(f"expected DownEncoderBlock2D/3D, UpDecoderBlock3D and silu, got {got}")
        volumes = [kind.endswith("3D") for kind in down_block_types]
        moments = 2 * latent_channels
        self.tile_size = sample_size
        self.tile_overlap = sample_size // 4
        self.encoder = OpenSoraEncoder(
            in_channels, moments, block_out_channels, volumes, layers_per_block, norm_num_groups
        )
        self.decoder = OpenSoraDecoder(
            latent_channels, out_channels, block_out_channels[::-1], layers_per_block + 1, norm_num_groups
        )
        self.quant_conv = nn.Conv3d(moments, moments, 1) if use_quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv3d(latent_channels, latent_channels, 1) if use_post_quant_conv else nn.Identity()

    def encode_clip(self, x: Tensor) -> Tensor:
        return map_time_tiles(lambda tile: self.quant_conv(self.encoder(tile)), x, self.tile_frames)

    def decode_clip(self, z: Tensor, context: int = 0) -> Tensor:
        size = (self.tile_frames - 1) // self.temporal_stride + 1
        pixels = map_time_tiles(lambda tile: self.decode_tile(self.post_quant_conv(tile)), z, size)
        return pixels[:, :, self.temporal_stride * (context - 1) + 1 :] if context else pixels

    def decode_tile(self, z: Tensor) -> Tensor:
        """A tile of latents (B, C, F, h, w), F <= 5 -> its pixels (B, 3, T, H, W)."""
        return self.decoder(z)

    def decode_piece(self, decoded: int) -> int:
        """A tile: the first has nothing before it, later ones begin with the latent frame they share."""
        return (self.tile_frames - 1) // self.temporal_stride + (decoded == 0)
