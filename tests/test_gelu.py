"""The kernels of GELU: in Triton's interpreter, and on a GPU where there is one."""

import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional

from nova_video.model.gelu import gelu

INTERPRETED = """
import torch
from torch.nn import functional
from nova_video.model.gelu_kernel import BLOCK, gelu_backward_kernel, gelu_kernel

torch.manual_seed(0)
numbers = torch.cat([3 * torch.randn(3, 1700).flatten(), torch.tensor([0.0, -0.0, 1e-6, -30.0, 30.0, 1e4, -1e4])])
for x in (numbers, numbers.half()):
    given, out, to_x = torch.randn_like(x), torch.empty_like(x), torch.empty_like(x)
    grid = (-(-x.numel() // BLOCK),)
    gelu_kernel[grid](x, out, x.numel(), BLOCK)
    gelu_backward_kernel[grid](x, given, to_x, x.numel(), BLOCK)
    exact = x.double().requires_grad_()
    result = functional.gelu(exact)
    result.backward(given.double())
    rounding = 2e-7 if x.dtype == torch.float32 else 1e-3
    off = (out - result).abs()
    assert (off <= rounding * x.abs().clamp(min=1)).all(), off.max()
    off = (to_x - exact.grad).abs()
    assert (off <= 2 * rounding * given.abs().clamp(min=1)).all(), off.max()
"""


def test_the_kernels_are_exact() -> None:
    """By Triton's interpreter, in a process of its own, since Triton reads the switch when it is imported."""
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_elsewhere_it_is_torch_s() -> None:
    x = torch.randn(5, 7)
    assert torch.equal(gelu(x), functional.gelu(x))
    torch.compiler.reset()
    compiled = torch.compile(gelu, backend="eager", fullgraph=True)
    with torch.inference_mode():
        assert torch.equal(compiled(x), functional.gelu(x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gpu_of_compiled_blocks(dtype: torch.dtype) -> None:
    """As near to float64 as rounding its result is."""
    torch.compiler.reset()
    compiled = torch.compile(gelu, fullgraph=True, dynamic=True)
    for rows in (3, 700, 1801):
        x = 3 * torch.randn(rows, 4096, device="cuda").to(dtype)
        with torch.inference_mode():
            found, exact = compiled(x), functional.gelu(x.double())
        assert (found - exact).norm() <= 1.01 * (exact.to(dtype) - exact).norm() + 1e-6 * exact.norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gpu_gradients_of_compiled_blocks(dtype: torch.dtype) -> None:
    torch.compiler.reset()
    compiled = torch.compile(gelu, fullgraph=True, dynamic=True)
    for rows in (3, 700, 1801):
        x = 3 * torch.randn(rows, 4096, device="cuda").to(dtype)
        given = torch.randn_like(x)
        leaf, exact = x.clone().requires_grad_(), x.double().requires_grad_()
        compiled(leaf).backward(given)
        functional.gelu(exact).backward(given.double())
        rounded = (exact.grad.to(dtype) - exact.grad).norm()
        assert (leaf.grad - exact.grad).norm() <= 1.01 * rounded + 1e-6 * exact.grad.norm()
