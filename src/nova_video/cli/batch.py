"""Batches of `nova generate --prompts FILE`: every line becomes results in one folder, made here or on Ray.

    folder/run.json           what the batch was begun with
    folder/index.jsonl        a line for each result: how it was asked for, its file or its error
    folder/000001-a-whale.mp4

A line is added to the index when its file is whole, so that a batch that was stopped goes on where it was. At the end,
the index is in the order of the prompts. No heavy import before a batch runs.
"""

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nova_video.cli.arguments import Generate, model_of
from nova_video.cli.batch_maker import BatchEntry, BatchMaker, BatchPlace, EntryResult, ResultEngine
from nova_video.cli.console import outline_pipeline, progress_bar
from nova_video.cli.file_jobs import say
from nova_video.cli.prompt_file import SUFFIXES, PromptLine, read_prompt_file
from nova_video.cli.script import TIMELINE_KEYS
from nova_video.cli.typed_request import flag_of, seed_of, settings_of
from nova_video.common.checks import check_number
from nova_video.common.errors import InputError, PartError, Terminated
from nova_video.io.files import atomic_path, check_writable, file_mark, lock_folder
from nova_video.io.text import parse_json

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)

RUN, INDEX = "run.json", "index.jsonl"
NOT_FOR_BATCHES = ("prompt", "prompt_at", "sheet", "live", "state", "script", "like")
MOST_WORKERS, MOST_RESULTS, MOST_LISTED = 4096, 10_000_000, 20
GPU_BATCH = 4
GIVEN_LATER = ("threads", "batch")  # notes that flags need not give
TEXT_COLUMNS = ("prompt", "settings", "inputs")  # of the Parquet index: what is no sentence is JSON


@dataclass(frozen=True, kw_only=True)
class BatchNotes:
    """The flags that a batch was begun with: besides its lines, they decide its bits."""

    model: str
    head: str | None
    lora: str | None
    lora_scale: float | None
    dtype: str
    format: str | None
    low_memory: bool
    tiled: bool
    int8_text: bool
    device: str
    """cpu, cuda or mps."""
    threads: int
    """Threads of each worker on a processor; the bits depend on them."""
    batch: int
    """Results that were made together, whose bits depend on it on a GPU."""
    seed: int


def run_batch(args: Generate) -> None:
    """A file for each result of each line, and an index of them all."""
    folder = _check_flags(args)
    assert args.prompts is not None
    lines = read_prompt_file(args.prompts)
    before = read_notes(folder)
    seed = args.seed if before is None or args.seed is not None else before.seed
    seed = seed_of(args) if seed is None else seed
    entries = entries_of(args, lines, seed)
    check_entries(args, entries)
    with lock_folder(folder):
        if before is not None:
            _check_notes(folder, before, _typed_notes(args, seed))
        index = BatchIndex(folder)
        done = index.read()
        _check_same(folder, entries, done)
        todo = {entry.number for entry in entries if not _is_made(folder, done.get(entry.number))}
        if todo:
            if len(todo) < len(entries):
                log.info("%d of %d results are there already", len(entries) - len(todo), len(entries))
            _make_all(args, entries, todo, done, index, before, seed)
        rows = [done[entry.number] for entry in entries]
        index.write(rows)
    if args.index is not None:
        write_index(rows, args.index)
    if failed := [row for row in rows if row["error"] is not None]:
        for row in failed[:MOST_LISTED]:
            log.warning("line %d: %s", row["line"], row["error"])
        raise PartError(f"{len(failed)} of {len(rows)} results failed: {folder / INDEX} tells why")


def _make_all(
    args: Generate,
    entries: Sequence[BatchEntry],
    todo: set[int],
    done: dict[int, dict[str, Any]],
    index: "BatchIndex",
    before: BatchNotes | None,
    seed: int,
) -> None:
    """Makes what is to be done, adds it to the index, and says where it is."""
    if before is not None:
        args = replace(args, threads=before.threads, batch=before.batch)
    with _engine(args, index.folder) as engine, index.adding() as add, progress_bar() as bar:
        batch = args.batch or (GPU_BATCH if engine.device == "cuda" else 1)
        found = {"device": engine.device, "threads": engine.threads, "batch": batch}
        notes = BatchNotes(**_typed_notes(args, seed) | found)
        if before is None:
            _write_json(index.folder / RUN, asdict(notes))
        elif before.device != notes.device:
            raise _other_notes(index.folder, "device", notes.device, before.device)
        groups = [group for group in groups_of(entries, batch) if any(entry.number in todo for entry in group)]
        by_number = {entry.number: entry for entry in entries}
        task = bar.add_task("starting", total=sum(map(len, groups)))
        made = 0
        try:
            for results in engine.make(groups):
                for result in results:
                    row = row_of(by_number[result.number], result)
                    if result.file is not None and not (index.folder / result.file).exists():
                        raise InputError(
                            f"{index.folder / result.file} was made by a worker and is not here: expected a folder that"
                            " all machines of the Ray share"
                        )
                    done[result.number] = row
                    add(row)
                    made += 1
                    failed = sum(found["error"] is not None for found in done.values())
                    bar.update(task, advance=1, description=f"{made} made" + (f", {failed} failed" if failed else ""))
                    if result.file is not None:
                        say(index.folder / result.file, result.record, args.json)
        except KeyboardInterrupt as stop:
            word = "terminated" if isinstance(stop, Terminated) else "interrupted"
            raise type(stop)(f"{word} after {made} results, to go on: the same command") from None


