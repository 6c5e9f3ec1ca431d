"""The fast engine gives the plain one's latents: every guidance mode, scheduler, kind of position, mask and context."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler
from torch import Tensor

from nova_video.common.notices import warn_once
from nova_video.fast.fast_engine import DirectRunner, FastEngine, Inputs, Modulations, pad_set
from nova_video.fast.graphs import GraphRunner, Recording
from nova_video.fast.modulations import modulations as modulations_of
from nova_video.model.denoiser import Denoiser, DenoiserBlock
from nova_video.model.vit import Attention
from nova_video.sampling import guidance as formulas
from nova_video.sampling.context import Context
from nova_video.sampling.engine import Engine, PlainEngine
from nova_video.sampling.generate import generate_sets
from nova_video.sampling.guidance import CONDITIONAL, Guidance, Prediction
from nova_video.sampling.schedulers import request_scheduler
from nova_video.sampling.state import GivenFrame, SamplingState, Segment
from nova_video.sampling.stopwatch import Stopwatch
from test_sampling import DDPM_CONFIG, GUIDANCES, close, embeds, make_state, open_model, open_scheduler


@pytest.fixture(autouse=True)
def _seeded_without_gradients() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def run(
    folder: str, engine: Callable[[Any], Engine], state: SamplingState, scheduler: Any = None, model: Any = None
) -> Tensor:
    model = model or open_model(folder)
    for _ in generate_sets(model, request_scheduler(scheduler or open_scheduler(folder), None), state, engine(model)):
        pass
    return state.latents()


def fast(model: Any) -> Engine:
    return FastEngine(model, DirectRunner(set_multiple=8))  # as on a GPU


@pytest.mark.parametrize("guidance", GUIDANCES, ids=str)
@pytest.mark.parametrize("folder", ["text-to-image", "text-to-video", "rotary-flow"])
def test_fast_equals_plain(folder: str, guidance: Guidance) -> None:
    frames = 1 if folder == "text-to-image" else 3
    model = open_model(folder).double()  # guidance enlarges float32's rounding, more on some processors than on others
    features = [row.double() for row in embeds()]
    plain, quick = (
        run(folder, engine, make_state(model, features, guidance, frames=frames, sets=5), model=model)
        for engine in (PlainEngine, fast)
    )
    close(quick, plain, 1e-9)


@pytest.mark.parametrize("renorm", [1.0, 0.3])
@pytest.mark.parametrize("cls", [DDIMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler])
def test_other_schedulers(cls: Any, renorm: float) -> None:
    """Those that draw as they step go the plain way; the others through the same function of tensors."""
    scheduler = cls.from_config(DDPMScheduler.from_pretrained(DDPM_CONFIG).config)
    model, guidance = open_model("text-to-video"), Guidance(4.0, renorm=renorm)
    plain, quick = (
        run("text-to-video", engine, make_state(model, embeds(), guidance), scheduler) for engine in (PlainEngine, fast)
    )
    close(quick, plain)


@pytest.mark.parametrize("folder", ["text-to-video", "rotary-flow"])
def test_masks_timelines_and_bounded_context(folder: str) -> None:
    model, guidance = open_model(folder), Guidance(4.0)
    known = torch.arange(24) % 3 == 0
    latents = torch.randn(2, 4, 8, 12)

    def state() -> SamplingState:
        made = make_state(model, embeds(), guidance, frames=6, sets=5, context=Context(frames=3, history_noise=0.1))
        given = {0: GivenFrame(latents), 1: GivenFrame(latents, known, redraw=16), 4: GivenFrame(latents, known, 9)}
        later = Segment(3, -made.segments[0].text, replace(guidance, scale=2.0), begin=2)
        return replace(made, given=given, segments=[*made.segments, later])

    close(run(folder, fast, state()), run(folder, PlainEngine, state()))


def test_a_slower_way_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    warn_once.cache_clear()
    scheduler = EulerAncestralDiscreteScheduler.from_config(DDPMScheduler.from_pretrained(DDPM_CONFIG).config)
    for _ in range(2):
        run("text-to-video", fast, make_state(open_model("text-to-video"), embeds(), Guidance(4.0)), scheduler)
    (record,) = caplog.records
    assert record.message.startswith("EulerAncestralDiscreteScheduler takes its steps itself")


class DirectRecorder:
    """Replays by calling the function again, on the memory that it was recorded with, as a graph does."""

    def __init__(self, size: int = 1) -> None:
        self.size, self.recorded, self.waits, self.renewed = size, 0, 0, 0
        self.fails = False

    def record(self, function: Callable[..., Tensor], arguments: Inputs) -> Recording:
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        self.recorded += 1
        output = torch.full_like(
            function(**{name: None if x is None else x.clone() for name, x in arguments.items()}), torch.nan
        )

        def replay() -> None:
            output.copy_(function(**arguments))

        return Recording(replay, output, self.size)

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        yield

    def wait(self) -> None:
        self.waits += 1

    def renew(self) -> None:
        self.renewed += 1


class Halved(Denoiser):
    def forward(self, *args: Any) -> Tensor:
        return super().forward(*args) / 2


class HalvedBlock(DenoiserBlock):
    def forward(self, *args: Any) -> Tensor:
        return super().forward(*args) / 2


class NegatedAttention(Attention):
    def forward(self, *args: Any) -> Tensor:
        return -super().forward(*args)


@dataclass(frozen=True)
class HalvedGuidance(Guidance):
    def combine(self, outputs: Tensor, passes: int) -> Prediction:
        return super().combine(outputs / 2, passes)


class HalvedNorm(torch.nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


def set_class(part: str, kind: type[Any]) -> Callable[[Any, Any], None]:
    return lambda model, patch: patch.setattr(model.get_submodule(part), "__class__", kind)


def negated(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: -function(*args, **kwargs)


def patched(kind: type[Any], name: str) -> Callable[[Any, Any], None]:
    return lambda model, patch: patch.setattr(kind, name, negated(getattr(kind, name)))


def patched_on(part: str, name: str) -> Callable[[Any, Any], None]:
    """On the object alone."""
    return lambda model, patch: patch.setattr(
        model.get_submodule(part), name, negated(getattr(model.get_submodule(part), name)), raising=False
    )


def hooked(part: str) -> Callable[[Any, Any], None]:
    return lambda model, patch: model.get_submodule(part).register_forward_hook(lambda *called: -called[-1])


def patched_combine(model: Any, patch: Any) -> None:
    combine = Guidance.combine
    patch.setattr(Guidance, "combine", lambda self, outputs, passes: combine(self, outputs / 2, passes))


CHANGES: list[tuple[Callable[[Any, Any], object] | None, Guidance, str]] = [
    (set_class("image_decoder", Halved), Guidance(4.0), "image_decoder is a Halved, a class of its own"),
    (set_class("image_decoder.blocks.0", HalvedBlock), Guidance(4.0), "image_decoder.blocks.0 is a HalvedBlock"),
    (set_class("image_encoder.blocks.2.attn", NegatedAttention), Guidance(4.0), "attn is a NegatedAttention"),
    (set_class("video_encoder.blocks.0.attn", NegatedAttention), Guidance(4.0), "attn is a NegatedAttention"),
    (set_class("image_encoder.blocks.1.norm2", HalvedNorm), Guidance(4.0), "norm2 is a HalvedNorm"),
    (hooked("image_decoder"), Guidance(4.0), "image_decoder (Denoiser) has a hook"),
    (hooked("image_encoder.blocks.3.mlp"), Guidance(4.0), "image_encoder.blocks.3.mlp (Mlp) has a hook"),
    (patched_on("image_decoder", "forward"), Guidance(4.0), "image_decoder (Denoiser) has a hook or a method"),
    (patched_on("", "encode_tokens"), Guidance(4.0), "the transformer (NOVATransformer3DModel) has a hook or a method"),
    (patched(Denoiser, "forward"), Guidance(4.0), "Denoiser.forward is patched"),
    (patched(Attention, "forward"), Guidance(4.0), "Attention.forward is patched"),
    (patched_combine, Guidance(4.0), "Guidance.combine is patched"),
    (None, HalvedGuidance(4.0), "HalvedGuidance is a guidance of its own"),
]


@pytest.mark.parametrize(("change", "guidance", "said"), CHANGES, ids=[said for _, _, said in CHANGES])
def test_the_fast_way_follows_a_change_or_steps_aside(
    change: Callable[[Any, Any], object] | None,
    guidance: Guidance,
    said: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where graphs were captured before the change; and one line in the log says so."""
    warn_once.cache_clear()
    model, scheduler = open_model("text-to-video"), open_scheduler("text-to-video")
    runner = GraphRunner(DirectRecorder(), compiled=False)

    def made(engine: Callable[[Any], Engine], guidance: Guidance = guidance) -> Tensor:
        state = make_state(model, embeds(), guidance, frames=2, sets=3)
        for _ in generate_sets(model, request_scheduler(scheduler, None), state, engine(model)):
            pass
        return state.latents()

    def replayed(model: Any) -> Engine:
        runner.use(model)
        return FastEngine(model, runner)

    stock = made(PlainEngine, Guidance(4.0))
    for _ in range(2):
        close(made(replayed, Guidance(4.0)), stock)
    assert len(runner) > 1
    if change is not None:
        change(model, monkeypatch)
    plain, quick = made(PlainEngine), made(replayed)
    close(quick, plain)
    assert (quick - stock).abs().max() > 1e-3
    (record,) = caplog.records
    assert said in record.message


