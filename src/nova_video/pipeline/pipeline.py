"""`NovaPipeline`, the one public object: a request in, pictures or clips out.

It holds a checkpoint's parts and nothing of any call: everything a call needs is a `Generation` made for it, so that
threads can share a pipeline and a call that fails leaves nothing behind. `start` prepares one in the order of the work:
resolve, encode the text, encode what is given; `generation.py` samples and decodes.

Legend: B pictures or clips of the call, F latent frames, h w latent grid, H W pixels, C latent channels, T text tokens.
"""

import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nova_video.autoencoders import adapt
from nova_video.common.checks import quote
from nova_video.common.errors import InputError
from nova_video.common.fair_lock import FairLock
from nova_video.common.fast_parts import require_fast
from nova_video.common.option_fields import Number
from nova_video.model import NOVATransformer3DModel
from nova_video.pipeline.adapters import AdapterMixin
from nova_video.pipeline.call_parts import Parts
from nova_video.pipeline.conditions import encode_prompts, segments_of, sentences_of
from nova_video.pipeline.engines import Engines
from nova_video.pipeline.generation import CURRENT, Generation, Interrupts, StepCallback, Surroundings, with_tensors
from nova_video.pipeline.given import given_frames
from nova_video.pipeline.keywords import (
    CALL_HINTS,
    ENCODE_HINTS,
    keywords_of,
    refuse_keywords,
    with_settings,
)
from nova_video.pipeline.loading import check_layout, check_parts
from nova_video.pipeline.memory import MemoryMixin
from nova_video.pipeline.offload import bring, execution_device
from nova_video.pipeline.own_parts import CHECKS
from nova_video.pipeline.plan import Capabilities
from nova_video.pipeline.progress import RequestProgress
from nova_video.pipeline.record import make_records
from nova_video.pipeline.registration import register
from nova_video.pipeline.request import GenerateRequest, OutputType, Picture, Prompt, Video
from nova_video.pipeline.result import GenerateResult
from nova_video.pipeline.saving import load_progress
from nova_video.pipeline.settings import CheckpointSettings, Defaults
from nova_video.pipeline.storage import StorageMixin
from nova_video.sampling.guidance import Guidance
from nova_video.sampling.random import Generators, RandomState, make_generators
from nova_video.sampling.schedulers import TrainedNoise
from nova_video.sampling.state import SamplingState
from nova_video.sampling.stopwatch import Stopwatch, span
from nova_video.text.load import NamedTextEncoder
from nova_video.text.vocabulary import warn_of_words

log = logging.getLogger(__name__)


class NovaPipeline(AdapterMixin, MemoryMixin, StorageMixin):
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
        self._turns = FairLock()

    # Settings -----------------------------------------------------------------------------------------------------

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
        callback = with_tensors(callback_on_step_end, callback_on_step_end_tensor_inputs)
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
            require_fast("fp8", "fp8").check_fp8(parts.device, parts.dtype)
        if request.given_clips:
            parts.require_vae("an image" if request.image is not None else "a clip in pixels")
        elif request.output_type != "latent":
            vae = adapt(parts.require_vae(f"output_type {request.output_type!r}"))
            if plan.num_frames is None and vae.decodes_whole_clips:
                raise InputError(
                    f"num_frames is inf, and {type(self.vae).__name__} decodes whole clips: expected a number of frames"
                )
        generators = make_generators(generator, request.seed, plan.batch, parts.device)
        unknown = parts.unknown_words(request.prompts or [], request.negative_prompts or [], plan)
        warn_of_words(unknown)
        random = RandomState(generators, parts.device, parts.dtype)
        with self._turns if parts.is_offloaded else nullcontext():
            try:
                with span(stopwatch, "text"):
                    sentences = sentences_of(parts, request, plan)
                given, pixels = given_frames(parts, request, plan, random)
                bring(self.transformer)
                state = SamplingState.create(
                    self.transformer,
                    segments_of(parts, plan, sentences),
                    **plan.sampling,
                    random=random,
                    passes=plan.passes,
                    given=given,
                )
            except BaseException:
                self.maybe_free_model_hooks()
                raise
        if request.sets is not None and request.sets > state.num_tokens:
            log.warning(
                "sets is %d, and a frame has %d tokens: each is made in %d sets",
                request.sets,
                state.num_tokens,
                len(state.sizes_of(state.num_tokens)),
            )
        progress = RequestProgress(
            plan,
            state,
            output_type=request.output_type,
            unbatched=plan.batch == 1 and request.is_single,
            seeds=tuple(g.initial_seed() for g in generators),
            sentences=sentences,
            given=pixels,
        )
        generation = Generation(progress, parts, self._surroundings(), unknown)
        generation.records = make_records(request, generation)
        return generation

    def resume(self, path: str | Path, **own_parts: Any) -> Generation:
        """Take up what `Generation.save` wrote, to run or stream on: the result is that of never having stopped.

        An `order` or `guidance_rule` of the user's own is given again: the file holds its name alone.
        """
        refuse_keywords("resume", [name for name in own_parts if name not in CHECKS], {}, CHECKS)
        parts = self._parts()
        return Generation(load_progress(parts, Path(path), own_parts), parts, self._surroundings())

    def _surroundings(self) -> Surroundings:
        return Surroundings(self, self.progress_bar, self.maybe_free_model_hooks, self._interrupts, self._turns)

    # For callbacks: about the call of this thread -------------------------------------------------------------------

    @property
    def guidance_scale(self) -> float:
        """The scale of a callback's own call, now; elsewhere the checkpoint's default.

        For a guidance rule of the user's own it is the number of passes.
        """
        if (call := CURRENT.get()) is None:
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
        call = CURRENT.get()
        return None if call is None else call.total_steps

    @property
    def interrupt(self) -> bool:
        """True if the call of this callback is to stop."""
        call = CURRENT.get()
        return call is not None and call.interrupted

    @property
    def _interrupt(self) -> bool:
        return self.interrupt

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:
        """Stops calls, as in diffusers: in a callback that call, elsewhere all running calls of this pipeline."""
        if not value:
            return
        if (call := CURRENT.get()) is not None:
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
            raise InputError(f"device is {quote(device)}: expected {own}, where the pipeline is, or None")
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


def _is_device(device: Any, own: torch.device) -> bool:
    """True if a device, or a name of one, is `own`."""
    try:
        asked = torch.device(device)
    except (RuntimeError, TypeError):
        return False
    return asked.type == own.type and asked.index in (None, own.index or 0)


# diffusers finds the class of a saved pipeline by name among its own: here it learns of this one. Its generic ways in,
# `DiffusionPipeline.from_pretrained` and the Auto classes, then work once this package is imported.
register("nova", NovaPipeline)
