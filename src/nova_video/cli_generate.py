"""`nova generate` and `nova edit`: what was typed becomes requests, whose generations `jobs.py` makes files of.

No tensor work, and no heavy import before a command runs. All that can be checked is checked before the model is
loaded.
"""

import contextlib
import math
import os
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nova_video.arguments import MODEL, Edit, Generate, Making
from nova_video.console import checkpoint_defaults, load_pipeline
from nova_video.errors import InputError
from nova_video.io.text import read_text
from nova_video.jobs import (
    NOTES,
    Job,
    all_held,
    carry_out,
    check_output,
    check_state,
    make_record,
    output_place,
    progress,
)
from nova_video.script import with_script

if TYPE_CHECKING:
    from nova_video.generation import Generation, StepCallback
    from nova_video.given import Clip
    from nova_video.memory import LowMemory
    from nova_video.pipeline import NovaPipeline
    from nova_video.request import GenerateRequest

FOR_ONE_CLIP = ("prompt_at", "motion_at", "guidance_at", "script", "live", "state")  # flags of a single sentence
SMALL = ("low_memory", "tiled", "int8_text")  # flags for a small GPU
WITH_RESUME = ("resume", "output", "state", "model", "device", "dtype", *SMALL, "json")  # all else is in the file


def run_generate(args: Generate) -> None:
    """A file a sentence, or the one that an earlier run was stopped at."""
    if args.resume is not None:
        _resume(args, args.resume)
        return
    args = args if args.script is None else with_script(args)
    prompts = _prompts(args)
    _check_flags(args, prompts)
    check_output(args.output, args.live)
    if args.state is not None:
        check_state(args.state)
    requests = _requests(args, prompts)
    with all_held(args.state, _file_of_live(args)):
        pipe = _pipeline(args)
        for request in requests:
            request.resolve(pipe.defaults, pipe.capabilities)  # what is wrong with any is said before the first is made
        with progress(len(requests)) as watch:
            for index, request in enumerate(requests):
                _generate_one(args, prompts, index, pipe, request, watch)


def _generate_one(
    args: Generate,
    prompts: Sequence[str],
    index: int,
    pipe: "NovaPipeline",
    request: "GenerateRequest",
    watch: "Callable[[Generation], StepCallback]",
) -> None:
    generation = pipe.start(request)
    picture = generation.plan.num_frames == 1 and not args.live
    given = {
        "image": _name(args.image),
        "continue": _name(args.video),
        "given_frames": None if args.video is None else generation.plan.given_frames,
        "history_noise": args.history_noise,
        "hold_statistics": args.hold_statistics,
    }
    record = make_record(args, request, generation, given)
    with output_place(args.output, index, prompts, ".png" if picture else ".mp4") as path:
        notes = {"record": record, "output": str(path), "live": args.live}
        generation.notes[NOTES] = notes | {"device": args.device, "dtype": args.dtype}
        carry_out(Job(generation, path, record, args.live, args.state, args.json), watch(generation))


def _file_of_live(args: Generate) -> Path | None:
    """The file that is named and that another process may be writing in place."""
    return args.output if args.live and args.output is not None and not args.output.is_dir() else None


def _resume(args: Generate, path: Path) -> None:
    """Go on from the state in a file, and keep it up to date."""
    from nova_video.saving import read_notes

    for field in fields(args):
        if getattr(args, field.name) != field.default and field.name not in WITH_RESUME:
            raise InputError(f"got {_flag(field.name)} with --resume: expected none, the settings are those in {path}")
    notes = read_notes(path).get(NOTES)
    if notes is None:
        raise InputError(f"{path} was not kept by nova generate --state: expected a file that was")
    if notes["live"] and args.output is not None:
        raise InputError(f"got --output with a live clip: expected none, {path} goes on with {notes['output']}")
    output = args.output or Path(notes["output"])
    check_output(output, notes["live"])
    if args.state is not None:
        check_state(args.state)
    record = notes["record"]
    with all_held(path, args.state, output if notes["live"] else None):
        pipe = load_pipeline(
            args.model or record["model"],
            args.device or notes["device"] or "auto",
            args.dtype or notes["dtype"] or "auto",
            _low_memory(args),
            None if "lora" not in record else Path(record["lora"]),
            record.get("lora_scale", 1.0),
        )
        generation = pipe.resume(path)
        with progress(1) as watch:
            carry_out(Job(generation, output, record, notes["live"], args.state or path, args.json), watch(generation))


