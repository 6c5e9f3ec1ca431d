"""The pipeline's adapters (LoRA), under the names they have in diffusers' pipelines.

`load_lora_weights` puts one beside the transformer's weights, `fuse_lora` adds it to them, `unload_lora_weights` takes
it away; of several, `set_adapters` says which are used and how much. What is not here is the library's `LoraBaseMixin`.
"""

import inspect
import logging
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LoraBaseMixin

from nova_video.common.checks import LIMITS, check_number
from nova_video.common.errors import InputError, first_line
from nova_video.io.checkpoints import lasting_name
from nova_video.model import NOVATransformer3DModel
from nova_video.model.casting import is_cast
from nova_video.model.lora import (
    UnfusedLayer,
    adapted_layers,
    adapter_names,
    fuse,
    require_peft,
    unfuse,
)
from nova_video.pipeline.keywords import LOAD_LORA_HINTS, SAVE_LORA_HINTS, refuse_keywords
from nova_video.pipeline.lora_files import LORA_BASE, load_adapter, save_lora
from nova_video.pipeline.offload import takes_turns
from nova_video.pipeline.settings import CheckpointSettings

COMPONENTS = ("transformer",)
HUB = ("revision", "token", "cache_dir", "local_files_only", "force_download")
"""Arguments with which an adapter is fetched from the hub."""
HARMLESS: dict[str, tuple[object, ...]] = {
    "use_safetensors": (True, None),
    "low_cpu_mem_usage": (True, False, None),
    "hotswap": (False,),
    "prefix": (None, "transformer"),
}
"""Arguments of diffusers' `load_lora_weights` with the values that change nothing here."""

log = logging.getLogger(__name__)


