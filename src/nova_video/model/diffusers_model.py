"""The parts of a model that diffusers expects besides the maths: device, dtype, casting, initial weights."""

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from nova_video.common.errors import InputError
from nova_video.model.casting import cast_blocks
from nova_video.model.denoiser import Denoiser
from nova_video.model.embeddings import MaskEmbed
from nova_video.model.vit import heads_for_width


class DiffusersModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Base of the transformer: the habits of the library, apart from what the network computes."""

    _supports_gradient_checkpointing = True
    _no_split_modules = ["Block", "DenoiserBlock"]
    _supports_group_offloading = False  # weights are read by calls that are no `forward`
    mask_embed: MaskEmbed
    width: int
    patch_size: int

    def enable_layerwise_casting(
        self,
        storage_dtype: torch.dtype = torch.float8_e4m3fn,
        compute_dtype: torch.dtype | None = None,
        skip_modules_pattern: tuple[str, ...] | None = None,
        skip_modules_classes: tuple[type[nn.Module], ...] | None = None,
        non_blocking: bool = False,
    ) -> None:
        """Store the linear weights of both encoders' blocks in `storage_dtype`, and compute in `compute_dtype`.

        Blocks are cast one at a time, which is slower and takes less memory. It cannot be taken back.
        """
        if skip_modules_pattern is not None or skip_modules_classes is not None:
            raise InputError("skip_modules_pattern or _classes is given: expected none, blocks are cast as a whole")
        cast_blocks(self, storage_dtype, compute_dtype or self.dtype, non_blocking)

    @property
    def device(self) -> torch.device:
        """Where it computes. That of diffusers asks every module for hooks of offloading: milliseconds a time."""
        hooked = any("_diffusers_hook" in vars(module) for module in (self, *self.image_decoder.children()))
        return super().device if hooked else self.mask_embed.mask_token.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model computes in, read from a parameter that casting by layers leaves as it is."""
        return self.mask_embed.mask_token.dtype

    @property
    def head_dim(self) -> int:
        """Channels of an attention head, the same in both encoders."""
        return self.width // heads_for_width(self.width)

    @property
    def size_multiple(self) -> int:
        """Height and width in pixels are multiples of it: the side of a token of the temporal encoder."""
        return 2 * self.patch_size * int(self.config.image_stride)

    def initialize_weights(self) -> None:
        """To train from scratch: normal(0.02) linears; the denoiser's gates and output start at zero, as in DiT.

        A head of the user's own stays as its class has made it.
        """
        own_head = not isinstance(self.image_decoder, Denoiser)
        for name, module in self.named_modules():
            if own_head and name.startswith("image_decoder"):
                continue
            if isinstance(module, nn.Linear | nn.Conv2d):
                zero = name.startswith("image_decoder") and name.endswith(("norm1.proj", "norm.proj", "head"))
                nn.init.zeros_(module.weight) if zero else nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
