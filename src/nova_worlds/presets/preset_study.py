"""The cost of each shortcut: sentences of the emoji world are made exactly and in every other way, and judged.

Held-out combinations are made once with each of `VARIANTS` and judged as `nova evaluate emoji` does; every score is
compared with the exact way's sentence by sentence (`preset_rows.py`). What a variant gave is kept in a folder as soon
as it is there, so that a run goes on where another stopped.

Random numbers come from one generator a batch, on the model's device, with the same batches in all variants: a sentence
has the same order of revelation and, set for set and frame for frame, the same noise in all of them. One generator a
clip, as `nova evaluate emoji` has it, would take longer than the clips do on a GPU: 81 draws of 30 us for each, 10 s a
variant of 4,000. So results depend on the batch size, which is among what kept ones must agree in. Pairs stay pairs,
but share less where fewer numbers are drawn: with fewer sets the noise of a set is that of another, in later frames
too; with fewer steps of a scheduler that adds noise (DDPM), every set but the first starts from other noise. How much
that alone changes, `OTHER_SEED` says: the exact way with other numbers.
"""

import gc
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nova_video.bench.sample import device_name, versions
from nova_video.common.devices import choose_device, choose_dtype
from nova_video.common.errors import InputError
from nova_video.io.checkpoints import COMPONENTS, resolve_checkpoint
from nova_video.io.files import make_folder
from nova_video.pipeline.pipeline import NovaPipeline
from nova_video.pipeline.request import GenerateRequest
from nova_video.pipeline.result import GenerateResult
from nova_video.pipeline.settings import SETTINGS_FILE, CheckpointSettings, Defaults
from nova_video.sampling.presets import EXACT, PRESETS, Preset
from nova_video.text.features import encode_prompts
from nova_video.text.load import load_text_encoder
from nova_worlds.evaluation.emoji import JUDGE_SCORES, EmojiSettings, asked_specs, clip_flags, pair_flags, score
from nova_worlds.evaluation.world_benchmark import JUDGE_CLIPS, check_judge
from nova_worlds.judging.judge import Judge
from nova_worlds.presets.preset_outcome import Outcome, digest, load_tensors, save_tensors
from nova_worlds.presets.preset_rows import PresetRow, compare_outcomes, digits
from nova_worlds.rendering.clips import ClipSpec
from nova_worlds.rendering.world import EmojiWorld, to_uint8

OTHER_SEED = "other-seed"
VARIANTS: dict[str, Preset] = {
    "exact": EXACT,
    OTHER_SEED: EXACT,
    "sets-0.75": Preset(sets=0.75),
    "sets-0.5": Preset(sets=0.5),
    "steps-0.5": Preset(steps=0.5),
    "steps-0.32": Preset(steps=0.32),
    "dpm-0.5": Preset(steps=0.5, solver="dpm++"),
    "dpm-0.32": Preset(steps=0.32, solver="dpm++"),
    "last-steps-0.4": Preset(last_steps=0.4),
    "guided-sets-0.75": Preset(guided_sets=0.75),
    "guided-sets-0.5": Preset(guided_sets=0.5),
    "guidance-every-2": Preset(guidance_every=2),
    "guidance-every-3": Preset(guidance_every=3),
    "fp8": Preset(fp8=True),
    "balanced": PRESETS["balanced"],
    "fast": PRESETS["fast"],
}
GPU_BATCH, CPU_BATCH = 250, 25
FAR = 1 << 30  # between the seeds of `OTHER_SEED` and those of all others; a CPU counts them in 32 bits
WARM_UP = 2  # batches of a variant that are not timed: graphs are captured in them
LATENTS = "exact-latents.safetensors"  # what the others are compared with


@dataclass(frozen=True)
class VariantSettings:
    """The variants to compare, and the device."""

    model: str
    data: Path
    """A prepared world."""
    keep: Path
    """Folder for what each variant gave."""
    settings: EmojiSettings
    """Its numbers of sets and steps are those that the variants take their shares of."""
    variants: Sequence[str] = tuple(VARIANTS)
    """The exact one is always made."""
    compile: bool = True
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        unknown = [name for name in self.variants if name not in VARIANTS]
        if unknown:
            raise InputError(f"variants: got {', '.join(unknown)}: expected some of {', '.join(VARIANTS)}")


