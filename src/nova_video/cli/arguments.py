"""The command line: a frozen dataclass for each sub-command, which tyro fills in. Imports nothing heavy.

None stands for the checkpoint's own default.
"""

import contextlib
import io
import platform
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, make_dataclass
from difflib import get_close_matches
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_type_hints

import tyro
from tyro.conf import Positional, UseAppendAction, arg, subcommand

from nova_video import __version__
from nova_video.cli.flags import flag_fields, one_of
from nova_video.common.checks import AttentionKernels, shorten
from nova_video.common.errors import InputError, unknown
from nova_video.common.version import commit
from nova_video.pipeline.options import Options
from nova_video.sampling.presets import PresetName
from nova_video.serving.replica_settings import ReplicaSettings
from nova_video.serving.serve_settings import ServeSettings

PARSE_ERROR = 2  # tyro's exit code
RECORD = re.compile(r"^Error parsing \w\S*: ")  # before what a record says of itself, which names the field
UNREADABLE = re.compile(r"Error parsing (-\S+): (?:Could not find valid parse|no type matching) .*\[(.*)\]")
MODEL = "emoji"  # the bundled model
OWN = "(default: the model's own)"
AUTO = "(default: auto)"
Dtype = Literal["auto", "float32", "float16", "bfloat16"]
Precision = Literal["auto", "fp32", "bf16", "fp8"]
Strategy = Literal["auto", "ddp", "fsdp"]
Format = Literal["mp4", "mov", "webm", "webp", "gif", "png", "jpg", "jpeg", "frames"]
FORMATS = get_args(Format)
EngineName = Literal["local", "ray"]
PRESET_NAMES = get_args(PresetName)
PartName = Literal[
    "continue", "continue-long", "steer", "steer-anywhere", "steer-alone", "inpaint", "inpaint-empty", "inpaint-pair"
]
ALL_PARTS: tuple[PartName, ...] = get_args(PartName)  # of the benchmark beyond one clip
Sentences = Annotated[
    UseAppendAction[tuple[tuple[float, str], ...]], arg(metavar="SECONDS PROMPT", help_behavior_hint="(repeatable)")
]

# Words of released scripts and of other tools for the same settings are aliases.
Output = Annotated[Path | None, arg(aliases=["-o", "--output-dir"], metavar="FILE", help_behavior_hint="")]

# What has no flag of its own, or could mean several.
MEANINGS = {
    "--steps": "--sets (sets of tokens that a frame is made in) or --diffusion-steps (denoising steps of each set)",
    "--prompt": "the sentence in quotes, without an option",
    "--length": "--num-frames or --seconds",
    "--duration": "--seconds",
    "--precision": "--dtype",
    "--checkpoint": "--model",
    "--low-vram": "--low-memory",
    "--cpu-offload": "--low-memory",
    "--resolution": "--size",
    "--num-samples": "--num-images",
    "--num-videos": "--num-images",
    "-s": "--seed",
    "-p": "the sentence in quotes, without an option",
}
MAY_BE_EMPTY = ("--negative", "--negative-prompt")
LONGEST_SHOWN = 200  # letters of what was typed, in a message


STEPS = ("sets", "diffusion_steps", "compile")
GUIDED_OPTIONS = (*STEPS, "guidance_scale", "motion_flow")
SAMPLING = (*GUIDED_OPTIONS, "preset")
"""Options of the benchmarks."""
if TYPE_CHECKING:
    OptionFlags = Options
    SamplingFlags = Options
    GuidedFlags = Options
    StepFlags = Options
    ServeFlags = ServeSettings
    ReplicaFlags = ReplicaSettings
