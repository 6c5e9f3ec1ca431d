"""Sampling: the reference latents from their seeds, and every guidance mode against a plain full-frame sampler."""

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file
from torch import Tensor

from nova_video.common.errors import InputError
from nova_video.model import NOVATransformer3DModel, masking, patchify, random_order, set_sizes, unpatchify
from nova_video.model.patches import gather_tokens
from nova_video.sampling.context import Context
from nova_video.sampling.diffusion import Schedule, ddpm_row, linear_step, predicted_data
from nova_video.sampling.generate import generate_sets
from nova_video.sampling.guidance import Guidance, combine, pass_weights, renorm_ratio
from nova_video.sampling.presets import EXACT, Preset
from nova_video.sampling.random import RandomState
from nova_video.sampling.schedulers import TrainedNoise, check_scheduler, request_scheduler
from nova_video.sampling.state import GivenFrame, SamplingState, Segment
from nova_video.training.loss import NoiseTable, draw, draw_per_sample

CONFORMANCE = Path(__file__).parent / "conformance"
CASES = [("text-to-image", "generate"), ("text-to-image", "generate_noguidance")]
CASES += [("text-to-video", "generate"), ("rotary-flow", "generate")]
CASES += [("published-flow", f"generate_image_guidance_{name}") for name in ("renorm", "trunc", "renorm_trunc")]
CASES += [("published-video", "generate_image_guidance_renorm")]

DDPM_CONFIG = CONFORMANCE / "text-to-video" / "scheduler"
CPU = torch.device("cpu")
FLOW_CONFIG = CONFORMANCE / "rotary-flow" / "scheduler"


@pytest.fixture(autouse=True)
def _seeded_without_gradients() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def open_model(folder: str) -> NOVATransformer3DModel:
    return NOVATransformer3DModel.from_pretrained(CONFORMANCE / folder / "transformer").eval()


def open_scheduler(folder: str) -> Any:
    config = json.loads((CONFORMANCE / folder / "scheduler" / "scheduler_config.json").read_text())
    return getattr(diffusers, config["_class_name"]).from_config(config)


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    assert got.shape == expected.shape
    error = (got - expected).abs().max() / expected.abs().max()
    assert error < tolerance, f"relative error {error:.2e}"


def condition(model: NOVATransformer3DModel, embeds: list[Tensor], passes: int) -> Tensor:
    """Condition tokens of each prompt, then of the null prompt for every further pass."""
    rows = embeds + [embeds[0][:0]] * len(embeds) * (passes - 1)
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    values = (padded, lengths, torch.full((len(rows),), 5.0), torch.full((len(rows),), 12.0))
    return model.embed_condition(*(value.to(model.device) for value in values))


def embeds() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5, 32, generator=generator), torch.randn(3, 32, generator=generator)]


def make_state(
    model: NOVATransformer3DModel,
    embeds: list[Tensor],
    guidance: Guidance,
    *,
    frames: int = 2,
    grid: tuple[int, int] = (8, 12),
    sets: int = 3,
    steps: int = 4,
    generators: list[torch.Generator] | None = None,
    given: tuple[Tensor, ...] = (),
    context: Context | None = None,
    speed: Preset = EXACT,
    device: torch.device = CPU,
) -> SamplingState:
    generators = generators or [torch.Generator().manual_seed(0)]
    return SamplingState.create(
        model,
        [Segment(0, condition(model, embeds, guidance.passes), guidance)],
        num_frames=frames,
        grid=grid,
        num_sets=sets,
        num_diffusion_steps=steps,
        random=RandomState(generators, device, torch.float32),
        passes=guidance.passes,
        context=context,
        speed=speed,
        given={frame: GivenFrame(latents) for frame, latents in enumerate(given)},
    )


def run(model: NOVATransformer3DModel, scheduler: Any, state: SamplingState, shift: float | None = None) -> Tensor:
    for _ in generate_sets(model, request_scheduler(scheduler, shift), state):
        pass
    return state.latents()


