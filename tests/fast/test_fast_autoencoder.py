"""The fast decoder of the released video autoencoder: the plain pixels, in parts, streams, tiles and threads."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from nova_video import NovaPipeline
from nova_video.autoencoders import AutoencoderKLOpenSora, StreamDecoder
from nova_video.autoencoders.base import VideoAutoencoder
from nova_video.autoencoders.opensora import CausalConv3d
from nova_video.fast.arrange import over
from nova_video.fast.autoencoder import FastOpenSora, arrange_autoencoder, decode_tile, parts_of
from nova_video.pipeline.offload import enable_low_memory


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Within `tolerance` of the expected tensor's largest value."""
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error <= tolerance, f"off by {error:.2e} of the largest value"


def clip_latents(vae: VideoAutoencoder, frames: int, batch: int = 1, size: tuple[int, int] = (3, 4)) -> torch.Tensor:
    return noise(batch, vae.config.latent_channels, frames, *size)


def decoded_in_pieces(decoder: StreamDecoder, latents: torch.Tensor) -> list[torch.Tensor]:
    pieces = [piece for z in latents.unbind(2) for piece in decoder.push(z)]
    return pieces + decoder.finish()


@pytest.fixture(scope="module")
def uneven() -> AutoencoderKLOpenSora:
    """Widths that differ, as the released ones do, and norms that do something."""
    torch.manual_seed(0)
    vae = AutoencoderKLOpenSora(block_out_channels=(16, 32, 64, 64), norm_num_groups=16, layers_per_block=1)
    for parameter in vae.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return vae.eval().requires_grad_(False)


@torch.no_grad()
@pytest.mark.parametrize(("num_latents", "batch"), [(1, 1), (2, 2), (5, 1), (7, 2)])
def test_fast_decode_gives_the_plain_pixels(uneven: AutoencoderKLOpenSora, num_latents: int, batch: int) -> None:
    latents = clip_latents(uneven, num_latents, batch, (3, 5))
    plain = uneven.decode(latents).sample
    arranged = arrange_autoencoder(uneven)
    assert type(arranged) is FastOpenSora
    pixels = arranged.decode(latents).sample
    assert_close(pixels, plain, 2e-5)
    assert torch.equal(uneven.decode(latents).sample, plain)


@torch.no_grad()
@pytest.mark.parametrize("values", [1, 3000, 40_000])
def test_fast_decode_is_the_same_in_parts_of_any_length(uneven: AutoencoderKLOpenSora, values: int) -> None:
    latents = clip_latents(uneven, 5, size=(3, 5))
    z = uneven.post_quant_conv(latents)
    assert_close(decode_tile(uneven.decoder, z, values=values), uneven.decoder(z), 2e-5)


@torch.no_grad()
def test_fast_decode_streams_and_tiles(uneven: AutoencoderKLOpenSora, monkeypatch) -> None:
    latents = clip_latents(uneven, 7, size=(4, 6))
    arranged = arrange_autoencoder(uneven)
    pieces = decoded_in_pieces(StreamDecoder(arranged), latents)
    assert torch.equal(torch.cat(pieces, dim=2), arranged.decode(latents).sample)
    monkeypatch.setattr(uneven, "tile_size", 32)
    monkeypatch.setattr(uneven, "tile_overlap", 16)
    monkeypatch.setattr(uneven, "use_tiling", True)
    arranged = arrange_autoencoder(uneven)
    assert_close(arranged.decode(latents).sample, uneven.decode(latents).sample, 2e-5)


