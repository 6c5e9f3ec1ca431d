"""The common part of all trainings of the transformer: the model, the loss of a batch, the exported folder.

`dataset_task.py` reads clips that were encoded beforehand; a world's task, in `nova_worlds`, renders them as it trains.
"""

import copy
import json
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nova_video.autoencoders import scale_latents
from nova_video.common.errors import InputError
from nova_video.common.extensions import load_extension, make_extension
from nova_video.common.extras import install_command
from nova_video.common.fast_parts import find_fast
from nova_video.common.startup import reveal
from nova_video.io.checkpoints import lasting_name, resolve_checkpoint
from nova_video.io.weights import read_json
from nova_video.model import RANDOM_ORDER, NOVATransformer3DModel, Order, mask_ratios
from nova_video.model.config import spatial_patch
from nova_video.model.lora import add_lora
from nova_video.model.masking import check_order
from nova_video.pipeline.loading import load_scheduler, load_transformer, names_head
from nova_video.pipeline.lora_files import save_lora
from nova_video.pipeline.pipeline import NovaPipeline
from nova_video.pipeline.settings import CheckpointSettings
from nova_video.sampling.schedulers import new_scheduler
from nova_video.text.load import check_text_encoder, text_class
from nova_video.training.flops import step_flops
from nova_video.training.loss import (
    TIME_BINS,
    LossDraws,
    Losses,
    NoiseTable,
    draw,
    draw_per_sample,
    loss_parts,
    losses,
    total_loss,
    visible_tokens,
)
from nova_video.training.recipe import SMALL, ModelRecipe, TransformerRun
from nova_video.training.task import LossParts, Task

MASK_MULTIPLE = 16  # numbers of revealed tokens are padded to it, where every sample has its own


@dataclass(frozen=True, eq=False)
class Batch:
    """The data of a micro batch, on the device."""

    latents: Tensor
    """(B, C, F, h, w) as the transformer sees them, float32."""
    text: Tensor
    """(B, T, width): token features, padded to the model's text length."""
    lengths: Tensor
    """(B,) how many of them there are."""
    motion: Tensor
    """(B,) pixels a frame."""
    fps: Tensor
    """(B,)"""


@dataclass(frozen=True)
class Variant:
    """The facts that decide the shapes of a step."""

    size: Any
    """Which samples: a clip length in a world, a size bucket of a dataset."""
    visible: int | None
    """Revealed tokens of each frame; None: as each sample draws."""