@pytest.mark.parametrize(("folder", "name"), CASES)
def test_reference_latents(folder: str, name: str) -> None:
    model = open_model(folder)
    case = json.loads((CONFORMANCE / folder / "cases.json").read_text())["cases"][name]
    tensors = load_file(CONFORMANCE / folder / f"{name}.safetensors")
    embeds = [tensors[key] for key in sorted(tensors) if key.startswith("prompt_embeds")]
    expected = tensors["latents"]
    state = make_state(
        model,
        embeds,
        Guidance(
            case["guidance_scale"],
            case.get("guidance_trunc", 0.0),
            case.get("guidance_renorm", 1.0),
            case.get("image_guidance_scale", 0.0),
        ),
        frames=expected.shape[2],
        grid=(expected.shape[3], expected.shape[4]),
        sets=case["num_inference_steps"],
        steps=case["num_diffusion_steps"],
        generators=[torch.Generator().manual_seed(case["seed"])],
    )
    close(run(model, open_scheduler(folder), state), expected)


# Against a plain sampler: full frames, one pass at a time, the library's own scheduler steps --------------------------


@dataclass(frozen=True)
class PlainSampler:
    """Touches the whole grid at every step and batches nothing; slow, and close to the released behaviour."""

    model: NOVATransformer3DModel
    scheduler: Any
    embeds: list[Tensor]
    guidance: Guidance
    frames: int
    grid: tuple[int, int]
    sets: int
    steps: int
    generator: torch.Generator
    given: tuple[Tensor, ...] = ()

    def run(self) -> Tensor:
        model, batch = self.model, len(self.embeds)
        passes = self.guidance.passes
        texts = condition(model, self.embeds, passes).chunk(passes)
        positions = model.positions(self.frames, self.grid)
        caches = [model.new_cache(batch, positions) for _ in texts]
        firsts: list[Tensor] = []
        done: list[Tensor] = []
        order = None
        for frame in range(self.frames):
            features = []
            for i, (text, cache) in enumerate(zip(texts, caches, strict=True)):
                bare = passes == 3 and i == 1
                latest = None if bare or not done else done[-1]
                history = model.embed_history(latest, frame, batch, positions, bare)
                if frame == 0:
                    features.append(model.encode_context(text, history[:, None], positions, cache)[:, 0])
                else:
                    features.append(model.encode_frame(history, frame, positions, cache))
            if frame == 0:
                firsts, mixed = features, features
            else:
                mixed = [model.mix(first, feature) for first, feature in zip(firsts, features, strict=True)]
            if frame < len(self.given):
                done.append(self.given[frame])
                continue
            if order is None:
                order = random_order(torch.rand(batch, self.num_tokens, 1, generator=self.generator))
            done.append(self.fill(mixed, order, positions))
        return torch.stack(done, dim=2)

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1] // 4

    def fill(self, mixed: list[Tensor], order: Tensor, positions: Any) -> Tensor:
        model, batch = self.model, len(self.embeds)
        canvas = torch.zeros(batch, model.config.image_dim, *self.grid)
        start = 0
        for size in set_sizes(self.num_tokens, self.sets):
            tokens = model.embed_tokens(patchify(canvas, 2))
            features = [model.encode_tokens(c, tokens, order[:, :start], positions) for c in mixed]
            ids = order[:, start : start + size]
            sample = self.denoise(features, ids)
            inside = torch.zeros(batch, self.num_tokens, dtype=torch.bool).scatter(1, ids, True).unsqueeze(-1)
            canvas = unpatchify(torch.where(inside, patchify(sample, 2), patchify(canvas, 2)), 2, self.grid)
            start += size
        return canvas

    def denoise(self, features: list[Tensor], ids: Tensor) -> Tensor:
        guidance, batch = self.guidance, len(self.embeds)
        x = torch.randn(batch, self.model.config.image_dim, *self.grid, generator=self.generator)
        inside = torch.zeros(batch, self.num_tokens, dtype=torch.bool).scatter(1, ids, True).unsqueeze(-1)
        self.scheduler.set_timesteps(self.steps)
        for t in self.scheduler.timesteps:
            noisy = patchify(x, 2)
            timestep = torch.full((batch,), float(t))
            outputs = [torch.where(inside, self.model.image_decoder(noisy, timestep, z), noisy) for z in features]
            cond = guided = outputs[0]
            if t >= guidance.trunc and len(outputs) == 2:
                guided = outputs[1] + guidance.scale * (cond - outputs[1])
            elif t >= guidance.trunc and len(outputs) == 3:
                null, image = outputs[1:]
                guided = null + guidance.scale * (cond - image)
            guided = torch.where(inside, guided, noisy)
            if guidance.renorm < 1:
                ratio = cond.flatten(1).norm(dim=1) / guided.flatten(1).norm(dim=1)
                guided = guided * ratio.clamp(guidance.renorm, 1)[:, None, None]
            if t >= guidance.trunc and len(outputs) == 3:
                guided = guided + guidance.image_scale * (image - null)
            output = unpatchify(guided, 2, self.grid)
            x = self.scheduler.step(output, t, x, generator=self.generator, return_dict=False)[0]
        return x


