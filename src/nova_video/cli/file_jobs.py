"""Runs the generations of the command line: each becomes a file with a record of its making.

`cli/generate_command.py` starts them. No heavy import before a command runs.
"""

import contextlib
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nova_video.cli.arguments import CommonFlags, model_of
from nova_video.cli.console import progress_bar
from nova_video.common.errors import InputError, Terminated
from nova_video.io.files import atomic_path, check_writable, lock_file, reserve_name

if TYPE_CHECKING:
    from nova_video.cli.arguments import Format
    from nova_video.data.sheets import SheetEntry
    from nova_video.io.media import Frames
    from nova_video.pipeline.generation import Generation, StepCallback
    from nova_video.pipeline.pipeline import NovaPipeline
    from nova_video.pipeline.request import GenerateRequest

LONGEST_NAME = 60  # bytes of a file's name that is made of a sentence
WINDOWS_DEVICE = re.compile(r"con|prn|aux|nul|(com|lpt)[0-9¹²³]")  # names that Windows gives to no file
NOTES = "nova generate"  # where the command's own notes are in a saved state


# Where it goes --------------------------------------------------------------------------------------------------------


def check_output(
    output: Path | None, live: bool = False, wanted: "Format | None" = None, several: bool = False
) -> None:
    """Raises now for what could not be written later."""
    from nova_video.io import media

    if output is not None and re.search(r"%\d*d", output.name):
        raise InputError(f"got --output {output}: expected --format frames with a folder, for a file a frame")
    if live and wanted not in (None, "mp4"):
        raise InputError(f"cannot write {wanted} while it is made (--live): expected mp4")
    if wanted == "frames" and output is not None and not several:
        media.check_folder_of_frames(output)
    elif is_folder(output, wanted):
        folder = output or Path()
        if folder.exists() and not folder.is_dir():
            raise InputError(f"cannot write to {folder}: it is a file, expected a folder")
        if not folder.absolute().parent.is_dir():
            raise InputError(f"cannot write to {folder}: there is no folder {folder.parent}")
        check_writable(folder if folder.exists() else folder.absolute().parent)
    else:
        assert output is not None
        media.check_output(output)
        suffix = output.suffix.lower()
        if live and suffix != ".mp4":
            raise InputError(f"cannot write {output} while it is made (--live): its extension must be .mp4")
        if wanted is not None and suffix.replace("jpeg", "jpg") != f".{wanted.replace('jpeg', 'jpg')}":
            raise InputError(f"got --format {wanted} and --output {output}: expected one format")


def is_folder(output: Path | None, wanted: "Format | None") -> bool:
    """True for a place that files are written into, named after their sentences; it may be yet to be made."""
    from nova_video.io.media import SUFFIXES

    return output is None or output.is_dir() or (wanted is not None and output.suffix.lower() not in SUFFIXES)


def suffix_of(output: Path | None, wanted: "Format | None", picture: bool) -> str:
    """The extension of the files to write; none for folders of frames."""
    if wanted is not None:
        return "" if wanted == "frames" else f".{wanted.replace('jpeg', 'jpg')}"
    if output is not None and not is_folder(output, wanted):
        return output.suffix
    return ".png" if picture else ".mp4"


def check_state(path: Path) -> None:
    """Raises now for a state that could not be kept later."""
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
                stack.enter_context(lock_file(path))
        yield


@contextlib.contextmanager
def output_place(
    output: Path | None, wanted: "Format | None", index: int, prompts: Sequence[str], picture: bool
) -> Iterator[Path]:
    """The place of one result: the one asked for, numbered if there are several, or else named after its sentence.

    A name that nobody chose replaces no file, and is held against other processes.
    """
    suffix = suffix_of(output, wanted, picture)
    number = f"{index + 1:0{len(str(len(prompts)))}d}"
    if output is not None and len(prompts) == 1 and (suffix == "" or not is_folder(output, wanted)):
        yield output
        return
    if output is not None and not is_folder(output, wanted):
        yield output.with_stem(f"{output.stem}-{number}")
        return
    name, folder = name_of(prompts[index]), output or Path()
    if len(prompts) > 1:
        name = f"{number}-{name}"
    folder.mkdir(exist_ok=True)
    for again in count(1):
        path = folder / (name + (f"-{again}" if again > 1 else "") + suffix)
        with reserve_name(path, is_folder=suffix == "") as free:
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
    args: CommonFlags, request: "GenerateRequest", generation: "Generation", given: dict[str, Any]
) -> dict[str, Any]:
    """The record inside a file. `given` names the inputs of the command besides the sentence."""
    from nova_video.pipeline import record

    origin: dict[str, Any] = {"model": model_of(args)}
    if args.lora is not None:
        origin |= {"lora": str(args.lora), "lora_scale": 1.0 if args.lora_scale is None else args.lora_scale}
    return record.make_record(request, generation, given, origin)


# Making it ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FileJob:
    """A generation and what is to become of it."""

    generation: "Generation"
    paths: Sequence[Path]
    """The file, or folder of frames, of each picture or clip."""
    records: Sequence[dict[str, Any]]
    live: bool = False
    """Written while it is made."""
    state: Path | None = None
    """Kept up to date after every latent frame, and removed at the end."""
    as_json: bool = False
    as_frames: bool = False
    """Written as folders of frames."""
    sheet: "Sheet | None" = None
    """Shows the results, too."""


