"""`NovaPipeline`, the one public object: a request in, pictures or clips out.

It holds a checkpoint's parts and nothing of any call: everything a call needs is a `SamplingState` made for it, so that
threads can share a pipeline and a call that fails leaves nothing behind. The order of `generate` is the order of the
work: resolve, encode what is given, sample set by set, decode.

Legend: B pictures or clips of the call, F latent frames, h w latent grid, H W pixels, C latent channels, T text tokens.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.hooks import CpuOffload
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nova_video.autoencoders import scale_latents, unscale_latents
from nova_video.errors import InputError
from nova_video.loading import (
    load_autoencoder,
    load_scheduler,
    load_text_parts,
    load_transformer,
    resolve_checkpoint,
)
from nova_video.model import NOVATransformer3DModel, unpatchify
from nova_video.pixels import image_to_pixels, pixels_to_output
from nova_video.request import Capabilities, CheckpointSettings, Defaults, GenerateRequest, Plan
from nova_video.sampling.diffusion import request_scheduler
from nova_video.sampling.generate import SetDone, generate_sets
from nova_video.sampling.random import RandomState
from nova_video.sampling.state import SamplingState
from nova_video.text.encoders import encode_batch, load_text_encoder

StepCallback = Callable[["NovaPipeline", int, int, dict[str, Tensor]], object]
"""(pipe, step, frame, tensors) after every set; returning False stops. `step` counts the sets of the whole call,
`frame` is the latent frame, and tensors are `latents` (B, C, h, w), zero where nothing is revealed yet, and `revealed`,
(B, h / 2, w / 2) bool."""

Generators = torch.Generator | Sequence[torch.Generator]

_ENCODER_LOADING = threading.Lock()  # two threads that share a pipeline load its named text encoder once


@dataclass
class GenerateResult(BaseOutput):
    """What a call made: `images` for one frame, `frames` otherwise, one entry a picture or clip, prompts in order."""

    images: Any = None
    frames: Any = None
    fps: float | None = None
    """Rate the clips are meant to be shown at."""
    seeds: tuple[int, ...] = ()
    """Of the generator, or of each picture's own."""
    stopped: bool = False
    """The callback ended the call early: here are the finished frames or, without any, the first as far as it got."""


