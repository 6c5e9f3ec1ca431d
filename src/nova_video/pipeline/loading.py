"""The one door by which weights enter: a checkpoint's folder, checked part by part, to modules.

A checkpoint is a folder of component folders (transformer/ vae/ scheduler/ text_encoder/ tokenizer/), each with its own
config, and optionally a `nova.json`. Released checkpoints and ours open alike: module names are the released state-dict
keys, so there is no converter. Only safetensors are read, and whatever is wrong is an `InputError` that names it.
"""

import glob
import inspect
import logging
import re
import shlex
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import torch
from diffusers import AutoencoderKL, ModelMixin, SchedulerMixin
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nova_video.autoencoders import AutoencoderKLCausalTiny, AutoencoderKLOpenSora, find_layout
from nova_video.autoencoders.bounds import check_autoencoder_config
from nova_video.common.checks import check_number
from nova_video.common.errors import InputError, first_line
from nova_video.common.extensions import make_extension, names_extension
from nova_video.io.checkpoints import COMPONENTS, resolve_checkpoint, text_folder
from nova_video.io.text import list_some
from nova_video.io.weights import DIFFUSERS_WEIGHTS, find_weights, read_json, read_shapes
from nova_video.model import NOVATransformer3DModel
from nova_video.model.denoiser import Denoiser
from nova_video.pipeline.lora_files import LORA_FILE
from nova_video.text.find import find_text_encoder
from nova_video.text.load import load_text_model, load_tokenizer, read_text_encoder

AUTOENCODERS = (AutoencoderKL, AutoencoderKLOpenSora, AutoencoderKLCausalTiny)
MAX_STEPS = 100_000  # of a noise schedule that is not a mistake
OPTIONAL = ("vae", "text_encoder", "tokenizer")
PART_CLASSES: dict[str, type] = {
    "transformer": NOVATransformer3DModel,
    "vae": ModelMixin,
    "scheduler": SchedulerMixin,
    "text_encoder": PreTrainedModel,
    "tokenizer": PreTrainedTokenizerBase,
}
OWN_MEMBERS = {"vae": ("encode", "decode"), "text_encoder": ("encode", "width")}
"""Members that an object of any class needs to stand for a part."""

T = TypeVar("T")

log = logging.getLogger(__name__)

# Names that diffusers itself renames when it loads an old autoencoder: the attention of its middle block.
OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def load_transformer(
    checkpoint: Path, torch_dtype: torch.dtype | None = None, head: Any = None
) -> NOVATransformer3DModel:
    """The transformer of a checkpoint; `head` is the class of its head, where that is the user's own."""
    return read_transformer(component_folder(checkpoint, "transformer"), torch_dtype, head=head)


def load_autoencoder(checkpoint: Path, torch_dtype: torch.dtype | None = None) -> Any | None:
    """The autoencoder in vae/, or None where there is no vae/."""
    folder = checkpoint / "vae"
    return read_autoencoder(folder, torch_dtype) if folder.is_dir() else None


def load_scheduler(checkpoint: Path) -> Any:
    """One of diffusers' own schedulers."""
    return read_scheduler(component_folder(checkpoint, "scheduler"))


def check_parts(given: Mapping[str, Any], or_places: bool = True) -> None:
    """Refuses a part of a wrong kind. None is fine if it is optional, and a place with `or_places`."""
    for name, part in given.items():
        if (or_places and isinstance(part, (str, Path))) or (part is None and name in OPTIONAL):
            continue
        part = getattr(part, "_orig_mod", part)  # what torch.compile has wrapped
        if not isinstance(part, PART_CLASSES[name]) and not is_own_part(name, part):
            got = "None" if part is None else type(part).__name__
            places = ", or the folder of one" if or_places else ""
            raise InputError(f"{name} is {got}: expected {PART_CLASSES[name].__name__}{places}")


def is_own_part(name: str, part: object) -> bool:
    """True for a user's own part: an object with what a part of that kind needs."""
    return name in OWN_MEMBERS and all(hasattr(part, member) for member in OWN_MEMBERS[name])


