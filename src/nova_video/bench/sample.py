"""Sampling, timed: what `nova bench sample` writes down as one row.

In turn: the first call, with everything it compiles; one more, after which graphs are captured; then the repeats that
count, each sampled to latents and then decoded; streams up to their first final frame; and a last call under the
stopwatch, to see where the time goes (it does not count: looking takes time too).
"""

import gc
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
import torch

import nova_video
from nova_video.bench.configs import SEED, SIZES, build, resize_model
from nova_video.bench.floor import count_work, device_rates, floor_of
from nova_video.bench.rows import PARTS, Row
from nova_video.common.checks import check_number
from nova_video.common.devices import choose_device, choose_dtype
from nova_video.common.errors import InputError
from nova_video.common.fast_parts import find_fast
from nova_video.io.checkpoints import resolve_checkpoint
from nova_video.pipeline.events import FrameReady, LatentPreview
from nova_video.pipeline.generation import Generation
from nova_video.pipeline.loading import component_folder, load_scheduler, outline_transformer
from nova_video.pipeline.pipeline import NovaPipeline
from nova_video.pipeline.request import GenerateRequest, OutputType
from nova_video.pipeline.settings import CheckpointSettings
from nova_video.sampling.presets import PRESETS, PresetName
from nova_video.sampling.stopwatch import Stopwatch

WARM_UP = 2  # calls: the second one captures graphs
PROMPT_TOKENS = 20  # of the random prompt features; a model pads them all to one length
GIB = 2**30


@dataclass(frozen=True)
class SampleSettings:
    """How to run a configuration. None: as it is."""

    preset: PresetName = "exact"
    batch: int = 1
    compile: bool = True
    frames: int | None = None
    size: tuple[int, int] | None = None
    """Height and width in pixels."""
    sets: int | None = None
    diffusion_steps: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    repeats: int = 5

    def __post_init__(self) -> None:
        for name in ("batch", "repeats"):
            check_number(name, getattr(self, name), 1, integer=True)
        if self.preset not in PRESETS:
            raise InputError(f"preset is {self.preset!r}: expected one of {', '.join(PRESETS)}")

    @property
    def changed(self) -> dict[str, Any]:
        """The flags that change the work of the configuration."""
        size = None if self.size is None else f"{self.size[1]}x{self.size[0]}"
        values = {"frames": self.frames, "size": size, "sets": self.sets, "diffusion-steps": self.diffusion_steps}
        return {name: value for name, value in values.items() if value is not None}


