"""How fast each stage of `nova encode` is alone, and all of them together: `python benchmarks/encode.py --help`.

Each stage is the callable that the runners wrap, called here without Ray on what the stage before it gave. Beside its
rate stands what bounds it: for the networks the operations and the bytes that every operation reads and writes, counted
as they run, over what this device is measured to do of either; for decoding the time of the codec alone. Then, unless
told otherwise, the whole pipeline in this process and on Ray, on two cores. Results are written as JSON, with device,
versions, command, and how busy the machine was with other things.
"""

import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import tyro
from result_file import result_of, write_result
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from nova_video.autoencoders import AutoencoderKLOpenSora
from nova_video.bench.sample import digits
from nova_video.common.devices import choose_device
from nova_video.common.errors import InputError
from nova_video.data.dataset import read_shard, write_shard
from nova_video.data.encode import encode_dataset
from nova_video.data.encode_settings import EncodeSettings
from nova_video.data.encoders import EncodeLatents, EncodeText
from nova_video.data.sources import SourceSettings, open_source
from nova_video.data.stages import Decode, DecodedClip, DecodeSettings, Item, Motion, read_bytes
from nova_video.text.find import find_text_encoder

LEAST_CALLS = 3
FORWARDS = 4  # of the autoencoder in a call
CAPTIONS = 256  # in a call
CAPTION = "A {} walks slowly along a sunny street while people, bicycles and cars pass by. The camera follows it."
WIDE = ("aten::view", "aten::_unsafe_view", "aten::detach", "aten::alias", "aten::empty", "aten::lift_fresh")
PHI = {  # the text encoder of the released checkpoints, and one for trying this out
    "released": {"hidden_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 10240},
    "toy": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256},
}


@dataclass(frozen=True)
class Encode:
    """Time the stages of `nova encode`."""

    output: Path = Path("benchmarks/measured/encode.json")
    """JSON file to write."""
    source: str | None = None
    """As for `nova encode`; None: eight clips of four seconds or more, 640x360 or larger, at 25 frames a second, made
    for the occasion."""
    model: str = "emoji"
    """A checkpoint; or `released`: the autoencoder and text encoder of the released video model, with random weights
    (speed does not depend on their values); or `toy`, the same but small."""
    frames: tuple[int, ...] = (17,)
    fps: float = 8.0
    size: str = "128x128"
    """WIDTHxHEIGHT, as for `nova encode`."""
    batch: int | None = None
    """As for `nova encode`."""
    device: str = "auto"
    seconds: float = 10.0
    """At least so long is each stage repeated."""
    pipeline: bool = True
    """Time the whole as well."""
    pipeline_repeats: int = 8
    """How many times over the source is encoded there, so that starting weighs little."""
    cores: int = 2
    """That the whole may use."""


@dataclass(frozen=True)
class Limits:
    """What the device does at best, measured here."""

    flops: float
    """A second, in a large matrix product in the precision of the autoencoder."""
    bytes: float
    """A second, read and written in a copy of a large tensor."""


def main(args: Encode) -> None:
    device = choose_device(args.device)
    busy = digits(os.getloadavg()[0])  # of other work: 0 on a machine that has none
    with tempfile.TemporaryDirectory() as folder:
        width, height = map(int, args.size.split("x"))
        made = max(640, width), max(360, height), max(4.0, (max(args.frames) + 1) / args.fps)
        source = args.source or make_source(Path(folder) / "clips", *made)
        model = random_checkpoint(Path(folder) / "model", args.model) if args.model in PHI else args.model
        settings = DecodeSettings(args.frames, args.fps, (height, width))
        items = list(open_source(SourceSettings(source)).items())
        limits = measure_limits(device)
        decoded, rows = time_decoding(items, settings, args.seconds)
        whole: list[dict[str, Any]] = []
        result = result_of(
            "encode",
            device,
            model=args.model,
            source=args.source or f"made: 8 clips of {made[2]:g} s, {made[0]}x{made[1]}, 25 frames a second, h264",
            bucket=Counter(clip.bucket for clip in decoded).most_common(1)[0][0].name,
            threads=torch.get_num_threads(),
            load_before=busy,
            measured_limits={"tflops": digits(limits.flops / 1e12), "gb_per_second": digits(limits.bytes / 1e9)},
            stages=rows,
            whole=whole,
        )
        result["versions"] |= {"av": av.__version__}
        rows.append(time_motion(decoded, args.seconds))
        rows += time_networks(decoded, model, args, device, limits, Path(folder))
        for row in rows:
            print(json.dumps(row), flush=True)
        write_result(args.output, result)
        if args.pipeline:
            for row in time_whole(source, model, settings, args, Path(folder)):
                whole.append(row)
                write_result(args.output, result)
    print(json.dumps(whole, indent=2))


