"""How an encoded dataset follows its source: what is new, changed, renamed or gone since it was encoded.

Each item that was encoded has a `SourceEntry` in its group's record, with digests of its caption and its media.
Captions are always read and compared. Media are hashed, unless the file system shows that nothing was written to the
file since: the same size, times of content and of status, and inode. Files elsewhere are known by what their server
says of them.

    records --compare(source, records)--> Comparison --items_to_encode(source, comparison, taken)--> items to encode
"""

import hashlib
import os
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import count, islice
from typing import Any, TypeVar

from nova_video.common.errors import InputError, first_line
from nova_video.data.dataset import READERS, file_mark, local_path
from nova_video.data.sources import MediaSource, group_name
from nova_video.data.stages import Item, read_caption

UNKNOWN = "?"
"""In the place of a digest: older versions kept none."""
PROBLEM = "!"
"""Begins the digest of a reason, where an item has no caption."""
SETTLE_TIME = 2 * 10**9
"""Nanoseconds between the last change of a file and its record: clocks of file systems are coarse."""
CHUNK = 1 << 20

A = TypeVar("A")
B = TypeVar("B")
Key = tuple[str, int]
"""An item's name, and how many of that name come before it."""


@dataclass(frozen=True)
class SourceEntry:
    """An item of the source as the dataset knows it."""

    source: str
    caption: str
    """Digest of the caption, or of the reason why there is none."""
    media: str
    """Digest of the bytes; empty where they are elsewhere, or there are none."""
    mark: str
    """The file system's facts about the file: size, inode and times."""

    @property
    def has_problem(self) -> bool:
        return self.caption.startswith(PROBLEM)

    @property
    def is_inside(self) -> bool:
        """True if the bytes are in the file of the item's part."""
        return "@" in self.mark or (not self.mark and (bool(self.media) or self.has_problem))


@dataclass
class GroupRecord:
    """The contents of `progress/GROUP.json`, for a finished group."""

    items: int
    final: bool
    """True if the part of the source was read to its end with this group."""
    shards: dict[str, int] = field(default_factory=dict)
    """Bucket -> rows."""
    rejected: list[dict[str, str]] = field(default_factory=list)
    """{"source", "reason"}, as lines of rejected.jsonl."""
    part: str = ""
    """Name of the part of the source that its items are of."""
    part_mark: str = ""
    """The file system's facts about the part's file."""
    entries: list[SourceEntry] = field(default_factory=list)
    """Entries of its items; older versions have none."""
    replaces: str = ""
    """A group that this one stands for, and that is to be removed."""
    written: int = field(default=0, compare=False)
    """When the record was written, in nanoseconds; not in the file."""

    def knows(self, mark: str, now: str) -> bool:
        """True if nothing was written to a file since this record, judged by its mark then and now."""
        if not mark or mark != now:
            return False
        times = mark.split(":")[1:3] if mark.startswith("local:") else []
        return all(self.written - int(time) > SETTLE_TIME for time in times)


@dataclass
class Counts:
    """Items of the source beside those of the dataset."""

    new: int = 0
    changed: int = 0
    """Caption, media or both."""
    renamed: int = 0
    removed: int = 0
    unchanged: int = 0

    @property
    def described(self) -> str:
        """All counts above zero, in words."""
        return ", ".join(f"{number} {name}" for name, number in vars(self).items() if number)


@dataclass
class Comparison:
    """The work that brings a dataset up to date with its source."""

    kept: dict[str, list[SourceEntry | None]]
    """By group, its entries as they are now; None if the item is gone or is encoded again."""
    captions: dict[tuple[str, int], str] = field(default_factory=dict)
    """New captions, by group and number in it."""
    skipped: set[int] = field(default_factory=set)
    """Parts of which nothing was read: their files are as they were."""
    ended: set[int] = field(default_factory=set)
    """Parts that a group is the final one of."""
    wanted: dict[int, set[Key]] = field(default_factory=dict)
    """By part that was read, the items to encode; of other parts all are."""
    part_of: dict[str, str] = field(default_factory=dict)
    """By group, the one part that its items belong to; groups with items of several have none."""
    counts: Counts = field(default_factory=Counts)
    """New items of parts that were not read are not among them."""
    anew: int = 0
    """Number of changed items that are encoded again."""

    def is_affected(self, group: str, record: GroupRecord) -> bool:
        """True if the shards of a group have to be written again."""
        return any(
            now is None or now.source != was.source or (group, number) in self.captions
            for number, (was, now) in enumerate(zip(record.entries, self.kept[group], strict=True))
        )


def compare(source: MediaSource, records: Mapping[str, GroupRecord]) -> Comparison:
    """Which items of the source the groups of a dataset still hold."""
    return _Comparer(source, records).compare()


@dataclass(frozen=True)
class _SourceItem:
    """An item of the source, and what was found out of it."""

    part: int
    key: Key
    item: Item
    """Without its bytes."""
    mark: str
    media: str | None = None
    """None: not read yet."""
    caption: str | None = None
    digest: str = ""
    """Hash of the caption."""


