"""A small stand-in of ComfyUI: its V3 contract (`comfy_api.latest`), the modules that nodes import, and a runner.

It refuses what ComfyUI would refuse or silently spoil: arguments that the contract does not have, ids that meet twice,
links of other types, outputs of a wrong form, nodes that keep state in their class. It follows the contract's public
names; no line of it is ComfyUI's.
"""

import asyncio
import importlib.util
import inspect
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from fractions import Fraction
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import av
import numpy as np
import torch

ROOT = Path(__file__).parents[2]
NODES = ROOT / "integrations" / "comfyui"


# The contract ---------------------------------------------------------------------------------------------------------


class Input:
    """An input of a node; `io_type` names what may be linked to it."""

    io_type = ""
    widget = False

    def __init__(
        self,
        id: str,
        display_name: str | None = None,
        optional: bool = False,
        tooltip: str | None = None,
        lazy: bool | None = None,
        extra_dict: dict[str, Any] | None = None,
    ) -> None:
        assert id.isidentifier(), id
        self.id, self.optional, self.tooltip, self.extra = id, optional, tooltip, extra_dict or {}
        self.default: Any = None

    def check(self, value: Any) -> None:
        """Raises for a value that ComfyUI would not take."""


class WidgetInput(Input):
    widget = True

    def __init__(self, id: str, *, default: Any = None, **common: Any) -> None:
        super().__init__(id, **common)
        self.default = default


class IntInput(WidgetInput):
    io_type = "INT"
    whole = True

    def __init__(
        self,
        id: str,
        *,
        min: float | None = None,
        max: float | None = None,
        step: float | None = None,
        control_after_generate: bool | None = None,
        **common: Any,
    ) -> None:
        super().__init__(id, **common)
        self.min, self.max, self.control = min, max, control_after_generate
        assert self.default is not None, f"{id} has no default"
        self.check(self.default)

    def check(self, value: Any) -> None:
        assert not isinstance(value, bool), f"{self.id}: {value}"
        assert isinstance(value, int) or not self.whole, f"{self.id}: {value}"
        assert isinstance(value, int | float), f"{self.id}: {value}"
        assert self.min is None or value >= self.min, f"{self.id}: {value} is less than {self.min}"
        assert self.max is None or value <= self.max, f"{self.id}: {value} is more than {self.max}"


class FloatInput(IntInput):
    io_type = "FLOAT"
    whole = False

    def __init__(self, id: str, *, round: float | None = None, **common: Any) -> None:
        assert "control_after_generate" not in common
        super().__init__(id, **common)


class BooleanInput(WidgetInput):
    io_type = "BOOLEAN"

    def check(self, value: Any) -> None:
        assert isinstance(value, bool), f"{self.id}: {value}"


class StringInput(WidgetInput):
    io_type = "STRING"

    def __init__(
        self,
        id: str,
        *,
        multiline: bool = False,
        placeholder: str | None = None,
        dynamic_prompts: bool | None = None,
        **common: Any,
    ) -> None:
        super().__init__(id, **common)

    def check(self, value: Any) -> None:
        assert isinstance(value, str), f"{self.id}: {value}"


class ComboInput(WidgetInput):
    io_type = "COMBO"

    def __init__(self, id: str, *, options: list[str], **common: Any) -> None:
        super().__init__(id, **common)
        assert options
        assert len(set(options)) == len(options)
        self.options = options
        self.check(self.default if self.default is not None else options[0])

    def check(self, value: Any) -> None:
        assert value in self.options, f"{self.id}: {value} is none of {self.options}"


class Output:
    io_type = ""

    def __init__(
        self,
        id: str | None = None,
        display_name: str | None = None,
        tooltip: str | None = None,
        is_output_list: bool = False,
    ) -> None:
        self.id = id


def kind(name: str, inputs: type[Input] = Input) -> Any:
    """A type of the contract, with its `Input` and `Output`."""
    of_type = {"io_type": name}
    return SimpleNamespace(
        io_type=name, Input=type(f"{name}Input", (inputs,), of_type), Output=type(f"{name}Output", (Output,), of_type)
    )