GUIDANCES = [
    Guidance(1.0),
    Guidance(4.0),
    Guidance(4.0, trunc=400.0),
    Guidance(4.0, renorm=0.3),
    Guidance(4.0, trunc=400.0, renorm=0.3),
    Guidance(4.0, image_scale=1.5),
    Guidance(4.0, renorm=0.3, image_scale=1.5),
    Guidance(4.0, trunc=400.0, renorm=0.3, image_scale=1.5),
]


@pytest.mark.parametrize("guidance", GUIDANCES, ids=str)
@pytest.mark.parametrize("folder", ["text-to-video", "rotary-flow"])
def test_guidance_equals_the_plain_sampler(folder: str, guidance: Guidance) -> None:
    model, scheduler = open_model(folder), open_scheduler(folder)
    torch.manual_seed(1)
    embeds = [torch.randn(5, 32), torch.randn(3, 32)]
    given = (torch.randn(2, 4, 8, 12),)
    state = make_state(model, embeds, guidance, frames=3, given=given)
    plain = PlainSampler(model, scheduler, embeds, guidance, 3, (8, 12), 3, 4, torch.Generator().manual_seed(0), given)
    close(run(model, scheduler, state), plain.run())


def test_modes_differ() -> None:
    """The modes compared above are not the same sampler under several names."""
    model, scheduler = open_model("rotary-flow"), open_scheduler("rotary-flow")
    torch.manual_seed(1)
    embeds = [torch.randn(5, 32)]
    results = [run(model, scheduler, make_state(model, embeds, guidance)) for guidance in GUIDANCES]
    for i, first in enumerate(results):
        for second in results[:i]:
            assert (first - second).abs().max() > 2e-3


# Parts ----------------------------------------------------------------------------------------------------------------


def test_combine_closed_forms() -> None:
    cond, null, image = (torch.randn(2, 3, 4) for _ in range(3))
    one = combine(cond, 1, 1.0)
    assert torch.equal(one.cond, cond)
    assert torch.equal(one.guided(), cond)
    two = combine(torch.cat([cond, null]), 2, 3.0)
    assert torch.equal(two.cond, cond)
    torch.testing.assert_close(two.guided(), 3 * cond - 2 * null)
    three = combine(torch.cat([cond, null, image]), 3, 3.0, 2.0)
    torch.testing.assert_close(three.guided(), 3 * cond - null - image)
    half = torch.full((2, 1, 1), 0.5)  # of the prompt's part alone: the history's is added as it is
    torch.testing.assert_close(three.guided(half), 0.5 * (null + 3 * (cond - image)) + 2 * (image - null))
    assert combine(torch.cat([cond, null]).half(), 2, 3.0).guided().dtype == torch.float32


