"""Arguments that `NovaPipeline` does not take, and what to write instead.

Scripts for the released code and for diffusers' other pipelines give arguments that this pipeline has no use for. Each
call refuses them here with the way to get the same; any other unknown name gets the nearest one that exists.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from nova_video.common.errors import InputError
from nova_video.common.option_fields import aliases_of

OPEN_HINTS = {
    "custom_pipeline": "none: no code of a checkpoint is ever run",
    "custom_revision": "none: no code of a checkpoint is ever run",
    "quantization_config": "fp8=True in calls, or low_memory=LowMemory(text_encoder='int8')",
    "device": "device_map, or pipe.to(device)",
    "max_memory": "low_memory, by which the parts take turns on a GPU",
    "offload_folder": "low_memory, by which the parts take turns on a GPU",
    "offload_state_dict": "low_memory, by which the parts take turns on a GPU",
    "output_loading_info": "none: a weight that is missing or extra is an error",
    "proxies": "the environment variable HTTPS_PROXY",
    "subfolder": "the folder's path with it",
}
"""For `NovaPipeline.from_pretrained`."""

CALL_HINTS = {
    "max_latent_length": "num_frames, in pixel frames: num_frames = 4 (n - 1) + 1 for n latent frames",
    "latents": "generator for a fixed start, or video with the latents of a clip to go on from",
    "guidance": "guidance_scale for its strength, guidance_rule for a rule of your own",
    "guidance_rescale": "guidance_renorm, which scales the guided prediction to the conditional one's norm",
    "timesteps": "diffusion_steps: the scheduler has timesteps of its own",
    "sigmas": "diffusion_steps and flow_shift: the scheduler has sigmas of its own",
    "eta": "a scheduler that adds noise, such as DDPMScheduler",
    "steps": "sets for sets of tokens, diffusion_steps for the denoising steps of a set",
    "num_steps": "sets for sets of tokens, diffusion_steps for the denoising steps of a set",
    "cross_attention_kwargs": "set_adapters, for the scales of adapters",
    "joint_attention_kwargs": "set_adapters, for the scales of adapters",
    "attention_kwargs": "set_adapters, for the scales of adapters",
    "callback": "callback_on_step_end, which is called after every set",
    "callback_steps": "callback_on_step_end, which is called after every set",
    "decode_chunk_size": "pipe.enable_vae_slicing(): clips are decoded in pieces in any case",
    "prompt_2": "prompt: there is one text encoder",
    "clip_skip": "prompt_embeds, with features of your own",
    "max_sequence_length": "none: prompts have as many tokens as the model was trained with",
    "spatiotemporal_guidance_scale": "image_guidance_scale; in the released code this one has no effect",
}
"""For calls of the pipeline."""

ENCODE_HINTS = {
    "prompt_2": CALL_HINTS["prompt_2"],
    "clip_skip": CALL_HINTS["clip_skip"],
    "max_sequence_length": CALL_HINTS["max_sequence_length"],
    "prompt_embeds": "it in the call of the pipeline, where it stands for prompt",
    "negative_prompt_embeds": "it in the call of the pipeline, where it stands for negative_prompt",
    "num_videos_per_prompt": "num_images_per_prompt",
    "lora_scale": "set_adapters, for the scales of adapters",
    "dtype": "none: features have the text encoder's dtype",
}
"""For `NovaPipeline.encode_prompt`."""

LOAD_LORA_HINTS = {
    "hotswap": "unload_lora_weights before it, or set_adapters",
    "use_safetensors": "a safetensors file: pickles are never read",
    "prefix": "none: the names in the file tell it",
    "proxies": "the environment variable HTTPS_PROXY",
    "adapter_weights": "scale",
    "lora_scale": "scale",
    "network_alphas": "none: alphas are read from the file",
}
"""For `load_lora_weights`."""

SAVE_LORA_HINTS = {
    "transformer_lora_layers": "adapter_name: an adapter that is loaded is what is written",
    "transformer_lora_adapter_metadata": "adapter_name: an adapter that is loaded is written with its own settings",
    "weight_name": "none: the file is pytorch_lora_weights.safetensors",
    "safe_serialization": "none: a safetensors file is always written",
}
"""For `save_lora_weights`."""


def keywords_of(record: type[Any]) -> list[str]:
    """Every keyword that a record is made with: its fields and the aliases of its options."""
    return [*(each.name for each in fields(record)), *aliases_of(record)]


def with_settings(function: Callable[..., Any], record: type[Any]) -> inspect.Signature:
    """The signature of a function with the fields of a record in place of its `**options`."""
    signature = inspect.signature(function)
    own = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
    more = [
        inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=each.type)
        for each in fields(record)
        if each.name not in signature.parameters
    ]
    return signature.replace(parameters=[*own, *more])


def refuse_keywords(call: str, given: Iterable[str], hints: Mapping[str, str], known: Iterable[str]) -> None:
    """Raise InputError for the first given keyword that is not known, with what to give in its place."""
    known = list(known)
    for name in given:
        if name in known:
            continue
        near = get_close_matches(name, known, n=1)
        expected = hints.get(name) or (near[0] if near else "one of its arguments, which help(...) lists")
        raise InputError(f"{name} is no argument of {call}: expected {expected}")
