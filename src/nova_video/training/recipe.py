"""Recipes: everything a training run depends on, as typed records read from one TOML file.

`load_recipe` opens a file, takes dotted overrides (`--optimizer.lr 3e-4`) through tyro and refuses unknown keys. The
resolved recipe is saved beside the weights it made.
"""

import dataclasses
import json
import tomllib
import typing
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Literal, NamedTuple, TypeVar

from nova_video.common.checks import AttentionKernels, check_local, check_number, quote
from nova_video.common.errors import InputError, first_line, unknown
from nova_video.common.extensions import load_extension
from nova_video.common.option_fields import without_aliases
from nova_video.io.text import read_toml
from nova_video.pipeline.settings import Defaults

T = TypeVar("T")

"""Characters of a wrong value that an error repeats."""


@dataclass(frozen=True)
class DatasetRecipe:
    """The training data: clips and pictures that `nova encode` encoded, streamed from a folder or a URL."""

    path: str = ""
    """Folder or URL written by `nova encode`."""
    batch: int = 16
    """Samples of a micro batch from the largest size bucket. Smaller sizes get more, with as many tokens."""
    image_share: float | None = None
    """Share of the steps on pictures; where the dataset has none, on the clips' first frames. None: the share that
    pictures have of the rows."""
    short_captions: float = 0.5
    """Share of the samples that are told the caption's first sentence only."""
    held_out: float = 0.02
    """Share of the sources that are kept for validation."""
    shuffle: int = 1024
    """Number of neighbouring rows that are mixed, over all micro batches and workers together.

    Each mixes a batch at least. Besides, every pass reads the shards in another order.
    """
    workers: int = 2
    """Reading processes for each training process and each bucket; 0: the trainer reads itself.

    There are at most as many as a micro batch has shards.
    """

    def __post_init__(self) -> None:
        for name in ("batch", "shuffle"):
            check_number(f"dataset.{name}", getattr(self, name), 1, integer=True)
        check_number("dataset.workers", self.workers, 0, integer=True)
        for name in ("image_share", "short_captions", "held_out"):
            if (share := getattr(self, name)) is not None:
                check_number(f"dataset.{name}", share, 0, high=1, below=name == "held_out")


@dataclass(frozen=True)
class OptimizerRecipe:
    """AdamW with a linear warm-up and a cosine down to `final` of the rate: `final = 1` keeps it constant."""

    lr: float = 6e-4
    """Learning rate after the warm-up."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the running means of gradients and of their squares."""
    weight_decay: float = 0.03
    """Weight decay of matrices; biases, norms and single tokens are not decayed."""
    warmup: int = 1000
    """Steps of linear warm-up."""
    final: float = 0.1
    """Learning rate at the last step, as a share of `lr`."""
    clip: float = 1.0
    """Largest gradient norm; 0: whatever it is."""
    ema: float = 0.999
    """Decay of the averaged weights (EMA). It warms up: after n updates it is min(ema, (1 + n) / (10 + n))."""
    ema_every: int = 1
    """Steps between two updates of the averaged weights."""

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay", "clip"):
            check_number(f"optimizer.{name}", getattr(self, name), 0)
        for beta in self.betas:
            check_number("optimizer.betas", beta, 0, high=1, below=True)
        check_number("optimizer.warmup", self.warmup, 0, integer=True)
        check_number("optimizer.final", self.final, 0, high=1)
        check_number("optimizer.ema", self.ema, 0, high=1, below=True)
        check_number("optimizer.ema_every", self.ema_every, 1, integer=True)


@dataclass(frozen=True)
class LogRecipe:
    """The output of training and its intervals (in steps; 0: never)."""

    every: int = 100
    """Losses, to the screen and TensorBoard."""
    validate_every: int = 1000
    """Losses on held-out clips: with the right prompt and with a wrong one, or the autoencoder's PSNR."""
    sample_every: int = 0
    """A sheet of samples (or reconstructions)."""
    score_every: int = 0
    """`nova evaluate emoji` on a few clips; for transformers trained in a world."""
    score_clips: int = 120
    """Clips of a score."""
    checkpoint_every: int = 1000
    """Everything that is needed to go on."""
    keep: int = 2
    """Checkpoints kept."""

    def __post_init__(self) -> None:
        for name in ("every", "validate_every", "sample_every", "score_every", "checkpoint_every"):
            check_number(f"log.{name}", getattr(self, name), 0, integer=True)
        for name in ("score_clips", "keep"):
            check_number(f"log.{name}", getattr(self, name), 1, integer=True)