# What is encoded, and by what ----------------------------------------------------------------------------------------


def make_source(folder: Path, width: int, height: int, seconds: float) -> str:
    """Clips whose every part moves, over noise that a codec has to work for."""
    folder.mkdir()
    random = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    for number in range(8):
        grain = random.normal(0, 12, (height + 60, width + 60, 3))
        with av.open(str(folder / f"clip{number}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=25)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for t in range(round(25 * seconds)):
                waves = [np.sin((x + (number + 1) * t) / 37 + y / (11 + 5 * channel)) for channel in range(3)]
                moved = grain[t % 60 : t % 60 + height, t % 60 : t % 60 + width]
                pixels = np.clip(127 + 90 * np.stack(waves, -1) + moved, 0, 255).astype(np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode(None))
        (folder / f"clip{number}.txt").write_text(CAPTION.format(f"dog number {number}"))
    return str(folder)


def random_checkpoint(folder: Path, size: str) -> str:
    """Autoencoder and text encoder of the released video model, with random weights."""
    from transformers import AutoTokenizer, PhiConfig, PhiModel

    torch.manual_seed(0)
    if size == "released":
        vae = AutoencoderKLOpenSora()
    else:
        vae = AutoencoderKLOpenSora(block_out_channels=(16, 16, 32, 32), norm_num_groups=8)
    vae.save_pretrained(folder / "vae")
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # where it is filled sooner
            text = PhiModel(PhiConfig(vocab_size=51200, partial_rotary_factor=0.4, **PHI[size]))  # type: ignore[arg-type]
    finally:
        torch.set_default_dtype(torch.float32)
    text.save_pretrained(folder / "text_encoder")
    AutoTokenizer.from_pretrained(find_text_encoder("all-MiniLM-L6-v2")).save_pretrained(folder / "tokenizer")
    return str(folder)


# Stages --------------------------------------------------------------------------------------------------------------


def time_decoding(
    items: Sequence[Item], settings: DecodeSettings, seconds: float
) -> tuple[list[DecodedClip], list[Any]]:
    """The clips of all items, and rows: the codec alone, and all of Decode."""
    decode = Decode(settings)
    clips = [found for item in items for found in decode(item) if isinstance(found, DecodedClip)]
    if not clips:
        raise InputError("the source gave no clips: expected some that fit --frames and --size")
    sizes = sum(len(read_bytes(item)) for item in items)

    def codec() -> int:
        count = 0
        for item in items:
            with av.open(BytesIO(read_bytes(item))) as container:
                container.streams.video[0].thread_type = "NONE"  # as Decode does
                count += sum(1 for _ in container.decode(video=0))
        return count

    shown = codec()
    alone = timed(codec, seconds)
    all_of_it = timed(lambda: [found for item in items for found in decode(item)], seconds)
    frames = sum(len(clip.frames) for clip in clips)
    return clips, [
        {
            "stage": "decode",
            "clips_per_second": digits(len(clips) / all_of_it),
            "frames_per_second": digits(frames / all_of_it),
            "source_frames_per_second": digits(shown / all_of_it),
            "compressed_mb_per_second": digits(sizes / 1e6 / all_of_it),
            "mb_per_second": digits(sum(clip.frames.nbytes for clip in clips) / 1e6 / all_of_it),
            "bound": f"the codec takes {round(100 * alone / all_of_it)}% of the time, the rest is colours and resizing",
            "codec_source_frames_per_second": digits(shown / alone),
        }
    ]


def time_motion(clips: Sequence[DecodedClip], seconds: float) -> dict[str, Any]:
    motion = Motion()
    moving = [clip for clip in clips if len(clip.frames) > 1]
    took = timed(lambda: [motion(clip) for clip in moving], seconds)
    pairs = sum(len(clip.frames) - 1 for clip in moving)
    return {
        "stage": "motion",
        "clips_per_second": digits(len(moving) / took),
        "frames_per_second": digits(sum(len(clip.frames) for clip in moving) / took),
        "mb_per_second": digits(sum(clip.frames.nbytes for clip in moving) / 1e6 / took),
        "bound": f"arithmetic of the flow, {digits(1e3 * took / max(pairs, 1))} ms for two frames",
    }


def time_networks(
    clips: Sequence[DecodedClip], model: str, args: Encode, device: torch.device, limits: Limits, folder: Path
) -> list[dict[str, Any]]:
    """Autoencoder and text encoder on the device, then writing and reading what they gave."""
    bucket = Counter(clip.bucket for clip in clips).most_common(1)[0][0]
    fitting = [clip for clip in clips if clip.bucket == bucket]
    latents, text = EncodeLatents(model, args.device, args.batch), EncodeText(model, args.device)
    latents.load()
    together = len(next(latents._batches([fitting[0]] * 10_000)))
    work = [fitting[index % len(fitting)] for index in range(FORWARDS * together)]
    took = timed(lambda: latents(work), args.seconds, device)
    flops, moved = count(lambda: latents(work[:together]))
    pixels = sum(clip.frames.nbytes for clip in work)
    rows = [
        {
            "stage": "autoencoder",
            "clips_per_second": digits(len(work) / took),
            "frames_per_second": digits(len(work) * bucket.frames / took),
            "mb_per_second": digits(pixels / 1e6 / took),
            "together": together,
            **bound(flops * FORWARDS, moved * FORWARDS, took, limits),
        }
    ]
    captions = [CAPTION.format(f"dog number {number}") for number in range(CAPTIONS)]
    features = text(captions)
    took = timed(lambda: text(captions), args.seconds, device)
    flops, moved = count(lambda: text(captions))
    tokens = sum(len(one.text) + (0 if one.short is None else len(one.short)) for one in features)
    rows.append(
        {
            "stage": "text",
            "captions_per_second": digits(CAPTIONS / took),
            "tokens_per_second": digits(tokens / took),
            "mb_per_second": digits(tokens * text.width * 2 / 1e6 / took),
            "note": "each caption and its first sentence",
            **bound(flops, moved, took, limits),
        }
    )
    moments = latents(work[:together])
    samples = [
        replace(clip, number=number).sample(values, found.text, found.short)
        for number, (clip, values, found) in enumerate(zip(work[:together] * 8, moments * 8, features, strict=False))
    ]
    shard = folder / "shard.parquet"
    write = timed(lambda: write_shard(shard, samples), args.seconds)
    read = timed(lambda: read_shard(shard), args.seconds)
    size = shard.stat().st_size / 1e6
    for stage, took in (("write", write), ("read", read)):
        row = {"stage": stage, "clips_per_second": digits(len(samples) / took), "mb_per_second": digits(size / took)}
        rows.append(row | {"bound": "the file system and one core"})
    return rows


def bound(flops: float, moved: float, took: float, limits: Limits) -> dict[str, Any]:
    """Which of both limits is nearer, and how near."""
    by_flops, by_bytes = flops / limits.flops, moved / limits.bytes
    least, what = max((by_flops, "operations"), (by_bytes, "bytes"))
    return {
        "tflops": digits(flops / took / 1e12),
        "gb_per_second": digits(moved / took / 1e9),
        "seconds": digits(took),
        "least_seconds_by_operations": digits(by_flops),
        "least_seconds_by_bytes": digits(by_bytes),
        "bound": f"{what}: {round(100 * least / took)}% of what the device does of them at best",
    }


# The whole -----------------------------------------------------------------------------------------------------------


def time_whole(source: str, model: str, decode: DecodeSettings, args: Encode, folder: Path) -> Iterator[dict[str, Any]]:
    """From the source to shards and card, here and on Ray, on so many cores; start of Ray and loading included."""
    many = repeated_source(source, folder / "many", args.pipeline_repeats)
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, set(sorted(before)[: args.cores]))
    try:
        for runner in (None, "local"):
            output = folder / f"made-{runner}"
            settings = EncodeSettings(
                source=SourceSettings(many),
                decode=decode,
                output=output,
                model=model,
                text=model,
                batch=args.batch,
                device=args.device,
                ray=runner,
            )
            start = time.perf_counter()
            summary = encode_dataset(settings)
            took = time.perf_counter() - start
            clips = sum(summary.clips.values())
            frames = sum(bucket.frames * rows for bucket, rows in summary.clips.items())
            yield {
                "runner": "Ray" if runner else "this process",
                "cores": min(args.cores, len(before)),
                "sources": summary.items,
                "clips": clips,
                "seconds": digits(took),
                "clips_per_second": digits(clips / took),
                "frames_per_second": digits(frames / took),
            }
    finally:
        os.sched_setaffinity(0, before)


def repeated_source(source: str, folder: Path, times: int) -> str:
    """A local folder of media, linked so many times over."""
    folder.mkdir()
    names = [path for path in sorted(Path(source).iterdir()) if path.is_file() and not path.name.startswith(".")]
    for number in range(times):
        for path in names:
            (folder / f"{number:03d}-{path.name}").symlink_to(path.resolve())
    return str(folder)


# Measuring -----------------------------------------------------------------------------------------------------------


def timed(work: Callable[[], object], seconds: float, device: torch.device | None = None) -> float:
    """Seconds of the quickest call, after one that warms up: other work on the machine only ever adds to them."""
    times: list[float] = []
    work()
    while len(times) < LEAST_CALLS or sum(times) < seconds:
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def synchronize(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


class Traffic(TorchDispatchMode):
    """Bytes that operations read and write, each by itself: what a library that fuses nothing moves."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if not func.is_view and not func.name().split(".")[0].startswith(WIDE):
            tensors = [value for value in _leaves((args, kwargs, made)) if isinstance(value, Tensor)]
            self.total += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return made


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for part in value.values() for leaf in _leaves(part)]
    if isinstance(value, list | tuple):
        return [leaf for part in value for leaf in _leaves(part)]
    return [value]


def count(work: Callable[[], object]) -> tuple[float, float]:
    """Operations and bytes of a call."""
    with FlopCounterMode(display=False) as counter:
        work()
    with Traffic() as traffic:
        work()
    return float(counter.get_total_flops()), float(traffic.total)


def measure_limits(device: torch.device) -> Limits:
    """A matrix product in bf16 on a GPU and in float32 on a CPU, and a copy."""
    on_gpu = device.type == "cuda"
    side, dtype = (8192, torch.bfloat16) if on_gpu else (2048, torch.float32)
    matrix = torch.randn(side, side, device=device).to(dtype)
    made = torch.empty_like(matrix)
    product = timed(lambda: torch.mm(matrix, matrix, out=made), 2.0, device)
    long = torch.empty(1 << (30 if on_gpu else 28), dtype=torch.uint8, device=device)
    other = torch.empty_like(long)
    copy = timed(lambda: other.copy_(long), 2.0, device)
    return Limits(2 * side**3 / product, 2 * long.numel() / copy)


if __name__ == "__main__":
    main(tyro.cli(Encode, description=__doc__))
