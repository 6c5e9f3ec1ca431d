"""Given clips, pictures and latents to the latent frames that sampling starts from.

Legend: B pictures or clips, F latent frames, T pixel frames, C latent channels, h w latent grid, H W pixels.
"""

import logging

import numpy as np
import torch
from torch import Tensor

from nova_video.autoencoders import adapt, scale_latents
from nova_video.common.errors import InputError
from nova_video.io.inputs import known_tokens, masks_at, same_rate, to_pixels
from nova_video.pipeline.call_parts import Parts
from nova_video.pipeline.plan import Plan
from nova_video.pipeline.progress import GivenPixels
from nova_video.pipeline.request import GenerateRequest
from nova_video.sampling.random import RandomState
from nova_video.sampling.state import GivenFrame

log = logging.getLogger(__name__)


def given_frames(
    parts: Parts, request: GenerateRequest, plan: Plan, random: RandomState
) -> tuple[dict[int, GivenFrame], GivenPixels | None]:
    """Latent frames that are given, whole or in part, and pixels to give back."""
    if request.video_latents is not None:
        latents = request.video_latents.to(random.device, random.dtype)
        if latents.shape[0] not in (1, request.num_prompts, plan.batch):
            raise InputError(f"video: got latents of {latents.shape[0]} clips: expected 1 or {request.num_prompts}")
        return {f: GivenFrame(frame) for f, frame in enumerate(_for_batch(latents, plan.batch).unbind(2))}, None
    clips = request.given_clips
    if not clips:
        return {}, None
    if len(clips) not in (1, request.num_prompts):
        raise InputError(f"video: got {len(clips)} clips: expected 1 or {request.num_prompts}, one a prompt")
    size = (plan.height, plan.width)
    source, fps = clips[0].size, clips[0].fps
    if request.video is not None and (source != size or not same_rate(fps, plan.fps)):
        rates = "" if same_rate(fps, plan.fps) else f" at {fps:g} fps", f" at {plan.fps:g} fps"
        was, now = f"{source[1]}x{source[0]}", f"{plan.width}x{plan.height}"
        log.warning("the given clip, %s%s, is taken as %s%s", was, rates[0], now, rates[1] if rates[0] else "")
    frames = [clip.read(plan.fps, size) for clip in clips]
    pixels = torch.stack([to_pixels(clip[plan.offset :]) for clip in frames])  # (1 or prompts, 3, T, H, W)
    if plan.edits:
        masks = np.ones((len(frames[0]), *size), bool)
        if request.mask_image is not None:
            masks = masks_at(np.asarray(request.mask_image), clips[0], plan.fps, size)
        given, filled = _frames_to_edit(parts, request, plan, random, pixels, torch.from_numpy(masks.copy()))
    else:
        given = {f: GivenFrame(frame) for f, frame in enumerate(_encode(parts, pixels, plan, random).unbind(2))}
        filled = None
    if request.image is not None and not plan.edits:
        return given, None  # as the released model has it: the picture comes back as the autoencoder sees it
    whole = [torch.from_numpy(np.ascontiguousarray(clip)) for clip in frames]
    kept = whole[0].unsqueeze(0) if len(whole) == 1 else torch.stack(whole)  # not held twice
    return given, GivenPixels(_for_batch(kept, plan.batch) if len(kept) > 1 else kept, filled)


def _frames_to_edit(
    parts: Parts,
    request: GenerateRequest,
    plan: Plan,
    random: RandomState,
    pixels: Tensor,
    masks: Tensor,
) -> tuple[dict[int, GivenFrame], Tensor]:
    """Clips (B, 3, T, H, W) and masks (T, H, W) -> their latent frames, and the pixels (T, H, W) made anew."""
    model, length = parts.transformer, len(masks)
    count = parts.capabilities.latent_count(length)
    missing = parts.capabilities.pixel_count(count) - length  # the clip's end stands in for what is not there
    pixels = torch.cat([pixels, pixels[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2)
    latents = _encode(parts, pixels, plan, random)  # (B, C, F, h, w)
    stride = model.config.image_stride * model.patch_size
    known = known_tokens(masks, stride, count, plan.temporal_stride).flatten(1).to(latents.device)  # (F, L)
    share = 1.0 if request.strength is None else request.strength
    given = {}
    filled = masks.clone()
    for frame in range(count):
        redraw = round(share * int((~known[frame]).sum()))
        given[frame] = GivenFrame(latents[:, :, frame], known[frame], redraw)
        if redraw == 0:
            filled[plan.first_pixel(frame) : plan.first_pixel(frame + 1)] = False
    return given, filled


def _encode(parts: Parts, pixels: Tensor, plan: Plan, random: RandomState) -> Tensor:
    """Clips (1 or prompts, 3, T, H, W) in [-1, 1] -> latents (B, C, F, h, w), sampled from their posterior."""
    vae = adapt(parts.vae)
    posterior = vae.encode(pixels.to(random.device, vae.dtype))
    mean, std = posterior.mean, posterior.std
    if len(mean) > 1:
        mean, std = (_for_batch(part, plan.batch) for part in (mean, std))
    draws = len(random.generators)  # one sample for all clips, or one for each that has its own generator
    noise = random.normal(draws, *mean.shape[1:])
    latents = scale_latents(parts.vae, mean + std * noise.to(mean.dtype))
    return latents.to(random.dtype).expand(plan.batch, -1, -1, -1, -1)


def _for_batch(rows: Tensor, batch: int) -> Tensor:
    """One row for all, or one a prompt -> one a picture: prompts are repeated in place."""
    return rows.repeat_interleave(batch // len(rows), dim=0)
