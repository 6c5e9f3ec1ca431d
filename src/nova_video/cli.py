"""The command `nova`: calls the library and presents. No tensor work, and no heavy import before a command runs.

Each sub-command of `arguments.py` has its function in `COMMANDS`. Wrong input is one line on stderr and exit code 2;
Ctrl-C is exit code 130. Results go to stdout, all else to stderr.
"""

import contextlib
import json
import logging
import re
import secrets
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nova_video.arguments import DataEmoji, DataShapes, EvaluateEmoji, Generate, Info, Train, one_line_errors, parse
from nova_video.errors import InputError

if TYPE_CHECKING:
    from PIL import Image
    from rich.progress import Progress

    from nova_video.pipeline import NovaPipeline, StepCallback
    from nova_video.request import GenerateRequest, Plan

BAD_INPUT, INTERRUPTED = 2, 130
EXTRAS = {"tensorboard": "train", "cv2": "train", "matplotlib": "docs"}  # package -> the extra that brings it


def run_generate(args: Generate) -> None:
    """Checks all that can be checked, then loads the model and makes one file a sentence."""
    from nova_video import media

    prompts = _prompts(args)
    _check_place(args)
    image = media.load_image(args.image) if args.image is not None else None
    seed = secrets.randbelow(2**32) if args.seed is None else args.seed
    requests = [_request(args, prompt, seed + index, image) for index, prompt in enumerate(prompts)]
    pipe = _load_pipeline(args.model, args.device, args.dtype)
    plans = [request.resolve(pipe.defaults, pipe.capabilities) for request in requests]
    with _progress(pipe, plans, given=image is not None) as on_step:
        for index, (request, plan) in enumerate(zip(requests, plans, strict=True)):
            path = _output(args.output, index, prompts, ".png" if plan.num_frames == 1 else ".mp4")
            result = pipe.generate(request, callback_on_step_end=on_step)
            pixels = result.images[:, None] if result.frames is None else result.frames  # (1, F, H, W, 3) in [0, 1]
            record = _record(args, request, plan, pipe)
            media.write_media((pixels[0] * 255).round().astype("uint8"), path, plan.fps, record)
            print(json.dumps({"file": str(path), **record}) if args.json else path, flush=True)


