"""The nodes load a model, make pictures and clips, carry clips on, and edit under a mask."""

from collections.abc import Mapping
from typing import Any, ClassVar

import folder_paths
import torch
from comfy_api.latest import ComfyExtension, io

from nova_video import GenerateRequest, InputError, NovaPipeline
from nova_video.common.checks import LIMITS
from nova_video.common.devices import DEVICES, DTYPES
from nova_video.common.option_fields import is_timed

from .loaded import PLACES, LoadedModel, checkpoints, fingerprint, place_of, register_folder
from .runs import clip_of, make_pictures, make_video, masks_of, picture_of
from .widgets import FIELDS, OF_CLIPS, STEP, problem_of, setting_input, setting_inputs, settings_of

CATEGORY = "nova-video"
NONE = "none"
TIMELINES = [name for name in FIELDS if name != "prompt" and is_timed(FIELDS[name])]
"""Settings besides the prompt that may change within a clip."""

ModelType = io.Custom("NOVA_MODEL")
ChangesType = io.Custom("NOVA_CHANGES")
"""Pairs of seconds and settings that hold from then on."""


class NovaLoadModel(io.ComfyNode):
    """Opens a checkpoint. ComfyUI keeps it while its inputs and files stay the same."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NovaLoadModel",
            display_name="NOVA Load Model",
            category=CATEGORY,
            description="Opens a NOVA checkpoint: the bundled model, a folder in models/nova, or another one.",
            inputs=[
                io.Combo.Input("checkpoint", options=checkpoints(), default=checkpoints()[0]),
                io.String.Input(
                    "other", default="", optional=True, tooltip="A folder or hub id, in place of the checkpoint."
                ),
                io.Combo.Input(
                    "device",
                    options=["auto", *DEVICES],
                    default="auto",
                    optional=True,
                    tooltip="auto is ComfyUI's own device.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=["auto", *DTYPES],
                    default="auto",
                    optional=True,
                    tooltip="Precision of the weights; auto is float16 on a GPU and float32 elsewhere.",
                ),
                io.Combo.Input(
                    "kept",
                    options=list(PLACES),
                    default=PLACES[0],
                    optional=True,
                    tooltip="Where the weights are between and during runs.",
                ),
                io.Combo.Input(
                    "adapter",
                    options=[NONE, *folder_paths.get_filename_list("loras")],
                    default=NONE,
                    optional=True,
                    tooltip="A LoRA of this model, from models/loras.",
                ),
                io.Float.Input(
                    "adapter_scale",
                    default=1.0,
                    min=-LIMITS.scale,
                    max=LIMITS.scale,
                    step=STEP,
                    optional=True,
                    tooltip="0 changes nothing, 1 is as the adapter was trained.",
                ),
            ],
            outputs=[ModelType.Output("model")],
        )

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str = "", other: str = "", **_: Any) -> Any:
        """The checkpoint's files, so that a checkpoint that was trained further is opened again."""
        return fingerprint(place_of(checkpoint, other))

    @classmethod
    def execute(
        cls,
        checkpoint: str,
        other: str = "",
        device: str = "auto",
        dtype: str = "auto",
        kept: str = PLACES[0],
        adapter: str = NONE,
        adapter_scale: float = 1.0,
    ) -> io.NodeOutput:
        path = None if adapter == NONE else folder_paths.get_full_path_or_raise("loras", adapter)
        place = place_of(checkpoint, other)
        return io.NodeOutput(LoadedModel.open(place, device, dtype, kept, path, adapter_scale))