@contextmanager
def _local_engine(args: Generate, folder: Path) -> Iterator[ResultEngine]:
    """Makes everything in this process."""
    maker = BatchMaker(BatchPlace(args, folder))
    device, threads = maker.load()
    yield ResultEngine(device, threads, lambda groups: map(maker.make, groups))


def _engine(args: Generate, folder: Path) -> AbstractContextManager[ResultEngine]:
    if args.engine == "ray":
        from nova_video.cli.batch_ray import ray_engine

        return ray_engine(args, folder)
    return _local_engine(args, folder)


# What is asked for ----------------------------------------------------------------------------------------------------


def _check_flags(args: Generate) -> Path:
    """The folder of a batch; raises for flags that do not fit one."""
    assert args.prompts is not None
    for name in NOT_FOR_BATCHES + tuple(f"{key}_at" for key in TIMELINE_KEYS):
        if getattr(args, name):
            raise InputError(f"got {flag_of(name)} with a batch: expected it in the lines of {args.prompts}, or not")
    if args.prompts.suffix.lower() not in SUFFIXES:
        raise InputError(f"cannot read prompts from {args.prompts}: expected {', '.join(SUFFIXES)}")
    if args.engine != "ray":
        for name in ("workers", "ray"):
            if getattr(args, name) is not None:
                raise InputError(f"got {flag_of(name)} without --engine ray: expected both")
    for name, most in (("workers", MOST_WORKERS), ("threads", MOST_WORKERS), ("batch", MOST_RESULTS)):
        if (value := getattr(args, name)) is not None:
            check_number(name, value, 1, integer=True, high=most)
    check_number("num_images", args.num_images, 1, integer=True, high=MOST_RESULTS)
    if args.image is not None and args.video is not None:
        raise InputError("got both of --image and --continue: expected one of them")
    if args.index is not None:
        if args.index.suffix.lower() not in (".parquet", ".jsonl"):
            raise InputError(f"cannot write the index {args.index}: expected .parquet or .jsonl")
        if not args.index.absolute().parent.is_dir():
            raise InputError(f"cannot write the index {args.index}: there is no folder {args.index.parent}")
        check_writable(args.index.absolute().parent)
        if args.index.suffix.lower() == ".parquet":
            import pyarrow  # noqa: F401 - an absent package is found before the work
    folder = args.output
    if folder is None:
        raise InputError("a batch has no folder: expected --output FOLDER, where it can go on after a stop")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"cannot write to {folder}: it is a file, expected a folder")
    if not folder.absolute().parent.is_dir():
        raise InputError(f"cannot write to {folder}: there is no folder {folder.absolute().parent}")
    if folder.is_dir() and not (folder / RUN).exists() and any(not path.match(".*") for path in folder.iterdir()):
        raise InputError(f"{folder} is not empty and no batch began there: expected a new folder, or that of a batch")
    return folder


def entries_of(args: Generate, lines: Iterable[PromptLine], seed: int) -> list[BatchEntry]:
    """The results of all lines. Each takes the next seed; a line with a seed counts from its own."""
    flags, entries = settings_of(args), list[BatchEntry]()
    flags.pop("seed", None)
    given = {name: path for name, path in (("image", args.image), ("video", args.video)) if path is not None}
    marks: dict[Path, str] = {}
    for line in lines:
        settings = {**_without_other_length(flags, line.settings), **line.settings}
        count, first = settings.pop("num_images_per_prompt", args.num_images), settings.pop("seed", None)
        media = {**({} if {"image", "video"} & set(line.media) else given), **line.media}
        inputs: dict[str, dict[str, str]] = {}
        for name, path in media.items():
            marks.setdefault(path, "")
            marks[path] = marks[path] or file_mark(path)
            inputs[name] = {"file": str(path), "mark": marks[path]}
        if len(entries) + count > MOST_RESULTS:
            raise InputError(f"line {line.number} makes more than {MOST_RESULTS:,} results: expected fewer in a batch")
        for index in range(count):
            own = seed + len(entries) if first is None else first + index
            told = json.loads(json.dumps(settings))
            entries.append(BatchEntry(len(entries) + 1, line.number, told.pop("prompt"), own, told, inputs))
    return entries


def _without_other_length(flags: Mapping[str, Any], line: Mapping[str, Any]) -> dict[str, Any]:
    """The flags' settings without a length that the line says another way."""
    replaced = {"num_frames", "seconds"} if {"num_frames", "seconds"} & set(line) else set[str]()
    return {name: value for name, value in flags.items() if name not in replaced}


