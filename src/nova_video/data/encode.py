"""`nova encode`: a source of media and captions to a dataset on disk, stage by stage, here or on Ray.

Items go through in groups. When all items of a group are done, its samples are written as shards named after it, and
then `progress/GROUP.json`. A group without that is done again from its beginning, whatever is there of it: a run may be
stopped at any moment and started again, and ends with the dataset of a run that was not. `rejected.jsonl` is made of
the records in `progress/`.

Where the source has changed since, the dataset follows it (`follow.py`): groups with items that are gone, renamed or
told otherwise are written anew under another name, and then what is new is encoded.
"""

import hashlib
import json
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from nova_video.common.errors import InputError
from nova_video.data.dataset import (
    READERS,
    Bucket,
    DatasetInfo,
    EncodedSample,
    list_shard_urls,
    local_path,
    read_columns,
    read_footer,
    read_shard,
    shard_url,
    write_file,
    write_shard,
)
from nova_video.data.dataset_card import write_card
from nova_video.data.encode_here import Stages, encode_items_here
from nova_video.data.encode_settings import EncodeSettings
from nova_video.data.encoders import EncodeText, autoencoder_info
from nova_video.data.follow import (
    UNKNOWN,
    Comparison,
    Counts,
    GroupRecord,
    Marks,
    SourceEntry,
    caption_digest,
    compare,
    free_name,
    items_to_encode,
    parallel,
)
from nova_video.data.sources import MediaSource, SourceSettings, open_source
from nova_video.data.stages import (
    DecodeSettings,
    Item,
    ItemResult,
    Rejected,
)
from nova_video.io.checkpoints import lasting_name, resolve_checkpoint, text_folder
from nova_video.io.files import check_writable, lock_folder
from nova_video.io.text import printable
from nova_video.io.weights import read_json
from nova_video.model.config import size_multiple
from nova_video.model.denoiser import Denoiser
from nova_video.pipeline.loading import outline_transformer
from nova_video.pipeline.settings import CheckpointSettings
from nova_video.text.compare import same_text_encoder, text_fingerprint
from nova_video.text.find import find_text
from nova_video.text.load import text_width

SHARD_BYTES = 256 << 20  # a group's samples of a bucket are split into shards of about so many
PROGRESS = "progress"
OLD_SOURCE = "source.json"  # in it: what older versions noted of the source

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncodeProgress:
    """How far a run is."""

    items: int = 0
    clips: int = 0
    """Pictures included."""
    rejected: int = 0
    total: int | None = None
    """Items in all, where that is known."""


@dataclass(frozen=True)
class Summary:
    """The contents of a dataset when it is done."""

    items: int
    clips: dict[Bucket, int]
    rejected: int
    encoded: int
    """Items that this run went through; the others were there before."""
    seconds: float
    """Time that this run took."""
    counts: Counts = field(default_factory=Counts)
    """Items of the source beside those that the dataset held before."""


def encode_dataset(settings: EncodeSettings, tell: Callable[[EncodeProgress], None] = lambda done: None) -> Summary:
    """Encode what is not there yet, then write rejected.jsonl and the card; `tell` is called after every item."""
    import pyarrow  # noqa: F401 - an absent package is found before the work

    began = time.monotonic()
    info = describe_dataset(settings)
    source = open_source(settings.source)
    check_output(settings.output, info)
    stages = None if settings.ray is not None else Stages.load(settings)  # a wrong name ends here
    with lock_folder(settings.output):
        check_output(settings.output, info)  # another run may have been there
        return _encode(settings, info, source, stages, tell, began)