@pytest.mark.parametrize("guidance", [Guidance(1.0), Guidance(3.0), Guidance(3.0, image_scale=2.0)])
def test_pass_weights_are_the_formula(guidance: Guidance) -> None:
    outputs = torch.randn(guidance.passes, 5, 4)  # a batch of one
    weights = pass_weights(guidance, CPU)
    expected = guidance.combine(outputs, guidance.passes).guided()
    torch.testing.assert_close((weights[:, None, None] * outputs).sum(0, keepdim=True), expected, rtol=1e-5, atol=1e-5)


def test_passes() -> None:
    assert [Guidance(scale).passes for scale in (0.0, 1.0, 1.01)] == [1, 1, 2]
    assert Guidance(5.0, image_scale=0.5).passes == 3
    truncated = Guidance(5.0, trunc=300.0)
    assert [truncated.passes_at(t) for t in (299.9, 300.0)] == [1, 2]


def test_renorm_ratio_closed_forms() -> None:
    cond = torch.ones(1, 1, 4)  # squared norm 4
    assert renorm_ratio(cond, 2 * cond, 0.1).item() == pytest.approx(0.5)
    assert renorm_ratio(cond, 2 * cond, 0.7).item() == pytest.approx(0.7)
    assert renorm_ratio(cond, 0.5 * cond, 0.1).item() == 1.0  # never up
    assert renorm_ratio(cond, 2 * cond, 0.1, torch.full((1, 1, 1), 20.0)).item() == pytest.approx((24 / 36) ** 0.5)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_ddpm_step_is_the_library_s(prediction: str, clip: bool, spacing: str) -> None:
    scheduler = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type=prediction, clip_sample=clip, timestep_spacing=spacing
    )
    scheduler.set_timesteps(7)
    bound = scheduler.config.clip_sample_range if clip else None
    output, x = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    for t in scheduler.timesteps:
        noise = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(3)) if t > 0 else None
        expected = scheduler.step(output, t, x, generator=torch.Generator().manual_seed(3)).prev_sample
        stepped = linear_step(x, output, torch.tensor(ddpm_row(scheduler, t)), bound, noise)
        torch.testing.assert_close(stepped, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 9, 16])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", "flow_prediction"])
def test_solver_step_is_the_library_s(prediction: str, order: int, steps: int) -> None:
    """Of DPM-Solver++: every step takes the data that the one before predicted."""
    scheduler = DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type=prediction,
        solver_order=order,
        use_flow_sigmas=prediction == "flow_prediction",
    )
    schedule = Schedule.of(copy.deepcopy(scheduler), steps, torch.device("cpu"))
    assert schedule.rows is not None
    assert schedule.multistep
    assert not schedule.draws
    scheduler.set_timesteps(steps)
    x, outputs = torch.randn(2, 5, 4), torch.randn(steps, 2, 5, 4)
    own, before = x, torch.zeros_like(x)
    for t, output, numbers in zip(scheduler.timesteps, outputs, schedule.rows, strict=True):
        x = scheduler.step(output, t, x).prev_sample
        data = predicted_data(own, output, numbers)
        own, before = linear_step(own, output, numbers, None, None, before), data
        torch.testing.assert_close(own, x, rtol=1e-4, atol=1e-4 * float(data.abs().max()))


def test_solvers_that_draw_step_themselves() -> None:
    scheduler = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")
    schedule = Schedule.of(scheduler, 4, torch.device("cpu"))
    assert schedule.rows is None
    assert schedule.draws


