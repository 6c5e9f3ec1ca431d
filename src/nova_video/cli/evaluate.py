"""The commands `nova evaluate ...`: a benchmark's tables on stdout, its JSON and its sheets in a folder."""

import contextlib
import shlex
from collections.abc import Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from nova_video.cli.arguments import EvaluateBeyond, EvaluateDrift, EvaluateEmoji, Evaluating
from nova_video.cli.console import load_pipeline, progress_bar

if TYPE_CHECKING:
    from nova_video.pipeline.pipeline import NovaPipeline
    from nova_worlds.evaluation.benchmark import Progress
    from nova_worlds.world import EmojiWorld


def run_evaluate_emoji(args: EvaluateEmoji) -> None:
    """Held-out combinations, and pictures of two objects."""
    from rich.console import Console

    from nova_worlds.evaluation.emoji import EmojiSettings, evaluate_emoji
    from nova_worlds.evaluation.report import print_report, write_report

    settings = EmojiSettings(
        num_clips=args.num_clips,
        num_pairs=args.num_pairs,
        num_frames=args.num_frames,
        split=args.split,
        seed=args.seed,
        batch_size=args.batch_size,
        num_inference_steps=args.sets,
        num_diffusion_steps=args.diffusion_steps,
        guidance_scale=args.guidance,
        motion_flow=args.motion,
        preset=args.preset,
        compile=False if args.no_compile else None,
    )
    pipe, world = _open(args)
    with _progress() as on_progress:
        report = evaluate_emoji(
            pipe, world, settings, model=args.model, command=_command_line("emoji", args), on_progress=on_progress
        )
    write_report(report, args.output)
    print_report(report, Console())
    print(args.output)


def run_evaluate_beyond(args: EvaluateBeyond) -> None:
    """What is carried on, changed and filled in."""
    from rich.console import Console

    from nova_worlds.evaluation.benchmark import LongSettings
    from nova_worlds.evaluation.editing import BeyondSettings, evaluate_beyond
    from nova_worlds.evaluation.report import print_beyond, write_report

    settings = BeyondSettings(
        parts=args.parts,
        num_clips=args.num_clips,
        split=args.split,
        long=LongSettings(
            context_frames=args.context_frames,
            sink_frames=args.sink_frames,
            history_noise=args.history_noise,
            reanchor_frames=args.reanchor_frames,
            hold_statistics=args.hold_statistics,
        ),
        seed=args.seed,
        batch_size=args.batch_size,
        num_inference_steps=args.sets,
        num_diffusion_steps=args.diffusion_steps,
        guidance_scale=args.guidance,
        motion_flow=args.motion,
        preset=args.preset,
        compile=False if args.no_compile else None,
    )
    pipe, world = _open(args)
    with _progress() as on_progress:
        report = evaluate_beyond(
            pipe, world, settings, model=args.model, command=_command_line("beyond", args), on_progress=on_progress
        )
    write_report(report, args.output)
    print_beyond(report, Console())
    print(args.output)


def run_evaluate_drift(args: EvaluateDrift) -> None:
    """How long clips change in time."""
    from rich.console import Console

    from nova_worlds.evaluation.drift import DriftSettings, evaluate_drift
    from nova_worlds.evaluation.plot import write_plot
    from nova_worlds.evaluation.report import print_drift, write_report

    settings = DriftSettings(
        num_clips=args.num_clips,
        num_frames=args.num_frames,
        split=args.split,
        context_frames=args.context_frames,
        sink_frames=args.sink_frames,
        history_noise=args.history_noise,
        reanchor_frames=args.reanchor_frames,
        hold_statistics=args.hold_statistics,
        seed=args.seed,
        batch_size=args.batch_size,
        num_inference_steps=args.sets,
        num_diffusion_steps=args.diffusion_steps,
        guidance_scale=args.guidance,
        motion_flow=args.motion,
        preset=args.preset,
        compile=False if args.no_compile else None,
    )
    pipe, world = _open(args)
    with _progress() as on_progress:
        report = evaluate_drift(
            pipe, world, settings, model=args.model, command=_command_line("drift", args), on_progress=on_progress
        )
    write_report(report, args.output)
    write_plot(report, args.output / "plot.png")
    print_drift(report, Console())
    print(args.output)


def _open(args: Evaluating) -> "tuple[NovaPipeline, EmojiWorld]":
    """The model and the world it is measured on. All that can be checked is, before anything large is loaded."""
    from nova_video.common.devices import choose_device
    from nova_worlds.evaluation.report import check_report_folder
    from nova_worlds.world import EmojiWorld

    world = EmojiWorld.load(args.data, choose_device(args.device))
    check_report_folder(args.output)
    return load_pipeline(args.model, args.device, args.dtype), world


@contextlib.contextmanager
def _progress() -> "Iterator[Progress]":
    """A bar for everything that is judged. Yields what moves them."""
    with progress_bar() as bar:
        tasks: dict[str, Any] = {}

        def on_progress(source: str, done: int, total: int) -> None:
            if source not in tasks:
                tasks[source] = bar.add_task(source, total=total)
            bar.update(tasks[source], completed=done)

        yield on_progress


def _command_line(name: str, args: Evaluating) -> str:
    """The command that repeats this evaluation; where it writes is another matter."""
    words = ["nova", "evaluate", name]
    for field in fields(args):
        if field.name != "output" and (value := getattr(args, field.name)) != field.default:
            values = value if isinstance(value, tuple) else () if value is True else (value,)
            words += [f"--{field.name.replace('_', '-')}", *map(str, values)]
    return shlex.join(words)