@dataclass
class Sheet:
    """A page of all results."""

    path: Path
    title: str
    note: str
    entries: "list[SheetEntry]" = field(default_factory=list)

    def add(self, frames: "Frames", record: dict[str, Any], path: Path) -> None:
        """A clip by some of its frames, so that many clips need little memory."""
        from nova_video.data.sheets import MOST_FRAMES, SheetEntry, spread

        shown = frames[spread(len(frames), MOST_FRAMES)].copy()
        self.entries.append(SheetEntry(shown, sentence_of(record["prompt"]), f"seed {record['seed']} · {path.name}"))

    def write(self) -> None:
        from nova_video.data.sheets import draw_sheet

        page = draw_sheet(self.title, self.note, self.entries)
        with atomic_path(self.path) as part:
            page.save(
                part, format={".jpg": "JPEG", ".jpeg": "JPEG"}.get(suffix := self.path.suffix.lower(), suffix[1:])
            )


def sentence_of(prompt: Any) -> str:
    """A sentence, or those of a timeline one after the other."""
    return prompt if isinstance(prompt, str) else ", then ".join(str(sentence) for _, sentence in prompt)


def carry_out(job: FileJob, on_step: "StepCallback") -> None:
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
        resume = shlex.join(["nova", "generate", "--resume", str(job.state), "-o", str(job.paths[0])])
        raise type(stop)(f"{word}, to go on: {resume}") from None
    if job.state is not None:
        job.state.unlink(missing_ok=True)


def start_together(pipe: "NovaPipeline", requests: "Sequence[GenerateRequest]") -> "Generation":
    """One generation of requests that differ in sentence and seed alone; each has random numbers of its own seed."""
    import torch

    if len(requests) == 1:
        return pipe.start(requests[0])
    generators = [torch.Generator(pipe.device).manual_seed(request.seed or 0) for request in requests]
    prompts: Any = [request.prompt for request in requests]
    return pipe.start(replace(requests[0], prompt=prompts, seed=None), generators)


def _write(job: FileJob, on_step: "StepCallback") -> None:
    results = results_of(job.generation, _save_states(job.generation, job.state, on_step))
    for frames, path, record in zip(results, job.paths, job.records, strict=True):
        write_result(frames, path, job.generation.plan.fps, record, job.as_frames)
        if job.sheet is not None:
            job.sheet.add(frames, record, path)
        say(path, record, job.as_json)


def results_of(generation: "Generation", on_step: "StepCallback | None" = None) -> "Iterator[Frames]":
    """Runs a generation and yields the frames of each picture or clip."""
    from nova_video.io.pixels import to_bytes

    result = generation.run(on_step)
    pixels = result.images[:, None] if result.frames is None else result.frames  # (B, F, H, W, 3) in [0, 1]
    return map(to_bytes, pixels)


def write_result(frames: "Frames", path: Path, fps: float, record: dict[str, Any], as_frames: bool) -> None:
    """Writes a file, or a folder of frames, with its record."""
    from nova_video.io import media

    if as_frames:
        media.write_frames(frames, path, record)
    else:
        media.write_media(frames, path, fps, record)


def _write_live(job: FileJob, on_step: "StepCallback") -> None:
    """Writes a live file with its state. The state counts only frames that are in the file.

    The file is one frame behind until it is closed.
    """
    from nova_video.io.media import LiveWriter
    from nova_video.io.pixels import to_bytes

    generation, counted = job.generation, 0
    path, record = job.paths[0], job.records[0]
    before = generation.emitted  # frames that a run before this one wrote
    newer = None if job.state is None else job.state.with_name(f".{job.state.name}.newer")

    def on_saved() -> None:
        nonlocal counted
        counted = generation.emitted

    def settle(written: int) -> None:
        if job.state is not None and newer is not None and newer.exists() and counted <= written:
            newer.replace(job.state)

    frames: Any = generation.stream(callback_on_step_end=_save_states(generation, newer, on_step, on_saved))
    writer = LiveWriter(path, generation.plan.fps, record, keep=before, restore=job.state is None)
    try:
        with contextlib.closing(frames), writer:
            for frame in frames:  # (H, W, 3) in [0, 1]
                writer.write(to_bytes(frame))
                if generation.emitted == before + 1:
                    say(path, record, job.as_json)  # so that it can be watched
                settle(writer.frames - 1)
    finally:
        settle(writer.frames)
        if newer is not None:
            newer.unlink(missing_ok=True)


def _save_states(
    generation: "Generation", path: Path | None, on_step: "StepCallback", on_saved: Callable[[], None] = lambda: None
) -> "StepCallback":
    """A callback that saves the generation wherever a latent frame is whole, and goes on to `on_step`."""

    def on_step_saving(pipe: "NovaPipeline", step: int, frame: int, tensors: dict[str, Any]) -> object:
        if path is not None and generation.state.open is None:
            generation.save(path)
            on_saved()
        return on_step(pipe, step, frame, tensors)

    return on_step_saving


def say(path: Path, record: dict[str, Any], as_json: bool) -> None:
    """Prints where a result is, and as JSON how it was made."""
    print(json.dumps({"file": str(path), **record}) if as_json else path, flush=True)


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
            together = generation.plan.batch
            first, file = file + 1, file + together
            which = "" if files == 1 else f"{first}/{files}: " if together == 1 else f"{first}-{file}/{files}: "
            of_frames = "" if frames is None else f"/{frames}"

            def on_step(_: object, __: int, frame: int, ___: object) -> bool:
                sets = len(state.sizes(frame))
                made = sets if state.open is None else state.open.sets
                bar.update(
                    task, advance=together, description=f"{which}frame {frame + 1}{of_frames}, set {made}/{sets}"
                )
                return True

            return on_step

        yield watch
