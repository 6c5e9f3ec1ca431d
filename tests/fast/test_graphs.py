"""Recording and replaying, with a recorder that needs no GPU: the same results in bounded memory, whatever changes."""

import gc
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_engine import DirectRecorder
from torch import Tensor

from conftest import CONFORMANCE
from nova_video import NovaPipeline
from nova_video.common.notices import warn_once
from nova_video.fast.fast_engine import DirectRunner, FastEngine
from nova_video.fast.graphs import CudaRecorder, GraphRunner, can_compile, capture
from nova_video.fast.training_graphs import StepGraphs
from nova_video.sampling.context import Context
from nova_video.sampling.engine import PlainEngine
from nova_video.sampling.generate import generate_sets
from nova_video.sampling.guidance import Guidance
from nova_video.sampling.presets import PRESETS, PresetName
from nova_video.sampling.schedulers import request_scheduler
from nova_video.sampling.side_stream import beside
from nova_video.sampling.state import GivenFrame
from test_sampling import GUIDANCES, close, embeds, make_state, open_model, open_scheduler


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def double(*, x: Tensor, y: Tensor | None) -> Tensor:
    return 2 * x if y is None else 2 * x + y


def test_called_then_recorded_then_replayed() -> None:
    recorder = DirectRecorder()
    runner = GraphRunner(recorder)
    for count in range(4):
        x, y = torch.full((2, 3), float(count)), torch.ones(3)
        assert torch.equal(runner(("double",), double, {"x": x, "y": y}), 2 * x + y)
        assert recorder.recorded == min(count, 1)
    assert torch.equal(runner(("double",), double, {"x": x, "y": None}), 2 * x)  # another function: nothing is added
    assert (recorder.recorded, len(runner)) == (1, 1)


def test_results_are_the_caller_s() -> None:
    runner = GraphRunner(DirectRecorder())
    results = [runner(("double",), double, {"x": torch.full((2,), float(i)), "y": None}) for i in range(4)]
    assert [result[0].item() for result in results] == [0, 2, 4, 6]


def test_inputs_are_copied_only_when_they_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = GraphRunner(DirectRecorder())
    x, y = torch.ones(2), torch.ones(2)
    for _ in range(2):
        runner(("double",), double, {"x": x, "y": y})
    filled: list[str] = []
    copy = torch.Tensor.copy_
    names = {id(buffer.memory): key[0] for key, buffer in runner._buffers.items()}
    monkeypatch.setattr(
        torch.Tensor, "copy_", lambda self, source: (filled.append(names.get(id(self), "-")), copy(self, source))[1]
    )
    runner(("double",), double, {"x": x, "y": y})
    assert filled == ["-"]  # the result alone
    y.add_(1)
    assert torch.equal(runner(("double",), double, {"x": x, "y": y}), torch.full((2,), 4.0))
    assert "y" in filled
    assert "x" not in filled


def test_inference_mode() -> None:
    runner = GraphRunner(DirectRecorder())
    with torch.inference_mode():
        x = torch.ones(2)
        for value in range(4):
            x.fill_(value)
            assert torch.equal(runner(("double",), double, {"x": x, "y": None}), 2 * x)