def _prompts(args: Generate) -> list[str]:
    """The sentences of the command line, then those of the file."""
    prompts = list(args.prompt)
    if args.prompts is not None:
        try:
            lines = args.prompts.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise InputError(f"{args.prompts} is not a text file in UTF-8") from error
        prompts += [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise InputError(f"{args.prompts} is empty, expected one sentence a line")
    if not prompts:
        raise InputError('no sentence given, expected one such as: nova generate "a whale moving left"')
    return prompts


def _size(text: str | None) -> tuple[int | None, int | None]:
    """Height and width of WIDTHxHEIGHT."""
    if text is None:
        return None, None
    match = re.fullmatch(r"(\d+)[x×](\d+)", text)
    if match is None:
        raise InputError(f"size is {text!r}, expected WIDTHxHEIGHT such as 768x480")
    return int(match[2]), int(match[1])


def _request(args: Generate, prompt: str, seed: int, image: "Image.Image | None") -> "GenerateRequest":
    from nova_video.request import GenerateRequest

    height, width = _size(args.size)
    return GenerateRequest(
        prompt=prompt,
        negative_prompt=args.negative,
        image=image,
        height=height,
        width=width,
        num_frames=args.num_frames,
        fps=args.fps,
        num_inference_steps=args.sets,
        num_diffusion_steps=args.diffusion_steps,
        guidance_scale=args.guidance,
        motion_flow=args.motion,
        seed=seed,
        output_type="np",
    )


def _load_pipeline(model: str, device: str, dtype: str) -> "NovaPipeline":
    """The model on its device. The device is checked before anything is loaded."""
    from nova_video.devices import choose_device, choose_dtype

    place = choose_device(device)
    import diffusers
    import transformers

    from nova_video.pipeline import NovaPipeline

    diffusers.utils.logging.disable_progress_bar()  # the bars of loading; sampling has ours
    transformers.utils.logging.disable_progress_bar()
    pipe = NovaPipeline.from_pretrained(model, torch_dtype=choose_dtype(dtype, place)).to(place)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextlib.contextmanager
def _progress(pipe: "NovaPipeline", plans: Sequence["Plan"], given: bool) -> Iterator["StepCallback"]:
    """A bar over all sets of all frames of all files, on stderr, where that is a terminal. Yields what moves it."""
    from nova_video.model import set_sizes

    sets = [
        len(set_sizes(p.grid[0] * p.grid[1] // pipe.transformer.patch_size**2, p.num_inference_steps)) for p in plans
    ]
    steps = [count * (plan.latent_frames - given) for plan, count in zip(plans, sets, strict=True)]
    file = 0
    with _bar() as bar:
        task = bar.add_task("starting", total=sum(steps))

        def on_step(_: object, step: int, frame: int, __: object) -> bool:
            nonlocal file
            which = f"{file + 1}/{len(plans)}: " if len(plans) > 1 else ""
            place = f"frame {frame + 1}/{plans[file].latent_frames}, set {step % sets[file] + 1}/{sets[file]}"
            bar.update(task, advance=1, description=which + place)
            file += step + 1 == steps[file]
            return True

        yield on_step


def _bar() -> "Progress":
    """An empty progress bar with the time left, on stderr, where that is a terminal."""
    from rich import progress
    from rich.console import Console

    console = Console(stderr=True)
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
        redirect_stdout=sys.stdout.isatty(),  # else what is printed would leave the file or pipe that waits for it
    )


def _check_place(args: Generate) -> None:
    """Raises now for what could not be written later."""
    from nova_video import media

    folder = args.output is None or args.output.is_dir()
    media.check_output((args.output or Path()) / "clip.mp4" if folder or args.output is None else args.output)


def _output(output: Path | None, index: int, prompts: Sequence[str], suffix: str) -> Path:
    """The file of one sentence: the one asked for, numbered if there are several, or else named after the sentence."""
    number = f"{index + 1:0{len(str(len(prompts)))}d}"
    if output is not None and not output.is_dir():
        return output if len(prompts) == 1 else output.with_stem(f"{output.stem}-{number}")
    name = re.sub(r"\W+", "-", prompts[index].lower()).strip("-")[:60].strip("-") or "nova"
    if len(prompts) > 1:
        name = f"{number}-{name}"
    folder, again = output or Path(), 2
    path = folder / (name + suffix)
    while path.exists():  # a name that nobody chose must not replace a file
        path, again = folder / f"{name}-{again}{suffix}", again + 1
    return path


def _record(args: Generate, request: "GenerateRequest", plan: "Plan", pipe: "NovaPipeline") -> dict[str, Any]:
    """What a file says of how it was made."""
    from nova_video import __version__

    settings = {
        "width": plan.width,
        "height": plan.height,
        "num_frames": plan.num_frames,
        "fps": plan.fps,
        "image": str(args.image) if args.image is not None else None,
        "sets": plan.num_inference_steps,
        "diffusion_steps": plan.num_diffusion_steps,
        "guidance": plan.guidance.scale,
        "motion": plan.motion_flow,
        "device": str(pipe.device),
        "dtype": str(pipe.dtype).removeprefix("torch."),
    }
    record = {"prompt": request.prompt, "negative": args.negative, "seed": request.seed, "model": args.model}
    return {**record, "settings": settings, "nova_video": __version__}


def run_info(args: Info) -> None:
    """The record inside a file, one setting a line or as JSON."""
    from nova_video import media

    record = media.read_metadata(args.file)
    if args.json:
        print(json.dumps(record))
        return
    settings = record.pop("settings", {})
    lines = {**record, **(settings if isinstance(settings, dict) else {})}
    width = max(map(len, lines), default=0)
    for name, value in lines.items():
        if value is not None:
            print(f"{name:<{width}}  {value}")


def run_train(args: Train) -> None:
    """A recipe with what follows it on the command line, to the trainer."""
    from nova_video.training.recipe import load_recipe

    path = args.recipe
    if not path.exists() and path.name == str(path):  # a bare name
        path = Path("recipes") / path.with_suffix(".toml")
    with one_line_errors(["train", str(args.recipe), *args.overrides]):
        recipe = load_recipe(path, list(args.overrides))
    from nova_video.training.trainer import train

    print(train(recipe))


def run_evaluate_emoji(args: EvaluateEmoji) -> None:
    """The judge's tables, its JSON and its contact sheet."""
    from rich.console import Console

    from nova_video.data.world import EmojiWorld
    from nova_video.devices import choose_device
    from nova_video.evaluation.emoji import EmojiSettings, evaluate_emoji
    from nova_video.evaluation.report import check_report_folder, print_report, write_report

    settings = EmojiSettings(
        num_clips=args.num_clips,
        num_pairs=args.num_pairs,
        num_frames=args.num_frames,
        split=args.split,
        seed=args.seed,
        batch_size=args.batch_size,
        num_inference_steps=args.sets,
        num_diffusion_steps=args.diffusion_steps,
        guidance_scale=args.guidance,
        motion_flow=args.motion,
    )
    world = EmojiWorld.load(args.data, choose_device(args.device))
    check_report_folder(args.output)
    pipe = _load_pipeline(args.model, args.device, args.dtype)
    with _bar() as bar:
        tasks: dict[str, Any] = {}

        def on_progress(source: str, done: int, total: int) -> None:
            if source not in tasks:
                tasks[source] = bar.add_task(source, total=total)
            bar.update(tasks[source], completed=done)

        report = evaluate_emoji(
            pipe, world, settings, model=args.model, command=_command_line(args), on_progress=on_progress
        )
    write_report(report, args.output)
    print_report(report, Console())
    print(args.output)


def _command_line(args: EvaluateEmoji) -> str:
    """The command that repeats this evaluation."""
    words = ["nova", "evaluate", "emoji"]
    for field in fields(args):
        if (value := getattr(args, field.name)) != field.default:
            words += [f"--{field.name.replace('_', '-')}", str(value)]
    return shlex.join(words)


def run_data_emoji(args: DataEmoji) -> None:
    from nova_video.data.emoji import prepare_emoji

    world = prepare_emoji(args.art, args.names, args.output, args.set)
    print(f"{args.output}: {len(world.names)} objects")


def run_data_shapes(args: DataShapes) -> None:
    from nova_video.data.shapes import prepare_shapes

    world = prepare_shapes(args.output)
    print(f"{args.output}: {len(world.names)} objects")


COMMANDS: dict[type, Callable[[Any], None]] = {
    Generate: run_generate,
    Info: run_info,
    Train: run_train,
    EvaluateEmoji: run_evaluate_emoji,
    DataEmoji: run_data_emoji,
    DataShapes: run_data_shapes,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of `nova` with these arguments."""
    logging.basicConfig(format="nova: %(message)s", level=logging.WARNING)
    try:
        command = parse(sys.argv[1:] if arguments is None else arguments)
        COMMANDS[type(command)](command)
    except KeyboardInterrupt:
        return _complain("interrupted", INTERRUPTED)
    except InputError as error:
        return _complain(str(error))
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        return _complain(f"this needs the package {error.name}: pip install 'nova-video[{EXTRAS[error.name]}]'")
    except OSError as error:
        return _complain(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported here
            raise
        return _complain(f"the device is out of memory: ask for fewer frames or a smaller size ({error})")
    return 0


def _complain(message: str, code: int = BAD_INPUT) -> int:
    """One line on stderr."""
    print(f"nova: {' '.join(message.split())}", file=sys.stderr)
    return code
