"""Looking into an encoded dataset: every shard checked, and random samples decoded beside what they were made from.

The sources are decoded again with the settings that dataset.json notes, so a sample meets exactly its own frames; how
near it comes to them (PSNR) is what the autoencoder and bf16 lose.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nova_video.common.errors import InputError
from nova_video.common.extensions import names_extension
from nova_video.data.dataset import (
    Bucket,
    DatasetInfo,
    EncodedSample,
    Shard,
    iter_shard,
    list_shard_urls,
    read_footer,
)
from nova_video.data.dataset_card import describe, name_of, pick
from nova_video.data.encode import decode_settings, group_of, read_records, source_settings
from nova_video.data.encoders import DecodeLatents, autoencoder_info, given_or_named
from nova_video.data.sheets import SheetEntry, draw_sheet
from nova_video.data.sources import MediaSource, open_source
from nova_video.data.stages import Decode, DecodedClip

BRIGHTEST = 255


@dataclass(frozen=True)
class CheckedDataset:
    """Rows and problems of all shards."""

    shards: dict[Bucket, list[Shard]]
    """Shards without problems."""
    problems: dict[str, list[str]]
    """Shard, or the dataset's place -> what is wrong with it."""

    @property
    def rows(self) -> int:
        return sum(shard.rows for shards in self.shards.values() for shard in shards)


@dataclass(frozen=True, eq=False)
class SampleComparison:
    """A sample beside what it was made from."""

    sample: EncodedSample
    decoded: NDArray[np.uint8]
    """(F, H, W, 3)."""
    source: NDArray[np.uint8] | None
    """(F, H, W, 3), these frames of the source; None if the source is not there."""

    @property
    def psnr(self) -> float | None:
        """In dB."""
        return None if self.source is None else psnr(self.source, self.decoded)


