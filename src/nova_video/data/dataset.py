"""Reads and writes the encoded dataset on disk: a folder of Parquet shards, one row a clip.

`nova encode` writes it and the trainer streams it: autoencoder moments, text features and what is known of each clip.
A place is a folder or any URL that fsspec opens. docs/dataset.md tells the whole layout.
Legend: C latent channels, F latent frames, h w latent grid, T text tokens, D width of the text features.
"""

import functools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from nova_video.common.errors import InputError, first_line
from nova_video.common.extras import install_command
from nova_video.io.checkpoints import find_beside
from nova_video.io.text import decode_text, parse_json

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from fsspec import AbstractFileSystem

FORMAT = 1
TEMPORAL_STRIDE = 4  # pixel frames of a latent frame: a clip has 4k + 1 frames
ROW_GROUP_BYTES = 16 << 20  # of a shard: about what a reader holds at a time
FINGERPRINT = b"nova_video.autoencoder"  # key of a shard's metadata: whose moments it holds
MARKS = ("size", "ETag", "etag", "md5Hash", "LastModified", "last_modified", "mtime", "created")  # of fsspec's info
READERS = 16  # shards whose footers are read at the same time

# A sentence ends at one of these signs before a space, but not after an abbreviation or a single letter.
SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*(?=\s)|(?<=[。！？])")
ABBREVIATION = re.compile(r"(?:^|[\s(])(?:[A-Za-z]|mr|mrs|ms|dr|prof|st|vs|approx|no|e\.g|i\.e)\.$", re.I)


@dataclass(frozen=True, order=True)
class Bucket:
    """The size that all clips of a shard have, in pixels: 4k + 1 frames (1 is a picture), height, width."""

    frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        if self.frames < 1 or self.frames % TEMPORAL_STRIDE != 1 or self.height < 1 or self.width < 1:
            raise InputError(f"bucket {self.name}: expected frames x height x width with 4k + 1 frames (1, 5, 9, ...)")

    @property
    def name(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"

    @classmethod
    def parse(cls, name: str) -> "Bucket":
        """The bucket of a name such as 17x128x160."""
        match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", name)
        if match is None:
            raise InputError(f"bucket {name!r}: expected frames x height x width, such as 17x128x160")
        return cls(*(int(part) for part in match.groups()))


@dataclass(frozen=True)
class DatasetInfo:
    """Facts about a dataset as a whole: `dataset.json`."""

    autoencoder: str
    """Name or folder of the checkpoint whose autoencoder made the moments."""
    fingerprint: str
    """Hash of that autoencoder's weights (`encoders.fingerprint`)."""
    latent_channels: int
    spatial_stride: int
    """Pixels of a cell of the latent grid, in height and in width."""
    temporal_stride: int = TEMPORAL_STRIDE
    text_encoder: str | None = None
    """None: there are no text features."""
    text_dim: int | None = None
    text_fingerprint: str | None = None
    """Hash of the text encoder's weights (`text_fingerprint`); None in older datasets and for a user's own encoder."""
    settings: dict[str, Any] = field(default_factory=dict)
    """How it was encoded: fps, lengths, sizes and so on."""

    @classmethod
    def load(cls, place: str | Path) -> "DatasetInfo":
        url = join(place, "dataset.json")
        try:
            values = parse_json(decode_text(read_file(url)))
        except FileNotFoundError:
            raise InputError(f"{place}: has no dataset.json: expected a dataset written by `nova encode`") from None
        except InputError:  # of the place
            raise
        except (ValueError, OSError) as error:
            raise InputError(f"{url}: not readable as JSON ({first_line(error)})") from None
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
            raise InputError(f"{url}: expected a JSON object with format {FORMAT}")
        names = {part.name for part in fields(cls)}
        try:
            info = cls(**{name: value for name, value in values.items() if name in names})
        except TypeError:
            required = ("autoencoder", "fingerprint", "latent_channels", "spatial_stride")
            missing = [name for name in required if name not in values]
            raise InputError(f"{url}: lacks {', '.join(missing)}") from None
        text = None if info.text_encoder is None else find_beside(info.text_encoder, place)
        return replace(info, autoencoder=find_beside(info.autoencoder, place), text_encoder=text)

    def save(self, folder: str | Path) -> None:
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=2, ensure_ascii=False)
        write_file(join(folder, "dataset.json"), f"{text}\n".encode())

    def moments_shape(self, bucket: Bucket) -> tuple[int, int, int, int]:
        """The shape (2C, F, h, w) of a clip of that bucket."""
        return (
            2 * self.latent_channels,
            (bucket.frames - 1) // self.temporal_stride + 1,
            bucket.height // self.spatial_stride,
            bucket.width // self.spatial_stride,
        )


