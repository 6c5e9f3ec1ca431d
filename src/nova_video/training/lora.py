"""Adapters to be trained: the model's own weights are frozen, and the adapters' are all that learns.

What they are and how they are stored is `model/lora.py`'s, whose functions for training stand here too. An adapter adds
nothing before its first step: B starts at zero.
"""

from torch import nn

from nova_video.common.errors import InputError
from nova_video.model import NOVATransformer3DModel
from nova_video.model.lora import (
    LORA_TARGETS,
    adapted_layers,
    load_lora_state,
    lora_state_dict,
    merge,
    require_peft,
    save_lora,
)
from nova_video.training.recipe import LoraRecipe

__all__ = ["add_lora", "load_lora_state", "lora_state_dict", "merge", "save_lora"]


def add_lora(model: NOVATransformer3DModel, recipe: LoraRecipe) -> list[nn.Parameter]:
    """Freeze the model and put an adapter beside each of the recipe's layers; returns what is to be trained."""
    require_peft()
    from peft import LoraConfig

    targets = recipe.targets or LORA_TARGETS
    for target in targets:
        found = [module for name, module in model.named_modules() if f".{name}".endswith(f".{target}")]
        if not found or not all(isinstance(module, nn.Linear) for module in found):
            raise InputError(
                f"lora.targets has {target!r}: expected how names of linear layers end, such as {LORA_TARGETS[0]!r}"
            )
        full = min(min(module.in_features, module.out_features) for module in found)
        if recipe.rank > full:
            raise InputError(f"lora.rank is {recipe.rank}: expected at most {full}, the full rank of {target}")
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=recipe.rank, lora_alpha=recipe.alpha or recipe.rank, target_modules=list(targets)))
    return [
        parameter for _, layer in adapted_layers(model) for parameter in layer.parameters() if parameter.requires_grad
    ]
