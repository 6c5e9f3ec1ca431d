"""Both video autoencoders: their shapes, their causality, their numbers, and the scaling of latents."""

import time

import pytest
import torch
from diffusers import AutoencoderKL

from nova_video.autoencoders import AutoencoderKLCausalTiny, scale_latents, unscale_latents
from nova_video.autoencoders.base import VideoAutoencoder
from nova_video.autoencoders.tiling import map_tiles, tile_starts
from nova_video.errors import InputError


@pytest.fixture(scope="module")
def tiny() -> AutoencoderKLCausalTiny:
    torch.manual_seed(0)
    return AutoencoderKLCausalTiny().eval().requires_grad_(False)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Within `tolerance` of the expected tensor's largest value."""
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error <= tolerance, f"off by {error:.2e} of the largest value"


def test_tiny_size_fits_the_package(tiny: AutoencoderKLCausalTiny) -> None:
    assert 2.0e6 <= sum(p.numel() for p in tiny.parameters()) <= 2.4e6


@pytest.mark.parametrize("num_frames", [1, 5, 17])
def test_tiny_shapes(tiny: AutoencoderKLCausalTiny, num_frames: int) -> None:
    latents = tiny.encode(noise(2, 3, num_frames, 32, 48)).latent_dist.sample()
    assert latents.shape == (2, 16, (num_frames - 1) // 4 + 1, 4, 6)
    assert tiny.decode(latents).sample.shape == (2, 3, num_frames, 32, 48)


def test_tiny_picture_is_a_clip_of_one_frame(tiny: AutoencoderKLCausalTiny) -> None:
    clip = noise(2, 3, 1, 32, 32)
    latents = tiny.encode(clip).latent_dist.mean
    assert torch.equal(tiny.encode(clip[:, :, 0]).latent_dist.mean, latents[:, :, 0])
    assert torch.equal(tiny.decode(latents[:, :, 0]).sample, tiny.decode(latents).sample[:, :, 0])


@pytest.mark.parametrize("frame", [0, 1, 3])
def test_tiny_encoder_is_causal(tiny: AutoencoderKLCausalTiny, frame: int) -> None:
    """Latent frame f sees pixel frames up to 4f and none after; 4f + 1 is the next latent's."""
    clip = noise(1, 3, 17, 32, 32)
    changed = clip.clone()
    changed[:, :, 4 * frame + 1 :] = noise(1, 3, 16 - 4 * frame, 32, 32, seed=1)
    before, after = tiny.encode(clip).latent_dist.parameters, tiny.encode(changed).latent_dist.parameters
    assert torch.allclose(before[:, :, : frame + 1], after[:, :, : frame + 1], atol=1e-6)
    assert not torch.allclose(before[:, :, frame + 1], after[:, :, frame + 1], atol=1e-3)
    earlier = tiny.encode(clip[:, :, : 4 * frame + 1]).latent_dist.parameters
    assert torch.allclose(before[:, :, : frame + 1], earlier, atol=1e-5)


@pytest.mark.parametrize("frame", [0, 1, 3])
def test_tiny_decoder_is_causal(tiny: AutoencoderKLCausalTiny, frame: int) -> None:
    """Pixels of latent frames up to f stay when later latents change, and are those of a shorter clip."""
    latents = noise(1, 16, 5, 4, 4)
    changed = latents.clone()
    changed[:, :, frame + 1 :] = noise(1, 16, 4 - frame, 4, 4, seed=1)
    before, after = tiny.decode(latents).sample, tiny.decode(changed).sample
    known = 4 * frame + 1
    assert torch.allclose(before[:, :, :known], after[:, :, :known], atol=1e-6)
    assert not torch.allclose(before[:, :, known], after[:, :, known], atol=1e-3)
    assert torch.allclose(before[:, :, :known], tiny.decode(latents[:, :, : frame + 1]).sample, atol=1e-5)


def test_tiny_time_carries_information(tiny: AutoencoderKLCausalTiny) -> None:
    """A latent frame reaches the frames after it, so that what moved out of sight can come back."""
    latents = noise(1, 16, 3, 4, 4)
    changed = latents.clone()
    changed[:, :, 0] = 0
    difference = (tiny.decode(latents).sample - tiny.decode(changed).sample).abs()
    assert difference[:, :, 5:].max() > 1e-3


def test_tiny_flat_clip_has_no_rim(tiny: AutoencoderKLCausalTiny) -> None:
    """Replicated borders: a flat picture's latents are flat, edges and corners included."""
    latents = tiny.encode(torch.full((1, 3, 5, 32, 32), 0.7)).latent_dist.mean
    assert_close(latents, latents[..., :1, :1].expand_as(latents), 1e-4)


def test_tiny_is_fast_on_a_laptop(tiny: AutoencoderKLCausalTiny) -> None:
    clip = noise(1, 3, 17, 128, 128)
    seconds = []
    for _ in range(3):  # the best of three: another process may hold the cores
        start = time.perf_counter()
        tiny.decode(tiny.encode(clip).latent_dist.mean)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 4.0


def test_tiny_trains_under_autocast() -> None:
    torch.manual_seed(0)
    vae = AutoencoderKLCausalTiny(block_out_channels=(16, 16, 16), norm_num_groups=4)
    clip = noise(2, 3, 5, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = (vae(clip).sample - clip).abs().mean()
    loss.backward()
    missing = [name for name, p in vae.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert missing == []


def test_tiny_saves_and_loads_its_statistics(tmp_path) -> None:
    vae = AutoencoderKLCausalTiny(block_out_channels=(16, 16, 16), norm_num_groups=4)
    vae.register_to_config(latents_mean=[0.5] * 16, latents_std=[2.0] * 16)
    vae.save_pretrained(tmp_path)
    loaded = AutoencoderKLCausalTiny.from_pretrained(tmp_path)
    latents = noise(1, 16, 2, 2, 2)
    assert torch.equal(loaded.decode(latents).sample, vae.decode(latents).sample)
    assert torch.allclose(scale_latents(loaded, latents), (latents - 0.5) / 2)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 16, 32, 32), r"4k \+ 1 frames .* got 16"),
        ((1, 3, 5, 30, 32), r"multiples of 8, got 30x32"),
        ((1, 4, 5, 32, 32), r"pixels .* got \(1, 4, 5, 32, 32\)"),
        ((3, 32, 32), r"pixels .* got \(3, 32, 32\)"),
    ],
)
def test_wrong_pixels_are_named(tiny: AutoencoderKLCausalTiny, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny.encode(torch.zeros(shape))


def test_wrong_latents_are_named(tiny: AutoencoderKLCausalTiny) -> None:
    with pytest.raises(InputError, match=r"latents \(B, 16, .* got \(1, 4, 2, 4, 4\)"):
        tiny.decode(torch.zeros(1, 4, 2, 4, 4))


def test_tiles_cover_and_share() -> None:
    assert tile_starts(32, 32, 8) == [0]
    assert tile_starts(33, 32, 8) == [0, 1]
    assert tile_starts(100, 32, 8) == [0, 24, 48, 68]


@pytest.mark.parametrize(("unit", "out_unit"), [(1, 8), (8, 1)])
def test_tiles_of_a_local_map_blend_to_the_whole(unit: int, out_unit: int) -> None:
    x = noise(1, 2, 3, 10 * unit, 13 * unit)

    def resize(part: torch.Tensor) -> torch.Tensor:
        part = part[..., ::unit, ::unit]
        return part.repeat_interleave(out_unit, -1).repeat_interleave(out_unit, -2)

    assert_close(map_tiles(resize, x, unit, 4, 2, out_unit), resize(x), 1e-6)


def test_tiling_bounds_the_tile_and_stays_close(tiny: AutoencoderKLCausalTiny, monkeypatch) -> None:
    monkeypatch.setattr(VideoAutoencoder, "tile_size", 64)
    monkeypatch.setattr(VideoAutoencoder, "tile_overlap", 32)
    sizes = []
    monkeypatch.setattr(
        AutoencoderKLCausalTiny, "decode_clip", lambda self, z: sizes.append(z.shape[-2:]) or self.decoder(z)
    )
    latents = noise(1, 16, 1, 12, 16)
    whole = tiny.decode(latents).sample
    tiny.enable_tiling()
    tiled = tiny.decode(latents).sample
    tiny.disable_tiling()
    assert sizes[0] == (12, 16)
    assert len(sizes) == 7
    assert set(sizes[1:]) == {(8, 8)}
    assert tiled.shape == whole.shape
    assert (tiled - whole).abs().mean() < 0.25 * whole.std()
    assert torch.equal(tiny.decode(latents).sample, whole)


def test_slicing_gives_the_same_numbers(tiny: AutoencoderKLCausalTiny) -> None:
    clip = noise(3, 3, 5, 32, 32)
    whole = tiny.encode(clip).latent_dist.mean
    pixels = tiny.decode(whole).sample
    tiny.enable_slicing()
    sliced = tiny.encode(clip).latent_dist.mean
    assert_close(sliced, whole)
    assert_close(tiny.decode(whole).sample, pixels)
    tiny.disable_slicing()


def test_scaling_follows_diffusers_configs() -> None:
    small = {"block_out_channels": (32,), "layers_per_block": 1}
    latents = noise(2, 4, 3, 3)
    vae = AutoencoderKL(**small, scaling_factor=0.5, shift_factor=0.1)
    assert torch.allclose(scale_latents(vae, latents), (latents - 0.1) * 0.5)
    assert torch.allclose(unscale_latents(vae, scale_latents(vae, latents)), latents, atol=1e-6)
    vae = AutoencoderKL(**small, scaling_factor=0.5, latents_mean=[1.0, 2, 3, 4], latents_std=[1.0, 2, 4, 8])
    expected = (latents[:, 3] - 4) * 0.5 / 8
    assert torch.allclose(scale_latents(vae, latents)[:, 3], expected)
    assert torch.allclose(unscale_latents(vae, scale_latents(vae, latents)), latents, atol=1e-6)