@torch.no_grad()
def test_threads_decode_each_in_their_own_way(uneven: AutoencoderKLOpenSora) -> None:
    """One fast, one plainly, at once: each gives the bits that it gives alone, and no weight moves."""
    latents = clip_latents(uneven, 5, size=(3, 5))
    ways = {False: uneven, True: arrange_autoencoder(uneven)}
    alone = {fast: vae.decode(latents).sample for fast, vae in ways.items()}
    places = [weight.data_ptr() for weight in uneven.parameters()]
    made: dict[bool, list[bool]] = {False: [], True: []}

    def work(fast: bool) -> None:
        with torch.no_grad():
            for _ in range(10):
                made[fast].append(torch.equal(ways[fast].decode(latents).sample, alone[fast]))

    threads = [threading.Thread(target=work, args=(fast,)) for fast in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == {False: [True] * 10, True: [True] * 10}
    assert [weight.data_ptr() for weight in uneven.parameters()] == places


@torch.no_grad()
def test_fast_decode_in_half_precision_is_no_farther_off(uneven: AutoencoderKLOpenSora) -> None:
    half = AutoencoderKLOpenSora.from_config(uneven.config)
    half.load_state_dict(uneven.state_dict())
    half = half.to(torch.bfloat16).eval()
    errors = {"plain": 0.0, "fast": 0.0}
    for seed in range(3):
        latents = noise(1, 4, 5, 3, 4, seed=seed)
        exact = uneven.decode(latents).sample
        for way in errors:
            vae = arrange_autoencoder(half) if way == "fast" else half
            made = vae.decode(latents.to(torch.bfloat16)).sample.float()
            errors[way] += float((made - exact).square().mean().sqrt())
    assert errors["fast"] <= 1.1 * errors["plain"]


def test_gradients_go_through_the_plain_modules(uneven: AutoencoderKLOpenSora) -> None:
    latents = clip_latents(uneven, 2).requires_grad_()
    arrange_autoencoder(uneven).decode(latents).sample.sum().backward()
    assert latents.grad is not None


@pytest.mark.parametrize("change", ["class", "hook", "part"])
def test_an_autoencoder_that_is_not_known_decodes_as_it_is(uneven: AutoencoderKLOpenSora, change: str) -> None:
    class Own(AutoencoderKLOpenSora):
        pass

    class OwnConv(CausalConv3d):
        pass

    vae = AutoencoderKLOpenSora.from_config(uneven.config)
    if change == "class":
        vae = over(Own, vae)
    elif change == "hook":
        vae.decoder.mid_block.register_forward_hook(lambda module, given, made: made / 2)
    else:
        vae.decoder.conv_in = over(OwnConv, vae.decoder.conv_in)
    assert arrange_autoencoder(vae) is vae


def test_parts_that_take_turns_decode_fast_anywhere(tiny_checkpoint: Path) -> None:
    pipe = NovaPipeline.from_pretrained(tiny_checkpoint)
    assert pipe._parts().decoding_vae(True) is pipe.vae
    enable_low_memory(pipe, "cpu")
    assert type(pipe._parts().decoding_vae(True)) is FastOpenSora


def test_parts_cover_the_frames() -> None:
    assert parts_of(17, 94, 300) == [3, 3, 3, 3, 3, 2]
    assert parts_of(17, 1, 300) == [17]
    assert parts_of(5, 1000, 300) == [3, 2]
    assert parts_of(9, 1000, 300) == [3, 2, 2, 2]


KERNELS = """
import torch
from nova_video.autoencoders import AutoencoderKLOpenSora
from nova_video.fast import autoencoder as fast, autoencoder_kernels as kernels

assert kernels.agree(torch.device("cpu"), torch.float16) is None
torch.manual_seed(0)
vae = AutoencoderKLOpenSora(block_out_channels=(16, 16, 32, 32), norm_num_groups=8, layers_per_block=1).eval()
z = torch.randn(1, 4, 2, 2, 3)
with torch.no_grad():
    plain = vae.decoder(z)
    for pieces in (kernels.PIECES, kernels.LIBRARY_PIECES):
        off = ((fast.decode_tile(vae.decoder, z, pieces, values=20_000) - plain).abs().max() / plain.abs().max()).item()
        assert off < 2e-5, off
"""


def test_kernels_give_the_plain_pieces_numbers() -> None:
    """By Triton's interpreter, in a process of its own, since Triton reads the switch when it is imported."""
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-c", KERNELS], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nova_video.fast import autoencoder_kernels as kernels


def compiles(kernel, types, **constants):
    names = kernel.arg_names
    types = {name: types.get(name, "i32") for name in names} | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, types, {(names.index(name),): value for name, value in constants.items()})
    options = {"num_warps": 8, "num_stages": 3}
    assert "sm_90" in triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


block = {"C": 128, "ROWS": 32, "COLUMNS": 128}
half, full = "*fp16", "*fp32"
compiles(kernels._normalise, {"part": half, "scale": full, "shift": full, "out": half}, **block)
compiles(kernels._double, {"x": half, "out": half}, **block)
compiles(kernels._sums, {"x": half, "onto": half, "sums": full}, ADD=True, LOOPS=16, **block)
for inputs, outputs in ((256, 128), (128, 3)):
    tile = kernels.choose_tile(inputs, outputs)
    blocks = [f"tensordesc<fp16[{size},{tile.channels}]>" for size in (tile.rows, tile.columns)]
    types = {"window": blocks[0], "weight": blocks[1], "bias": half, "out": half, "sums": full}
    sizes = {"M": tile.rows, "N": tile.columns, "K": tile.channels}
    compiles(kernels._convolve, types, C=inputs, D=outputs, TAPS=27, KH=3, KW=3, ADD=True, **sizes)
"""


def test_kernels_compile_for_a_gpu() -> None:
    """Which needs none; the interpreter takes more than the compiler does."""
    pytest.importorskip("triton")
    run = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