class _Comparer:
    def __init__(self, source: MediaSource, records: Mapping[str, GroupRecord]) -> None:
        self.source, self.records, self.marks = source, records, Marks()
        self.result = Comparison({group: [None] * len(record.entries) for group, record in records.items()})
        self.places: dict[Key, tuple[str, int]] = {}
        counted: Counter[str] = Counter()
        for group, record in records.items():
            for number, entry in enumerate(record.entries):
                self.places[entry.source, counted[entry.source]] = group, number
                counted[entry.source] += 1
        self.left = dict(self.places)  # entries that nothing was found for yet
        self.others: list[_SourceItem] = []  # items that no entry was found for
        self.records_of = {record.part for record in records.values()}
        self.parts_of: defaultdict[str, set[str]] = defaultdict(set)
        self.seen: Counter[str] = Counter()  # items by name

    def compare(self) -> Comparison:
        names = [self.source.part_name(part) for part in range(self.source.parts)]
        known, unread = self.records_of, list[int]()
        for part, name in enumerate(names):
            if known <= set(names) and self._is_untouched(part):
                self._skip(part)
            elif name in known:
                self._scan(part)
            else:
                unread.append(part)
        if self.left:  # what is missing may have been renamed
            for part in unread:
                self._scan(part)
        self._find_renamed()
        counts, others = self.result.counts, {seen.key for seen in self.others}
        for seen in self.others:
            self.result.wanted[seen.part].add(seen.key)
        self.result.anew = len(others & self.left.keys())
        counts.changed += self.result.anew
        counts.new += len(others - self.left.keys())
        counts.removed += len(self.left.keys() - others)
        ended = {record.part for group, record in self.records.items() if record.final and any(self.result.kept[group])}
        self.result.ended = {part for part, name in enumerate(names) if name in ended}
        self.result.part_of = {group: parts.pop() for group, parts in self.parts_of.items() if len(parts) == 1}
        return self.result

    def _is_untouched(self, part: int) -> bool:
        """True if the file of a part is unchanged since all of its items were encoded."""
        name, mark = self.source.part_name(part), self.source.part_mark(part)
        of_part = [record for record in self.records.values() if record.part == name]
        return (
            any(record.final for record in of_part)
            and all(record.knows(record.part_mark, mark) for record in of_part)
            and all(entry.is_inside for record in of_part for entry in record.entries)
        )

    def _skip(self, part: int) -> None:
        self.result.skipped.add(part)
        name = self.source.part_name(part)
        for key, (group, number) in self.places.items():
            if self.records[group].part == name:
                self.result.kept[group][number] = self.records[group].entries[number]
                self.parts_of[group].add(name)
                del self.left[key]
                self.result.counts.unchanged += 1

    def _scan(self, part: int) -> None:
        self.result.wanted[part] = set()
        name = self.source.part_name(part)
        for seen in parallel(self._look, self._keyed(part)):
            if seen.key not in self.places:
                if seen.item.problem is not None and seen.item.source == name and self.records_of & {name, ""}:
                    raise InputError(
                        f"{name}: {seen.item.problem}: expected all of it, as when it was encoded, or another folder"
                        " for the dataset"
                    )
                self.others.append(seen)
                continue
            group, number = self.places[seen.key]
            old = self.records[group].entries[number]
            is_same = seen.media == old.media if seen.media else seen.mark == old.mark
            is_same |= old.media == UNKNOWN
            said = old.caption in (UNKNOWN, seen.digest)
            if is_same and (said or not (old.has_problem or seen.digest.startswith(PROBLEM))):
                self._keep(seen, seen.key, new_caption=not said)
                self.result.counts.unchanged += said
                self.result.counts.changed += not said
            else:
                self.others.append(seen)

    def _keyed(self, part: int) -> Iterator[tuple[int, Key, Item]]:
        for item in self.source.read(part):
            yield part, (item.source, self.seen[item.source]), item
            self.seen[item.source] += 1

    def _look(self, given: tuple[int, Key, Item]) -> _SourceItem:
        part, key, item = given
        bare, mark = replace(item, data=None), self.marks.of(item)
        if key not in self.places:
            return _SourceItem(part, key, bare, mark, None if item.data is None else media_digest(item))
        group, number = self.places[key]
        record, old = self.records[group], self.records[group].entries[number]
        same = record.knows(old.mark, mark) and old.media != UNKNOWN
        caption, digest = look_at_caption(item)
        return _SourceItem(part, key, bare, mark, old.media if same else media_digest(item), caption, digest)

    def _find_renamed(self) -> None:
        """Pairs of an entry and an item whose media are the same under another name."""
        by_media: defaultdict[str, list[Key]] = defaultdict(list)
        for key, (group, number) in self.left.items():
            entry = self.records[group].entries[number]
            if entry.media not in ("", UNKNOWN) and not entry.has_problem:
                by_media[entry.media].append(key)
        if not by_media:
            return
        others = []
        for seen in parallel(_look_again, self.others):
            keys = by_media.get(seen.media or "")
            if not keys or seen.digest.startswith(PROBLEM):
                others.append(seen)
                continue
            key = keys.pop(0)
            group, number = self.places[key]
            self._keep(seen, key, new_caption=seen.digest != self.records[group].entries[number].caption)
            self.result.counts.renamed += 1
        self.others = others

    def _keep(self, seen: _SourceItem, key: Key, new_caption: bool) -> None:
        """An item is that of the entry `key`."""
        group, number = self.left.pop(key)
        old = self.records[group].entries[number]
        self.parts_of[group].add(self.source.part_name(seen.part))
        self.result.kept[group][number] = SourceEntry(seen.item.source, seen.digest, seen.media or old.media, seen.mark)
        if new_caption:
            self.result.captions[group, number] = seen.caption or ""