def check_layout(vae: Any, transformer: NOVATransformer3DModel) -> None:
    """Raises InputError where the latents are not of the channels and size that the transformer was made for."""
    layout, config = find_layout(vae), transformer.config
    if layout.channels != config.image_dim:
        raise InputError(f"vae has {layout.channels} latent channels: expected the transformer's {config.image_dim}")
    if layout.spatial_stride != config.image_stride:
        raise InputError(
            f"vae makes a latent of {layout.spatial_stride}x{layout.spatial_stride} pixels: expected the transformer's"
            f" {config.image_stride}x{config.image_stride}"
        )


def load_parts(
    checkpoint: Path,
    given: Mapping[str, Any],
    dtype_of: Callable[[str], torch.dtype | None],
    variant: str | None = None,
    head: Any = None,
) -> dict[str, Any]:
    """Every part by its name: the one in `given`, loaded where that is a place, or else the checkpoint's own.

    `variant` is that of the checkpoint's files, for the parts that have it. `head` is the class of the transformer's
    head, where that is the user's own.
    """
    if variant is not None and not any(checkpoint.glob(f"*/*.{glob.escape(variant)}[.-]*")):
        raise InputError(f"variant is {variant!r}: expected one that {checkpoint} has weights of, or none")
    parts: dict[str, Any] = {}
    for name in ("scheduler", "transformer", "vae", "text_encoder", "tokenizer"):  # the quickest to fail first
        if name in given:
            part = given[name]
            parts[name] = _load_from(name, part, dtype_of(name), head) if isinstance(part, (str, Path)) else part
        elif name in OPTIONAL:
            folder = text_folder(checkpoint, name)
            parts[name] = None if folder is None else _read_part(name, folder, dtype_of(name), variant)
        else:
            parts[name] = _read_part(name, component_folder(checkpoint, name), dtype_of(name), variant, head)
    return parts


def _load_from(name: str, place: str | Path, torch_dtype: torch.dtype | None, head: Any = None) -> Any:
    """A part from a checkpoint that has it, by folder or hub id, or from the part's own folder.

    A text encoder may also be one that is installed as a package, or one of the hub by itself. Autoencoders and text
    encoders may be the user's own, as `module:Class`.
    """
    local = Path(place).expanduser()
    if name in OWN_MEMBERS and names_extension(str(place)):
        return make_extension(str(place), name)
    if local.is_dir():
        return _read_part(name, local / name if (local / name).is_dir() else local, torch_dtype, head=head)
    is_text = name in ("text_encoder", "tokenizer")
    if not is_text or find_text_encoder(str(place)) == str(place):  # no package
        try:
            folder = resolve_checkpoint(place, without=[other for other in COMPONENTS if other != name])
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
        if (folder / name).is_dir() or not is_text:
            return _read_part(name, component_folder(folder, name), torch_dtype, head=head)
    return load_tokenizer(str(place)) if name == "tokenizer" else load_text_model(str(place), torch_dtype)


def _read_part(
    name: str, folder: Path, torch_dtype: torch.dtype | None, variant: str | None = None, head: Any = None
) -> Any:
    if name == "tokenizer":
        return load_tokenizer(str(folder))
    if name == "scheduler":
        return read_scheduler(folder)
    if name == "transformer":
        return read_transformer(folder, torch_dtype, variant, head)
    read = {"vae": read_autoencoder, "text_encoder": read_text_encoder}[name]
    return read(folder, torch_dtype, variant)


def names_head(checkpoint: Path) -> bool:
    """True for a checkpoint whose transformer has a head of the user's own."""
    return read_json(component_folder(checkpoint, "transformer") / "config.json").get("head") is not None


def read_transformer(
    folder: Path, torch_dtype: torch.dtype | None = None, variant: str | None = None, head: Any = None
) -> NOVATransformer3DModel:
    """The transformer from its own folder."""
    outline = outline_transformer(folder, head)
    check_text_conditional(folder, read_shapes(find_weights(folder, DIFFUSERS_WEIGHTS, variant).files))
    given = {} if head is None else {"head": head}
    model: NOVATransformer3DModel = load_component(outline, folder, torch_dtype, variant, **given)
    return model