else:
    OptionFlags = make_dataclass("OptionFlags", flag_fields(Options), frozen=True, kw_only=True)
    SamplingFlags = make_dataclass("SamplingFlags", flag_fields(Options, SAMPLING), frozen=True, kw_only=True)
    GuidedFlags = make_dataclass("GuidedFlags", flag_fields(Options, GUIDED_OPTIONS), frozen=True, kw_only=True)
    StepFlags = make_dataclass("StepFlags", flag_fields(Options, STEPS), frozen=True, kw_only=True)
    ServeFlags = make_dataclass("ServeFlags", flag_fields(ServeSettings), frozen=True, kw_only=True)
    ReplicaFlags = make_dataclass("ReplicaFlags", flag_fields(ReplicaSettings), frozen=True, kw_only=True)


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """Flags about the model and its place. None: not given."""

    model: Annotated[str | None, arg(metavar="NAME", help_behavior_hint=f"(default: {MODEL})")] = None
    """`emoji` (the bundled model), a checkpoint folder, or the name of a released checkpoint."""
    head: Annotated[str | None, arg(metavar="MODULE:CLASS", help_behavior_hint="")] = None
    """The class of the model's head, where it has one of your own."""
    lora: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """An adapter of the model (LoRA): a safetensors file or its folder, as `nova train --lora.rank` writes it."""
    lora_scale: Annotated[float | None, arg(metavar="N", help_behavior_hint="(default: 1)")] = None
    """How much of it: 0 is the model without."""
    low_memory: bool = False
    """For a small GPU: the model's parts take turns on it."""
    tiled: bool = False
    """With --low-memory: decode large frames in overlapping tiles, for less of it; pixels differ a little."""
    int8_text: bool = False
    """With --low-memory: the text encoder's weights in 8 bits, half as large; the result differs a little."""
    device: Annotated[str | None, arg(metavar="NAME", help_behavior_hint=AUTO)] = None
    """auto (an NVIDIA GPU if there is one, else cpu), cpu, cuda, cuda:N or mps (an Apple GPU; untested)."""
    dtype: Annotated[Dtype | None, one_of(get_args(Dtype)), arg(help_behavior_hint=AUTO)] = None
    """Precision; auto is float16 on a GPU and float32 elsewhere."""


@dataclass(frozen=True, kw_only=True)
class OutputFlags:
    """Flags about files. None: not given."""

    output: Output = None
    """File to write, numbered if there are several, or a folder for files that are named after their sentences. If
    absent, the current folder."""
    format: Annotated[Format | None, one_of(FORMATS), arg(help_behavior_hint="(default: as --output says)")] = None
    """Format of the files: of a clip mp4 and of a picture png, if --output does not say. frames: a folder of frames,
    frame-0001.png and so on; with -o FOLDER that one, if it is new or empty."""
    size: Annotated[str | None, arg(metavar="WIDTHxHEIGHT", help_behavior_hint=OWN)] = None
    """Size in pixels, such as 768x480, in place of --width and --height."""


@dataclass(frozen=True, kw_only=True)
class CommonFlags(OptionFlags, ModelFlags, OutputFlags):
    """The flags of every command that makes something: all options, and what is of the command line alone."""

    negative: Annotated[str | None, arg(metavar="TEXT", aliases=["--negative-prompt"], help_behavior_hint="")] = None
    """Text that the result should not show."""
    json: bool = False
    """Print one JSON object a file."""


def model_of(args: ModelFlags) -> str:
    """The model's name; an empty one is what a variable of the shell that is not set leaves."""
    if args.model is None:
        return MODEL
    if not args.model.strip():
        raise InputError(f"model is {args.model!r}: expected a name, a checkpoint folder or a hub id")
    return args.model