def _look_again(seen: _SourceItem) -> _SourceItem:
    """With all that was left out for an item that no entry has the name of."""
    if seen.digest:
        return seen
    caption, digest = look_at_caption(seen.item)
    media = media_digest(seen.item) if seen.media is None else seen.media
    return replace(seen, media=media, caption=caption, digest=digest)


def items_to_encode(source: MediaSource, comparison: Comparison, taken: set[str]) -> Iterator[Item]:
    """The items to encode, in groups whose names are free: `taken` are those that are not."""
    seen: Counter[str] = Counter()
    for part in range(source.parts):
        wanted = comparison.wanted.get(part)
        if part not in comparison.skipped and wanted != set():
            items = _of(source.read(part), wanted, seen)
            yield from _group_items(items, part, source.settings.group, taken, part not in comparison.ended)


def _of(items: Iterator[Item], wanted: set[Key] | None, seen: Counter[str]) -> Iterator[Item]:
    for item in items:
        if wanted is None or (item.source, seen[item.source]) in wanted:
            yield item
        seen[item.source] += 1


def _group_items(items: Iterator[Item], part: int, size: int, taken: set[str], ends: bool) -> Iterator[Item]:
    """Gives items their groups, and marks the last one of each group, and of the part if that `ends`."""
    following = next(items, None)
    while following is not None:
        name = free_name(part, taken)
        taken.add(name)
        for index in range(size):
            item = following
            following = next(items, None)
            is_last = following is None or index == size - 1
            yield replace(item, group=name, index=index, last=is_last, final=ends and following is None)
            if following is None:
                return


def free_name(part: int, taken: set[str]) -> str:
    """The first name of a group that no group has."""
    return next(name for name in (group_name(part, number) for number in count()) if name not in taken)


# What an item is known by ---------------------------------------------------------------------------------------------


class Marks:
    """Marks of files, each looked up once."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}

    def of(self, item: Item) -> str:
        """The mark of an item's file, with its place in a tar; empty where the bytes came with the item."""
        if not item.url or item.data is not None:
            return ""
        if item.size is None:
            return file_mark(item.url)
        if item.url not in self.found:
            self.found[item.url] = file_mark(item.url)
        mark = self.found[item.url]
        return f"{mark}@{item.offset}+{item.size}" if mark else ""

    def entry(self, item: Item) -> tuple[Item, SourceEntry]:
        """An item that is to be encoded, with the caption that its entry is of."""
        mark = self.of(item)
        try:
            caption, digest = look_at_caption(item)
        except InputError as error:  # decoding tries again, and rejects it
            return item, SourceEntry(item.source, PROBLEM + _digest(str(error)), media_digest(item), mark)
        if caption is not None:
            item = replace(item, caption=caption, caption_url="")
        return item, SourceEntry(item.source, digest, media_digest(item), mark)


def look_at_caption(item: Item) -> tuple[str | None, str]:
    """The caption of an item and its digest; the reason's digest where there is none."""
    if item.problem is not None:
        return None, PROBLEM + _digest(item.problem)
    try:
        caption = read_caption(item)
    except (ValueError, FileNotFoundError, PermissionError, IsADirectoryError) as error:
        return None, PROBLEM + _digest(str(error))
    except Exception as error:  # of where it is
        raise InputError(f"{item.caption_url}: cannot be read: {first_line(error)}") from None
    return caption, caption_digest(caption)


def caption_digest(caption: str) -> str:
    return _digest(caption)


def media_digest(item: Item) -> str:
    """Hash of an item's bytes if they are local; else empty."""
    if item.data is not None:
        return hashlib.sha256(item.data).hexdigest()[:32]
    path = local_path(item.url) if item.url else None
    if path is None:
        return ""
    found = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            file.seek(item.offset)
            left = os.path.getsize(path) if item.size is None else item.size
            while left > 0 and (chunk := file.read(min(CHUNK, left))):
                found.update(chunk)
                left -= len(chunk)
    except OSError:
        return ""
    return found.hexdigest()[:32]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def parallel(function: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
    """`map` in some threads, in order, a few items ahead."""
    waiting: deque[Future[Any]] = deque()
    iterator = iter(items)
    with ThreadPoolExecutor(READERS) as pool:
        waiting.extend(pool.submit(function, item) for item in islice(iterator, READERS))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(function, item) for item in islice(iterator, 1))