def run_edit(args: Edit) -> None:
    """A picture or clip with a part of it made anew, or with more around it."""
    from nova_video.given import enlarge, masks_of, read_masks

    if args.mask is None and args.strength is None and args.outpaint is None:
        raise InputError(f"nothing of {args.file} would be kept: expected --mask, --strength or --outpaint")
    prompt = _text("the sentence", args.prompt)
    check_output(args.output)
    clip = _picture_or_clip(args.file)
    masks = None if args.mask is None else masks_of(read_masks(args.mask), clip)
    if args.outpaint is not None:
        clip, masks = enlarge(clip, masks, args.outpaint)
    request = replace(
        _request(args, prompt, _seed(args)),
        video=clip,
        mask_image=masks,
        strength=args.strength,
    )
    pipe = _pipeline(args)
    generation = pipe.start(request)
    given = {
        "edited": _name(args.file),
        "mask": _name(args.mask),
        "strength": args.strength,
        "outpaint": args.outpaint,
    }
    record = make_record(args, request, generation, given)
    with progress(1) as watch, output_place(args.output, 0, [prompt], ".png" if len(clip) == 1 else ".mp4") as path:
        carry_out(Job(generation, path, record, as_json=args.json), watch(generation))


def _picture_or_clip(path: Path) -> "Clip":
    """What is in a file; a picture upright, on white where it is transparent."""
    import numpy as np

    from nova_video.given import Clip
    from nova_video.media import load_image, read_frames

    frames, fps = read_frames(path)
    if len(frames) == 1:
        with contextlib.suppress(InputError):  # a video of one frame stays as it is
            frames = np.asarray(load_image(path))[None]
    return Clip(frames, fps or None)


# What was typed -------------------------------------------------------------------------------------------------------


