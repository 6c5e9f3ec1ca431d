"""Attention and captured training steps on a GPU: finite, as near as torch's own, the best kernels where they suit."""
# ruff: noqa: F401, F811  (fixtures of other files are arguments here)

import dataclasses
import itertools
import unittest.mock
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from nova_video.bench.configs import fill_zeros
from nova_video.bench.train import (
    OPTIMIZER,
    GivenTask,
    TrainedModel,
)
from nova_video.common.checks import AttentionKernels
from nova_video.fast import attention_choice as fast_attention
from nova_video.fast import flash
from nova_video.fast.arrange import over
from nova_video.fast.blocks import FastAttention
from nova_video.model import NOVATransformer3DModel
from nova_video.model.vit import Attention
from nova_video.sampling.schedulers import new_scheduler
from nova_video.training.checkpoint import Average
from nova_video.training.processes import Processes
from nova_video.training.recipe import DatasetTransformerRecipe
from nova_video.training.stepper import Stepper, make_optimizer, set_kernels
from nova_video.training.transformer_task import Batch, Variant
from test_bench_train import gpu, said


@pytest.fixture
def kernels() -> Iterator[None]:
    """Puts back how torch multiplies."""
    before = torch.get_float32_matmul_precision()
    set_kernels()
    yield
    torch.set_float32_matmul_precision(before)


def kernel_names(work: Callable[[], Any]) -> str:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    return " ".join(event.key for event in profile.key_averages())


LENGTHS = [(361, 361), (384, 384), (393, 393), (1280, 1280), (1800, 1800), (1280, 870)]
"""Keys and queries: of clips at 768x480 and of pictures of 512 px, with some numbers of revealed tokens."""


def results(module: Attention, keys: int, queries: int, half: bool = True, batch: int = 4) -> dict[str, torch.Tensor]:
    """What comes out and all gradients, of inputs that are the same every time."""
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (batch, keys, module.proj.in_features)
    x = torch.randn(shape, generator=generator, device="cuda").requires_grad_()
    rows = None
    if queries < keys:
        rows = torch.rand(shape[:2], generator=generator, device="cuda").argsort(1)[:, :queries]
    module.zero_grad()
    with torch.autocast("cuda", torch.bfloat16, enabled=half):
        out = module(x, None, None, None, rows)
    out.backward(torch.randn(out.shape, generator=generator, device="cuda").to(out.dtype))
    assert x.grad is not None
    return {"out": out.detach(), "x": x.grad, **{name: p.grad for name, p in module.named_parameters()}}