def measure_presets(asked: VariantSettings, command: str) -> Iterator[tuple[PresetRow, bool]]:
    """A row for each variant as it is done, and whether what it gave was there already. One that fails has its error in
    its row, but the exact one must not."""
    device = choose_device(asked.device)
    dtype = choose_dtype(asked.dtype, device)
    folder = resolve_checkpoint(asked.model)
    world = EmojiWorld.load(asked.data, device)
    make_folder(asked.keep)
    defaults, settings = CheckpointSettings.load(folder).defaults, asked.settings
    row = PresetRow(
        config=asked.model,
        preset="exact",
        batch=min(settings.batch_size, settings.num_clips),
        compile=asked.compile,
        dtype=str(dtype).removeprefix("torch."),
        device=device_name(device),
        versions=versions(),
        command=command,
        num_clips=settings.num_clips,
        num_pictures=settings.num_pairs,
        num_frames=settings.num_frames,
        seed=settings.seed,
    )
    same = {
        "format": 1,
        "model": digest(folder, (*COMPONENTS, SETTINGS_FILE)),
        "world": digest(asked.data, ("",)),
        "settings": asdict(settings),
        "run": [row.compile, row.dtype, row.device],
    }
    names = list(dict.fromkeys(("exact", *asked.variants)))
    keys = {name: json.dumps(same | {name: changed_parts(VARIANTS[name])}, sort_keys=True) for name in names}
    paths = {name: asked.keep / f"{name}.safetensors" for name in names}
    outcomes = {name: Outcome.load(paths[name], keys[name]) for name in names}
    maker = Maker(asked, folder, world)
    if None in outcomes.values() and not maker.load_exact(keys["exact"]):
        outcomes["exact"] = None  # the others' latents are compared with it
    for name in names:
        sets, steps = numbers_of(VARIANTS[name], settings, defaults)
        row = replace(row, preset=name, shortcuts=changed_parts(VARIANTS[name]), sets=sets, diffusion_steps=steps)
        kept = outcomes[name] is not None
        try:
            if (outcome := outcomes[name]) is None:
                outcome = outcomes[name] = maker.make(name, keys[name])
                outcome.save(paths[name], keys[name])
            exact = outcomes["exact"]
            assert exact is not None
            found = compare_outcomes(row, outcome, exact)
        except Exception as error:  # of whatever kind: the next variant is still to be measured
            if name == "exact":
                raise
            found = replace(row, error=" ".join(f"{type(error).__name__}: {error}".split()))
        finally:
            free(device)
        yield found, kept


def changed_parts(shortcuts: Preset) -> dict[str, Any]:
    """The parts that are not the exact way's."""
    return {part: value for part, value in asdict(shortcuts).items() if value != getattr(EXACT, part)}


def numbers_of(shortcuts: Preset, settings: EmojiSettings, defaults: Defaults) -> tuple[int, int]:
    """Sets and denoising steps of a variant."""
    sets = defaults.sets if settings.sets is None else settings.sets
    steps = defaults.diffusion_steps if settings.diffusion_steps is None else settings.diffusion_steps
    return max(1, round(sets * shortcuts.sets)), max(1, round(steps * shortcuts.steps))


# Making and judging ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class BatchResult:
    """A batch."""

    latents: Tensor
    """(B, C, F, h, w)"""
    frames: Tensor
    """(B, T, H, W, 3) uint8."""
    seconds: float
    vae_seconds: float