def _encode(
    settings: EncodeSettings,
    info: DatasetInfo,
    source: MediaSource,
    stages: "Stages | None",
    tell: Callable[[EncodeProgress], None],
    began: float,
) -> Summary:
    prepare_output(settings.output, info)
    records = whole_records(settings.output)
    comparison = compare(source, with_entries(settings.output, records, source))
    text = None if settings.text is None else EncodeText(settings.text, settings.device)
    revise_groups(settings.output, records, comparison, text if stages is None else stages.text, info.fingerprint)
    records = read_records(settings.output)
    before = sum(record.items for record in records.values())
    done = EncodeProgress(
        before, sum(sum(r.shards.values()) for r in records.values()), _rejections(records), source.total
    )
    tell(done)
    marks, entries = Marks(), defaultdict[str, list[SourceEntry]](list)

    def noted(items: Iterable[Item]) -> Iterator[Item]:
        for item, entry in parallel(marks.entry, items):
            entries[item.group].append(entry)
            yield item

    items = noted(items_to_encode(source, comparison, set(records)))
    if stages is not None:
        results = encode_items_here(items, stages)
    else:
        from nova_video.data.encode_ray import encode_items_ray

        results = encode_items_ray(items, settings)
    pending: defaultdict[str, dict[int, ItemResult]] = defaultdict(dict)
    sizes: dict[str, int] = {}
    for result in results:
        group = pending[result.group]
        group[result.index] = result
        if result.last:
            sizes[result.group] = result.index + 1
        if len(group) == sizes.get(result.group):
            found, part = pending.pop(result.group), int(result.group.split("-")[0])
            of_part = (source.part_name(part), source.part_mark(part))
            finish_group(
                settings.output, result.group, found.values(), info.fingerprint, entries.pop(result.group), *of_part
            )
        done = replace(
            done,
            items=done.items + 1,
            clips=done.clips + len(result.samples),
            rejected=done.rejected + len(result.rejected),
        )
        tell(done)
    renew_records(settings.output, comparison, source)
    encoded = done.items - before
    comparison.counts.new = encoded - comparison.anew
    return _finish(settings, encoded, time.monotonic() - began, comparison.counts)


def _finish(settings: EncodeSettings, encoded: int, seconds: float, counts: Counts) -> Summary:
    """Write rejected.jsonl and the card of all groups together."""
    records = read_records(settings.output)
    lines = [line for record in records.values() for line in record.rejected]
    text = "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines)
    write_file(settings.output / "rejected.jsonl", text.encode())
    clips: Counter[Bucket] = Counter()
    for record in records.values():
        for name, rows in record.shards.items():
            clips[Bucket.parse(name)] += rows
    if not clips:
        raise InputError(
            f"{settings.source.place}: nothing could be encoded, all {len(lines)} were rejected:"
            f" {lines[0]['source']} {lines[0]['reason']} (see {settings.output / 'rejected.jsonl'})"
        )
    write_card(settings.output, settings.device, settings.model)
    items = sum(record.items for record in records.values())
    return Summary(items, dict(sorted(clips.items())), len(lines), encoded, seconds, counts)


# Settings and what is noted of them ----------------------------------------------------------------------------------


def describe_dataset(settings: EncodeSettings) -> DatasetInfo:
    """Facts about the dataset as a whole, with the settings that decide what is in it."""
    found = autoencoder_info(settings.model)
    if found.temporal_stride == 1 and any(length > 1 for length in settings.decode.frames):
        lengths = ", ".join(map(str, settings.decode.frames))
        raise InputError(f"frames is {lengths}, and the autoencoder of {settings.model} takes pictures: expected 1")
    stride = found.temporal_stride
    wrong = next((length for length in settings.decode.frames if stride > 1 and (length - 1) % stride), None)
    if wrong is not None:
        raise InputError(
            f"frames is {wrong}: expected {stride}k + 1, as the autoencoder of {settings.model} takes them"
        )
    source, decode = settings.source, settings.decode
    return DatasetInfo(
        autoencoder=lasting_name(settings.model),
        fingerprint=found.fingerprint,
        latent_channels=found.latent_channels,
        spatial_stride=found.spatial_stride,
        temporal_stride=found.temporal_stride,
        text_encoder=None if settings.text is None else _text_noted(settings.text),
        text_dim=None if settings.text is None else text_width(settings.text),
        text_fingerprint=None if settings.text is None else text_fingerprint(settings.text),
        settings={
            "source": source.lasting_place,
            "caption_column": source.caption_column,
            "media_column": source.media_column,
            "config": source.config,
            "split": source.split,
            "group": source.group,
            "frames": sorted(set(decode.frames)),
            "fps": float(decode.fps),
            "size": f"{decode.size[1]}x{decode.size[0]}",
            "one_size": decode.one_size,
            "cuts": decode.cuts,
            "threshold": float(decode.threshold),
        },
    )


def decode_settings(info: DatasetInfo) -> DecodeSettings:
    """How the clips of a dataset were decoded."""
    noted = info.settings
    width, height = map(int, noted["size"].split("x"))
    return DecodeSettings(
        frames=tuple(noted["frames"]),
        fps=noted["fps"],
        size=(height, width),
        one_size=noted["one_size"],
        cuts=noted["cuts"],
        threshold=noted["threshold"],
        multiple=size_multiple(info.spatial_stride),
    )


