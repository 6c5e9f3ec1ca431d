"""Beyond one call: continuing, streaming, going on, steering, editing and saving. What is exact, on tiny models."""

import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from nova_video import NovaPipeline
from nova_video.common.errors import InputError
from nova_video.io.media import write_media
from nova_video.pipeline.generation import FrameReady, Generation, LatentPreview, PartialFrame
from nova_video.pipeline.request import GenerateRequest

CONFORMANCE = Path(__file__).parent / "conformance"
QUICK = {"num_inference_steps": 2, "num_diffusion_steps": 2}
WHALE, APPLE = "a whale moving left", "a red apple"


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def open_pipe(folder: Path) -> NovaPipeline:
    pipe = NovaPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(params=["tiled", "causal"])
def pipe(request: pytest.FixtureRequest) -> NovaPipeline:
    found: NovaPipeline = request.getfixturevalue(request.param)
    return found


def clip(frames: int = 9, seed: int = 3) -> np.ndarray:
    """Random pixels (F, 64, 96, 3), soft enough to be resized."""
    small = np.random.default_rng(seed).integers(0, 256, (frames, 8, 12, 3), np.uint8)
    return small.repeat(8, axis=1).repeat(8, axis=2)


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    assert got.shape == expected.shape
    error = (got - expected).abs().max() / expected.abs().max()
    assert error < tolerance, f"relative error {error:.2e}"


# Continuing -----------------------------------------------------------------------------------------------------------


def test_given_pixels_come_back_in_every_form(pipe: NovaPipeline, tmp_path: Path) -> None:
    given = clip(9)
    floats = (given / 255).astype(np.float32) ** 1.1  # not on the grid of bytes

    def call(video: Any, output_type: str = "np") -> Any:
        return pipe(WHALE, video=video, num_frames=13, generator=seeded(), output_type=output_type, **QUICK).frames[0]

    for video, expected in ((given, given / np.float32(255)), (floats, floats)):
        made = call(video)
        assert made.shape == (13, 64, 96, 3)
        assert np.array_equal(made[:9], expected)
        assert torch.equal(call(video, "pt")[:9], torch.from_numpy(expected).permute(0, 3, 1, 2))
    made = call(given)
    pictures = [Image.fromarray(frame) for frame in given]
    returned = call(pictures, "pil")
    assert all(np.array_equal(np.asarray(a), b) for a, b in zip(returned[:9], given, strict=True))
    write_media(given, tmp_path / "given.png", 12, {})  # lossless
    for same in (pictures, tmp_path / "given.png"):
        assert np.array_equal(call(same), made)
    assert np.allclose(call(torch.from_numpy(given / np.float32(255)).permute(0, 3, 1, 2)), made, atol=1e-5)
    assert not np.array_equal(call(255 - given)[9:], made[9:])


@pytest.mark.parametrize("frames", [1, 2, 4, 5, 10])
def test_any_number_of_frames(pipe: NovaPipeline, frames: int) -> None:
    """The last 4k + 1 are read, those before are only returned, and the new ones follow at once."""
    given = clip(frames)
    read = (frames - 1) // 4 * 4 + 1
    arguments: dict[str, Any] = {"output_type": "np", **QUICK}
    made = pipe(WHALE, video=given, num_frames=frames + 6, generator=seeded(), **arguments).frames[0]
    assert len(made) == frames + 6
    assert np.array_equal(made[:frames], given / np.float32(255))
    alone = pipe(WHALE, video=given[frames - read :], num_frames=read + 6, generator=seeded(), **arguments).frames[0]
    assert np.array_equal(made[frames - read :], alone)


def test_given_latents_come_back_and_are_gone_on_with(pipe: NovaPipeline) -> None:
    """A clip gone on with from its own latents, order and random numbers is the clip never interrupted."""
    arguments: dict[str, Any] = {"num_frames": 17, "output_type": "latent", **QUICK}
    whole = pipe(WHALE, generator=seeded(), **arguments).frames
    moments: dict[int, Tensor] = {}
    generator = seeded()

    def note(_pipe: NovaPipeline, step: int, *_: Any) -> None:
        moments[step] = generator.get_state()

    started = pipe.start(GenerateRequest(WHALE, **arguments), generator)
    started.run(note)
    for kept in (1, 3):
        again = pipe.start(GenerateRequest(WHALE, video=whole[:, :, :kept], **arguments), seeded())
        again.state.order = started.state.order
        again.state.random.generators[0].set_state(moments[2 * kept - 1])
        made = again.run().frames
        assert torch.equal(made[:, :, :kept], whole[:, :, :kept])
        close(made, whole)