@dataclass(eq=False)
class Maker:
    """Makes and judges variants. All that they share is there once, from when it is first needed."""

    asked: VariantSettings
    folder: Path
    """The model's."""
    world: EmojiWorld
    latents: Tensor | None = None
    """(N, C, F, h, w) of the exact clips."""

    @cached_property
    def pipe(self) -> NovaPipeline:
        dtype = choose_dtype(self.asked.dtype, self.world.device)
        pipe = NovaPipeline.from_pretrained(self.folder, torch_dtype=dtype).to(self.world.device)
        pipe.set_progress_bar_config(disable=True)
        pipe.require_vae("judging")
        return pipe

    @cached_property
    def specs(self) -> tuple[ClipSpec, ClipSpec]:
        """Clips, and pictures of two objects; more of them than are made, where that is few."""
        return asked_specs(self.world, self.asked.settings)

    @cached_property
    def judge(self) -> Judge:
        """One that reads real renders right."""
        judge, (clips, pairs) = Judge(self.world), self.specs
        real = [spec.select(slice(JUDGE_CLIPS)) for spec in (clips, pairs)]
        seen = [judge(to_uint8(self.world.render(spec)), spec) if len(spec) else None for spec in real]
        assert seen[0] is not None
        check_judge(score(real[0], seen[0], real[1], seen[1] or seen[0]).rates, JUDGE_SCORES)
        return judge

    @cached_property
    def features(self) -> dict[str, Tensor]:
        """(tokens, width) of every sentence and of none."""
        pipe, settings = self.pipe, self.asked.settings
        encoder, tokenizer = pipe.text_encoder, pipe.tokenizer
        if encoder is None or tokenizer is None:
            name = pipe.settings.text_encoder
            if name is None:
                raise InputError(f"{self.asked.model}: expected a model with a text encoder, to read sentences")
            tokenizer, encoder = load_text_encoder(name, pipe.transformer.dtype, pipe.execution_device)
        counts = (settings.num_clips, settings.num_pairs)
        told = [
            text
            for spec, count in zip(self.specs, counts, strict=True)
            for text in self.world.captions(spec.select(slice(count)))
        ]
        texts = list(dict.fromkeys(["", *told]))
        rows = encode_prompts(tokenizer, encoder, texts, pipe.transformer.config.text_token_len)
        return dict(zip(texts, rows, strict=True))

    def load_exact(self, key: str) -> bool:
        """The exact clips' latents, as they were kept."""
        kept = load_tensors(self.asked.keep / LATENTS, key)
        self.latents = None if kept is None else kept[0]["latents"].to(self.world.device)
        return kept is not None

    def make(self, name: str, key: str) -> Outcome:
        """All clips and pictures of a variant. The exact one's latents are kept, too."""
        settings, judge = self.asked.settings, self.judge
        if name == "exact":
            self.latents = None
        flags: dict[str, list[Tensor]] = {}
        latents, errors, sizes, seconds, vae_seconds = [], [], [], [], []
        seed = settings.seed + (FAR if name == OTHER_SEED else 0)
        for spec, count, judged in zip(
            self.specs, (settings.num_clips, settings.num_pairs), (clip_flags, pair_flags), strict=True
        ):
            for at in range(0, count, settings.batch_size):
                batch = spec.select(slice(at, min(count, at + settings.batch_size)))
                made = self._batch(name, batch, seed + at + (settings.num_clips if spec.has_pairs else 0))
                for part, right in judged(batch, judge(made.frames, batch)).items():
                    flags.setdefault(part, []).append(right.cpu())
                if spec.has_pairs:
                    continue
                exact = made.latents if self.latents is None else self.latents[at : at + len(batch)]
                latents += [made.latents] if name == "exact" else []
                errors.append((made.latents.float() - exact.float()).square().flatten(1).sum(1).cpu())
                sizes.append(exact.float().square().flatten(1).sum(1).cpu())
                if len(batch) == min(settings.batch_size, count):  # not the rest of a division
                    seconds.append(made.seconds)
                    vae_seconds.append(made.vae_seconds)
        if name == "exact":
            self.latents = torch.cat(latents)
            save_tensors(self.asked.keep / LATENTS, {"latents": self.latents}, key)
        return Outcome(
            {part: torch.cat(rows) for part, rows in flags.items()},
            torch.cat(errors),
            torch.cat(sizes),
            digits(statistics.median(seconds[WARM_UP:] or seconds[-1:])),
            digits(statistics.median(vae_seconds[WARM_UP:] or vae_seconds[-1:])),
            versions(),
        )

    @torch.no_grad()
    def _batch(self, name: str, spec: ClipSpec, seed: int) -> BatchResult:
        pipe, settings, shortcuts = self.pipe, self.asked.settings, VARIANTS[name]
        sets, steps = numbers_of(shortcuts, settings, pipe.defaults)
        asked = GenerateRequest(
            prompt_embeds=[self.features[text] for text in self.world.captions(spec)],
            negative_prompt_embeds=[self.features[""]],
            num_frames=spec.num_frames,
            sets=sets,
            diffusion_steps=steps,
            guidance_scale=settings.guidance_scale,
            motion_flow=settings.motion_flow,
            compile=None if self.asked.compile else False,
            output_type="latent",
            **{part: value for part, value in changed_parts(shortcuts).items() if part not in ("sets", "steps")},
        )
        start = now(pipe.execution_device)
        generation = pipe.start(asked, torch.Generator(pipe.execution_device).manual_seed(seed))
        generation.run()
        sampled = now(pipe.execution_device)
        generation.output_type = "pt"
        frames = frames_of(generation.run())
        decoded = now(pipe.execution_device)
        latents = generation.state.latents()
        if not latents.isfinite().all():
            raise InputError("got latents that are not finite")
        return BatchResult(latents, frames, sampled - start, decoded - sampled)


def frames_of(made: GenerateResult) -> Tensor:
    """Frames of a call with output_type "pt" -> (B, T, H, W, 3) uint8."""
    frames = made.images.unsqueeze(1) if made.frames is None else made.frames  # (B, T, 3, H, W) in [0, 1]
    return (frames * 255).round_().to(torch.uint8).permute(0, 1, 3, 4, 2)


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def free(device: torch.device) -> None:
    """Frees the memory that a variant, perhaps a failed one, left behind."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