@dataclass(frozen=True)
class Recipe:
    """The settings of every training run."""

    kind: str = ""
    """Kind of training: `transformer` (encoded dataset), `world-transformer`, `autoencoder` (in a world).

    Or `module:Class`, which is a `Task` of one's own, whose `recipe_type` is the record of its settings.
    """
    name: str = "run"
    """Name of the run for the trackers."""
    steps: int = 40000
    """Optimizer steps of the run."""
    seconds: float = 0.0
    """End after this many seconds of training if that comes first, with the schedule fitted to it; 0: no limit."""
    seed: int = 0
    """Fixes the order of the data and all random numbers."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    output: str = "runs/run"
    """Folder of the checkpoints, the model, the log and the sheets."""
    cuda_graph: bool = True
    """Record the whole step as CUDA graphs, one for each variant that comes up twice: faster, in more memory (one micro
    batch a step on each GPU, and not with mask_ratio = "sample")."""
    micro_batches: int = 0
    """Micro batches of a step, over all processes; 0: one for each process.

    A step learns the same however many processes share them.
    """
    precision: Literal["auto", "fp32", "bf16", "fp8"] = "auto"
    """Precision of the arithmetic and of activations; weights are kept in fp32. auto: bf16 on a GPU, fp32
    elsewhere. fp8: bf16, and the large products of the transformer in 8 bit floats, on GPUs that have them."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """With several processes: whole weights on each (ddp), or sharded over them (fsdp). auto: what `accelerate launch`
    says, else ddp."""
    export: Literal["ema", "raw"] = "ema"
    """Weights that are exported, and so validated, drawn and scored: averaged ones (ema) or those of the last step."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Any that accelerate knows: tensorboard, wandb, trackio, ..."""
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    log: LogRecipe = field(default_factory=LogRecipe)

    def __post_init__(self) -> None:
        check_number("steps", self.steps, 1, integer=True)
        check_number("seconds", self.seconds, 0)
        check_number("seed", self.seed, 0, integer=True, high=2**63, below=True)
        if not self.output:
            raise InputError("output is empty: expected a folder")
        check_number("micro_batches", self.micro_batches, 0, integer=True)
        check_local("output", self.output)

    @property
    def attention_kernels(self) -> AttentionKernels:
        """Which kernels attention on a GPU may take."""
        return "flash"

    @property
    def exported_weights(self) -> str:
        """Which weights are exported and looked at, in words."""
        return f"averaged weights (EMA {self.optimizer.ema:g})" if self.export == "ema" else "raw weights"


@dataclass(frozen=True)
class ModelRecipe:
    """The transformer's size; the rest of `NOVATransformer3DModel`'s configuration follows from the autoencoder.

    None: what the checkpoint named by `init` has, or else the value of SMALL.
    """

    arch: tuple[str, str, str] | None = None
    """Temporal encoder, spatial encoder and denoiser."""
    video_mixer_rank: int | None = None
    """0: no mixer, below 0: full rank."""
    rotary_pos_embed: bool | None = None
    """Rotary positions, which allow other sizes than `image_size`."""
    text_token_len: int | None = None
    """Most tokens of a prompt."""
    video_base_frames: int | None = None
    """Latent frames of the temporal encoder's grid; above 1 the model has motion tokens."""
    image_size: tuple[int, int] | None = None
    """Height and width in pixels that positions are made for; also None: the size of what is learned from."""
    head: str | None = None
    """A denoiser of one's own, `module:Class`: see `nova_video.model.head`."""

    def __post_init__(self) -> None:
        for name in ("text_token_len", "video_base_frames"):
            if (value := getattr(self, name)) is not None:
                check_number(f"model.{name}", value, 1, integer=True)
        for side in self.image_size or ():
            check_number("model.image_size", side, 1, integer=True)


SMALL = ModelRecipe(("vit_d4w256", "vit_d9w256", "mlp_d3w320"), -1, True, 32, 5)


