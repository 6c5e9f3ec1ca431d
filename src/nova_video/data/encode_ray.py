"""The stages of encoding on Ray Data: tasks decode and measure motion, pools of actors run the networks.

    items --tasks--> clips --actors: EncodeLatents--> samples --actors: EncodeText--> samples --> this process

The actors wrap the same callables that `encode.py` calls when there is no Ray, so the dataset is the same. Every item
sends a mark after its clips, which says how many they were: with it an item is known to be whole, however its clips
were batched. A Ray that is started here listens on this machine alone, and is gone when the work is done or given up.
"""

import logging
import pickle
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from nova_video.common.errors import InputError
from nova_video.common.extras import install_command
from nova_video.common.ray_session import LEAST_CORES, LOCAL, RayNeed, ray_session
from nova_video.data.dataset import EncodedSample
from nova_video.data.encode_settings import EncodeSettings
from nova_video.data.failures import OneByOne, name_error
from nova_video.data.stages import (
    Decode,
    DecodedClip,
    DecodeSettings,
    Item,
    ItemResult,
    Motion,
    Rejected,
    decode_with_motion,
)

if TYPE_CHECKING:
    from nova_video.data.encoders import TextFeatures

WINDOW_ITEMS, WINDOW_BYTES = 100_000, 4 << 30  # items given to Ray together, and of those that bring their bytes
TASK_ITEMS, TASKS_A_CORE = 16, 8  # items of a task at most; fewer where cores would have nothing to do
TOGETHER, MOST_TOGETHER = 16 << 20, 256  # pixels, and clips, that come to an actor together

# Each GPU has an actor of either kind; without one, every second core has an actor for the autoencoder. What they take
# of a core differs from the whole one of a task, since Ray makes one step of two that ask for the same.
AUTOENCODER_GPU, TEXT_GPU = 0.75, 0.25
AUTOENCODER_CORE, TEXT_CORE = 0.9, 0.1

Batch = dict[str, Any]
"""Column -> values, as Ray Data hands them on: one column, `record`, of pickles."""


@dataclass(frozen=True)
class Mark:
    """An item has been decoded: what came of it besides its clips."""

    item: Item
    clips: int
    rejected: list[Rejected]


@dataclass(frozen=True, eq=False)
class EncodedClip:
    """A clip that has been through the autoencoder, and whose it is."""

    group: str
    index: int
    number: int
    sample: EncodedSample | Rejected
    """`Rejected` where a network failed on it."""


@dataclass
class PendingItem:
    """The results of an item so far."""

    mark: Mark | None = None
    samples: dict[int, EncodedSample | Rejected] = field(default_factory=dict)
    """By their numbers in the item."""


def encode_items_ray(items: Iterable[Item], settings: EncodeSettings) -> Iterator[ItemResult]:
    """A result for each item, in the order in which they are done."""
    windows = _windows(items)
    first = next(windows, None)
    if first is None:  # nothing to do: no Ray is started
        return
    with _ray(settings.ray or LOCAL):
        plan = _plan(settings)
        yield from _encode_window(first, settings, plan)
        for window in windows:
            yield from _encode_window(window, settings, plan)


# Stages --------------------------------------------------------------------------------------------------------------


class DecodeItems:
    """A task: items to clips with their motion scores, and each item's mark after its clips."""

    def __init__(self, settings: DecodeSettings) -> None:
        self.settings = settings

    def __call__(self, batch: Batch) -> Iterator[Batch]:
        decode, motion = Decode(self.settings), Motion()
        for item in _unpack(batch):
            rejected = []
            clips = 0
            for found in decode_with_motion(decode, motion, item):
                if isinstance(found, Rejected):
                    rejected.append(found)
                else:
                    clips += 1
                    yield _pack([found])
            yield _pack([Mark(replace(item, data=None), clips, rejected)])


class LatentActor:
    """An actor around EncodeLatents: clips to samples without text. Marks pass through."""

    def __init__(self, model: str, device: str, batch: int | None) -> None:
        from nova_video.data.encoders import EncodeLatents  # heavy, and tasks that decode do without

        self.encode = EncodeLatents(model, device, batch)
        self.encode.load()
        self.sparing = OneByOne()

    def __call__(self, batch: Batch) -> Batch:
        records = _unpack(batch)
        clips = [record for record in records if isinstance(record, DecodedClip)]
        encoded = [
            EncodedClip(
                clip.group,
                clip.index,
                clip.number,
                clip.rejected(moments) if isinstance(moments, Exception) else clip.sample(moments),
            )
            for clip, moments in zip(clips, self.sparing(self.encode, clips), strict=True)
        ]
        return _pack([*encoded, *(record for record in records if isinstance(record, Mark))])


class TextActor:
    """An actor around EncodeText: samples get their text. Marks pass through."""

    def __init__(self, name: str, device: str) -> None:
        from nova_video.data.encoders import EncodeText

        self.encode = EncodeText(name, device)
        self.encode.load()
        self.sparing = OneByOne()

    def __call__(self, batch: Batch) -> Batch:
        records = _unpack(batch)
        samples = {
            number: record.sample
            for number, record in enumerate(records)
            if isinstance(record, EncodedClip) and isinstance(record.sample, EncodedSample)
        }
        features = self.sparing(self.encode, [sample.caption for sample in samples.values()])
        for (number, sample), found in zip(samples.items(), features, strict=True):
            records[number] = replace(records[number], sample=_with_text(records[number], sample, found))
        return _pack(records)


