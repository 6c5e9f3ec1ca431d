"""Generations that are computed together: each is what it is alone, whatever becomes of the others."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nova_video import GenerateRequest, InputError, NovaPipeline
from nova_video.pipeline import together
from nova_video.pipeline.events import FrameReady
from nova_video.pipeline.generation import Generation
from nova_video.pipeline.together import Together
from nova_video.sampling.generate import make_sets
from test_generation import APPLE, WHALE, clip, close

SAME: dict[str, Any] = {"num_frames": 9, "output_type": "pt", "sets": 3, "diffusion_steps": 2}


@pytest.fixture(params=["tiled", "causal"])
def pipe(request: pytest.FixtureRequest) -> NovaPipeline:
    found: NovaPipeline = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of sets that were made in one batch."""
    found: list[int] = []

    def counted(sets: Any) -> Any:
        found.append(len(sets))
        return make_sets(sets)

    monkeypatch.setattr(together, "make_sets", counted)
    return found


def begin(pipe: NovaPipeline, seed: int, prompt: Any = WHALE, **options: Any) -> Generation:
    return pipe.start(GenerateRequest(prompt, seed=seed, **SAME | options))


def alone(generation: Generation) -> torch.Tensor:
    return torch.stack(list(generation.stream()))


def pull(
    group: Together,
    members: Sequence[Generation],
    act: Callable[[int], None] = lambda pulls: None,
    late: Sequence[Generation] = (),
) -> dict[Generation, list[torch.Tensor]]:
    """Pull all members to their ends as a server does; `late` ones join after five pulls."""
    streams: dict[Generation, Any] = {}
    frames: dict[Generation, list[torch.Tensor]] = {}

    def admit(generation: Generation) -> None:
        group.join(generation)
        streams[generation], frames[generation] = generation.stream(preview=True), []

    for each in members:
        admit(each)
    pulls = 0
    while streams:
        if pulls == 5:
            for each in late:
                admit(each)
        generation = group.turn(list(streams))
        act(pulls)
        pulls += 1
        event = next(streams[generation], None)
        if isinstance(event, FrameReady):
            frames[generation].append(event.frame)
        if event is None:
            group.leave(generation)
            del streams[generation]
        elif generation.state.open is None:  # a frame each in turn
            streams[generation] = streams.pop(generation)
    return frames


@pytest.mark.parametrize("compile", [True, False])
def test_each_is_what_it_is_alone(pipe: NovaPipeline, sizes: list[int], compile: bool) -> None:
    prompts = [WHALE, APPLE, [(0, WHALE), (0.3, APPLE)]]  # 9 frames at 12 a second
    options = {"compile": compile, "output_type": "latent"}
    expected = [alone(begin(pipe, seed, prompt, **options)) for seed, prompt in enumerate(prompts)]
    members = [begin(pipe, seed, prompt, **options) for seed, prompt in enumerate(prompts)]
    frames = pull(Together(), members[:2], late=members[2:])
    for each, whole in zip(members, expected, strict=True):
        close(torch.stack(frames[each]), whole)
    assert sizes == [2] * 3 + [3] * 6 + [1] * 3