def outline_transformer(folder: Path, head: Any = None) -> NOVATransformer3DModel:
    """The transformer of shapes alone: its config is read through the class, its weights are not.

    The config names our class or, as the published ones, none.
    """
    path, expected = folder / "config.json", NOVATransformer3DModel.__name__
    config = read_json(path)
    if head not in (None, Denoiser) and config.get("head") is None:
        raise InputError(f"head is {getattr(head, '__name__', head)}, but {path} names none: expected no head")
    name = config.get("_class_name")
    if name not in (None, expected):
        raise InputError(f"{path}: _class_name is {name!r}: expected {expected}")
    model: NOVATransformer3DModel = outline_component(
        NOVATransformer3DModel, folder, **({} if head is None else {"head": head})
    )
    return model


def check_text_conditional(folder: Path, stored: Iterable[str]) -> None:
    """The transformer's weights read a text. Those of class-conditional models have labels instead."""
    if not any(key.startswith("text_embed.") for key in stored):
        raise InputError(
            f"{folder}: has no text_embed weights: expected a model of text to image or video; class-conditional ones"
            " are not supported"
        )


def read_autoencoder(folder: Path, torch_dtype: torch.dtype | None = None, variant: str | None = None) -> Any:
    """The autoencoder from its own folder.

    An image autoencoder overflows in float16 and stays in float32, as in diffusers' pipelines for it, unless its config
    says `force_upcast` false. The published configs leave the key out, and diffusers' default is true.
    """
    outline = outline_autoencoder(folder, variant=variant)
    overflows = isinstance(outline, AutoencoderKL) and outline.config.force_upcast
    torch_dtype = torch.float32 if overflows and torch_dtype is torch.float16 else torch_dtype
    return load_component(outline, folder, torch_dtype, variant)


def outline_autoencoder(
    folder: Path, stored: Mapping[str, Sequence[int]] | None = None, variant: str | None = None
) -> Any:
    """The autoencoder of shapes alone, of the class that its weights fit. `stored`: their shapes, if known.

    The class that the config names is tried first: a released config may bear another name, or none.
    """
    config = read_json(folder / "config.json")
    try:
        check_autoencoder_config(config)
    except InputError as error:
        raise InputError(f"{folder / 'config.json'}: {error}") from None
    name = config.get("_class_name")
    if stored is None:
        stored = read_shapes(find_weights(folder, DIFFUSERS_WEIGHTS, variant).files)
    named = autoencoder_class(name)
    problem = None
    for cls in AUTOENCODERS if named is None else (named, *(cls for cls in AUTOENCODERS if cls is not named)):
        try:
            outline = outline_component(cls, folder)
            check_weights(folder, outline, stored)
        except InputError as error:
            if cls is named:
                problem = error
        else:
            return checked_outline(folder, outline)
    names = " or ".join(cls.__name__ for cls in AUTOENCODERS)
    raise problem or InputError(
        f"{folder / 'config.json'}: _class_name is {name!r}: expected {names} or another autoencoder of diffusers, and"
        " its weights fit none of these; your own is given as vae"
    )


def autoencoder_class(name: object) -> type[ModelMixin] | None:
    """The class of ours or of diffusers that a config names; None where there is none with that name."""
    ours = {cls.__name__: cls for cls in AUTOENCODERS}
    if not isinstance(name, str) or name in ours:
        return ours.get(str(name))
    found = getattr(diffusers, name, None) if re.search("Autoencoder|VQModel", name) else None
    return found if isinstance(found, type) and issubclass(found, ModelMixin) else None


def checked_outline(folder: Path, outline: Any) -> Any:
    """The outline again, once it is known that its latents can be used here."""
    try:
        find_layout(outline)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None
    return outline


def read_scheduler(folder: Path) -> Any:
    """A scheduler of diffusers, by the name in its config or else in the checkpoint's model_index.json."""
    path, index = folder / "scheduler_config.json", folder.parent / "model_index.json"
    config = read_json(path)
    name = config.get("_class_name")
    if name is None and index.is_file():
        entry = read_json(index).get("scheduler")
        name = entry[-1] if isinstance(entry, list) and entry else None
    found = getattr(diffusers, name, None) if isinstance(name, str) and name.endswith("Scheduler") else None
    if not isinstance(found, type) or not issubclass(found, SchedulerMixin):
        raise InputError(f"{path}: _class_name is {name!r}: expected a diffusers scheduler")
    scheduler: Any = found
    try:
        check_number("num_train_timesteps", config.get("num_train_timesteps", 1000), 1, integer=True, high=MAX_STEPS)
        return scheduler.from_config(config)
    except Exception as error:  # of a value that the library does not know: it raises many kinds
        raise InputError(f"{path}: no {name} can be made of it: {first_line(error)}") from None