@dataclass(frozen=True)
class LoraRecipe:
    """Low-rank adapters: with a rank above 0 they are what is trained, and the model's own weights stay."""

    rank: int = 0
    """Rank of each adapter; 0: no adapters."""
    alpha: float = 0.0
    """Adapters are scaled by alpha / rank; 0: as large as the rank."""
    targets: tuple[str, ...] = ()
    """Names of the layers that get one, as peft matches them; empty: attention and MLP of both encoders."""

    def __post_init__(self) -> None:
        check_number("lora.rank", self.rank, 0, integer=True)
        check_number("lora.alpha", self.alpha, 0)


@dataclass(frozen=True)
class TransformerRun(Recipe):
    """The settings of all trainings of `NOVATransformer3DModel`."""

    init: str = ""
    """Checkpoint (folder, hub id or `emoji`) whose transformer is started from; empty: from scratch."""
    fresh: tuple[str, ...] = ()
    """With `init`: parts that are not taken from it but start anew, by the beginning of their names."""
    autoencoder: str = "runs/autoencoder/model"
    """Checkpoint whose autoencoder makes the latents."""
    text_encoder: str = "sentence-transformers/all-MiniLM-L6-v2"
    """Local folder, name of an installed package's model, or hub id; in that order."""
    scheduler: Literal["flow", "ddpm", "init"] = "flow"
    """Schedule of the noise; init: as `init` has it."""
    frozen: tuple[str, ...] = ()
    """Parts that stay as they are, by the beginning of their names, such as video_pos_embed. The padding table
    (text_embed.weight) always does."""
    visible: tuple[int, ...] = ()
    """Numbers of revealed tokens that batches are trained with; empty: the paper's truncated normal."""
    visible_probability: tuple[float, ...] = ()
    """Share of the batches that each of these numbers gets."""
    mask_ratio: Literal["batch", "sample"] = "batch"
    """batch: all frames hide the same number of tokens (the paper); sample: each sample draws its own."""
    mask_levels: int = 0
    """With mask_ratio "batch": ratios are rounded to multiples of 1 / this, which leaves fewer variants to compile and
    record. 0: any ratio (the paper). Where a frame's tokens are this times 128 (8 at 512 px, 32 at 1024), all lengths
    suit cuDNN's attention."""
    order: str = ""
    """An order of one's own in which tokens are revealed, `module:Class`: a `nova_video.model.Order`. Empty: random."""
    loss: str = ""
    """A loss of one's own, `module:function`: it takes the arguments of `nova_video.training.loss.losses` and returns
    `Losses`. Empty: that function itself."""
    loss_repeat: int = 2
    """Noise draws for each scored token."""
    video_loss: Literal["mean", "released"] = "mean"
    """How the frames of a clip are weighed. mean: alike. released: the sum of loss_t2i and loss_i2i, as the released
    trainer has it: the first frame weighs as much as all later ones together, and the sum is about twice the mean."""
    prompt_dropout: float = 0.1
    """Share of the samples whose prompt is replaced by the null prompt."""
    motion_dropout: float = 0.5
    """Share of the samples whose motion score is replaced by `defaults.motion_flow`.

    So a call without a score is as usual to the model as one with a score.
    """
    history_noise: float = 0.1
    """Largest standard deviation of noise on what the temporal encoder reads of earlier frames."""
    compile: bool = False
    """Compile the transformer blocks (GPU)."""
    checkpointing: bool = False
    """Keep no activations inside blocks but compute them again on the way back: less memory, more time."""
    attention: AttentionKernels = "auto"
    """Kernels of attention on a GPU where nothing is masked. auto: FlashAttention 4, if it is installed (the extra
    `flash`) and knows the GPU; else as cudnn. cudnn: cuDNN's wherever torch prefers them and queries and keys are
    multiples of 128 tokens; elsewhere, where cuDNN's gradients have been NaN, torch's own. flash: torch's own."""
    model: ModelRecipe = field(default_factory=ModelRecipe)
    lora: LoraRecipe = field(default_factory=LoraRecipe)
    defaults: Defaults = field(default_factory=Defaults)
    """The default values of a call of the trained checkpoint."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.visible) != len(self.visible_probability):
            counts = f"{len(self.visible)} and {len(self.visible_probability)}"
            raise InputError(f"visible and visible_probability: expected as many entries in both, got {counts}")
        for count in self.visible:
            check_number("visible", count, 0, integer=True)
        if self.visible:
            check_shares("visible_probability", self.visible_probability)
        check_number("loss_repeat", self.loss_repeat, 1, integer=True)
        for name in ("prompt_dropout", "motion_dropout"):
            check_number(name, getattr(self, name), 0, high=1)
        check_number("history_noise", self.history_noise, 0)
        for name in ("fresh", "frozen"):
            if self.lora.rank and getattr(self, name):
                raise InputError(
                    f"lora.rank is {self.lora.rank}: expected no {name}, adapters alone are learned and kept"
                )
        if self.lora.targets and not self.lora.rank:
            raise InputError(
                "lora.targets are given and lora.rank is 0: expected a rank, the whole model learns without"
            )
        if self.visible and self.mask_ratio == "sample":
            raise InputError("mask_ratio = 'sample' draws the paper's ratios: expected no visible")
        check_number("mask_levels", self.mask_levels, 0, integer=True)
        if self.mask_levels and (self.visible or self.mask_ratio == "sample"):
            raise InputError("mask_levels is of the paper's ratios by batch: expected no visible, mask_ratio = 'batch'")

    @property
    def attention_kernels(self) -> AttentionKernels:
        return self.attention


@dataclass(frozen=True)
class DatasetTransformerRecipe(TransformerRun):
    """On an encoded dataset."""

    kind: Literal["transformer"] = "transformer"
    """Kind of training."""
    autoencoder: str = ""
    """Checkpoint whose autoencoder encoded the dataset; empty: the one that the dataset names."""
    text_encoder: str = ""
    """Empty: the one that the dataset names, else that of `init`."""
    scheduler: Literal["flow", "ddpm", "init"] = "init"
    dataset: DatasetRecipe = field(default_factory=DatasetRecipe)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.log.score_every:
            raise InputError(
                f"log.score_every is {self.log.score_every}: expected 0, there is no judge of a dataset's clips;"
                " log.validate_every logs losses on held-out ones"
            )


class Kind(NamedTuple):
    """A kind of training, by the names of its two classes: they are imported when a recipe asks for them."""

    recipe: str
    task: str


KINDS = {
    "transformer": Kind(
        "nova_video.training.recipe:DatasetTransformerRecipe", "nova_video.training.dataset_task:DatasetTask"
    ),
    "world-transformer": Kind(
        "nova_worlds.training.recipes:WorldTransformerRecipe", "nova_worlds.training.world_task:WorldTask"
    ),
    "autoencoder": Kind(
        "nova_worlds.training.recipes:AutoencoderRecipe", "nova_worlds.training.autoencoder_task:AutoencoderTask"
    ),
}


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """The recipe of a TOML file, with command-line overrides such as ["--optimizer.lr", "3e-4"] on top."""
    try:
        values = read_toml(Path(path))
    except InputError as error:
        is_absent = isinstance(error.__cause__, OSError)
        hint = "; expected a TOML file such as recipes/tiny.toml" if is_absent else ""
        raise InputError(f"recipe {error}{hint}") from None
    recipe = build_recipe(values, f"recipe {path}")
    if not overrides:
        return recipe
    import tyro

    kind = recipe.kind
    recipe, left = tyro.cli(type(recipe), default=recipe, args=overrides, prog="nova train", return_unknown_args=True)
    if recipe.kind != kind:
        raise InputError(f"--kind is {quote(recipe.kind)}: expected {kind!r}, as in {path}")
    if left and not left[0].startswith("-"):
        raise InputError(f"argument {left[0]!r} is one too many: expected a setting and its value")
    if left:
        options = [f"--{key.replace('_', '-')}" for key in _flat(dataclasses.asdict(recipe))]
        name = left[0].split("=")[0].replace("_", "-")
        raise unknown("option", name, options, f"what nova train {path} --help lists")
    return recipe


def parse_recipe(text: str, where: str) -> Recipe:
    """The recipe of a TOML text; `where` names it in errors."""
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not TOML: {first_line(error)}") from error
    return build_recipe(values, where)


def build_recipe(values: dict[str, Any], where: str) -> Recipe:
    """The recipe of a TOML file's values, of the record that belongs to its kind."""
    kind = values.get("kind")
    if kind == "transformer" and "data" in values and "dataset" not in values:  # as version 0.1.0 wrote it
        kind = "world-transformer"
    if isinstance(kind, str) and ":" in kind:
        found = own_task(kind).recipe_type
    elif isinstance(kind, str) and kind in KINDS:
        found = resolve_name(KINDS[kind].recipe)
    else:
        raise InputError(f"{where}: kind is {quote(kind)}, expected one of {', '.join(KINDS)}, or module:Class")
    return _build(found, values | {"kind": kind}, where)


