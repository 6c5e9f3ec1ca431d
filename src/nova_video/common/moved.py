"""Modules of 0.1.0 that have another place now: their old names can be imported for two minor releases, and warn."""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType

NEW_PLACES = {
    "adapters": "pipeline.adapters",
    "convert": "pipeline.convert",
    "devices": "common.devices",
    "errors": "common.errors",
    "extras": "common.extras",
    "fonts": "io.fonts",
    "generation": "pipeline.generation pipeline.events pipeline.progress",
    "given": "io.inputs",
    "keywords": "pipeline.keywords",
    "loading": "pipeline.loading io.checkpoints text.load",
    "media": "io.media io.files io.decode",
    "memory": "pipeline.offload",
    "pixels": "io.pixels",
    "plan": "pipeline.plan",
    "record": "pipeline.record",
    "records": "pipeline.records",
    "request": "pipeline.request common.option_fields",
    "result": "pipeline.result",
    "saved_facts": "pipeline.saved_facts",
    "saving": "pipeline.saving",
    "script": "cli.script",
    "settings": "common.checks pipeline.settings",
    "timeline": "common.timeline",
    "vocabulary": "text.vocabulary",
    "weights": "io.weights",
    "model.flash": "fast.flash",
    "model.lora_forms": "pipeline.lora_files",
    "sampling.fused": "fast.fused",
    "sampling.graphs": "fast.graphs",
    "sampling.shortcuts": "sampling.presets",
    "text.encoders": "text.load text.features text.find",
    "training.lora": "model.lora",
}
"""The old name of each module -> the modules that have its names now, below `nova_video`."""

PREFIX = "nova_video."


class MovedModules:
    """Finds a module by its old name, and gives the names of its new places."""

    @staticmethod
    def find_spec(
        fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        found = fullname.startswith(PREFIX) and fullname.removeprefix(PREFIX) in NEW_PLACES
        return ModuleSpec(fullname, MovedModules()) if found else None  # type: ignore[arg-type]  # a loader by its methods

    @staticmethod
    def create_module(spec: ModuleSpec) -> ModuleType | None:
        return None

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        places = [PREFIX + place for place in NEW_PLACES[module.__name__.removeprefix(PREFIX)].split()]
        warnings.warn(f"{module.__name__} has moved: import from {' or '.join(places)}", DeprecationWarning, 2)

        def find(name: str) -> object:
            for place in places:
                if hasattr(found := import_module(place), name):
                    return getattr(found, name)
            raise AttributeError(f"{module.__name__} has moved to {' and '.join(places)}, which have no {name}")

        module.__dict__["__getattr__"] = find


def find_moved_modules() -> None:
    """Let Python look for old names where it finds no module."""
    sys.meta_path.append(MovedModules)