def load_component(
    outline: ModelMixin,
    folder: Path,
    torch_dtype: torch.dtype | None = None,
    variant: str | None = None,
    **given: Any,
) -> Any:
    """The diffusers model of the outline, every key and shape compared first; float32 unless a dtype is given."""
    weights = find_weights(folder, DIFFUSERS_WEIGHTS, variant)
    check_weights(folder, outline, read_shapes(weights.files))
    try:
        loaded = type(outline).from_pretrained(
            str(folder),
            torch_dtype=torch_dtype,
            variant=weights.variant,
            use_safetensors=True,
            local_files_only=True,
            **given,
        )
    except (TypeError, ValueError, OSError, RuntimeError) as error:
        raise InputError(f"{folder}: {type(outline).__name__} cannot load it: {first_line(error)}") from None
    return loaded.eval()


def check_weights(folder: Path, outline: ModelMixin, stored: Mapping[str, Sequence[int]]) -> None:
    """Compares the keys and shapes in a folder's files with the model; an InputError names each difference."""
    expected = {key: tuple(value.shape) for key, value in outline.state_dict().items()}
    named = {key: tuple(shape) for key, shape in current_names(outline, stored).items()}
    missing = [key for key in expected if key not in named]
    extra = [key for key in named if key not in expected]
    wrong = [
        f"{key} {named[key]} (expected {shape})"
        for key, shape in expected.items()
        if key in named and named[key] != shape
    ]
    problems = [
        f"{what} {list_some(keys)}"
        for what, keys in (("missing keys", missing), ("extra keys", extra), ("wrong shapes", wrong))
        if keys
    ]
    if problems:
        raise InputError(f"{folder}: weights do not fit {type(outline).__name__}: {'; '.join(problems)}")


def outline_component(cls: type[ModelMixin], folder: Path, **given: Any) -> Any:
    """The model that a folder's config.json describes, of shapes alone: no weights are read."""
    config = read_json(folder / "config.json")
    try:
        known = inspect.signature(cls.__init__).parameters  # others are the library's to warn of, when it loads
        with torch.device("meta"):
            return cls.from_config({key: value for key, value in config.items() if key in known}, **given)
    except Exception as error:  # of a value that the class does not expect: libraries raise many kinds
        path = folder / "config.json"
        raise InputError(f"{path}: no {cls.__name__} can be made of it: {first_line(error)}") from None


def component_folder(checkpoint: Path, name: str) -> Path:
    """The folder of a part that a checkpoint must have."""
    folder = checkpoint / name
    if folder.is_dir():
        return folder
    if name == "scheduler" and (checkpoint / "transformer").is_dir():  # as the released trainer leaves it
        where = shlex.quote(str(checkpoint))
        raise InputError(
            f"{checkpoint}: has no scheduler/: expected a whole checkpoint; nova convert {where} --base MODEL -o"
            " NEW_FOLDER makes one of it, with the other parts of the model that it was trained from"
        )
    if (checkpoint / "model" / name).is_dir():  # the folder of a run of `nova train`
        raise InputError(f"{checkpoint}: has no {name}/: expected {checkpoint / 'model'}, which has")
    if (checkpoint / LORA_FILE).is_file():
        raise InputError(
            f"{checkpoint}: is an adapter, without {name}/: expected the model it was trained for, and the adapter as"
            " --lora, or by load_lora_weights"
        )
    raise InputError(f"{checkpoint}: has no {name}/: expected a checkpoint with transformer/ and scheduler/ at least")


def current_names(outline: ModelMixin, stored: Mapping[str, T]) -> dict[str, T]:
    """Renames old keys as diffusers does when it reads them."""
    expected = outline.state_dict().keys()
    return {_current_name(key, expected): value for key, value in stored.items()}


def _current_name(key: str, expected: Container[str]) -> str:
    """`key` as diffusers will read it."""
    if key in expected:
        return key
    for old, new in OLD_ATTENTION.items():
        if old in key and key.replace(old, new) in expected:
            return key.replace(old, new)
    return key
