"""Makes the results of a batch: in the command's own process, or in an actor of Ray."""

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nova_video.cli.arguments import Generate
from nova_video.cli.console import pipeline_of
from nova_video.cli.file_jobs import make_record, name_of, results_of, start_together, suffix_of, write_result
from nova_video.cli.remake import describe_inputs
from nova_video.common.errors import first_line

if TYPE_CHECKING:
    from nova_video.pipeline.pipeline import NovaPipeline
    from nova_video.pipeline.request import GenerateRequest

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BatchPlace:
    """The flags of a batch and its folder."""

    args: Generate
    folder: Path


@dataclass(frozen=True)
class BatchEntry:
    """One result that is asked for."""

    number: int
    """From 1 on, in the order of the lines."""
    line: int
    prompt: Any
    """A sentence, or (seconds, sentence) pairs as lists."""
    seed: int
    settings: Mapping[str, Any]
    """Further settings of `GenerateRequest`, of flags and of the line."""
    inputs: Mapping[str, Mapping[str, str]]
    """image, video or mask_image -> its file, and a mark of what is in it."""

    @property
    def told(self) -> dict[str, Any]:
        """The entry as the index tells it."""
        names = ("number", "line", "prompt", "seed", "settings", "inputs")
        return {name: getattr(self, name) for name in names}

    @property
    def together(self) -> str | None:
        """Entries with the same text may be made together; None: alone."""
        alone = bool(self.inputs) or not isinstance(self.prompt, str)
        return None if alone else json.dumps(self.settings, sort_keys=True)

    def request(self, media: bool = True) -> "GenerateRequest":
        """The request; without media, it is what can be checked before they are read."""
        from nova_video.io.media import load_image
        from nova_video.pipeline.request import GenerateRequest

        settings, given = dict(self.settings), dict[str, Any]()
        if media:
            for name, told in self.inputs.items():
                path = Path(told["file"])
                given[name] = load_image(path) if name == "image" else path
        elif {"image", "video"} & set(self.inputs):
            settings.pop("strength", None)
        own = {name: getattr(self, name) for name in ("prompt", "seed")}
        return GenerateRequest(**own, output_type="np", **settings, **given)


@dataclass(frozen=True)
class EntryResult:
    """The file that was made of an entry, or an error."""

    number: int
    file: str | None = None
    """Its name in the folder."""
    record: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=lambda: dict.fromkeys(("width", "height", "frames", "fps")))
    error: str | None = None


@dataclass(frozen=True)
class ResultEngine:
    """Where results are made."""

    device: str
    threads: int
    make: Callable[[Sequence[Sequence[BatchEntry]]], Iterator[list[EntryResult]]]
    """The results of groups, each group as soon as it is done."""


class BatchMaker:
    """Holds the model and makes entries."""

    def __init__(self, place: BatchPlace) -> None:
        self.args = place.args
        self.folder = place.folder

    @cached_property
    def pipe(self) -> "NovaPipeline":
        """The pipeline, on as many threads as were asked for."""
        import torch

        pipe = pipeline_of(self.args)
        if self.args.threads is not None:
            torch.set_num_threads(self.args.threads)
        return pipe

    def load(self) -> tuple[str, int]:
        """Loads the model; its device and its number of threads."""
        import torch

        return self.pipe.device.type, torch.get_num_threads()

    def make(self, entries: Sequence[BatchEntry]) -> list[EntryResult]:
        """Makes entries together, and one by one where that fails; an error costs its own entry alone."""
        try:
            return self._make(entries)
        except OSError:  # such as a full disk, which every other entry would meet
            raise
        except Exception as error:
            if type(error).__name__ == "OutOfMemoryError":
                _give_back_memory()
            if len(entries) > 1:
                log.warning("%s: %d results are made one at a time", first_line(error), len(entries))
                return [result for entry in entries for result in self.make([entry])]
            return [EntryResult(entries[0].number, error=_say(error))]

    def _make(self, entries: Sequence[BatchEntry]) -> list[EntryResult]:
        requests = [entry.request() for entry in entries]
        generation = start_together(self.pipe, requests)
        plan = generation.plan
        plan.check_pixels()
        records = []
        for entry, request in zip(entries, requests, strict=True):
            files = {name: Path(told["file"]) for name, told in entry.inputs.items()}
            args = replace(self.args, image=files.get("image"), video=files.get("video"))
            video = "edited" if plan.edits else "continue"
            given: dict[str, Any] = {"image": None, "continue": None, "given_frames": None}
            given |= {{"video": video, "mask_image": "mask"}.get(name, name): str(path) for name, path in files.items()}
            if "video" in files and not plan.edits:
                given["given_frames"] = plan.given_frames
            record = make_record(args, request, generation, given)
            describe_inputs(args, record, generation)
            records.append(record)
        suffix = suffix_of(self.folder, self.args.format, picture=plan.num_frames == 1)
        results = []
        for entry, record, frames in zip(entries, records, results_of(generation), strict=True):
            name = f"{entry.number:06d}-{name_of(_sentence(entry.prompt))}{suffix}"
            if suffix == "":  # a folder of frames, which a run before this one may have made
                shutil.rmtree(self.folder / name, ignore_errors=True)
            write_result(frames, self.folder / name, plan.fps, record, as_frames=suffix == "")
            facts = {"width": plan.width, "height": plan.height, "frames": len(frames), "fps": plan.fps}
            results.append(EntryResult(entry.number, name, record, facts))
        return results


def _sentence(prompt: Any) -> str:
    """A sentence, or the first one of a timeline."""
    return prompt if isinstance(prompt, str) else str(prompt[0][1])


def _give_back_memory() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _say(error: Exception) -> str:
    """The text of an error, with its class where it is not about the input."""
    text = first_line(error)
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"
