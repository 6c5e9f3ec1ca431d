"""The kernels of GELU: in Triton's interpreter, and on a GPU where there is one."""

import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional

from nova_video.fast.gelu import gelu_of

INTERPRETED = """
import torch
from torch.nn import functional
from nova_video.fast import gelu_kernel as kernels

torch.manual_seed(0)
numbers = 3 * torch.randn(150, 700)  # parts of programs' rows and columns
numbers[5, :7] = torch.tensor([0.0, -0.0, 1e-6, -30.0, 30.0, 1e4, -1e4])
bias = torch.randn(700)
bias[:7] = 0
for x, biased in ((numbers, False), (numbers, True), (numbers.half(), True)):
    given, out, to_x = torch.randn_like(x), torch.empty_like(x), torch.empty_like(x)
    rows, columns = x.shape
    across = -(-columns // kernels.COLUMNS)
    sizes = biased, kernels.COLUMNS, kernels.TOGETHER
    kernels.gelu_kernel[(-(-rows // kernels.TOGETHER), across)](x, bias, out, rows, columns, *sizes)
    each = 16 * kernels.TOGETHER_BACK
    across = -(-columns // kernels.COLUMNS_BACK)
    sums = torch.full((-(-rows // each), columns), torch.nan)
    sizes = rows, each, columns, biased, kernels.COLUMNS_BACK, kernels.TOGETHER_BACK, kernels.STAGES
    kernels.gelu_backward_kernel[(len(sums), across)](x, bias, given, to_x, sums, *sizes)
    exact = (x.float() + biased * bias).double().requires_grad_()
    result = functional.gelu(exact)
    result.backward(given.double())
    rounding = 2e-7 if x.dtype == torch.float32 else 1e-3
    off = (out - result).abs()
    assert (off <= rounding * exact.abs().clamp(min=1)).all(), off.max()
    off = (to_x - exact.grad).abs()
    assert (off <= 2 * rounding * given.abs().clamp(min=1)).all(), off.max()
    assert torch.allclose(sums.sum(0).double(), exact.grad.sum(0), rtol=1e-4, atol=1e-4)  # not of what was rounded
"""


def test_the_kernels_are_exact() -> None:
    """By Triton's interpreter, in a process of its own, since Triton reads the switch when it is imported."""
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_elsewhere_it_is_torch_s() -> None:
    x, linear = torch.randn(5, 7), torch.nn.Linear(7, 9)
    torch.compiler.reset()
    compiled = torch.compile(gelu_of, backend="eager", fullgraph=True)
    with torch.inference_mode():
        assert torch.equal(gelu_of(linear, x), functional.gelu(linear(x)))
        assert torch.equal(compiled(linear, x), functional.gelu(linear(x)))


class Handed(torch.nn.Module):
    """Like a layer that adapters have wrapped: any but a plain linear one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gpu_of_compiled_blocks(dtype: torch.dtype) -> None:
    """As near to float64 as rounding its result is."""
    torch.compiler.reset()
    compiled = torch.compile(gelu_of, fullgraph=True, dynamic=True)
    for rows in (3, 700, 1801):
        x = 3 * torch.randn(rows, 4096, device="cuda").to(dtype)
        with torch.inference_mode():
            found, exact = compiled(Handed(), x), functional.gelu(x.double())
        assert (found - exact).norm() <= 1.01 * (exact.to(dtype) - exact).norm() + 1e-6 * exact.norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gpu_gradients_of_compiled_blocks(dtype: torch.dtype) -> None:
    torch.compiler.reset()
    compiled = torch.compile(gelu_of, fullgraph=True, dynamic=True)
    for rows in (3, 700, 1801):
        x = 3 * torch.randn(rows, 4096, device="cuda").to(dtype)
        given = torch.randn_like(x)
        leaf, exact = x.clone().requires_grad_(), x.double().requires_grad_()
        compiled(Handed(), leaf).backward(given)
        functional.gelu(exact).backward(given.double())
        rounded = (exact.grad.to(dtype) - exact.grad).norm()
        assert (leaf.grad - exact.grad).norm() <= 1.01 * rounded + 1e-6 * exact.grad.norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_gradients_of_the_layer_before() -> None:
    """Of its bias too, which the kernel sums up; in any shape, with weights in float32 under autocast."""
    torch.manual_seed(0)
    torch.compiler.reset()
    linear = torch.nn.Linear(256, 1024, device="cuda")
    compiled = torch.compile(gelu_of, fullgraph=True, dynamic=True)
    for shape in ((2, 700, 256), (3, 43, 256)):
        x, given = torch.randn(shape, device="cuda"), torch.randn(*shape[:2], 1024, device="cuda")
        found = []
        for call in (compiled, lambda linear, x: functional.gelu(linear(x))):
            linear.zero_grad()
            with torch.autocast("cuda", torch.bfloat16, enabled=call is compiled):
                call(linear, x).backward(given.to(torch.bfloat16 if call is compiled else torch.float32))
            found.append([linear.weight.grad.clone(), linear.bias.grad.clone()])
        for half, exact in zip(*found, strict=True):
            assert half.dtype == torch.float32
            assert (half - exact).norm() <= 1e-2 * exact.norm()
