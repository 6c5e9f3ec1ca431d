"""FlashAttention 4 behind its operators: shapes, gradients and compiling with a stand-in for its kernels; the real ones
where there are both a GPU and the package."""

import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from nova_video.bench.sample import versions
from nova_video.fast import flash
from nova_video.fast.attention_choice import attend, attend_packed

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same by torch, in the layout of the package."""
    return functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)


def forward(query: Tensor, key: Tensor, value: Tensor, return_lse: bool) -> tuple[Tensor | None, ...]:
    """As `_flash_attn_fwd` answers."""
    assert return_lse
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), scores.logsumexp(-1), None, None, None


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    gradient: Tensor,
    sums: Tensor,
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """As `_flash_attn_bwd` answers, into what it is given."""
    given = [torch.empty_like(x) if to is None else to for x, to in ((query, dq), (key, dk), (value, dv))]
    query, key, value, out, gradient = (x.transpose(1, 2) for x in (query, key, value, out, gradient))
    scale = 1 / math.sqrt(query.shape[-1])
    shares = (query @ key.transpose(-1, -2) * scale - sums.unsqueeze(-1)).exp()
    scores = shares * (gradient @ value.transpose(-1, -2) - (gradient * out).sum(-1, keepdim=True)) * scale
    found = (scores @ key, scores.transpose(-1, -2) @ query, shares.transpose(-1, -2) @ gradient)
    return tuple(to.copy_(x.transpose(1, 2)) for to, x in zip(given, found, strict=True))


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.compiler.reset()
    monkeypatch.setattr(flash, "kernels", lambda: SimpleNamespace(_flash_attn_fwd=forward, _flash_attn_bwd=backward))
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("compiled", [False, True])
def test_results_and_gradients_are_those_of_attention(compiled: bool) -> None:
    ours: Callable[..., Tensor] = flash.attend
    if compiled:
        ours = torch.compile(flash.attend, backend="aot_eager", fullgraph=True, dynamic=True)
    torch.manual_seed(0)
    for queries, keys in ((7, 7), (3, 12), (9, 5)):
        query, packed = torch.randn(2, queries, 4, 16), torch.randn(2, keys, 2, 4, 16)
        leaves = query.requires_grad_(), packed.requires_grad_()
        out, expected = (how(query, *packed.unbind(2)) for how in (ours, plain))
        assert torch.allclose(out, expected, atol=1e-5)
        gradient = torch.randn_like(out)
        for found, right in zip(*(torch.autograd.grad(x, leaves, gradient) for x in (out, expected)), strict=True):
            assert torch.allclose(found, right, atol=1e-5)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("compiled", [False, True])
def test_packed_is_the_same(compiled: bool) -> None:
    ours: Callable[..., Tensor] = flash.attend_packed
    if compiled:
        ours = torch.compile(flash.attend_packed, backend="aot_eager", fullgraph=True, dynamic=True)
    torch.manual_seed(0)
    for count in (7, 12):
        packed = torch.randn(2, count, 3, 4, 16, requires_grad=True)
        out, expected = ours(packed), plain(*packed.unbind(2))
        assert torch.allclose(out, expected, atol=1e-5)
        gradient = torch.randn_like(out)
        found, right = (torch.autograd.grad(x, packed, gradient)[0] for x in (out, expected))
        assert torch.allclose(found, right, atol=1e-5)


@pytest.mark.usefixtures("stand_in")
def test_operators_are_what_they_say() -> None:
    """Shapes, strides and types without data, nothing changed that is not said to be."""
    packed, by_head = torch.randn(2, 6, 3, 2, 8), torch.randn(3, 2, 2, 6, 8)
    for query, key, value in (packed.unbind(2), by_head.transpose(2, 3).unbind(0)):
        torch.library.opcheck(flash.forward, (query, key, value))
        out, sums = flash.forward(query, key, value)
        torch.library.opcheck(flash.backward, (torch.randn_like(out), query, key, value, out, sums))
    torch.library.opcheck(flash.packed_forward, (packed,))
    out, sums = flash.packed_forward(packed)
    torch.library.opcheck(flash.packed_backward, (torch.randn_like(out), packed, out, sums))


def test_not_without_a_gpu_that_it_knows() -> None:
    query = torch.zeros(1, 2, 2, 64, dtype=torch.float16)
    assert not flash.suits(query, query)


def test_kernels_bound_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention 4 is called where it suits and may be taken, also for packed tensors."""
    calls = []
    monkeypatch.setattr(flash, "suits", lambda query, key: True)
    monkeypatch.setattr(flash, "attend", lambda query, key, value: calls.append("apart") or plain(query, key, value))
    monkeypatch.setattr(flash, "attend_packed", lambda packed: calls.append("packed") or plain(*packed.unbind(2)))
    packed = torch.randn(1, 6, 3, 2, 8)
    query, key, value = (x.transpose(1, 2) for x in packed.unbind(2))
    for kernels in ("auto", "cudnn", "flash"):
        out = attend(query, key, value, None, kernels)
        assert torch.allclose(attend_packed(packed, None, kernels), out.transpose(1, 2), atol=1e-6)
    assert calls == ["apart", "packed"]
    assert attend(query, key, value, torch.ones(6, 6) > 0).shape == query.shape
    assert calls == ["apart", "packed"]