def test_one_clip_for_all_or_one_each(causal: NovaPipeline) -> None:
    arguments: dict[str, Any] = {"num_frames": 9, "output_type": "np", **QUICK}
    first, second = clip(5, 1), clip(5, 2)
    both = causal([WHALE, APPLE], video=[first, second], generator=[seeded(1), seeded(2)], **arguments).frames
    alone = causal(APPLE, video=second, generator=seeded(2), **arguments).frames
    assert np.abs(both[1] - alone[0]).max() < 1e-4
    shared = causal([WHALE, APPLE], video=second, generator=[seeded(1), seeded(2)], **arguments).frames
    assert np.abs(shared[1] - alone[0]).max() < 1e-4
    with pytest.raises(InputError, match="got 3 clips: expected 1 or 2"):
        causal([WHALE, APPLE], video=[first] * 3, **arguments)


def test_other_sizes_and_rates_are_converted_and_said(causal: NovaPipeline, caplog: pytest.LogCaptureFixture) -> None:
    from nova_video.io.inputs import InputClip

    given = InputClip(clip(9).repeat(2, axis=1).repeat(2, axis=2), fps=24.0)  # 128x192
    made = causal(WHALE, video=given, num_frames=9, fps=12, generator=seeded(), output_type="np", **QUICK).frames[0]
    assert made.shape == (9, 64, 96, 3)
    assert "192x128 at 24 fps, is taken as 96x64 at 12 fps" in caplog.text
    caplog.clear()
    assert np.allclose(made[:5], given.frames[::2, ::2, ::2] / 255, atol=0.15)  # every other frame, half the size
    causal(WHALE, video=clip(5), num_frames=9, generator=seeded(), output_type="latent", **QUICK)
    assert caplog.text == ""


# Streaming ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_a_stream_yields_the_call_s_frames(pipe: NovaPipeline, output_type: str, ahead: bool) -> None:
    request = GenerateRequest(WHALE, num_frames=24, output_type=output_type, **QUICK)
    whole = pipe.generate(request, seeded()).frames[0]
    streamed = list(pipe.start(request, seeded()).stream(ahead=ahead))
    if output_type == "latent":
        whole = whole.transpose(0, 1)  # (F, C, h, w)
    assert len(streamed) == len(whole)
    for got, expected in zip(streamed, whole, strict=True):
        assert type(got) is type(expected)
        assert np.array_equal(np.asarray(got), np.asarray(expected))


def test_a_stream_of_several_clips_and_of_what_is_given(pipe: NovaPipeline) -> None:
    arguments: dict[str, Any] = {"video": clip(6), "num_frames": 12, "output_type": "np", **QUICK}
    whole = pipe([WHALE, APPLE], generator=seeded(), **arguments).frames
    streamed = np.stack(list(pipe.stream([WHALE, APPLE], generator=seeded(), **arguments)), axis=1)
    assert np.array_equal(streamed, whole)


def test_frames_come_as_soon_as_they_are_final(causal: NovaPipeline, tiled: NovaPipeline) -> None:
    """Sets made when a frame is handed out: with a causal autoencoder those up to its latent frame, else its tile."""

    def sets(pipe: NovaPipeline, frames: int, **values: Any) -> list[int]:
        generation = pipe.start(GenerateRequest(WHALE, num_frames=frames, **QUICK, **values), seeded())
        return [generation.state.step for _ in generation.stream()]

    assert sets(causal, 9) == [2] + [4] * 4 + [6] * 4
    assert sets(tiled, 21) == [10] * 17 + [12] * 4
    assert sets(causal, 13, video=clip(7)) == [0] * 7 + [2] * 4 + [4] * 2


