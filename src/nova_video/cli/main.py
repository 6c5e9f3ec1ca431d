"""The command `nova`: calls the library and presents. No tensor work, and no heavy import before a command runs.

Each sub-command of `arguments.py` has its function in `COMMANDS`. Wrong input is one line on stderr and exit code 2;
Ctrl-C is exit code 130, SIGTERM 143. Results go to stdout, all else to stderr.
"""

import contextlib
import errno
import io
import json
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nova_video.cli.arguments import (
    MODEL,
    BenchPresets,
    BenchSample,
    BenchServe,
    BenchTrain,
    Convert,
    DataEmoji,
    DataInspect,
    DataShapes,
    Edit,
    Encode,
    EvaluateDrift,
    EvaluateEditing,
    EvaluateEmoji,
    EvaluateOwn,
    Generate,
    Info,
    ModelFlags,
    Serve,
    Train,
    Words,
    one_line_errors,
    parse,
)
from nova_video.cli.bench import run_bench_presets, run_bench_sample, run_bench_serve, run_bench_train
from nova_video.cli.data import run_data_inspect, run_encode
from nova_video.cli.evaluate import run_evaluate_drift, run_evaluate_editing, run_evaluate_emoji, run_evaluate_own
from nova_video.cli.generate_command import run_edit, run_generate
from nova_video.cli.serve_command import run_serve
from nova_video.cli.words import run_words
from nova_video.common.errors import InputError, PartError, Terminated, first_line
from nova_video.common.extras import install_command
from nova_video.common.startup import hide, sleep_while_waiting
from nova_video.io.text import printable

LEFT_ALONE, SOME_FAILED, BAD_INPUT, INTERRUPTED, TERMINATED = 1, 1, 2, 130, 143
FULL = (errno.ENOSPC, errno.EFBIG, errno.EIO)
EXTRAS = {  # package -> the extra that brings it
    "tensorboard": "train",
    "torchdata": "train",
    "peft": "train",
    "cv2": "train",
    "ray": "data",
    "datasets": "data",
    "pyarrow": "data",
    "fsspec": "data",
    "scenedetect": "data",
    "matplotlib": "docs",
    "fastapi": "serve",
    "starlette": "serve",
    "uvicorn": "serve",
    "python_multipart": "serve",
    "websockets": "serve",
    "sqlalchemy": "serve",
    "prometheus_client": "serve",
}


def run_info(args: Info) -> None:
    """The record inside a file, one setting a line or as JSON."""
    from nova_video.common.timeline import is_timeline
    from nova_video.io import media

    record = media.read_metadata(args.file)
    if args.json:
        print(json.dumps(record))
        return
    settings = record.pop("settings", {})
    lines = {**record, **(settings if isinstance(settings, dict) else {})}
    width = max(map(len, map(printable, lines)), default=0)
    for name, value in lines.items():
        if value is None:
            continue
        first, *rest = _moments(value) if is_timeline(value) else [printable(str(value))]
        print(f"{printable(name):<{width}}  {first}")
        for line in rest:
            print(f"{'':<{width}}  {line}")


def _moments(timeline: Sequence[tuple[float, object]]) -> list[str]:
    """One line for each value of a timeline, (seconds, value) pairs."""
    return [f"from {at:g} s: {printable(str(moment))}" for at, moment in timeline]


def run_train(args: Train) -> None:
    """A recipe with what follows it on the command line, to the trainer."""
    from nova_video.training.recipe import load_recipe

    path = args.recipe
    if not path.exists() and path.name == str(path):  # a bare name
        path = Path("recipes") / path.with_suffix(".toml")
    if {"--help", "-h"} & set(args.overrides):
        from nova_video.training.recipe_help import recipe_help

        print(f"nova train {args.recipe} [SETTING VALUE ...]\n")
        print(recipe_help(load_recipe(path)))
        return
    with one_line_errors(["train", str(args.recipe), *args.overrides]):
        recipe = load_recipe(path, list(args.overrides))
    from nova_video.training.trainer import train

    folder = train(recipe)
    if _speaks():
        print(folder)


def run_convert(args: Convert) -> None:
    from nova_video.pipeline.convert import convert

    print(convert(args.source, args.output, args.base))


def run_data_emoji(args: DataEmoji) -> None:
    from nova_worlds.rendering.emoji_art import prepare_emoji

    world = prepare_emoji(args.art, args.names, args.output, args.set)
    print(f"{args.output}: {len(world.names)} objects")


def run_data_shapes(args: DataShapes) -> None:
    from nova_worlds.rendering.shapes import prepare_shapes

    world = prepare_shapes(args.output)
    print(f"{args.output}: {len(world.names)} objects")


