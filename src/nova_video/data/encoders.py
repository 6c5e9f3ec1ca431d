"""The two stages of encoding that need a network: clips to autoencoder moments, captions to text features.

Both are plain callables that load their weights at the first call, so that they can be pickled to another process, and
wrapped by an actor there, or called here. What a network gives for a clip depends on what it is batched with only by
rounding.
Legend: C latent channels, F latent frames, h w latent grid, T text tokens, D width of the text features.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor, nn

from nova_video.autoencoders import adapt, find_layout
from nova_video.common.devices import choose_device
from nova_video.common.errors import InputError
from nova_video.common.extensions import make_extension, names_extension
from nova_video.data.dataset import first_sentence, join
from nova_video.io.checkpoints import COMPONENTS, resolve_checkpoint
from nova_video.io.weights import DIFFUSERS_WEIGHTS, find_weights, has_weights
from nova_video.model.config import size_multiple
from nova_video.pipeline.loading import outline_autoencoder, read_autoencoder
from nova_video.text.features import TextEncoder, encode_texts
from nova_video.text.load import open_text_encoder

# Pixels that go through the autoencoder together, at least one clip: on a GPU what keeps it busy (a clip of 17 frames
# of 480x768 is 6 M), on a CPU what stays near its caches.
GPU_PIXELS, CPU_PIXELS = 8 << 20, 1 << 20
TEXT_TOKENS = 256  # the most that a caption keeps: what the released models read
TEXTS_PER_CALL = 64


class Frames(Protocol):
    """Anything with the frames of one clip."""

    @property
    def frames(self) -> NDArray[np.uint8]:
        """(T, H, W, 3) uint8."""
        ...


@dataclass(frozen=True)
class AutoencoderInfo:
    """Facts about an autoencoder that a dataset keeps."""

    fingerprint: str
    latent_channels: int
    spatial_stride: int
    temporal_stride: int
    """1: it takes pictures alone."""


@contextmanager
def given_or_named(given: str | None, named: str | None, place: str | Path, what: str, flag: str) -> Iterator[None]:
    """Opens the part that was given, or else the one that the dataset at `place` names.

    An error about the latter says where it is named, and which flag names another. A user's own part is never opened
    because a dataset names it: its code runs only where the user asks for it.
    """
    noted = f"{join(place, 'dataset.json')} names the {what}"
    if not given and named is not None and names_extension(named):
        raise InputError(f"{noted}: {named} is your own code: expected {flag} {named}, which allows it to be run")
    try:
        yield
    except InputError as error:
        if given:
            raise
        raise InputError(f"{noted}: {str(error).rstrip('.')}; {flag} names another") from None


def autoencoder_info(name: str) -> AutoencoderInfo:
    """Facts about an autoencoder, from its files; only a user's own is built."""
    if names_extension(name):
        vae = make_extension(name, "autoencoder")
        layout, mark = find_layout(vae), _fingerprint_own(name, vae)
    else:
        folder = _autoencoder_folder(name)
        layout, mark = find_layout(outline_autoencoder(folder)), fingerprint(folder)
    return AutoencoderInfo(mark, layout.channels, layout.spatial_stride, layout.temporal_stride)


def find_size_multiple(name: str) -> int:
    """Pixels that the sides of clips are multiples of, for models that are trained on this autoencoder's latents."""
    vae = (
        make_extension(name, "autoencoder") if names_extension(name) else outline_autoencoder(_autoencoder_folder(name))
    )
    return size_multiple(find_layout(vae).spatial_stride)


def fingerprint(folder: Path) -> str:
    """A hash of an autoencoder's weights, whatever its files and tensors are called: 16 hexadecimal digits.

    Values are taken in float16, so that a copy in half precision is the same autoencoder.
    """
    digests = []
    for path in find_weights(folder, DIFFUSERS_WEIGHTS).files:
        with safe_open(str(path), framework="pt") as tensors:
            digests += [_digest(tensors.get_tensor(key)) for key in tensors.keys()]  # noqa: SIM118
    return _join_digests(digests)


def _fingerprint_own(name: str, vae: Any) -> str:
    """The hash of a user's own autoencoder: of its weights, or of its name where it has none."""
    weights = vae.state_dict().values() if isinstance(vae, nn.Module) else ()
    return _join_digests([_digest(value.cpu()) for value in weights] or [name.encode()])


def _digest(tensor: Tensor) -> bytes:
    values = tensor.to(torch.float16)
    return hashlib.sha256(f"{tuple(values.shape)}".encode() + values.numpy().tobytes()).digest()


def _join_digests(digests: list[bytes]) -> str:
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()[:16]


def load_frozen_autoencoder(name: str, device: torch.device) -> Any:
    """The autoencoder of a checkpoint or a user's own, in float32, for encoding and decoding alone."""
    vae = make_extension(name, "autoencoder") if names_extension(name) else read_autoencoder(_autoencoder_folder(name))
    find_layout(vae)  # raises for one that cannot work
    return vae.to(device).eval().requires_grad_(False) if isinstance(vae, nn.Module) else vae


