"""Training the transformer on an encoded dataset: clips that `nova encode` has written, streamed from a folder or URL.

A step takes one size bucket, so that its samples can be stacked; which one follows from the step's number. Looked at
with sources that are held out: the loss with their own captions and with one another's, and samples.
"""

import hashlib
import itertools
import logging
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torchdata.stateful_dataloader import StatefulDataLoader

from nova_video.common.errors import InputError, first_line
from nova_video.common.extensions import names_extension
from nova_video.data.dataset import (
    Bucket,
    DatasetInfo,
    EncodedSample,
    Shard,
    first_sentence,
    list_shards,
    read_columns,
    read_rows,
)
from nova_video.data.encoders import (
    autoencoder_info,
    given_or_named,
    load_frozen_autoencoder,
)
from nova_video.data.sheets import SheetEntry, draw_sheet
from nova_video.io.checkpoints import resolve_checkpoint
from nova_video.model import NOVATransformer3DModel
from nova_video.pipeline.settings import CheckpointSettings, Defaults
from nova_video.text.features import TextEncoder, encode_texts
from nova_video.text.find import find_text
from nova_video.text.load import open_text_encoder
from nova_video.training.dataset_checks import (
    check_autoencoder_of_init,
    check_text_features,
    check_text_is_there,
    text_of,
)
from nova_video.training.recipe import DatasetRecipe, DatasetTransformerRecipe
from nova_video.training.stream import (
    LoadedBatch,
    check_state,
    collate,
    is_held_out,
    join_states,
    open_loader,
    state_of,
)
from nova_video.training.transformer_task import (
    Batch,
    Material,
    TransformerTask,
    Variant,
    draw_latents,
    make_model,
    make_scheduler,
    note_text_parts,
)

HELD_OUT = 64  # clips that validation looks at
SHEET_SAMPLES = 6
KNOWN_BY = 64  # rows that tell one dataset from another, wherever it lies
PROBE_ROWS = 4096  # rows whose captions, motion and so on are looked through, at most

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SampleSize:
    """The common size of a step's samples: their bucket, or the first frames of one."""

    bucket: Bucket
    picture: bool

    @property
    def name(self) -> str:
        return f"{self.bucket.name}{' pictures' if self.picture else ''}"


@dataclass(frozen=True)
class Fact:
    """The facts about a row without its latents."""

    bucket: Bucket
    url: str
    """URL of its shard."""
    number: int
    """In its shard."""
    source: str
    caption: str
    fps: float
    motion: float


class Reader:
    """Batches of one size for the micro batches of this process, which each take theirs in a step."""

    def __init__(self, micro: list[int], loader: StatefulDataLoader) -> None:
        self.micro, self.loader = micro, loader
        self._rounds = iter(loader)
        self._waiting: dict[int, LoadedBatch] = {}

    def next(self, micro: int) -> LoadedBatch:
        if micro not in self._waiting:
            try:
                self._waiting = dict(zip(self.micro, next(self._rounds).parts(len(self.micro)), strict=True))
            except InputError as error:  # of a worker process: behind it there is all that led to it
                raise InputError(str(error).strip().rpartition("InputError: ")[2]) from None
        return self._waiting.pop(micro)


