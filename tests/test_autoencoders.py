"""Both video autoencoders: their shapes, their causality, their numbers, and the scaling of latents."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DecoderOutput
from safetensors.torch import load_file

from nova_video.autoencoders import (
    AutoencoderKLCausalTiny,
    AutoencoderKLOpenSora,
    StreamDecoder,
    scale_latents,
    unscale_latents,
)
from nova_video.autoencoders.base import VideoAutoencoder
from nova_video.autoencoders.opensora import CausalConv3d, first_frame_padded
from nova_video.autoencoders.tiling import map_tiles, tile_starts
from nova_video.common.errors import InputError

CASE = Path(__file__).parent / "conformance" / "text-to-video"


@pytest.fixture(scope="module")
def tiny() -> AutoencoderKLCausalTiny:
    torch.manual_seed(0)
    return AutoencoderKLCausalTiny().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def released() -> AutoencoderKLOpenSora:
    return AutoencoderKLOpenSora.from_pretrained(CASE / "vae").float().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def recorded() -> dict[str, torch.Tensor]:
    return load_file(CASE / "vae.safetensors")


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


def test_tiny_compiles_without_a_break(tiny: AutoencoderKLCausalTiny) -> None:
    """No branch depends on values: the whole of encode and decode is one graph, also under autocast."""

    def there_and_back(x: torch.Tensor) -> torch.Tensor:
        return tiny.decode(tiny.encode(x).latent_dist.mean).sample

    clip = noise(1, 3, 5, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        compiled = torch.compile(there_and_back, backend="eager", fullgraph=True)(clip)
        assert_close(compiled, there_and_back(clip))


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
        AutoencoderKLCausalTiny,
        "decode_clip",
        lambda self, z, context: sizes.append(z.shape[-2:]) or self.decoder(z, context),
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


@pytest.mark.parametrize("num_frames", [1, 9, 33])
def test_released_encoder_gives_the_recorded_moments(released, recorded, num_frames: int) -> None:
    moments = released.encode(recorded[f"video{num_frames}"]).latent_dist.parameters
    assert_close(moments, recorded[f"moments{num_frames}"])


@pytest.mark.parametrize("num_frames", [1, 9, 33])
def test_released_decoder_gives_the_recorded_pixels(released, recorded, num_frames: int) -> None:
    mean = recorded[f"moments{num_frames}"].chunk(2, dim=1)[0]
    assert_close(released.decode(mean).sample, recorded[f"recon{num_frames}"])


def test_released_encoder_takes_pictures(released, recorded) -> None:
    posterior = released.encode(recorded["image"]).latent_dist
    assert_close(posterior.parameters, recorded["image_moments"])
    assert released.decode(posterior.mean).sample.shape == recorded["image"].shape


def test_released_decoder_gives_the_recorded_generated_pixels(released) -> None:
    generated = load_file(CASE / "generate.safetensors")
    latents = unscale_latents(released, generated["latents"])
    assert_close(released.decode(latents).sample, generated["pixels"])


def test_released_size() -> None:
    with torch.device("meta"):
        vae = AutoencoderKLOpenSora()
    assert sum(p.numel() for p in vae.parameters()) == 239_189_991


@pytest.mark.parametrize(("num_latents", "num_frames"), [(5, 17), (6, 21), (8, 29), (9, 33), (10, 37)])
def test_released_trailing_tile_is_kept(released, num_latents: int, num_frames: int) -> None:
    """Tiles of 5 latents share one; the last may be shorter and is decoded too."""
    latents = noise(1, 4, num_latents, 2, 2)
    pixels = released.decode(latents).sample
    assert pixels.shape == (1, 3, num_frames, 16, 16)
    assert_close(pixels[:, :, :17], released.decode(latents[:, :, :5]).sample)
    if num_latents > 5:
        assert_close(pixels[:, :, 17:33], released.decode(latents[:, :, 4:9]).sample[:, :, 1:])
    moments = released.encode(pixels).latent_dist.parameters
    assert moments.shape == (1, 8, num_latents, 2, 2)
    assert_close(moments[:, :, :5], released.encode(pixels[:, :, :17]).latent_dist.parameters)


def test_released_calls_leave_nothing_behind(released) -> None:
    """A call's result does not depend on the calls before it, and no module gains an attribute."""
    before = [dict(vars(module)) for module in released.modules()]
    latents = noise(1, 4, 3, 2, 2)
    first = released.decode(latents).sample
    released.decode(noise(2, 4, 7, 3, 2))
    released.encode(noise(1, 3, 5, 16, 24))
    assert torch.equal(released.decode(latents).sample, first)
    assert [dict(vars(module)) for module in released.modules()] == before