class NovaChangeAt(io.ComfyNode):
    """Changes the sentence, the motion or the guidance of a clip from a moment on."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NovaChangeAt",
            display_name="NOVA Change At",
            category=CATEGORY,
            description="From a moment of the clip on, another sentence, motion or guidance. Several can be chained.",
            inputs=[
                io.Float.Input("at", default=1.0, min=0, max=LIMITS.seconds, step=STEP, tooltip="Seconds."),
                io.String.Input(
                    "prompt", multiline=True, default="", optional=True, tooltip="Empty: the sentence stays."
                ),
                *(setting_input(name) for name in TIMELINES),
                ChangesType.Input("earlier", optional=True, tooltip="Changes at other moments."),
            ],
            outputs=[ChangesType.Output("changes")],
        )

    @classmethod
    def validate_inputs(cls, at: float = 0.0, **values: Any) -> bool | str:
        return problem_of(values) or True

    @classmethod
    def execute(cls, at: float, prompt: str = "", earlier: Any = (), **values: Any) -> io.NodeOutput:
        new = settings_of(values) | ({"prompt": prompt} if prompt.strip() else {})
        return io.NodeOutput((*(earlier or ()), (at, new)))


class MakingNode(io.ComfyNode):
    """The parent of the nodes that generate: their settings are those of `GenerateRequest`."""

    NAME: ClassVar[str] = ""
    TEXT: ClassVar[str] = ""
    WITHOUT: ClassVar[frozenset[str]] = frozenset({"strength", "num_images_per_prompt"})
    """Settings that this node has no use for."""
    CLIP: ClassVar[bool] = True
    """It makes a clip; else pictures."""

    @classmethod
    def own_inputs(cls) -> list[io.Input]:
        """The inputs besides the model and the settings."""
        return []

    @classmethod
    def define_schema(cls) -> io.Schema:
        changes = [ChangesType.Input("changes", optional=True, tooltip="From NOVA Change At.")] if cls.CLIP else []
        made = io.Video.Output("clip") if cls.CLIP else io.Image.Output("pictures")
        return io.Schema(
            node_id=cls.__name__,
            display_name=cls.NAME,
            category=CATEGORY,
            description=cls.TEXT,
            inputs=[ModelType.Input("model"), *cls.own_inputs(), *setting_inputs(cls.WITHOUT), *changes],
            outputs=[made, io.String.Output("record", tooltip="How it was made, as JSON.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, **values: Any) -> bool | str:
        """The checks that need no model, before anything runs."""
        return problem_of(values) or True

    @classmethod
    def given(cls, pipe: NovaPipeline, settings: Mapping[str, Any], **inputs: Any) -> dict[str, Any]:
        """The fields of the request that this node's own inputs say."""
        return {}

    @classmethod
    def execute(cls, model: LoadedModel, changes: Any = (), **values: Any) -> io.NodeOutput:
        settings = settings_of({name: value for name, value in values.items() if name in FIELDS})
        inputs = {name: value for name, value in values.items() if name not in FIELDS}

        def request(pipe: NovaPipeline) -> GenerateRequest:
            fields = settings | cls.given(pipe, settings, **inputs)
            return GenerateRequest(**with_changes(fields, changes or (), pipe), output_type="np")

        make = make_video if cls.CLIP else make_pictures
        return io.NodeOutput(*make(model, request, cls.hidden.unique_id if cls.hidden else None))


def with_changes(fields: dict[str, Any], changes: Any, pipe: NovaPipeline) -> dict[str, Any]:
    """The fields of a request, each that changes in time as a timeline."""
    found = dict(fields)
    for name in ("prompt", *TIMELINES):
        later = [(at, new[name]) for at, new in sorted(changes, key=lambda change: change[0]) if name in new]
        if later:
            first = found[name] if name in found else getattr(pipe.defaults, name)
            found[name] = [(0.0, first), *later] if later[0][0] > 0 else later
    return found


class NovaTextToImage(MakingNode):
    """Makes pictures from a sentence."""

    NAME, TEXT, CLIP = "NOVA Text to Image", "Makes pictures from a sentence.", False
    WITHOUT = frozenset({*OF_CLIPS, "strength"})

    @classmethod
    def given(cls, pipe: NovaPipeline, settings: Mapping[str, Any], **inputs: Any) -> dict[str, Any]:
        return {"num_frames": 1}