@dataclass(frozen=True, kw_only=True)
class Generate(CommonFlags):
    """Make videos or pictures from sentences."""

    prompt: Annotated[Positional[tuple[str, ...]], arg(metavar="PROMPT ...", help_behavior_hint="")] = ()
    """One or several sentences, each in quotes; every one gives a file."""
    prompts: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """A text file with one sentence a line; .jsonl or .parquet with settings in each line is a batch. A batch
    writes into the folder of --output, with an index, and goes on after a stop by the same command."""
    index: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Write the index of a batch here too, as .parquet or .jsonl: prompts, settings, files, errors."""
    engine: Annotated[EngineName | None, one_of(get_args(EngineName)), arg(help_behavior_hint="(default: local)")] = (
        None
    )
    """Makes the batch of --prompts in this process, or in several processes and on several machines by Ray."""
    workers: Annotated[
        int | None, arg(metavar="N", help_behavior_hint="(default: one a GPU, or one a core, 8 at most)")
    ] = None
    """With --engine ray: processes that each hold the model."""
    threads: Annotated[
        int | None, arg(metavar="N", help_behavior_hint="(default: the cores, shared out to the workers)")
    ] = None
    """Threads of each worker of a batch on a processor. Results are the same bit for bit if they are as many."""
    ray: Annotated[str | None, arg(metavar="ADDRESS", help_behavior_hint="(default: a Ray of this machine)")] = None
    """With --engine ray: address of a Ray cluster to run on."""
    num_images: Annotated[int, arg(metavar="N", aliases=["-n", "--num-images-per-prompt"])] = 1
    """Pictures or clips of each sentence, each with the next seed."""
    batch: Annotated[
        int | None, arg(metavar="N", aliases=["--batch-size"], help_behavior_hint="(default: 4 on a GPU, else 1)")
    ] = None
    """Pictures or clips that are made together: faster, and each as it is alone, to rounding."""
    sheet: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Draw all of them on one page (png, jpg or webp), with sentences and seeds."""
    image: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """A picture to start the video from."""
    video: Annotated[Path | None, arg(name="continue", metavar="FILE", help_behavior_hint="")] = None
    """A clip to go on from, which the result begins with. Without a sentence, the clip's own."""
    prompt_at: Sentences = ()
    """Another sentence from this second on."""
    like: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Make a file again from the record inside it; flags given here replace its own, such as --seed 5."""
    script: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """A TOML file of these flags and of scenes; flags given here win."""
    live: bool = False
    """Write the clip while it is made: an mp4 that can be played as it grows."""
    state: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Save how far it is after every latent frame, to be able to stop; removed when the clip is there."""
    resume: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Go on from the file that --state kept; it says what to make."""


@dataclass(frozen=True, kw_only=True)
class Edit(CommonFlags):
    """Change a part of a picture or clip, or add to its sides."""

    file: Annotated[Positional[Path], arg(metavar="FILE")]
    """The picture or clip."""
    prompt: Annotated[Positional[str], arg(metavar="PROMPT")]
    """A sentence about the result."""
    mask: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """A picture of the same size, white where something new is to come; or a clip, one mask a frame."""
    outpaint: Annotated[int | None, arg(metavar="PIXELS", help_behavior_hint="")] = None
    """Enlarge the picture by so many pixels on every side, and fill them in."""


@dataclass(frozen=True, kw_only=True)
class Serve(ReplicaFlags, ServeFlags, ModelFlags):
    """Serve a model: a page, an API that OpenAI's client speaks, and live video. Ctrl-C or SIGTERM ends it.

    Jobs that run are saved then, and go on at the next start.
    """


@dataclass(frozen=True)
class Info:
    """Print how a file was made."""

    file: Annotated[Positional[Path], arg(metavar="FILE")]
    """A file written by `nova generate`."""
    json: bool = False
    """Print it as JSON."""


@dataclass(frozen=True)
class Words:
    """Print the words that a model of a small world knows: names, backgrounds, motions, and its sentences."""

    search: Annotated[Positional[str], arg(metavar="SEARCH", help_behavior_hint="")] = ""
    """Only those with this text in them."""
    model: Annotated[str, arg(metavar="NAME")] = MODEL
    """The setting of `nova generate`."""
    json: bool = False
    """Print them as JSON."""


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Make a checkpoint that opens of what the released trainer wrote. The only command that reads pickles, safely."""

    source: Annotated[Positional[Path], arg(metavar="SOURCE")]
    """The trainer's checkpoint-N, its ema_checkpoints, or a file of weights such as diffusion_pytorch_model.bin."""
    output: Annotated[Path, arg(aliases=["-o"], metavar="FOLDER")]
    """New folder to write."""
    base: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None
    """The model that the training began with: a folder or a released name. Its other parts complete the checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Encode:
    """Encode videos and pictures with captions into a dataset to train on. A run that was stopped goes on where it
    was."""

    source: Annotated[Positional[str], arg(metavar="SOURCE")]
    """A folder of media with captions (.txt or .json beside each, or metadata.csv or .jsonl), .tar files (WebDataset),
    .parquet files, a folder of save_to_disk or hf://OWNER/NAME. Local, or a URL that fsspec opens."""
    output: Annotated[Path, arg(aliases=["-o"], metavar="FOLDER")]
    """The dataset to write, or to go on with."""
    model: Annotated[str, arg(metavar="NAME")] = MODEL
    """The model whose autoencoder and text encoder encode, and whose settings are the defaults."""
    autoencoder: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: the model's)")] = None
    """Another autoencoder: a checkpoint, its folder (any causal one of diffusers), or your own as module:Class."""
    frames: Annotated[tuple[int, ...], arg(metavar="N ...", help_behavior_hint=OWN)] = ()
    """Lengths of clips, 4k + 1 each: the longest ones that fit into a scene. Pictures have 1."""
    fps: Annotated[float | None, arg(metavar="N", help_behavior_hint=OWN)] = None
    """Frames per second, at most: of faster videos the nearest frames are taken, slower ones keep theirs."""
    size: Annotated[str | None, arg(metavar="WIDTHxHEIGHT", help_behavior_hint=OWN)] = None
    """Size in pixels, or the side of a square. Other ratios of width to height get about the same area."""
    one_size: bool = False
    """Bring everything to that size; so it is without --size for a model whose positions allow no other."""
    cuts: bool = False
    """End clips where PySceneDetect finds a cut."""
    cut_threshold: Annotated[float, arg(metavar="N")] = 27.0
    """Threshold of PySceneDetect's ContentDetector: lower finds more."""
    max_pixels: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 2^29, or NOVA_MAX_PIXELS)")] = None
    """Reject pictures, animations (pixels times frames) and videos (pixels of a frame) of more."""
    caption_column: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: caption)")] = None
    """Column of the captions, or their key in JSON files."""
    media_column: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: the only one)")] = None
    """Column of the media in Parquet and Hugging Face datasets."""
    split: Annotated[str, arg(metavar="NAME")] = "train"
    """Split of a Hugging Face dataset."""
    config: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: the only one)")] = None
    """Configuration of a dataset on the hub that has several."""
    text_encoder: Annotated[str | None, arg(metavar="NAME", help_behavior_hint=OWN)] = None
    """The encoder whose features of the captions are kept: a name, or your own as module:Class; none: no features."""
    group: Annotated[int, arg(metavar="N")] = 256
    """Source files that are finished together: more make fewer, larger shards, and more to do again after a stop."""
    batch: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: by their size)")] = None
    """Clips that go through the autoencoder together."""
    device: Annotated[str, arg(metavar="NAME")] = "auto"
    """The setting of `nova generate`."""
    ray: Annotated[str | None, arg(metavar="ADDRESS", help_behavior_hint="(default: a Ray of this machine)")] = None
    """Address of a Ray cluster to run on."""
    no_ray: bool = False
    """Run in this process."""