def test_released_slicing_gives_the_same_numbers(released) -> None:
    clips = noise(2, 3, 5, 16, 16)
    latents = released.encode(clips).latent_dist.mean
    pixels = released.decode(latents).sample
    released.enable_slicing()
    assert_close(released.encode(clips).latent_dist.mean, latents)
    assert_close(released.decode(latents).sample, pixels)
    released.disable_slicing()


def test_released_tiling_takes_tiles_of_the_sample_size() -> None:
    """Far inside a tile, where no neighbour is blended in, the numbers are those of the tile alone."""
    torch.manual_seed(0)
    vae = AutoencoderKLOpenSora(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, sample_size=64)
    vae = vae.eval().requires_grad_(False)
    vae.enable_tiling()
    clip = noise(1, 3, 5, 64, 96)
    latents = vae.encode(clip).latent_dist.parameters
    assert latents.shape == (1, 8, 2, 8, 12)
    assert_close(latents[..., :4], vae.encode(clip[..., :64]).latent_dist.parameters[..., :4])
    latents = noise(1, 4, 2, 8, 12)
    pixels = vae.decode(latents).sample
    assert pixels.shape == clip.shape
    assert_close(pixels[..., :32], vae.decode(latents[..., :8]).sample[..., :32])
    assert_close(pixels[..., 64:], vae.decode(latents[..., 4:]).sample[..., 32:])


