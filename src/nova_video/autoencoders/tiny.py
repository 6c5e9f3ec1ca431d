"""Our own small causal video autoencoder: four times shorter in time, eight times smaller in space, 2.3 M parameters.

Everything but a few blocks in the middle is 2D and sees one frame; four frames then fold into the channels of one
latent frame, and there convolutions over (frame - 2, frame - 1, frame) carry time. Statistics are of one frame, so the
whole is strictly causal: latent frame f depends on pixel frames up to 4f, and its pixels on latents up to f.
A clip counts as preceded by three copies of its first frame: latent frame 0 is that frame alone.
Borders are padded by replication; padding with zeros leaves a dark rim on flat backgrounds.
Axes: B batch, T pixel frames, F latent frames, N = B * T or B * F frames taken one by one, H W pixels, h w latent grid.
"""

import torch
import torch.nn.functional as F
from diffusers import ModelMixin  # noqa: F401  (diffusers looks for it beside a class that it is to load)
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from nova_video.autoencoders.base import VideoAutoencoder

PIXELS = 4  # a 4x4 block of pixels is one cell of the first grid
FRAMES = 4  # pixel frames of a latent frame


def frame_conv(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, padding_mode="replicate")


class TimeConv(nn.Module):
    """Convolution over the last three frames, (3, 1, 1); the clip's first frame stands in for what came before."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3 * channels, channels, 1)

    def forward(self, x: Tensor, num_frames: int) -> Tensor:
        now = x.unflatten(0, (-1, num_frames))  # (B, F, C, h, w)
        before = torch.cat([now[:, :1], now[:, :-1]], dim=1)
        earlier = torch.cat([now[:, :1], before[:, :-1]], dim=1)
        return self.conv(torch.cat([earlier, before, now], dim=2).flatten(0, 1))  # (B*F, C, h, w)


class FrameBlock(nn.Module):
    """Residual block within one frame."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels, eps=1e-6)
        self.conv1 = frame_conv(channels, channels)
        self.norm2 = nn.GroupNorm(groups, channels, eps=1e-6)
        self.conv2 = frame_conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))  # (N, C, H, W)
        return x + self.conv2(F.silu(self.norm2(h)))