def test_a_replaced_layer_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers within blocks may be of any class: a graph that was captured with another one is not replayed."""
    model, runner = open_model("text-to-video"), GraphRunner(DirectRecorder(), compiled=False)

    def made() -> Tensor:
        runner.use(model)
        return run(
            "text-to-video",
            lambda model: FastEngine(model, runner),
            make_state(model, embeds(), CONDITIONAL),
            model=model,
        )

    stock = [made() for _ in range(3)][-1]
    assert len(runner) > 1
    layer = model.image_encoder.blocks[0].attn.proj
    model.image_encoder.blocks[0].attn.proj = torch.nn.Sequential(layer, torch.nn.Tanh())
    changed = made()
    close(changed, run("text-to-video", PlainEngine, make_state(model, embeds(), CONDITIONAL), model=model))
    assert (changed - stock).abs().max() > 1e-3


@dataclass(frozen=True)
class OwnRule:
    """A rule that has nothing but what `GuidanceRule` says: two passes, of which the second counts `share`."""

    share: float
    passes: int = 2

    def passes_at(self, timestep: float) -> int:
        return self.passes

    def combine(self, outputs: Tensor, passes: int) -> Prediction:
        cond, null = outputs.float().chunk(passes)
        return Prediction(cond, (1 - self.share) * cond + self.share * null)


def test_an_own_rule_is_followed_with_its_constants() -> None:
    model, runner = open_model("rotary-flow"), GraphRunner(DirectRecorder(), compiled=False)

    def made(engine: Callable[[Any], Engine], guidance: Any) -> Tensor:
        return run("rotary-flow", engine, make_state(model, embeds(), guidance, frames=2, sets=3), model=model)

    def replayed(model: Any) -> Engine:
        return FastEngine(model, runner)

    for share in (-3.0, -3.0, -1.0):
        close(made(replayed, OwnRule(share)), made(PlainEngine, OwnRule(share)))
    close(made(PlainEngine, OwnRule(-3.0)), made(PlainEngine, Guidance(4.0)))  # u + 4 (c - u)


@pytest.mark.parametrize("renorm", [1.0, 0.5])
def test_both_ways_follow_the_formula_of_guidance(renorm: float, monkeypatch: pytest.MonkeyPatch) -> None:
    guidance, combine = Guidance(4.0, renorm=renorm), formulas.combine

    def made(engine: Callable[[Any], Engine]) -> Tensor:
        return run("rotary-flow", engine, make_state(open_model("rotary-flow"), embeds(), guidance))

    stock = made(fast)
    monkeypatch.setattr(formulas, "combine", lambda outputs, *others: combine(outputs / 2, *others))
    quick = made(fast)
    close(quick, made(PlainEngine))
    assert (quick - stock).abs().max() > 1e-2


def test_sets_are_padded_with_a_token_of_their_own() -> None:
    ids = torch.tensor([[7, 3, 5], [2, 9, 4]])
    padded = pad_set(ids, 8, -1)
    assert padded.shape == (2, 8)
    assert torch.equal(padded[:, :3], ids)
    assert (padded[:, 3:] == ids[:, :1]).all()
    assert pad_set(padded, 8, -1) is padded
    values = torch.randn(0, 2, 3, 4)  # none
    assert pad_set(values, 8, -2).shape == (0, 2, 8, 4)


@pytest.mark.parametrize("at_once", [1, 3, 1000])
def test_modulations_in_chunks(at_once: int) -> None:
    denoiser = open_model("text-to-video").image_decoder
    condition, times = torch.randn(2, 3, denoiser.norm.proj.in_features), torch.randn(5, denoiser.norm.proj.in_features)
    modulations = Modulations(denoiser, condition, times)
    modulations.chunk = at_once
    for step in range(5):
        for got, expected in zip(
            modulations.at(step, 1), modulations_of(denoiser, times[step] + condition), strict=True
        ):
            torch.testing.assert_close(got, expected[:1], rtol=1e-5, atol=1e-5)


@dataclass
class Recorder:
    """A runner that keeps what a graph would be keyed by."""

    compiled: bool = False
    fused: bool = False
    set_multiple: int = 8
    keys: list[tuple[object, ...]] = field(default_factory=list)

    def arranged(self, model: Any) -> Any:
        return model

    def unknown(self, model: Any) -> None:
        """The model of the test is known in every part."""

    def __call__(self, key: tuple[object, ...], function: Callable[..., Tensor], inputs: Inputs) -> Tensor:
        shapes = tuple((name, None if x is None else (x.shape, x.dtype)) for name, x in inputs.items())
        self.keys.append((*key, shapes))
        return function(**inputs)


def test_a_clip_needs_few_graphs() -> None:
    """Every frame asks for the same functions again, and so does the next request."""
    model, recorder = open_model("rotary-flow"), Recorder()

    def keys(frames: int) -> set[tuple[object, ...]]:
        recorder.keys.clear()
        run(
            "rotary-flow",
            lambda model: FastEngine(model, recorder),
            make_state(model, embeds(), Guidance(4.0), frames=frames, sets=5),
        )
        assert len(recorder.keys) == 2 * 5 * frames + (frames == 1)
        return {key for key in recorder.keys if key[0] != "context"}  # of a single frame alone

    one = keys(1)
    assert len(one) == 5 + 1  # a function a set of the spatial encoder; all sets fit into one padded size
    assert keys(3) == one


def test_stopwatch() -> None:
    model, stopwatch = open_model("rotary-flow"), Stopwatch(torch.device("cpu"))
    state = make_state(model, embeds(), Guidance(4.0))
    for _ in generate_sets(model, request_scheduler(open_scheduler("rotary-flow"), None), state, None, stopwatch):
        pass
    seconds = stopwatch.seconds()
    assert set(seconds) == {"temporal", "spatial", "denoiser"}
    assert all(value > 0 for value in seconds.values())
    stopwatch.reset()
    assert stopwatch.seconds() == {}


def test_reused_features() -> None:
    """All tokens encoded for every set are the plain engine's; for fewer sets, the blocks have less to do."""
    path = Path(__file__).parents[2] / "benchmarks" / "reuse.py"
    spec = importlib.util.spec_from_file_location("reuse_script", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    sys.modules["reuse_script"] = script  # where dataclasses look their annotations up
    spec.loader.exec_module(script)
    for folder in ("text-to-video", "rotary-flow"):
        model, guidance = open_model(folder), Guidance(4.0)

        def made(engine: Any, folder: str = folder, model: Any = model, guidance: Guidance = guidance) -> Tensor:
            return run(folder, engine, make_state(model, embeds(), guidance, frames=2, sets=5))

        engines = [script.ReusingEngine(model, DirectRunner(), every=every) for every in (1, 2, 5)]
        plain = made(PlainEngine)
        whole, second, once = (made(lambda _, engine=engine: engine) for engine in engines)
        close(whole, plain)
        assert not torch.equal(second, plain)
        assert not torch.equal(second, once)
        assert engines[2].rows < engines[1].rows < engines[0].rows