@dataclass(frozen=True)
class Train:
    """Train what a recipe describes. Its settings can follow, as in nova train recipes/tiny.toml --optimizer.lr 1e-3;
    nova train RECIPE --help lists them."""

    recipe: Annotated[Positional[Path], arg(metavar="RECIPE")]
    """A TOML file, or the name of one in recipes/."""
    overrides: tyro.conf.Suppress[tuple[str, ...]] = ()
    """Arguments after the recipe, as typed."""


@dataclass(frozen=True, kw_only=True)
class EvaluateFlags(SamplingFlags):
    """The flags of every benchmark."""

    model: Annotated[str, arg(metavar="NAME")] = MODEL
    """The setting of `nova generate`."""
    output: Annotated[Path, arg(aliases=["-o"], metavar="FOLDER")]
    """Where the scores (JSON) and the samples or contact sheets go."""
    seed: Annotated[int, arg(metavar="N")] = 0
    """Which combinations, and their random numbers."""
    batch_size: Annotated[int, arg(metavar="N")] = 25
    """Clips made at once."""
    device: Annotated[str, arg(metavar="NAME")] = "auto"
    """The setting of `nova generate`."""
    dtype: Dtype = "auto"
    """The setting of `nova generate`."""


@dataclass(frozen=True, kw_only=True)
class EvaluateOwn(EvaluateFlags):
    """Run a benchmark of your own: nova evaluate my_bench:Bench. Samples that are in the folder are not made again."""

    benchmark: Annotated[Positional[str], arg(metavar="MODULE:CLASS")]
    """A class that extends nova_video.evaluation.Benchmark; the current folder is searched too."""
    output: Annotated[Path | None, arg(aliases=["-o"], metavar="FOLDER", help_behavior_hint="")] = None  # type: ignore[assignment]
    """Where the scores (JSON) and the samples go. If absent, runs/evaluate-NAME."""
    seed: Annotated[int, arg(metavar="N")] = 0
    """Seed of the first sample; the next ones have the next numbers."""
    batch_size: Annotated[int, arg(metavar="N")] = 1
    """Samples made at once."""


@dataclass(frozen=True, kw_only=True)
class EvaluateWorldFlags(EvaluateFlags):
    """The flags of the benchmarks in a world."""

    data: Annotated[Path, arg(metavar="FOLDER")] = Path("data/emoji")
    """A prepared world."""
    split: Literal["heldout", "train"] = "heldout"
    """Combinations that were never trained on, or those that were."""


@dataclass(frozen=True, kw_only=True)
class EvaluateEmoji(EvaluateWorldFlags):
    """Generate held-out combinations of the emoji world and measure exactly what their captions ask for."""

    output: Annotated[Path, arg(aliases=["-o"], metavar="FOLDER")] = Path("runs/evaluate-emoji")
    """Where the scores (JSON) and the contact sheet go."""
    num_clips: Annotated[int, arg(metavar="N")] = 400
    """Clips to judge."""
    num_pairs: Annotated[int, arg(metavar="N")] = 100
    """Pictures of two objects to judge; 0 leaves them out."""
    num_frames: Annotated[int, arg(metavar="N")] = 17
    """Frames of a clip; 1 is for a model of pictures."""