def own_task(name: str) -> Any:
    """The task class of the user's own that `module:Class` names; its `recipe_type` is a frozen dataclass."""
    task = load_extension(name, "kind")
    record = getattr(task, "recipe_type", None)
    if not (isinstance(record, type) and issubclass(record, Recipe) and dataclasses.is_dataclass(record)):
        raise InputError(f"kind is {name!r}: expected a Task whose recipe_type is a dataclass that extends Recipe")
    return task


def recipe_toml(recipe: Recipe) -> str:
    """The recipe as TOML, every default spelt out: what is saved beside the weights."""
    return _toml(dataclasses.asdict(recipe), "")


def changes(before: Recipe, after: Recipe) -> dict[str, tuple[Any, Any]]:
    """The settings that differ, except the output: by key, the value before and after."""
    was, now = _flat(dataclasses.asdict(before)), _flat(dataclasses.asdict(after))
    return {key: (was.get(key), value) for key, value in now.items() if was.get(key) != value and key != "output"}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, by dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def check_shares(name: str, shares: tuple[float, ...]) -> None:
    """Raise InputError where the weights of a draw are negative or all zero."""
    for share in shares:
        check_number(name, share, 0)
    if not sum(shares):
        raise InputError(f"{name} is {shares}: expected a number above 0 among them")