def fill_memory_with_nan() -> None:
    """What is allocated next lies in NaN, and what follows it in memory is NaN."""
    torch.cuda.empty_cache()
    for count, size in ((1, 2**29), (256, 2**17)):  # 1 GiB for large tensors, 64 MiB for small ones
        held = [torch.full((size,), torch.nan, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
        del held


def not_finite(module: Attention, keys: int, queries: int, batch: int = 4) -> list[str]:
    """Which of the results are not, in such memory: of three tries."""
    found = set()
    for _ in range(3):
        fill_memory_with_nan()
        made = results(module, keys, queries, batch=batch)
        found |= {name for name, value in made.items() if not value.isfinite().all()}
    return sorted(found)


def report_nan_of_cudnn() -> None:
    """Prints where cuDNN's attention gives NaN, if it may be taken at all lengths: a check of the reason for
    `suits_cudnn`. On a GPU, in this folder: python -c "import test_bench_train as t; t.report_nan_of_cudnn()"."""

    def anything(*_: Any) -> bool:
        return True

    with unittest.mock.patch("nova_video.fast.attention_choice.suits_cudnn", anything):
        set_kernels()
        for head_dim, compiled, batch in itertools.product((64, 96), (False, True), (4, 27)):
            torch.compiler.reset()
            module = over(FastAttention, Attention(2 * head_dim, 2).cuda(), kernels="cudnn")
            if compiled:
                module.compile(dynamic=True)
            for keys, queries in [*LENGTHS, (1281, 1280), (1281, 896), (1280, 1280 - 8)]:
                cudnn = "cudnn" in kernel_names(lambda: results(module, keys, queries, batch=batch))  # noqa: B023
                found = ", ".join(not_finite(module, keys, queries, batch)) or "-"
                how = f"heads of {head_dim}, batch {batch}, {'compiled' if compiled else 'eager'}"
                print(f"{how}, {queries} queries, {keys} keys: cuDNN {cudnn}, not finite: {found}", flush=True)


@gpu
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("head_dim", [64, 96])
@pytest.mark.parametrize("attention", ["auto", "cudnn"])
def test_gpu_attention_does_not_read_what_lies_behind_it(
    attention: AttentionKernels, head_dim: int, compiled: bool
) -> None:
    module = over(FastAttention, Attention(2 * head_dim, 2).cuda(), kernels=attention)
    if compiled:
        module.compile(dynamic=True)
    found = {lengths: not_finite(module, *lengths) for lengths in LENGTHS}
    assert not any(found.values()), found


@gpu
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("head_dim", [64, 96])
def test_gpu_gradients_of_all_attentions_are_as_near(head_dim: int) -> None:
    """To those of float32; and the best kernels are taken where they suit."""
    torch.manual_seed(0)
    plain = Attention(2 * head_dim, 2).cuda()
    errors: dict[AttentionKernels, list[float]] = {"flash": [], "cudnn": [], "auto": []}
    for attention, (keys, queries) in itertools.product(errors, LENGTHS):
        torch.set_float32_matmul_precision("high")
        module = over(FastAttention, plain, kernels=attention)
        found = results(module, keys, queries)
        names = kernel_names(lambda: results(module, keys, queries))  # noqa: B023
        torch.set_float32_matmul_precision("highest")
        expected = results(module, keys, queries, half=False)
        errors[attention].append(max(distance(found[name], expected[name]) for name in expected))
        if torch.cuda.get_device_capability() == (9, 0):
            flash4 = flash.is_installed(torch.device("cuda"))
            whole = keys % 128 == queries % 128 == 0
            assert ("cutlass_kernel_flash_attn" in names) == flash4, (keys, queries, names)
            assert ("cudnn" in names) == (attention != "flash" and not flash4 and whole), (keys, queries, names)
    for least, *others in zip(*errors.values(), strict=True):
        assert max(others) <= 1.5 * least, errors


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative."""
    return ((found.float() - expected).norm() / expected.norm()).item()


class DrawnTask(GivenTask):
    """Another batch every time, as of a dataset."""

    def draw(self, variant: Variant, micro: int) -> Batch:
        return dataclasses.replace(self.given, latents=torch.randn_like(self.given.latents))


@gpu
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("attention", ["flash", "cudnn", "auto"])
def test_gpu_graphs_equal_plain_steps(
    attention: Any, frames: int, said: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On batches that are drawn outside of them: the same losses, within rounding, and none that is not finite."""
    monkeypatch.setattr(fast_attention, "chooses_flex", lambda *_: False)  # flex attention would be compiled
    fast_attention.temporal_mask.cache_clear()
    default = DatasetTransformerRecipe()
    batch = dataclasses.replace(default.dataset, batch=2)
    recipe = dataclasses.replace(default, attention=attention, optimizer=OPTIMIZER, dataset=batch)
    device = torch.device("cuda")

    def steps(graph: bool) -> list[dict[str, float]]:
        torch.manual_seed(0)
        model = NOVATransformer3DModel(
            image_size=(256, 512),
            text_token_dim=64,
            text_token_len=126 if frames > 1 else 128,
            image_base_size=(16, 32),
            video_base_size=(frames, 8, 16),
            arch=("vit_d1w768", "vit_d3w768", "mlp_d1w768"),  # heads of 64 channels
        )
        fill_zeros(model)
        asked = dataclasses.replace(recipe, cuda_graph=graph)
        processes = Processes(asked)
        set_kernels()
        task = DrawnTask(asked, TrainedModel(model, new_scheduler("ddpm"), frames, (32, 64)), device)
        optimizer = make_optimizer(task.model, asked.optimizer, device)
        average = Average(task.model, asked.optimizer.ema)
        stepper = Stepper(task, processes.spread(task), optimizer, average, asked, processes, [0])
        found = []
        for number in range(9):
            stepper.step(number, Variant(task.grid, (13, 128, 77)[number % 3]))
            found.append(stepper.numbers())
        assert (stepper.graphs is not None) == graph
        assert stepper.graphs is None or len(stepper.graphs) == 3, said.text
        return found

    plain, captured = steps(False), steps(True)
    for one, other in zip(plain, captured, strict=True):
        assert "skipped_steps" not in other, (plain, captured)
        assert other["loss"] == pytest.approx(one["loss"], rel=2e-3)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=5e-2)
