"""Opens the source at a place: a folder, files, a dataset of the hub, or a user's own `module:Class`."""

import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from nova_video.common.errors import InputError
from nova_video.common.extensions import make_extension, names_extension
from nova_video.data.dataset import is_local, join, open_place
from nova_video.data.sidecars import suffix
from nova_video.data.sources.folder_source import WEB, FolderSource
from nova_video.data.sources.iterable_source import IterableSource
from nova_video.data.sources.source import (
    TEXTS,
    WHAT_THERE_IS,
    MediaSource,
    SourceSettings,
    name_problem,
    one_line,
    some_names,
)
from nova_video.data.sources.table_source import TableSource, load_hub, load_parquet, load_saved
from nova_video.data.sources.tar_source import TarSource
from nova_video.data.stages import MEDIA
from nova_video.io.folders import A_FOLDER, walk

HUB = re.compile(r"hf://(?:datasets/)?([\w-][\w.-]*(?:/[\w-][\w.-]*)?)/?")
ARCHIVES = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".rar")


def open_source(settings: SourceSettings) -> MediaSource:
    """The source at a place, checked as far as can be seen from its beginning."""
    place = settings.place
    if place.startswith("hf://") and (match := HUB.fullmatch(place)) is not None:
        return TableSource(settings, load_hub(match[1], settings), f"hf://datasets/{match[1]}")
    settings.check_no(config="configurations (hf://OWNER/NAME has)")
    if names_extension(place) and not Path(place).exists():
        return IterableSource(settings, make_extension(place, "source"))
    system, root = open_place(place)
    try:
        if system.isdir(root):
            return _open_folder(settings, system, root)
        if system.isfile(root):
            urls = [_url(system, root)]
        else:
            found = {pattern: _matches(system, pattern) for pattern in expand_braces(root)}
            urls = [_url(system, path) for paths in found.values() for path in paths]
            if urls and (missing := [pattern for pattern, paths in found.items() if not paths]):
                names = [pattern.rpartition("/")[2] for pattern in missing]
                raise InputError(f"{place}: there is no {some_names(names)}: expected all that it names")
    except InputError:
        raise
    except Exception as error:  # file systems elsewhere have errors of their own
        raise InputError(f"{place}: cannot be read: {one_line(error)}") from None
    if not urls:
        raise InputError(f"{place}: there is nothing there: expected {WHAT_THERE_IS}")
    return _open_files(settings, urls)


def expand_braces(pattern: str) -> list[str]:
    """part-{000..002}.tar -> part-000.tar, part-001.tar, part-002.tar; {a,b} is either."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    low, high, words = match.groups()
    if words is None:
        choices = [f"{number:0{len(low)}d}" for number in range(int(low), int(high) + 1)]
    else:
        choices = words.split(",")
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [before + choice + rest for choice in choices for rest in expand_braces(after)]


def _matches(system: Any, pattern: str) -> list[str]:
    """Existing files of a pattern; what has no * is taken as it is if there is such a file."""
    if any(sign in pattern for sign in "*?["):
        return sorted(path for path in system.glob(pattern) if system.isfile(path))
    return [pattern] if system.isfile(pattern) else []


def _open_folder(settings: SourceSettings, system: Any, root: str) -> MediaSource:
    place = settings.place
    found = _files_below(system, root)
    odd = {name: problem for name, problem in found.items() if problem is not None}
    names = [name for name in found if name not in odd]
    if "dataset.json" in names and any(name.startswith("data/") for name in names):
        raise InputError(f"{place}: is a dataset that `nova encode` wrote: expected {WHAT_THERE_IS}")
    if "dataset_dict.json" in names or {"state.json", "dataset_info.json"} <= set(names):
        return TableSource(settings, load_saved(settings), place)
    kinds = {kind: [name for name in names if suffix(name) == kind] for kind in (".tar", ".parquet")}
    packed = {kind: files for kind, files in kinds.items() if files}
    has_media = any(suffix(name) in MEDIA for name in names)
    there = ["media"] * has_media + [f"{kind} files" for kind in packed]
    if len(there) > 1:
        raise InputError(f"{place}: holds {' and '.join(there)}: name one kind, such as {join(place, '*.tar')}")
    for files in packed.values():
        return _open_files(settings, [_url(system, f"{root.rstrip('/')}/{name}") for name in files])
    root = _url(system, root)
    if root.startswith(WEB):  # it lists names as they stand in URLs
        names = [unquote(name) for name in names]
    return FolderSource(settings, root, names, odd)


def _files_below(system: Any, root: str) -> dict[str, str | None]:
    """Paths below a folder, in order, each with the reason why it cannot be read, if there is one.

    Left out are hidden files and folders, and those that macOS adds to archives. Of what is no file, only the names of
    media and captions count.
    """
    if is_local(system):
        found = dict(walk(root))
    else:
        found = dict.fromkeys(path[len(root.rstrip("/")) + 1 :] for path in system.find(root))
    kept = {}
    for name, problem in sorted(found.items()):
        if any(part.startswith(".") or part == "__MACOSX" for part in name.split("/")):
            continue
        is_media = suffix(name) in MEDIA
        if problem == A_FOLDER and not is_media:
            continue
        kept[name] = problem or (name_problem(name) if is_media or suffix(name) in TEXTS else None)
    return kept


def _open_files(settings: SourceSettings, urls: list[str]) -> MediaSource:
    kinds = {suffix(url) for url in urls}
    if kinds == {".tar"}:
        return TarSource(settings, urls)
    if kinds == {".parquet"}:
        base = settings.place if suffix(settings.place) != ".parquet" else settings.place.rpartition("/")[0]
        settings.check_no(split="splits")
        return TableSource(settings, load_parquet(urls), base, urls)
    found = next(url for url in urls if suffix(url) not in (".tar", ".parquet") or len(kinds) > 1)
    if suffix(found) in ARCHIVES:
        raise InputError(f"{found}: is compressed: expected a folder of what is in it, or a .tar file")
    raise InputError(f"{settings.place}: got the file {found}: expected {WHAT_THERE_IS}")


def _url(system: Any, path: str) -> str:
    """The URL that opens a path again; a local path stays as it is."""
    return path if is_local(system) else system.unstrip_protocol(path)