class ClipBlock(nn.Module):
    """Residual block over time, then space, of latent frames."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels, eps=1e-6)
        self.time = TimeConv(channels)
        self.norm2 = nn.GroupNorm(groups, channels, eps=1e-6)
        self.space = frame_conv(channels, channels)

    def forward(self, x: Tensor, num_frames: int) -> Tensor:
        h = self.time(F.silu(self.norm1(x)), num_frames)  # (B*F, C, h, w)
        return x + self.space(F.silu(self.norm2(h)))


class TinyEncoder(nn.Module):
    def __init__(
        self, pixels: int, outputs: int, widths: tuple[int, int, int], layers: tuple[int, int, int], groups: int
    ) -> None:
        super().__init__()
        fine, coarse, clip = widths
        self.conv_in = frame_conv(pixels * PIXELS**2, fine)
        self.fine = nn.Sequential(*(FrameBlock(fine, groups) for _ in range(layers[0])))
        self.down = frame_conv(fine, coarse, stride=2)
        self.coarse = nn.Sequential(*(FrameBlock(coarse, groups) for _ in range(layers[1])))
        self.fold = nn.Conv2d(FRAMES * coarse, clip, 1)
        self.clip = nn.ModuleList(ClipBlock(clip, groups) for _ in range(layers[2]))
        self.norm_out = nn.GroupNorm(groups, clip, eps=1e-6)
        self.conv_out = frame_conv(clip, outputs)

    def forward(self, x: Tensor) -> Tensor:
        T = x.shape[2]
        num_frames = (T - 1) // FRAMES + 1
        frames = x.transpose(1, 2).flatten(0, 1)  # (B*T, 3, H, W)
        frames = self.conv_in(F.pixel_unshuffle(frames, PIXELS))  # (B*T, 64, H/4, W/4)
        frames = self.coarse(self.down(self.fine(frames)))  # (B*T, 128, h, w)
        clip = frames.unflatten(0, (-1, T))
        clip = torch.cat([clip[:, :1].expand(-1, FRAMES - 1, -1, -1, -1), clip], dim=1)  # (B, 4F, 128, h, w)
        z = self.fold(clip.unflatten(1, (num_frames, FRAMES)).flatten(0, 1).flatten(1, 2))  # (B*F, 160, h, w)
        for block in self.clip:
            z = block(z, num_frames)
        moments = self.conv_out(F.silu(self.norm_out(z)))  # (B*F, 2C, h, w)
        return moments.unflatten(0, (-1, num_frames)).transpose(1, 2)  # (B, 2C, F, h, w)


class TinyDecoder(nn.Module):
    def __init__(
        self, inputs: int, pixels: int, widths: tuple[int, int, int], layers: tuple[int, int, int], groups: int
    ) -> None:
        super().__init__()
        fine, coarse, clip = widths
        self.conv_in = frame_conv(inputs, clip)
        self.clip = nn.ModuleList(ClipBlock(clip, groups) for _ in range(layers[2]))
        self.unfold = nn.Conv2d(clip, FRAMES * coarse, 1)
        self.coarse = nn.Sequential(*(FrameBlock(coarse, groups) for _ in range(layers[1])))
        self.up = nn.Conv2d(coarse, 4 * fine, 1)
        self.fine = nn.Sequential(*(FrameBlock(fine, groups) for _ in range(layers[0])))
        self.norm_out = nn.GroupNorm(groups, fine, eps=1e-6)
        self.conv_out = frame_conv(fine, pixels * PIXELS**2)

    def forward(self, z: Tensor, context: int = 0) -> Tensor:
        """`context` leading latent frames are seen by the blocks over time only, F' = F - context become pixels."""
        B, _, num_frames, _, _ = z.shape
        x = self.conv_in(z.transpose(1, 2).flatten(0, 1))  # (B*F, 160, h, w)
        for block in self.clip:
            x = block(x, num_frames)
        x = x.unflatten(0, (B, num_frames))[:, context:].flatten(0, 1)  # (B*F', 160, h, w)
        clip = self.unfold(x).unflatten(1, (FRAMES, -1)).unflatten(0, (B, -1))  # (B, F', 4, 128, h, w)
        copies = 0 if context else FRAMES - 1  # of the clip's first frame, in front of it
        frames = clip.flatten(1, 2)[:, copies:]  # (B, T, 128, h, w)
        T = frames.shape[1]
        frames = frames.flatten(0, 1)
        frames = self.fine(F.pixel_shuffle(self.up(self.coarse(frames)), 2))  # (B*T, 64, H/4, W/4)
        frames = F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(frames))), PIXELS)  # (B*T, 3, H, W)
        return frames.unflatten(0, (-1, T)).transpose(1, 2)  # (B, 3, T, H, W)


class AutoencoderKLCausalTiny(VideoAutoencoder):
    """The small causal video autoencoder that our own models are trained in."""

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        latent_channels: int = 16,
        block_out_channels: tuple[int, int, int] = (64, 128, 160),
        encoder_layers: tuple[int, int, int] = (1, 1, 1),
        decoder_layers: tuple[int, int, int] = (2, 2, 1),
        norm_num_groups: int = 16,
        scaling_factor: float = 1.0,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
    ) -> None:
        """Widths and layers are of the quarter grid, the latent grid frame by frame, and the latent frames.

        `latents_mean` and `latents_std`, one value a latent channel, are measured after training
        (`register_to_config`); `scale_latents` uses them.
        """
        super().__init__()
        self.encoder = TinyEncoder(
            in_channels, 2 * latent_channels, block_out_channels, encoder_layers, norm_num_groups
        )
        self.decoder = TinyDecoder(latent_channels, in_channels, block_out_channels, decoder_layers, norm_num_groups)
        self.decode_context = max(2 * decoder_layers[2], 1)  # each block over time sees two frames back

    def encode_clip(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def decode_clip(self, z: Tensor, context: int = 0) -> Tensor:
        return self.decoder(z, context)

    def decode_piece(self, decoded: int) -> int:
        return 1
