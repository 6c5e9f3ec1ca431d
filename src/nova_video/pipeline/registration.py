"""How diffusers' generic ways in learn of `NovaPipeline`: `DiffusionPipeline.from_pretrained` and the Auto classes."""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

import diffusers
from diffusers import DiffusionPipeline

AUTO_CLASSES = "diffusers.pipelines.auto_pipeline"  # imports two hundred pipelines, which takes seconds


def register(name: str, pipeline: type[DiffusionPipeline]) -> None:
    """Make a pipeline class known to diffusers by its own name, and to the Auto classes by `name`.

    The Auto classes learn of it when they are imported.
    """
    setattr(diffusers, pipeline.__name__, pipeline)
    if AUTO_CLASSES in sys.modules:
        _add(sys.modules[AUTO_CLASSES], name, pipeline)
    else:
        sys.meta_path.insert(0, _AddingFinder(name, pipeline))


def _add(module: ModuleType, name: str, pipeline: type[DiffusionPipeline]) -> None:
    module.AUTO_TEXT2IMAGE_PIPELINES_MAPPING[name] = pipeline


class _AddingFinder(MetaPathFinder):
    """Finds the module of the Auto classes as Python does, and adds a pipeline when it is loaded."""

    def __init__(self, name: str, pipeline: type[DiffusionPipeline]) -> None:
        self.name, self.pipeline = name, pipeline

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != AUTO_CLASSES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _AddingLoader(spec.loader, self)
        return spec


class _AddingLoader(Loader):
    def __init__(self, loader: Loader, finder: _AddingFinder) -> None:
        self.loader, self.finder = loader, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _add(module, self.finder.name, self.finder.pipeline)