def test_what_cannot_be_captured_is_called_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever the sizes, and also when the runner is another one."""
    warn_once.cache_clear()
    for runner in (GraphRunner(DirectRecorder()), GraphRunner(DirectRecorder())):
        runner.recorder.fails = True
        for _ in range(4):
            for size in (2, 3, 4):
                x = torch.ones(size)
                assert torch.equal(runner(("double",), double, {"x": x, "y": None}), 2 * x)
        assert len(runner) == 0
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        "double is not captured, and computed step by step instead: operation not permitted when stream is capturing"
    ]


@pytest.mark.parametrize(("limits", "kept"), [({"max_graphs": 3}, 3), ({"max_bytes": 40}, 5)])
def test_bounded_in_number_and_memory(limits: dict[str, int], kept: int) -> None:
    runner = GraphRunner(DirectRecorder(size=10), **limits)
    for length in [*range(1, 9), *range(1, 9)]:
        runner(("double",), double, {"x": torch.ones(length), "y": None})
    assert len(runner) == len(runner._buffers) == kept
    recorded = runner.recorder.recorded
    runner(("double",), double, {"x": torch.ones(8), "y": None})
    assert runner.recorder.recorded == recorded  # the newest are there
    runner(("double",), double, {"x": torch.ones(1), "y": None})
    assert runner.recorder.recorded == recorded + 1  # the oldest are not


@pytest.mark.parametrize("limits", [{}, {"max_graphs": 1}, {"max_bytes": 5}])
def test_a_recorder_is_told_when_nothing_is_left(limits: dict[str, int]) -> None:
    runner = GraphRunner(DirectRecorder(size=10), **limits)

    def call(length: int) -> None:
        for _ in range(2):
            x = torch.ones(length)
            assert torch.equal(runner(("double",), double, {"x": x, "y": None}), 2 * x)

    call(1), call(2)
    assert runner.recorder.renewed == (1 if limits else 0)  # the first was dropped before the second was recorded
    call(3)
    before = runner.recorder.renewed
    runner.release()
    assert runner.recorder.renewed == before + 1
    assert (len(runner), runner.size, len(runner._buffers)) == (0, 0, 0)
    call(1)
    assert len(runner) == 1


def test_graphs_of_weights_that_moved_are_let_go() -> None:
    layer, runner = torch.nn.Linear(2, 2), GraphRunner(DirectRecorder())

    def function(*, x: Tensor) -> Tensor:
        return layer(x)

    runner.use(layer)
    for _ in range(2):
        runner(("layer",), function, {"x": torch.ones(1, 2)})
    runner.use(layer)
    assert len(runner) == 1
    layer.weight.data = layer.weight.data + 1
    runner.use(layer)
    assert len(runner) == 0
    assert torch.equal(runner(("layer",), function, {"x": torch.ones(1, 2)}), layer(torch.ones(1, 2)))


@pytest.mark.parametrize("guidance", [GUIDANCES[1], GUIDANCES[-1]], ids=str)
@pytest.mark.parametrize("folder", ["text-to-video", "rotary-flow"])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_clips_of_one_runner(folder: str, guidance: Guidance, compiled: bool) -> None:
    """Requests of several lengths and batches, replaying what others recorded, give the latents of calling."""
    if compiled and not can_compile(torch.device("cpu")):
        pytest.skip("torch.compile does not work here")
    torch.compiler.reset()
    dtype = torch.float64 if compiled else torch.float32  # compiled code rounds otherwise, and what it rounds grows
    model, scheduler = open_model(folder).to(dtype), open_scheduler(folder)
    runner = GraphRunner(DirectRecorder(), compiled)

    def made(how: Any, batch: int, frames: int, sets: int) -> Tensor:
        prompts = [prompt.to(dtype) for prompt in embeds()[:batch]]
        state = make_state(model, prompts, guidance, frames=frames, sets=sets)
        for _ in generate_sets(model, request_scheduler(scheduler, None), state, FastEngine(model, how)):
            pass
        return state.latents()

    for shape in [(1, 3, 5), (2, 2, 5), (1, 3, 5), (1, 2, 4), (2, 3, 5)]:
        close(made(runner, *shape), made(DirectRunner(set_multiple=8), *shape), 1e-5)
    assert len(runner) > 10


@pytest.mark.slow
def test_scales_of_guidance_share_graphs() -> None:
    model, scheduler, runner = (
        open_model("text-to-video"),
        open_scheduler("text-to-video"),
        GraphRunner(DirectRecorder()),
    )

    def made(how: Any, scale: float) -> Tensor:
        state = make_state(model, embeds()[:1], Guidance(scale=scale))
        for _ in generate_sets(model, request_scheduler(scheduler, None), state, FastEngine(model, how)):
            pass
        return state.latents()

    made(runner, 3.0), made(runner, 3.0)
    recorded = len(runner)
    close(made(runner, 7.0), made(DirectRunner(set_multiple=8), 7.0), 1e-5)
    assert len(runner) == recorded


def test_threads_take_turns() -> None:
    runner = GraphRunner(DirectRecorder())
    wrong: list[int] = []

    def work(number: int) -> None:
        with torch.no_grad():
            for count in range(200):
                x = torch.full((3,), float(1000 * number + count))
                if not torch.equal(runner(("double",), double, {"x": x, "y": None}), 2 * x):
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


class BrokenGraph:
    """A CUDA graph whose capture ends in an error of its own once one has come before, as torch's does."""

    def __init__(self) -> None:
        self.capturing = False

    def capture_begin(self, pool: object, capture_error_mode: str) -> None:
        self.capturing = True

    def capture_end(self) -> None:
        self.capturing = False
        raise RuntimeError("operation failed due to a previous error during capture")


@pytest.mark.parametrize("error", [RuntimeError("a copy waits for the device"), KeyboardInterrupt()])
def test_a_broken_capture_ends_and_keeps_its_first_error(error: BaseException) -> None:
    graph: Any = BrokenGraph()

    def fail() -> None:
        assert not gc.isenabled()  # a pool among the garbage would free its memory in the middle of the capture
        raise error

    with pytest.raises(type(error)) as caught:
        capture(graph, (0, 1), fail)
    assert caught.value is error
    assert not graph.capturing
    assert gc.isenabled()


