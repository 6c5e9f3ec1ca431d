"""Compares text encoders by a fingerprint of their weights, which `dataset.json` keeps."""

import hashlib
import re
from pathlib import Path, PurePath

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nova_video.common.errors import InputError
from nova_video.common.extensions import names_extension
from nova_video.io.checkpoints import HUB_ID
from nova_video.io.weights import TRANSFORMERS_WEIGHTS, find_weights
from nova_video.text.find import find_local_folder, find_text
from nova_video.text.load import UNUSED_WEIGHTS

ROWS = 4  # of each tensor: enough to tell two encoders apart
PREFIX = re.compile(r"^(?:model|transformer|bert|roberta|text_model)\.")  # of a name beside a head


def text_fingerprint(name: str) -> str | None:
    """A hash of a text encoder's weights: 16 hexadecimal digits. None where they are not on this machine.

    The signs of each tensor's first rows are hashed, which no precision changes. A language head does not count.
    """
    if names_extension(name):  # an own encoder is compared by its name
        return None
    try:
        folder = find_local_folder(find_text(name).encoder)
        if folder is None:
            return None
        digests = [digest for path in find_weights(folder, TRANSFORMERS_WEIGHTS).files for digest in _hash_file(path)]
    except (InputError, SafetensorError, OSError):  # pickled, damaged or not all there
        return None
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()[:16]


def same_text_encoder(name: str, stored: str, fingerprint: str | None = None) -> bool | None:
    """True if two names are of the same weights, wherever they lie. None where nothing on this machine tells.

    `fingerprint` is that of `stored`, where a dataset keeps it.
    """
    first, second = find_text(name).encoder, find_text(stored).encoder
    if first == second:
        return True
    found, expected = text_fingerprint(first), fingerprint or text_fingerprint(second)
    if found is not None and expected is not None:
        return found == expected
    ids = all(HUB_ID.fullmatch(each) and not Path(each).is_dir() for each in (first, second))
    return False if ids and PurePath(first).name.lower() != PurePath(second).name.lower() else None


def _hash_file(path: Path) -> list[bytes]:
    """A digest for each tensor of a file, by its name and the signs of its first rows."""
    found = []
    with safe_open(str(path), framework="pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118
            if UNUSED_WEIGHTS.search(key):
                continue
            part = tensors.get_slice(key)
            rows: Tensor = part[:ROWS] if part.get_shape() else tensors.get_tensor(key)
            signs = torch.signbit(rows).numpy().tobytes()
            found.append(hashlib.sha256(f"{PREFIX.sub('', key)}{part.get_shape()}".encode() + signs).digest())
    return found