@contextmanager
def write_trace(path: Path, device: torch.device) -> Iterator[None]:
    """A Chrome trace of what is done inside, which ends with waiting for the device."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        yield
    profiler.export_chrome_trace(str(path))


def measure(config: str, settings: SampleSettings, command: str, profile: Path | None = None) -> Row:
    """One configuration: a name of `SIZES`, or a checkpoint. What goes wrong is in the row."""
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    row = Row(
        config=config,
        preset=settings.preset,
        batch=settings.batch,
        compile=settings.compile,
        dtype=str(dtype).removeprefix("torch."),
        device=device_name(device),
        versions=versions(),
        command=command,
        changed=settings.changed,
    )
    try:
        return _open_and_measure(row, settings, device, dtype, profile)
    except Exception as error:  # of whatever kind: the next configuration is still to be measured
        return replace(row, error=" ".join(f"{type(error).__name__}: {error}".split()))
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _open_and_measure(
    row: Row, settings: SampleSettings, device: torch.device, dtype: torch.dtype, profile: Path | None
) -> Row:
    pipe = open_pipeline(row.config, settings, device, dtype)
    try:
        return _measure(row, pipe, settings, device, profile)
    finally:
        pipe.release()  # the next configuration compiles and captures its own


def _measure(row: Row, pipe: NovaPipeline, settings: SampleSettings, device: torch.device, profile: Path | None) -> Row:
    pipe.require_vae("decoding")
    runs = Runs(pipe, request_of(pipe, settings, row.config), device)
    plan = runs.request.resolve(pipe.defaults, pipe.capabilities)
    assert plan.num_frames is not None
    patch = pipe.transformer.patch_size
    first, *_ = [runs.once() for _ in range(WARM_UP)]
    timed = [runs.once() for _ in range(settings.repeats)]
    streams = [runs.stream() for _ in range(1 + settings.repeats)][1:]
    exact = replace(runs.request, preset="exact").resolve(pipe.defaults, pipe.capabilities)
    work = count_work(pipe.transformer, exact)
    rates = device_rates(row.device, pipe.transformer.dtype)
    floor = None if rates is None else floor_of(work, rates)
    seconds = statistics.median(run.sampling for run in timed)
    total = statistics.median(run.total for run in timed)
    row = replace(
        row,
        frames=plan.num_frames,
        size=f"{plan.width}x{plan.height}",
        tokens=(plan.grid[0] // patch) * (plan.grid[1] // patch),
        latent_frames=plan.latent_frames,
        sets=plan.sets,
        diffusion_steps=plan.diffusion_steps,
        guidance=getattr(plan.guidance.values[0], "scale", None),
        repeats=settings.repeats,
        seconds=digits(seconds),
        seconds_range=spread([run.sampling for run in timed]),
        vae_seconds=digits(statistics.median(run.decoding for run in timed)),
        vae_seconds_range=spread([run.decoding for run in timed]),
        total_seconds=digits(total),
        parts=runs.parts(),
        first_call_seconds=digits(first.total),
        first_preview_seconds=digits(statistics.median(preview for preview, _ in streams)),
        first_frame_seconds=digits(statistics.median(frame for _, frame in streams)),
        frames_per_second=digits(plan.num_frames * plan.batch / total),
        peak_memory_gb=digits(max(run.sampling_memory for run in timed)) if device.type == "cuda" else None,
        vae_peak_memory_gb=digits(max(run.decoding_memory for run in timed)) if device.type == "cuda" else None,
        tflop=digits(sum(work.flops.values()) / 1e12),
        floor_flops_seconds=None if floor is None else digits(floor.by_flops),
        floor_bytes_seconds=None if floor is None else digits(floor.by_bytes),
        floor_seconds=None if floor is None else digits(floor.seconds),
        floor_ratio=None if floor is None else digits(seconds / floor.seconds),
        finite=all(run.finite for run in timed),
    )
    if profile is not None:
        runs.profile(profile)
    return row


def open_pipeline(config: str, settings: SampleSettings, device: torch.device, dtype: torch.dtype) -> NovaPipeline:
    """A released size built anew, at another size in pixels if that is asked for; or a checkpoint."""
    size = SIZES.get(config)
    if size is not None:
        pipe = build(resize_model(size, *settings.size) if settings.size else size, device, dtype)
    else:
        pipe = NovaPipeline.from_pretrained(checkpoint(config), torch_dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def checkpoint(config: str) -> Path:
    """The folder of a configuration that is none of `SIZES`."""
    try:
        return resolve_checkpoint(config)
    except InputError as error:
        raise InputError(f"config is {config!r}: expected one of {', '.join(SIZES)}, or a model ({error})") from None


def outline(config: str, size: tuple[int, int] | None) -> NovaPipeline:
    """The pipeline of `open_pipeline` with shapes only, without the parts that no request is checked against."""
    if config in SIZES:
        made = resize_model(SIZES[config], *size) if size else SIZES[config]
        return build(made, torch.device("meta"), torch.float32)
    folder = checkpoint(config)
    return NovaPipeline(
        outline_transformer(component_folder(folder, "transformer")),
        load_scheduler(folder),
        settings=CheckpointSettings.load(folder),
    )


def check_work(configs: Sequence[str], settings: SampleSettings) -> None:
    """Checks every configuration and its settings before the first one is measured."""
    for config in configs:
        pipe = outline(config, settings.size)
        request_of(pipe, settings, config).resolve(pipe.defaults, pipe.capabilities)


def request_of(pipe: NovaPipeline, settings: SampleSettings, config: str) -> GenerateRequest:
    """The request of every run, with random prompt features."""
    random = torch.Generator().manual_seed(SEED)
    model = pipe.transformer
    shape = (min(PROMPT_TOKENS, model.config.text_token_len), model.config.text_token_dim)
    features = [torch.randn(shape, generator=random).to(model.device, model.dtype) for _ in range(settings.batch)]
    height, width = (None, None) if settings.size is None or config in SIZES else settings.size
    return GenerateRequest(
        prompt_embeds=features,
        height=height,
        width=width,
        num_frames=settings.frames,
        sets=settings.sets,
        diffusion_steps=settings.diffusion_steps,
        compile=None if settings.compile else False,
        preset=settings.preset,
    )


@dataclass(frozen=True)
class SampleTimes:
    """One call: seconds and GiB."""

    sampling: float
    decoding: float
    sampling_memory: float
    decoding_memory: float
    finite: bool

    @property
    def total(self) -> float:
        return self.sampling + self.decoding


@dataclass(frozen=True)
class Runs:
    """Calls of one request."""

    pipe: NovaPipeline
    request: GenerateRequest
    device: torch.device

    def once(self) -> SampleTimes:
        """From prompt features to latents, then from latents to pixels on the device."""
        self._forget_peak()
        start = self._now()
        generation = self.sampled()
        sampled = self._now()
        sampling_memory = self._peak()
        self._forget_peak()
        resumed = self._now()
        generation.run()
        decoded = self._now()
        finite = all(bool(frame.isfinite().all()) for frame in generation.state.frames.values())
        return SampleTimes(sampled - start, decoded - resumed, sampling_memory, self._peak(), finite)

    def stream(self) -> tuple[float, float]:
        """Seconds until the first latent frame is shown, and until the first frame is final, both as arrays."""
        start = self._now()
        preview = None
        stream: Any = self._start("np").stream(preview=True)
        with closing(stream) as events:  # what is sampled ahead ends here
            for event in events:
                if isinstance(event, LatentPreview) and preview is None:
                    _ = event.frame  # which decodes it
                    preview = time.perf_counter() - start
                if isinstance(event, FrameReady):
                    break
        frame = time.perf_counter() - start
        assert preview is not None
        return preview, frame

    def parts(self) -> dict[str, float]:
        """Seconds of one call by part; what is in none of them is "else"."""
        watch = Stopwatch(self.device)
        start = self._now()
        self.sampled(watch).run()
        total = self._now() - start
        seconds = dict.fromkeys(PARTS, 0.0) | watch.seconds()
        return {part: digits(value) for part, value in (seconds | {"else": total - sum(seconds.values())}).items()}

    def profile(self, path: Path) -> None:
        """Writes a Chrome trace of a call up to its first latent frame, and of decoding that frame."""
        with write_trace(path, self.device):
            generation = self._start("latent")
            generation.run(lambda pipe, step, frame, tensors: frame == 0)
            self.pipe.decode_picture(generation.state.frames[0])
            self._now()

    def sampled(self, watch: Stopwatch | None = None) -> Generation:
        """The request with its latents there; to run on is to decode them."""
        generation = self._start("latent", watch)
        generation.run()
        generation.output_type = "pt"
        return generation

    def _start(self, output_type: OutputType, watch: Stopwatch | None = None) -> Generation:
        request = replace(self.request, output_type=output_type)
        return self.pipe.start(request, torch.Generator(self.device).manual_seed(SEED), watch)

    def _now(self) -> float:
        """Seconds, once the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _peak(self) -> float:
        return torch.cuda.max_memory_allocated(self.device) / GIB if self.device.type == "cuda" else 0.0

    def _forget_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})"


def versions() -> dict[str, str]:
    found = {
        "nova_video": nova_video.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "diffusers": diffusers.__version__,
    }
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    flash = find_fast("flash")
    if flash is not None and torch.cuda.is_available() and flash.loads(torch.device("cuda")):
        found["flash-attn-4"] = version("flash-attn-4")
    return found


def digits(value: float) -> float:
    """Four digits."""
    return float(f"{value:.4g}")


def spread(values: list[float]) -> tuple[float, float]:
    return digits(min(values)), digits(max(values))