@dataclass(frozen=True, eq=False)
class EncodedSample:
    """One clip or picture, as a row of a shard holds it."""

    id: str
    source: str
    """Relative path in the source, or URL."""
    start: float
    """Seconds in the source, as `end`."""
    end: float
    caption: str
    fps: float
    motion: float
    """Mean optical flow in pixels a frame, at the bucket's size; 0 for a picture."""
    bucket: Bucket
    moments: Tensor
    """(2C, F, h, w) bf16: mean and logarithm of the variance of the latents, before shift and scale."""
    text: Tensor | None = None
    """(T, D) fp16: features of the caption."""
    text_short: Tensor | None = None
    """(T', D) fp16: features of its first sentence; None where that is all of it."""


@dataclass(frozen=True)
class Shard:
    url: str
    """A path where it is local."""
    rows: int


# Rows ----------------------------------------------------------------------------------------------------------------


@functools.cache
def schema() -> "pa.Schema":
    """The columns of a shard."""
    import pyarrow as pa

    columns = {
        "id": pa.string(),
        "source": pa.string(),
        "start": pa.float64(),
        "end": pa.float64(),
        "caption": pa.string(),
        "fps": pa.float32(),
        "motion": pa.float32(),
        "frames": pa.int32(),
        "height": pa.int32(),
        "width": pa.int32(),
        "moments": pa.binary(),  # bf16, little-endian
        "shape": pa.list_(pa.int32()),  # of the moments
        "text": pa.binary(),  # fp16, little-endian
        "text_tokens": pa.int32(),
        "text_short": pa.binary(),
        "text_short_tokens": pa.int32(),
    }
    can_be_null = ("text", "text_tokens", "text_short", "text_short_tokens")
    return pa.schema([pa.field(name, kind, nullable=name in can_be_null) for name, kind in columns.items()])


def to_row(sample: EncodedSample) -> dict[str, Any]:
    """The row of a sample, a value a column."""
    text, short = sample.text, sample.text_short
    return {
        "id": sample.id,
        "source": sample.source,
        "start": sample.start,
        "end": sample.end,
        "caption": sample.caption,
        "fps": sample.fps,
        "motion": sample.motion,
        "frames": sample.bucket.frames,
        "height": sample.bucket.height,
        "width": sample.bucket.width,
        "moments": _to_bytes(sample.moments.to(torch.bfloat16)),
        "shape": list(sample.moments.shape),
        "text": None if text is None else _to_bytes(text.to(torch.float16)),
        "text_tokens": None if text is None else len(text),
        "text_short": None if short is None else _to_bytes(short.to(torch.float16)),
        "text_short_tokens": None if short is None else len(short),
    }


def to_sample(row: Mapping[str, Any]) -> EncodedSample:
    """The sample of a row of Python values, as `datasets` and `pyarrow` give it. Its tensors are its own."""
    return EncodedSample(
        id=row["id"],
        source=row["source"],
        start=row["start"],
        end=row["end"],
        caption=row["caption"],
        fps=row["fps"],
        motion=row["motion"],
        bucket=Bucket(row["frames"], row["height"], row["width"]),
        moments=torch.frombuffer(bytearray(row["moments"]), dtype=torch.bfloat16).view(*row["shape"]),
        text=_to_features(row["text"], row["text_tokens"]),
        text_short=_to_features(row["text_short"], row["text_short_tokens"]),
    )


def first_sentence(caption: str) -> str:
    """The caption up to the end of its first sentence: all of it where there is one alone."""
    caption = caption.strip()
    for end in SENTENCE_END.finditer(caption):
        sentence = caption[: end.end()]
        if not ABBREVIATION.search(sentence):
            return sentence
    return caption


def _to_bytes(tensor: Tensor) -> bytes:
    values: bytes = tensor.detach().cpu().contiguous().view(torch.int16).numpy().astype("<i2", copy=False).tobytes()
    return values


def _to_features(values: bytes | None, tokens: int | None) -> Tensor | None:
    if values is None or tokens is None:
        return None
    if not tokens:  # nothing to read: a caption without tokens
        return torch.zeros(0, 0, dtype=torch.float16)
    return torch.from_numpy(np.frombuffer(values, dtype="<f2").reshape(tokens, -1).copy())