@dataclass(frozen=True, kw_only=True)
class EvaluateEditing(EvaluateWorldFlags):
    """Carry on, change and fill in real clips and pictures of the emoji world, and measure what comes of it."""

    output: Annotated[Path, arg(aliases=["-o"], metavar="FOLDER")] = Path("runs/evaluate-editing")
    """Where the scores (JSON) and a contact sheet of each part go."""
    parts: tuple[PartName, ...] = ALL_PARTS
    """Parts to measure."""
    num_clips: Annotated[int, arg(metavar="N")] = 400
    """Clips or pictures of each part."""
    context_frames: Annotated[int | None, arg(metavar="N", help_behavior_hint=OWN)] = None
    """The setting of `nova generate`."""
    sink_frames: Annotated[int | None, arg(metavar="N", help_behavior_hint=OWN)] = None
    """The setting of `nova generate`."""
    history_noise: Annotated[float, arg(metavar="STD")] = 0.0
    """The setting of `nova generate`."""
    reanchor_frames: Annotated[int | None, arg(metavar="N", help_behavior_hint=OWN)] = None
    """The setting of `nova generate`."""
    hold_statistics: Annotated[float, arg(metavar="SHARE")] = 0.0
    """The setting of `nova generate`."""


@dataclass(frozen=True, kw_only=True)
class EvaluateDrift(EvaluateWorldFlags):
    """Generate long clips of the emoji world and measure how they change in time, with and without each remedy."""

    output: Annotated[Path, arg(aliases=["-o"], metavar="FOLDER")] = Path("runs/evaluate-drift")
    """Where the measures (JSON), the plot and the contact sheet go."""
    num_clips: Annotated[int, arg(metavar="N")] = 64
    """Clips made with each setting."""
    num_frames: Annotated[int, arg(metavar="N")] = 257
    """Frames of a clip."""
    context_frames: Annotated[int, arg(metavar="N")] = 33
    """The setting of `nova generate`; all frames are tried as well."""
    sink_frames: Annotated[int | None, arg(metavar="N", help_behavior_hint=OWN)] = None
    """The setting of `nova generate`."""
    history_noise: Annotated[float, arg(metavar="STD")] = 0.1
    """Tried, as for `nova generate`."""
    reanchor_frames: Annotated[int, arg(metavar="N")] = 32
    """Tried, as for `nova generate`."""
    hold_statistics: Annotated[float, arg(metavar="SHARE")] = 0.5
    """Tried, as for `nova generate`."""


@dataclass(frozen=True, kw_only=True)
class BenchSample(StepFlags):
    """Time sampling, each configuration by itself: a line printed and a row of a JSON file."""

    config: Annotated[tuple[str, ...], arg(metavar="NAME ...")]
    """t2i-512-0.6b, t2i-1024-0.3b, t2i-1024-0.6b, t2i-1024-1.4b or t2v-480-0.6b (random weights at a released size),
    or a model as for `nova generate`."""
    preset: PresetName = "exact"
    """The setting of `nova generate`."""
    batch: Annotated[int, arg(metavar="N")] = 1
    """Pictures or clips of a call."""
    frames: Annotated[int | None, arg(metavar="N", help_behavior_hint=OWN)] = None
    """Pixel frames."""
    size: Annotated[str | None, arg(metavar="WIDTHxHEIGHT", help_behavior_hint=OWN)] = None
    """Size in pixels; a released size is built for it."""
    repeats: Annotated[int, arg(metavar="N")] = 5
    """Calls that count."""
    device: Annotated[str, arg(metavar="NAME")] = "auto"
    """The setting of `nova generate`."""
    dtype: Dtype = "auto"
    """The setting of `nova generate`."""
    profile: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Write a trace for chrome://tracing of the first latent frame; .json or .json.gz."""
    output: Annotated[Path, arg(aliases=["-o"], metavar="FILE")] = Path("benchmarks/results/sample.json")
    """Rows that are there stay, but for those of the same configuration and settings."""


@dataclass(frozen=True, kw_only=True)
class BenchServe(SamplingFlags):
    """Measure a server: clips a second, seconds of a job, until its first preview and frame, and of a cancel.

    Without --url, a server of this machine is begun for it, at a free port.
    """

    url: Annotated[str | None, arg(metavar="URL", help_behavior_hint="(default: an own one)")] = None
    """A server that runs, such as http://127.0.0.1:8000."""
    api_key: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """A file whose first line is an API key of that server."""
    model: Annotated[str, arg(metavar="NAME")] = MODEL
    """The model that the server has, or is to have."""
    clients: Annotated[tuple[int, ...], arg(metavar="N ...")] = (1, 4)
    """Clients that ask at the same time: a row for each number."""
    requests: Annotated[int, arg(metavar="N")] = 16
    """Requests of each row."""
    cancels: Annotated[int, arg(metavar="N")] = 5
    """Jobs that are cancelled, for each row."""
    prompt: Annotated[str, arg(metavar="TEXT")] = "a panda growing on a green background"
    """The sentence."""
    frames: Annotated[int | None, arg(metavar="N", help_behavior_hint=OWN)] = None
    """Pixel frames of a clip."""
    device: Annotated[str, arg(metavar="NAME")] = "auto"
    """The setting of `nova generate`, for a server that is begun here."""
    output: Annotated[Path, arg(aliases=["-o"], metavar="FILE")] = Path("benchmarks/results/serve.json")
    """Rows that are there stay, but for those of the same clients and settings."""


