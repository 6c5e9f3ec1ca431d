"""A benchmark: prompts, a judge and a table. `nova evaluate module:Class` runs one of a user's own.

`evaluate` makes every sample as a file with its record, and then has the judge read the files. A run that was stopped
goes on with the samples that are missing, and a folder with all samples is judged without the model.
"""

import hashlib
import json
import platform
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table

import nova_video
from nova_video.common.errors import InputError
from nova_video.io.decode import MediaFile
from nova_video.io.files import atomic_path, make_folder
from nova_video.io.media import read_metadata
from nova_video.io.weights import read_json
from nova_video.pipeline.result import GenerateResult

ALL = "all"  # the row of the table that is over all samples
SETTINGS, SCORES, SAMPLES = "settings.json", "scores.json", "samples"
PICTURE, CLIP = ".png", ".mp4"

Progress = Callable[[str, int, int], None]
"""(what is being done, samples done, samples in all)."""


@dataclass(frozen=True)
class BenchmarkItem:
    """One prompt of a benchmark, and what its judge needs to know."""

    prompt: str
    group: str = ""
    """Row of the table that its scores count in, beside the row of all."""
    samples: int = 1
    """Samples to make of it, each from a seed of its own."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the pipeline's call for this prompt, such as `num_frames` or `video`."""
    facts: Any = None
    """Whatever the judge needs, such as the objects that must be seen."""


@dataclass(frozen=True)
class SampleFile:
    """A picture (png) or clip (mp4) of one item, in a file."""

    item: BenchmarkItem
    seed: int
    name: Path
    """The file without its extension."""

    @property
    def path(self) -> Path:
        clip = self.name.with_suffix(CLIP)
        return clip if clip.exists() else self.name.with_suffix(PICTURE)

    def frames(self) -> NDArray[np.uint8]:
        """The frames (F, H, W, 3) in the file: exact for a picture, as the mp4 shows them for a clip."""
        return MediaFile(self.path).read()

    def record(self) -> dict[str, Any]:
        """How it was made, as the file tells."""
        return read_metadata(self.path)


JudgedSamples = Sequence[tuple[SampleFile, Mapping[str, float]]]
"""Every sample with its scores by name."""


class Benchmark(ABC):
    """The base of benchmarks. A subclass gives the prompts and judges a sample; the rest has a default."""

    name: ClassVar[str] = ""
    """For reports; empty: the name of the class."""
    options: ClassVar[Mapping[str, Any]] = {}
    """Arguments of the pipeline's call for all prompts, unless the command line or an item has others."""

    @abstractmethod
    def items(self) -> Sequence[BenchmarkItem]:
        """The prompts, always in the same order: sample i is made from seed + i."""

    @abstractmethod
    def judge(self, sample: SampleFile) -> Mapping[str, float]:
        """The scores of one sample, by name."""

    def table(self, judged: JudgedSamples) -> dict[str, dict[str, float]]:
        """The table's rows: the mean of each score over each group, then over all samples."""
        groups = dict.fromkeys(sample.item.group for sample, _ in judged if sample.item.group)
        rows = {name: [scores for sample, scores in judged if sample.item.group == name] for name in groups}
        return {name: mean_scores(found) for name, found in (rows | {ALL: [scores for _, scores in judged]}).items()}