def source_settings(noted: dict[str, Any]) -> SourceSettings:
    """The source that a dataset was encoded from, by the settings in dataset.json."""
    return SourceSettings(
        place=noted["source"],
        caption_column=noted["caption_column"],
        media_column=noted["media_column"],
        split=noted["split"],
        group=noted["group"],
        config=noted.get("config"),  # older datasets have none
    )


def model_size(model: str) -> tuple[tuple[int, int], bool] | None:
    """(H, W) in pixels that a checkpoint's transformer is made for, and whether its positions allow no other. None: it
    has no transformer."""
    folder = resolve_checkpoint(model) / "transformer"
    if not folder.is_dir():
        return None
    config = outline_transformer(folder, Denoiser).config  # no head is read
    height, width = config.image_size
    return (height, width), not config.rotary_pos_embed


def makes_video(model: str) -> bool:
    """True if the checkpoint's transformer makes clips."""
    folder = resolve_checkpoint(model) / "transformer"
    return folder.is_dir() and outline_transformer(folder, Denoiser).has_motion


def model_text(model: str) -> str | None:
    """The checkpoint itself if it has or names a text encoder."""
    folder = resolve_checkpoint(model)
    named = text_folder(folder, "text_encoder") is not None or CheckpointSettings.load(folder).text_encoder is not None
    return model if named else None


def _text_noted(text: str) -> str:
    """The name of the text encoder for dataset.json: of a folder the checkpoint, which has the tokenizer too."""
    name = find_text(text).encoder
    return lasting_name(text) if Path(name).is_dir() else name


# The folder ----------------------------------------------------------------------------------------------------------


def check_output(output: Path, info: DatasetInfo) -> None:
    """Raises for a folder that is no place for this dataset, or holds one of other settings."""
    if output.is_file():
        raise InputError(f"{output} is a file: expected a folder to write")
    place = Path(info.settings["source"])
    if place.is_dir() and output.resolve().is_relative_to(place.resolve()):  # a URL is no folder here
        raise InputError(f"{output} is in the source {place}: expected a folder outside of it")
    check_writable(next(path for path in (output, *output.absolute().parents) if path.is_dir()))
    if not output.exists():
        return
    if not (output / "dataset.json").exists():
        if any(not path.name.startswith(".") for path in output.iterdir()):
            raise InputError(f"{output} exists and is no encoded dataset: expected a new or empty folder")
        return
    there = DatasetInfo.load(output)
    was = {name: value for name, value in asdict(there).items() if name != "settings"} | there.settings
    now = {name: value for name, value in asdict(info).items() if name != "settings"} | info.settings
    same = {"autoencoder": there.fingerprint == info.fingerprint}  # whatever they are called
    same["source"] = local_path(str(was.get("source"))) == place  # older datasets have it as it was typed
    if there.text_encoder is not None and info.text_encoder is not None:
        is_same = same_text_encoder(info.text_encoder, there.text_encoder, there.text_fingerprint) is True
        same |= {"text_encoder": is_same, "text_fingerprint": is_same}
    for name, value in now.items():
        if was.get(name) != value and not same.get(name):
            raise InputError(
                f"{output} was encoded with {name} {_show_value(was.get(name))}, got {_show_value(value)}: expected the"
                " same, or another folder"
            )


def prepare_output(output: Path, info: DatasetInfo) -> None:
    """Note what the dataset is, and remove what runs that were killed have left: the caller holds the folder's lock."""
    info.save(output)  # first of all: what is there of a run that was stopped is known by it
    is_new = not (output / PROGRESS).exists()
    (output / PROGRESS).mkdir(exist_ok=True)
    for place in (".*.part", f"{PROGRESS}/.*.part", "data/*/.*.part"):
        for left in output.glob(place):
            left.unlink(missing_ok=True)
    if is_new:
        return
    for group, record in read_records(output).items():
        if record.replaces:
            _finish_replacing(output, group, record)
    groups = read_records(output).keys()
    for urls in list_shard_urls(output).values():
        for url in urls:
            if group_of(url) not in groups:
                Path(url).unlink(missing_ok=True)


def read_records(output: Path) -> dict[str, GroupRecord]:
    """The records of all finished groups, in their order."""
    paths = sorted(path for path in (output / PROGRESS).glob("*.json") if path.name != OLD_SOURCE)
    return {path.stem: _read_record(path) for path in paths}