@pytest.mark.parametrize("loads", [False, True])
def test_rows_name_what_loads_alone(loads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nova_video.bench.sample.version", lambda name: "4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(flash, "loads", lambda device: loads)
    assert ("flash-attn-4" in versions()) == loads


@gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("head_dim", [32, 64, 96])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gpu_as_near_to_float32_as_torch(dtype: torch.dtype, head_dim: int, compiled: bool) -> None:
    if not flash.is_installed(torch.device("cuda")):
        pytest.skip("needs flash-attn-4 and a GPU that it knows")
    torch.manual_seed(0)
    torch.compiler.reset()
    ours = torch.compile(attend, fullgraph=True, dynamic=True) if compiled else attend
    for queries, keys in ((361, 361), (16, 1800), (128, 384)):
        leaves = [torch.randn(2, 4, n, head_dim, device="cuda", dtype=dtype) for n in (queries, keys, keys)]
        gradient = torch.randn_like(leaves[0])

        def results(how: Callable[..., Tensor], inputs: list[Tensor], gradient: Tensor = gradient) -> list[Tensor]:
            inputs = [x.detach().requires_grad_() for x in inputs]
            out = how(*inputs)
            return [out.detach(), *torch.autograd.grad(out, inputs, gradient.to(out.dtype))]

        exact = results(functional.scaled_dot_product_attention, [x.double() for x in leaves])
        torch_s = results(functional.scaled_dot_product_attention, leaves)
        found = results(lambda q, k, v: ours(q, k, v, None), leaves)
        for right, one, other in zip(exact, torch_s, found, strict=True):
            assert (other - right).norm() <= 1.5 * (one - right).norm()


@gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gpu_packed_is_the_same(dtype: torch.dtype, compiled: bool) -> None:
    """Results are; gradients of queries are added up in any order."""
    if not flash.is_installed(torch.device("cuda")):
        pytest.skip("needs flash-attn-4 and a GPU that it knows")
    torch.manual_seed(0)
    torch.compiler.reset()
    ours = torch.compile(attend_packed, fullgraph=True, dynamic=True) if compiled else attend_packed
    for count in (361, 1024, 1800):
        packed = torch.randn(2, count, 3, 4, 64, device="cuda", dtype=dtype, requires_grad=True)
        out, expected = ours(packed, None), flash.attend(*packed.unbind(2))
        assert torch.equal(out, expected)
        gradient = torch.randn_like(out)
        found, right = (torch.autograd.grad(x, packed, gradient)[0] for x in (out, expected))
        assert (found - right).norm() <= 2e-3 * right.norm()