@pytest.mark.parametrize("renorm", [1.0, 0.3])
@pytest.mark.parametrize("cls", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_other_schedulers_step_the_set_alone(cls: Any, renorm: float) -> None:
    """A checkpoint may be sampled with another of diffusers' solvers: as a full frame, the same numbers."""
    model = open_model("text-to-video")
    scheduler = cls.from_config(DDPMScheduler.from_pretrained(DDPM_CONFIG).config)
    torch.manual_seed(1)
    embeds, guidance = [torch.randn(5, 32)], Guidance(4.0, renorm=renorm)
    plain = PlainSampler(model, scheduler, embeds, guidance, 2, (8, 12), 3, 4, torch.Generator().manual_seed(0))
    close(run(model, scheduler, make_state(model, embeds, guidance)), plain.run())


def test_flow_shift() -> None:
    model, scheduler = open_model("rotary-flow"), open_scheduler("rotary-flow")
    embeds = [torch.randn(5, 32, generator=torch.Generator().manual_seed(1))]
    plain = run(model, scheduler, make_state(model, embeds, Guidance(4.0)))
    shifted = run(model, scheduler, make_state(model, embeds, Guidance(4.0)), shift=1.5)
    assert (shifted - plain).abs().max() > 1e-2
    assert torch.equal(run(model, scheduler, make_state(model, embeds, Guidance(4.0)), shift=3.0), plain)
    copied = request_scheduler(scheduler, 1.5)
    copied.set_timesteps(5)  # shift(linspace(1, sigma_min, n)) then 0, sigma_min the config's own
    straight = torch.linspace(1, scheduler.sigma_min, 5)
    torch.testing.assert_close(copied.sigmas[:-1], 1.5 * straight / (1 + 0.5 * straight), rtol=1e-5, atol=1e-6)
    assert copied.sigmas[-1] == 0


def test_a_request_leaves_the_scheduler_alone() -> None:
    model, scheduler = open_model("rotary-flow"), open_scheduler("rotary-flow")
    before = {name: str(value) for name, value in vars(scheduler).items()}
    run(model, scheduler, make_state(model, [torch.randn(5, 32)], Guidance(4.0)), shift=2.0)
    assert {name: str(value) for name, value in vars(scheduler).items()} == before


def test_schedulers_that_cannot_be_sampled_with() -> None:
    for scheduler, message in (
        (DDPMScheduler(variance_type="fixed_large"), "fixed_large"),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "use_dynamic_shifting"),
    ):
        with pytest.raises(InputError, match=message):
            check_scheduler(scheduler, TrainedNoise.of(scheduler))


def test_own_generators_make_samples_independent() -> None:
    model, scheduler = open_model("text-to-video"), open_scheduler("text-to-video")
    torch.manual_seed(1)
    embeds = [torch.randn(5, 32), torch.randn(5, 32)]
    both = [torch.Generator().manual_seed(seed) for seed in (4, 5)]
    together = run(model, scheduler, make_state(model, embeds, Guidance(4.0), generators=both))
    alone = make_state(model, embeds[1:], Guidance(4.0), generators=[torch.Generator().manual_seed(5)])
    close(together[1:], run(model, scheduler, alone))


