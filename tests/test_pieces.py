"""What blocks compute between their products: the kernels in Triton's interpreter, and on a GPU where there is one."""

import copy
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch.nn import functional

from nova_video.model.pieces import add_norm, gelu

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

INTERPRETED = """
import torch
from torch.nn import functional
from nova_video.model.pieces import add_norm_by_kernel, gelu_by_kernel

torch.manual_seed(0)
x = torch.cat([3 * torch.randn(3, 1700).flatten(), torch.tensor([0.0, -0.0, 1e-6, -30.0, 30.0, 1e4, -1e4])])
off = (gelu_by_kernel(x) - functional.gelu(x.double())).abs()
assert (off <= 2e-7 * x.abs().clamp(min=1)).all(), off.max()
assert gelu_by_kernel(x.half().view(-1, 1)).dtype == torch.float16

for width in (48, 64, 96):
    x, branch = torch.randn(2, 3, width), 5 + torch.randn(3, 2, width).transpose(0, 1)
    weight, bias = torch.randn(2, width)
    exact = x.double() + functional.layer_norm(branch.double(), (width,), weight.double(), bias.double())
    off = (add_norm_by_kernel(x, branch, weight, bias, 1e-5) - exact).abs().max()
    assert off < 5e-6, off
    assert add_norm_by_kernel(x.half(), branch.half(), weight.half(), bias.half(), 1e-5).dtype == torch.float16
"""


def test_kernels_are_exact() -> None:
    """By Triton's interpreter, in a process of its own, since Triton reads the switch when it is imported."""
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_elsewhere_they_are_torch_s() -> None:
    norm, x, branch = torch.nn.LayerNorm(7), torch.randn(1, 5, 7), torch.randn(1, 5, 7)
    assert torch.equal(gelu(x), functional.gelu(x))
    assert torch.equal(add_norm(x, branch, norm), x + norm(branch))
    torch.compiler.reset()
    compiled = torch.compile(lambda x: add_norm(x, gelu(x), norm), backend="eager", fullgraph=True)
    with torch.inference_mode():
        assert torch.equal(compiled(x), x + norm(functional.gelu(x)))


@gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gpu_pieces_of_compiled_blocks(dtype: torch.dtype) -> None:
    """As near to float64 as rounding its result is."""
    torch.compiler.reset()
    for width in (768, 1024, 1536):
        norm = torch.nn.LayerNorm(width, device="cuda", dtype=dtype)
        torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
        exact_norm = copy.deepcopy(norm).double()
        ours = [torch.compile(how, fullgraph=True, dynamic=True) for how in (gelu, partial(add_norm, norm=norm))]
        for rows in (3, 700, 1801):
            x, branch = (3 * torch.randn(1, rows, width, device="cuda").to(dtype) for _ in range(2))
            with torch.inference_mode():
                found = ours[0](x), ours[1](x, branch)
                exact = functional.gelu(x.double()), x.double() + exact_norm(branch.double())
            for one, right in zip(found, exact, strict=True):
                rounding = (right.to(dtype) - right).norm()
                assert (one - right).norm() <= 1.01 * rounding + 1e-6 * right.norm()
