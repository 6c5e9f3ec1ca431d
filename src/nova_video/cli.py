"""The command `nova`: calls the library and presents. No tensor work, and no heavy import before a command runs.

Each sub-command of `arguments.py` has its function in `COMMANDS`. Wrong input is one line on stderr and exit code 2;
Ctrl-C is exit code 130. Results go to stdout, all else to stderr.
"""

import json
import logging
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from nova_video.arguments import (
    DataEmoji,
    DataShapes,
    Edit,
    EvaluateEmoji,
    Generate,
    Info,
    Train,
    one_line_errors,
    parse,
)
from nova_video.cli_generate import run_edit, run_generate
from nova_video.console import load_pipeline, progress_bar
from nova_video.errors import InputError

BAD_INPUT, INTERRUPTED = 2, 130
EXTRAS = {"tensorboard": "train", "cv2": "train", "matplotlib": "docs"}  # package -> the extra that brings it


def run_info(args: Info) -> None:
    """The record inside a file, one setting a line or as JSON."""
    from nova_video import media

    record = media.read_metadata(args.file)
    if args.json:
        print(json.dumps(record))
        return
    settings = record.pop("settings", {})
    lines = {**record, **(settings if isinstance(settings, dict) else {})}
    width = max(map(len, lines), default=0)
    for name, value in lines.items():
        if value is not None:
            print(f"{name:<{width}}  {value}")


def run_train(args: Train) -> None:
    """A recipe with what follows it on the command line, to the trainer."""
    from nova_video.training.recipe import load_recipe

    path = args.recipe
    if not path.exists() and path.name == str(path):  # a bare name
        path = Path("recipes") / path.with_suffix(".toml")
    with one_line_errors(["train", str(args.recipe), *args.overrides]):
        recipe = load_recipe(path, list(args.overrides))
    from nova_video.training.trainer import train

    print(train(recipe))


def run_evaluate_emoji(args: EvaluateEmoji) -> None:
    """The judge's tables, its JSON and its contact sheet."""
    from rich.console import Console

    from nova_video.data.world import EmojiWorld
    from nova_video.devices import choose_device
    from nova_video.evaluation.emoji import EmojiSettings, evaluate_emoji
    from nova_video.evaluation.report import check_report_folder, print_report, write_report

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
    )
    world = EmojiWorld.load(args.data, choose_device(args.device))
    check_report_folder(args.output)
    pipe = load_pipeline(args.model, args.device, args.dtype)
    with progress_bar() as bar:
        tasks: dict[str, Any] = {}

        def on_progress(source: str, done: int, total: int) -> None:
            if source not in tasks:
                tasks[source] = bar.add_task(source, total=total)
            bar.update(tasks[source], completed=done)

        report = evaluate_emoji(
            pipe, world, settings, model=args.model, command=_command_line(args), on_progress=on_progress
        )
    write_report(report, args.output)
    print_report(report, Console())
    print(args.output)


def _command_line(args: EvaluateEmoji) -> str:
    """The command that repeats this evaluation."""
    words = ["nova", "evaluate", "emoji"]
    for field in fields(args):
        if (value := getattr(args, field.name)) != field.default:
            words += [f"--{field.name.replace('_', '-')}", str(value)]
    return shlex.join(words)


def run_data_emoji(args: DataEmoji) -> None:
    from nova_video.data.emoji import prepare_emoji

    world = prepare_emoji(args.art, args.names, args.output, args.set)
    print(f"{args.output}: {len(world.names)} objects")


def run_data_shapes(args: DataShapes) -> None:
    from nova_video.data.shapes import prepare_shapes

    world = prepare_shapes(args.output)
    print(f"{args.output}: {len(world.names)} objects")


COMMANDS: dict[type, Callable[[Any], None]] = {
    Generate: run_generate,
    Edit: run_edit,
    Info: run_info,
    Train: run_train,
    EvaluateEmoji: run_evaluate_emoji,
    DataEmoji: run_data_emoji,
    DataShapes: run_data_shapes,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of `nova` with these arguments."""
    logging.basicConfig(format="nova: %(message)s", level=logging.WARNING)
    try:
        command = parse(sys.argv[1:] if arguments is None else arguments)
        COMMANDS[type(command)](command)
    except KeyboardInterrupt as stop:
        return _complain(str(stop) or "interrupted", INTERRUPTED)
    except InputError as error:
        return _complain(str(error))
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        return _complain(f"this needs the package {error.name}: pip install 'nova-video[{EXTRAS[error.name]}]'")
    except OSError as error:
        return _complain(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported here
            raise
        return _complain(f"the device is out of memory: ask for fewer frames or a smaller size ({error})")
    return 0


def _complain(message: str, code: int = BAD_INPUT) -> int:
    """One line on stderr."""
    print(f"nova: {' '.join(message.split())}", file=sys.stderr)
    return code