class TransformerTask(Task[NOVATransformer3DModel, Variant, Batch]):
    """A transformer under training, wherever its samples come from."""

    def __init__(
        self, recipe: TransformerRun, model: NOVATransformer3DModel, scheduler: Any, device: torch.device, frames: int
    ) -> None:
        """`frames` are the latent frames of the longest clips."""
        super().__init__(recipe.seed, device)
        self.recipe, self.scheduler = recipe, scheduler
        self.model = model.to(device)
        self.defaults = recipe.defaults
        self.table = NoiseTable.from_scheduler(scheduler, device)
        self.values = model.patch_size**2 * model.config.image_dim
        self.order: Order = RANDOM_ORDER
        if recipe.order:
            self.order = make_extension(recipe.order, "order")
            check_order(self.order)
        self.losses: Callable[..., Losses] = load_extension(recipe.loss, "loss") if recipe.loss else losses
        self.capturable = recipe.mask_ratio == "batch"
        self.loss_names = ("loss", "loss_t2i", "loss_i2i")
        self.loss_names += tuple(f"loss_time_{i}" for i in range(TIME_BINS))
        self.loss_names += tuple(f"loss_frame_{i}" for i in range(frames if frames > 1 else 0))
        if recipe.lora.rank and (recipe.log.sample_every or recipe.log.score_every):
            check_text_of_init(recipe.init)
        freeze(model, recipe.frozen)
        if recipe.lora.rank:
            add_lora(model, recipe.lora.rank, recipe.lora.alpha, recipe.lora.targets)
        if recipe.precision == "fp8":
            use_fp8(model, device)
        if recipe.checkpointing:
            model.enable_gradient_checkpointing(checkpoint_block)
        if (fast := find_fast("arrange")) is not None:
            timesteps = None if recipe.loss else self.table.timestep  # a loss of the user's own may draw others
            self.model = fast.arrange_for_training(
                self.model, timesteps, recipe.compile and self.on_gpu, recipe.attention_kernels
            )

    # One step -----------------------------------------------------------------------------------------------------

    def counts(self, tokens: int) -> tuple[list[int], list[float]]:
        """Numbers of revealed tokens of a frame's `tokens`, and the share of the batches each gets."""
        recipe = self.recipe
        if recipe.visible:
            if max(recipe.visible) > tokens:
                raise InputError(f"visible is {recipe.visible}: expected at most the {tokens} tokens of a frame")
            return list(recipe.visible), list(recipe.visible_probability)
        ratios = mask_ratios(100_000, torch.Generator().manual_seed(0))
        if recipe.mask_levels:
            ratios = (ratios * recipe.mask_levels).round() / recipe.mask_levels
        shown = ((1 - ratios) * tokens).round().long()
        counts = shown.unique(return_counts=True)
        return counts[0].tolist(), (counts[1] / len(shown)).tolist()

    def loss(self, variant: Variant, batch: Batch) -> LossParts:
        return self.named(self.batch_losses(self.model, batch, variant.visible))

    def batch_losses(self, model: NOVATransformer3DModel, batch: Batch, visible: int | None) -> Losses:
        """The loss as it is trained: with prompts and scores left out here and there, and noise on the history."""
        recipe, count, device = self.recipe, len(batch.latents), batch.latents.device
        chance = torch.rand(2, count, device=device)
        lengths = batch.lengths.masked_fill(chance[0] < recipe.prompt_dropout, 0)
        motion = batch.motion.masked_fill(chance[1] < recipe.motion_dropout, self.defaults.motion_flow)
        noise = recipe.history_noise * torch.rand(count, 1, batch.latents.shape[2], 1, 1, device=device)
        history = batch.latents + noise * torch.randn_like(batch.latents)
        told = replace(batch, lengths=lengths, motion=motion)
        return self.denoising_losses(model, told, history, visible, recipe.loss_repeat)

    def denoising_losses(
        self, model: NOVATransformer3DModel, batch: Batch, history: Tensor, visible: int | None, repeats: int
    ) -> Losses:
        """With what the temporal encoder reads of the clips, (B, C, F, h, w)."""
        tokens = model.embed_condition(batch.text.float(), batch.lengths, batch.motion, batch.fps)  # (B, T, D)
        num_frames, grid = batch.latents.shape[2], (batch.latents.shape[3], batch.latents.shape[4])
        draws = self._draws(len(batch.latents), num_frames, grid, visible, repeats)
        found = self.losses(model, batch.latents, history, tokens, self.table, draws)
        if not isinstance(found, Losses):
            raise InputError(f"loss = {self.recipe.loss!r} returns {type(found).__name__}: expected Losses")
        return found

    def _draws(
        self, count: int, num_frames: int, grid: tuple[int, int], visible: int | None, repeats: int
    ) -> LossDraws:
        tokens, patch = self.tokens(grid), self.model.patch_size
        rows_and_columns = (grid[0] // patch, grid[1] // patch)
        if visible is not None:
            return draw(
                self.table,
                count * num_frames,
                tokens,
                self.values,
                visible,
                repeats,
                order=self.order,
                grid=rows_and_columns,
            )
        each = [number for number in visible_tokens(count, tokens) for _ in range(num_frames)]
        return draw_per_sample(
            self.table, each, tokens, self.values, repeats, MASK_MULTIPLE, order=self.order, grid=rows_and_columns
        )

    def tokens(self, grid: tuple[int, int]) -> int:
        """Number of tokens of a frame on the latent grid (h, w)."""
        return (grid[0] // self.model.patch_size) * (grid[1] // self.model.patch_size)

    def named(self, found: Losses) -> LossParts:
        """Losses by the names of the log; those by noise level are pairs of a sum and a count."""
        by_frame, frames = found.by_frame.detach(), len(found.by_frame)
        parts: LossParts = {**loss_parts(by_frame), "loss": total_loss(found, self.recipe.video_loss)}
        counts = found.bin_count.float()
        parts |= {f"loss_time_{i}": (found.bin_sum[i], counts[i]) for i in range(TIME_BINS)}
        if frames > 1:
            parts |= {f"loss_frame_{i}": value for i, value in enumerate(frames * by_frame)}
        return parts

    @abstractmethod
    def shape(self, variant: Variant) -> tuple[int, tuple[int, int]]:
        """Latent frames of the samples of a step, and their latent grid (h, w)."""

    def flops(self, variant: Variant) -> float:
        (frames, grid), visible = self.shape(variant), variant.visible
        if visible is None:  # that many on average
            visible = round(
                (1 - mask_ratios(10_000, torch.Generator().manual_seed(0)).mean().item()) * self.tokens(grid)
            )
        return step_flops(self.model, self.samples(variant), frames, grid, visible, self.recipe.loss_repeat)

    # What it becomes ----------------------------------------------------------------------------------------------

    def open(self, folder: Path) -> NovaPipeline:
        """Opens an exported folder on the device."""
        adapters = self.recipe.lora.rank > 0
        place = self.recipe.init if adapters else folder
        head = type(self.model.image_decoder)
        pipe = NovaPipeline.from_pretrained(place, head=head, **self.own_parts()).to(self.device)
        if adapters:
            pipe.load_lora_weights(folder)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def own_parts(self) -> dict[str, Any]:
        """The user's own parts by their names in `NovaPipeline`: no checkpoint opens them."""
        return {}

    def export_parts(self, model: NOVATransformer3DModel, vae: Any, text_encoder: str | None, folder: Path) -> None:
        """Write a whole checkpoint but for the text encoder, which `nova.json` names, weights in fp16; or the adapters
        alone."""
        if self.recipe.lora.rank:
            save_lora(model, folder, base=lasting_name(self.recipe.init))
            return
        half = NOVATransformer3DModel.from_config(model.config, head=type(model.image_decoder))
        half.load_state_dict(model.state_dict())
        settings = CheckpointSettings(text_encoder and lasting_name(text_encoder), self.defaults)
        kept = copy.deepcopy(vae).half() if isinstance(vae, ModelMixin) else None  # a user's own has no files
        NovaPipeline(half.half(), self.scheduler, kept, settings=settings).save_pretrained(folder)


def checkpoint_block(block: nn.Module, *args: Any) -> Tensor:
    """Calls a block; of what it computes only the output is kept, and the backward pass computes the rest again.

    The same gradients, in less memory and about a third more time. Blocks draw no random numbers, so none are saved.
    """
    out: Tensor = checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)
    return out


def note_text_parts(folder: Path) -> None:
    """Name the classes of an export's text encoder and tokenizer in model_index.json, for `DiffusionPipeline`."""
    index = folder / "model_index.json"
    tokenizer = read_json(folder / "tokenizer" / "tokenizer_config.json").get("tokenizer_class")
    if not hasattr(transformers, str(tokenizer)) and (folder / "tokenizer" / "tokenizer.json").is_file():
        tokenizer = "PreTrainedTokenizerFast"
    kinds = {"text_encoder": text_class(str(folder / "text_encoder")), "tokenizer": tokenizer}
    known = {part: ["transformers", kind] for part, kind in kinds.items() if kind}
    index.write_text(json.dumps(read_json(index) | known, indent=2) + "\n", encoding="utf-8")


def check_text_of_init(init: str) -> None:
    """Adapters are sampled with all that the checkpoint has."""
    try:
        check_text_encoder(init)
    except InputError as error:
        raise InputError(f"init = {init!r}, which samples are made with: {error}") from None


# Making the model -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Material:
    """The sizes of latents and features that a model is made for."""

    channels: int
    """Channels of the latents."""
    stride: int
    """Pixels of a cell of the latent grid."""
    text_dim: int
    size: tuple[int, int]
    """Height and width in pixels."""
    names: str
    """The source of these sizes, for errors."""


def make_model(recipe: TransformerRun, material: Material) -> tuple[NOVATransformer3DModel, ModelRecipe]:
    """The transformer to train, from `init` or from scratch, and its size with nothing left open."""
    if recipe.lora.rank and not recipe.init:
        raise InputError(f"lora.rank is {recipe.lora.rank} and there is no init: expected a checkpoint to adapt")
    head = load_extension(recipe.model.head, "model.head") if recipe.model.head else None
    start = None
    if recipe.init:
        folder = resolve_checkpoint(recipe.init)
        start = load_transformer(folder, head=head if names_head(folder) else None)
    size = resolve_size(recipe, None if start is None else start.config, material)
    patch = spatial_patch(material.stride)
    rows, columns = (side // material.stride // patch for side in size["image_size"])
    model = NOVATransformer3DModel(
        image_dim=material.channels,
        image_size=size["image_size"],
        image_stride=material.stride,
        text_token_dim=material.text_dim,
        text_token_len=size["text_token_len"],
        image_base_size=(rows, columns),
        video_base_size=(size["video_base_frames"], rows // 2, columns // 2),
        video_mixer_rank=size["video_mixer_rank"] or None,
        rotary_pos_embed=size["rotary_pos_embed"],
        arch=size["arch"],
        head=head,
    )
    if start is not None:
        take_weights(model, start, recipe)
    return model, ModelRecipe(**size)


def resolve_size(recipe: TransformerRun, config: Any | None, material: Material) -> dict[str, Any]:
    """Fields of `ModelRecipe`: the recipe's values, else the checkpoint's, else SMALL's. Where they disagree, an error
    names the field."""
    given = {name: value for name, value in asdict(recipe.model).items() if value is not None}
    if config is None:
        return asdict(SMALL) | {"image_size": material.size} | given
    fixed = {
        "channels of the latents": (config.image_dim, material.channels),
        "pixels of a latent": (config.image_stride, material.stride),
        "channels of the text features": (config.text_token_dim, material.text_dim),
    }
    for name, (has, needs) in fixed.items():
        if has != needs:
            raise InputError(f"init = {recipe.init!r} is made for {has} {name}, but {material.names}: {needs}")
    found = {
        "arch": tuple(config.arch),
        "video_mixer_rank": config.video_mixer_rank or 0,
        "rotary_pos_embed": config.rotary_pos_embed,
        "text_token_len": config.text_token_len,
        "video_base_frames": config.video_base_size[0],
    }
    for name, has in found.items():
        if not recipe.fresh and given.get(name, has) != has:
            raise InputError(
                f"model.{name} is {given[name]!r}, but init = {recipe.init!r} has {has!r}: expected the same, or none,"
                " or the parts that differ in `fresh`"
            )
    return found | {"image_size": material.size, "head": None} | given


def take_weights(model: NOVATransformer3DModel, start: NOVATransformer3DModel, recipe: TransformerRun) -> None:
    """The checkpoint's weights into the model, all but those that start anew."""
    weights, taken = model.state_dict(), start.state_dict()
    match_prefixes("fresh", recipe.fresh, weights)
    for name, value in weights.items():
        if name.startswith(recipe.fresh):
            taken[name] = value
        elif name not in taken:
            raise InputError(f"init = {recipe.init!r} has no {name}: expected it, or its beginning in `fresh`")
        elif taken[name].shape != value.shape:
            shapes = f"{tuple(taken[name].shape)}, and this recipe's model {tuple(value.shape)}"
            raise InputError(f"init = {recipe.init!r} has {name} of shape {shapes}: expected its beginning in `fresh`")
    model.load_state_dict({name: taken[name] for name in weights})


def match_prefixes(field: str, prefixes: tuple[str, ...], names: Any) -> None:
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name in names):
            parts = sorted({".".join(name.split(".")[:2]) for name in names if not name.split(".")[1].isdigit()})
            raise InputError(
                f"{field} has {prefix!r}, which no weight begins with: expected such as {', '.join(parts)}"
            )


def freeze(model: nn.Module, prefixes: tuple[str, ...]) -> None:
    """Parts whose names begin so are not trained."""
    match_prefixes("frozen", prefixes, list(model.state_dict()))
    for name, parameter in model.named_parameters():
        if prefixes and name.startswith(prefixes):
            parameter.requires_grad_(False)


def use_fp8(model: NOVATransformer3DModel, device: torch.device) -> None:
    """The encoders' and the denoiser's linear layers multiply in 8 bit floats, by torchao."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        raise InputError(f"precision = 'fp8' on {device}: expected a GPU that has 8 bit floats (Ada, Hopper or later)")
    reveal()
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError:
        raise InputError(f"precision = 'fp8' needs torchao: {install_command('lowmem')}") from None

    def fits(module: nn.Module, name: str) -> bool:
        return (
            ".blocks." in name and isinstance(module, nn.Linear) and not (module.in_features | module.out_features) % 16
        )

    padded = Float8LinearConfig(pad_inner_dim=True)  # gradients of weights sum over all tokens, of any number
    convert_to_float8_training(model, config=padded, module_filter_fn=fits)


def make_scheduler(recipe: TransformerRun) -> Any:
    """The schedule of noise that is trained on."""
    if recipe.scheduler == "init":
        if not recipe.init:
            raise InputError(
                "scheduler is 'init' and there is no init: expected flow, ddpm or a checkpoint to start from"
            )
        return load_scheduler(resolve_checkpoint(recipe.init))
    scheduler = new_scheduler(recipe.scheduler)
    if recipe.lora.rank:
        of_init = load_scheduler(resolve_checkpoint(recipe.init))
        ours, theirs = (NoiseTable.from_scheduler(each, "cpu") for each in (scheduler, of_init))
        if ours.prediction != theirs.prediction or not torch.equal(ours.noise_scale, theirs.noise_scale):
            raise InputError(
                f"scheduler is {recipe.scheduler!r}, and {recipe.init!r} with its adapters is used with another:"
                " expected 'init'"
            )
    return scheduler


def draw_latents(moments: Tensor, vae: Any, generator: torch.Generator | None = None) -> Tensor:
    """Moments (B, 2C, F, h, w) -> a draw from the posterior, as the transformer sees it (B, C, F, h, w), float32."""
    mean, log_variance = moments.float().chunk(2, dim=1)
    std = (0.5 * log_variance.clamp(-30, 20)).exp()
    noise = torch.randn(mean.shape, generator=generator, device=mean.device)
    return scale_latents(vae, mean + std * noise)