def _read_record(path: Path) -> GroupRecord:
    values = read_json(path)
    try:
        record = GroupRecord(**values)
        record.entries = [SourceEntry(**entry) for entry in values.get("entries", ())]
        if len(record.entries) not in (0, record.items) or Path(record.replaces).name != record.replaces:
            raise ValueError("other items")
    except (TypeError, ValueError):
        raise InputError(f"{path} is no record of encoding: expected it removed, then its group is made anew") from None
    record.written = path.stat().st_mtime_ns
    return record


def whole_records(output: Path) -> dict[str, GroupRecord]:
    """The records of groups whose shards are all there; other groups are removed, and done again."""
    shards = [url for urls in list_shard_urls(output).values() for url in urls]
    with ThreadPoolExecutor(READERS) as pool:
        rows = dict(zip(shards, pool.map(_rows, shards), strict=True))
    found: Counter[tuple[str, str]] = Counter()
    for url, number in rows.items():
        found[group_of(url), Path(url).parent.name] += number
    records = read_records(output)
    lost = [
        group for group, record in records.items() if any(found[group, name] != n for name, n in record.shards.items())
    ]
    if lost:
        log.warning("%s: shards of %d groups are lost or damaged, and made anew: %s", output, len(lost), lost[0])
    parts = {records[group].part for group in lost}
    for group, record in records.items():
        if record.part in parts and record.part_mark:  # first of all: its part is to be read again
            record.part_mark = ""
            write_record(output, group, record)
    for group in lost:
        remove_group(output, group)
    return {group: record for group, record in records.items() if group not in lost}


def with_entries(output: Path, records: dict[str, GroupRecord], source: MediaSource) -> dict[str, GroupRecord]:
    """Records that tell of each item; those of older versions, of what can be told from their rows.

    They kept no digests of media: raises InputError where names or sizes of files are not those that they noted.
    """
    older = [group for group, record in records.items() if record.items and not record.entries]
    if not older:
        return records
    noted, now = output / PROGRESS / OLD_SOURCE, _content(source)
    was = read_json(noted) if noted.exists() else now
    if any(value != now.get(name) for name, value in was.items()):
        raise InputError(
            f"{output} was encoded by an older version, and its source has changed since: expected the source as it"
            " was, once, after which the dataset follows it; or another folder for the dataset"
        )
    for group in older:
        record, told = records[group], dict[str, str]()
        for url in _shards_of(output, group):
            columns = read_columns(url, ("source", "caption"))
            told |= zip(columns["source"], map(caption_digest, columns["caption"]), strict=True)
        names = [*told, *(line["source"] for line in record.rejected if line["source"] not in told)]
        record.entries = [SourceEntry(name, told.get(name, UNKNOWN), UNKNOWN, "") for name in dict.fromkeys(names)]
        record.items, record.part = len(record.entries), source.part_name(int(group.split("-")[0]))
        write_record(output, group, record)
    noted.unlink(missing_ok=True)
    return records


def revise_groups(
    output: Path, records: dict[str, GroupRecord], comparison: Comparison, text: EncodeText | None, fingerprint: str
) -> None:
    """Write the groups anew that hold items which are gone, renamed or told otherwise, without those that are gone."""
    taken = set(records)
    for group, record in records.items():
        if not comparison.is_affected(group, record):
            continue
        kept = [(number, entry) for number, entry in enumerate(comparison.kept[group]) if entry is not None]
        del comparison.kept[group]
        if not kept:
            remove_group(output, group)
            taken.discard(group)
            continue
        rows: defaultdict[str, list[EncodedSample]] = defaultdict(list)
        for url in _shards_of(output, group):
            for sample in read_shard(url):
                rows[sample.source].append(sample)
        results = []
        for index, (number, entry) in enumerate(kept):
            was = record.entries[number].source
            samples = _rename_samples(rows.pop(was, []), entry.source, comparison.captions.get((group, number)), text)
            reasons = [line["reason"] for line in record.rejected if line["source"] == printable(was)]
            rejected = [Rejected(entry.source, reason) for reason in dict.fromkeys(reasons)]
            results.append(ItemResult("", index, False, record.final, samples, rejected))
        name, part = free_name(int(group.split("-")[0]), taken), comparison.part_of.get(group, "")
        entries = [entry for _, entry in kept]
        finish_group(output, name, results, fingerprint, entries, part, replaces=group)
        _finish_replacing(output, name, _read_record(output / PROGRESS / f"{name}.json"))
        comparison.kept[name] = list(entries)
        taken = (taken | {name}) - {group}


