"""Measuring: floors against other ways to count, rows on disk, the command, and tables that say what the rows say."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from conftest import CONFORMANCE
from nova_video.benchmarks.configs import SIZES, TEXT_DIM, build, resized
from nova_video.benchmarks.floor import RATES, Floor, count_work, device_rates, floor_of, temporal_steps
from nova_video.errors import InputError
from nova_video.pipeline import NovaPipeline
from nova_video.request import GenerateRequest

H200 = RATES["H200"]


def floor_of_size(name: str, batch: int = 1) -> Floor:
    pipe = build(SIZES[name], torch.device("meta"), torch.float16)
    request = GenerateRequest(prompt_embeds=[torch.zeros(20, TEXT_DIM)] * batch)
    return floor_of(count_work(pipe.transformer, request.resolve(pipe.defaults, pipe.capabilities)), H200)


@pytest.mark.parametrize(
    ("name", "seconds"),
    [("t2i-512-0.6b", 0.15), ("t2i-1024-0.6b", 0.86), ("t2i-1024-1.4b", 1.8), ("t2v-480-0.6b", 2.0)],
)
def test_floors_are_those_known(name: str, seconds: float) -> None:
    """To within 6%: how the known ones, of two digits, were counted is not recorded."""
    floor = floor_of_size(name)
    assert floor.by_flops == pytest.approx(seconds, rel=0.06)
    assert floor.seconds == floor.by_flops > floor.by_bytes > 0


def test_floor_of_a_batch() -> None:
    one, eight = floor_of_size("t2i-1024-0.6b"), floor_of_size("t2i-1024-0.6b", batch=8)
    assert eight.by_flops == pytest.approx(8 * one.by_flops)
    assert eight.by_bytes < 1.1 * one.by_bytes  # the weights are read once for all


def test_released_video_size() -> None:
    """Built from shapes alone, with as many values as the released files hold."""
    pipe = build(SIZES["t2v-480-0.6b"], torch.device("meta"), torch.float16)
    assert sum(weight.numel() for weight in pipe.transformer.parameters()) == pytest.approx(645.5e6, abs=0.05e6)
    assert sum(weight.numel() for weight in pipe.vae.parameters()) == 239_189_991


def test_another_size_keeps_the_model() -> None:
    pipe = build(resized(SIZES["t2i-512-0.6b"], 256, 320), torch.device("meta"), torch.float16)
    assert pipe.capabilities.image_size == (256, 320)
    with pytest.raises(InputError, match="multiples of 32"):
        resized(SIZES["t2i-512-0.6b"], 250, 320)


@pytest.mark.parametrize("name", ["text-to-image", "text-to-video", "rotary-flow"])
def test_operations_are_those_torch_counts(name: str) -> None:
    """All of a call, but for the time embeddings, which the sampler may compute once or for every token."""
    pipe = NovaPipeline.from_pretrained(CONFORMANCE / name)
    pipe.set_progress_bar_config(disable=True)
    config, frames = pipe.transformer.config, 9 if pipe.capabilities.video else 1
    features = [torch.zeros(3, config.text_token_dim)] * 2
    request = GenerateRequest(
        prompt_embeds=features, num_frames=frames, num_inference_steps=3, num_diffusion_steps=2, output_type="latent"
    )
    work = count_work(pipe.transformer, request.resolve(pipe.defaults, pipe.capabilities))
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        pipe.generate(request, torch.Generator().manual_seed(0))
    assert counter.get_total_flops() == pytest.approx(sum(work.flops.values()), rel=0.05)


def test_bounded_context_is_encoded_anew() -> None:
    pipe = build(SIZES["t2v-480-0.6b"], torch.device("meta"), torch.float16)
    embeds = [torch.zeros(20, TEXT_DIM)]
    plan = GenerateRequest(prompt_embeds=embeds, num_frames=25, context_frames=13).resolve(
        pipe.defaults, pipe.capabilities
    )
    whole = GenerateRequest(prompt_embeds=embeds, num_frames=25).resolve(pipe.defaults, pipe.capabilities)
    assert [keys for _, keys in temporal_steps(whole, 10, 5)] == [15, 25, 35, 45, 55, 65, 75]
    assert [queries for queries, _ in temporal_steps(whole, 10, 5)] == [15, 10, 10, 10, 10, 10, 10]
    assert [keys for _, keys in temporal_steps(plan, 10, 5)] == [15, 25, 35, 45, 45, 45, 45]
    assert [queries for queries, _ in temporal_steps(plan, 10, 5)] == [15, 10, 10, 10, 45, 45, 45]


def test_rates_are_of_known_devices() -> None:
    assert device_rates("NVIDIA H200", torch.float16) is device_rates("NVIDIA H200", torch.bfloat16) is H200
    assert device_rates("NVIDIA H200", torch.float32) is None
    assert device_rates("cpu (x86_64)", torch.float16) is None
