"""How training computes blocks and masks, and what of a loss is told apart: the same numbers in every arrangement."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import free_symbols
from torch.nn.attention.flex_attention import BlockMask, create_mask

from nova_video.model import NOVATransformer3DModel, Positions
from nova_video.model.attention import (
    attend,
    attend_without_cudnn,
    block_causal_mask,
    flex_block_causal_mask,
    suits_cudnn,
)
from nova_video.model.transformer import ApplyBlock
from nova_video.model.vit import Block
from nova_video.training import blocks
from nova_video.training.blocks import TemporalMasks, checkpointed, chooses_flex, compile_blocks, why_not_flex
from nova_video.training.loss import (
    LossDraws,
    NoiseTable,
    draw,
    draw_per_sample,
    losses,
    visible_tokens,
)

CONFORMANCE = Path(__file__).parent / "conformance"
CPU = torch.device("cpu")
GRID = (8, 12)
TOKENS, VALUES = 24, 16
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="flex attention has no backward on a CPU")


@pytest.fixture(scope="module", params=["rotary-flow", "text-to-video"])
def model(request: pytest.FixtureRequest) -> NOVATransformer3DModel:
    model: NOVATransformer3DModel = NOVATransformer3DModel.from_pretrained(CONFORMANCE / request.param / "transformer")
    torch.manual_seed(0)
    for block in model.image_decoder.blocks:  # as trained: gates that let something through
        torch.nn.init.normal_(block.norm1.proj.weight, std=0.1)
    return model


@pytest.fixture(scope="module")
def table() -> NoiseTable:
    return NoiseTable.from_scheduler(FlowMatchEulerDiscreteScheduler(), "cpu")


def batch(model: NOVATransformer3DModel, size: int = 2, frames: int = 3) -> tuple[Tensor, Tensor, Positions]:
    """Latents, condition tokens and positions, on the model's device."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(size, 4, frames, *GRID, generator=generator).to(model.device)
    text = torch.randn(size, 5, 32, generator=generator).to(model.device)
    lengths = torch.tensor([5, 0, 3, 4], device=model.device)[:size]
    number = torch.full((size,), 5.0, device=model.device)
    return latents, model.embed_condition(text, lengths, number, 2 * number), model.positions(frames, GRID)


# What passes from block to block -------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
def test_the_residual_stream_is_of_the_type_of_the_arithmetic(
    model: NOVATransformer3DModel, table: NoiseTable, half: bool
) -> None:
    """In bf16 into and out of every block; and the loss is the same, within what bf16 rounds."""
    draws, kinds = draw(table, 6, TOKENS, VALUES, 5, 2, torch.Generator().manual_seed(0)), set()

    def noted(block: torch.nn.Module, x: Tensor, *args: object) -> Tensor:
        out: Tensor = block(x, *args)
        kinds.update((x.dtype, out.dtype))
        return out

    def total(apply: ApplyBlock) -> Tensor:
        latents, condition, positions = batch(model)
        return losses(model, latents, latents, condition, positions, table, draws, apply).total

    with torch.no_grad():
        exact = total(torch.nn.Module.__call__)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            found = total(noted)
    assert kinds == {torch.bfloat16 if half else torch.float32}
    assert found.item() == pytest.approx(exact.item(), rel=5e-3 if half else 1e-6)


# Checkpointed blocks -----------------------------------------------------------------------------------------------


def test_checkpointed_blocks_have_exactly_the_gradients(model: NOVATransformer3DModel, table: NoiseTable) -> None:
    draws = draw(table, 6, TOKENS, VALUES, 5, 2, torch.Generator().manual_seed(0))
    calls = []

    def counted(block: torch.nn.Module, *args: object) -> Tensor:
        calls.append(block)
        return checkpointed(block, *args)

    gradients, totals = [], []
    for apply in (torch.nn.Module.__call__, counted):
        latents, condition, positions = batch(model)
        model.zero_grad()
        per_frame = losses(model, latents, latents, condition, positions, table, draws, apply).by_frame
        per_frame.sum().backward()
        totals.append(per_frame.detach())
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
    assert set(calls) == {*model.video_encoder.blocks, *model.image_encoder.blocks, *model.image_decoder.blocks}
    assert torch.equal(*totals)
    plain, again = gradients
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["rotary-flow", "text-to-video"])
def test_gpu_compiled_blocks_have_the_gradients(name: str, half: bool) -> None:
    """With kernels of their own, and in the layouts that are left to inductor."""
    model = NOVATransformer3DModel.from_pretrained(CONFORMANCE / name / "transformer").cuda()
    table = NoiseTable.from_scheduler(FlowMatchEulerDiscreteScheduler(), "cuda")
    draws = draw(table, 6, TOKENS, VALUES, 5, 2, torch.Generator("cuda").manual_seed(0))
    gradients = []
    torch.compiler.reset()
    for compiled in (False, True):
        if compiled:
            compile_blocks(model)
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=half and compiled):
            latents, condition, positions = batch(model)
            losses(model, latents, latents, condition, positions, table, draws).total.backward()
        gradients.append(
            {at: weight.grad.clone() for at, weight in model.named_parameters() if weight.grad is not None}
        )
    plain, found = gradients
    assert plain.keys() == found.keys()
    off = sum((found[at] - plain[at]).square().sum().item() for at in plain)
    assert off <= (5e-2 if half else 1e-4) ** 2 * sum(gradient.square().sum().item() for gradient in plain.values())