class Hidden(Enum):
    unique_id = "UNIQUE_ID"
    prompt = "PROMPT"
    extra_pnginfo = "EXTRA_PNGINFO"


@dataclass
class Schema:
    node_id: str
    display_name: str
    category: str = "sd"
    description: str = ""
    inputs: list[Input] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    hidden: list[Hidden] = field(default_factory=list)
    is_output_node: bool = False
    is_input_list: bool = False

    def validate(self) -> None:
        ids = [each.id for each in (*self.inputs, *self.outputs) if each.id is not None]
        assert len(set(ids)) == len(ids), f"{self.node_id}: ids meet twice: {ids}"
        needed = [each.optional for each in self.inputs]
        assert any(not each for each in needed) or not needed


class NodeOutput:
    def __init__(self, *args: Any, ui: Any = None, expand: Any = None, block_execution: str | None = None) -> None:
        self.args = args


class Locked(type):
    """A class that cannot be changed once it is locked, as ComfyUI's clones of nodes cannot."""

    def __setattr__(cls, name: str, value: Any) -> None:
        assert not cls.__dict__.get("locked", False), f"{cls.__name__}.{name} is set while the node runs"
        super().__setattr__(name, value)


class ComfyNode(metaclass=Locked):
    hidden: Any = None

    @classmethod
    def define_schema(cls) -> Schema:
        raise NotImplementedError

    @classmethod
    def execute(cls, **values: Any) -> NodeOutput:
        raise NotImplementedError


class ComfyExtension:
    async def on_load(self) -> None: ...

    async def get_node_list(self) -> list[type[ComfyNode]]:
        raise NotImplementedError


@dataclass
class Components:
    images: torch.Tensor
    frame_rate: Fraction
    audio: Any = None


@dataclass
class VideoFromFile:
    """A clip in a file, or a part of it."""

    file: str
    start_time: float = 0.0
    duration: float = 0.0

    def get_stream_source(self) -> str:
        return self.file

    def get_active_trim_window(self) -> tuple[float, float]:
        return self.start_time, self.duration

    def get_dimensions(self) -> tuple[int, int]:
        with av.open(self.file) as container:
            return container.streams.video[0].width, container.streams.video[0].height

    def get_frame_count(self) -> int:
        """As the file tells, without decoding: a fragmented mp4 does not."""
        with av.open(self.file) as container:
            return container.streams.video[0].frames

    def as_trimmed(self, start_time: float, duration: float) -> "VideoFromFile":
        return VideoFromFile(self.file, start_time, duration)

    def get_components(self) -> Components:
        with av.open(self.file) as container:
            rate = Fraction(container.streams.video[0].average_rate or 1)
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        first = round(self.start_time * rate)
        last = first + round(self.duration * rate) if self.duration else len(frames)
        return Components(torch.from_numpy(np.stack(frames[first:last])).float() / 255, rate)


class CancelError(Exception):
    """Cancel was pressed."""


# The machine ----------------------------------------------------------------------------------------------------------