def test_previews(tiled: NovaPipeline) -> None:
    events = list(tiled.stream(WHALE, num_frames=9, generator=seeded(), preview=True, output_type="np", **QUICK))
    kinds = [type(event) for event in events]
    assert kinds == [PartialFrame, LatentPreview] * 3 + [FrameReady] * 9
    partial, preview = events[0], events[1]
    assert (partial.latent_frame, partial.step, partial.frame.shape) == (0, 0, (64, 96, 3))
    hidden = ~partial.revealed.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert partial.latents[0, :, hidden[0]].abs().max() == 0
    final = [event for event in events if isinstance(event, FrameReady)]
    assert [event.index for event in final] == list(range(9))
    whole = tiled(WHALE, num_frames=9, generator=seeded(), output_type="np", **QUICK).frames[0]
    assert np.array_equal(np.stack([event.frame for event in final]), whole)
    latents = tiled(WHALE, num_frames=1, generator=seeded(), output_type="latent", **QUICK).images
    assert preview.frame.shape == (64, 96, 3)
    assert latents.shape == (1, 4, 1, 8, 12)


def test_partial_frames_are_decoded_when_asked_for(causal: NovaPipeline) -> None:
    stream = causal.stream(WHALE, num_frames=5, generator=seeded(), preview=True, output_type="np", **QUICK)
    partial = next(stream)
    stream.close()
    assert isinstance(partial, PartialFrame)
    assert partial.frame.shape[2] == 3  # outside the stream, where gradients are on


@pytest.mark.parametrize("ahead", [False, True])
def test_leaving_a_stream_stops_it(causal: NovaPipeline, ahead: bool) -> None:
    generation = causal.start(GenerateRequest(WHALE, num_frames=math.inf, **QUICK), seeded())
    frames = generation.stream(ahead=ahead)
    for _ in range(7):
        next(frames)
    frames.close()
    made = generation.state.step
    time.sleep(0.1)
    assert generation.state.step == made
    assert not any(thread.name == "nova-sampling" for thread in threading.enumerate())
    assert generation.emitted == 7


@pytest.mark.parametrize("ahead", [False, True])
def test_errors_and_callbacks_in_a_stream(causal: NovaPipeline, ahead: bool) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("on purpose")

    request = GenerateRequest(WHALE, num_frames=17, output_type="np", **QUICK)
    with pytest.raises(RuntimeError, match="on purpose"):
        list(causal.start(request, seeded()).stream(callback_on_step_end=fail, ahead=ahead))
    stopped = list(causal.start(request, seeded()).stream(callback_on_step_end=lambda p, s, *_: s < 4, ahead=ahead))
    assert len(stopped) == 5  # two latent frames were whole
    assert np.array_equal(np.stack(stopped), causal.generate(request, seeded()).frames[0][:5])


# Without end ----------------------------------------------------------------------------------------------------------


def held_bytes(generation: Generation) -> int:
    """What a generation keeps in tensors."""
    state = generation.state
    tensors = [
        *state.frames.values(),
        *state.noised_history.values(),
        state.cache.keys,
        state.cache.values,
        state.order,
    ]
    tensors += [state.positions.time, state.positions.video_space]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


