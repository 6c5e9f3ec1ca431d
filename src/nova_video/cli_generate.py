"""`nova generate`: what was typed becomes requests, and what the pipeline makes of them becomes files.

No tensor work, and no heavy import before the command runs. All that can be checked is checked before the model is
loaded.
"""

import contextlib
import json
import re
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nova_video.arguments import Generate
from nova_video.console import load_pipeline, progress_bar
from nova_video.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

    from nova_video.pipeline import NovaPipeline, StepCallback
    from nova_video.request import GenerateRequest, Plan


def run_generate(args: Generate) -> None:
    """Checks all that can be checked, then loads the model and makes one file a sentence."""
    from nova_video import media

    prompts = _prompts(args)
    _check_place(args)
    image = media.load_image(args.image) if args.image is not None else None
    seed = secrets.randbelow(2**32) if args.seed is None else args.seed
    requests = [_request(args, prompt, seed + index, image) for index, prompt in enumerate(prompts)]
    pipe = load_pipeline(args.model, args.device, args.dtype)
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


@contextlib.contextmanager
def _progress(pipe: "NovaPipeline", plans: Sequence["Plan"], given: bool) -> Iterator["StepCallback"]:
    """A bar over all sets of all frames of all files, on stderr, where that is a terminal. Yields what moves it."""
    from nova_video.model import set_sizes

    sets = [
        len(set_sizes(p.grid[0] * p.grid[1] // pipe.transformer.patch_size**2, p.num_inference_steps)) for p in plans
    ]
    steps = [count * (plan.latent_frames - given) for plan, count in zip(plans, sets, strict=True)]
    file = 0
    with progress_bar() as bar:
        task = bar.add_task("starting", total=sum(steps))

        def on_step(_: object, step: int, frame: int, __: object) -> bool:
            nonlocal file
            which = f"{file + 1}/{len(plans)}: " if len(plans) > 1 else ""
            place = f"frame {frame + 1}/{plans[file].latent_frames}, set {step % sets[file] + 1}/{sets[file]}"
            bar.update(task, advance=1, description=which + place)
            file += step + 1 == steps[file]
            return True

        yield on_step


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