@dataclass(frozen=True, kw_only=True)
class BenchPresets(GuidedFlags):
    """Compare the exact way with each part of a preset, on held-out sentences: time, scores and distance.

    A run that was stopped continues where it was.
    """

    model: Annotated[str, arg(metavar="NAME")] = MODEL
    """The setting of `nova generate`."""
    data: Annotated[Path, arg(metavar="FOLDER")] = Path("data/emoji")
    """A prepared world."""
    variants: Annotated[tuple[str, ...], arg(metavar="NAME ...", help_behavior_hint="(default: all)")] = ()
    """Some of those in `nova_worlds/presets`, such as balanced or dpm-0.5; the exact one is always made."""
    num_clips: Annotated[int, arg(metavar="N")] = 4000
    """Sentences, each with its clip."""
    num_pictures: Annotated[int, arg(metavar="N")] = 2000
    """Pictures of two objects; 0 leaves them out."""
    num_frames: Annotated[int, arg(metavar="N")] = 17
    """Frames of a clip; 1 is for a model of pictures."""
    seed: Annotated[int, arg(metavar="N")] = 0
    """Which sentences, and their random numbers."""
    batch_size: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 250 on a GPU, else 25)")] = None
    """Clips made at once. Random numbers are drawn for a batch, so that other sizes give other clips."""
    device: Annotated[str, arg(metavar="NAME")] = "auto"
    """The setting of `nova generate`."""
    dtype: Dtype = "auto"
    """The setting of `nova generate`."""
    keep: Annotated[Path, arg(metavar="FOLDER")] = Path("runs/bench-presets")
    """Folder that keeps each finished variant. A later run with the same settings uses them again."""
    output: Annotated[Path, arg(aliases=["-o"], metavar="FILE")] = Path("runs/bench-presets/presets.json")
    """The rows of this run, in place of what was there."""


@dataclass(frozen=True, kw_only=True)
class BenchTrain:
    """Time training steps on given latents and text features, each configuration by itself.

    Each is a row of JSON, printed and in a file. Under torchrun or accelerate launch, all processes work together.
    """

    config: Annotated[tuple[str, ...], arg(metavar="NAME ...")]
    """t2i-512-0.6b, t2i-1024-0.3b, t2i-1024-0.6b, t2i-1024-1.4b or t2v-480-0.6b (random weights at a released size),
    or a model as for `nova generate`."""
    batch: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 16, 8 or 3 of a released size)")] = None
    """Samples of a step on each process."""
    precision: Precision = "auto"
    """bf16 on a GPU and fp32 elsewhere; or fp8, on GPUs that have it."""
    strategy: Strategy = "auto"
    """With several processes: whole weights on each, or sharded over them. auto: as the launcher says, else ddp."""
    checkpointing: bool = False
    """Compute what is inside blocks again on the way back: less memory, more time."""
    compile: Annotated[bool, arg(help_behavior_hint="")] = True
    """Compile blocks."""
    graph: Annotated[bool, arg(help_behavior_hint="")] = True
    """Record steps as CUDA graphs, as training does."""
    attention: AttentionKernels = "auto"
    """Its best kernels on a GPU. auto: FlashAttention 4, if installed; cudnn: cuDNN's, where safe; flash: torch's."""
    mask_ratio: Literal["batch", "sample"] = "batch"
    """batch: all samples reveal the same number of tokens; sample: each draws its own."""
    mask_levels: Annotated[int, arg(metavar="N")] = 0
    """Round how many tokens are hidden to multiples of 1 / N of a frame's; 0: any number."""
    frames: Annotated[int | None, arg(metavar="N", help_behavior_hint=OWN)] = None
    """Pixel frames."""
    size: Annotated[str | None, arg(metavar="WIDTHxHEIGHT", help_behavior_hint=OWN)] = None
    """Size in pixels; a released size is built for it."""
    warm_up: Annotated[int, arg(metavar="N")] = 10
    """Steps that do not count, at least; three of each number of revealed tokens that is timed in any case."""
    steps: Annotated[int, arg(metavar="N")] = 30
    """Steps that count."""
    device: Annotated[str, arg(metavar="NAME")] = "auto"
    """The setting of `nova generate`."""
    profile: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Write a trace for chrome://tracing of three more steps, of the first process; .json or .json.gz."""
    output: Annotated[Path, arg(aliases=["-o"], metavar="FILE")] = Path("benchmarks/results/train.json")
    """Rows that are there stay, but for those of the same configuration and settings."""