# Shards --------------------------------------------------------------------------------------------------------------


def write_shard(place: str | Path, samples: Sequence[EncodedSample], fingerprint: str | None = None) -> None:
    """Write samples of one bucket as a shard, which is there whole or not at all.

    `fingerprint` is the autoencoder's, as in `DatasetInfo`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    buckets = sorted({sample.bucket for sample in samples})
    if len(buckets) != 1:
        found = ", ".join(bucket.name for bucket in buckets) or "none"
        raise InputError(f"{place}: a shard holds samples of one bucket, got {found}")
    rows = [to_row(sample) for sample in samples]
    kinds = schema().with_metadata({FINGERPRINT: fingerprint.encode()}) if fingerprint else schema()
    size = max(sum(len(row[name] or b"") for name in ("moments", "text", "text_short")) for row in rows)
    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.Table.from_pylist(rows, schema=kinds),
        sink,
        row_group_size=max(1, ROW_GROUP_BYTES // max(1, size)),
        compression=dict.fromkeys(("id", "source", "caption"), "zstd") | {"moments": "none", "text": "none"},
        use_dictionary=["source", "caption"],
        write_statistics=False,
    )
    write_file(place, sink.getvalue())


def iter_shard(place: str | Path) -> Iterator[EncodedSample]:
    """The samples of a shard, a row group in memory at a time."""
    with _open_shard(place) as shard:
        for group in range(shard.num_row_groups):
            for row in _read_group(shard, group).to_pylist():
                yield to_sample(row)


def read_shard(place: str | Path) -> list[EncodedSample]:
    return list(iter_shard(place))


def read_rows(place: str | Path, rows: Sequence[int]) -> list[EncodedSample]:
    """Some samples of a shard by their numbers: only the row groups that they are in are read."""
    found: dict[int, EncodedSample] = {}
    with _open_shard(place) as shard:
        start = 0
        for group in range(shard.num_row_groups):
            end = start + shard.metadata.row_group(group).num_rows
            here = sorted({row for row in rows if start <= row < end})
            if here:
                table = _read_group(shard, group).take([row - start for row in here])
                found |= zip(here, map(to_sample, table.to_pylist()), strict=True)
            start = end
    return [found[row] for row in rows]


def read_columns(place: str | Path, names: Sequence[str]) -> dict[str, list[Any]]:
    """Columns of a shard, and nothing else of it."""
    with _open_shard(place) as shard:
        columns: dict[str, list[Any]] = shard.read(columns=list(names), use_threads=False).to_pydict()
    return columns


def read_footer(place: str | Path) -> tuple[int, str | None]:
    """Rows of a shard and the fingerprint of its autoencoder; the rows themselves are not read."""
    with _open_shard(place) as shard:
        mark = (shard.schema_arrow.metadata or {}).get(FINGERPRINT)
        return shard.metadata.num_rows, None if mark is None else mark.decode()


def list_shards(place: str | Path) -> dict[Bucket, list[Shard]]:
    """All shards of a dataset by bucket, in the order of their names, with their rows as their footers tell."""
    urls = list_shard_urls(place)
    if not any(urls.values()):
        raise InputError(f"{place}: holds no shards: expected data/BUCKET/*.parquet, as `nova encode` writes them")
    with ThreadPoolExecutor(READERS) as pool:
        return {
            bucket: [Shard(url, rows) for url, (rows, _) in zip(found, pool.map(read_footer, found), strict=True)]
            for bucket, found in urls.items()
        }


def list_shard_urls(place: str | Path) -> dict[Bucket, list[str]]:
    """The URLs of all shards by bucket; none is opened."""
    filesystem, root = open_place(place)
    found: dict[Bucket, list[str]] = {}
    data = f"{root.rstrip('/')}/data"
    for path in sorted(filesystem.find(data, maxdepth=2) if filesystem.isdir(data) else ()):  # a name is no pattern
        folder, name = path.rsplit("/", 2)[-2:]
        if path.removesuffix(f"/{folder}/{name}") == data and name.endswith(".parquet") and not name.startswith("."):
            url = path if is_local(filesystem) else filesystem.unstrip_protocol(path)
            try:
                found.setdefault(Bucket.parse(folder), []).append(url)
            except InputError as error:
                raise InputError(f"{url}: {error}") from None
    return dict(sorted(found.items()))


def shard_url(place: str | Path, bucket: Bucket, name: str) -> str:
    """Where the shard `name` of a bucket is."""
    return join(place, "data", bucket.name, f"{name}.parquet")


@contextmanager
def _open_shard(place: str | Path) -> Iterator["pq.ParquetFile"]:
    """A shard whose columns are those of the schema; what goes wrong with it names it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    filesystem, path = open_place(place)
    try:
        with filesystem.open(path, "rb") as file:
            shard = pq.ParquetFile(file)
            _check_schema(place, shard.schema_arrow)
            yield shard
    except InputError:
        raise
    except (pa.ArrowException, OSError, ValueError, RuntimeError, TypeError) as error:
        raise InputError(f"{place}: unreadable shard ({first_line(error)})") from None


