"""Changes of a clip while it is made: the clip is the one whose timelines had said so from the start, bit for bit."""

import copy
import json
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nova_video import GenerateRequest, InputError, NovaPipeline
from nova_video.pipeline.generation import Generation
from nova_video.pipeline.offload import take_turns
from nova_video.pipeline.together import Together
from test_generation import APPLE, WHALE, clip, close

FPS = 12
AT = 5 / FPS  # the third latent frame
SAME: dict[str, Any] = {"num_frames": 13, "output_type": "np", "sets": 2, "diffusion_steps": 2, "fps": FPS, "seed": 0}


def begin(pipe: NovaPipeline, prompt: Any = WHALE, **options: Any) -> Generation:
    return pipe.start(GenerateRequest(prompt, **{**SAME, **options}))


def whole(pipe: NovaPipeline, prompt: Any = WHALE, **options: Any) -> np.ndarray:
    frames: np.ndarray = begin(pipe, prompt, **options).run(show_progress=False).frames
    return frames


def go(generation: Generation, sets: int) -> None:
    """Make so many sets."""
    generation.run(lambda _pipe, step, *_: step + 1 < sets, show_progress=False)


def rest(generation: Generation) -> np.ndarray:
    frames: np.ndarray = generation.run(show_progress=False).frames
    return frames


CHANGES: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ({"prompt": APPLE}, {}, {"prompt": [(0, WHALE), (AT, APPLE)]}),
    ({"motion_flow": 9.0}, {}, {"motion_flow": [(0, 5.0), (AT, 9.0)]}),
    ({"guidance_scale": 2.0}, {}, {"guidance_scale": [(0, 5.0), (AT, 2.0)]}),
    (
        {"prompt": APPLE, "motion_flow": 2.0, "guidance_scale": 1.0},
        {"context_frames": 13, "history_noise": 0.1},
        {
            "prompt": [(0, WHALE), (AT, APPLE)],
            "motion_flow": [(0, 5.0), (AT, 2.0)],
            "guidance_scale": [(0, 5.0), (AT, 1)],
        },
    ),
    ({"prompt": WHALE}, {}, {"prompt": [(0, WHALE), (AT, WHALE)]}),
    ({"prompt": APPLE}, {"compile": False, "image_guidance_scale": 1.5}, {"prompt": [(0, WHALE), (AT, APPLE)]}),
]


@pytest.mark.parametrize(("change", "options", "timeline"), CHANGES, ids=lambda part: " ".join(part) or "alone")
def test_as_a_timeline_from_the_start(
    causal: NovaPipeline, change: dict[str, Any], options: dict[str, Any], timeline: dict[str, Any], tmp_path: Path
) -> None:
    options = {"motion_flow": 5.0, "guidance_scale": 5.0, **options}
    expected = whole(causal, **{"prompt": WHALE, **options, **timeline})
    generation = begin(causal, **options)
    go(generation, 3)  # within the second latent frame
    assert generation.next_change == 5
    assert generation.change(**change) == 5
    generation.save(tmp_path / "state")
    assert np.array_equal(rest(generation), expected)
    assert np.array_equal(rest(causal.resume(tmp_path / "state")), expected)
    assert not np.array_equal(expected, whole(causal, **options)) or change == {"prompt": WHALE}
    asked = begin(causal, **{"prompt": WHALE, **options, **timeline}).records
    assert json.loads(json.dumps(generation.records)) == asked


def test_with_the_released_noise_and_positions(tiled: NovaPipeline) -> None:
    generation = begin(tiled, output_type="latent")
    go(generation, 4)  # between two latent frames
    assert generation.change(APPLE) == 5
    assert np.array_equal(rest(generation), whole(tiled, [(0, WHALE), (AT, APPLE)], output_type="latent"))


def test_from_a_stated_frame_on(causal: NovaPipeline, tmp_path: Path) -> None:
    generation = begin(causal, [(0, WHALE), (9 / FPS, "a blue whale")])
    assert generation.change(APPLE, at=4) == 5
    assert generation.change(motion_flow=3.0, at=6) == 9
    assert generation.change("a green apple", at=5) == 5, "in the place of what was said before"
    go(generation, 5)
    generation.save(tmp_path / "state")
    timeline = [(0, WHALE), (AT, "a green apple"), (9 / FPS, "a blue whale")]
    motion = generation.plan.motion.values[0]
    expected = whole(causal, timeline, motion_flow=[(0, motion), (9 / FPS, 3.0)])
    assert np.array_equal(rest(generation), expected)
    assert np.array_equal(rest(causal.resume(tmp_path / "state")), expected)


