"""Tar files in the layout of WebDataset: members of one name but for the extension are a sample."""

import os
import posixpath
import tarfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from nova_video.common.errors import InputError, first_line
from nova_video.data.dataset import file_mark, open_place
from nova_video.data.sidecars import MOST_TEXT, Stem, caption_from, shorten, stem, suffix
from nova_video.data.sources.source import (
    MOST_LOOKS,
    TEXTS,
    MediaSource,
    SourceSettings,
    name_problem,
    one_line,
    shared_name,
    short_names,
)
from nova_video.data.stages import MEDIA, NO_RANGES, Item
from nova_video.io.decode import VIDEOS
from nova_video.io.text import LFS_POINTER, POINTER_ERROR, printable

HEADERS = 1 << 16  # bytes that are read at once where a tar is elsewhere: its members are asked for by themselves
DAMAGED_TAR = "the tar cannot be read on"


@dataclass(frozen=True)
class Member:
    """Media or a caption in a tar; without a name, what is wrong with the tar."""

    name: str
    offset: int = 0
    size: int = 0
    text: bytes = b""
    """The content of a caption."""
    problem: str | None = None


class TarSource(MediaSource):
    """WebDataset: members of a tar that have one name but for the extension are a sample. Only headers and captions are
    read here; what decodes a sample asks for its bytes alone.

    The extension is what follows the last dot, so that "take 1.0.mp4" and "take 1.5.mp4" are two samples. A sample is
    given when the next one begins, or as soon as both media and caption have come where others are between them.
    """

    def __init__(self, settings: SourceSettings, urls: list[str]) -> None:
        super().__init__(settings)
        settings.check_no(media_column="columns", split="splits")
        self.urls = self.files = urls
        self.parts = len(urls)
        self._names = short_names(urls)
        self._check()

    @property
    def content(self) -> list[str]:
        return self._names

    def part_name(self, part: int) -> str:
        return self._names[part]

    def part_mark(self, part: int) -> str:
        return file_mark(self.urls[part])

    def read(self, part: int, start: int = 0) -> Iterator[Item]:
        return islice(self._read(part), start, None)

    def find(self, source: str) -> Item:
        for part, name in enumerate(self._names):
            if source.startswith(f"{name}/"):
                for item in self._read(part):
                    if item.source == source:
                        return item
        raise InputError(f"{self.settings.place}: has no {source}")

    def _read(self, part: int) -> Iterator[Item]:
        tar = self._names[part]
        waiting: dict[str, dict[str, Member]] = {}  # by stem and name: samples that lack media or caption
        given: dict[str, set[str]] = {}  # by stem: names of samples that are given
        before = None
        damage: list[Item] = []
        for member in self._members(part):
            if not member.name:
                damage.append(Item(tar, problem=member.problem))
                continue
            if member.problem is not None and suffix(member.name) in TEXTS:
                yield Item(f"{tar}/{printable(member.name)}", problem=member.problem)
                continue
            now = stem(member.name)
            if before is not None and before != now and _is_whole(waiting.get(before, {})):
                given[before] = set(waiting[before])
                yield from self._sample_items(part, waiting.pop(before))
            before = now
            if member.name in given.get(now, ()) or member.name in waiting.get(now, ()):
                yield Item(f"{tar}/{printable(member.name)}", problem="the tar has it twice")
            elif now in given:
                problem = "comes after the sample of its name: expected all files of a sample one behind the other"
                yield Item(f"{tar}/{printable(member.name)}", problem=problem)
            else:
                waiting.setdefault(now, {})[member.name] = member
        for members in waiting.values():
            yield from self._sample_items(part, members)
        yield from damage

    def _members(self, part: int) -> Iterator[Member]:
        """Media and captions in their order, then what is wrong with the tar."""
        try:
            system, path = open_place(self.urls[part])
            with system.open(path, "rb", block_size=HEADERS) as file:
                if file.read(len(LFS_POINTER)) == LFS_POINTER:
                    yield Member("", problem=f"the tar {POINTER_ERROR}")
                    return
                total = file.seek(0, os.SEEK_END)
                file.seek(0)
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    count = 0
                    while (header := tar.next()) is not None:
                        tar.members.clear()  # type: ignore[attr-defined]  # else a long tar fills the memory
                        count += 1
                        if (member := _member(tar, header, total)) is not None:
                            yield member
                    if problem := _find_end_problem(file, tar.offset, count):
                        yield Member("", problem=f"{DAMAGED_TAR}: {problem}")
        except (tarfile.TarError, EOFError) as error:
            yield Member("", problem=f"{DAMAGED_TAR}: {first_line(error)}")
        except Exception as error:  # of where it is
            whole = "range requests" in str(error)
            yield Member("", problem=f"the tar cannot be fetched: {NO_RANGES if whole else one_line(error)}")

    def _sample_items(self, part: int, members: Mapping[str, Member]) -> Iterator[Item]:
        """The item of a sample, and those of media that share its name."""
        tar = self._names[part]
        found = Stem(
            [name for name in members if suffix(name) in MEDIA], [name for name in members if suffix(name) in TEXTS]
        )
        if not found.media:
            name = posixpath.splitext(found.texts[0])[0]
            yield Item(f"{tar}/{name}", problem="a caption without media: the tar has no picture or video of its name")
            return
        owner = found.owner(VIDEOS)
        member = members[owner]
        item = Item(f"{tar}/{owner}", url=self.urls[part], offset=member.offset, size=member.size)
        try:
            if member.problem is not None:
                raise ValueError(member.problem)
            text = found.caption(self.settings.order)
            if text is None:
                raise ValueError("no caption: the tar has no .txt or .json of its name")
            yield replace(item, caption=_caption_of(members[text], self.settings.caption))
        except ValueError as error:
            yield Item(f"{tar}/{printable(owner)}", problem=str(error))
        for name in found.media:
            if name != owner:
                yield Item(f"{tar}/{printable(name)}", problem=members[name].problem or shared_name(owner))

    def _check(self) -> None:
        """Raises if the beginning of the first tar that can be read shows that all is wrong."""
        place = self.settings.place
        for part in range(min(self.parts, MOST_LOOKS)):
            if found := list(islice(self._read(part), MOST_LOOKS)):
                break
        else:
            raise InputError(f"{place}: is empty: its {self.parts} tar files have no members")
        problems = [item.problem for item in found]
        if all(problem is not None and problem.startswith("the tar ") for problem in problems):
            hint = ": expected a tar file, not compressed" if str(problems[0]).startswith(DAMAGED_TAR) else ""
            raise InputError(f"{self._names[part]}: {problems[0]}{hint}")
        if all(problem is not None and problem.startswith("a caption") for problem in problems):
            raise InputError(f"{self._names[part]}: has captions and no media: expected 000.mp4 or .jpg with 000.txt")
        if all(problem is not None and problem.startswith("no caption") for problem in problems):
            hint = "" if "expected the key" not in str(problems[0]) else ", or another --caption-column"
            raise InputError(f"{found[0].source}: {problems[0]}: expected a caption with each media file{hint}")