def mean_scores(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each score over the samples that have it."""
    names = dict.fromkeys(name for scores in found for name in scores)
    return {name: float(np.mean([scores[name] for scores in found if name in scores])) for name in names}


@dataclass(frozen=True)
class BenchmarkReport:
    """All that a benchmark found."""

    settings: dict[str, Any]
    table: dict[str, dict[str, float]]
    """By row and score."""
    judged: JudgedSamples
    command: str = ""

    def as_json(self) -> dict[str, Any]:
        return {
            **self.settings,
            "command": self.command,
            "versions": package_versions(),
            "table": self.table,
            "samples": [
                {
                    "prompt": sample.item.prompt,
                    "group": sample.item.group,
                    "seed": sample.seed,
                    "file": f"{SAMPLES}/{sample.path.name}",
                    "scores": dict(scores),
                }
                for sample, scores in self.judged
            ],
        }

    def as_table(self) -> Table:
        """The table for a terminal."""
        names = list(dict.fromkeys(name for row in self.table.values() for name in row))
        title = f"{self.settings['benchmark']}: {self.settings['model'] or 'a model'}, {len(self.judged)} samples"
        table = Table(title=title, title_justify="left")
        for column in ("", *names):
            table.add_column(column, justify="right" if column else "left")
        for name, row in self.table.items():
            table.add_row(name, *(f"{row[score]:.4g}" if score in row else "-" for score in names))
        return table


class BenchmarkRun:
    """A benchmark in a folder: which samples it needs, which are missing, and what they score."""

    def __init__(
        self,
        benchmark: Benchmark,
        output: Path,
        *,
        seed: int = 0,
        options: Mapping[str, Any] | None = None,
        model: str = "",
        on_progress: Progress | None = None,
    ) -> None:
        """Raises InputError where the folder holds samples of other settings or cannot be written to."""
        self.benchmark, self.output, self.on_progress = benchmark, output, on_progress
        self.options = {**benchmark.options, **(options or {})}
        items = [item for item in benchmark.items() for _ in range(item.samples)]
        if not items:
            raise InputError("the benchmark has no items: expected at least one prompt")
        self.samples = [
            SampleFile(item, seed + number, output / SAMPLES / f"{number:05d}") for number, item in enumerate(items)
        ]
        asked = repr([(item.prompt, dict(item.options)) for item in items])
        self.settings = {
            "benchmark": benchmark.name or type(benchmark).__name__,
            "model": model,
            "seed": seed,
            "options": json.loads(json.dumps(self.options, default=repr)),
            "prompts": hashlib.sha256(asked.encode()).hexdigest()[:16],
        }
        make_folder(output / SAMPLES)
        place = output / SETTINGS
        if place.exists():
            before = read_json(place)
            for name, now in self.settings.items():
                if before.get(name) != now:
                    raise InputError(
                        f"{output} has samples made with {name} {before.get(name)!r}, and {name} is {now!r}:"
                        " expected another --output"
                    )
        write_json(place, self.settings)

    @property
    def missing(self) -> list[SampleFile]:
        """The samples that are still to be made."""
        return [sample for sample in self.samples if not sample.path.exists()]

    def make(self, pipe: Callable[..., Any], batch_size: int = 1) -> None:
        """Make what is missing; samples that follow one another with the same options share a batch."""
        done = len(self.samples) - len(missing := self.missing)
        for options, alike in groupby(missing, key=lambda sample: sample.item.options):
            left = list(alike)
            for at in range(0, len(left), batch_size):
                batch = left[at : at + batch_size]
                made = pipe(
                    prompt=[sample.item.prompt for sample in batch],
                    generator=[torch.Generator().manual_seed(sample.seed) for sample in batch],
                    **{**self.options, **options},
                )
                save_samples(made, batch)
                done += len(batch)
                self._tell("sampling", done)

    def judge(self, command: str = "") -> BenchmarkReport:
        """Judge all samples, and write the scores to `scores.json`."""
        judged = []
        for number, sample in enumerate(self.samples, 1):
            scores: Any = self.benchmark.judge(sample)
            if not isinstance(scores, Mapping):
                kind = type(scores).__name__
                raise InputError(f"the judge of {sample.path.name} returns {kind}: expected scores by name")
            judged.append((sample, {name: float(value) for name, value in scores.items()}))
            self._tell("judging", number)
        report = BenchmarkReport(self.settings, self.benchmark.table(judged), judged, command)
        write_json(self.output / SCORES, report.as_json())
        return report

    def _tell(self, what: str, done: int) -> None:
        if self.on_progress is not None:
            self.on_progress(what, done, len(self.samples))


def evaluate(
    benchmark: Benchmark,
    pipe: Callable[..., Any],
    output: str | Path,
    *,
    seed: int = 0,
    batch_size: int = 1,
    options: Mapping[str, Any] | None = None,
    model: str = "",
    on_progress: Progress | None = None,
) -> BenchmarkReport:
    """Make what is missing of a benchmark's samples in the folder `output`, and judge them all.

    `options` are arguments of every call of the pipeline; `model` is its name in the report.
    """
    run = BenchmarkRun(benchmark, Path(output), seed=seed, options=options, model=model, on_progress=on_progress)
    run.make(pipe, batch_size)
    return run.judge()


def save_samples(made: Any, samples: Sequence[SampleFile]) -> None:
    """Write what one call of a pipeline returned to the files of its samples."""
    shown = made.images if made.frames is None else made.frames
    if len(shown) != len(samples):
        raise InputError(f"the model made {len(shown)} samples of {len(samples)} prompts: expected one of each")
    for index, sample in enumerate(samples):
        own = slice(index, index + 1)
        GenerateResult(
            images=None if made.images is None else made.images[own],
            frames=None if made.frames is None else made.frames[own],
            fps=made.fps,
            seeds=(sample.seed,),
            records=made.records[own],
        ).save(sample.name.with_suffix(PICTURE if made.frames is None else CLIP))


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def package_versions() -> dict[str, str]:
    """The versions that a result depends on, by package."""
    return {
        "nova_video": nova_video.__version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
    }
