"""`NovaPipeline`, the one public object: a request in, pictures or clips out.

It holds a checkpoint's parts and nothing of any call: everything a call needs is a `Generation` made for it, so that
threads can share a pipeline and a call that fails leaves nothing behind. `start` prepares one in the order of the work:
resolve, encode the text, encode what is given; `generation.py` samples and decodes.

Legend: B pictures or clips of the call, F latent frames, h w latent grid, H W pixels, C latent channels, T text tokens.
"""

import inspect
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import huggingface_hub
import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nova_video.autoencoders import adapt
from nova_video.common.checks import shown
from nova_video.common.devices import choose_device
from nova_video.common.errors import InputError
from nova_video.common.options import Number
from nova_video.fast.fp8 import check_fp8
from nova_video.io.checkpoints import resolve_checkpoint
from nova_video.io.files import make_readable
from nova_video.io.weights import DIFFUSERS_WEIGHTS, TRANSFORMERS_WEIGHTS, index_or_single
from nova_video.model import NOVATransformer3DModel
from nova_video.model.lora import adapter_names
from nova_video.pipeline.adapters import AdapterMixin
from nova_video.pipeline.conditions import encode_prompts, prompt_features, segments_of
from nova_video.pipeline.engines import Engines
from nova_video.pipeline.generation import CALLING, Generation, Interrupts, StepCallback, Surroundings
from nova_video.pipeline.given import given_frames
from nova_video.pipeline.keywords import (
    CALL_HINTS,
    ENCODE_HINTS,
    OPEN_HINTS,
    keywords_of,
    refuse_keywords,
    with_settings,
)
from nova_video.pipeline.loading import check_layout, check_parts, load_parts, load_scheduler
from nova_video.pipeline.model_card import CARD, card_facts, pipeline_card
from nova_video.pipeline.offload import LowMemory, bring, enable_low_memory, execution_device
from nova_video.pipeline.parts import Parts
from nova_video.pipeline.plan import Capabilities
from nova_video.pipeline.progress import Progress
from nova_video.pipeline.record import make_records
from nova_video.pipeline.registration import register
from nova_video.pipeline.request import GenerateRequest, OutputType, Picture, Prompt, Video
from nova_video.pipeline.result import GenerateResult
from nova_video.pipeline.saving import load_progress
from nova_video.pipeline.settings import CheckpointSettings, Defaults
from nova_video.sampling.guidance import Guidance
from nova_video.sampling.random import RandomState
from nova_video.sampling.schedulers import TrainedNoise, check_scheduler
from nova_video.sampling.state import SamplingState
from nova_video.sampling.timing import Stopwatch, span
from nova_video.text.load import NamedTextEncoder
from nova_video.text.vocabulary import HINT

Generators = torch.Generator | Sequence[torch.Generator]
Dtypes = torch.dtype | dict[str, torch.dtype] | None
STEP_TENSORS = ("latents", "revealed")
"""Names of the tensors that a callback may see."""

FROM_CHECKPOINT = object()
"""In `from_pretrained`: the part is the checkpoint's own."""

log = logging.getLogger(__name__)


