"""The head: the part of the model that denoises each token by itself (section 3.3). `Denoiser` is the paper's.

A user's own head is a class that the user hands over. A checkpoint only records its name: nothing of it is imported.
"""

from typing import Protocol

from torch import Tensor, nn

from nova_video.common.errors import InputError
from nova_video.model.denoiser import Denoiser


class Head(Protocol):
    """A module that is made as `Denoiser` is: `head(depth, width, condition_dim, channels, patch)`.

    `depth` and `width` are those of the third entry of `arch`; a token has P = patch * patch * channels values, and a
    feature condition_dim. It sees no token but the one that it denoises, and keeps nothing between calls.
    """

    def forward(self, noisy: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        """Noisy tokens (B, S, P), timestep (B,) or (B, S), features z (B, S, condition_dim) -> prediction (B, S, P)."""
        ...


def resolve_head(head: object) -> tuple[type[nn.Module], str | None]:
    """The class of a head, and its name `module:Class` for the config; None is the paper's, which has no name."""
    if head is None or head is Denoiser:
        return Denoiser, None
    if isinstance(head, str):
        raise InputError(
            f"its head is {head}, a class of the user's own, which no checkpoint imports: expected it to be given:"
            " head=THE_CLASS in Python, --head in nova generate and nova edit, head under [model] in a recipe"
        )
    if not (isinstance(head, type) and issubclass(head, nn.Module)):
        got = head.__name__ if isinstance(head, type) else type(head).__name__
        raise InputError(f"head is {got}: expected a class of torch.nn.Module with a Denoiser's arguments")
    return head, f"{head.__module__}:{head.__qualname__}"