class NovaTextToVideo(MakingNode):
    """Makes a clip from a sentence."""

    NAME, TEXT = "NOVA Text to Video", "Makes a clip from a sentence."


class NovaImageToVideo(MakingNode):
    """Makes a clip that begins with a picture."""

    NAME, TEXT = "NOVA Image to Video", "Makes a clip from a sentence and its first frame."

    @classmethod
    def own_inputs(cls) -> list[io.Input]:
        return [io.Image.Input("image", tooltip="The first frame: one picture.")]

    @classmethod
    def given(
        cls, pipe: NovaPipeline, settings: Mapping[str, Any], *, image: torch.Tensor, **inputs: Any
    ) -> dict[str, Any]:
        return {"image": picture_of(image)}


class NovaContinueVideo(MakingNode):
    """Carries a clip on."""

    NAME, TEXT = "NOVA Continue Video", "Carries a clip on; its own frames come back as they were, before the new ones."
    WITHOUT = MakingNode.WITHOUT | {"num_frames", "seconds"}

    @classmethod
    def own_inputs(cls) -> list[io.Input]:
        frames = io.Int.Input(
            "new_frames", default=8, min=1, max=LIMITS.frames, tooltip="Frames to add, at the model's rate."
        )
        return [io.Video.Input("video"), frames]

    @classmethod
    def given(
        cls, pipe: NovaPipeline, settings: Mapping[str, Any], *, video: Any, new_frames: int, **inputs: Any
    ) -> dict[str, Any]:
        clip = clip_of(video)
        return {"video": clip, "num_frames": clip.count(settings.get("fps", pipe.defaults.fps)) + new_frames}


class NovaEditImage(MakingNode):
    """Makes parts of a picture anew."""

    NAME, TEXT, CLIP = "NOVA Edit Image", "Makes anew what is under the mask, or by strength a share of it.", False
    WITHOUT = frozenset(OF_CLIPS)

    @classmethod
    def own_inputs(cls) -> list[io.Input]:
        return [io.Image.Input("image"), _mask_input()]

    @classmethod
    def given(
        cls,
        pipe: NovaPipeline,
        settings: Mapping[str, Any],
        *,
        image: torch.Tensor,
        mask: torch.Tensor | None = None,
        **inputs: Any,
    ) -> dict[str, Any]:
        return {"image": picture_of(image), "num_frames": 1, **_masks(mask, settings)}


class NovaEditVideo(MakingNode):
    """Makes parts of a clip anew."""

    NAME, TEXT = "NOVA Edit Video", "Makes anew what is under the mask, or by strength a share of it."
    WITHOUT = frozenset({"num_images_per_prompt"})

    @classmethod
    def own_inputs(cls) -> list[io.Input]:
        return [io.Video.Input("video"), _mask_input()]

    @classmethod
    def given(
        cls,
        pipe: NovaPipeline,
        settings: Mapping[str, Any],
        *,
        video: Any,
        mask: torch.Tensor | None = None,
        **inputs: Any,
    ) -> dict[str, Any]:
        return {"video": clip_of(video), **_masks(mask, settings)}


def _mask_input() -> io.Input:
    return io.Mask.Input(
        "mask", optional=True, tooltip="White is made anew. One mask, or one a frame; without one, give a strength."
    )


def _masks(mask: torch.Tensor | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    if mask is None and "strength" not in settings:
        raise InputError("got neither mask nor strength: expected one of them, or both")
    return {} if mask is None else {"mask_image": masks_of(mask)}


NODES: list[type[io.ComfyNode]] = [
    NovaLoadModel,
    NovaTextToImage,
    NovaTextToVideo,
    NovaImageToVideo,
    NovaContinueVideo,
    NovaEditImage,
    NovaEditVideo,
    NovaChangeAt,
]


class NovaExtension(ComfyExtension):
    """The nodes, as ComfyUI asks for them."""

    async def on_load(self) -> None:
        register_folder()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> NovaExtension:
    """Called by ComfyUI when it loads this folder."""
    return NovaExtension()