class NovaPipeline(AdapterMixin, DiffusionPipeline):
    """Text, and optionally leading frames or a picture to edit, to images and video."""

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _exclude_from_cpu_offload = ["transformer"]  # from the sequential kind, which knows nothing but `forward`
    _optional_components = ["vae", "text_encoder", "tokenizer"]

    def __init__(
        self,
        transformer: NOVATransformer3DModel,
        scheduler: Any,
        vae: Any | None = None,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        settings: CheckpointSettings | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        parts = {
            "transformer": transformer,
            "scheduler": scheduler,
            "vae": vae,
            "text_encoder": text_encoder,
            "tokenizer": tokenizer,
        }
        check_parts(parts, or_places=False)
        self.register_modules(**parts)
        if vae is not None:
            check_layout(vae, transformer)
        given = CheckpointSettings() if settings is None else settings
        self.settings = CheckpointSettings.from_json(dict(given)) if isinstance(given, Mapping) else given
        self._named_encoder = NamedTextEncoder()
        self.engines = Engines()
        self._interrupts = Interrupts()

    # Opening and saving -------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        torch_dtype: Dtypes = None,
        *,
        dtype: Dtypes = None,
        revision: str | None = None,
        token: str | None = None,
        local_files_only: bool = False,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        variant: str | None = None,
        use_safetensors: bool | None = None,
        device_map: str | None = None,
        low_cpu_mem_usage: bool = True,
        low_memory: bool | torch.device | str | LowMemory = False,
        transformer: Any = FROM_CHECKPOINT,
        scheduler: Any = FROM_CHECKPOINT,
        vae: Any = FROM_CHECKPOINT,
        text_encoder: Any = FROM_CHECKPOINT,
        tokenizer: Any = FROM_CHECKPOINT,
        head: type[torch.nn.Module] | None = None,
        trust_remote_code: bool = False,
        **others: Any,
    ) -> "NovaPipeline":
        """Open "emoji" (the model in the box), a local folder or a hub id; only its component folders count.

        As in diffusers, weights become float32 unless `torch_dtype` (or `dtype`) says otherwise, for all parts or by
        name ({"transformer": torch.bfloat16, "default": torch.float32}). `variant` is that of the files, such as fp16;
        without it the plain ones are taken, or else the fp16 or bf16 ones. `device_map` is a device for the whole.

        With `low_memory` (True: on "cuda", or a GPU's name) parts stay in the processor's memory and take turns on the
        GPU, the text encoder layer by layer (`offload.py`). Such a pipeline is not to be moved. A `LowMemory` says
        more: the text encoder in 8 bits, frames decoded in tiles.

        `transformer`, `scheduler`, `vae`, `text_encoder` and `tokenizer` replace the checkpoint's own parts: each is a
        part as it is, or the folder of one. None leaves an optional one out. No code of a checkpoint is ever run: of
        one that was made with a head of the user's own, `head` is the class.
        """
        named = [name for name, value in others.items() if value is not None]  # the Auto classes give some as None
        refuse_keywords("from_pretrained", named, OPEN_HINTS, inspect.signature(cls.from_pretrained).parameters)
        if trust_remote_code:
            raise InputError("trust_remote_code is True: expected False, since no code of a checkpoint is ever run")
        for name, value, expected in (
            ("use_safetensors", use_safetensors, "True, since pickles are never read"),
            ("low_cpu_mem_usage", low_cpu_mem_usage, "True, since weights are never initialised before they are read"),
        ):
            if value is False:
                raise InputError(f"{name} is False: expected {expected}")
        if torch_dtype is not None and dtype is not None:
            raise InputError("got both of torch_dtype and dtype: expected one of them")
        dtypes = _check_dtypes(torch_dtype if dtype is None else dtype)
        device = None if device_map is None else _device_of(device_map)
        low = LowMemory.of(low_memory)
        if low is not None and device is not None:
            raise InputError("got both of low_memory and device_map: expected one of them")
        given = {
            "transformer": transformer,
            "scheduler": scheduler,
            "vae": vae,
            "text_encoder": text_encoder,
            "tokenizer": tokenizer,
        }
        given = {name: part for name, part in given.items() if part is not FROM_CHECKPOINT}
        check_parts(given)
        folder = resolve_checkpoint(
            pretrained_model_name_or_path,
            revision=revision,
            token=token,
            local_files_only=local_files_only,
            cache_dir=cache_dir,
            force_download=force_download,
            without=[name for name in given if name != "scheduler"],
        )
        settings = CheckpointSettings.load(folder)
        if "scheduler" in given and "transformer" not in given and (folder / "scheduler").is_dir():
            settings = replace(settings, noise=TrainedNoise.of(load_scheduler(folder)))
        if "transformer" in given:
            settings = replace(settings, vocabulary=None)  # the words of the one that is not used
        if "text_encoder" in given:
            settings = replace(settings, text_encoder=None)  # the name of the one that is not used
        parts = load_parts(folder, given, lambda part: _dtype_of(part, dtypes), variant, head)
        pipe = cls(**parts, settings=settings)
        pipe.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        if device is not None:
            pipe.to(device)
        if low is not None:
            enable_low_memory(pipe, low.device, low.text_encoder, low.tiled)
        return pipe

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, torch_dtype: torch.dtype | None = None, **parts: Any) -> Self:
        """A pipeline of another's parts and settings, or of parts given in their place. No weight is copied.

        Unlike diffusers' own, it leaves the dtype as it is unless one is given: the parts belong to both.
        """
        names = list(inspect.signature(cls.__init__).parameters)[1:]
        refuse_keywords("from_pipe", [name for name in parts if name not in names], OPEN_HINTS, names)
        own = {name: part for name, part in pipeline.components.items() if name in names}
        if missing := [name for name in ("transformer", "scheduler") if name not in own | parts]:
            raise InputError(f"{type(pipeline).__name__} has no {missing[0]}: expected it to be given")
        pipe = cls(**own | parts)
        if (place := getattr(pipeline.config, "_name_or_path", None)) is not None:
            pipe.register_to_config(_name_or_path=place)
        return pipe if torch_dtype is None else pipe.to(dtype=torch_dtype)

    def to(self, *args: Any, **options: Any) -> Self:
        """diffusers' own: a device, a dtype or both. A device that is not there is an InputError."""
        place = options.get("device", args[0] if args else None)
        if isinstance(place, str | torch.device):
            _device_of(place, "device")
        return super().to(*args, **options)

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **hub: Any,
    ) -> None:
        """Write every part as safetensors, `nova.json` and a card: a folder that `from_pretrained` opens.

        With `push_to_hub` it goes to the Hub as well, as `repo_id` or by the folder's name.
        """
        folder = Path(save_directory)
        if not safe_serialization:
            raise InputError("safe_serialization is False: expected True, since pickles are never written")
        known = ("private", "token", "commit_message", "create_pr")
        refuse_keywords("save_pretrained", [name for name in hub if not push_to_hub or name not in known], {}, known)
        check_scheduler(self.scheduler, self.trained_noise)
        if names := adapter_names(self.transformer):
            raise InputError(
                f"the transformer has adapters ({', '.join(names)}): expected them unloaded before it is saved, and "
                "fused before that if they are to be in it"
            )
        for part in ("transformer", "vae", "text_encoder"):
            if getattr(self, part) is not None:
                base = TRANSFORMERS_WEIGHTS if part == "text_encoder" else DIFFUSERS_WEIGHTS
                for path in index_or_single(folder / part, base, variant):  # an older save may have the other of both
                    path.unlink(missing_ok=True)
        super().save_pretrained(str(folder), variant=variant, max_shard_size=max_shard_size)
        for path in folder.rglob("*.safetensors"):
            make_readable(path)
        self.settings.save(folder)
        name = repo_id or folder.resolve().name
        if not (folder / CARD).exists():
            (folder / CARD).write_text(self._card(name), encoding="utf-8")
        if push_to_hub:
            _upload(folder, name, **hub)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
    ) -> str:
        """Save to a repository of the Hugging Face Hub, with a card that tells how to open it. Returns its URL."""
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / "model"
            self.save_pretrained(place, safe_serialization, variant)
            (place / CARD).write_text(self._card(repo_id), encoding="utf-8")
            return _upload(
                place, repo_id, commit_message=commit_message, private=private, token=token, create_pr=create_pr
            )

    def _card(self, name: str) -> str:
        """The card of this model, with what the card of the one that it was opened from says."""
        place = getattr(self.config, "_name_or_path", None)
        base = None if place is None else str(place)
        facts: dict[str, Any] = {}
        if base is not None and Path(base).is_dir():
            facts, base = card_facts(Path(base)), Path(base).resolve().name
        kind = "text-to-video" if self.capabilities.video else "text-to-image"
        return pipeline_card(name, kind, base, facts)

    @property
    def settings(self) -> CheckpointSettings:
        """The settings of the checkpoint besides its weights. They are one of the `components`."""
        return self._settings

    @settings.setter
    def settings(self, settings: CheckpointSettings) -> None:
        self._settings = replace(settings, noise=settings.noise or TrainedNoise.of(self.scheduler))
        self.register_to_config(settings=settings.as_json())  # for diffusers' own ways to open and copy pipelines

    @property
    def components(self) -> dict[str, Any]:
        """The parts and settings, from which `NovaPipeline(**pipe.components)` makes another pipeline."""
        return {**super().components, "settings": self.settings}

    @property
    def defaults(self) -> Defaults:
        """The default values of a call, which None stands for."""
        return self.settings.defaults

    @property
    def capabilities(self) -> Capabilities:
        """The abilities of the checkpoint, against which requests are checked."""
        return self._parts().capabilities

    @property
    def trained_noise(self) -> TrainedNoise:
        """The noise schedule that the weights were trained with, whatever scheduler is there now."""
        return self._parts().trained_noise

    def _parts(self, stopwatch: Stopwatch | None = None) -> Parts:
        """The parts and settings of a call that begins now."""
        name = getattr(self.config, "_name_or_path", None)
        return Parts(
            self.transformer,
            self.scheduler,
            self.vae,
            self.text_encoder,
            self.tokenizer,
            self._named_encoder,
            self.settings,
            self.engines,
            name,
            stopwatch,
        )

    def enable_vae_slicing(self) -> None:
        """Decode one picture or clip at a time."""
        self.require_vae("slicing").enable_slicing()

    def disable_vae_slicing(self) -> None:
        self.require_vae("slicing").disable_slicing()

    def enable_vae_tiling(self) -> None:
        """Decode large frames in overlapping tiles."""
        self.require_vae("tiling").enable_tiling()

    def disable_vae_tiling(self) -> None:
        self.require_vae("tiling").disable_tiling()

    def enable_group_offload(
        self,
        onload_device: torch.device,
        *options: Any,
        exclude_modules: str | list[str] | None = None,
        **named: Any,
    ) -> None:
        """diffusers' group offload, for the text encoder: transformer and autoencoder stay whole on the device.

        Their calls are no `forward`, where that offload brings weights. `low_memory` lets them take turns.
        """
        excluded = [exclude_modules] if isinstance(exclude_modules, str) else list(exclude_modules or ())
        excluded += [name for name in ("transformer", "vae") if name not in excluded]
        super().enable_group_offload(onload_device, *options, exclude_modules=excluded, **named)

    def enable_attention_slicing(self, slice_size: str | int | None = "auto") -> None:
        """Nothing, and says so: attention is computed without ever holding a whole matrix of scores."""
        log.warning(
            "enable_attention_slicing changes nothing: attention never holds its scores as a whole here;"
            " low_memory=True in from_pretrained is for small GPUs"
        )

    def enable_xformers_memory_efficient_attention(self, attention_op: Any = None) -> None:
        """Nothing, and says so: torch's own attention, which is used here, is memory efficient."""
        log.warning("enable_xformers_memory_efficient_attention changes nothing: torch's own attention is used")

    # Calls --------------------------------------------------------------------------------------------------------

    def __call__(
        self,
        prompt: Prompt | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        image: Picture | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: float | None = None,
        fps: float | None = None,
        num_inference_steps: int | None = None,
        num_diffusion_steps: int | None = None,
        guidance_scale: Number | None = None,
        *,
        video: Video | None = None,
        generator: Generators | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = None,
        disable_progress_bar: bool = False,
        **options: Any,
    ) -> Any:
        """Generate. `options` are the other settings of `GenerateRequest`; None is the checkpoint's default.

        `num_inference_steps` counts sets of tokens, as `sets` does, and `num_diffusion_steps` the denoising steps of a
        set, as `diffusion_steps` does. `generator` is one for the call or one for each picture, which then has random
        numbers that do not depend on its neighbours: it is the picture that it is alone, but for rounding, which
        depends on the size of the batch. With `return_dict=False` the result is a tuple that begins with the images or
        frames; otherwise it is a `GenerateResult`.
        """
        named: dict[str, Any] = {
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "image": image,
            "video": video,
            "height": height,
            "width": width,
            "num_frames": num_frames,
            "fps": fps,
            "num_inference_steps": num_inference_steps,
            "num_diffusion_steps": num_diffusion_steps,
            "guidance_scale": guidance_scale,
            "output_type": output_type,
        }
        refuse_keywords("the pipeline", options, CALL_HINTS, CALL_KEYWORDS)
        callback = _with_tensors(callback_on_step_end, callback_on_step_end_tensor_inputs)
        result = self.start(GenerateRequest(**named, **options), generator).run(
            callback, show_progress=not disable_progress_bar
        )
        return result if return_dict else result.to_tuple()

    def stream(
        self,
        prompt: Prompt | None = None,
        *,
        preview: bool = False,
        generator: Generators | None = None,
        callback_on_step_end: StepCallback | None = None,
        **options: Any,
    ) -> Iterator[Any]:
        """Generate, one frame at a time: takes the call's arguments, yields the call's frames as they become final.

        A frame is in the form of `output_type`: for one clip a PIL image, (H, W, 3), (3, H, W) or a latent frame
        (C, h, w); for several, one entry a clip. With `preview`, the events of `generation.py`: also every latent frame
        decoded alone as soon as it exists, and the frame in hand as it fills in. `num_frames=math.inf` goes on without
        end. Closing the iterator, as leaving a loop over it does, stops.
        """
        refuse_keywords("stream", options, CALL_HINTS, keywords_of(GenerateRequest))
        return self.start(GenerateRequest(prompt, **options), generator).stream(preview, callback_on_step_end)

    def generate(
        self,
        request: GenerateRequest,
        generator: Generators | None = None,
        callback_on_step_end: StepCallback | None = None,
    ) -> GenerateResult:
        """Carry out one request. Without a generator the request's seed makes one, or a new seed does."""
        return self.start(request, generator).run(callback_on_step_end)

    @torch.no_grad()
    def start(
        self,
        request: GenerateRequest,
        generator: Generators | None = None,
        stopwatch: Stopwatch | None = None,
    ) -> Generation:
        """A request with its text and given frames encoded and nothing sampled yet: to run, stream or save.

        `stopwatch` times the call by its parts.
        """
        parts = self._parts(stopwatch)
        parts.request_scheduler(request.flow_shift)  # errors come before any work
        plan = request.resolve(self.defaults, parts.capabilities)
        if plan.fp8:
            check_fp8(parts.device, parts.dtype)
        if request.given_clips:
            parts.require_vae("an image" if request.image is not None else "a clip in pixels")
        elif request.output_type != "latent":
            vae = adapt(parts.require_vae(f"output_type {request.output_type!r}"))
            if plan.num_frames is None and vae.decodes_whole_clips:
                raise InputError(
                    f"num_frames is inf, and {type(self.vae).__name__} decodes whole clips: expected a number of frames"
                )
        generators = self._generators(request, generator, plan.batch)
        unknown = parts.unknown_words(request.prompts or [], request.negative_prompts or [], plan)
        if unknown:
            lines = (line if line.endswith("?") else f"{line}." for line in unknown)
            log.warning("%s %s", " ".join(lines), HINT)
        try:
            random = RandomState(generators, parts.device, parts.dtype)
            with span(stopwatch, "text"):
                texts, negatives = prompt_features(parts, request, plan)
            given, pixels = given_frames(parts, request, plan, random)
            bring(self.transformer)
            state = SamplingState.create(
                self.transformer,
                segments_of(parts, request, plan, texts, negatives),
                num_frames=plan.latent_frames,
                grid=plan.grid,
                num_sets=plan.sets,
                num_diffusion_steps=plan.diffusion_steps,
                random=random,
                passes=plan.passes,
                context=plan.context,
                speed=plan,
                given=given,
                order_rule=plan.order_rule,
            )
        except BaseException:
            self.maybe_free_model_hooks()
            raise
        if request.sets is not None and request.sets > state.num_tokens:
            log.warning(
                "num_inference_steps (sets) is %d, and a frame has %d tokens: each is made in %d sets",
                request.sets,
                state.num_tokens,
                len(state.sizes_of(state.num_tokens)),
            )
        progress = Progress(
            plan,
            state,
            output_type=request.output_type,
            unbatched=plan.batch == 1 and request.is_single,
            seeds=tuple(g.initial_seed() for g in generators),
            given=pixels,
        )
        generation = Generation(progress, parts, self._surroundings(), unknown)
        generation.records = make_records(request, generation)
        return generation

    def resume(self, path: str | Path, *, order: Any = None, guidance: Any = None) -> Generation:
        """Take up what `Generation.save` wrote, to run or stream on: the result is that of never having stopped.

        An order or a rule of guidance of the user's own is given again: the file holds its name alone.
        """
        parts, own = self._parts(), {"order": order, "guidance_rule": guidance}
        return Generation(load_progress(parts, Path(path), own), parts, self._surroundings())

    def _surroundings(self) -> Surroundings:
        return Surroundings(self, self.progress_bar, self.maybe_free_model_hooks, self._interrupts)

    def _generators(self, request: GenerateRequest, generator: Generators | None, batch: int) -> list[torch.Generator]:
        if generator is None:
            seed = int(torch.randint(2**63 - 1, ())) if request.seed is None else request.seed
            return [torch.Generator(self.execution_device).manual_seed(seed)]
        if isinstance(generator, torch.Generator):
            return [generator]
        generators = list(generator) if isinstance(generator, Sequence) else []
        if len(generators) not in (1, batch) or not all(isinstance(g, torch.Generator) for g in generators):
            got = f"a list of {len(generators)}" if isinstance(generator, Sequence) else shown(generator)
            raise InputError(f"generator: got {got}: expected one, or {batch}, one a picture")
        return generators

    # What a callback reads off the pipeline: of its own call, which is that of its thread -----------------------------

    @property
    def guidance_scale(self) -> float:
        """Within a callback that of its call, now; elsewhere the checkpoint's default. Of a rule of the user's own: the
        number of its passes."""
        if (call := CALLING.get()) is None:
            return self.defaults.guidance_scale
        frame = call.state.done if call.state.open is not None else max(0, call.state.done - 1)
        rule = call.state.segments[call.state.segment_at(frame)].guidance
        return rule.scale if isinstance(rule, Guidance) else float(rule.passes)

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self.guidance_scale > 1

    @property
    def num_timesteps(self) -> int | None:
        """Calls of the callback in its whole call, one a set; None elsewhere, and for clips without end."""
        call = CALLING.get()
        return None if call is None else call.total_steps

    @property
    def interrupt(self) -> bool:
        """True if the call of this callback is to stop."""
        call = CALLING.get()
        return call is not None and call.interrupted

    @property
    def _interrupt(self) -> bool:
        return self.interrupt

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:
        """Stops calls, as in diffusers: in a callback that call, elsewhere all running calls of this pipeline."""
        if not value:
            return
        if (call := CALLING.get()) is not None:
            call.interrupt()
        else:
            self._interrupts.interrupt()

    # Speed --------------------------------------------------------------------------------------------------------

    def drop_graphs(self) -> None:
        """Drop captured graphs and their memory; compiled code stays."""
        self.engines.drop_graphs()

    def release(self) -> None:
        """Drop captured graphs, compiled code and their memory; the next call makes them anew.

        Compiled code is dropped by `torch.compiler.reset`, for the whole process.
        """
        self.engines.release()

    def weights_changed(self) -> None:
        self.engines.drop_copies()

    # Text ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: str | Sequence[str],
        device: torch.device | str | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | Sequence[str] | None = None,
        **others: Any,
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        """`prompt_embeds` and `negative_prompt_embeds` for a call: features (tokens, width) of each sentence.

        With `num_images_per_prompt` each is repeated in place; calls do that too, so give it to one of the two. A
        single negative stays one, for all prompts. Without guidance the second is None. `device` is the pipeline's.
        """
        known = inspect.signature(self.encode_prompt).parameters
        refuse_keywords(
            "encode_prompt", [name for name, value in others.items() if value is not None], ENCODE_HINTS, known
        )
        own = self.execution_device
        if device is not None and not _is_device(device, own):
            raise InputError(f"device is {shown(device)}: expected {own}, where the pipeline is, or None")
        request = GenerateRequest(
            prompt=prompt, negative_prompt=negative_prompt, num_images_per_prompt=num_images_per_prompt
        )
        texts = [text for timeline in request.prompts or [] for text in timeline.values]
        negatives = (request.negative_prompts or [""]) if do_classifier_free_guidance else []
        try:
            encoded = encode_prompts(self._parts(), list(dict.fromkeys([*texts, *negatives])))
        finally:
            self.maybe_free_model_hooks()
        repeats = 1 if len(negatives) == 1 else num_images_per_prompt
        features = [encoded[text] for text in texts for _ in range(num_images_per_prompt)]
        return features, [encoded[text] for text in negatives for _ in range(repeats)] or None

    # Parts --------------------------------------------------------------------------------------------------------

    def decode_picture(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) of one frame by itself -> pixels (B, 3, H, W) in [-1, 1]."""
        return self._parts().decode_picture(latents)

    def require_vae(self, what: str) -> Any:
        """The autoencoder; InputError if there is none."""
        return self._parts().require_vae(what)

    @property
    def is_offloaded(self) -> bool:
        """True if parts take turns on the device."""
        return self._parts().is_offloaded

    @property
    def execution_device(self) -> torch.device:
        """Where calls compute: under CPU offload not where the parts are."""
        return execution_device(self.transformer)


_call = inspect.signature(NovaPipeline.__call__).parameters
CALL_KEYWORDS = [name for name in (*_call, *keywords_of(GenerateRequest)) if name not in ("self", "options")]
NovaPipeline.__call__.__signature__ = with_settings(NovaPipeline.__call__, GenerateRequest)  # type: ignore[attr-defined]

# diffusers' own `from_pretrained` takes only the parameters without a default for parts, and ignores a part given for
# another one. The signature that it reads therefore shows no default for the optional parts; Python uses them still.
_signature = inspect.signature(NovaPipeline.__init__)
NovaPipeline.__init__.__signature__ = _signature.replace(  # type: ignore[attr-defined]
    parameters=[
        parameter.replace(default=parameter.empty) if name in NovaPipeline._optional_components else parameter
        for name, parameter in _signature.parameters.items()
    ]
)


def _with_tensors(callback: StepCallback | None, names: Sequence[str] | None) -> StepCallback | None:
    """The callback with those tensors alone that it wants; None: all."""
    if callback is not None and not callable(callback):
        raise InputError(f"callback_on_step_end is {callback!r}: expected a function of (pipe, step, frame, tensors)")
    if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
        names = callback.tensor_inputs
    if unknown := [name for name in names or () if name not in STEP_TENSORS]:
        expected = " and ".join(STEP_TENSORS)
        raise InputError(f"callback_on_step_end_tensor_inputs has {unknown[0]!r}: expected of {expected}")
    if callback is None or names is None:
        return callback

    def chosen(pipe: NovaPipeline, step: int, frame: int, tensors: dict[str, Tensor]) -> object:
        return callback(pipe, step, frame, {name: tensors[name] for name in names})

    return chosen


def _upload(folder: Path, repo_id: str, *, create_pr: bool = False, **options: Any) -> str:
    """A folder to a repository of the Hub, which is made if need be; its URL."""
    told = {name: value for name, value in options.items() if value is not None}
    message = told.pop("commit_message", "Upload NovaPipeline")
    repo_id = huggingface_hub.create_repo(repo_id, exist_ok=True, **told).repo_id
    commit = huggingface_hub.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message=message,
        create_pr=create_pr,
        token=told.get("token"),
    )
    return str(commit)


def _device_of(device_map: object, name: str = "device_map") -> torch.device:
    """The one device that the argument `name` names; strategies that spread parts over several are refused."""
    if isinstance(device_map, str | torch.device) and device_map not in ("auto", "balanced", "balanced_low_0"):
        try:
            device = torch.device(device_map)
        except RuntimeError:
            raise InputError(f"{name} is {device_map!r}: expected a device such as 'cuda'") from None
        return choose_device(str(device))
    raise InputError(
        f"{name} is {device_map!r}: expected one device such as 'cuda'; parts are not spread over several, and"
        " low_memory=True lets them take turns on a small GPU"
    )


def _is_device(device: Any, own: torch.device) -> bool:
    """True if a device, or a name of one, is `own`."""
    try:
        asked = torch.device(device)
    except (RuntimeError, TypeError):
        return False
    return asked.type == own.type and asked.index in (None, own.index or 0)


def _check_dtypes(dtypes: Any) -> Dtypes:
    for dtype in dtypes.values() if isinstance(dtypes, dict) else [dtypes]:
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise InputError(f"torch_dtype is {dtype!r}: expected a dtype such as torch.float16, or a dict of them")
    checked: Dtypes = dtypes
    return checked


def _dtype_of(part: str, torch_dtype: Dtypes) -> torch.dtype | None:
    if isinstance(torch_dtype, dict):
        return torch_dtype.get(part, torch_dtype.get("default"))
    return torch_dtype


# diffusers finds the class of a saved pipeline by name among its own: here it learns of this one. Its generic ways in,
# `DiffusionPipeline.from_pretrained` and the Auto classes, then work once this package is imported.
register("nova", NovaPipeline)
