"""NOVA: text to images and video, frame by frame in time and set by set in space, without vector quantisation.

`__all__` is the public API. Each name is imported on first use, so that `import nova_video` loads no other package.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from nova_video.common.moved import find_moved_modules

if TYPE_CHECKING:
    from nova_video.autoencoders.opensora import AutoencoderKLOpenSora as AutoencoderKLOpenSora
    from nova_video.autoencoders.tiny import AutoencoderKLCausalTiny as AutoencoderKLCausalTiny
    from nova_video.common.errors import InputError as InputError
    from nova_video.data.encode import encode_dataset as encode_dataset
    from nova_video.data.encode_settings import EncodeSettings as EncodeSettings
    from nova_video.model.transformer import NOVATransformer3DModel as NOVATransformer3DModel
    from nova_video.pipeline.events import FrameReady as FrameReady
    from nova_video.pipeline.events import LatentPreview as LatentPreview
    from nova_video.pipeline.events import PartialFrame as PartialFrame
    from nova_video.pipeline.generation import Generation as Generation
    from nova_video.pipeline.offload import LowMemory as LowMemory
    from nova_video.pipeline.pipeline import NovaPipeline as NovaPipeline
    from nova_video.pipeline.request import GenerateRequest as GenerateRequest
    from nova_video.pipeline.result import GenerateResult as GenerateResult
    from nova_video.training.recipe import load_recipe as load_recipe
    from nova_video.training.trainer import train as train

__version__ = "0.1.0"

_HOMES = {  # public name -> the module that defines it
    "AutoencoderKLCausalTiny": "nova_video.autoencoders.tiny",
    "AutoencoderKLOpenSora": "nova_video.autoencoders.opensora",
    "EncodeSettings": "nova_video.data.encode_settings",
    "FrameReady": "nova_video.pipeline.events",
    "GenerateRequest": "nova_video.pipeline.request",
    "GenerateResult": "nova_video.pipeline.result",
    "Generation": "nova_video.pipeline.generation",
    "InputError": "nova_video.common.errors",
    "LatentPreview": "nova_video.pipeline.events",
    "LowMemory": "nova_video.pipeline.offload",
    "NOVATransformer3DModel": "nova_video.model.transformer",
    "NovaPipeline": "nova_video.pipeline.pipeline",
    "PartialFrame": "nova_video.pipeline.events",
    "encode_dataset": "nova_video.data.encode",
    "load_recipe": "nova_video.training.recipe",
    "train": "nova_video.training.trainer",
}
__all__ = ["__version__", *_HOMES]
find_moved_modules()


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'nova_video' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value  # the next use finds it without this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
