"""The commands `nova evaluate ...`: a benchmark's tables on stdout, its JSON and its samples or sheets in a folder."""

import contextlib
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nova_video.cli.arguments import (
    SAMPLING,
    EvaluateDrift,
    EvaluateEditing,
    EvaluateEmoji,
    EvaluateFlags,
    EvaluateOwn,
    EvaluateWorldFlags,
)
from nova_video.cli.console import load_pipeline, progress_bar
from nova_video.cli.flags import given_options, typed_words
from nova_video.common.errors import InputError
from nova_video.pipeline.options import Options

if TYPE_CHECKING:
    from nova_video.evaluation.benchmark import Benchmark, Progress
    from nova_video.pipeline.pipeline import NovaPipeline
    from nova_worlds.rendering.world import EmojiWorld


def run_evaluate_own(args: EvaluateOwn) -> None:
    """Run a benchmark of the user's own. The model is loaded only if samples are missing."""
    from rich.console import Console

    from nova_video.common.devices import choose_device
    from nova_video.evaluation.benchmark import BenchmarkRun

    benchmark = _own_benchmark(args.benchmark)
    choose_device(args.device)
    output = args.output or Path(f"runs/evaluate-{args.benchmark.partition(':')[2].lower()}")
    options = {name: value for name, value in _sampling(args).items() if value is not None}
    with _progress() as on_progress:
        run = BenchmarkRun(
            benchmark, output, seed=args.seed, options=options, model=args.model, on_progress=on_progress
        )
        if run.missing:
            run.make(load_pipeline(args.model, args.device, args.dtype), args.batch_size)
        report = run.judge(_command_line(args.benchmark, args))
    Console().print(report.as_table())
    print(output)


def run_evaluate_emoji(args: EvaluateEmoji) -> None:
    """Judge held-out combinations, and pictures of two objects."""
    from rich.console import Console

    from nova_worlds.evaluation.emoji import EmojiSettings, evaluate_emoji
    from nova_worlds.evaluation.report import print_report, write_report

    settings = EmojiSettings(
        **_values(args, EmojiSettings) | _sampling(args),
    )
    pipe, world = _open(args)
    with _progress() as on_progress:
        report = evaluate_emoji(
            pipe, world, settings, model=args.model, command=_command_line("emoji", args), on_progress=on_progress
        )
    write_report(report, args.output)
    print_report(report, Console())
    print(args.output)


def run_evaluate_editing(args: EvaluateEditing) -> None:
    """Judge what is carried on, changed and filled in."""
    from rich.console import Console

    from nova_worlds.evaluation.editing import EditingSettings, evaluate_editing
    from nova_worlds.evaluation.report import print_editing, write_report
    from nova_worlds.evaluation.world_benchmark import LongSettings

    settings = EditingSettings(
        parts=args.parts,
        num_clips=args.num_clips,
        split=args.split,
        long=LongSettings(**_values(args, LongSettings)),
        seed=args.seed,
        batch_size=args.batch_size,
        **_sampling(args),
    )
    pipe, world = _open(args)
    with _progress() as on_progress:
        report = evaluate_editing(
            pipe, world, settings, model=args.model, command=_command_line("editing", args), on_progress=on_progress
        )
    write_report(report, args.output)
    print_editing(report, Console())
    print(args.output)


def run_evaluate_drift(args: EvaluateDrift) -> None:
    """Measure how long clips change in time."""
    from rich.console import Console

    from nova_worlds.evaluation.drift import DriftSettings, evaluate_drift
    from nova_worlds.evaluation.plot import write_plot
    from nova_worlds.evaluation.report import print_drift, write_report

    settings = DriftSettings(**_values(args, DriftSettings) | _sampling(args))
    pipe, world = _open(args)
    with _progress() as on_progress:
        report = evaluate_drift(
            pipe, world, settings, model=args.model, command=_command_line("drift", args), on_progress=on_progress
        )
    write_report(report, args.output)
    write_plot(report, args.output / "plot.png")
    print_drift(report, Console())
    print(args.output)


def _own_benchmark(name: str) -> "Benchmark":
    """The benchmark that `module:Class` names; an object or a function that makes one will do."""
    from nova_video.common.extensions import load_extension
    from nova_video.evaluation.benchmark import Benchmark

    found = load_extension(name, "benchmark")
    benchmark = found if isinstance(found, Benchmark) or not callable(found) else found()
    if not isinstance(benchmark, Benchmark):
        raise InputError(f"benchmark is {name!r}: expected a class that extends nova_video.evaluation.Benchmark")
    return benchmark


def _sampling(args: EvaluateFlags) -> dict[str, Any]:
    """The arguments of a pipeline's call that were typed. None: not typed."""
    return dict.fromkeys(SAMPLING) | given_options(args, Options, SAMPLING)


def _values(args: EvaluateFlags, record: type[Any]) -> dict[str, Any]:
    """The fields of a record that are flags of the same name."""
    return {field.name: getattr(args, field.name) for field in fields(record) if hasattr(args, field.name)}


def _open(args: EvaluateWorldFlags) -> "tuple[NovaPipeline, EmojiWorld]":
    """The model and the world it is measured on. All that can be checked is, before anything large is loaded."""
    from nova_video.common.devices import choose_device
    from nova_video.io.files import make_folder
    from nova_worlds.rendering.world import EmojiWorld

    world = EmojiWorld.load(args.data, choose_device(args.device))
    make_folder(args.output)
    return load_pipeline(args.model, args.device, args.dtype), world


@contextlib.contextmanager
def _progress() -> "Iterator[Progress]":
    """A bar for each stage of a benchmark. Yields the function that moves them."""
    with progress_bar() as bar:
        tasks: dict[str, Any] = {}

        def on_progress(source: str, done: int, total: int) -> None:
            if source not in tasks:
                tasks[source] = bar.add_task(source, total=total)
            bar.update(tasks[source], completed=done)

        yield on_progress


def _command_line(name: str, args: EvaluateFlags) -> str:
    """The command that repeats this evaluation, without where it writes."""
    return shlex.join(["nova", "evaluate", name, *typed_words(args, Options, ("output", "benchmark"))])