class NovaPipeline(DiffusionPipeline):
    """Text, and optionally a first picture, to images and video."""

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
        settings: CheckpointSettings | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer, scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer
        )
        if vae is not None and vae.config.latent_channels != transformer.config.image_dim:
            raise InputError(
                f"vae has {vae.config.latent_channels} latent channels: expected the transformer's "
                f"{transformer.config.image_dim}"
            )
        self.settings = settings or CheckpointSettings()
        self._named_text_parts: tuple[PreTrainedTokenizerBase, PreTrainedModel] | None = None

    # Opening and saving -------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        torch_dtype: torch.dtype | dict[str, torch.dtype] | None = None,
        *,
        revision: str | None = None,
        token: str | None = None,
        local_files_only: bool = False,
    ) -> "NovaPipeline":
        """Open "emoji" (the model in the box), a local folder or a hub id; only its component folders count.

        As in diffusers, weights become float32 unless `torch_dtype` says otherwise, for all parts or by name
        ({"transformer": torch.bfloat16, "default": torch.float32}).
        """
        folder = resolve_checkpoint(
            pretrained_model_name_or_path, revision=revision, token=token, local_files_only=local_files_only
        )
        settings = CheckpointSettings.load(folder)
        scheduler = load_scheduler(folder)
        transformer = load_transformer(folder, _dtype_of("transformer", torch_dtype))
        vae = load_autoencoder(folder, _dtype_of("vae", torch_dtype))
        text_encoder, tokenizer = load_text_parts(folder, _dtype_of("text_encoder", torch_dtype))
        pipe = cls(transformer, scheduler, vae, text_encoder, tokenizer, settings)
        pipe.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        return pipe

    def save_pretrained(
        self, save_directory: str | Path, variant: str | None = None, max_shard_size: int | str | None = None
    ) -> None:
        """Write every part as safetensors, and `nova.json`: a folder that `from_pretrained` opens."""
        super().save_pretrained(str(save_directory), variant=variant, max_shard_size=max_shard_size)
        self.settings.save(Path(save_directory))

    @property
    def defaults(self) -> Defaults:
        """What None means in a call."""
        return self.settings.defaults

    @property
    def capabilities(self) -> Capabilities:
        """What requests are checked against."""
        config = self.transformer.config
        video = self.transformer.has_motion
        stride = (4 if video else 1) if self.vae is None else getattr(self.vae, "temporal_stride", 1)
        return Capabilities(
            image_size=(config.image_size[0], config.image_size[1]),
            image_stride=config.image_stride,
            any_size=config.rotary_pos_embed,
            video=video,
            temporal_stride=stride,
            text_dim=config.text_token_dim,
            text_len=config.text_token_len,
            shiftable=isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler),
            max_diffusion_steps=self.scheduler.config.num_train_timesteps,
        )

    def enable_vae_slicing(self) -> None:
        """Decode one picture or clip at a time."""
        self._require_vae("slicing").enable_slicing()

    def disable_vae_slicing(self) -> None:
        self._require_vae("slicing").disable_slicing()

    def enable_vae_tiling(self) -> None:
        """Decode large frames in overlapping tiles."""
        self._require_vae("tiling").enable_tiling()

    def disable_vae_tiling(self) -> None:
        self._require_vae("tiling").disable_tiling()

    # One call -----------------------------------------------------------------------------------------------------

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        image: Image.Image | np.ndarray | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        fps: float | None = None,
        num_inference_steps: int | None = None,
        num_diffusion_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_trunc: float = 0.0,
        guidance_renorm: float = 1.0,
        image_guidance_scale: float = 0.0,
        motion_flow: float | None = None,
        flow_shift: float | None = None,
        num_images_per_prompt: int = 1,
        generator: Generators | None = None,
        prompt_embeds: Sequence[Tensor] | None = None,
        negative_prompt_embeds: Sequence[Tensor] | None = None,
        output_type: str = "pil",
        callback_on_step_end: StepCallback | None = None,
    ) -> GenerateResult:
        """Generate. The arguments are those of `GenerateRequest`, explained there; None is the checkpoint's default.

        `generator` is one for the call or one for each picture, which then does not depend on its neighbours.
        """
        request = GenerateRequest(
            prompt=prompt,
            negative_prompt=negative_prompt,
            image=image,
            height=height,
            width=width,
            num_frames=num_frames,
            fps=fps,
            num_inference_steps=num_inference_steps,
            num_diffusion_steps=num_diffusion_steps,
            guidance_scale=guidance_scale,
            guidance_trunc=guidance_trunc,
            guidance_renorm=guidance_renorm,
            image_guidance_scale=image_guidance_scale,
            motion_flow=motion_flow,
            flow_shift=flow_shift,
            num_images_per_prompt=num_images_per_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            output_type=output_type,
        )
        return self.generate(request, generator, callback_on_step_end)

    @torch.no_grad()
    def generate(
        self,
        request: GenerateRequest,
        generator: Generators | None = None,
        callback_on_step_end: StepCallback | None = None,
    ) -> GenerateResult:
        """Carry out one request. Without a generator the request's seed makes one, or a new seed does."""
        plan = request.resolve(self.defaults, self.capabilities)
        if request.image is not None or request.output_type != "latent":
            self._require_vae("an image" if request.image is not None else f"output_type {request.output_type!r}")
        scheduler = request_scheduler(self.scheduler, plan.flow_shift)
        generators = self._generators(request, generator, plan.batch)
        seeds = tuple(g.initial_seed() for g in generators)
        try:
            state = self._prepare(request, plan, generators)
            latents, stopped = self._sample(scheduler, state, callback_on_step_end)
            made = latents if request.output_type == "latent" else self._decode(latents, plan, request.output_type)
        finally:
            self.maybe_free_model_hooks()
        if plan.num_frames > 1:
            return GenerateResult(frames=made, fps=plan.fps, seeds=seeds, stopped=stopped)
        if request.output_type != "latent":
            made = made[:, 0] if isinstance(made, Tensor | np.ndarray) else [clip[0] for clip in made]
        return GenerateResult(images=made, fps=plan.fps, seeds=seeds, stopped=stopped)

    def _generators(self, request: GenerateRequest, generator: Generators | None, batch: int) -> list[torch.Generator]:
        if generator is None:
            seed = int(torch.randint(2**63 - 1, ())) if request.seed is None else request.seed
            return [torch.Generator(self._execution_device).manual_seed(seed)]
        if isinstance(generator, torch.Generator):
            return [generator]
        generators = list(generator)
        if len(generators) not in (1, batch) or not all(isinstance(g, torch.Generator) for g in generators):
            raise InputError(f"generator: got a list of {len(generators)}: expected one, or {batch}, one a picture")
        return generators

    def _prepare(self, request: GenerateRequest, plan: Plan, generators: list[torch.Generator]) -> SamplingState:
        """All that sampling needs, from what was given."""
        device, model = self._execution_device, self.transformer
        features = self._prompt_features(request, plan)  # prompts, then a negative each for every other pass
        random = RandomState(generators, device, model.dtype)
        given = [] if request.image is None else [self._encode_image(request.image, plan, random)]
        self._bring(model)
        lengths = torch.tensor([len(row) for row in features], device=device)
        padded = torch.nn.utils.rnn.pad_sequence(
            [row.to(device, model.dtype) for row in features], batch_first=True
        )  # (N * prompts, T', text_token_dim)
        motion = torch.full((len(features),), float(plan.motion_flow), device=device)
        fps = torch.full((len(features),), float(plan.fps), device=device)
        text = model.embed_condition(padded, lengths, motion, fps)  # (N * prompts, T, D)
        return SamplingState.create(
            model,
            text.repeat_interleave(request.num_images_per_prompt, dim=0),  # (N * B, T, D)
            num_frames=plan.latent_frames,
            grid=plan.grid,
            num_sets=plan.num_inference_steps,
            num_diffusion_steps=plan.num_diffusion_steps,
            guidance=plan.guidance,
            random=random,
            given=given,
        )

    def _sample(
        self, scheduler: Any, state: SamplingState, callback_on_step_end: StepCallback | None
    ) -> tuple[Tensor, bool]:
        """Latents (B, C, F, h, w) as the sampler has them, and whether the callback stopped before the end."""
        with self.progress_bar(total=state.total_steps) as bar:
            for done in generate_sets(self.transformer, scheduler, state):
                bar.update()
                if callback_on_step_end is None:
                    continue
                if callback_on_step_end(self, done.step, done.frame, self._shown(done, state.grid)) is False:
                    if not state.frames:  # nothing is whole yet: the first frame as far as it is
                        state.frames.append(self._shown(done, state.grid)["latents"])
                    break
        return state.latents(), state.step < state.total_steps

    def _shown(self, done: SetDone, grid: tuple[int, int]) -> dict[str, Tensor]:
        """The tensors of a callback."""
        patch = self.transformer.patch_size
        revealed = torch.zeros(done.tokens.shape[:2], dtype=torch.bool, device=done.tokens.device)
        revealed = revealed.scatter(1, done.ids, True).view(-1, grid[0] // patch, grid[1] // patch)
        return {"latents": unpatchify(done.tokens, patch, grid), "revealed": revealed}

    # Parts --------------------------------------------------------------------------------------------------------

    def _prompt_features(self, request: GenerateRequest, plan: Plan) -> list[Tensor]:
        """Features (tokens, width) of every prompt and, with guidance, of a negative for each, once a further pass."""
        count, others = request.num_prompts, plan.guidance.passes - 1
        prompts, negatives = request.prompts, request.negative_prompts
        if negatives is None and prompts is not None and request.negative_prompt_embeds is None:
            negatives = [""]
        if others == 0:
            negatives = None
        encoded = self._encode_text([*(prompts or []), *(negatives or [])])
        features = list(request.prompt_embeds or encoded[:count])
        if others == 0:
            return features
        if negatives is not None:
            null = encoded[len(encoded) - len(negatives) :]
        else:  # features of one's own, without negatives: the padding table alone
            null = list(request.negative_prompt_embeds or [features[0][:0]])
        return features + (null * count if len(null) == 1 else null) * others

    def _encode_text(self, texts: list[str]) -> list[Tensor]:
        if not texts:
            return []
        tokenizer, encoder = self._text_parts()
        config = self.transformer.config
        if encoder.config.hidden_size != config.text_token_dim:
            raise InputError(
                f"the text encoder's features are {encoder.config.hidden_size} wide: expected {config.text_token_dim}"
            )
        self._bring(encoder)
        features, lengths = encode_batch(tokenizer, encoder, texts, config.text_token_len, self._execution_device)
        return [row[:length] for row, length in zip(features, lengths.tolist(), strict=True)]

    def _text_parts(self) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
        """The checkpoint's own text encoder or the one its settings name, loaded when a call first needs it."""
        if self.text_encoder is not None and self.tokenizer is not None:
            return self.tokenizer, self.text_encoder
        name = self.settings.text_encoder
        if name is None:
            missing = "text_encoder/" if self.text_encoder is None else "tokenizer/"
            raise InputError(f"the checkpoint has no {missing}: expected prompt_embeds instead of a prompt")
        with _ENCODER_LOADING:
            if self._named_text_parts is None:
                self._named_text_parts = load_text_encoder(name, self.transformer.dtype)
            tokenizer, encoder = self._named_text_parts
            return tokenizer, encoder.to(self._execution_device)

    def _encode_image(self, image: Image.Image | np.ndarray, plan: Plan, random: RandomState) -> Tensor:
        """A picture as latent frame 0 (B, C, h, w), sampled from its posterior."""
        self._bring(self.vae)
        pixels = image_to_pixels(image, (plan.height, plan.width))  # (1, 3, H, W)
        posterior = self.vae.encode(pixels.to(random.device, self.vae.dtype)).latent_dist
        draws = len(random.generators)  # one sample for all clips, or one for each that has its own generator
        noise = random.normal(draws, *posterior.mean.shape[1:])
        latents = scale_latents(self.vae, posterior.mean + posterior.std * noise.to(posterior.mean.dtype))
        return latents.to(random.dtype).expand(plan.batch, -1, -1, -1)

    def _decode(self, latents: Tensor, plan: Plan, output_type: str) -> Any:
        """Latents (B, C, F, h, w) -> pictures, trimmed to the frames asked for."""
        self._bring(self.vae)
        z = unscale_latents(self.vae, latents.to(self.vae.dtype))
        if plan.latent_frames == 1:
            pixels = self.vae.decode(z.squeeze(2)).sample.unsqueeze(2)  # (B, 3, 1, H, W)
        else:
            pixels = self.vae.decode(z).sample  # (B, 3, F, H, W)
        return pixels_to_output(pixels[:, :, : plan.num_frames], output_type)

    def _require_vae(self, what: str) -> Any:
        if self.vae is None:
            raise InputError(
                f"the checkpoint has no vae/, which {what} needs: expected output_type 'latent' and no image"
            )
        return self.vae

    def _bring(self, module: torch.nn.Module) -> None:
        """Under CPU offload, move a part to its device: the library's hooks act on `forward` alone."""
        hook = getattr(module, "_hf_hook", None)
        if isinstance(hook, CpuOffload):
            hook.pre_forward(module)

    @property
    def _execution_device(self) -> torch.device:
        """Where calls compute: under CPU offload not where the parts are."""
        hook = getattr(self.transformer, "_hf_hook", None)
        return torch.device(hook.execution_device) if isinstance(hook, CpuOffload) else self.transformer.device


def _dtype_of(part: str, torch_dtype: torch.dtype | dict[str, torch.dtype] | None) -> torch.dtype | None:
    if isinstance(torch_dtype, dict):
        return torch_dtype.get(part, torch_dtype.get("default"))
    return torch_dtype