@dataclass(frozen=True)
class DataEmoji:
    """Prepare the emoji world from the art and its names (`make data` fetches both)."""

    art: Annotated[Path, arg(metavar="FOLDER")]
    """The unpacked npm package @lobehub/fluent-emoji-3d, or its assets."""
    names: Annotated[Path, arg(metavar="FILE")]
    """en/data.json of the npm package emojibase-data."""
    output: Annotated[Path, arg(aliases=["-o"], metavar="FOLDER")]
    """Folder to write."""
    set: Literal["core", "all"] = "core"
    """core: animals, nature, food and drink; all: also travel, activities, objects and smileys."""


@dataclass(frozen=True)
class DataShapes:
    """Prepare a world of shapes drawn by code, which needs no download."""

    output: Annotated[Path, arg(aliases=["-o"], metavar="FOLDER")]
    """Folder to write."""


@dataclass(frozen=True)
class DataInspect:
    """Check every shard of an encoded dataset, and draw random samples, decoded, beside what they were made from."""

    dataset: Annotated[Positional[str], arg(metavar="DATASET")]
    """A folder that `nova encode` wrote, or a URL of one that fsspec opens."""
    sources: Annotated[str | None, arg(metavar="PLACE", help_behavior_hint="(default: where they were)")] = None
    """Where it was encoded from."""
    output: Annotated[Path, arg(aliases=["-o"], metavar="FILE")] = Path("inspect.png")
    """Picture to write."""
    clips: Annotated[int, arg(metavar="N")] = 8
    """Clips to draw."""
    pictures: Annotated[int, arg(metavar="N")] = 8
    """Pictures to draw."""
    seed: Annotated[int, arg(metavar="N")] = 0
    """Which ones."""
    model: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: what encoded it)")] = None
    """Whose autoencoder decodes: another place of the one that encoded it."""
    device: Annotated[str, arg(metavar="NAME")] = "auto"
    """The setting of `nova generate`."""


Benchmarks = (
    Annotated[EvaluateEmoji, subcommand("emoji")]
    | Annotated[EvaluateEditing, subcommand("editing")]
    | Annotated[EvaluateDrift, subcommand("drift")]
    | Annotated[EvaluateOwn, subcommand("own")]
)
Timings = (
    Annotated[BenchSample, subcommand("sample")]
    | Annotated[BenchPresets, subcommand("presets")]
    | Annotated[BenchTrain, subcommand("train")]
    | Annotated[BenchServe, subcommand("serve")]
)
Worlds = (
    Annotated[DataEmoji, subcommand("emoji")]
    | Annotated[DataShapes, subcommand("shapes")]
    | Annotated[DataInspect, subcommand("inspect")]
)
Command = (
    Annotated[Generate, subcommand("generate")]
    | Annotated[Edit, subcommand("edit")]
    | Annotated[Serve, subcommand("serve")]
    | Annotated[Info, subcommand("info")]
    | Annotated[Words, subcommand("words")]
    | Annotated[Convert, subcommand("convert")]
    | Annotated[Encode, subcommand("encode")]
    | Annotated[Train, subcommand("train")]
    | Annotated[Any, subcommand("evaluate", description="Measure a model.", constructor_factory=lambda: Benchmarks)]
    | Annotated[
        Any,
        subcommand("bench", description="Time sampling, training and serving.", constructor_factory=lambda: Timings),
    ]
    | Annotated[
        Any,
        subcommand("data", description="Prepare what is learned from.", constructor_factory=lambda: Worlds),
    ]
)


POSITIONAL = get_args(Positional[str])[1]
GROUPS = {"evaluate": Benchmarks, "bench": Timings, "data": Worlds}