def test_before_the_start(causal: NovaPipeline) -> None:
    generation = begin(causal)
    assert generation.change(APPLE, guidance_scale=3.0) == 0
    assert np.array_equal(rest(generation), whole(causal, APPLE, guidance_scale=3.0))
    assert generation.records[0]["prompt"] == APPLE


def test_behind_what_was_given(causal: NovaPipeline) -> None:
    generation = begin(causal, video=clip(6), num_frames=17)  # one is only returned
    go(generation, 1)
    first = generation.change(APPLE)
    assert first == 10
    assert np.array_equal(
        rest(generation), whole(causal, [(0, WHALE), (10 / FPS, APPLE)], video=clip(6), num_frames=17)
    )


def test_several_clips(causal: NovaPipeline) -> None:
    prompts = [WHALE, APPLE]
    generation = begin(causal, prompts, num_images_per_prompt=2)
    go(generation, 3)
    generation.change([APPLE, APPLE])
    timelines = [[(0, WHALE), (AT, APPLE)], [(0, APPLE), (AT, APPLE)]]
    assert np.array_equal(rest(generation), whole(causal, timelines, num_images_per_prompt=2))
    assert [record["prompt"][-1][1] for record in generation.records] == [APPLE] * 4


def test_guidance_is_turned_on(causal: NovaPipeline, tmp_path: Path) -> None:
    generation = begin(causal, guidance_scale=1.0)
    go(generation, 3)
    generation.change(guidance_scale=4.0)
    generation.save(tmp_path / "state")
    expected = torch.from_numpy(whole(causal, guidance_scale=[(0, 1.0), (AT, 4.0)]))
    close(torch.from_numpy(rest(generation)), expected)
    close(torch.from_numpy(rest(causal.resume(tmp_path / "state"))), expected)


def test_guidance_is_turned_off_before_the_start(causal: NovaPipeline) -> None:
    generation = begin(causal)
    generation.change(guidance_scale=1.0)
    assert np.array_equal(rest(generation), whole(causal, guidance_scale=1.0))


def test_features_in_place_of_sentences(causal: NovaPipeline, tmp_path: Path) -> None:
    features = causal.encode_prompt(WHALE)[0]
    generation = begin(causal, None, prompt_embeds=features)
    go(generation, 3)
    generation.change(motion_flow=1.0)
    with pytest.raises(InputError, match="begun with prompt_embeds"):
        generation.change(APPLE)
    generation.save(tmp_path / "state")
    resumed = causal.resume(tmp_path / "state")
    assert resumed.change(guidance_scale=2.0) == 5
    assert np.isfinite(rest(resumed)).all()


def test_a_stream_without_end(causal: NovaPipeline, tmp_path: Path) -> None:
    """Its segments and features are no more after many changes than after a few."""
    options: dict[str, Any] = {"num_frames": math.inf, "context_frames": 13, "sets": 1}
    generation = begin(causal, **options)
    stream = generation.stream()
    said: list[tuple[float, str]] = [(0, WHALE)]
    frames = [next(stream) for _ in range(3)]
    for number in range(8):
        first = generation.change((APPLE, WHALE)[number % 2], motion_flow=float(number))
        said.append((first / FPS, (APPLE, WHALE)[number % 2]))
        frames += [next(stream) for _ in range(4)]
        generation.save(tmp_path / "state")
        assert len(generation.state.segments) <= 3
        assert len(generation.sentences.moments.values) <= 3
    stream.close()
    motion = [(0, 5.0), *((time, float(number)) for number, (time, _) in enumerate(said[1:]))]
    assert generation.records[0]["prompt"] == [list(pair) for pair in said]
    straight = begin(causal, said, motion_flow=[(0, generation.plan.motion.values[0]), *motion[1:]], **options).stream()
    assert all(np.array_equal(frame, next(straight)) for frame in frames)
    straight.close()
    further = causal.resume(tmp_path / "state")
    assert further.change(WHALE) == further.plan.first_pixel(further.state.done)
    more = further.stream()
    assert np.isfinite(next(more)).all()
    more.close()


@pytest.mark.parametrize("ahead", [False, True])
def test_from_another_thread(causal: NovaPipeline, ahead: bool) -> None:
    generation = begin(causal, num_frames=33)
    changed: list[tuple[float, str]] = []

    def speak() -> None:
        for number in range(4):
            text = (APPLE, WHALE)[number % 2]
            changed.append((generation.change(text) / FPS, text))

    thread = threading.Thread(target=speak)
    frames = []
    for index, frame in enumerate(generation.stream(ahead=ahead)):
        frames.append(frame)
        if index == 0:
            thread.start()
    thread.join()
    assert np.array_equal(
        np.stack(frames), whole(causal, list(dict([(0.0, WHALE), *changed]).items()), num_frames=33)[0]
    )