@dataclass
class EncodeLatents:
    """Clips -> moments (2C, F, h, w) bf16 on the CPU, in the order of the clips; those of a size are taken together.

    bf16 arithmetic on a GPU, float32 on a CPU.
    """

    model: str
    """A checkpoint with vae/, an autoencoder's own folder, or a user's own as `module:Class`."""
    device: str = "auto"
    batch: int | None = None
    """Most clips of a forward pass; None: as many as GPU_PIXELS or CPU_PIXELS."""
    _vae: Any = field(default=None, init=False, repr=False)

    def load(self) -> Any:
        """The autoencoder, loaded once."""
        if self._vae is None:
            self._vae = load_frozen_autoencoder(self.model, choose_device(self.device))
        return self._vae

    @torch.no_grad()
    def __call__(self, clips: Sequence[Frames]) -> list[Tensor]:
        vae = adapt(self.load())
        device = vae.device
        moments: list[Tensor] = [torch.empty(0)] * len(clips)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            for indices in self._batches(clips, device):
                frames = torch.from_numpy(np.stack([clips[index].frames for index in indices]))  # (B, T, H, W, 3)
                pixels = frames.to(device).permute(0, 4, 1, 2, 3).float().div_(127.5).sub_(1)  # (B, 3, T, H, W)
                made = vae.encode(pixels).parameters.to(torch.bfloat16).cpu()  # (B, 2C, F, h, w)
                for index, values in zip(indices, made, strict=True):
                    moments[index] = values.clone()
        return moments

    def _batches(self, clips: Sequence[Frames], device: torch.device) -> Iterator[list[int]]:
        """Indices of clips of one size, as many as go through together."""
        sizes: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, clip in enumerate(clips):
            sizes[clip.frames.shape].append(index)
        most = GPU_PIXELS if device.type == "cuda" else CPU_PIXELS
        for (frames, height, width, _), indices in sizes.items():
            count = self.batch or max(1, most // (frames * height * width))
            for start in range(0, len(indices), count):
                yield indices[start : start + count]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_vae": None}  # weights stay: another process loads its own


@dataclass
class DecodeLatents:
    """Moments (2C, F, h, w) -> the frames (T, H, W, 3) uint8 that their means stand for."""

    model: str
    device: str = "auto"
    _vae: Any = field(default=None, init=False, repr=False)

    def load(self) -> Any:
        """The autoencoder, loaded once."""
        if self._vae is None:
            self._vae = load_frozen_autoencoder(self.model, choose_device(self.device))
        return self._vae

    @torch.no_grad()
    def __call__(self, moments: Tensor) -> NDArray[np.uint8]:
        vae = adapt(self.load())
        means = moments.float().chunk(2)[0][None].to(vae.device)  # (1, C, F, h, w)
        with torch.autocast(vae.device.type, torch.bfloat16, enabled=vae.device.type == "cuda"):
            pixels = vae.decode(means)  # (1, 3, T, H, W)
        values = pixels[0].float().add_(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)
        return values.permute(1, 2, 3, 0).cpu().numpy()


@dataclass(frozen=True, eq=False)
class TextFeatures:
    text: Tensor
    """(T, D) fp16: of the caption."""
    short: Tensor | None
    """(T', D) fp16: of its first sentence; None where that is all of it."""


@dataclass
class EncodeText:
    """Captions -> their token features and those of their first sentences; equal texts are encoded once.

    fp16 arithmetic on a GPU, float32 on a CPU.
    """

    name: str
    """A text encoder (folder, packaged or on the hub), or a checkpoint that has or names one."""
    device: str = "auto"
    max_tokens: int = TEXT_TOKENS
    _encoder: TextEncoder | None = field(default=None, init=False, repr=False)

    def load(self) -> TextEncoder:
        """The encoder, loaded once."""
        if self._encoder is None:
            device = choose_device(self.device)
            dtype = torch.float16 if device.type == "cuda" else torch.float32
            self._encoder = open_text_encoder(self.name, dtype, device)
        return self._encoder

    @property
    def width(self) -> int:
        """D."""
        return self.load().width

    def __call__(self, captions: Sequence[str]) -> list[TextFeatures]:
        short = {caption: first_sentence(caption) for caption in captions}
        texts = list(dict.fromkeys([*short, *short.values()]))
        made: dict[str, Tensor] = {}
        encoder = self.load()
        for start in range(0, len(texts), TEXTS_PER_CALL):
            part = texts[start : start + TEXTS_PER_CALL]
            features, lengths = encode_texts(encoder, part, self.max_tokens)  # (N, T, D), (N,)
            features = features.to(torch.float16).cpu()
            for text, row, length in zip(part, features, lengths.tolist(), strict=True):
                made[text] = row[:length].clone()
        return [
            TextFeatures(made[caption], None if short[caption] == caption.strip() else made[short[caption]])
            for caption in captions
        ]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_encoder": None}


def _autoencoder_folder(name: str) -> Path:
    """The folder of an autoencoder: a checkpoint's vae/, or the one that is named."""
    checkpoint = resolve_checkpoint(name, without=[part for part in COMPONENTS if part != "vae"])
    if (checkpoint / "vae").is_dir():
        return checkpoint / "vae"
    if has_weights(checkpoint, DIFFUSERS_WEIGHTS):
        return checkpoint
    raise InputError(f"{name}: has no vae/: expected a checkpoint with an autoencoder")
