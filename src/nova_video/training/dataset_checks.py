"""Checks that a dataset, an `init` and the recipe's own parts fit together, before anything is trained."""

import logging
from pathlib import Path

from nova_video.common.errors import InputError
from nova_video.common.extensions import names_extension
from nova_video.data.dataset import DatasetInfo
from nova_video.data.encoders import autoencoder_info, given_or_named
from nova_video.io.checkpoints import HUB_ID, resolve_checkpoint
from nova_video.pipeline.settings import CheckpointSettings
from nova_video.text.compare import same_text_encoder
from nova_video.text.load import check_text_encoder
from nova_video.training.recipe import DatasetTransformerRecipe

log = logging.getLogger(__name__)


def check_text_features(recipe: DatasetTransformerRecipe, info: DatasetInfo) -> None:
    """Raises InputError where the recipe's text encoder is not the dataset's: its features mean something else."""
    stored = info.text_encoder
    if recipe.text_encoder:
        field = f"text_encoder = {recipe.text_encoder!r}"
        _check_same(field, recipe.text_encoder, recipe, info, f"expected the same, or none, which means {stored!r}")
    anew = any(part.startswith("text_embed") or "text_embed".startswith(part) for part in recipe.fresh)
    if not anew and (known := text_of(recipe.init)) is not None:
        field = f"init = {recipe.init!r} has learned from the text encoder {known!r}"
        _check_same(field, known, recipe, info, "expected the same, or 'text_embed' in `fresh`")


def check_autoencoder_of_init(recipe: DatasetTransformerRecipe, info: DatasetInfo) -> None:
    """A model learns another autoencoder's latents anew; adapters are sampled with the autoencoder of `init`."""
    if not (resolve_checkpoint(recipe.init) / "vae").is_dir():
        return
    own = autoencoder_info(recipe.init).fingerprint
    if own == info.fingerprint:
        return
    said = (
        f"init = {recipe.init!r} has an autoencoder with weights {own}, and {recipe.dataset.path} was encoded by"
        f" {info.autoencoder!r} with {info.fingerprint}"
    )
    if recipe.lora.rank:
        raise InputError(f"{said}: expected the same, since adapters are sampled with the former")
    log.warning("%s: the model has to learn other latents than it knows, and goes with the latter", said)


def check_text_is_there(recipe: DatasetTransformerRecipe, info: DatasetInfo, name: str) -> None:
    """Training has the dataset's features. Samples take the text encoder itself, and the exported model links to it or
    names it: of the hub, where there are no samples, it may be out of reach."""
    is_elsewhere = names_extension(name) or (HUB_ID.fullmatch(name) and not Path(name).is_dir())
    if not recipe.log.sample_every and is_elsewhere:
        return
    place = recipe.dataset.path
    given = None if name == info.text_encoder and not recipe.text_encoder else name
    with given_or_named(given, name, place, "text encoder", "--text-encoder"):
        width = check_text_encoder(name)
        if width != info.text_dim:
            raise InputError(f"{name!r} makes features {width} wide: expected {info.text_dim}, as {place} holds")


def _check_same(field: str, name: str, recipe: DatasetTransformerRecipe, info: DatasetInfo, expected: str) -> None:
    assert info.text_encoder is not None
    same = same_text_encoder(name, info.text_encoder, info.text_fingerprint)
    said = f"{field}, and {recipe.dataset.path} holds features of {info.text_encoder!r}"
    if same is False:
        raise InputError(f"{said}: {expected}")
    if same is None:
        log.warning("%s: whether these are the same cannot be told here", said)


def text_of(init: str) -> str | None:
    """The text encoder of the checkpoint that is started from."""
    if not init:
        return None
    folder = resolve_checkpoint(init)
    return str(folder) if (folder / "text_encoder").is_dir() else CheckpointSettings.load(folder).text_encoder