class Comfy:
    """ComfyUI with one folder: its modules, the nodes of this project, and graphs that run.

    A graph is in API form: node ids -> {"class_type", "inputs"}, where ["id", number] is a link.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.progress: list[tuple[float, float, Any]] = []
        """Every call of `set_progress`: value, maximum and picture."""
        self.cancel_at: int | None = None
        """Cancel is pressed before the so-manieth check."""
        self.checks = 0
        self.runs: list[str] = []
        """The class of each node that ran, in order."""
        self.nodes: dict[str, type[ComfyNode]] = {}
        self.cache: dict[str, tuple[Any, ...]] = {}
        self._folders: dict[str, list[str]] = {"loras": [str(folder / "models" / "loras")]}
        (folder / "models" / "loras").mkdir(parents=True, exist_ok=True)

    @contextmanager
    def loaded(self) -> Iterator["Comfy"]:
        """The nodes loaded as ComfyUI loads a folder of custom nodes."""
        name = "custom_nodes_nova"
        before = set(sys.modules)
        sys.modules |= self._modules()
        spec = importlib.util.spec_from_file_location(name, NODES / "__init__.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
            asyncio.run(self._load(module))
            yield self
        finally:
            for other in [*self._modules(), *(each for each in set(sys.modules) - before if each.startswith(name))]:
                sys.modules.pop(other, None)

    async def _load(self, module: ModuleType) -> None:
        extension = await module.comfy_entrypoint()
        assert isinstance(extension, ComfyExtension)
        await extension.on_load()
        for node in await extension.get_node_list():
            schema = node.define_schema()
            schema.validate()
            assert issubclass(node, ComfyNode)
            assert schema.node_id not in self.nodes
            self.nodes[schema.node_id] = node

    def _modules(self) -> dict[str, ModuleType]:
        plain = {"Image": "IMAGE", "Mask": "MASK", "Video": "VIDEO"}
        io = SimpleNamespace(
            **{name: kind(value) for name, value in plain.items()},
            Int=kind("INT", IntInput),
            Float=kind("FLOAT", FloatInput),
            Boolean=kind("BOOLEAN", BooleanInput),
            String=kind("STRING", StringInput),
            Combo=kind("COMBO", ComboInput),
            Custom=kind,
            Input=Input,
            Output=Output,
            Hidden=Hidden,
            Schema=Schema,
            ComfyNode=ComfyNode,
            NodeOutput=NodeOutput,
        )
        api = SimpleNamespace(execution=SimpleNamespace(set_progress=self._set_progress))
        latest = {
            "io": io,
            "ComfyExtension": ComfyExtension,
            "ComfyAPISync": lambda: api,
            "InputImpl": SimpleNamespace(VideoFromFile=VideoFromFile),
        }
        memory = {
            "get_torch_device": lambda: torch.device("cpu"),
            "throw_exception_if_processing_interrupted": self._check,
            "free_memory": lambda required, device: [],
            "soft_empty_cache": lambda: None,
        }
        folders = {
            "models_dir": str(self.folder / "models"),
            "add_model_folder_path": lambda name, path: self._folders.setdefault(name, []).append(path),
            "get_folder_paths": lambda name: self._folders[name],
            "get_filename_list": lambda name: sorted(
                path.name for folder in self._folders[name] for path in Path(folder).glob("*.safetensors")
            ),
            "get_full_path_or_raise": lambda name, file: str(Path(self._folders[name][0]) / file),
            "get_temp_directory": lambda: str(self.folder / "temp"),
        }
        parts = {"comfy_api": {}, "comfy_api.latest": latest, "comfy": {}, "comfy.model_management": memory}
        parts["folder_paths"] = folders
        found = {name: ModuleType(name) for name in parts}
        for name, members in parts.items():
            vars(found[name]).update(members)
        vars(found["comfy"])["model_management"] = found["comfy.model_management"]
        return found

    def _set_progress(
        self, value: float, max_value: float, node_id: str | None = None, preview_image: Any = None
    ) -> None:
        assert node_id is not None
        self.progress.append((value, max_value, preview_image))

    def _check(self) -> None:
        self.checks += 1
        if self.cancel_at is not None and self.checks >= self.cancel_at:
            raise CancelError

    # Graphs -----------------------------------------------------------------------------------------------------------

    def problems(self, graph: Mapping[str, Any]) -> dict[str, str]:
        """Nodes -> why ComfyUI refuses the graph before it runs."""
        found = {}
        for name, node in graph.items():
            try:
                self._validate(graph, node)
            except AssertionError as error:
                found[name] = str(error).splitlines()[0]
        return found

    def _validate(self, graph: Mapping[str, Any], node: Mapping[str, Any]) -> None:
        cls = self.nodes[node["class_type"]]
        inputs = {each.id: each for each in cls.define_schema().inputs}
        assert not (extra := node["inputs"].keys() - inputs.keys()), f"unknown inputs {extra}"
        own = getattr(cls, "validate_inputs", None)
        constants = {}
        for name, each in inputs.items():
            assert name in node["inputs"] or each.optional, f"{name} is missing"
            value = node["inputs"].get(name)
            if isinstance(value, list):
                source = self.nodes[graph[value[0]]["class_type"]].define_schema().outputs[value[1]]
                assert source.io_type == each.io_type, f"{name} is linked to {source.io_type}"
            elif name in node["inputs"]:
                assert each.widget, f"{name} needs a link"
                if own is None:  # a node that checks its values itself takes over from ComfyUI
                    each.check(value)
                constants[name] = value
        if own is not None:
            made = own(**constants)
            assert made is True, made

    def run(self, graph: Mapping[str, Any], node: str) -> tuple[Any, ...]:
        """The outputs of a node, after all nodes that it needs; what did not change is not run again."""
        assert not self.problems(graph), self.problems(graph)
        return self._run(graph, node)

    def _run(self, graph: Mapping[str, Any], node: str) -> tuple[Any, ...]:
        signature = self._signature(graph, node)
        if signature in self.cache:
            return self.cache[signature]
        cls = self.nodes[graph[node]["class_type"]]
        schema = cls.define_schema()
        values = {
            name: self._run(graph, value[0])[value[1]] if isinstance(value, list) else value
            for name, value in graph[node]["inputs"].items()
        }
        hidden = SimpleNamespace(**{each.name: node for each in schema.hidden})
        clone = type(cls)(cls.__name__, (cls,), {"hidden": hidden, "locked": True})
        assert inspect.ismethod(clone.execute)
        made = clone.execute(**values)
        self.runs.append(schema.node_id)
        assert isinstance(made, NodeOutput)
        assert len(made.args) == len(schema.outputs)
        for output, value in zip(schema.outputs, made.args, strict=True):
            check_output(output.io_type, value)
        self.cache[signature] = made.args
        return made.args

    def _signature(self, graph: Mapping[str, Any], node: str) -> str:
        cls = self.nodes[graph[node]["class_type"]]
        inputs = graph[node]["inputs"]
        told = {
            name: self._signature(graph, value[0]) + str(value[1]) if isinstance(value, list) else value
            for name, value in inputs.items()
        }
        own = getattr(cls, "fingerprint_inputs", None)
        constants = {name: value for name, value in inputs.items() if not isinstance(value, list)}
        return json.dumps([cls.__name__, told, None if own is None else own(**constants)])


def check_output(kind: str, value: Any) -> None:
    """Raises for an output that the next node could not read."""
    if kind == "IMAGE":
        assert isinstance(value, torch.Tensor)
        assert value.dtype == torch.float32
        assert value.ndim == 4
        assert value.shape[3] == 3
        assert 0 <= value.min() <= value.max() <= 1
    if kind == "VIDEO":
        assert isinstance(value, VideoFromFile)
        assert Path(value.file).is_file()
    if kind == "STRING":
        assert isinstance(value, str)


# Workflows ------------------------------------------------------------------------------------------------------------


def graph_of(workflow: Mapping[str, Any], comfy: Comfy) -> dict[str, Any]:
    """The graph of a workflow as ComfyUI's page saves it, of the nodes that are this project's."""
    links = {link[0]: link for link in workflow["links"]}
    graph = {}
    for node in workflow["nodes"]:
        if node["type"] not in comfy.nodes:
            continue
        schema = comfy.nodes[node["type"]].define_schema()
        sockets = {each["name"]: each.get("link") for each in node["inputs"]}
        values = iter(node["widgets_values"])
        inputs: dict[str, Any] = {}
        for each in schema.inputs:
            if each.widget:
                inputs[each.id] = next(values)
                if getattr(each, "control", None):
                    assert next(values) in ("fixed", "increment", "decrement", "randomize")
            if (link := sockets.get(each.id)) is not None:
                _, source, slot, target, _, io_type = links[link]
                assert target == node["id"]
                assert io_type == each.io_type
                inputs[each.id] = [str(source), slot]
        assert next(values, None) is None, f"{node['type']} has more values than widgets"
        graph[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return graph