def test_training_and_sampling_draw_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens in raster order, by one change: sampling reveals so, and training hides so."""
    monkeypatch.setattr(masking, "random_order", lambda uniform: torch.arange(uniform.shape[1]).repeat(len(uniform), 1))
    model, scheduler = open_model("rotary-flow"), open_scheduler("rotary-flow")
    state = make_state(model, [torch.randn(5, 32)], Guidance(1.0), frames=1)
    run(model, scheduler, state)
    assert state.order[0].tolist() == list(range(24))
    table = NoiseTable.from_scheduler(scheduler, CPU)
    for draws in (draw(table, 2, 24, 16, 6, 1), draw_per_sample(table, [6, 6], 24, 16, 1)):
        assert draws.visible_ids.tolist() == [list(range(6))] * 2
        assert draws.hidden_ids.tolist() == [list(range(6, 24))] * 2


class Backwards:
    """An order of its own: the last token first, two in every set."""

    def reveal(self, uniform: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        assert grid[0] * grid[1] == uniform.shape[1]
        return torch.arange(uniform.shape[1] - 1, -1, -1).expand(len(uniform), -1)

    def sizes(self, tokens: int, sets: int) -> list[int]:
        return [2] * (tokens // 2)


class Twice(Backwards):
    def reveal(self, uniform: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        return torch.zeros(uniform.shape[:2], dtype=torch.int64)

    def sizes(self, tokens: int, sets: int) -> list[int]:
        return [tokens, tokens]


def test_an_own_order_is_followed() -> None:
    """In sampling and in training; a given part of a frame comes first. An order that is none is an error."""
    model, scheduler = open_model("rotary-flow"), open_scheduler("rotary-flow")
    state = make_state(model, [torch.randn(5, 32)], Guidance(1.0), frames=2)
    state = replace(state, order_rule=Backwards())
    done = []
    for each in generate_sets(model, request_scheduler(scheduler, None), state):
        done.append(each.ids[0, -2:].tolist())
    assert done == 2 * [[token, token - 1] for token in range(23, 0, -2)]
    assert state.total_steps == 24
    table = NoiseTable.from_scheduler(scheduler, CPU)
    draws = draw(table, 2, 24, 16, 6, 1, order=Backwards(), grid=(4, 6))
    assert draws.visible_ids.tolist() == [list(range(23, 17, -1))] * 2
    with pytest.raises(InputError, match=r"order Twice gave int64 \(2, 24\): expected every one of 24 token ids once"):
        draw(table, 2, 24, 16, 6, 1, order=Twice())
    with pytest.raises(InputError, match="order Twice gave sets of 48 tokens in all: expected 24"):
        replace(state, order_rule=Twice()).sizes_of(24)


def test_sets_in_turn() -> None:
    """Every set reveals its share of the frame's order, in that order, and nothing already fixed changes."""
    model, scheduler = open_model("rotary-flow"), open_scheduler("rotary-flow")
    state = make_state(model, [torch.randn(5, 32)], Guidance(4.0), frames=2, sets=4)
    sizes = set_sizes(24, 4)
    assert state.total_steps == 2 * len(sizes)
    before = None
    for done in generate_sets(model, request_scheduler(scheduler, None), state):
        position = done.step % len(sizes)
        assert done.frame == done.step // len(sizes)
        assert done.ids.shape[1] == sum(sizes[: position + 1])
        assert done.frame_done == (position == len(sizes) - 1)
        shown = gather_tokens(done.tokens, done.ids)
        assert done.tokens.count_nonzero() == shown.count_nonzero() == shown.numel()  # zero elsewhere
        if before is not None and position > 0:
            assert torch.equal(shown[:, : before.shape[1]], before)
        before = shown
        assert len(state.frames) == (done.step + 1) // len(sizes)
    assert state.step == state.total_steps
    assert sorted(state.order[0].tolist()) == list(range(24))


def test_only_what_is_needed_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The denoiser sees the set's tokens alone, and a token is embedded once."""
    model, scheduler = open_model("rotary-flow"), open_scheduler("rotary-flow")
    seen: dict[str, list[int]] = {"embed_tokens": [], "encode_frame": [], "encode_context": []}
    denoised: list[int] = []
    model.image_decoder.register_forward_pre_hook(lambda head, given: denoised.append(given[0].shape[1]))

    def spy(name: str) -> None:
        original = getattr(model, name)

        def counted(*args: Any) -> Any:
            seen[name].append(args[1 if name == "encode_context" else 0].shape[1])
            return original(*args)

        monkeypatch.setattr(model, name, counted)

    for name in seen:
        spy(name)
    run(model, scheduler, make_state(model, [torch.randn(5, 32)], Guidance(4.0), frames=2, sets=3, steps=4))
    sizes = set_sizes(24, 3)
    assert seen["embed_tokens"] == sizes * 2
    assert denoised == [size for size in sizes for _ in range(4)] * 2
    assert seen["encode_context"] == [1]  # frame
    assert seen["encode_frame"] == [6]