@pytest.mark.slow
def test_compiled_blocks_stay_compiled_in_every_variant(table: NoiseTable) -> None:
    """Pictures and clips of several sizes, padded or not, learned and looked at: more than torch's own limit of 8."""
    model = NOVATransformer3DModel.from_pretrained(CONFORMANCE / "rotary-flow" / "transformer")
    masks = TemporalMasks()
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True):
        compile_blocks(model, backend="eager")
        for size, frames, visible, grad in [
            (2, 1, [5, 5], True), (3, 1, [7, 7, 7], False), (2, 3, [4, 4], True), (3, 3, [2, 2, 2], False),
            (2, 2, [3, 6], True), (3, 2, [1, 9, 4], False),
        ]:  # fmt: skip
            each = [count for count in visible for _ in range(frames)]
            draws = draw_per_sample(table, each, TOKENS, VALUES, 2)
            latents, condition, positions = batch(model, size, frames)
            with torch.set_grad_enabled(grad):
                losses(model, latents, latents, condition, positions, table, draws, checkpointed, masks)
    torch._dynamo.reset()


@pytest.fixture
def process_group() -> Iterator[None]:
    """Of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("sharded", [False, True])
def test_blocks_are_compiled_for_their_number_of_heads(sharded: bool, process_group: None) -> None:
    """What a compiled block does not know of the shapes is the batch and the tokens; under FSDP2 heads were a third,
    and gradients of query, key and value were laid out as suits no kernel."""
    unknown: list[int] = []

    def keep(graph: GraphModule, inputs: list[Tensor | torch.SymInt]) -> Callable[..., Any]:
        unknown.append(len(free_symbols(inputs)))
        return graph.forward

    block = Block(32, 4)
    block.compile(dynamic=True, backend=keep)
    if sharded:
        fully_shard(block, mesh=init_device_mesh("cpu", (1,)))
    block(torch.randn(2, 24, 32, requires_grad=True), None).sum().backward()
    assert unknown == [2]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_attention_without_cudnn_is_traced_whole(backend: str) -> None:
    """Which kernels suit is a guard on any length, and what torch may choose from is put back."""
    torch._dynamo.reset()
    counter, allowed = CompileCounterWithBackend(backend), torch.backends.cuda.cudnn_sdp_enabled()

    def chosen(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        safe = query.requires_grad and suits_cudnn(query, key, None)
        return (attend if safe else attend_without_cudnn)(query, key, value, None)

    compiled = torch.compile(chosen, backend=counter, fullgraph=True, dynamic=True)
    for queries, keys in [(128, 256), (256, 128), (129, 256), (256, 393), (7, 9), (384, 384)]:
        query = torch.randn(2, 2, queries, 16, requires_grad=True)
        key, value = torch.randn(2, 2, 2, keys, 16)
        out = compiled(query, key, value)
        out.sum().backward()
        assert torch.allclose(out, attend(query, key, value, None), atol=1e-5)
        assert torch.backends.cuda.cudnn_sdp_enabled() == allowed
    assert counter.frame_count <= 4  # each of both lengths suits or does not
    torch._dynamo.reset()


def test_cudnn_suits_whole_tiles_without_a_mask() -> None:
    whole, odd = torch.zeros(1, 1, 256, 8), torch.zeros(1, 1, 257, 8)
    assert suits_cudnn(whole, whole, None)
    assert not suits_cudnn(odd, whole, None)
    assert not suits_cudnn(whole, odd, None)
    assert not suits_cudnn(whole, whole, torch.ones(256, 256, dtype=torch.bool))


# The temporal mask -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("condition", "tokens", "frames"), [(5, 6, 3), (18, 24, 9), (258, 360, 9)])
def test_flex_mask_is_the_plain_mask(condition: int, tokens: int, frames: int) -> None:
    plain = block_causal_mask(condition, tokens, frames, CPU)
    flex = flex_block_causal_mask(condition, tokens, frames, CPU)
    count = condition + tokens * frames
    assert torch.equal(create_mask(flex.mask_mod, None, None, count, count, "cpu")[0, 0], plain)
    assert plain[:, :condition].all()
    assert not plain[0, condition + tokens :].any()
    assert plain[-1].all()
    assert count < 3000 or flex.sparsity() > 30  # percent of a clip's mask that is skipped


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_gives_the_values_of_plain_attention(model: NOVATransformer3DModel) -> None:
    latents, condition, positions = batch(model)
    plain, flex = TemporalMasks(flex=False), TemporalMasks(flex=True)
    count = condition.shape[1]
    assert isinstance(flex.of(model, count, positions), BlockMask)
    assert flex.of(model, count, positions) is flex.of(model, count, positions)
    assert TemporalMasks().of(model, count, model.positions(1, GRID)) is None
    with torch.no_grad():
        expected = model.encode_frames(condition, latents, positions)
        for masks in (plain, flex):
            got = model.encode_frames(condition, latents, positions, masks.of(model, count, positions))
            assert torch.allclose(got, expected, atol=1e-5)
        wrong = torch.ones_like(plain.of(model, count, positions))
        assert not torch.allclose(model.encode_frames(condition, latents, positions, wrong), expected, atol=1e-3)


def test_the_form_is_chosen_by_device_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    chooses_flex.cache_clear()
    with caplog.at_level(logging.INFO, logger=blocks.__name__):
        assert not chooses_flex(CPU, 64)
        assert not chooses_flex(CPU, 64)
    assert [record.getMessage() for record in caplog.records] == [
        "block-causal mask on cpu: plain attention (flex attention has no backward there)"
    ]
    assert why_not_flex(torch.device("cuda"), 8) == "heads of 8 channels: flex attention needs 16"


@needs_cuda
@pytest.mark.parametrize("head_dim", [64, 96])  # of the released sizes
def test_flex_attention_has_the_gradients_of_plain_attention(head_dim: int) -> None:
    device = torch.device("cuda")
    assert why_not_flex(device, head_dim) is None
    generator = torch.Generator(device).manual_seed(0)
    shape = (2, 4, 258 + 3 * 60, head_dim)
    inputs = [torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16) for _ in range(3)]
    weight = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
    results = []
    for make in (block_causal_mask, flex_block_causal_mask):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = attend(*leaves, make(258, 60, 3, device))
        (out * weight).sum().backward()
        results.append([out, *(leaf.grad for leaf in leaves)])
    for plain, flex in zip(*results, strict=True):
        assert (plain - flex).float().norm() < 0.01 * plain.float().norm()


# A mask ratio for each sample --------------------------------------------------------------------------------------


def test_equal_ratios_are_the_ratio_of_the_batch(table: NoiseTable) -> None:
    alike = draw_per_sample(table, [5] * 6, TOKENS, VALUES, 2, generator=torch.Generator().manual_seed(3))
    whole = draw(table, 6, TOKENS, VALUES, 5, 2, torch.Generator().manual_seed(3))
    assert alike.revealed is None
    assert alike.scored is None
    for name in ("visible_ids", "hidden_ids", "index", "noise"):
        assert torch.equal(getattr(alike, name), getattr(whole, name)), name


@pytest.mark.parametrize("multiple", [1, 8])
def test_every_token_is_revealed_or_scored(table: NoiseTable, multiple: int) -> None:
    visible = [0, 7, 3, 5]
    draws = draw_per_sample(table, visible, TOKENS, VALUES, 2, multiple)
    assert draws.revealed is not None
    assert draws.scored is not None
    assert draws.visible_ids.shape[1] == (7 if multiple == 1 else 8)
    for row, count in enumerate(visible):
        known = draws.visible_ids[row][draws.revealed[row]].tolist()
        others = draws.hidden_ids[row][draws.scored[row]].tolist()
        assert len(known) == count
        assert sorted(known + others) == list(range(TOKENS))


def test_samples_of_different_ratios_are_each_as_alone(model: NOVATransformer3DModel, table: NoiseTable) -> None:
    """Loss and gradients of a batch whose samples reveal 0, 7 and 3 tokens: the sum of what each gives by itself."""
    frames, repeats, visible = 2, 2, [0, 7, 3]
    draws = draw_per_sample(
        table, [count for count in visible for _ in range(frames)], TOKENS, VALUES, repeats,
        generator=torch.Generator().manual_seed(5),
    )  # fmt: skip
    assert draws.revealed is not None
    latents, condition, positions = batch(model, 3, frames)
    model.zero_grad()
    together = losses(model, latents, latents, condition, positions, table, draws)
    together.total.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    least = min(visible)
    scored = sum(TOKENS - count for count in visible) * frames * repeats
    total, bins = torch.zeros(frames), torch.zeros(10)
    latents, condition, positions = batch(model, 3, frames)
    for sample, count in enumerate(visible):
        rows = slice(sample * frames, (sample + 1) * frames)
        both = [slice(r * 3 * frames + rows.start, r * 3 * frames + rows.stop) for r in range(repeats)]
        own = LossDraws(
            draws.visible_ids[rows, :count],
            draws.hidden_ids[rows, count - least :],
            torch.cat([draws.index[part, count - least :] for part in both]),
            torch.cat([draws.noise[part, count - least :] for part in both]),
        )
        one = slice(sample, sample + 1)
        alone = losses(model, latents[one], latents[one], condition[one], positions, table, own)
        share = (TOKENS - count) * frames * repeats / scored
        (alone.total * share).backward(retain_graph=True)
        total += alone.by_frame.detach() * share
        bins += alone.bin_sum
    assert torch.allclose(together.by_frame, total, atol=1e-5)
    assert torch.allclose(together.bin_sum, bins, rtol=1e-4)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, model.get_parameter(name).grad, atol=2e-5), name
    model.zero_grad()


def test_padding_reaches_nothing(model: NOVATransformer3DModel, table: NoiseTable) -> None:
    """Wider padding, and other latents where nothing is revealed or scored, change no number."""
    latents, condition, positions = batch(model, 2, 1)
    narrow = draw_per_sample(table, [2, 6], TOKENS, VALUES, 1, 1, torch.Generator().manual_seed(2))
    wide = draw_per_sample(table, [2, 6], TOKENS, VALUES, 1, 8, torch.Generator().manual_seed(2))
    more = wide.hidden_ids.shape[1] - narrow.hidden_ids.shape[1]
    wide = replace(
        wide,
        index=torch.cat([wide.index[:, :more], narrow.index], 1),
        noise=torch.cat([wide.noise[:, :more], narrow.noise], 1),
    )
    with torch.no_grad():
        first, second = (losses(model, latents, latents, condition, positions, table, d) for d in (narrow, wide))
    assert more == 2
    assert torch.allclose(first.by_frame, second.by_frame, atol=1e-6)
    assert torch.equal(first.bin_count, second.bin_count)


def test_visible_tokens_follow_the_papers_ratios() -> None:
    counts = visible_tokens(2000, 1024, torch.Generator().manual_seed(0))
    assert min(counts) >= 0
    assert max(counts) <= round(0.3 * 1024)
    assert len(set(counts)) > 200
    assert counts == visible_tokens(2000, 1024, torch.Generator().manual_seed(0))


# What is told apart ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler(), DDPMScheduler()], ids=["flow", "ddpm"])
def test_losses_by_frame_and_by_time_add_up(model: NOVATransformer3DModel, scheduler: object) -> None:
    table = NoiseTable.from_scheduler(scheduler, "cpu")
    latents, condition, positions = batch(model)
    draws = draw(table, 6, TOKENS, VALUES, 4, 3)
    with torch.no_grad():
        found = losses(model, latents, latents, condition, positions, table, draws)
    assert found.by_frame.shape == (3,)
    assert found.total.item() == pytest.approx(found.by_frame.sum().item())
    assert found.bin_count.tolist() == torch.bincount(draws.index.flatten() // 100, minlength=10).tolist()
    assert (found.bin_sum.sum() / found.bin_count.sum()).item() == pytest.approx(found.total.item(), rel=1e-5)
    only = replace(draws, index=torch.full_like(draws.index, 999))
    with torch.no_grad():
        last = losses(model, latents, latents, condition, positions, table, only)
    assert last.bin_count.tolist() == [0] * 9 + [draws.index.numel()]
    assert not last.bin_sum[:9].any()