def test_with_nobody_else_bit_for_bit(causal: NovaPipeline, sizes: list[int]) -> None:
    lonely, other = begin(causal, 0), begin(causal, 1, guidance_scale=2.0)
    frames = pull(Together(), [lonely, other])
    assert torch.equal(torch.stack(frames[lonely]), alone(begin(causal, 0)))
    assert torch.equal(torch.stack(frames[other]), alone(begin(causal, 1, guidance_scale=2.0)))
    assert set(sizes) == {1}, "guidance differs"


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_every": 2, "sets": 4},
        {"solver": "dpm++", "image_guidance_scale": 1.5},
        {"guidance_renorm": 0.5},
        {"num_images_per_prompt": 2},
        {"context_frames": 13, "num_frames": 17, "history_noise": 0.1, "hold_statistics": 0.5},
        {"video": clip(5), "num_frames": 9},
        {"video": clip(9), "strength": 0.5},
    ],
    ids=lambda options: next(iter(options)),
)
def test_settings(causal: NovaPipeline, sizes: list[int], options: dict[str, Any]) -> None:
    options = {"output_type": "np", **options}
    expected = [np.stack(list(begin(causal, seed, **options).stream())) for seed in (0, 1)]
    members = [begin(causal, seed, **options) for seed in (0, 1)]
    group = Together()
    streams = {}
    for each in members:
        group.join(each)
        streams[each] = each.stream()
    made: dict[Generation, list[Any]] = {each: [] for each in members}
    for _ in range(len(expected[0])):
        for each in members:
            made[each].append(next(streams[each]))
    for each, whole in zip(members, expected, strict=True):
        close(torch.from_numpy(np.stack(made[each])), torch.from_numpy(whole))
    assert max(sizes) == 2


def test_one_stops_in_a_frame_and_goes_on_alone(causal: NovaPipeline, tmp_path: Path) -> None:
    first, second = members = [begin(causal, seed) for seed in (0, 1)]
    expected = [alone(begin(causal, seed)) for seed in (0, 1)]
    group = Together()

    def stop(pulls: int) -> None:
        if pulls == 2:
            first.save(tmp_path / "state")  # a set of it waits to be pulled
            first.interrupt()

    frames = pull(group, members, stop)
    close(torch.stack(frames[second]), expected[1])
    assert not first.state.finished
    rest = list(first.stream())
    close(torch.stack([*frames[first], *rest]), expected[0])
    close(alone(causal.resume(tmp_path / "state")), expected[0])


def test_one_fails(causal: NovaPipeline) -> None:
    first, second = members = [begin(causal, seed) for seed in (0, 1)]
    expected = alone(begin(causal, 1))

    def spoil(pulls: int) -> None:
        if pulls == 2:
            assert first.state.open is not None
            first.state.open.tokens[:] = torch.nan

    with pytest.raises(InputError, match="latent frame 0 has values that are not finite"):
        pull(group := Together(), members, spoil)
    group.leave(first)
    close(alone(second), expected)


def test_too_many_at_once(
    causal: NovaPipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = [alone(begin(causal, seed)) for seed in (0, 1)]
    members = [begin(causal, seed) for seed in (0, 1)]
    kind = type(members[0].sampler.engine)
    denoise = kind.denoise

    def small(engine: Any, features: torch.Tensor, ids: torch.Tensor, *others: Any) -> torch.Tensor:
        if len(ids) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return denoise(engine, features, ids, *others)

    monkeypatch.setattr(kind, "denoise", small)
    frames = pull(Together(), members)
    for each, whole in zip(members, expected, strict=True):
        assert torch.equal(torch.stack(frames[each]), whole)
    assert "at most 1" in caplog.text


def test_a_failed_set_costs_no_random_numbers(causal: NovaPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    generation = begin(causal, 0)
    engine = generation.sampler.engine
    with monkeypatch.context() as patch:
        patch.setattr(type(engine), "denoise", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
        with pytest.raises(torch.OutOfMemoryError):
            list(generation.stream())
    assert torch.equal(alone(generation), alone(begin(causal, 0)))


def test_wrong_use(causal: NovaPipeline) -> None:
    group, generation = Together(), begin(causal, 0)
    group.join(generation)
    with pytest.raises(InputError, match="in a group already"):
        Together().join(generation)
    with pytest.raises(InputError, match="ahead is True for a generation in a group"):
        next(generation.stream(ahead=True))
    group.leave(generation)
    group.leave(generation)
    stream = generation.stream(ahead=True)
    next(stream)
    with pytest.raises(InputError, match="streamed with ahead=True"):
        group.join(generation)
    stream.close()
    group.join(generation)
