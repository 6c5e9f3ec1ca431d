"""The arranged model: blocks with kernels, masks in both forms, embedded timesteps. The same numbers every time."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import free_symbols
from torch.nn.attention.flex_attention import BlockMask, create_mask

from nova_video.fast import attention_choice, blocks
from nova_video.fast.arrange import arrange_for_sampling, arrange_for_training, compile_blocks, over, with_fast_blocks
from nova_video.fast.attention_choice import (
    attend,
    attend_without_cudnn,
    chooses_flex,
    flex_block_causal_mask,
    suits_cudnn,
    temporal_mask,
    why_not_flex,
)
from nova_video.fast.blocks import FastAttention, FastBlock, FastVideoEncoder, TableTimeEmbed
from nova_video.model import NOVATransformer3DModel
from nova_video.model.attention import block_causal_mask
from nova_video.model.denoiser import Denoiser, TimeCondEmbed
from nova_video.model.vit import Block
from nova_video.training.loss import NoiseTable, draw, draw_per_sample, losses
from nova_video.training.transformer_task import checkpoint_block

CONFORMANCE = Path(__file__).parents[1] / "conformance"
CPU = torch.device("cpu")
GRID = (8, 12)
TOKENS, VALUES = 24, 16
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="flex attention has no backward on a CPU")


@pytest.fixture(scope="module", params=["rotary-flow", "text-to-video"])
def model(request: pytest.FixtureRequest) -> NOVATransformer3DModel:
    model: NOVATransformer3DModel = NOVATransformer3DModel.from_pretrained(CONFORMANCE / request.param / "transformer")
    torch.manual_seed(0)
    for block in model.image_decoder.blocks:  # as trained: gates that let something through
        nn.init.normal_(block.norm1.proj.weight, std=0.1)
    return model


@pytest.fixture(scope="module")
def table() -> NoiseTable:
    return NoiseTable.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0), "cpu")


def batch(model: NOVATransformer3DModel, size: int = 2, frames: int = 3) -> tuple[Tensor, Tensor]:
    """Latents and condition tokens, on the model's device."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(size, 4, frames, *GRID, generator=generator).to(model.device)
    text = torch.randn(size, 5, 32, generator=generator).to(model.device)
    lengths = torch.tensor([5, 0, 3, 4], device=model.device)[:size]
    number = torch.full((size,), 5.0, device=model.device)
    return latents, model.embed_condition(text, lengths, number, 2 * number)


# What is arranged --------------------------------------------------------------------------------------------------


