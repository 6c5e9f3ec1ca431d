"""Linear layers as compiled blocks are trained with them on a GPU, here by the way that CPUs take in the same code."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from nova_video.fast.linear import apply_apart, apply_linear


def whole(linear: nn.Module, x: Tensor) -> Tensor:
    return apply_linear(linear, x)


def apart(linear: nn.Module, x: Tensor) -> Tensor:
    """The bias is added behind the layer, as kernels do."""
    out, bias = apply_apart(linear, x)
    return out if bias is None else (out + bias).to(out.dtype)


@pytest.mark.parametrize("call", [whole, apart])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("frozen", [(), ("bias",), ("weight",)])
def test_gradients(
    call: Callable[[nn.Module, Tensor], Tensor], half: bool, frozen: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the layer, also under autocast and where some of it does not learn."""
    monkeypatch.setattr("nova_video.fast.linear.takes_kernels", lambda x: torch.compiler.is_compiling())
    torch.compiler.reset()
    torch.manual_seed(0)
    linear = nn.Linear(24, 32)
    for name, weight in linear.named_parameters():
        weight.requires_grad_(name not in frozen)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True)
    for shape in ((2, 7, 24), (3, 5, 24)):
        x, given = torch.randn(shape), torch.randn(*shape[:2], 32)
        found = []
        for apply in (lambda linear, x: compiled(linear, x), lambda linear, x: linear(x)):
            leaf = x.clone().requires_grad_()
            linear.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                out = apply(linear, leaf)
            out.backward(given.to(out.dtype))
            found.append([out, leaf.grad, *(weight.grad for weight in linear.parameters())])
        for ours, theirs in zip(*found, strict=True):
            assert (ours is None) == (theirs is None)
            if theirs is not None:
                assert ours.dtype == theirs.dtype
                assert (ours - theirs).norm() <= (1e-2 if half else 1e-5) * theirs.norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_gradients_are_summed_up_in_float32() -> None:
    """Under autocast that of a weight is nearer to the exact one of what was multiplied than one in bf16 can be."""
    torch.manual_seed(0)
    torch.compiler.reset()
    linear = nn.Linear(256, 512, device="cuda")
    compiled = torch.compile(apply_linear, fullgraph=True, dynamic=True)
    x, given = (torch.randn(3, 700, width, device="cuda", dtype=torch.bfloat16) for width in (256, 512))
    with torch.autocast("cuda", torch.bfloat16):
        out = compiled(linear, x)
    out.backward(given)
    exact = given.flatten(0, 1).double().t() @ x.flatten(0, 1).double()
    assert linear.weight.grad is not None
    assert (linear.weight.grad - exact).norm() <= 0.1 * (exact.to(torch.bfloat16) - exact).norm()