class AdapterMixin(LoraBaseMixin):
    """A part of `NovaPipeline`. Not while one of its calls runs."""

    _lora_loadable_modules = ["transformer"]
    transformer: NOVATransformer3DModel
    config: Any
    settings: CheckpointSettings
    _unfused: dict[str, UnfusedLayer] | None = None
    """The weights before adapters were added to them; None: none is."""

    def load_lora_weights(
        self,
        pretrained_model_name_or_path: str | Path,
        weight_name: str | None = None,
        adapter_name: str | None = None,
        scale: float = 1.0,
        *,
        subfolder: str | None = None,
        **others: Any,
    ) -> str:
        """Put an adapter beside the transformer's weights and use it, alone; returns its name.

        A safetensors file, a folder with `weight_name` (default: pytorch_lora_weights.safetensors) or a hub id, for
        which `revision`, `token`, `cache_dir`, `local_files_only` and `force_download` are taken too. With `scale` 0 it
        changes nothing, with 1 it is as it was trained. `set_adapters` uses several together.
        """
        given: object = pretrained_model_name_or_path
        if not isinstance(given, str | Path):
            got = type(given).__name__
            raise InputError(f"pretrained_model_name_or_path is {got}: expected a file, a folder or a hub id")
        hub = {name: value for name, value in others.items() if name in HUB}
        refuse_keywords(
            "load_lora_weights",
            [name for name in others if name not in hub and others[name] not in HARMLESS.get(name, ())],
            LOAD_LORA_HINTS,
            (*inspect.signature(self.load_lora_weights).parameters, *HUB),
        )
        require_peft()
        check_number("the adapter's scale", scale, -LIMITS.scale, high=LIMITS.scale)
        self._expect_unfused("another is loaded")
        if is_cast(self.transformer):
            raise InputError("layerwise casting is on: expected adapters loaded and fused before it")
        names = adapter_names(self.transformer)
        if adapter_name in names:
            raise InputError(
                f"adapter_name is {adapter_name!r}, which is loaded: expected another, or it unloaded first"
            )
        adapter = load_adapter(pretrained_model_name_or_path, self.transformer, weight_name, subfolder, **hub)
        name = adapter_name or next(name for n in range(len(names) + 1) if (name := f"default_{n}") not in names)
        self._bring_home()
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several are what is meant
                self.transformer.load_lora_adapter(
                    adapter.tensors, prefix=None, adapter_name=name, metadata=adapter.settings
                )
        except Exception as error:  # of settings that peft does not expect: it raises many kinds
            reason = first_line(error.__cause__ or error)
            raise InputError(f"adapter {pretrained_model_name_or_path}: no LoRA that peft can make: {reason}") from None
        self.transformer.eval()
        self.transformer.set_adapters([name], [scale])
        self.settings = replace(self.settings, vocabulary=None)  # the adapter may know other words
        learned = (adapter.settings or {}).get(LORA_BASE)
        here = getattr(self.config, "_name_or_path", None)
        if learned and here and learned not in (here, lasting_name(here)):
            log.warning(
                "adapter %s was trained beside %s, and is used with %s", pretrained_model_name_or_path, learned, here
            )
        return name

    def unload_lora_weights(self) -> None:
        """Take all adapters away. What has been fused stays in the weights: `unfuse_lora` takes it out before."""
        self.transformer.unload_lora()
        self._unfused = None
        self._merged_adapters: set[str] = set()

    def save_lora_weights(self, save_directory: str | Path, adapter_name: str | None = None, **others: Any) -> Path:
        """Write an adapter that is loaded, as `load_lora_weights` opens it."""
        known = inspect.signature(self.save_lora_weights).parameters
        refuse_keywords("save_lora_weights", others, SAVE_LORA_HINTS, known)
        names = adapter_names(self.transformer)
        if not isinstance(adapter_name, str | None):
            raise InputError(f"adapter_name is {type(adapter_name).__name__}: expected one of {names}")
        if (adapter_name or (names[0] if len(names) == 1 else None)) not in names:
            raise InputError(f"adapter_name is {adapter_name!r}: expected one of {names}")
        return save_lora(self.transformer, Path(save_directory), adapter_name or names[0])

    def fuse_lora(
        self,
        components: Sequence[str] = COMPONENTS,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: list[str] | None = None,
    ) -> None:
        """Add the used adapters, or those named, to the weights: the same to rounding, at the model's own speed."""
        if list(components) != list(COMPONENTS):
            raise InputError(f"components is {list(components)}: expected {list(COMPONENTS)}")
        if next(adapted_layers(self.transformer), None) is None:
            raise InputError("no adapter is loaded: expected load_lora_weights before fuse_lora")
        self._expect_unfused("others are fused")
        self._bring_home()
        self._unfused = fuse(self.transformer, lora_scale, adapter_names, safe_fusing)
        self._merged_adapters = {
            name for _, layer in adapted_layers(self.transformer) for name in layer.merged_adapters
        }
        self.weights_changed()

    def unfuse_lora(self, components: Sequence[str] = COMPONENTS) -> None:
        """The weights as they were before `fuse_lora`, to the last bit, and the adapters beside them again."""
        if list(components) != list(COMPONENTS):
            raise InputError(f"components is {list(components)}: expected {list(COMPONENTS)}")
        if self._unfused is None:
            raise InputError("no adapter is fused: expected fuse_lora before unfuse_lora")
        self._bring_home()
        unfuse(self.transformer, self._unfused)
        self._unfused, self._merged_adapters = None, set()
        self.weights_changed()

    def weights_changed(self) -> None:
        """Called after adapters were added to the weights or taken out of them."""

    def _expect_unfused(self, what: str) -> None:
        if self._unfused is not None:
            fused = ", ".join(sorted(self._merged_adapters))
            raise InputError(f"adapters are fused ({fused}): expected unfuse_lora or unload_lora_weights before {what}")

    def _bring_home(self) -> None:
        """In low memory, weights that are on the GPU are copies: changes belong where they come from."""
        if takes_turns(self.transformer):
            self.transformer._hf_hook.to_host()