def _rename_samples(
    samples: list[EncodedSample], source: str, caption: str | None, text: EncodeText | None
) -> list[EncodedSample]:
    """The samples of an item under the name that it has now, and with the caption, if that is another."""
    found = sorted(samples, key=lambda sample: int(sample.id.rpartition("#")[2]))
    found = [replace(sample, source=source, id=f"{source}#{number}") for number, sample in enumerate(found)]
    if caption is None:
        return found
    if text is None or not found:
        return [replace(sample, caption=caption) for sample in found]
    (features,) = text([caption])
    return [replace(sample, caption=caption, text=features.text, text_short=features.short) for sample in found]


def renew_records(output: Path, comparison: Comparison, source: MediaSource) -> None:
    """Note what files are known by now: those that were touched, and parts that have grown."""
    marks = {source.part_name(part): source.part_mark(part) for part in comparison.wanted}
    for group, record in read_records(output).items():
        if (kept := comparison.kept.get(group)) is None or record.part not in marks:
            continue
        entries, mark = [entry for entry in kept if entry is not None], marks[record.part]
        if (record.entries, record.part_mark) != (entries, mark):
            record.entries, record.part_mark = entries, mark
            write_record(output, group, record)


def remove_group(output: Path, group: str) -> None:
    """Its record first: shards without one are removed by the next run."""
    (output / PROGRESS / f"{group}.json").unlink(missing_ok=True)
    for url in _shards_of(output, group):
        Path(url).unlink(missing_ok=True)


def _finish_replacing(output: Path, group: str, record: GroupRecord) -> None:
    """Remove the group that another one, whose record is written, stands for."""
    remove_group(output, record.replaces)
    record.replaces = ""
    write_record(output, group, record)


def _shards_of(output: Path, group: str) -> list[str]:
    return sorted(str(path) for path in output.glob(f"data/*/{group}*.parquet") if group_of(str(path)) == group)


def _rows(url: str) -> int:
    """Row count of a shard; 0 if unreadable."""
    try:
        return read_footer(url)[0]
    except InputError:
        return 0


def group_of(url: str) -> str:
    """The group of a shard: further shards of it are numbered after its name."""
    return "-".join(Path(url).stem.split("-")[:2])


def finish_group(
    output: Path,
    group: str,
    results: Iterable[ItemResult],
    fingerprint: str,
    entries: list[SourceEntry],
    part: str,
    part_mark: str = "",
    replaces: str = "",
) -> None:
    """The group's shards, and last the record that makes it finished."""
    found = sorted(results, key=lambda result: result.index)
    samples: defaultdict[Bucket, list[EncodedSample]] = defaultdict(list)
    for result in found:
        for sample in result.samples:
            samples[sample.bucket].append(sample)
    for bucket, rows in samples.items():
        for number, chunk in enumerate(_shards(rows)):
            name = group if number == 0 else f"{group}-{number:03d}"
            write_shard(shard_url(output, bucket, name), chunk, fingerprint)
    record = GroupRecord(
        items=len(found),
        final=any(result.final for result in found),
        shards={bucket.name: len(rows) for bucket, rows in sorted(samples.items())},
        rejected=[{"source": one.source, "reason": one.reason} for result in found for one in result.rejected],
        part=part,
        part_mark=part_mark,
        entries=entries,
        replaces=replaces,
    )
    write_record(output, group, record)


def write_record(output: Path, group: str, record: GroupRecord) -> None:
    values = {name: value for name, value in asdict(record).items() if name != "written"}
    text = json.dumps(values, ensure_ascii=False, indent=1)
    write_file(output / PROGRESS / f"{group}.json", f"{text}\n".encode("utf-8", "surrogatepass"))


def _shards(samples: list[EncodedSample]) -> Iterator[list[EncodedSample]]:
    """Samples in shards of about SHARD_BYTES, at least one in each."""
    part: list[EncodedSample] = []
    size = 0
    for sample in samples:
        part.append(sample)
        size += sum(values.nbytes for values in (sample.moments, sample.text, sample.text_short) if values is not None)
        if size >= SHARD_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part


def _content(source: MediaSource) -> dict[str, Any]:
    """Digests of the source's contents, which show if it has changed."""
    digest = hashlib.sha256("\n".join(source.content).encode()).hexdigest()
    sizes = hashlib.sha256(" ".join(map(str, source.sizes)).encode()).hexdigest()
    return {"count": len(source.content), "digest": digest, "sizes": sizes}


def _rejections(records: dict[str, GroupRecord]) -> int:
    return sum(len(record.rejected) for record in records.values())


def _show_value(value: object) -> str:
    return "none" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)
