"""How training computes blocks and masks, and what of a loss is told apart: the same numbers in every arrangement."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from nova_video.model import NOVATransformer3DModel
from nova_video.training.loss import (
    LossDraws,
    NoiseTable,
    draw,
    draw_per_sample,
    losses,
    visible_tokens,
)
from nova_video.training.transformer_task import checkpoint_block

CONFORMANCE = Path(__file__).parent / "conformance"
GRID = (8, 12)
TOKENS, VALUES = 24, 16


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


def batch(model: NOVATransformer3DModel, size: int = 2, frames: int = 3) -> tuple[Tensor, Tensor]:
    """Latents and condition tokens, on the model's device."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(size, 4, frames, *GRID, generator=generator).to(model.device)
    text = torch.randn(size, 5, 32, generator=generator).to(model.device)
    lengths = torch.tensor([5, 0, 3, 4], device=model.device)[:size]
    number = torch.full((size,), 5.0, device=model.device)
    return latents, model.embed_condition(text, lengths, number, 2 * number)


# What passes from block to block -------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
def test_the_residual_stream_is_of_the_type_of_the_arithmetic(
    model: NOVATransformer3DModel, table: NoiseTable, half: bool
) -> None:
    """In bf16 into and out of every block; and the loss is the same, within what bf16 rounds."""
    draws, kinds = draw(table, 6, TOKENS, VALUES, 5, 2, torch.Generator().manual_seed(0)), set()

    def total() -> Tensor:
        latents, condition = batch(model)
        return losses(model, latents, latents, condition, table, draws).total

    with torch.no_grad():
        exact = total()
        blocks = (*model.video_encoder.blocks, *model.image_encoder.blocks, *model.image_decoder.blocks)
        hooks = [
            block.register_forward_hook(lambda block, given, out: kinds.update((given[0].dtype, out.dtype)))
            for block in blocks
        ]
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            found = total()
    for hook in hooks:
        hook.remove()
    assert kinds == {torch.bfloat16 if half else torch.float32}
    assert found.item() == pytest.approx(exact.item(), rel=5e-3 if half else 1e-6)


# Checkpointed blocks -----------------------------------------------------------------------------------------------


def test_checkpointed_blocks_have_exactly_the_gradients(model: NOVATransformer3DModel, table: NoiseTable) -> None:
    draws = draw(table, 6, TOKENS, VALUES, 5, 2, torch.Generator().manual_seed(0))
    calls = []

    def counted(block: torch.nn.Module, *args: object) -> Tensor:
        calls.append(block)
        return checkpoint_block(block, *args)

    gradients, totals = [], []
    for again in (False, True):
        latents, condition = batch(model)
        model.zero_grad()
        if again:
            model.enable_gradient_checkpointing(counted)
        per_frame = losses(model, latents, latents, condition, table, draws).by_frame
        per_frame.sum().backward()
        totals.append(per_frame.detach())
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
    model.disable_gradient_checkpointing()
    assert set(calls) == {*model.video_encoder.blocks, *model.image_encoder.blocks, *model.image_decoder.blocks}
    assert torch.equal(*totals)
    plain, again = gradients
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)


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
    latents, condition = batch(model, 3, frames)
    model.zero_grad()
    together = losses(model, latents, latents, condition, table, draws)
    together.total.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    least = min(visible)
    scored = sum(TOKENS - count for count in visible) * frames * repeats
    total, bins = torch.zeros(frames), torch.zeros(10)
    latents, condition = batch(model, 3, frames)
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
        alone = losses(model, latents[one], latents[one], condition[one], table, own)
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
    latents, condition = batch(model, 2, 1)
    narrow = draw_per_sample(table, [2, 6], TOKENS, VALUES, 1, 1, torch.Generator().manual_seed(2))
    wide = draw_per_sample(table, [2, 6], TOKENS, VALUES, 1, 8, torch.Generator().manual_seed(2))
    more = wide.hidden_ids.shape[1] - narrow.hidden_ids.shape[1]
    wide = replace(
        wide,
        index=torch.cat([wide.index[:, :more], narrow.index], 1),
        noise=torch.cat([wide.noise[:, :more], narrow.noise], 1),
    )
    with torch.no_grad():
        first, second = (losses(model, latents, latents, condition, table, d) for d in (narrow, wide))
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
    latents, condition = batch(model)
    draws = draw(table, 6, TOKENS, VALUES, 4, 3)
    with torch.no_grad():
        found = losses(model, latents, latents, condition, table, draws)
    assert found.by_frame.shape == (3,)
    assert found.total.item() == pytest.approx(found.by_frame.sum().item())
    assert found.bin_count.tolist() == torch.bincount(draws.index.flatten() // 100, minlength=10).tolist()
    assert (found.bin_sum.sum() / found.bin_count.sum()).item() == pytest.approx(found.total.item(), rel=1e-5)
    only = replace(draws, index=torch.full_like(draws.index, 999))
    with torch.no_grad():
        last = losses(model, latents, latents, condition, table, only)
    assert last.bin_count.tolist() == [0] * 9 + [draws.index.numel()]
    assert not last.bin_sum[:9].any()