# With capture on ------------------------------------------------------------------------------------------------------

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def latents_on_gpu(model: Any, scheduler: Any, engine: Any, guidance: Guidance, batch: int = 2, **shape: int) -> Tensor:
    """From seed 0, with random numbers drawn on the CPU."""
    cuda = torch.device("cuda")
    state = make_state(model, embeds()[:batch], guidance, device=cuda, **shape)
    for _ in generate_sets(model, request_scheduler(scheduler, None), state, engine):
        pass
    return state.latents().cpu()


@gpu
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("guidance", GUIDANCES, ids=str)
@pytest.mark.parametrize("folder", ["text-to-image", "text-to-video", "rotary-flow"])
def test_gpu_graphs_equal_the_plain_loop(folder: str, guidance: Guidance, preset: PresetName, fused: bool) -> None:
    """Called, captured and replayed: all the same, in fp32 within 1e-4 of the largest value."""
    model, scheduler = open_model(folder).cuda(), open_scheduler(folder)
    shape: dict[str, Any] = {"frames": 1 if folder == "text-to-image" else 3, "sets": 5, "speed": PRESETS[preset]}
    plain = latents_on_gpu(model, scheduler, PlainEngine(model), guidance, **shape)
    cuda = torch.device("cuda")
    runner = GraphRunner(CudaRecorder(cuda), can_compile(cuda), fused)
    for _ in range(3):
        close(latents_on_gpu(model, scheduler, FastEngine(model, runner), guidance, **shape), plain)
    assert len(runner) > 1


@gpu
def test_gpu_memory_is_flat_over_calls_of_mixed_shapes() -> None:
    model, scheduler, cuda = open_model("rotary-flow").cuda(), open_scheduler("rotary-flow"), torch.device("cuda")
    runner = GraphRunner(CudaRecorder(cuda), can_compile(cuda), max_graphs=40)
    taken = []
    for call in range(200):
        shape = {"batch": 1 + call % 2, "frames": 1 + call % 3, "sets": 2 + call % 5, "steps": 2 + call % 3}
        latents_on_gpu(model, scheduler, FastEngine(model, runner), GUIDANCES[1 + call % 2], **shape)
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        taken.append(total - free)
    assert len(runner) <= 40
    assert max(taken[100:]) <= max(taken[:100]) * 1.01
    before = torch.cuda.memory_reserved()
    runner.release()
    torch.cuda.empty_cache()
    assert len(runner) == 0
    assert torch.cuda.memory_reserved() <= before


def record(runner: GraphRunner, length: int) -> None:
    """One more graph, with 4 bytes of working memory a number."""
    for _ in range(2):
        x = torch.ones(length, device="cuda")
        assert torch.equal(runner(("double",), double, {"x": x, "y": None}), 2 * x)


@gpu
def test_gpu_records_again_after_all_is_gone() -> None:
    """Behind a release, and behind graphs of which each drives out the one before."""
    runner = GraphRunner(CudaRecorder(torch.device("cuda")))
    for _ in range(3):
        record(runner, 1000), record(runner, 2000)
        assert len(runner) == 2
        runner.release()
    for limits in ({"max_graphs": 1}, {"max_bytes": 1}):
        runner = GraphRunner(CudaRecorder(torch.device("cuda")), **limits)
        for length in (1000, 2000, 3000, 1000):
            record(runner, length)
            assert len(runner) == 1
    torch.rand(3, device="cuda")


@gpu
def test_gpu_size_is_what_graphs_took_themselves() -> None:
    other: list[Tensor] = []

    def take() -> None:
        other.append(torch.empty(1 << 28, dtype=torch.uint8, device="cuda"))

    def taking(*, x: Tensor) -> Tensor:
        thread = threading.Thread(target=take)
        thread.start(), thread.join()
        return x.repeat(2) + 1

    runner = GraphRunner(CudaRecorder(torch.device("cuda")))
    x = torch.ones(1 << 22, device="cuda")
    for _ in range(2):
        assert torch.equal(runner(("taking",), taking, {"x": x}), torch.full((1 << 23,), 2.0, device="cuda"))
    assert len(runner) == 1
    assert 1 << 25 <= runner.size < 1 << 27


