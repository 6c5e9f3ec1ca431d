"""A transformer whose encoders multiply in 8 bit floats: faster on GPUs that have them, and not the same numbers.

torchao's: weights with a scale for each output, activations with one for each token, measured as they come. The
denoiser stays as it is: its products are too small to gain. The pipeline keeps one beside the model it was made of.
"""

import copy

import torch
from torch import nn

from nova_video.common.errors import InputError
from nova_video.common.extras import install_command
from nova_video.common.startup import reveal
from nova_video.model import NOVATransformer3DModel
from nova_video.model.lora import merge

CAPABILITY = (8, 9)  # Ada and Hopper


def with_fp8_blocks(model: NOVATransformer3DModel) -> NOVATransformer3DModel:
    """A copy of the model on its GPU; only the blocks of both encoders differ. Adapters are part of its weights."""
    check_fp8(model.device, model.dtype)
    reveal()
    try:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, PerTensor, quantize_
    except ImportError:
        raise InputError(f"fp8 needs torchao: expected it to be installed ({install_command('lowmem')})") from None
    made = copy.deepcopy(model)
    merge(made)
    rows = model.dtype == torch.bfloat16  # the library's products scaled by rows are in bfloat16 alone
    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow() if rows else PerTensor())
    for encoder in (made.video_encoder, made.image_encoder):
        quantize_(encoder.blocks, config, filter_fn=lambda module, name: isinstance(module, nn.Linear))
    return made


def check_fp8(device: torch.device, dtype: torch.dtype) -> None:
    """Raises InputError where 8 bit floats cannot be multiplied."""
    if device.type != "cuda":
        raise InputError(f"fp8 is for a GPU: got a model on {device}")
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        raise InputError(
            f"fp8 needs a GPU of compute capability {CAPABILITY[0]}.{CAPABILITY[1]} or more: got one of "
            f"{capability[0]}.{capability[1]}"
        )
    if dtype not in (torch.bfloat16, torch.float16):
        raise InputError(f"fp8 needs a model in bfloat16 or float16: got {dtype}")