def test_where_parts_take_turns(causal: NovaPipeline) -> None:
    """A new sentence brings the text encoder, which no other part's work may meet."""
    parts = {name: copy.deepcopy(part) for name, part in causal.components.items() if name != "settings"}
    pipe = NovaPipeline(**parts)
    take_turns([pipe.transformer, pipe.vae, pipe.text_encoder], torch.device("cpu"))
    assert pipe.is_offloaded
    generation, other = (begin(pipe, num_frames=33) for _ in range(2))
    assert generation.lock is other.lock
    group = Together()
    for each in (generation, other):
        group.join(each)
    firsts: list[int] = []
    thread = threading.Thread(target=lambda: firsts.append(generation.change(APPLE)))
    thread.start()
    frames = list(generation.stream())
    thread.join()
    timeline = [(0, WHALE), (firsts[0] / FPS, APPLE)] if firsts[0] else APPLE
    close(torch.from_numpy(np.stack(frames)), torch.from_numpy(whole(causal, timeline, num_frames=33)[0]))


def test_a_run_lets_changes_in(causal: NovaPipeline) -> None:
    """A loop that takes its lock again and again does not keep a waiting thread out."""
    generation = begin(causal, num_frames=65)
    began, done = threading.Event(), threading.Event()
    steps: list[int] = []

    def speak() -> None:
        began.wait()
        generation.change(APPLE)
        steps.append(generation.state.step)
        done.set()

    thread = threading.Thread(target=speak)
    thread.start()
    generation.run(lambda *_: began.set(), show_progress=False)
    thread.join()
    assert steps[0] <= 6


def test_within_a_group(causal: NovaPipeline) -> None:
    members = [begin(causal, seed=seed) for seed in (0, 1)]
    group = Together()
    streams = {}
    for each in members:
        group.join(each)
        streams[each] = each.stream()
    made: dict[Generation, list[np.ndarray]] = {each: [next(stream)] for each, stream in streams.items()}
    first = members[1].change(APPLE)
    for _ in range(12):
        for each, stream in streams.items():
            made[each].append(next(stream))
    close(torch.from_numpy(np.stack(made[members[0]])), torch.from_numpy(whole(causal, seed=0)[0]))
    expected = whole(causal, [(0, WHALE), (first / FPS, APPLE)], seed=1)[0]
    close(torch.from_numpy(np.stack(made[members[1]])), torch.from_numpy(expected))


def wrong(causal: NovaPipeline) -> Iterator[tuple[Generation, dict[str, Any], str]]:
    clip = begin(causal)
    go(clip, 3)
    yield clip, {}, "got none of prompt, motion_flow and guidance_scale"
    yield clip, {"prompt": 3}, "prompt is 3: expected a sentence"
    yield clip, {"prompt": [(0, WHALE)]}, "expected a sentence"
    yield clip, {"prompt": [WHALE, APPLE]}, "expected a sentence"
    yield clip, {"prompt": "\ud800"}, "expected text that UTF-8 can hold"
    yield clip, {"motion_flow": -1}, "motion_flow is -1"
    yield clip, {"motion_flow": math.nan}, "motion_flow is nan"
    yield clip, {"guidance_scale": [(0, 1)]}, "expected a number"
    yield clip, {"guidance_scale": "5"}, "guidance_scale is '5'"
    yield clip, {"prompt": APPLE, "at": 1}, "at is 1: expected at least 5, the first frame not begun"
    yield clip, {"prompt": APPLE, "at": 10}, "at is 10: expected at most 9"
    yield clip, {"prompt": APPLE, "at": 13}, "at is 13: expected a whole number of at least 0 and less than 13"
    yield clip, {"prompt": APPLE, "at": 5.5}, "at is 5.5: expected a whole number"
    late = begin(causal, num_frames=5)
    go(late, 3)
    yield late, {"prompt": APPLE}, "nothing can change any more: the clip's last frames, from 1 on, are begun"
    yield begin(causal, num_frames=1), {"prompt": APPLE}, "a picture has no later frame"


def test_wrong_changes_change_nothing(causal: NovaPipeline) -> None:
    for generation, change, message in wrong(causal):
        assert generation.sampler is not None  # made when it is first needed
        before = dict(vars(generation)), list(generation.state.segments)
        with pytest.raises(InputError) as caught:
            generation.change(**change)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
        assert vars(generation) == before[0]
        assert all(one is other for one, other in zip(generation.state.segments, before[1], strict=True))


def test_words_that_the_model_does_not_know() -> None:
    pipe = NovaPipeline.from_pretrained("emoji")
    generation = pipe.start(GenerateRequest("a frog on a blue background", num_frames=5, seed=0, sets=1))
    generation.change("a zeppelin on a blue background")
    assert any("zeppelin" in line for line in generation.warnings)
    assert generation.records[0]["warnings"] == list(generation.warnings)
