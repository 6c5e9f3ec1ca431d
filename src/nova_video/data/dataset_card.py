"""Writes a dataset's card: README.md with counts and histograms, and sheet.png with decoded samples.
Both are made from what is on disk, so they can be made again at any time.
"""

import json
import math
import random
import re
import statistics
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

from nova_video.data.dataset import (
    READERS,
    Bucket,
    DatasetInfo,
    EncodedSample,
    Shard,
    join,
    list_shards,
    read_columns,
    read_file,
    read_rows,
    write_file,
)
from nova_video.data.encoders import DecodeLatents
from nova_video.data.sheets import SheetEntry, draw_sheet
from nova_video.data.sidecars import shorten
from nova_video.io.text import printable

SHEET_CLIPS, SHEET_PICTURES = 12, 10
BARS, BAR = 10, 40  # of a histogram: bars at most, and letters of the longest
REASONS, NAME = 10, 100  # of rejection: the most frequent ones, and letters of an example's name
COLUMNS = ("source", "start", "end", "caption", "motion", "text_tokens")


@dataclass
class SampleFacts:
    """Numbers about the samples, for the card."""

    shards: dict[Bucket, list[Shard]]
    seconds: dict[Bucket, float] = field(default_factory=dict)
    lengths: list[float] = field(default_factory=list)
    """Lengths of clips in seconds; `motions` are of the same clips."""
    motions: list[float] = field(default_factory=list)
    sources: set[str] = field(default_factory=set)
    words: list[int] = field(default_factory=list)
    """Words of each caption."""
    tokens: list[int] = field(default_factory=list)
    rejected: list[dict[str, str]] = field(default_factory=list)

    def rows(self, bucket: Bucket) -> int:
        return sum(shard.rows for shard in self.shards[bucket])

    @property
    def clips(self) -> int:
        return sum(self.rows(bucket) for bucket in self.shards if bucket.frames > 1)

    @property
    def pictures(self) -> int:
        return sum(self.rows(bucket) for bucket in self.shards if bucket.frames == 1)

    @property
    def summary(self) -> str:
        parts = [_count(self.clips, "clip"), _count(self.pictures, "picture"), _count(len(self.sources), "source")]
        shown = [part for part in parts if not part.startswith("0 ")]
        if total := sum(self.seconds.values()):
            shown.insert(1, _duration(total))
        return ", ".join(shown)


def write_card(place: str | Path, device: str = "auto", autoencoder: str | None = None) -> None:
    """README.md and sheet.png of a dataset."""
    info = DatasetInfo.load(place)
    facts = gather(place)
    samples = pick(facts.shards, SHEET_CLIPS, SHEET_PICTURES)
    decode = DecodeLatents(autoencoder or info.autoencoder, device)
    entries = [SheetEntry(decode(sample.moments), sample.caption, describe(sample)) for sample in samples]
    page = BytesIO()
    draw_sheet(name_of(place), facts.summary, entries).save(page, format="png")
    write_file(join(place, "sheet.png"), page.getvalue())
    write_file(join(place, "README.md"), card(name_of(place), info, facts).encode())


def name_of(place: str | Path) -> str:
    """The name of a dataset: the last part of its place."""
    return printable(str(place).rstrip("/").rsplit("/", 1)[-1])


def describe(sample: EncodedSample) -> str:
    """A sample in a line: its bucket, where it is from, how much moves."""
    source = sample.source.rsplit("/", 1)[-1]
    if sample.bucket.frames == 1:
        return f"{sample.bucket.name} · {source}"
    return f"{sample.bucket.name} · {source}, {sample.start:.1f} to {sample.end:.1f} s · motion {sample.motion:.2f}"


def gather(place: str | Path) -> SampleFacts:
    """Read the columns that say something of the whole, and rejected.jsonl."""
    facts = SampleFacts(list_shards(place), rejected=read_rejected(place))
    with ThreadPoolExecutor(READERS) as pool:
        for bucket, shards in facts.shards.items():
            facts.seconds[bucket] = 0.0
            for columns in pool.map(lambda shard: read_columns(shard.url, COLUMNS), shards):
                facts.sources.update(columns["source"])
                facts.words.extend(len(caption.split()) for caption in columns["caption"])
                facts.tokens.extend(count for count in columns["text_tokens"] if count is not None)
                if bucket.frames > 1:
                    lengths = [end - start for start, end in zip(columns["start"], columns["end"], strict=True)]
                    facts.lengths.extend(lengths)
                    facts.motions.extend(columns["motion"])
                    facts.seconds[bucket] += sum(lengths)
    return facts


def read_rejected(place: str | Path) -> list[dict[str, str]]:
    """The lines of rejected.jsonl; none where there is no such file."""
    try:
        lines = read_file(join(place, "rejected.jsonl")).decode().split("\n")  # names may hold other ends of lines
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.strip()]


def pick(shards: dict[Bucket, list[Shard]], clips: int, pictures: int, seed: int = 0) -> list[EncodedSample]:
    """Random samples, the same ones for the same dataset and seed."""
    draw = random.Random(seed)
    samples: list[EncodedSample] = []
    for wanted, is_picture in ((clips, False), (pictures, True)):
        fitting = [shard for bucket, found in shards.items() if (bucket.frames == 1) == is_picture for shard in found]
        total = sum(shard.rows for shard in fitting)
        chosen = sorted(draw.sample(range(total), min(wanted, total)))
        start = 0
        for shard in fitting:
            here = [row - start for row in chosen if start <= row < start + shard.rows]
            samples.extend(read_rows(shard.url, here) if here else [])
            start += shard.rows
    return samples