class DatasetTask(TransformerTask):
    """A size is a bucket."""

    recipe: DatasetTransformerRecipe

    def __init__(self, recipe: DatasetTransformerRecipe, device: torch.device) -> None:
        if not recipe.dataset.path:
            raise InputError("dataset.path is empty: expected what `nova encode` wrote, or a table [data] of a world")
        self.info = info = DatasetInfo.load(recipe.dataset.path)
        self.shards = list_shards(recipe.dataset.path)
        self.learned = self._learned(recipe.dataset, 1)
        self.largest = max(self.shards, key=lambda bucket: (bucket.frames, bucket.height * bucket.width))
        name = recipe.autoencoder or info.autoencoder
        with given_or_named(recipe.autoencoder, name, recipe.dataset.path, "autoencoder", "--autoencoder"):
            found = autoencoder_info(name).fingerprint
        if found != info.fingerprint:
            raise InputError(
                f"autoencoder = {name!r} has weights {found}, and {recipe.dataset.path} was encoded by"
                f" {info.autoencoder!r} with {info.fingerprint}: expected the same"
            )
        self.vae = load_frozen_autoencoder(name, torch.device("cpu"))
        self.text_name = recipe.text_encoder or info.text_encoder or text_of(recipe.init)
        self._text: TextEncoder | None = None
        self.probe = list(itertools.islice(self._facts(), PROBE_ROWS))
        if self.text_name is None and not info.text_dim:
            raise InputError(f"{recipe.dataset.path} has no text features: expected a text_encoder that makes them")
        width = info.text_dim or self._text_encoder(device).width
        names = f"{recipe.dataset.path} and text_encoder = {self.text_name!r}"
        size = (self.largest.height, self.largest.width)
        model, resolved = make_model(recipe, Material(info.latent_channels, info.spatial_stride, width, size, names))
        if recipe.init:
            check_autoencoder_of_init(recipe, info)
        if info.text_encoder and info.text_dim:
            check_text_features(recipe, info)
        if self.text_name and info.text_dim and not recipe.lora.rank:
            check_text_is_there(recipe, info, self.text_name)
        frames = self.latent_frames(self.largest)
        if frames > 1 and resolved.video_base_frames == 1:
            raise InputError(
                f"{recipe.dataset.path} has clips ({self.largest.name}), and this model makes pictures alone: expected"
                " model.video_base_frames above 1, with the new parts in `fresh`, or a dataset of pictures"
            )
        super().__init__(replace(recipe, model=resolved), model, make_scheduler(recipe), device, frames)
        self.defaults = self._defaults()
        self.recipe = replace(self.recipe, autoencoder=name, text_encoder=self.text_name or "", defaults=self.defaults)
        self.readers: dict[SampleSize, Reader] = {}

    def _learned(self, data: DatasetRecipe, least: int) -> dict[Bucket, list[Shard]]:
        """The buckets with at least so many rows that are not held out: nothing can be learned from others."""
        found = {}
        for bucket, shards in self.shards.items():
            sources = (source for shard in shards for source in read_columns(shard.url, ("source",))["source"])
            rows = sum(1 for _ in itertools.islice((x for x in sources if not is_held_out(x, data.held_out)), least))
            if rows == least:
                found[bucket] = shards
            else:
                log.warning("%s is left out: %d of its rows are not held out, of %d needed", bucket.name, rows, least)
        if not found:
            raise InputError(
                f"{data.path}: no size has {least} rows that are not held out: expected more rows, fewer micro batches"
                f" or a smaller dataset.held_out than {data.held_out:g}"
            )
        return found

    def _defaults(self) -> Defaults:
        """Defaults of the recipe if it has any; else of `init`, for clips as they are here."""
        if self.recipe.defaults != Defaults():
            return self.recipe.defaults
        start = (
            CheckpointSettings.load(resolve_checkpoint(self.recipe.init)).defaults if self.recipe.init else Defaults()
        )
        clips = [row for row in self.probe if row.bucket.frames > 1]
        motion = sorted(row.motion for row in clips)
        flow = round(motion[len(motion) // 2], 2) if motion else start.motion_flow
        fps = clips[0].fps if clips else start.fps
        return replace(start, num_frames=self.largest.frames, fps=fps, motion_flow=flow)

    # Samples ------------------------------------------------------------------------------------------------------

    def latent_frames(self, bucket: Bucket) -> int:
        return (bucket.frames - 1) // self.info.temporal_stride + 1

    def grid(self, bucket: Bucket) -> tuple[int, int]:
        """Grid (h, w) of the latents."""
        return bucket.height // self.info.spatial_stride, bucket.width // self.info.spatial_stride

    def variants(self) -> tuple[list[Variant], list[float]]:
        """Buckets by how many rows they have; pictures by their share of the steps, if they are given one."""
        share = self.recipe.dataset.image_share
        rows = {SampleSize(bucket, False): sum(shard.rows for shard in found) for bucket, found in self.learned.items()}
        clips = {size: count for size, count in rows.items() if size.bucket.frames > 1}
        pictures = {size: count for size, count in rows.items() if size.bucket.frames == 1}
        if share and not pictures:
            pictures = {SampleSize(size.bucket, True): count for size, count in clips.items()}
        if share is None or not clips or not pictures:
            weights = {size: count / sum(rows.values()) for size, count in rows.items()}
        else:
            weights = {size: (1 - share) * count / sum(clips.values()) for size, count in clips.items()}
            weights |= {size: share * count / sum(pictures.values()) for size, count in pictures.items()}
        variants, shares = [], []
        for size, weight in weights.items():
            numbers, parts = [None], [1.0]
            if self.recipe.mask_ratio == "batch":
                numbers, parts = self.counts(self.tokens(self.grid(size.bucket)))  # type: ignore[assignment]
            variants += [Variant(size, number) for number in numbers]
            shares += [weight * part for part in parts]
        return variants, shares

    def _latent_tokens(self, size: SampleSize) -> int:
        return self.tokens(self.grid(size.bucket)) * (1 if size.picture else self.latent_frames(size.bucket))

    def samples(self, variant: Variant) -> int:
        """Number of samples with as many tokens as a batch of the largest size."""
        most = max(self._latent_tokens(SampleSize(bucket, False)) for bucket in self.shards)
        return max(1, round(self.recipe.dataset.batch * most / self._latent_tokens(variant.size)))

    def shape(self, variant: Variant) -> tuple[int, tuple[int, int]]:
        size: SampleSize = variant.size
        return 1 if size.picture else self.latent_frames(size.bucket), self.grid(size.bucket)

    def open_data(self, micro: Iterable[int], count: int, places: dict[str, Any]) -> None:
        """Data that are read otherwise than they were start anew."""
        data, own = self.recipe.dataset, list(micro)
        if count > 1:
            self.learned = self._learned(data, count)
        if self.recipe.log.validate_every and 0 in own and not self.held_out:
            lacking = "nothing to validate on: too few of %d sources are held out, by dataset.held_out"
            log.warning(lacking, len({row.source for row in self.probe}))
        how, before = self._how_read(), places.get("how") or {}
        if places and (differs := [name for name in how if how[name] != before.get(name)]):
            said = [f"{name} is {how[name]}, it was {before.get(name)}" for name in differs if name != "shards"]
            said += ["the dataset has other shards"] if "shards" in differs else []
            log.warning("the data start anew: %s", "; ".join(said))
            places = {}
        for size in dict.fromkeys(variant.size for variant in self.variants()[0]):
            loader = open_loader(
                self.shards[size.bucket],
                self.seed,
                own,
                count,
                self.samples(Variant(size, None)),
                data.workers,
                data.shuffle,
                data.held_out,
            )
            names = [f"{number}:{size.name}" for number in own]
            is_known = bool(places) and all(name in places for name in names)
            if places and not is_known:
                log.warning("the data of %s start at their beginning: the run has read none of them yet", size.name)
            try:
                if is_known:
                    for name in names:
                        check_state(places[name])
                    loader.load_state_dict(join_states([places[name] for name in names]))
                self.readers[size] = Reader(own, loader)
            except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
                if not is_known:
                    raise
                raise InputError(
                    f"the checkpoint's place in the data of {size.name} {first_line(error)}: expected what the run"
                    " wrote, or the checkpoint before it"
                ) from error

    def hub_datasets(self) -> list[str]:
        places = (self.recipe.dataset.path, str(self.info.settings.get("source", "")))
        names = (re.match(r"hf://(?:datasets/)?([\w-][\w.-]*/[\w-][\w.-]*)", place) for place in places)
        return list(dict.fromkeys(name[1] for name in names if name is not None))

    def data_identity(self) -> str:
        """A hash of the shards' names and rows and of what the first rows are."""
        shards: list[Any] = [
            (bucket.name, Path(shard.url).name, shard.rows) for bucket in self.shards for shard in self.shards[bucket]
        ]
        shards += [(row.source, row.caption) for row in self.probe[:KNOWN_BY]]
        return hashlib.sha256(repr(shards).encode()).hexdigest()[:16]

    def _how_read(self) -> dict[str, Any]:
        """The settings that decide which rows come next, without the number of micro batches."""
        data = self.recipe.dataset
        of_recipe = {name: getattr(data, name) for name in ("batch", "workers", "shuffle", "held_out")}
        return {"shards": self.data_identity(), **of_recipe}

    def close_data(self) -> None:
        self.readers.clear()

    def places(self) -> dict[str, Any]:
        found: dict[str, Any] = {"how": self._how_read()}
        for size, reader in self.readers.items():
            state = reader.loader.state_dict()
            found |= {f"{number}:{size.name}": state_of(state, number) for number in reader.micro}
        return found

    def draw(self, variant: Variant, micro: int) -> Batch:
        loaded = self.readers[variant.size].next(micro)
        if variant.size.picture:
            loaded = replace(loaded, moments=loaded.moments[:, :, :1], motion=torch.zeros_like(loaded.motion))
        return self._batch(loaded, torch.rand(len(loaded.captions)) < self.recipe.dataset.short_captions)

    def _batch(self, loaded: LoadedBatch, short: Tensor, generator: torch.Generator | None = None) -> Batch:
        """On the device; `short` (B,) says which are told their caption's first sentence."""
        text, lengths = self._features(loaded, short)
        moments, motion, fps = (send(x, self.device) for x in (loaded.moments, loaded.motion, loaded.fps))
        return Batch(draw_latents(moments, self.vae, generator), text, lengths, motion, fps)

    def _features(self, loaded: LoadedBatch, short: Tensor) -> tuple[Tensor, Tensor]:
        """Token features (B, T, width) and lengths (B,): the dataset's, or made here where it has none."""
        length = self.model.text_embed.token_len
        if loaded.whole is None or loaded.short is None:
            pairs = zip(loaded.captions, short.tolist(), strict=True)
            captions = [first_sentence(caption) if brief else caption for caption, brief in pairs]
            return encode_texts(self._text_encoder(self.device), captions, length)
        whole, brief = (
            functional.pad(text, (0, 0, 0, length - text.shape[1])) for text, _ in (loaded.whole, loaded.short)
        )
        text = torch.where(short[:, None, None], brief, whole)
        counts = torch.where(short, loaded.short[1], loaded.whole[1]).clamp(max=length)
        return send(text, self.device), send(counts, self.device)

    def _text_encoder(self, device: torch.device) -> TextEncoder:
        """The text encoder, loaded at the first use."""
        if self._text is None:
            if self.text_name is None:
                raise InputError(
                    f"{self.recipe.dataset.path} has no text features: expected a text_encoder that makes them"
                )
            dtype = torch.float16 if device.type == "cuda" else torch.float32
            self._text = open_text_encoder(self.text_name, dtype, device)
        return self._text

    # Looking at it ------------------------------------------------------------------------------------------------

    def _facts(self) -> Iterator[Fact]:
        """Facts about the dataset's rows, the largest size first."""
        for bucket in sorted(self.shards, key=lambda bucket: bucket != self.largest):
            for shard in self.shards[bucket]:
                columns = read_columns(shard.url, ("source", "caption", "fps", "motion"))
                for number, values in enumerate(zip(*columns.values(), strict=True)):
                    yield Fact(bucket, shard.url, number, *values)

    @cached_property
    def held_out(self) -> list[EncodedSample]:
        """The rows of the first size that has two captions from sources that are not trained on."""
        share = self.recipe.dataset.held_out
        rows = [row for row in self.probe if is_held_out(row.source, share)]
        sizes = [[row for row in rows if row.bucket == bucket] for bucket in dict.fromkeys(row.bucket for row in rows)]
        found = next((size for size in sizes if len({row.caption for row in size}) > 1), [])[:HELD_OUT]
        by_shard = itertools.groupby(found, lambda row: row.url)
        return [sample for url, rows in by_shard for sample in read_rows(url, [row.number for row in rows])]

    @torch.no_grad()
    def validate(self, model: NOVATransformer3DModel) -> dict[str, float]:
        """Loss on held-out clips with their own captions and with those of others, the same random numbers in both.

        The distance between them is what the model knows of the prompt.
        """
        samples = self.held_out
        if not samples:
            return {}
        generator = torch.Generator(self.device).manual_seed(self.seed)
        told_whole = torch.zeros(len(samples), dtype=torch.bool)
        turned = [samples[i:] + samples[:i] for i in range(len(samples))]
        whole = self._batch(collate(samples), told_whole, generator)
        other = [next(s for s in turn if s.caption != turn[0].caption) for turn in turned]
        wrong = self._batch(collate(other), told_whole, generator)
        batch = replace(whole, motion=torch.full_like(whole.motion, self.defaults.motion_flow))
        told = {"": batch, "_wrong_caption": replace(batch, text=wrong.text, lengths=wrong.lengths)}
        found = {}
        visible = self.tokens(self.grid(samples[0].bucket)) // 8
        for name, shown in told.items():
            with torch.random.fork_rng([self.device] if self.on_gpu else []), self.half():
                torch.manual_seed(self.seed)
                losses = self.denoising_losses(model, shown, shown.latents, visible, 1)
            found[f"held_out_loss{name}"] = losses.total.item()
        return found

    def sheet(self, model: NOVATransformer3DModel, folder: Path) -> Image.Image:
        """Clips generated from held-out captions, and from others where those are few."""
        told = [*(sample.caption for sample in self.held_out), *(row.caption for row in self.probe)]
        captions = list(dict.fromkeys(told))[:SHEET_SAMPLES]
        pipe, bucket = self.open(folder), self.largest
        entries = []
        for caption in captions:
            generator = torch.Generator().manual_seed(self.seed)
            made = pipe(
                caption,
                fps=self.defaults.fps,
                motion_flow=self.defaults.motion_flow,
                generator=generator,
                output_type="np",
                num_frames=bucket.frames,
                height=bucket.height,
                width=bucket.width,
            )
            clip = made.images[:1] if bucket.frames == 1 else made.frames[0]
            entries.append(SheetEntry((clip * 255).round().astype("uint8"), caption, ""))
        subtitle = f"made by {self.recipe.exported_weights} from captions of {self.recipe.dataset.path}"
        return draw_sheet(self.recipe.name, subtitle, entries)

    def learned_from(self) -> str:
        data = self.recipe.dataset
        buckets = dict.fromkeys(variant.size.bucket for variant, share in zip(*self.variants(), strict=True) if share)
        rows = {bucket.name: sum(shard.rows for shard in self.shards[bucket]) for bucket in buckets}
        sizes = ", ".join(f"{count} of {name}" for name, count in rows.items())
        held_out = f", but for about {100 * data.held_out:g}%, which were held out" if data.held_out else ""
        if len(self.probe) < PROBE_ROWS:  # all are known
            out = sum(is_held_out(row.source, data.held_out) for row in self.probe if row.bucket in buckets)
            held_out = f", but for {out}, which were held out" if out else ""
        return f"{sum(rows.values())} samples of `{data.path}` ({sizes}: frames x height x width){held_out}"

    def own_parts(self) -> dict[str, Any]:
        parts: dict[str, Any] = {"vae": self.vae} if names_extension(self.recipe.autoencoder) else {}
        if self.text_name is not None and names_extension(self.text_name):
            parts["text_encoder"] = self._text_encoder(self.device)
        return parts

    def export(self, model: NOVATransformer3DModel, folder: Path) -> None:
        if self.text_name is None or self.recipe.lora.rank:
            self.export_parts(model, self.vae, None, folder)
            return
        place = find_text(self.text_name)
        self.export_parts(model, self.vae, None if place.tokenizer else place.encoder, folder)
        if place.tokenizer:  # parts of a checkpoint, found there
            for part, target in (("text_encoder", place.encoder), ("tokenizer", place.tokenizer)):
                if not (folder / part).exists():
                    os.symlink(Path(target).resolve(), folder / part)
            note_text_parts(folder)


def send(value: Tensor, device: torch.device) -> Tensor:
    """Copies to the device without waiting for its work in progress; copies of unpinned memory would wait."""
    return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)