def test_one_frame_takes_the_short_way() -> None:
    torch.manual_seed(0)
    conv = CausalConv3d(4, 6)
    x = noise(2, 4, 1, 5, 5)
    padded = first_frame_padded(x, 3)
    assert_close(conv(x), torch.nn.functional.conv3d(padded, conv.weight, conv.bias, padding=(0, 1, 1)), 1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"act_fn": "relu"}, "got activation relu"),
        ({"down_block_types": ("DownEncoderBlock2D",) * 3 + ("Strange",)}, "got Strange"),
        ({"block_out_channels": (32, 32)}, "4 levels, got 2 widths"),
    ],
)
def test_unknown_released_config_is_named(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        AutoencoderKLOpenSora(**settings)


def test_offload_finds_encode_and_decode() -> None:
    """Pipelines offload by hooks that run before encode and decode, not only before forward."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    calls = []

    class Count(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(module)
            return args, kwargs

    vae = AutoencoderKLCausalTiny(block_out_channels=(16, 16, 16), norm_num_groups=4)
    add_hook_to_module(vae, Count())
    latents = vae.encode(noise(1, 3, 8, 8)).latent_dist.mean
    vae.decode(latents)
    StreamDecoder(vae).push(latents)
    assert calls == [vae, vae, vae]


@pytest.fixture(params=["tiny", "released"])
def either(request: pytest.FixtureRequest) -> Iterator[VideoAutoencoder]:
    vae = request.getfixturevalue(request.param)
    yield vae
    vae.disable_slicing()
    vae.disable_tiling()


def clip_latents(vae: VideoAutoencoder, frames: int, batch: int = 1, size: tuple[int, int] = (3, 4)) -> torch.Tensor:
    return noise(batch, vae.config.latent_channels, frames, *size)


def decoded_in_pieces(decoder: StreamDecoder, latents: torch.Tensor) -> list[torch.Tensor]:
    pieces = [piece for z in latents.unbind(2) for piece in decoder.push(z)]
    return pieces + decoder.finish()


@pytest.mark.parametrize("num_latents", [1, 2, 4, 5, 6, 8, 9, 12])
def test_pieces_are_the_whole_clip(either: VideoAutoencoder, num_latents: int) -> None:
    """The released autoencoder's own tiles, so the same bits; the tiny one's convolutions run over fewer frames."""
    latents = clip_latents(either, num_latents, batch=2)
    decoder = StreamDecoder(either)
    pixels = torch.cat(decoded_in_pieces(decoder, latents), dim=2)
    whole = either.decode(latents).sample
    assert decoder.decoded == num_latents
    if isinstance(either, AutoencoderKLOpenSora):
        assert torch.equal(pixels, whole)
    assert_close(pixels, whole)


@pytest.mark.parametrize(("slicing", "tiling"), [(True, False), (False, True), (True, True)])
def test_pieces_are_sliced_and_tiled(either: VideoAutoencoder, monkeypatch, slicing: bool, tiling: bool) -> None:
    monkeypatch.setattr(either, "tile_size", 32)
    monkeypatch.setattr(either, "tile_overlap", 16)
    either.use_slicing, either.use_tiling = slicing, tiling
    latents = clip_latents(either, 7, batch=2, size=(4, 6))
    pixels = torch.cat(decoded_in_pieces(StreamDecoder(either), latents), dim=2)
    whole = either.decode(latents).sample
    if isinstance(either, AutoencoderKLOpenSora):
        assert torch.equal(pixels, whole)
    assert_close(pixels, whole)


def test_pixels_come_as_soon_as_they_are_final(either: VideoAutoencoder) -> None:
    """One latent frame at a time where nothing later counts; a tile of five, then of four, where it does."""
    decoder = StreamDecoder(either)
    latents = clip_latents(either, 10)
    lengths = [[piece.shape[2] for piece in decoder.push(z)] for z in latents.unbind(2)]
    lengths.append([piece.shape[2] for piece in decoder.finish()])
    if isinstance(either, AutoencoderKLCausalTiny):
        assert lengths == [[1], *[[4]] * 9, []]
    else:
        assert lengths == [[], [], [], [], [17], [], [], [], [16], [], [4]]
    assert decoder.finish() == []


def test_pixels_given_out_stay_whatever_follows(either: VideoAutoencoder) -> None:
    """No piece looks ahead: clips that part later have the same pixels up to there, whole or in pieces."""
    latents, changed = clip_latents(either, 10), clip_latents(either, 10)
    changed[:, :, 5:] = 7
    first, second = StreamDecoder(either), StreamDecoder(either)
    for z, other in zip(latents.unbind(2)[:5], changed.unbind(2)[:5], strict=True):
        for piece, again in zip(first.push(z), second.push(other), strict=True):
            assert torch.equal(piece, again)
    assert_close(
        torch.cat(decoded_in_pieces(StreamDecoder(either), changed), dim=2)[:, :, :17],
        either.decode(latents).sample[:, :, :17],
    )


@pytest.mark.parametrize("stopped", range(11))
def test_decoding_goes_on_in_another_process(either: VideoAutoencoder, stopped: int) -> None:
    """The latents that `needs` counts are enough to go on with the same bits, wherever it was stopped."""
    latents = clip_latents(either, 11, batch=2)
    expected = torch.cat(decoded_in_pieces(StreamDecoder(either), latents), dim=2)

    decoder = StreamDecoder(either)
    pieces = [piece for z in latents.unbind(2)[:stopped] for piece in decoder.push(z)]
    kept = latents[:, :, stopped - decoder.needs : stopped].clone().unbind(2)
    before = len(kept) - (stopped - decoder.decoded)
    decoder = StreamDecoder(either, kept[:before], decoder.decoded)
    for z in kept[before:]:
        assert decoder.push(z) == []  # those that waited still wait
    pieces += decoded_in_pieces(decoder, latents[:, :, stopped:]) if stopped < 11 else decoder.finish()
    assert torch.equal(torch.cat(pieces, dim=2), expected)


def test_going_on_needs_what_came_before(either: VideoAutoencoder) -> None:
    z = noise(1, either.config.latent_channels, 2, 2)
    StreamDecoder(either, [z] * 9, 9)  # more than needed
    with pytest.raises(InputError, match=r"behind the last \d latent frames, got 0"):
        StreamDecoder(either, [], 9)


def test_decoding_in_pieces_is_bounded_in_memory(either: VideoAutoencoder, monkeypatch) -> None:
    """However long the clip, a decode sees no more than a piece and its context, and no more latents are kept."""
    decoder = StreamDecoder(either)
    sizes = []
    decode = type(either).decode

    def counted(z: torch.Tensor, context: int = 0) -> DecoderOutput:
        sizes.append(z.shape[2])
        return decode(either, z, context)

    monkeypatch.setattr(either, "decode", counted)
    most = 0
    for z in clip_latents(either, 40, size=(1, 1)).unbind(2):
        decoder.push(z)
        most = max(most, decoder.needs)
    assert max(sizes) == (3 if isinstance(either, AutoencoderKLCausalTiny) else 5)
    assert most < 5


def test_tiny_decodes_its_context_at_latent_size_only(tiny: AutoencoderKLCausalTiny) -> None:
    seen = []
    hook = tiny.decoder.coarse.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[0]))
    tiny.decode(clip_latents(tiny, 3), context=2)
    hook.remove()
    assert seen == [4]


@pytest.mark.parametrize("layers", [0, 2])
def test_tiny_context_follows_its_layers(layers: int) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKLCausalTiny(block_out_channels=(16,) * 3, decoder_layers=(1, 1, layers), norm_num_groups=4)
    latents = noise(1, 16, 7, 2, 2)
    with torch.no_grad():
        pixels = torch.cat(decoded_in_pieces(StreamDecoder(vae), latents), dim=2)
        assert_close(pixels, vae.decode(latents).sample)


@pytest.mark.parametrize("context", [-1, 2])
def test_context_leaves_something_to_decode(either: VideoAutoencoder, context: int) -> None:
    with pytest.raises(InputError, match=f"expected 0 to 1, got {context}"):
        either.decode(clip_latents(either, 2), context=context)