def _build(kind: type[T], values: dict[str, Any], where: str) -> T:
    """A dataclass from a TOML table; unknown keys and wrong types are errors that name the key."""
    known = typing.get_type_hints(kind)
    values = without_aliases(kind, values)
    for key in values:
        if key not in known:
            near = "".join(f" (is it {name}?)" for name in get_close_matches(key, known, 1))
            raise InputError(f"{where}: unknown key {quote(key)}{near}; expected one of {', '.join(known)}")
    return kind(**{key: _convert(known[key], value, f"{where}: {key}") for key, value in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise InputError(f"{where} is {quote(value)}, expected a table")
        return _build(typing.cast(type[Any], hint), value, where)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if type(None) in arguments:  # what may be absent is written only where it is not
        return _convert(arguments[0], value, where)
    if origin is tuple:
        kinds = arguments[:1] * len(value) if isinstance(value, list) and arguments[-1] is Ellipsis else arguments
        if not isinstance(value, list) or len(kinds) != len(value):
            several = "" if arguments[-1:] == (Ellipsis,) else f" of {len(arguments)}"
            raise InputError(f"{where} is {quote(value)}, expected a list{several}")
        return tuple(_convert(each, item, where) for each, item in zip(kinds, value, strict=True))
    if origin is Literal:
        if value not in arguments:
            raise InputError(f"{where} is {quote(value)}, expected one of {', '.join(map(repr, arguments))}")
        return value
    if hint is float and type(value) is int and abs(value) < 2**53:
        return float(value)
    if type(value) is not hint:
        raise InputError(f"{where} is {quote(value)}, expected {getattr(hint, '__name__', hint)}")
    if isinstance(value, str) and "\0" in value:
        raise InputError(f"{where} is {quote(value)}: expected text without a NUL character")
    return value


def _toml(values: dict[str, Any], prefix: str) -> str:
    lines = [
        f"{key} = {_toml_value(value)}"
        for key, value in values.items()
        if not isinstance(value, dict) and value is not None
    ]
    for key, value in values.items():
        if isinstance(value, dict):
            lines += ["", f"[{prefix}{key}]", _toml(value, f"{prefix}{key}.").rstrip()]
    return "\n".join(lines) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON's escapes are TOML's
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    return repr(value)
