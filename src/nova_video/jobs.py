"""Generations of the command line, carried out: each becomes a file, at its end or live, with a record of its making.

`cli_generate.py` starts them. No heavy import before a command runs.
"""

import contextlib
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from nova_video.arguments import MODEL, Making
from nova_video.console import progress_bar
from nova_video.errors import InputError, Terminated
from nova_video.io.files import held, reserved

if TYPE_CHECKING:
    from nova_video.generation import Generation, StepCallback
    from nova_video.pipeline import NovaPipeline
    from nova_video.request import GenerateRequest
    from nova_video.timeline import Timeline

T = TypeVar("T")

SHORTCUTS = ("solver", "last_steps", "guided_sets", "guidance_every", "fp8")  # the two others are in the numbers told
LONGEST_NAME = 60  # bytes of a file's name that is made of a sentence
WINDOWS_DEVICE = re.compile(r"con|prn|aux|nul|(com|lpt)[0-9¹²³]")  # names that Windows gives to no file
NOTES = "nova generate"  # where the command's own notes are in a saved state


# Where it goes --------------------------------------------------------------------------------------------------------


def check_output(output: Path | None, live: bool = False) -> None:
    """Raises now for what could not be written later."""
    from nova_video import media

    if output is None or output.is_dir():
        output = (output or Path()) / "clip.mp4"
    media.check_output(output)
    if live and output.suffix.lower() != ".mp4":
        raise InputError(f"cannot write {output} while it is made (--live): its extension must be .mp4")


def check_state(path: Path) -> None:
    """Raises now for a state that could not be kept later."""
    from nova_video.media import check_writable

    if path.exists():
        raise InputError(f"{path} is there already: expected a new file to keep the state in, or --resume {path}")
    if not path.parent.is_dir():
        raise InputError(f"cannot keep the state in {path}: there is no folder {path.parent}")
    check_writable(path.parent)


@contextlib.contextmanager
def all_held(*paths: Path | None) -> Iterator[None]:
    """No other process writes these files, of which some may be none."""
    with contextlib.ExitStack() as stack:
        for path in dict.fromkeys(paths):
            if path is not None:
                stack.enter_context(held(path))
        yield


@contextlib.contextmanager
def output_place(output: Path | None, index: int, prompts: Sequence[str], suffix: str) -> Iterator[Path]:
    """The file of one sentence: the one asked for, numbered if there are several, or else named after the sentence.

    A name that nobody chose replaces no file, and is held against other processes.
    """
    number = f"{index + 1:0{len(str(len(prompts)))}d}"
    if output is not None and not output.is_dir():
        yield output if len(prompts) == 1 else output.with_stem(f"{output.stem}-{number}")
        return
    name = name_of(prompts[index])
    if len(prompts) > 1:
        name = f"{number}-{name}"
    for again in count(1):
        path = (output or Path()) / (name + (f"-{again}" if again > 1 else "") + suffix)
        with reserved(path) as free:
            if free:
                yield path
                return


def name_of(sentence: str) -> str:
    """A file's name, without its extension, that every system accepts: the sentence's words, joined by hyphens."""
    words = re.sub(r"\W+", "-", sentence.lower()).strip("-")
    if sys.getfilesystemencoding() not in ("utf-8", "utf8"):
        words = re.sub(r"[^a-z0-9_]+", "-", words).strip("-")
    name = words.encode()[:LONGEST_NAME].decode(errors="ignore").strip("-") or "nova"
    return f"{name}-clip" if WINDOWS_DEVICE.fullmatch(name) else name


# How it was made ------------------------------------------------------------------------------------------------------


def make_record(
    args: Making, request: "GenerateRequest", generation: "Generation", given: dict[str, Any]
) -> dict[str, Any]:
    """What a file says of how it was made; `given` is what the command had beside a sentence."""
    from nova_video import __version__

    plan, pipe = generation.plan, generation.pipe
    read, kept = plan.context.frames, plan.context.sink  # latent frames
    stride = plan.temporal_stride
    settings = {
        "width": plan.width,
        "height": plan.height,
        "num_frames": plan.num_frames,
        "fps": plan.fps,
        **given,
        "sets": plan.num_inference_steps,
        "diffusion_steps": plan.num_diffusion_steps,
        "preset": args.preset or "exact",
        **{name: getattr(plan.shortcuts, name) for name in SHORTCUTS},
        "guidance": _told(plan.guidance, lambda guidance: guidance.scale),
        "motion": _told(plan.motion_flow, float),
        "context_frames": None if read is None else stride * (read - 1) + 1,
        "sink_frames": None if read is None else stride * (kept - 1) + 1,
        "reanchor_frames": stride * (plan.context.reanchor or 0),
        "device": str(pipe.device),
        "dtype": str(pipe.dtype).removeprefix("torch."),
    }
    record: dict[str, Any] = {"prompt": request.prompt, "negative": args.negative, "seed": request.seed}
    record["model"] = args.model or MODEL
    if args.lora is not None:
        record |= {"lora": str(args.lora), "lora_scale": 1.0 if args.lora_scale is None else args.lora_scale}
    if generation.warnings:
        record["warnings"] = list(generation.warnings)
    return {**record, "settings": settings, "nova_video": __version__}