def _prompts(args: Generate) -> list[str]:
    """The sentences of the command line, then those of the file; or else that of the clip to go on from."""
    prompts = [_text("the sentence", prompt) for prompt in args.prompt]
    if args.prompts is not None:
        lines = read_text(args.prompts).split("\n")
        prompts += [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise InputError(f"{args.prompts} is empty, expected one sentence a line")
    if not prompts and args.video is not None:
        prompts = [_sentence_of(args.video)]
    if not prompts:
        raise InputError('no sentence given, expected one such as: nova generate "a whale moving left"')
    if blank := [prompt for prompt in prompts if not prompt.strip()]:  # a variable of the shell that is not set
        raise InputError(f"prompt is {blank[0]!r}: expected a sentence that is not empty")
    return prompts


def _text(name: str, typed: str) -> str:
    """What was typed as a text: bytes that the terminal's encoding does not have are read as UTF-8."""
    if not any("\ud800" <= letter <= "\udfff" for letter in typed):
        return typed
    try:
        return os.fsencode(typed).decode()
    except UnicodeError:
        raise InputError(f"{name} is {typed!r}: expected text in UTF-8 or in the terminal's encoding") from None


def _sentence_of(path: Path) -> str:
    """The sentence that a clip was made from, the last one if it changed."""
    from nova_video.media import read_metadata

    try:
        prompt = read_metadata(path).get("prompt")
    except InputError as error:
        raise InputError(f"no sentence given, and {error}: expected a sentence") from None
    while isinstance(prompt, list) and prompt:  # (seconds, sentence) pairs
        prompt = prompt[-1]
    if not isinstance(prompt, str):
        raise InputError(f"no sentence given, and {path} carries none: expected a sentence")
    return prompt


def _check_flags(args: Generate, prompts: Sequence[str]) -> None:
    """Flags that do not go together."""
    if len(prompts) > 1:
        for name in FOR_ONE_CLIP:
            if getattr(args, name):
                raise InputError(f"got {_flag(name)} with {len(prompts)} sentences: expected one, it is for one clip")
    if args.image is not None and args.video is not None:
        raise InputError("got both of --image and --continue: expected one of them")
    if args.seconds == math.inf and not args.live:
        raise InputError("--seconds inf has no end: expected --live with it, to write the clip while it is made")


def _flag(name: str) -> str:
    return "--continue" if name == "video" else f"--{name.replace('_', '-')}" if name != "prompt" else "a sentence"


def _pipeline(args: Making) -> "NovaPipeline":
    if args.lora_scale is not None and args.lora is None:
        raise InputError("got --lora-scale alone: expected --lora with it")
    if args.lora is not None and not args.lora.exists():
        raise InputError(f"lora {args.lora} not found: expected a safetensors file or its folder")
    scale = 1.0 if args.lora_scale is None else args.lora_scale
    return load_pipeline(
        args.model or MODEL, args.device or "auto", args.dtype or "auto", _low_memory(args), args.lora, scale
    )


def _low_memory(args: Making) -> "LowMemory | None":
    if not args.low_memory:
        for name in SMALL:
            if getattr(args, name):
                raise InputError(f"got {_flag(name)} alone: expected --low-memory with it")
        return None
    from nova_video.memory import LowMemory

    return LowMemory(text_encoder="int8" if args.int8_text else "float", tiled=args.tiled)


def _name(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _seed(args: Making) -> int:
    return secrets.randbelow(2**32) if args.seed is None else args.seed


def _size(text: str | None) -> tuple[int | None, int | None]:
    """Height and width of WIDTHxHEIGHT."""
    if text is None:
        return None, None
    match = re.fullmatch(r"(\d+)[x×](\d+)", text)
    if match is None:
        raise InputError(f"size is {text!r}, expected WIDTHxHEIGHT such as 768x480")
    return int(match[2]), int(match[1])


def _requests(args: Generate, prompts: Sequence[str]) -> "list[GenerateRequest]":
    """One a sentence, each with the next seed."""
    from nova_video.given import read_clips
    from nova_video.media import load_image

    seed = _seed(args)
    common = replace(
        _request(args, prompts[0], seed),
        image=load_image(args.image) if args.image is not None else None,
        video=read_clips(args.video) if args.video is not None else None,
        num_frames=args.num_frames,
        seconds=args.seconds,
        motion_flow=_timeline(
            args.motion, args.motion_at, lambda: checkpoint_defaults(args.model or MODEL).motion_flow
        ),
        guidance_scale=_timeline(
            args.guidance, args.guidance_at, lambda: checkpoint_defaults(args.model or MODEL).guidance_scale
        ),
        history_noise=args.history_noise or 0.0,
        reanchor_frames=args.reanchor_frames,
        hold_statistics=args.hold_statistics or 0.0,
    )
    later = [(at, _text("--prompt-at", prompt)) for at, prompt in args.prompt_at]
    return [
        replace(common, prompt=[(0.0, prompt), *later] if later else prompt, seed=seed + index)
        for index, prompt in enumerate(prompts)
    ]


def _request(args: Making, prompt: str, seed: int) -> "GenerateRequest":
    """What all commands say in the same way."""
    from nova_video.request import GenerateRequest

    height, width = _size(args.size)
    if args.size is not None and (args.width is not None or args.height is not None):
        raise InputError("got --size with --width or --height: expected one way to say the size")
    return GenerateRequest(
        prompt=prompt,
        negative_prompt=None if args.negative is None else _text("--negative", args.negative),
        height=args.height if height is None else height,
        width=args.width if width is None else width,
        fps=args.fps,
        num_inference_steps=args.sets,
        num_diffusion_steps=args.diffusion_steps,
        guidance_scale=args.guidance,
        motion_flow=args.motion,
        context_frames=args.context_frames,
        sink_frames=args.sink_frames,
        preset=args.preset,
        solver=args.solver,
        last_steps=args.last_steps,
        guided_sets=args.guided_sets,
        guidance_every=args.guidance_every,
        fp8=args.fp8 or None,
        compile=False if args.no_compile else None,
        seed=seed,
        output_type="np",
    )


def _timeline(
    first: float | None, later: Sequence[tuple[float, float]], own: Callable[[], float]
) -> float | list[tuple[float, float]] | None:
    """A setting and its changes; `own` is the model's value."""
    if not later:
        return first
    return [(0.0, own() if first is None else first), *later]
