"""Files of prompts for batches: .jsonl and .parquet with settings in every line, .txt with a sentence a line.

    {"prompt": "a whale moving left on a blue background", "seed": 3}
    {"prompt": [[0, "a red apple"], [1.0, "a green apple"]], "num_frames": 33, "motion": 4}
    {"prompt": "a whale spinning clockwise", "image": "whale.png"}

A key is a setting of `GenerateRequest`: its name, its key on the command line, or an alias. What a line does not say,
or says by null, is as the flags say. Paths start from the current folder, as those of flags do.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nova_video.common.checks import quote
from nova_video.common.errors import InputError, unknown
from nova_video.common.option_fields import aliases_of, check_option, key_of, kind_of, option_fields
from nova_video.common.timeline import is_timeline
from nova_video.io.text import parse_json, read_text

MEDIA = ("image", "video", "mask_image")
NOT_OF_LINES = ("output_type",)  # settings of calls from Python alone
SUFFIXES = (".jsonl", ".parquet", ".txt")
MOST_LINES = 1_000_000


@dataclass(frozen=True)
class PromptLine:
    """One line of a file of prompts."""

    number: int
    settings: Mapping[str, Any]
    """Settings of `GenerateRequest` by their names, those that are given."""
    media: Mapping[str, Path]
    """image, video or mask_image -> the file."""


def is_prompt_table(path: Path) -> bool:
    """True for a file with settings in its lines."""
    return path.suffix.lower() in (".jsonl", ".parquet")


def read_prompt_file(path: Path) -> list[PromptLine]:
    """The lines of a file, each checked by itself; `InputError` names the file and the line."""
    suffix = path.suffix.lower()
    rows = {".jsonl": _read_json_lines, ".parquet": _read_parquet}.get(suffix, _read_sentences)(path)
    names = known_keys()
    lines: list[PromptLine] = []
    for number, row in rows:
        if len(lines) == MOST_LINES:
            raise InputError(f"{path} has more than {MOST_LINES:,} lines: expected several files")
        lines.append(_line_of(f"{path}, line {number}", number, row, names))
    if not lines:
        raise InputError(f"{path} is empty: expected one prompt a line")
    return lines


def known_keys() -> dict[str, str]:
    """The keys of a line -> the names of settings and media."""
    from nova_video.pipeline.request import GenerateRequest

    options = {name: each for name, each in option_fields(GenerateRequest).items() if name not in NOT_OF_LINES}
    names = {name: name for name in (*options, *MEDIA)}
    return names | {key_of(each): name for name, each in options.items()} | aliases_of(GenerateRequest)


def _read_sentences(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield number, {"prompt": line.strip()}


def _read_json_lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise InputError(
                f'{path}, line {number} is {quote(row)}: expected an object such as {{"prompt": "a whale"}}'
            )
        yield number, row


def _read_parquet(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    import pyarrow
    import pyarrow.parquet as pq

    from nova_video.pipeline.options import Options

    whole = {name for name, each in option_fields(Options).items() if kind_of(each) is int}
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, {key: _whole(value) if key in whole else value for key, value in row.items()}
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError) as error:
        raise InputError(f"{path} is not Parquet that can be read: {error}") from None


def _whole(value: Any) -> Any:
    """A whole number in a column of floats, which other programs make of whole numbers with gaps."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _line_of(where: str, number: int, row: Mapping[str, Any], names: Mapping[str, str]) -> PromptLine:
    """The settings and media of a row, each checked."""
    from nova_video.pipeline.request import GenerateRequest

    settings: dict[str, Any] = {}
    media: dict[str, Path] = {}
    for key, value in row.items():
        if key not in names:
            error = unknown("field", key, names)
            raise InputError(f"{where}: {error}")
        name = names[key]
        if name in settings or name in media:
            raise InputError(f"{where}: {key} is there twice, under another name: expected one of them")
        if value is None:
            continue
        if name in MEDIA:
            media[name] = _file_of(f"{where}: {key}", value)
            continue
        try:
            if name not in ("prompt", "negative_prompt"):
                check_option(GenerateRequest, name, value)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        settings[name] = value
    _check_prompt(where, settings)
    return PromptLine(number, settings, media)


def _check_prompt(where: str, settings: Mapping[str, Any]) -> None:
    """One sentence or one timeline a line."""
    prompt, negative = settings.get("prompt"), settings.get("negative_prompt", "")
    if prompt is None or prompt == "":
        raise InputError(f"{where} has no prompt: expected one")
    if isinstance(prompt, str):
        if not prompt.strip():
            raise InputError(f"{where}: prompt is {prompt!r}: expected a sentence that is not empty")
    elif not is_timeline(prompt):
        raise InputError(f"{where}: prompt is {quote(prompt)}: expected one sentence, or (seconds, sentence) pairs")
    if not isinstance(negative, str):
        raise InputError(f"{where}: negative_prompt is {quote(negative)}: expected one sentence")


def _file_of(where: str, value: Any) -> Path:
    if not isinstance(value, str) or not value or "\0" in value:
        raise InputError(f"{where} is {quote(value)}: expected the name of a file")
    if not Path(value).is_file():
        raise InputError(f"{where} is {value}: expected a file that is there")
    return Path(value)