def check_entries(args: Generate, entries: Sequence[BatchEntry]) -> None:
    """Raises for the first result that cannot be made, before the weights are read. Media are read when it is made."""
    outline = outline_pipeline(model_of(args), args.head)
    for entry in entries:
        try:
            plan = entry.request(media=False).resolve(outline.defaults, outline.capabilities)
            if plan.num_frames is None:
                raise InputError("num_frames is inf: expected a number of frames, for a file that ends")
            plan.check_pixels()
        except InputError as error:
            raise InputError(f"{args.prompts}, line {entry.line}: {error}") from None


def groups_of(entries: Sequence[BatchEntry], batch: int) -> Iterator[list[BatchEntry]]:
    """Neighbours of the same settings, `batch` at most: those that are made together, whatever was made before."""
    for _, found in groupby(entries, key=lambda entry: entry.together):
        same = list(found)
        size = batch if same[0].together is not None else 1
        for start in range(0, len(same), size):
            yield same[start : start + size]


# What is there --------------------------------------------------------------------------------------------------------


def read_notes(folder: Path) -> BatchNotes | None:
    """The notes of a batch that began in a folder."""
    path = folder / RUN
    if not path.exists():
        return None
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
        return BatchNotes(**found)
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} does not tell how a batch began: {error}: expected a new folder") from None


def _typed_notes(args: Generate, seed: int) -> dict[str, Any]:
    """Notes that the flags decide."""
    flags = {each.name: getattr(args, each.name) for each in fields(BatchNotes) if hasattr(args, each.name)}
    del flags["device"]  # is known when the model is loaded
    lora = None if args.lora is None else str(args.lora)
    return flags | {"model": model_of(args), "lora": lora, "dtype": args.dtype or "auto", "seed": seed}


def _check_notes(folder: Path, before: BatchNotes, typed: Mapping[str, Any]) -> None:
    for name, value in typed.items():
        if value is None and name in GIVEN_LATER:
            continue
        if value != (was := getattr(before, name)):
            raise _other_notes(folder, name, value, was)


def _other_notes(folder: Path, name: str, value: Any, was: Any) -> InputError:
    return InputError(f"{name} is {value}: the batch in {folder} began with {was}, expected that or another folder")


def _check_same(folder: Path, entries: Sequence[BatchEntry], done: Mapping[int, Mapping[str, Any]]) -> None:
    """Raises where a result that was made is now asked for differently."""
    for entry in entries:
        row = done.get(entry.number)
        if row is None or row["error"] is not None:
            continue
        for name, value in entry.told.items():
            if row.get(name) != value:
                raise InputError(
                    f"line {entry.line}: {name} is {json.dumps(value, ensure_ascii=False)}, and {folder / INDEX} has"
                    f" {json.dumps(row.get(name), ensure_ascii=False)} for it: expected the same, or another folder"
                )


def _is_made(folder: Path, row: Mapping[str, Any] | None) -> bool:
    return row is not None and row["error"] is None and (folder / str(row["file"])).exists()


def row_of(entry: BatchEntry, result: EntryResult) -> dict[str, Any]:
    """A row of the index: what was asked for, and what came of it."""
    return {**entry.told, "file": result.file, **result.facts, "error": result.error}


class BatchIndex:
    """The index in a batch's folder, which is also its memory of what is done."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / INDEX

    def read(self) -> dict[int, dict[str, Any]]:
        """Number -> row, the last one of each. A last line that is not whole was being written at a stop."""
        rows: dict[int, dict[str, Any]] = {}
        lines = self.path.read_text(encoding="utf-8").split("\n") if self.path.exists() else []
        for number, line in enumerate(lines, 1):
            try:
                row = parse_json(line) if line else None
            except ValueError as error:
                if number < len(lines):
                    raise InputError(f"{self.path}, line {number} is not JSON: {error}") from None
                continue
            if row is not None:
                rows[row["number"]] = row
        return rows

    @contextmanager
    def adding(self) -> "Iterator[Callable[[Mapping[str, Any]], None]]":
        """Takes rows, each of which is on the disk when the call returns."""
        self.write(list(self.read().values()))  # whole lines alone
        with self.path.open("a", encoding="utf-8") as file:

            def add(row: Mapping[str, Any]) -> None:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())

            yield add

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """All rows anew."""
        write_index(rows, self.path)


def write_index(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes rows as JSON lines, or as Parquet where the name says so."""
    with atomic_path(path) as part:
        if path.suffix.lower() == ".parquet":
            _write_parquet(rows, part)
        else:
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            part.write_text("".join(lines), encoding="utf-8")


def _write_parquet(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    whole, text = pa.int64(), pa.string()
    schema = pa.schema(
        {
            "number": whole,
            "line": whole,
            "prompt": text,
            "seed": whole,
            "settings": text,
            "inputs": text,
            "file": text,
            "width": whole,
            "height": whole,
            "frames": whole,
            "fps": pa.float64(),
            "error": text,
        }
    )
    plain = [
        row
        | {name: json.dumps(row[name], ensure_ascii=False) for name in TEXT_COLUMNS if not isinstance(row[name], str)}
        for row in map(dict, rows)
    ]
    pq.write_table(pa.Table.from_pylist(plain, schema), path)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    with atomic_path(path) as part:
        part.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