def _told(timeline: "Timeline[T]", value: Callable[[T], float]) -> float | list[list[float]]:
    """A number, or (seconds, number) pairs as JSON has them."""
    if timeline.is_constant:
        return value(timeline.values[0])
    return [[at, value(moment)] for at, moment in zip(timeline.times, timeline.values, strict=True)]


# Making it ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A generation and what is to become of it."""

    generation: "Generation"
    path: Path
    record: dict[str, Any]
    live: bool = False
    """Written while it is made."""
    state: Path | None = None
    """Kept up to date after every latent frame, and removed at the end."""
    as_json: bool = False


def carry_out(job: Job, on_step: "StepCallback") -> None:
    """Make it, write it, and say where it is."""
    try:
        if job.live:
            _write_live(job, on_step)
        else:
            _write(job, on_step)
    except KeyboardInterrupt as stop:
        if job.state is None or not job.state.exists():
            raise
        word = "terminated" if isinstance(stop, Terminated) else "interrupted"
        resume = shlex.join(["nova", "generate", "--resume", str(job.state)])
        raise type(stop)(f"{word}, to go on: {resume}") from None
    if job.state is not None:
        job.state.unlink(missing_ok=True)


def _write(job: Job, on_step: "StepCallback") -> None:
    from nova_video import media
    from nova_video.pixels import to_bytes

    result = job.generation.run(_saving(job.generation, job.state, on_step))
    pixels = result.images[:, None] if result.frames is None else result.frames  # (1, F, H, W, 3) in [0, 1]
    media.write_media(to_bytes(pixels[0]), job.path, job.generation.plan.fps, job.record)
    _say(job)


def _write_live(job: Job, on_step: "StepCallback") -> None:
    """The state that is kept counts no frame that is not in the file, and that is one behind until it is closed."""
    from nova_video.media import LiveWriter
    from nova_video.pixels import to_bytes

    generation, counted = job.generation, 0
    before = generation.emitted  # frames that a run before this one wrote
    newer = None if job.state is None else job.state.with_name(f".{job.state.name}.newer")

    def on_saved() -> None:
        nonlocal counted
        counted = generation.emitted

    def settle(written: int) -> None:
        if job.state is not None and newer is not None and newer.exists() and counted <= written:
            newer.replace(job.state)

    frames: Any = generation.stream(callback_on_step_end=_saving(generation, newer, on_step, on_saved))
    writer = LiveWriter(job.path, generation.plan.fps, job.record, keep=before, restore=job.state is None)
    try:
        with contextlib.closing(frames), writer:
            for frame in frames:  # (H, W, 3) in [0, 1]
                writer.write(to_bytes(frame))
                if generation.emitted == before + 1:
                    _say(job)  # so that it can be watched
                settle(writer.frames - 1)
    finally:
        settle(writer.frames)
        if newer is not None:
            newer.unlink(missing_ok=True)


def _saving(
    generation: "Generation", path: Path | None, on_step: "StepCallback", on_saved: Callable[[], None] = lambda: None
) -> "StepCallback":
    """A callback that saves the generation wherever a latent frame is whole, and goes on to `on_step`."""

    def on_step_saving(pipe: "NovaPipeline", step: int, frame: int, tensors: dict[str, Any]) -> object:
        if path is not None and generation.state.open is None:
            generation.save(path)
            on_saved()
        return on_step(pipe, step, frame, tensors)

    return on_step_saving


def _say(job: Job) -> None:
    print(json.dumps({"file": str(job.path), **job.record}) if job.as_json else job.path, flush=True)


@contextlib.contextmanager
def progress(files: int) -> "Iterator[Callable[[Generation], StepCallback]]":
    """A bar over all sets of all frames of all files, on stderr, where that is a terminal.

    Yields what takes the next generation and returns the callback that moves the bar. All files have as many sets.
    """
    with progress_bar() as bar:
        file, task = 0, None

        def watch(generation: "Generation") -> "StepCallback":
            nonlocal file, task
            total, state, frames = generation.total_steps, generation.state, generation.plan.latent_frames
            if task is None:
                task = bar.add_task("starting", total=None if total is None else total * files, completed=state.step)
            file += 1
            which = f"{file}/{files}: " if files > 1 else ""
            of_frames = "" if frames is None else f"/{frames}"

            def on_step(_: object, __: int, frame: int, ___: object) -> bool:
                sets = len(state.sizes(frame))
                made = sets if state.open is None else state.open.sets
                bar.update(task, advance=1, description=f"{which}frame {frame + 1}{of_frames}, set {made}/{sets}")
                return True

            return on_step

        yield watch
