"""The kernel of the blocks' layer norm: in Triton's interpreter, and on a GPU where there is one."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import nova_video.fast
from nova_video.fast.arrange import over
from nova_video.fast.blocks import FastDenoiserBlock
from nova_video.fast.norm import norm_of
from nova_video.model.denoiser import DenoiserBlock

INTERPRETED = """
import torch
from torch.nn import functional
from nova_video.fast.norm_kernel import STAGES, TOGETHER, norm_backward_kernel

torch.manual_seed(0)
each = 8 * TOGETHER
for rows, columns, biased in ((2 * each + 5, 24, True), (3, 32, True), (each, 17, False)):
    for dtype in (torch.float32, torch.float16):
        x = (0.5 + 2 * torch.randn(rows, columns)).to(dtype)
        given, bias, weight = torch.randn_like(x), torch.randn(columns), 1 + torch.randn(columns)
        programs = -(-rows // each)
        to_x, parts = torch.empty_like(x), torch.full((programs, 3, columns), torch.nan)
        sizes = rows, each, columns, 1e-5, biased, 32, TOGETHER, STAGES
        norm_backward_kernel[(programs,)](x, bias, weight, given, to_x, parts, *sizes)
        before = (biased * bias.double()).requires_grad_()
        shift = torch.zeros(columns, dtype=torch.float64, requires_grad=True)
        exact, scale = x.double().requires_grad_(), weight.double().requires_grad_()
        functional.layer_norm(exact + before, (columns,), scale, shift, 1e-5).backward(given.double())
        rounding = 1e-5 if dtype == torch.float32 else 4e-3
        off = (to_x - exact.grad).abs()
        assert (off <= rounding * (1 + exact.grad.abs())).all(), off.max()
        off = (parts.sum(0) - torch.stack([before.grad, scale.grad, shift.grad])).abs()  # not of what was rounded
        assert (off <= 1e-4).all(), off.max()
"""


def test_the_kernel_is_exact() -> None:
    """By Triton's interpreter, in a process of its own, since Triton reads the switch when it is imported."""
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def reference(x: Tensor, bias: Tensor | None, weight: Tensor, to_out: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """What the kernel gives, of one part, by torch."""
    before, given = x.float() if bias is None else x.float() + bias.float(), to_out.float()
    slope = (before.var(-1, correction=0, keepdim=True) + eps).rsqrt()
    normal, scaled = (before - before.mean(-1, keepdim=True)) * slope, given * weight.float()
    to_x = (scaled - scaled.mean(-1, keepdim=True) - normal * (scaled * normal).mean(-1, keepdim=True)) * slope
    sums = [value.flatten(0, -2).sum(0) for value in (to_x, given * normal, given)]
    return to_x.to(x.dtype), torch.stack(sums).unsqueeze(0)


def plain(norm: nn.Module, linear: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = norm(linear(x))
    return out


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("frozen", [(), ("1.bias",), ("1.weight", "0.weight"), ("0.weight", "0.bias")])
def test_gradients_come_from_the_kernel(half: bool, frozen: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """In compiled blocks: of the layer's bias too, under autocast, and where some weights do not learn."""
    kernels = SimpleNamespace(norm_backward=reference)
    monkeypatch.setitem(sys.modules, "nova_video.fast.norm_kernel", kernels)
    monkeypatch.setattr(nova_video.fast, "norm_kernel", kernels, raising=False)
    monkeypatch.setattr("nova_video.fast.norm.takes_kernels", lambda x: torch.compiler.is_compiling())
    torch.compiler.reset()
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(24, 32), nn.LayerNorm(32))
    for name, weight in layers.named_parameters():
        nn.init.normal_(weight)
        weight.requires_grad_(name not in frozen)
    compiled = torch.compile(norm_of, backend="aot_eager", fullgraph=True, dynamic=True)
    for shape in ((2, 7, 24), (3, 5, 24)):
        x, given = torch.randn(shape), torch.randn(*shape[:2], 32)
        found = []
        for call in (compiled, plain):
            leaf = x.clone().requires_grad_()
            layers.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                out = call(layers[1], layers[0], leaf)
                out.backward(given.to(out.dtype))
            found.append([out.float(), leaf.grad, *(weight.grad for weight in layers.parameters())])
        for ours, theirs in zip(*found, strict=True):
            assert (ours is None) == (theirs is None)
            if theirs is not None:
                assert ours.dtype == theirs.dtype
                assert (ours - theirs).norm() <= (1e-2 if half else 1e-5) * theirs.norm()


def denoiser_gradients(block: DenoiserBlock, compiled: bool, half: bool, shape: tuple[int, ...]) -> list[Tensor]:
    """Of a block's output, by what it is given and by its weights."""
    device = block.norm2.weight.device
    torch.manual_seed(1)
    leaves = [torch.randn(shape, device=device, requires_grad=True) for _ in range(2)]
    given = torch.randn(shape, device=device)
    block.zero_grad()
    call = torch.compile(
        over(FastDenoiserBlock, block),
        backend="inductor" if device.type == "cuda" else "aot_eager",
        fullgraph=True,
        dynamic=True,
    )
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        x, active = (leaf.to(torch.bfloat16) if half else leaf for leaf in leaves)
        out = (call if compiled else block)(x, active)
    out.backward(given.to(out.dtype))
    found = [out.float(), *(leaf.grad for leaf in leaves), *(weight.grad for weight in block.parameters())]
    assert all(isinstance(value, Tensor) for value in found)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("half", [False, True])
def test_gradients_of_the_denoiser(half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By our formulas, in compiled blocks, as by autograd."""
    monkeypatch.setattr("nova_video.fast.norm.takes_kernels", lambda x: torch.compiler.is_compiling())
    torch.compiler.reset()
    torch.manual_seed(0)
    block = DenoiserBlock(32)
    for weight in block.parameters():
        nn.init.normal_(weight, std=0.3)
    for shape in ((2, 7, 32), (3, 5, 32)):
        exact = denoiser_gradients(block, False, False, shape)
        ours, theirs = (denoiser_gradients(block, compiled, half, shape) for compiled in (True, False))
        for by_us, by_torch, right in zip(ours, theirs, exact, strict=True):
            assert by_us.dtype == by_torch.dtype
            off, allowed = (by_us - right).norm(), (by_torch - right).norm()
            assert off <= (1.2 * allowed + 1e-3 * right.norm() if half else 1e-5 * right.norm())


def test_elsewhere_it_is_torch_s() -> None:
    x, linear, norm = torch.randn(5, 7), nn.Linear(7, 9), nn.LayerNorm(9)
    torch.compiler.reset()
    compiled = torch.compile(norm_of, backend="eager", fullgraph=True)
    assert torch.equal(norm_of(norm, linear, x), norm(linear(x)))
    assert torch.equal(compiled(norm, linear, x), norm(linear(x)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_gradients_of_the_denoiser() -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    block = DenoiserBlock(1024).cuda()
    for shape in ((2, 700, 1024), (3, 43, 1024)):
        exact = denoiser_gradients(block, False, False, shape)
        ours, theirs = (denoiser_gradients(block, compiled, True, shape) for compiled in (True, False))
        for by_us, by_torch, right in zip(ours, theirs, exact, strict=True):
            assert (by_us - right).norm() <= 1.2 * (by_torch - right).norm() + 1e-3 * right.norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("width", [768, 1024, 1536])
def test_gpu_gradients_of_compiled_blocks(width: int) -> None:
    """Under autocast, near to those in float32; without, as they are."""
    torch.manual_seed(0)
    torch.compiler.reset()
    layers = nn.Sequential(nn.Linear(256, width), nn.LayerNorm(width)).cuda()
    compiled = torch.compile(norm_of, fullgraph=True, dynamic=True)
    for shape in ((2, 700, 256), (3, 43, 256)):
        x, given = torch.randn(shape, device="cuda"), torch.randn(*shape[:2], width, device="cuda")
        for half in (False, True):
            found = []
            for call in (compiled, plain):
                layers.zero_grad()
                with torch.autocast("cuda", torch.bfloat16, enabled=half and call is compiled):
                    out = call(layers[1], layers[0], x)
                    out.backward(given.to(out.dtype))
                found.append([out, *(weight.grad for weight in layers.parameters())])
            for ours, exact in zip(*found, strict=True):
                assert (ours - exact).norm() <= (1e-2 if half else 1e-3) * exact.norm()