@pytest.mark.parametrize(("name", "output_type"), [("causal", "np"), ("tiled", "latent")])
def test_memory_and_work_are_flat_to_a_thousand_frames(
    name: str, output_type: str, request: pytest.FixtureRequest
) -> None:
    pipe: NovaPipeline = request.getfixturevalue(name)
    endless = GenerateRequest(
        WHALE,
        num_frames=math.inf,
        context_frames=17,
        history_noise=0.1,
        num_inference_steps=1,
        num_diffusion_steps=1,
        output_type=output_type,
    )
    generation = pipe.start(endless, seeded())
    kept, seconds, slots = [], [], []
    before = time.process_time()
    count = 1000 if output_type == "np" else 251
    for index, _ in enumerate(generation.stream()):
        kept.append(held_bytes(generation))
        slots.append(len(generation.state.cached or []))
        seconds.append(time.process_time() - before)
        before = time.process_time()
        if index + 1 == count:
            break
    assert max(kept) == max(kept[: count // 10])
    assert max(slots) == 4  # of the five places one is the frame in hand's
    assert len(generation.state.frames) <= 8
    tenth = count // 10  # of the processor, which a busy machine changes less than the clock
    assert sum(seconds[-3 * tenth :]) < 2 * sum(seconds[2 * tenth : 5 * tenth])


def test_a_bounded_context_begins_as_an_unbounded_one(causal: NovaPipeline) -> None:
    arguments: dict[str, Any] = {"num_frames": 33, "output_type": "latent", **QUICK}
    unbounded = causal(WHALE, generator=seeded(), **arguments).frames
    bounded = causal(WHALE, generator=seeded(), context_frames=17, **arguments).frames
    close(bounded[:, :, :5], unbounded[:, :, :5])  # as long as all of it fits
    assert (bounded[:, :, 5:] - unbounded[:, :, 5:]).abs().max() > 1e-3
    wide = causal(WHALE, generator=seeded(), context_frames=33, **arguments).frames
    assert torch.equal(wide, unbounded)
    kept = causal(WHALE, generator=seeded(), context_frames=17, sink_frames=5, **arguments).frames
    assert not torch.equal(kept, bounded)


def test_no_position_beyond_the_context(pipe: NovaPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    original = pipe.transformer.positions
    monkeypatch.setattr(
        pipe.transformer, "positions", lambda frames, grid: asked.append(frames) or original(frames, grid)
    )
    pipe(WHALE, num_frames=45, context_frames=17, output_type="latent", **QUICK)
    assert asked == [5]


@pytest.mark.parametrize(
    "remedy", [{"history_noise": 0.3}, {"reanchor_frames": 8}, {"hold_statistics": 0.5}], ids=lambda r: next(iter(r))
)
def test_every_remedy_against_drift_counts(causal: NovaPipeline, remedy: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"num_frames": 33, "output_type": "latent", "context_frames": 17, **QUICK}
    plain = causal(WHALE, generator=seeded(), **arguments).frames
    made = causal(WHALE, generator=seeded(), **arguments, **remedy).frames
    assert torch.equal(made[:, :, 0], plain[:, :, 0])
    assert (made - plain).abs().max() > 1e-3


def test_statistics_are_held(causal: NovaPipeline) -> None:
    arguments: dict[str, Any] = {"num_frames": 37, "output_type": "latent", **QUICK}
    made = causal(WHALE, generator=seeded(), hold_statistics=1.0, **arguments).frames[0]  # (C, F, h, w)
    mean, deviation = made.mean((2, 3)), made.std((2, 3))  # (C, F)
    for values in (mean, deviation):
        reference = values[:, :5].mean(1, keepdim=True)
        assert torch.allclose(values[:, 5:], reference.expand(-1, 5), atol=1e-4)


# Steering -------------------------------------------------------------------------------------------------------------


def test_a_timeline_takes_over_at_its_time(pipe: NovaPipeline) -> None:
    """At 8 frames a second, 0.6 s is frame 4.8: latent frame 2, frames 5 to 8, is the first that begins after it.

    A second sentence is encoded together with the first, which changes the first's features by rounding.
    """
    arguments: dict[str, Any] = {"num_frames": 17, "fps": 8, "output_type": "latent", **QUICK}
    plain = pipe(WHALE, generator=seeded(), **arguments).frames
    steered = pipe([(0, WHALE), (0.6, APPLE)], generator=seeded(), **arguments).frames
    close(steered[:, :, :2], plain[:, :, :2])
    assert (steered[:, :, 2] - plain[:, :, 2]).abs().max() > 1e-3
    close(pipe([(0, WHALE), (0.6, WHALE)], generator=seeded(), **arguments).frames, plain)
    assert torch.equal(pipe([[0, WHALE], [0.5, APPLE]], generator=seeded(), **arguments).frames, steered)
    assert not torch.equal(pipe([(0, WHALE), (0.7, APPLE)], generator=seeded(), **arguments).frames, steered)


@pytest.mark.parametrize(("name", "values"), [("motion_flow", (5.0, 1.0)), ("guidance_scale", (5.0, 2.0))])
def test_numbers_on_a_timeline(causal: NovaPipeline, name: str, values: tuple[float, float]) -> None:
    arguments: dict[str, Any] = {"num_frames": 17, "fps": 8, "output_type": "latent", **QUICK}
    first = causal(WHALE, generator=seeded(), **{name: values[0]}, **arguments).frames
    changed = causal(WHALE, generator=seeded(), **{name: [(0, values[0]), (0.6, values[1])]}, **arguments).frames
    assert torch.equal(changed[:, :, :2], first[:, :, :2])
    assert (changed[:, :, 2] - first[:, :, 2]).abs().max() > 1e-4


def test_guidance_that_comes_and_goes(causal: NovaPipeline) -> None:
    arguments: dict[str, Any] = {"num_frames": 9, "fps": 8, "output_type": "latent", **QUICK}
    off = causal(WHALE, generator=seeded(), guidance_scale=1.0, **arguments).frames
    later = causal(WHALE, generator=seeded(), guidance_scale=[(0, 1.0), (0.6, 4.0)], **arguments).frames
    close(later[:, :, :2], off[:, :, :2])
    assert (later[:, :, 2] - off[:, :, 2]).abs().max() > 1e-3


def test_several_clips_on_one_timeline(causal: NovaPipeline) -> None:
    arguments: dict[str, Any] = {"num_frames": 9, "fps": 8, "output_type": "latent", **QUICK}
    timelines = [[(0, WHALE), (0.6, APPLE)], [(0, APPLE), (0.6, WHALE)]]
    both = causal(timelines, generator=[seeded(1), seeded(2)], **arguments).frames
    close(both[1:], causal(timelines[1], generator=seeded(2), **arguments).frames)


# Editing --------------------------------------------------------------------------------------------------------------


def square(top: int = 16, left: int = 32, size: int = 32) -> np.ndarray:
    mask = np.zeros((64, 96), bool)
    mask[top : top + size, left : left + size] = True
    return mask


def test_outside_the_mask_nothing_changes(pipe: NovaPipeline) -> None:
    picture, mask = clip(1)[0], square()
    arguments: dict[str, Any] = {"generator": seeded(), "output_type": "np", **QUICK}
    made = pipe(APPLE, image=picture, mask_image=mask, **arguments).images[0]
    assert made.shape == (64, 96, 3)
    assert np.array_equal(made[~mask], picture[~mask] / np.float32(255))
    assert np.abs(made[mask] - picture[mask] / 255).max() > 0.05
    white = Image.fromarray((mask * 255).astype(np.uint8))
    same = pipe(APPLE, image=Image.fromarray(picture), mask_image=white, **arguments | {"generator": seeded()})
    assert np.array_equal(same.images[0], made)


def test_tokens_that_a_mask_touches_are_made_anew(causal: NovaPipeline) -> None:
    """A mask of 32 pixels that lies on the grid of 16: four tokens. Half of them at strength 0.5, none at 0."""
    picture = clip(1)[0]

    def redrawn(mask: np.ndarray | None, strength: float | None) -> int:
        request = GenerateRequest(APPLE, image=picture, mask_image=mask, strength=strength, **QUICK)
        generation = causal.start(request, seeded())
        given = generation.state.given[0].latents
        generation.run()
        changed = (generation.state.frames[0] != given).any(1)  # (1, h, w)
        tokens = changed.unflatten(1, (4, 2)).unflatten(3, (6, 2)).any(4).any(2)
        return int(tokens.sum())

    assert redrawn(square(), None) == 4
    assert redrawn(square(top=20), None) == 6
    assert redrawn(square(), 0.5) == 2
    assert redrawn(None, 0.5) == 12
    assert redrawn(None, 1.0) == 24
    assert redrawn(square(), 0.0) == 0


def test_strength_zero_is_the_picture_itself(pipe: NovaPipeline) -> None:
    picture = clip(1)[0]
    made = pipe(APPLE, image=picture, strength=0, generator=seeded(), output_type="pil", **QUICK).images[0]
    assert np.array_equal(np.asarray(made), picture)
    varied = [pipe(APPLE, image=picture, strength=0.5, generator=seeded(s), output_type="np", **QUICK) for s in (1, 2)]
    assert not np.array_equal(varied[0].images, varied[1].images)


def test_frames_kept_and_frames_replaced(pipe: NovaPipeline) -> None:
    given = clip(9)
    masks = np.zeros((9, 64, 96), bool)
    masks[1:5] = True  # latent frame 1
    masks[5:] = square()  # part of latent frame 2
    arguments: dict[str, Any] = {"generator": seeded(), "output_type": "np", **QUICK}
    made = pipe(APPLE, video=given, mask_image=masks, **arguments).frames[0]
    assert made.shape == (9, 64, 96, 3)
    assert np.array_equal(made[~masks], given[~masks] / np.float32(255))
    assert not np.array_equal(made[masks], given[masks] / np.float32(255))
    one = pipe(APPLE, video=given, mask_image=square(), **arguments | {"generator": seeded()}).frames[0]
    outside = np.broadcast_to(~square(), masks.shape)
    assert np.array_equal(one[outside], given[outside] / np.float32(255))


def test_an_edited_clip_goes_on(causal: NovaPipeline) -> None:
    """Frames that are no whole number of latent ones, a mask on them, and new ones after."""
    given = clip(7)
    request = GenerateRequest(APPLE, video=given, mask_image=square(), num_frames=15, output_type="np", **QUICK)
    made = causal.generate(request, seeded()).frames[0]
    assert len(made) == 15
    outside = np.broadcast_to(~square(), (7, 64, 96))
    assert np.array_equal(made[:7][outside], given[outside] / np.float32(255))
    assert np.array_equal(np.stack(list(causal.start(request, seeded()).stream())), made)


# Saving and going on --------------------------------------------------------------------------------------------------

REQUESTS: dict[str, dict[str, Any]] = {
    "plain": {"prompt": WHALE, "num_frames": 17},
    "several": {"prompt": [WHALE, APPLE], "num_frames": 9, "guidance_scale": 1.0},
    "image guidance": {"prompt": WHALE, "num_frames": 9, "image_guidance_scale": 1.5},
    "bounded": {
        "prompt": WHALE,
        "num_frames": 29,
        "context_frames": 13,
        "history_noise": 0.2,
        "hold_statistics": 0.3,
        "reanchor_frames": 12,
    },
    "steered": {
        "prompt": [(0, WHALE), (1.0, APPLE)],
        "motion_flow": [(0, 5.0), (0.5, 2.0)],
        "num_frames": 17,
        "fps": 8,
    },
    "continued": {"prompt": WHALE, "video": clip(10), "num_frames": 21},
    "edited": {"prompt": APPLE, "video": clip(9), "mask_image": square(), "num_frames": 13},
}


@pytest.mark.parametrize("name", REQUESTS)
def test_saved_anywhere_and_gone_on_with(pipe: NovaPipeline, tiled: NovaPipeline, name: str, tmp_path: Path) -> None:
    request = GenerateRequest(**REQUESTS[name], output_type="latent" if pipe is tiled else "np", **QUICK)
    whole = pipe.generate(request, seeded()).frames
    total = pipe.start(request, seeded()).total_steps
    assert total is not None
    for stop in range(0, total - 1, 5):  # within frames and between them

        def until(_pipe: NovaPipeline, step: int, *_: Any, stop: int = stop) -> bool:
            return step < stop

        stopped = pipe.generate(request, seeded(), until)
        assert stopped.stopped
        stopped.generation.notes["told"] = [1, "two"]
        stopped.generation.save(tmp_path / "state.safetensors")
        resumed = pipe.resume(tmp_path / "state.safetensors")
        assert (resumed.state.step, resumed.notes, resumed.seeds) == (stop + 1, {"told": [1, "two"]}, (0,))
        assert np.array_equal(resumed.run().frames, whole)


@pytest.mark.parametrize("frames", [3, 5, 18, 22])
def test_a_stream_goes_on_where_it_was(pipe: NovaPipeline, frames: int, tmp_path: Path) -> None:
    request = GenerateRequest(WHALE, num_frames=29, context_frames=13, output_type="np", **QUICK)
    whole = pipe.generate(request, seeded()).frames[0]
    generation = pipe.start(request, seeded())
    stream = generation.stream()
    first = [next(stream) for _ in range(frames)]
    generation.save(tmp_path / "state.safetensors")
    stream.close()
    rest = list(pipe.resume(tmp_path / "state.safetensors").stream())
    assert np.array_equal(np.stack([*first, *rest]), whole)
    assert np.array_equal(pipe.resume(tmp_path / "state.safetensors").run().frames[0], whole[frames:])


def test_another_process_goes_on(tiny_checkpoint: Path, tiled: NovaPipeline, tmp_path: Path) -> None:
    request = GenerateRequest(WHALE, num_frames=17, output_type="np", **QUICK)
    state, result = tmp_path / "state.safetensors", tmp_path / "frames.npy"
    tiled.generate(request, seeded(), lambda _pipe, step, *_: step < 4).generation.save(state)
    code = f"""
import numpy, torch
from nova_video import NovaPipeline
torch.set_num_threads({torch.get_num_threads()})
pipe = NovaPipeline.from_pretrained({str(tiny_checkpoint)!r})
numpy.save({str(result)!r}, pipe.resume({str(state)!r}).run().frames)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert np.array_equal(np.load(result), tiled.generate(request, seeded()).frames)


def test_a_random_state_of_several_generators(causal: NovaPipeline, tmp_path: Path) -> None:
    request = GenerateRequest([WHALE, APPLE], num_frames=9, output_type="latent", **QUICK)
    whole = causal.generate(request, [seeded(1), seeded(2)]).frames
    stopped = causal.generate(request, [seeded(1), seeded(2)], lambda _pipe, step, *_: step < 2)
    stopped.generation.save(tmp_path / "state.safetensors")
    resumed = causal.resume(tmp_path / "state.safetensors")
    assert resumed.seeds == (1, 2)
    assert torch.equal(resumed.run().frames, whole)


def test_states_that_cannot_be_gone_on_with(causal: NovaPipeline, tiled: NovaPipeline, tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"
    causal.start(GenerateRequest(WHALE, num_frames=9), seeded()).save(state)
    with pytest.raises(InputError, match="saved with another model"):
        tiled.resume(state)
    with pytest.raises(InputError, match="there is no file"):
        causal.resume(tmp_path / "none.safetensors")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(InputError, match="not a saved generation"):
        causal.resume(tmp_path / "text")
    weights = CONFORMANCE / "rotary-flow" / "transformer" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(InputError, match="but not a saved generation"):
        causal.resume(weights)
    half = NovaPipeline(causal.transformer.__class__.from_config(causal.transformer.config).half(), causal.scheduler)
    with pytest.raises(InputError, match="in float32: expected float16"):
        half.resume(state)


def test_saving_leaves_an_older_state_alone_when_it_fails(
    causal: NovaPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "state.safetensors"
    generation = causal.start(GenerateRequest(WHALE, num_frames=9), seeded())
    generation.save(state)
    before = state.read_bytes()

    for failure in (OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device")):

        def full(*_: Any, failure: Exception = failure, **__: Any) -> None:
            raise failure

        monkeypatch.setattr("nova_video.pipeline.saving.save_file", full)
        with pytest.raises((OSError, InputError), match=r"state.safetensors.*No space left|No space left.*state.safe"):
            generation.save(state)
        assert state.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]


# Wrong input ----------------------------------------------------------------------------------------------------------

PICTURE = clip(1)[0]
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"num_frames": math.inf}, "num_frames is inf: expected a whole number, or pipe.stream"),
    ({"seconds": 0}, "seconds is 0: expected a number of more than 0"),
    ({"seconds": -1.5}, "seconds is -1.5"),
    ({"seconds": 2, "num_frames": 9}, "got num_frames 9 and seconds 2: expected one of them"),
    ({"video": clip(9), "num_frames": 9}, "num_frames is 9 with 9 frames given: expected more than 9"),
    ({"video": clip(9), "image": PICTURE, "num_frames": 17}, "got both of image and video"),
    (
        {"video": torch.zeros(1, 4, 2, 4, 4), "num_frames": 17},
        r"latents \(1, 4, 2, 4, 4\): expected \(B, 4, F, 8, 12\)",
    ),
    ({"prompt": [(1, WHALE)], "num_frames": 9}, "prompt starts at 1 s"),
    ({"prompt": [(0, WHALE), (2, APPLE), (1, WHALE)], "num_frames": 49}, "changes at 1 s after 2 s"),
    (
        {"prompt": [(0, WHALE), (9, APPLE)], "num_frames": 9},
        r"prompt changes at 9 s: expected .* the clip's end, 0.75 s",
    ),
    ({"motion_flow": [(0, 5.0), (9, 1.0)], "num_frames": 9}, "motion_flow changes at 9 s"),
    ({"prompt": [[(0, WHALE), (0.2, APPLE)], [(0, WHALE), (0.3, APPLE)]], "num_frames": 9}, "timelines whose times"),
    ({"mask_image": square()}, "got mask_image without image or video"),
    ({"strength": 0.5}, "got strength without image or video"),
    ({"strength": 1.5, "image": PICTURE}, "strength is 1.5: expected a number of at least 0 and at most 1"),
    ({"mask_image": square()[:32], "image": PICTURE}, "mask_image is 96x32: expected 96x64"),
    ({"mask_image": np.stack([square()] * 3), "video": clip(9)}, "got 3 masks: expected 1, or 9"),
    ({"mask_image": square(), "video": clip(9), "num_frames": 5}, "num_frames is 5 with 9 frames to edit"),
    ({"mask_image": square(), "video": torch.randn(1, 4, 2, 8, 12)}, "mask_image with latents"),
    ({"context_frames": 5, "num_frames": 33}, "context_frames is 5 with 1 first frames kept"),
    ({"history_noise": -1.0}, "history_noise is -1"),
    ({"reanchor_frames": -1}, "reanchor_frames is -1"),
    ({"hold_statistics": 2.0}, "hold_statistics is 2"),
]


@pytest.mark.parametrize(("values", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_input_is_one_clear_line(causal: NovaPipeline, values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        causal(**{"prompt": WHALE, **values})
    assert "\n" not in str(caught.value)


def test_seconds(causal: NovaPipeline) -> None:
    made = causal(WHALE, seconds=1.1, fps=8, output_type="np", **QUICK).frames[0]
    assert len(made) == 9
    request = GenerateRequest(WHALE, seconds=math.inf)
    assert request.resolve(causal.defaults, causal.capabilities).num_frames is None
    assert replace(request, seconds=0.01).resolve(causal.defaults, causal.capabilities).num_frames == 1


def test_frames_are_let_go_only_when_nothing_needs_them(causal: NovaPipeline) -> None:
    """Whatever the context, a stream of a bounded one yields what the call does, which keeps all."""
    settings: list[Callable[[], dict[str, Any]]] = [
        lambda: {"context_frames": 9},
        lambda: {"context_frames": 17, "sink_frames": 5},
        lambda: {"context_frames": 13, "prompt": [(0, WHALE), (1.2, APPLE), (3.0, WHALE)]},
        lambda: {"context_frames": 13, "reanchor_frames": 8, "video": clip(30)},
    ]
    for values in settings:
        request = GenerateRequest(**{"prompt": WHALE, "num_frames": 49, "output_type": "np", **QUICK, **values()})
        streamed: Iterator[Any] = causal.start(request, seeded()).stream()
        assert np.array_equal(np.stack(list(streamed)), causal.generate(request, seeded()).frames[0])


def test_the_temporal_cache_is_let_go_before_decoding(tiled: NovaPipeline, tmp_path: Path) -> None:
    """And what was saved then goes on to pixels."""
    request = GenerateRequest(WHALE, num_frames=9, output_type="latent", **QUICK)
    generation, held = tiled.start(request, seeded()), []
    generation.run(lambda *_: held.append(generation.state.cache.keys.numel()))  # type: ignore[func-returns-value]
    assert all(held[:-1])
    assert held[-1] == generation.state.cache.values.numel() == 0
    generation.output_type = "np"
    generation.save(tmp_path / "state.safetensors")
    expected = tiled.generate(replace(request, output_type="np"), seeded()).frames
    assert np.array_equal(tiled.resume(tmp_path / "state.safetensors").run().frames, expected)


# On a GPU -------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", REQUESTS)
def test_gpu_streams_ahead_and_resumes(name: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Sampling in a thread, decoding beside it on another CUDA stream: the call's frames, also after a stop."""
    pipe = open_pipe(tiny_checkpoint).to("cuda")
    request = GenerateRequest(**REQUESTS[name], output_type="pt", seed=5, **QUICK)
    whole = pipe.generate(request).frames.transpose(0, 1)  # (F, B, 3, H, W)
    generation = pipe.start(request)
    stream = generation.stream()
    streamed = [next(stream) for _ in range(6)]
    generation.save(tmp_path / "state.safetensors")
    stream.close()
    streamed += pipe.resume(tmp_path / "state.safetensors").stream()
    made = torch.stack([frame.unsqueeze(0) if frame.dim() == 3 else frame for frame in streamed])
    assert torch.equal(made.cpu(), whole.cpu())