# README.md -----------------------------------------------------------------------------------------------------------


def card(name: str, info: DatasetInfo, facts: SampleFacts) -> str:
    """The text of README.md, in Markdown; its head is what the Hugging Face Hub reads."""
    parts = [
        "---\nconfigs:\n- config_name: default\n  data_files: data/*/*.parquet\ntask_categories:\n- text-to-video\n---",
        f"# {name}",
        f"{facts.summary[0].upper()}{facts.summary[1:]}; {len(facts.rejected)} rejected. Written by `nova encode`:"
        " latents of clips and pictures with their captions, for `nova train`.",
        "![Random samples, decoded from their latents](sheet.png)",
        "## Buckets",
        "Frames, height and width in pixels. The shape is that of the moments: mean and logarithm of the variance of"
        " each channel, latent frames, height, width.",
        _table(
            ("bucket", "samples", "seconds", "shards", "shape"),
            [
                (
                    bucket.name,
                    f"{facts.rows(bucket):,}",
                    f"{facts.seconds[bucket]:,.1f}" if bucket.frames > 1 else "",
                    f"{len(shards):,}",
                    "x".join(map(str, info.moments_shape(bucket))),
                )
                for bucket, shards in facts.shards.items()
            ],
        ),
    ]
    if facts.clips:
        parts += [
            "## Motion of clips",
            "Mean optical flow (Farneback's) in pixels a frame, at the bucket's size: what `--motion` asks for."
            f" The median is {statistics.median(facts.motions):.2f}.",
            _histogram(facts.motions),
            "## Length of clips",
            "In seconds.",
            _histogram(facts.lengths),
        ]
    parts += ["## Captions", _captions(info, facts)]
    if facts.rejected:
        reasons = Counter(line.get("reason", "") for line in facts.rejected)
        example = {line.get("reason", ""): line.get("source", "") for line in reversed(facts.rejected)}
        rest = len(reasons) - REASONS
        parts += [
            "## Rejected",
            f"All are in `rejected.jsonl`{f'; {rest} more reasons are there' if rest > 0 else ''}.",
            _table(
                ("reason", "times", "first"),
                [(reason, f"{count:,}", _code(example[reason])) for reason, count in reasons.most_common(REASONS)],
            ),
        ]
    settings = {
        "autoencoder": f"{info.autoencoder} ({info.fingerprint})",
        "text encoder": info.text_encoder or "none",
    } | {key.replace("_", " "): value for key, value in info.settings.items() if value is not None}
    parts += ["## How it was made", _table(("setting", "value"), [(key, _value(v)) for key, v in settings.items()])]
    return "\n\n".join(parts) + "\n"


def _captions(info: DatasetInfo, facts: SampleFacts) -> str:
    words = f"{min(facts.words)} to {max(facts.words)} words, the median is {statistics.median(facts.words):g}."
    if info.text_encoder is None or not facts.tokens:
        return f"{words} There are no text features."
    return (
        f"{words} Features of each token are {info.text_dim} wide; a caption has {min(facts.tokens)} to"
        f" {max(facts.tokens)} tokens, the median is {statistics.median(facts.tokens):g}."
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return printable(" ".join(text.split())).replace("|", "\\|")


def _code(text: str) -> str:
    """A Markdown code span: its fence is longer than any row of backticks in the text."""
    text = shorten(text, NAME)
    fence = "`" * (1 + max((len(row) for row in re.findall("`+", text)), default=0))
    return f"{fence}{text}{fence}" if len(fence) == 1 else f"{fence} {text} {fence}"


def _value(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _histogram(values: Sequence[float]) -> str:
    """A bar a line; the last one holds all that is far out."""
    bars = list(bin_values(values))
    most = max(count for _, _, count in bars)
    digits = max(0, 1 - math.floor(math.log10(bars[0][1] - bars[0][0])))
    ranges = [
        f"{low:.{digits}f} {'and more' if high == math.inf else f'to {high:.{digits}f}'}" for low, high, _ in bars
    ]
    wide = max(map(len, ranges))
    drawn = ("█" * round(BAR * count / most) or "▏" * (count > 0) for _, _, count in bars)
    lines = [
        f"{text:{wide}}  {bar:{BAR}}  {count:,}" for text, bar, (_, _, count) in zip(ranges, drawn, bars, strict=True)
    ]
    return "```text\n" + "\n".join(lines) + "\n```"


def bin_values(values: Sequence[float]) -> Iterator[tuple[float, float, int]]:
    """(from, to, how many): at most BARS parts of a round width; the last has no end where values are far out."""
    ordered = sorted(float(f"{value:.6g}") for value in values)  # what differs by rounding is equal
    low, top, far = ordered[0], ordered[-1], ordered[int(0.98 * (len(ordered) - 1))]
    spread = (far - low) or abs(top - low) or max(abs(top), 1.0)
    power = 10 ** math.floor(math.log10(spread / BARS))
    width = next(step * power for step in (1, 2, 5, 10, 20) if spread / (step * power) < BARS - 2)
    first = math.floor(low / width)
    count = min(math.floor(top / width), math.floor(far / width) + 1) - first + 1
    for index in range(first, first + count):
        end = math.inf if index == first + count - 1 and top >= (index + 1) * width else (index + 1) * width
        yield index * width, end, bisect_left(ordered, end) - bisect_left(ordered, index * width)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _duration(seconds: float) -> str:
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} seconds"