def parse(arguments: Sequence[str]) -> Any:
    """One of the dataclasses above, or exit: code 0 for --help, 2 and one line for what cannot be understood."""
    if arguments[:1] in (["--version"], ["-V"]):
        print(versions())
        raise SystemExit(0)
    if arguments[:1] == ["train"] and len(arguments) > 1 and not arguments[1].startswith("-"):
        return Train(Path(arguments[1]), tuple(arguments[2:]))  # what follows is the recipe's
    for option, value in pairwise(arguments):
        if option.startswith("--") and not value.strip() and option not in MAY_BE_EMPTY:
            raise InputError(f"{option} is empty: expected a value")
    arguments = _with_command(arguments)
    with one_line_errors(arguments):
        command, unknown = tyro.cli(
            Command,
            prog="nova",
            args=arguments,
            description="Text in, video out. nova --version prints the version.",
            return_unknown_args=True,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    if unknown:
        words = [word for word in arguments[:2] if not word.startswith("-")]
        usage = " ".join(["nova", *words[: 2 if arguments[0] in GROUPS else 1], "--help"])
        raise unknown_option(unknown[0], options_of(type(command)), usage)
    return command


def versions() -> str:
    """The versions that a report of a fault should name."""
    found = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers"))
    at = "" if (found_commit := commit()) is None else f", commit {found_commit}"
    return f"nova-video {__version__} ({found}, python {platform.python_version()}{at})"


def names_of(commands: Any) -> list[str]:
    """The sub-commands of a union of annotated dataclasses."""
    return [name for command in get_args(commands) for part in get_args(command) if (name := getattr(part, "name", ""))]


def _with_command(arguments: Sequence[str]) -> list[str]:
    """The arguments after a check of the sub-commands; without a sub-command they ask for help."""
    arguments = list(arguments)
    if arguments[:1] == ["evaluate"] and ":" in "".join(arguments[1:2]):  # a benchmark of the user's own
        arguments.insert(1, "own")
    if arguments[:2] == ["evaluate", "beyond"]:  # its name in version 0.1.0
        arguments[1] = "editing"
    for depth, (group, commands) in enumerate([("nova", Command), *GROUPS.items()]):
        if depth and arguments[:1] != [group]:
            continue
        place = min(depth, 1)
        if len(arguments) == place:
            return [*arguments, "--help"]
        names, word = names_of(commands), arguments[place]
        if word.startswith("-") or word in names:
            continue
        if " " in word.strip():
            raise InputError(f"no command is given before {word!r}: expected one, as in: nova generate {word!r}")
        raise unknown("command", word, names)
    return arguments


def options_of(command: type[Any]) -> list[str]:
    """All options of a command, aliases too, as tyro names them."""
    options = ["--help"]
    on = {each.name for each in fields(command) if each.default is True}  # tyro has a flag to turn them off
    for name, hint in get_type_hints(command, include_extras=True).items():
        if POSITIONAL in get_args(hint):
            continue
        settings = next((part for part in get_args(hint)[1:] if hasattr(part, "aliases")), None)
        key = (getattr(settings, "name", None) or name).replace("_", "-")
        options.append(f"--no-{key}" if name in on else f"--{key}")
        options += getattr(settings, "aliases", None) or ()
    return options


def unknown_option(word: str, options: Sequence[str], usage: str) -> InputError:
    """The error for what no option is, with what it may have meant; `usage` is the command that lists all."""
    if not word.startswith("-"):
        return InputError(f"argument {word!r} is one too many: expected what {usage} lists")
    name = word.split("=")[0].replace("_", "-")
    meant = {key: text for key, text in MEANINGS.items() if set(re.findall("--[a-z-]+", text)) <= set(options)}
    near = name if name in meant else next(iter(get_close_matches(name, meant, 1, cutoff=0.85)), None)
    if near is not None and (near == name or not get_close_matches(name, options, 1, cutoff=0.85)):
        return InputError(f"unknown option {name}: expected {meant[near]}")
    return unknown("option", shorten(name, LONGEST_SHOWN), options, f"what {usage} lists")


@contextlib.contextmanager
def one_line_errors(arguments: Sequence[str]) -> Iterator[None]:
    """tyro prints a box of several lines about what it cannot parse: made an InputError of its first section."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            yield
    except SystemExit as stop:
        if stop.code != PARSE_ERROR:
            raise
        lines = [line.strip("│╭╰╮╯ ") for line in box.getvalue().splitlines()][1:]
        rules = [index for index, line in enumerate(lines) if line and not line.strip("─-")]  # "-": not in UTF-8
        if rules[:1] == [0]:
            lines, rules = lines[1:], [index - 1 for index in rules[1:]]
        rule = rules[0] if rules else len(lines)
        text = " ".join(" ".join(lines[:rule]).split("Got errors:")[0].split())
        usage = next((line for line in lines[rule + 1 :] if re.match(r"--?\w", line)), None)
        if usage is not None and (match := UNREADABLE.match(text)) is not None:
            option = next((name for name in match[1].split("/") if name in arguments), match[1].split("/")[-1])
            form = usage.split(" ", 1)[1].split(", -")[0]
            text = f"{option} is {shorten(match[2], LONGEST_SHOWN)}: expected {option} {form}"
        text = RECORD.sub("", text)
        typed = shorten(shlex.join(arguments), LONGEST_SHOWN)
        given = f"got: nova {typed}" if arguments else "got nothing"
        raise InputError(f"{text or 'cannot understand these arguments'} ({given})") from None