def psnr(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio of frames, in dB; infinite if they are equal."""
    error = float(np.mean((one.astype(np.float64) - other.astype(np.float64)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(BRIGHTEST**2 / error)


# Checks --------------------------------------------------------------------------------------------------------------


def check_dataset(place: str | Path, tell: Callable[[int, int], None] = lambda done, total: None) -> CheckedDataset:
    """Read all of a dataset; `tell` is called with the number of shards done, and of all."""
    info = DatasetInfo.load(place)
    urls = [(bucket, url) for bucket, found in list_shard_urls(place).items() for url in found]
    if not urls:
        raise InputError(f"{place}: holds no shards: expected data/BUCKET/*.parquet, as `nova encode` writes them")
    problems: dict[str, list[str]] = {}
    good: dict[Bucket, list[Shard]] = {}
    rows: dict[str, int] = {}
    seen: set[str] = set()
    for number, (bucket, url) in enumerate(urls):
        tell(number, len(urls))
        rows[url], wrong = check_shard(url, bucket, info, seen)
        if wrong:
            problems[url] = wrong
        else:
            good.setdefault(bucket, []).append(Shard(url, rows[url]))
    tell(len(urls), len(urls))
    readable = {url: count for url, count in rows.items() if count}
    if missing := _check_records(place, [(bucket, url) for bucket, url in urls if url in readable], readable):
        problems[str(place)] = missing
    return CheckedDataset(good, problems)


def check_shard(url: str, bucket: Bucket, info: DatasetInfo, seen: set[str]) -> tuple[int, list[str]]:
    """Row count and problems of a shard; its ids are added to `seen`, those of other shards."""
    wrong: Counter[str] = Counter()
    first: dict[str, str] = {}
    rows = 0
    try:
        expected, fingerprint = read_footer(url)
        for sample in iter_shard(url):
            rows += 1
            for problem in check_sample(sample, bucket, info):
                wrong[problem] += 1
                first.setdefault(problem, sample.id)
            if sample.id in seen:
                wrong["its id is in the dataset already"] += 1
                first.setdefault("its id is in the dataset already", sample.id)
            seen.add(sample.id)
    except InputError as error:
        return 0, [str(error).removeprefix(f"{url}: ")]
    found = [f"{first[what]}{f' and {count - 1} more' if count > 1 else ''}: {what}" for what, count in wrong.items()]
    if fingerprint != info.fingerprint:
        found.insert(0, f"was made by the autoencoder {fingerprint or 'unknown'}: expected {info.fingerprint}")
    if rows == 0 or rows != expected:
        found.insert(0, f"has {rows} rows: expected {expected or 'some'}")
    return rows, found


def check_sample(sample: EncodedSample, bucket: Bucket, info: DatasetInfo) -> list[str]:
    """Problems of a sample in the shard of a bucket."""
    wrong = []
    shape = info.moments_shape(bucket)
    if sample.bucket != bucket:
        wrong.append(f"is of bucket {sample.bucket.name}: expected {bucket.name}")
    if tuple(sample.moments.shape) != shape:
        wrong.append(f"moments are {tuple(sample.moments.shape)}: expected {shape}")
    if not sample.moments.isfinite().all():
        wrong.append("moments are not finite")
    for name, text in (("text", sample.text), ("text of the first sentence", sample.text_short)):
        if text is not None and info.text_encoder is None:
            wrong.append(f"has {name} features: expected none")
        elif text is not None and len(text) and text.shape[1] != info.text_dim:
            wrong.append(f"{name} features are {text.shape[1]} wide: expected {info.text_dim}")
        elif text is not None and not text.isfinite().all():
            wrong.append(f"{name} features are not finite")
    if sample.text is None and info.text_encoder is not None:
        wrong.append("has no text features")
    if not (sample.caption or "").strip():
        wrong.append("has no caption")
    if not (math.isfinite(sample.fps) and sample.fps > 0):
        wrong.append(f"fps is {sample.fps}: expected more than 0")
    if not (math.isfinite(sample.motion) and sample.motion >= 0):
        wrong.append(f"motion is {sample.motion}: expected at least 0")
    if not (0 <= sample.start <= sample.end) or (bucket.frames > 1 and sample.start == sample.end):
        wrong.append(f"is from {sample.start:g} to {sample.end:g} s: expected the end after the start")
    return wrong


def _check_records(place: str | Path, urls: Sequence[tuple[Bucket, str]], rows: dict[str, int]) -> list[str]:
    """Problems of shards with other numbers of rows than their groups' records, which local datasets have."""
    folder = Path(place)
    if not (folder / "progress").is_dir():
        return []
    records = read_records(folder)
    expected = Counter({(group, name): n for group, record in records.items() for name, n in record.shards.items()})
    found: Counter[tuple[str, str]] = Counter()
    for bucket, url in urls:
        found[group_of(url), bucket.name] += rows[url]
    wrong = [
        f"group {group} has {found[group, name]} rows in {name}: expected {expected[group, name]}, which the same"
        " `nova encode` makes anew"
        for group, name in sorted(expected)
        if found[group, name] != expected[group, name]
    ]
    unfinished = sorted({group for group, _ in found} - set(records))
    if unfinished:
        wrong.append(f"group {unfinished[0]} is not finished: run the same `nova encode` again")
    return wrong


# Samples beside their sources ----------------------------------------------------------------------------------------


def compare_samples(
    place: str | Path,
    shards: dict[Bucket, list[Shard]],
    *,
    clips: int,
    pictures: int,
    sources: str | None = None,
    model: str | None = None,
    seed: int = 0,
    device: str = "auto",
) -> list[SampleComparison]:
    """Random samples of the shards, decoded. `sources` is where the dataset was made from, if not where that was."""
    info = DatasetInfo.load(place)
    name = model or info.autoencoder
    with given_or_named(model, name, place, "autoencoder", "--model"):
        found = autoencoder_info(name).fingerprint
    if found != info.fingerprint:
        raise InputError(
            f"the autoencoder of {name} is {found}: expected {info.fingerprint}, which {name_of(place)} was encoded by"
        )
    samples = pick(shards, clips, pictures, seed)
    originals = _originals(samples, info, sources)
    decode = DecodeLatents(name, device)
    return [SampleComparison(sample, decode(sample.moments), originals.get(sample.id)) for sample in samples]


def comparison_sheet(place: str | Path, compared: Iterable[SampleComparison]) -> Image.Image:
    """Each sample's source above what its latents give back."""
    found = list(compared)
    said = "above from the source, below decoded from the latents"
    if all(one.source is None for one in found):
        said = "decoded from the latents; the sources are not there"
    return draw_sheet(name_of(place), said, [_entry(one) for one in found])


def _entry(one: SampleComparison) -> SheetEntry:
    note = describe(one.sample)
    if one.source is None:
        return SheetEntry(one.decoded, one.sample.caption, note)
    return SheetEntry(one.source, one.sample.caption, f"{note} · {one.psnr:.1f} dB", below=one.decoded)


def _originals(
    samples: Sequence[EncodedSample], info: DatasetInfo, sources: str | None
) -> dict[str, NDArray[np.uint8]]:
    """The frames that samples were made from, by their ids, as far as they are still there."""
    source = _open_sources(info, sources) if "source" in info.settings else None
    if source is None:
        if sources is not None:
            raise InputError(f"got sources {sources}, but dataset.json does not note how it was encoded")
        return {}
    decode = Decode(decode_settings(info))
    wanted = {sample.id for sample in samples}
    found: dict[str, NDArray[np.uint8]] = {}
    for name in dict.fromkeys(sample.source for sample in samples):
        try:
            item = source.find(name)
        except InputError:
            continue
        for clip in decode(item):
            if isinstance(clip, DecodedClip) and clip.id in wanted:
                found[clip.id] = clip.frames
    if sources is not None and not found:
        raise InputError(
            f"{sources}: holds none of the sources, such as {samples[0].source}: expected what was encoded"
        )
    shapes = {sample.id: sample.bucket for sample in samples}
    return {key: frames for key, frames in found.items() if Bucket(*frames.shape[:3]) == shapes[key]}


def _open_sources(info: DatasetInfo, sources: str | None) -> MediaSource | None:
    """Where the dataset was made from; None if that is not there any more and no other place is given."""
    settings = source_settings(info.settings)
    if sources is not None:
        return open_source(replace(settings, place=sources))
    if names_extension(settings.place):  # a dataset alone runs no code of the user's
        return None
    try:
        return open_source(settings)
    except (InputError, OSError):
        return None
