"""Prompts to token features: what an encoder's last hidden state holds at a prompt's own tokens.

Padding is added here and masked in the encoder, so that a prompt's features do not depend on its batch.
Legend: N prompts, T text tokens (`max_length`), D width of the features.
"""

import logging
from textwrap import shorten
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nova_video.common.errors import InputError

logger = logging.getLogger(__name__)

TOKENS_PER_FORWARD = 65536  # bounds the memory of one forward, padding included


class TextEncoder(Protocol):
    """Anything that encodes prompts: a user's own object needs these two members."""

    @property
    def width(self) -> int:
        """D."""
        ...

    def encode(self, texts: list[str], max_length: int) -> tuple[Tensor, Tensor]:
        """Features (N, T, D) and lengths (N,), T being `max_length` at most."""
        ...


class PretrainedTextEncoder:
    """A tokenizer and an encoder of transformers, as one `TextEncoder`."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        model: PreTrainedModel,
        device: torch.device | None = None,
    ) -> None:
        """`device` is where to compute, where that is not where the weights are."""
        self.tokenizer, self.model, self.device = tokenizer, model, device

    @property
    def width(self) -> int:
        width: int = self.model.config.hidden_size
        return width

    def encode(self, texts: list[str], max_length: int) -> tuple[Tensor, Tensor]:
        return encode_batch(self.tokenizer, self.model, texts, max_length, self.device)


def encode_texts(encoder: TextEncoder, texts: list[str], max_length: int) -> tuple[Tensor, Tensor]:
    """Features and lengths by an encoder of any kind. Raises InputError where they have other shapes than expected."""
    features, lengths = encoder.encode(texts, max_length)
    shape = tuple(features.shape)
    fits = len(shape) == 3 and shape[0] == len(texts) and shape[1] <= max_length and shape[2] == encoder.width
    if not fits or tuple(lengths.shape) != (len(texts),):
        expected = f"features ({len(texts)}, at most {max_length}, {encoder.width}) and {len(texts)} lengths"
        raise InputError(
            f"{type(encoder).__name__}.encode gives features {shape} and lengths {tuple(lengths.shape)}: expected"
            f" {expected}"
        )
    return features, lengths


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