def _with_text(
    record: EncodedClip, sample: EncodedSample, found: "TextFeatures | Exception"
) -> EncodedSample | Rejected:
    """A sample with its text features; rejected where they could not be made."""
    if isinstance(found, Exception):
        return Rejected(sample.source, f"clip {record.number} failed: {name_error(found)}", record.group, record.index)
    return replace(sample, text=found.text, text_short=found.short)


def _pack(records: Iterable[Any]) -> Batch:
    return {"record": [pickle.dumps(record, protocol=pickle.HIGHEST_PROTOCOL) for record in records]}


def _unpack(batch: Batch) -> list[Any]:
    return [pickle.loads(record) for record in batch["record"]]


# What runs where -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WorkPlan:
    """How the stages share a Ray."""

    device: str
    """The device of the actors: cpu, or cuda (each sees its own GPU alone)."""
    actors: int
    """Number of actors of the autoencoder, and on GPUs of the text encoder, which has one otherwise."""
    cores: int

    @property
    def text_actors(self) -> int:
        return self.actors if self.device == "cuda" else 1

    def share(self, gpu: float, core: float) -> dict[str, float]:
        """The resources of one actor."""
        whole = min(1.0, (self.cores - 1) / self.actors)  # a core is left for decoding
        return {"num_cpus": round(core * whole, 4), "num_gpus": gpu if self.device == "cuda" else 0.0}


def _plan(settings: EncodeSettings) -> WorkPlan:
    import ray

    found = ray.cluster_resources()
    cores, gpus = int(found.get("CPU", 0)), int(found.get("GPU", 0))
    if cores < LEAST_CORES:
        raise InputError(f"the Ray at {settings.ray} has {cores} cores: expected at least {LEAST_CORES}")
    if settings.device not in ("auto", "cpu", "cuda"):
        raise InputError(f"device is {settings.device!r}: expected auto, cpu or cuda on Ray, which chooses among GPUs")
    if settings.device == "cuda" and not gpus:
        raise InputError("device 'cuda' asked for, but Ray finds no GPU: expected cpu")
    if gpus and settings.device != "cpu":
        return WorkPlan("cuda", gpus, cores)
    return WorkPlan("cpu", max(1, cores // 2), cores)


def _encode_window(window: list[bytes], settings: EncodeSettings, plan: WorkPlan) -> Iterator[ItemResult]:
    """The results of some items: a run of Ray Data."""
    import ray
    from ray.data import ActorPoolStrategy

    tasks = max(-(-len(window) // TASK_ITEMS), min(len(window), TASKS_A_CORE * plan.cores))
    text = settings.text
    height, width = settings.decode.size
    together = max(1, min(MOST_TOGETHER, TOGETHER // (max(settings.decode.frames) * height * width)))
    rows = ray.data.from_items([{"record": record} for record in window], override_num_blocks=tasks)
    rows = rows.map_batches(DecodeItems(settings.decode).__call__, batch_size=1, num_cpus=1)
    rows = rows.map_batches(
        LatentActor,
        fn_constructor_args=(settings.model, plan.device, settings.batch),
        batch_size=together,
        compute=ActorPoolStrategy(size=plan.actors),
        **plan.share(AUTOENCODER_GPU if text else 1.0, AUTOENCODER_CORE),
    )
    if text is not None:
        rows = rows.map_batches(
            TextActor,
            fn_constructor_args=(text, plan.device),
            batch_size=together,
            compute=ActorPoolStrategy(size=plan.text_actors),
            **plan.share(TEXT_GPU, TEXT_CORE),
        )
    pending: defaultdict[tuple[str, int], PendingItem] = defaultdict(PendingItem)
    with _errors():
        for row in rows.iter_rows():
            record = pickle.loads(row["record"])
            if isinstance(record, Mark):
                key = record.item.group, record.item.index
                pending[key].mark = record
            else:
                key = record.group, record.index
                pending[key].samples[record.number] = record.sample
            found = pending[key]
            if found.mark is not None and len(found.samples) == found.mark.clips:
                yield _result(found.mark, pending.pop(key).samples)


def _result(mark: Mark, made: dict[int, EncodedSample | Rejected]) -> ItemResult:
    found = [made[number] for number in sorted(made)]
    return ItemResult(
        group=mark.item.group,
        index=mark.item.index,
        last=mark.item.last,
        final=mark.item.final,
        samples=[one for one in found if isinstance(one, EncodedSample)],
        rejected=[*mark.rejected, *(one for one in found if isinstance(one, Rejected))],
    )


def _windows(items: Iterable[Item]) -> Iterator[list[bytes]]:
    """Pickled items in long windows, because Ray makes the pools of actors again for each window."""
    window: list[bytes] = []
    size = 0
    for item in items:
        window.append(pickle.dumps(item))
        size += len(window[-1])
        if len(window) == WINDOW_ITEMS or size > WINDOW_BYTES:
            yield window
            window, size = [], 0
    if window:
        yield window


# Ray -----------------------------------------------------------------------------------------------------------------


@contextmanager
def _ray(address: str) -> Iterator[None]:
    """Connected to a Ray, with Ray Data as quiet as encoding needs it."""
    with ray_session(address, RayNeed("encoding", "data", "--no-ray")):
        try:
            import ray.data
        except ImportError as error:
            raise InputError(f"encoding on Ray needs ray: {install_command('data')}, or --no-ray") from error
        ray.data.DataContext.get_current().enable_progress_bars = False  # encoding has its own
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        yield


@contextmanager
def _errors() -> Iterator[None]:
    """Raises an error of a task or an actor as one line."""
    from ray.exceptions import RayError

    try:
        yield
    except RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, InputError):
            raise InputError(str(cause)) from error
        raise InputError(f"encoding on Ray failed: {name_error(cause or error)}") from error