def _member(tar: tarfile.TarFile, header: tarfile.TarInfo, total: int) -> Member | None:
    """The member of a header; None for folders, hidden files, and other kinds of files."""
    name = posixpath.normpath(header.name) if header.name else ""
    is_text = suffix(name) in TEXTS
    if header.size < 0:
        raise tarfile.ReadError(f"{shorten(name)} has a size of {header.size}")
    if any((part.startswith(".") and part != "..") or part == "__MACOSX" for part in name.split("/")):
        return None
    if not (is_text or suffix(name) in MEDIA) or header.isdir():
        return None
    if header.issym() or header.islnk():
        return Member(name, problem=f"is a link in the tar, to {shorten(header.linkname)}: expected a file")
    if not header.isfile() or header.issparse():
        return Member(name, problem="is no plain file in the tar: expected one")
    if problem := name_problem(name):
        return Member(name, problem=problem)
    if header.offset_data + header.size > total:
        return Member(name, problem="the tar breaks off in it: expected the whole file")
    content = tar.extractfile(header) if is_text else None
    text = b"" if content is None else content.read(MOST_TEXT + 1)
    return Member(name, header.offset_data, header.size, text)


def _find_end_problem(file: Any, offset: int, members: int) -> str | None:
    """The problem behind a tar's last member, where tarfile stops without a word."""
    file.seek(offset)
    rest = file.read(HEADERS)
    if not rest.strip(b"\0"):
        return None if len(rest) >= tarfile.BLOCKSIZE else f"it breaks off after {members} members"
    if rest[: tarfile.BLOCKSIZE].strip(b"\0"):
        return f"no header is behind the first {members} members"
    return f"more is behind its end, after {members} members: expected one tar, not several in one file"


def _is_whole(members: Collection[str]) -> bool:
    """True if media and a caption are among the members of a sample."""
    kinds = {suffix(name) for name in members}
    return not kinds.isdisjoint(MEDIA) and not kinds.isdisjoint(TEXTS)


def _caption_of(member: Member, key: str) -> str:
    try:
        return caption_from(member.text, member.name, key)
    except ValueError as error:
        raise ValueError(f"no caption: {error}") from None
