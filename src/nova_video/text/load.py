"""Loads text encoders and tokenizers through transformers: Phi-2 for the released checkpoints, MiniLM for the bundled.

Folders open by their architecture: BERT, Phi, T5 and UMT5 (the encoder alone), CLIP (the text tower alone) and others.
No code of a folder is ever run.
"""

import logging
import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from nova_video.common.errors import InputError, first_line
from nova_video.common.extensions import check_members, make_extension, names_extension
from nova_video.io.text import list_some
from nova_video.io.weights import TRANSFORMERS_WEIGHTS, find_weights, read_json, read_shapes
from nova_video.text.features import PretrainedTextEncoder, TextEncoder
from nova_video.text.find import describe_place, find_local_folder, find_text, find_text_encoder, find_tokenizer

logger = logging.getLogger(__name__)

# Weights of a language model, a decoder or a vision tower that a text encoder was saved with and does not use.
UNUSED_WEIGHTS = re.compile(
    r"(^|\.)(position_ids|inv_freq|logit_scale)$|(^|\.)(lm_head|cls|pooler|decoder|vision_model|visual_projection|text_projection)\."
)


def open_text_encoder(
    name: str, torch_dtype: torch.dtype | None = None, device: torch.device | None = None
) -> TextEncoder:
    """The encoder that a name stands for: a checkpoint's, one by itself, or a user's own as `module:Class`."""
    if names_extension(name):
        own: TextEncoder = check_own_encoder(make_extension(name, "text_encoder"))
        return own
    place = find_text(name, fetch=True)
    return PretrainedTextEncoder(*load_text_encoder(place.encoder, torch_dtype, device, place.tokenizer))


def check_own_encoder(encoder: Any) -> Any:
    """The encoder again, if it has what `TextEncoder` names."""
    check_members(encoder, "text_encoder", TextEncoder)
    if not isinstance(encoder.width, int) or encoder.width < 1:
        raise InputError(f"{type(encoder).__name__}.width is {encoder.width!r}: expected the width of its features")
    return encoder


class NamedTextEncoder:
    """A text encoder that is known by its name alone: loaded when it is first needed, once for all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loaded: tuple[PreTrainedTokenizerBase, PreTrainedModel] | None = None

    @property
    def is_loaded(self) -> bool:
        return self._loaded is not None

    def load(
        self, name: str, dtype: torch.dtype, device: torch.device
    ) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
        """Its tokenizer and model, on the device."""
        with self._lock:
            if self._loaded is None:
                self._loaded = load_text_encoder(name, dtype)
            tokenizer, model = self._loaded
            model.to(device)
            return tokenizer, model


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
        raise InputError(f"cannot load the text encoder {describe_place(name, place)}: {_reason(error)}") from error
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


def read_text_encoder(
    folder: Path, torch_dtype: torch.dtype | None = None, variant: str | None = None
) -> PreTrainedModel:
    """The text encoder from its own folder. Its weights have no keys that the encoder does not know."""
    read_json(folder / "config.json")
    stored = read_shapes(find_weights(folder, TRANSFORMERS_WEIGHTS, variant).files)
    model = load_text_model(str(folder), torch_dtype, variant=variant)
    _check_text_keys(folder, stored, model)
    return model


def _check_text_keys(folder: Path, stored: Iterable[str], model: PreTrainedModel) -> None:
    """Raises InputError for weights that neither the encoder knows nor `UNUSED_WEIGHTS` names."""
    expected = set(model.state_dict())
    prefix = f"{model.base_model_prefix}."
    extra = [
        key
        for key in stored
        if key not in expected and key.removeprefix(prefix) not in expected and not UNUSED_WEIGHTS.search(key)
    ]
    if extra:
        raise InputError(f"{folder}: weights do not fit {type(model).__name__}: extra keys {list_some(extra)}")


def check_text_encoder(name: str) -> int:
    """The width of a text encoder's features, if it can be opened; else an InputError says why it cannot.

    Of weights that are on this machine only the headers are read; others are fetched.
    """
    if names_extension(name):
        return text_width(name)
    place = find_text(name, fetch=True)
    load_tokenizer(place.tokenizer or place.encoder)
    width = text_width(place.encoder)
    folder = find_local_folder(place.encoder)
    try:
        if folder is not None:
            read_shapes(find_weights(folder, TRANSFORMERS_WEIGHTS).files)
            return width
    except InputError:  # which may just not be fetched yet
        if Path(find_text_encoder(place.encoder)).is_dir():
            raise
    load_text_model(place.encoder, torch.float16)
    return width


def text_width(name: str) -> int:
    """The width of a text encoder's features, from its config alone where it has one."""
    if names_extension(name):
        return open_text_encoder(name).width
    place = find_text_encoder(find_text(name).encoder)
    try:
        width: int = _read_config(place).hidden_size
    except Exception as error:  # as above
        raise InputError(f"cannot load the text encoder {describe_place(name, place)}: {_reason(error)}") from error
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
        raise InputError(f"cannot load the tokenizer {describe_place(name, place)}: {_reason(error)}") from error
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


def _reason(error: Exception) -> str:
    """Why transformers could not load a folder, in one line."""
    if "trust_remote_code" in str(error):  # what it says instead tells how to run that code
        return "it needs Python code of its own, which is never run: expected an encoder that transformers knows"
    return first_line(error)