def _read_group(shard: "pq.ParquetFile", group: int) -> "pa.Table":
    """A row group. Arrow's own threads are not used: one may still hold the file, a Python object, when the interpreter
    ends, and then the process is aborted."""
    return shard.read_row_group(group, columns=schema().names, use_threads=False)


def _check_schema(place: str | Path, found: "pa.Schema") -> None:
    for column in schema():
        index = found.get_field_index(column.name)
        if index < 0:
            raise InputError(f"{place}: not a shard of an encoded dataset: it has no column {column.name}")
        if found.field(index).type != column.type:
            raise InputError(
                f"{place}: column {column.name} is of type {found.field(index).type}: expected {column.type}"
            )


# Places: folders and URLs --------------------------------------------------------------------------------------------


def open_place(place: str | Path) -> tuple["AbstractFileSystem", str]:
    """The file system of a path or URL, and the path in it."""
    try:
        import fsspec
    except ImportError as error:
        raise InputError(f"datasets need fsspec: {install_command('data')}") from error
    if "://" not in str(place):  # whatever its name holds
        local = fsspec.filesystem("file")
        return local, local._strip_protocol(str(place))
    try:
        filesystem, path = fsspec.core.url_to_fs(str(place))
    except (ValueError, ImportError, OSError) as error:
        raise InputError(f"{place}: cannot be opened: {first_line(error)}") from None
    return filesystem, path


def local_path(place: str | Path) -> Path | None:
    """A place as a whole path; None where it is elsewhere. It may be a pattern."""
    if "://" not in str(place):
        return Path(os.path.abspath(place))
    return Path(str(place).removeprefix("file://")) if str(place).startswith("file:///") else None


def file_mark(url: str) -> str:
    """A mark that changes when a file is written to, from its file system; empty where there is none."""
    path = local_path(url)
    try:
        if path is not None:
            found = path.stat()
            return f"local:{found.st_mtime_ns}:{found.st_ctime_ns}:{found.st_size}:{found.st_ino}"
        filesystem, inner = open_place(url)
        info = filesystem.info(inner)
    except Exception:  # file systems elsewhere have errors of their own
        return ""
    return ":".join(["elsewhere", *(f"{name}={info[name]}" for name in MARKS if info.get(name) is not None)])


def join(place: str | Path, *parts: str) -> str:
    return "/".join([str(place).rstrip("/"), *parts])


def read_file(place: str | Path) -> bytes:
    filesystem, path = open_place(place)
    data: bytes = filesystem.cat_file(path)
    return data


def write_file(place: str | Path, data: Any) -> None:
    """Write bytes under another name in the same folder, then rename: the file is there whole or not at all. Raises
    InputError where that fails, as on a full disk."""
    filesystem, path = open_place(place)
    folder, name = path.rsplit("/", 1)
    aside = f"{folder}/.{name}.{os.getpid()}.part"
    filesystem.makedirs(folder, exist_ok=True)
    try:
        with filesystem.open(aside, "wb") as file:
            file.write(data)
            if is_local(filesystem):
                file.flush()
                os.fsync(file.fileno())
        if is_local(filesystem):
            os.replace(aside, path)
        else:
            filesystem.mv(aside, path)
    except BaseException as error:
        if filesystem.exists(aside):
            filesystem.rm_file(aside)
        if isinstance(error, OSError):
            raise InputError(f"{place} could not be written: {error}; what is finished stays") from error
        raise


def is_local(filesystem: "AbstractFileSystem") -> bool:
    return "file" in (filesystem.protocol if isinstance(filesystem.protocol, tuple) else (filesystem.protocol,))