@gpu
def test_gpu_after_what_cannot_be_captured() -> None:
    """It is called, random numbers are still drawn, and others are recorded."""
    runner = GraphRunner(CudaRecorder(torch.device("cuda")))

    def asking(*, x: Tensor) -> Tensor:
        return x * x.sum().item()

    torch.manual_seed(0)
    first, second = (torch.rand(4, device="cuda") for _ in range(2))
    torch.manual_seed(0)
    assert torch.equal(torch.rand(4, device="cuda"), first)
    record(runner, 1000)
    for _ in range(3):
        assert torch.equal(
            runner(("asking",), asking, {"x": torch.ones(2, device="cuda")}), torch.full((2,), 2.0).cuda()
        )
    assert torch.equal(torch.rand(4, device="cuda"), second)
    record(runner, 1000), record(runner, 2000)
    assert len(runner) == 2
    runner.release()
    record(runner, 1000)
    assert len(runner) == 1


@gpu
def test_gpu_training_goes_on_behind_a_step_that_cannot_be_captured(caplog: pytest.LogCaptureFixture) -> None:
    """Steps recorded before are replayed, others are called, and the line says the first error."""
    graphs = StepGraphs(CudaRecorder(torch.device("cuda")))
    sums = torch.zeros(2, device="cuda")

    def step(batch: dict[str, Tensor], item: bool) -> None:
        x = batch["x"] * torch.ones(1000, device="cuda")
        sums[int(item)] += x.mean().item() if item else x.mean()

    for count in range(1, 5):
        batch = {"x": torch.full((1,), float(count), device="cuda")}
        graphs("good", batch, lambda batch: step(batch, item=False))
        graphs("bad", batch, lambda batch: step(batch, item=True))
        graphs(("other", count % 2), batch, lambda batch: step(batch, item=False))
    assert sums.tolist() == [20, 10]
    assert len(graphs) == 1
    (line,) = [record.message for record in caplog.records if "computed one by one" in record.message]
    assert "previous error" not in line
    graphs.release()
    torch.rand(3, device="cuda")


@gpu
def test_gpu_noise_is_drawn_beside() -> None:
    """What a block's work makes is there behind it, whatever the streams had to do."""
    cuda = torch.device("cuda")
    big = torch.randn(4096, 4096, device=cuda)
    for count in range(20):
        ids = torch.full((1000,), count, device=cuda)
        for _ in range(3):
            big = big @ big / 64
        with beside(cuda, lambda: (ids * 2, ids + 1)) as made:  # noqa: B023
            big = big @ big / 64
        double, next_one = made
        assert int(double.sum()) == 2000 * count
        assert int(next_one.sum()) == 1000 * (count + 1)


@gpu
def test_gpu_a_changed_prompt_mask_and_context_are_replayed() -> None:
    """What differs between calls of one shape reaches the graphs: nothing of an earlier call is left in them."""
    model, scheduler, cuda = open_model("rotary-flow").cuda(), open_scheduler("rotary-flow"), torch.device("cuda")
    runner = GraphRunner(CudaRecorder(cuda), can_compile(cuda))
    known = (torch.arange(24) % 3 == 0).cuda()

    def made(seed: int, engine: Any) -> Tensor:
        torch.manual_seed(seed)
        given = {1: GivenFrame(torch.randn(1, 4, 8, 12).to(cuda), known, redraw=16)}
        context = Context(frames=3, history_noise=0.1)
        state = make_state(model, [torch.randn(4, 32)], Guidance(4.0), frames=5, sets=5, context=context, device=cuda)
        state = replace(state, given=given)
        for _ in generate_sets(model, request_scheduler(scheduler, None), state, engine):
            pass
        return state.latents().cpu()

    for seed in range(4):
        close(made(seed, FastEngine(model, runner)), made(seed, PlainEngine(model)))


# A pipeline's graphs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offloaded", [False, True])
def test_release_drops_graphs_and_compiled_code(offloaded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the library's offload too, where there are no graphs. As on a GPU, with nothing run there."""
    pipe = NovaPipeline.from_pretrained(CONFORMANCE / "text-to-image")
    resets: list[bool] = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(True))
    pipe.engines.engine(pipe.transformer, compile=True, offloaded=offloaded), pipe.release()
    assert not resets  # nothing is compiled on a CPU
    monkeypatch.setattr("nova_video.pipeline.engines.execution_device", lambda model: torch.device("cuda"))
    monkeypatch.setattr("nova_video.fast.graphs.can_compile", lambda device: True)
    monkeypatch.setattr("nova_video.fast.graphs.CudaRecorder", lambda device: DirectRecorder())
    pipe.engines.engine(pipe.transformer, compile=True, offloaded=offloaded)
    assert len(pipe.engines._graphs) == (not offloaded)
    for _ in range(2):
        pipe.release()
        assert (len(pipe.engines._graphs), len(resets)) == (0, 1)
    pipe.engines.engine(pipe.transformer, compile=True, offloaded=offloaded), pipe.release()
    assert len(resets) == 2