COMMANDS: dict[type, Callable[[Any], None]] = {
    Generate: run_generate,
    Edit: run_edit,
    Serve: run_serve,
    Info: run_info,
    Words: run_words,
    Convert: run_convert,
    Encode: run_encode,
    Train: run_train,
    EvaluateEmoji: run_evaluate_emoji,
    EvaluateEditing: run_evaluate_editing,
    EvaluateDrift: run_evaluate_drift,
    EvaluateOwn: run_evaluate_own,
    BenchSample: run_bench_sample,
    BenchPresets: run_bench_presets,
    BenchTrain: run_bench_train,
    BenchServe: run_bench_serve,
    DataEmoji: run_data_emoji,
    DataShapes: run_data_shapes,
    DataInspect: run_data_inspect,
}


def _prepare_process(command: object) -> None:
    """Settings of the process that a quick start needs."""
    sleep_while_waiting()
    hide({"torchao"})  # what it is needed for reveals it
    if not isinstance(command, ModelFlags) or getattr(command, "resume", None) is not None:
        return
    unused = set()
    if command.lora is None:
        unused.add("peft")
    if command.model in (None, MODEL):  # the schedulers of others may need it
        unused.add("scipy")
    hide(unused)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of `nova` with these arguments."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # letters that the terminal or file cannot hold
    logging.basicConfig(level=logging.WARNING)
    for handler in logging.getLogger().handlers:
        handler.addFilter(_is_unsaid)
        handler.setFormatter(LogFormatter("nova: %(message)s"))
    logging.getLogger("nova_video").setLevel(logging.INFO)  # what takes long is said
    try:
        with stopped_by_sigterm():
            command = parse(sys.argv[1:] if arguments is None else arguments)
            if arguments is None:  # this process is the command's own
                _prepare_process(command)
            COMMANDS[type(command)](command)
            sys.stdout.flush()
    except KeyboardInterrupt as stop:
        word, code = ("terminated", TERMINATED) if isinstance(stop, Terminated) else ("interrupted", INTERRUPTED)
        return _complain(str(stop) or word, code) if _speaks() else code
    except InputError as error:
        return _complain(str(error))
    except PartError as error:
        return _complain(str(error), SOME_FAILED)
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        return _complain(f"this needs the package {error.name}: {install_command(EXTRAS[error.name])}")
    except BrokenPipeError:  # who read the output has enough, as in nova info FILE | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python writes the rest when it ends
        return 0
    except OSError as error:
        if error.filename is None and error.errno in FULL:  # files are named where they are written
            return _complain(f"the output cannot be written: {error.strerror}")
        return _complain(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
    except (RuntimeError, TypeError) as error:
        if "MPS" in str(error):  # what torch says of operations and types that Apple's GPUs lack
            return _complain(f"mps cannot compute this: expected --device cpu ({first_line(error)})")
        if _left_alone(error):
            return _complain("another process of this run has ended; what it said tells why", LEFT_ALONE)
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported here
            raise
        instead = "expected a smaller --batch, fewer frames, a smaller size or --low-memory"
        return _complain(f"the device is out of memory: {instead} ({error})")
    return 0


class LogFormatter(logging.Formatter):
    """One line for each message of ours, with nothing in it that a terminal would obey."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.name.startswith("nova_video"):
            return printable(text)
        return "\n".join(map(printable, text.split("\n")))  # libraries' own lines


@contextlib.contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM raises `Terminated` in the main thread of this process, so that files are put in order first."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    main_process = os.getpid()

    def stop(number: int, _: object) -> None:
        if os.getpid() == main_process:
            raise Terminated
        signal.signal(number, signal.SIG_DFL)  # a process that was forked from it ends as it would have
        os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _is_unsaid(record: logging.LogRecord) -> bool:
    """Not what a library has a handler for that says it."""
    logger: logging.Logger | None = logging.getLogger(record.name)
    while logger is not None and logger.name != "root":
        if any(not isinstance(handler, logging.NullHandler) for handler in logger.handlers):
            return False
        logger = logger.parent
    return True


def _speaks() -> bool:
    """True on the one process that prints."""
    return os.environ.get("RANK", "0") == "0"


def _left_alone(error: Exception) -> bool:
    """True if a peer process of this run closed the connection."""
    return (
        os.environ.get("WORLD_SIZE", "1") != "1"
        and re.search("Connection (closed|reset) by peer", str(error)) is not None
    )


def _complain(message: str, code: int = BAD_INPUT) -> int:
    """One line on stderr."""
    print(f"nova: {printable(' '.join(message.split()))}", file=sys.stderr)
    return code