def test_an_arranged_model_learns_the_same_by_the_same_weights(
    model: NOVATransformer3DModel, table: NoiseTable
) -> None:
    """Loss and gradients, bit by bit on a CPU; and the model that was given is as it was."""
    parts = {name: type(part) for name, part in model.named_modules()}
    arranged = arrange_for_training(model, table.timestep)
    assert type(arranged.image_decoder.time_cond_embed) is TableTimeEmbed
    assert parts == {name: type(part) for name, part in model.named_modules()}
    weights = dict(model.named_parameters())
    assert all(weight is weights[name] for name, weight in arranged.named_parameters())
    draws = draw(table, 6, TOKENS, VALUES, 5, 2, torch.Generator().manual_seed(0))
    found = []
    for each in (model, arranged):
        latents, condition = batch(each)
        each.zero_grad()
        total = losses(each, latents, latents, condition, table, draws).total
        total.backward()
        found.append((total.detach(), {name: p.grad.clone() for name, p in weights.items() if p.grad is not None}))
    model.zero_grad()
    (plain, gradients), (total, others) = found
    assert total.item() == pytest.approx(plain.item(), rel=1e-6)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        assert (others[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name


def test_blocks_with_kernels_are_blocks(model: NOVATransformer3DModel) -> None:
    """Where there is no GPU they call torch's own, as every block does."""
    x, encoder = torch.randn(2, 9, model.width), model.image_encoder
    rotary = model.positions(1, (6, 6)).image_rotary
    rows = torch.tensor([[0, 4], [8, 1]])
    for compile, kind in ((True, FastBlock), (False, FastAttention)):
        fast = with_fast_blocks(encoder, compile, "auto").blocks[0]
        assert isinstance(fast if compile else fast.attn, kind)
        for arguments in ((x, rotary), (x, rotary, None, None, rows), (x, None, torch.ones(9, 9).tril() > 0)):
            assert torch.allclose(fast(*arguments), encoder.blocks[0](*arguments), atol=1e-6)


def test_a_part_of_the_users_own_is_called_as_it_is(model: NOVATransformer3DModel, table: NoiseTable) -> None:
    class OwnBlock(Block):
        pass

    class OwnHead(Denoiser):
        pass

    given = over(type(model), model, image_encoder=over(type(model.image_encoder), model.image_encoder))
    own, head = over(OwnBlock, model.image_encoder.blocks[1]), over(OwnHead, model.image_decoder)
    given.image_encoder.blocks = nn.ModuleList([*model.image_encoder.blocks])
    given.image_encoder.blocks[1], given.image_decoder = own, head
    made = with_fast_blocks(given.image_encoder, True, "auto")
    assert [type(block) for block in made.blocks[:3]] == [FastBlock, OwnBlock, FastBlock]
    assert arrange_for_training(given, table.timestep).image_decoder is head


def test_timesteps_are_looked_up_in_their_table(table: NoiseTable) -> None:
    """The embeddings of the very timesteps; NaN for one that is not in the table, never that of a neighbour."""
    torch.manual_seed(0)
    plain = TimeCondEmbed(8, 16)
    fast = over(TableTimeEmbed, plain, timesteps=table.timestep)
    timestep = table.timestep[torch.randint(1000, (3, 5))]
    assert torch.allclose(
        fast.embed_times(timestep, torch.float32), plain.embed_times(timestep, torch.float32), atol=1e-6
    )
    timestep[1, 2] += 1e-3
    found = fast.embed_times(timestep, torch.float32)
    assert found[1, 2].isnan().all()
    assert found.isnan().sum() == 16


@pytest.mark.slow
def test_compiled_blocks_sample_the_same(model: NOVATransformer3DModel) -> None:
    """All blocks by one compiled function, for any number of tokens."""
    torch._dynamo.reset()
    arranged = arrange_for_sampling(model)
    positions = model.positions(1, GRID)
    with torch.no_grad():
        for visible in (3, 7):
            condition, tokens = torch.randn(2, 6, model.width), torch.randn(2, TOKENS, model.width)
            ids = torch.rand(2, TOKENS).argsort(1)
            inputs = (condition, tokens, ids[:, :visible], positions, ids[:, visible:])
            assert torch.allclose(arranged.encode_tokens(*inputs), model.encode_tokens(*inputs), atol=1e-5)
    torch._dynamo.reset()


# Compiled blocks ---------------------------------------------------------------------------------------------------


@needs_cuda
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
            model = arrange_for_training(model, table.timestep, compile=True)
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=half and compiled):
            latents, condition = batch(model)
            losses(model, latents, latents, condition, table, draws).total.backward()
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
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True):
        model.enable_gradient_checkpointing(checkpoint_block)
        encoders = {
            name: with_fast_blocks(getattr(model, name), True, "auto") for name in ("video_encoder", "image_encoder")
        }
        arranged = over(type(model), arrange_for_training(model, table.timestep), **encoders)
        compile_blocks(arranged, backend="eager")
        for size, frames, visible, grad in [
            (2, 1, [5, 5], True), (3, 1, [7, 7, 7], False), (2, 3, [4, 4], True), (3, 3, [2, 2, 2], False),
            (2, 2, [3, 6], True), (3, 2, [1, 9, 4], False),
        ]:  # fmt: skip
            each = [count for count in visible for _ in range(frames)]
            draws = draw_per_sample(table, each, TOKENS, VALUES, 2)
            latents, condition = batch(arranged, size, frames)
            with torch.set_grad_enabled(grad):
                losses(arranged, latents, latents, condition, table, draws)
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

    block = over(FastBlock, Block(32, 4))
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
def test_flex_attention_gives_the_values_of_plain_attention(
    model: NOVATransformer3DModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents, condition = batch(model)
    positions = model.positions(3, GRID)
    video = over(FastVideoEncoder, with_fast_blocks(model.video_encoder, True, "auto"))
    arranged = over(type(model), model, video_encoder=video)
    sizes = (condition.shape[1], 6, 3, CPU)
    assert temporal_mask(*sizes, 64) is temporal_mask(*sizes, 64)
    with torch.no_grad():
        expected = model.encode_frames(condition, latents, positions)
        masks = [block_causal_mask(*sizes), flex_block_causal_mask(*sizes), torch.ones_like(block_causal_mask(*sizes))]
        for mask, right in zip(masks, (True, True, False), strict=True):
            monkeypatch.setattr(blocks, "temporal_mask", lambda *_, mask=mask: mask)
            got = arranged.encode_frames(condition, latents, positions)
            assert torch.allclose(got, expected, atol=1e-5 if right else 1e-3) == right
    assert isinstance(masks[1], BlockMask)


def test_the_form_is_chosen_by_device_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    chooses_flex.cache_clear()
    with caplog.at_level(logging.INFO, logger=attention_choice.__name__):
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
