"""`nova generate` and `nova edit`: what was typed becomes requests, whose generations `file_jobs.py` makes files of.

No tensor work, and no heavy import before a command runs. All that can be checked is checked before the model is
loaded.
"""

import contextlib
import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nova_video.cli.arguments import Edit, Format, Generate, model_of
from nova_video.cli.console import SMALL, load_pipeline, low_memory_of, pipeline_of
from nova_video.cli.file_jobs import (
    NOTES,
    FileJob,
    Sheet,
    all_held,
    carry_out,
    check_output,
    check_state,
    make_record,
    output_place,
    progress,
    start_together,
    suffix_of,
)
from nova_video.cli.prompt_file import is_prompt_table
from nova_video.cli.remake import describe_inputs, warn_of_changes, with_record
from nova_video.cli.script import BATCH_FLAGS, TIMELINE_KEYS, with_script
from nova_video.cli.typed_request import (
    check_requests,
    flag_of,
    request_of,
    seed_of,
    text_of,
)
from nova_video.common.checks import LIMITS, check_number
from nova_video.common.errors import InputError
from nova_video.io.text import read_text

if TYPE_CHECKING:
    from nova_video.pipeline.generation import Generation, StepCallback
    from nova_video.pipeline.pipeline import NovaPipeline
    from nova_video.pipeline.plan import Plan
    from nova_video.pipeline.request import GenerateRequest

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StateNotes:
    """The notes of the command in a state, so that a resumed run behaves as it began."""

    record: dict[str, Any]
    output: str
    live: bool
    format: Format | None = None
    device: str | None = None
    dtype: Literal["auto", "float32", "float16", "bfloat16"] | None = None


FOR_ONE_CLIP = (
    "prompt_at",
    *(f"{key}_at" for key in TIMELINE_KEYS),
    "script",
    "live",
    "state",
)  # flags of a single sentence
MOST_RESULTS = 10_000  # of a sentence in one run
SHEET_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
WITH_RESUME = (
    "resume",
    "output",
    "format",
    "state",
    "model",
    "head",
    "order",
    "guidance_rule",
    "device",
    "dtype",
    *SMALL,
    "json",
)  # all else is in the file


def run_generate(args: Generate) -> None:
    """A file a sentence, or the one that an earlier run was stopped at."""
    if args.resume is not None:
        _resume(args, args.resume)
        return
    args, like = (args if args.script is None else with_script(args)), None
    if args.like is not None:
        if args.script is not None:
            raise InputError("got both of --like and --script: expected one of them")
        path = args.like
        settings, record = with_record(args)
        like = record, path
        if isinstance(settings, Edit):
            run_edit(settings, like)
            return
        args = settings
    if is_batch(args):
        from nova_video.cli.batch import run_batch

        run_batch(args)
        return
    check_number("num_images", args.num_images, 1, integer=True, high=MOST_RESULTS)
    prompts = [prompt for prompt in _prompts(args) for _ in range(args.num_images)]
    _check_flags(args, prompts)
    check_output(args.output, args.live, args.format, several=len(prompts) > 1)
    if args.state is not None:
        check_state(args.state)
    sheet = None if args.sheet is None else _sheet(args, args.sheet, prompts)
    requests = _requests(args, prompts)
    with all_held(args.state, _file_of_live(args)):
        for plan in check_requests(args, requests):
            _check_length(args, plan)
            if not args.live:
                plan.check_pixels()
        pipe = pipeline_of(args)
        batch, made = args.batch or _own_batch(args, pipe), 0
        with progress(len(requests)) as watch:
            while made < len(requests):
                numbers = range(made, min(made + batch, len(requests)))
                try:
                    _make(args, pipe, prompts, requests, numbers, sheet, watch, like if made == 0 else None)
                except RuntimeError as error:
                    if type(error).__name__ != "OutOfMemoryError" or args.batch is not None or batch == 1:
                        raise
                    log.warning("no memory for %d at once: they are made one at a time", len(numbers))
                    batch = 1
                    continue
                made = numbers.stop
    if sheet is not None:
        sheet.write()
        print(json.dumps({"sheet": str(sheet.path)}) if args.json else sheet.path)


def is_batch(args: Generate) -> bool:
    """True if results go into one folder with an index; raises for flags of a batch without its prompts."""
    given = next((name for name in BATCH_FLAGS if getattr(args, name) is not None), None)
    if args.prompts is None and given is not None:
        raise InputError(f"got {flag_of(given)} without --prompts: expected a file of prompts, for a batch")
    return args.prompts is not None and (given is not None or is_prompt_table(args.prompts))


def _make(
    args: Generate,
    pipe: "NovaPipeline",
    prompts: Sequence[str],
    requests: "Sequence[GenerateRequest]",
    numbers: range,
    sheet: Sheet | None,
    watch: "Callable[[Generation], StepCallback]",
    like: "tuple[dict[str, Any], Path] | None" = None,
) -> None:
    """The results of these numbers, in one pass of the model; each has random numbers of its own seed."""
    generation = start_together(pipe, [requests[number] for number in numbers])
    given = {
        "image": _name(args.image),
        "continue": _name(args.video),
        "given_frames": None if args.video is None else generation.plan.given_frames,
    }
    records = [make_record(args, requests[number], generation, given) for number in numbers]
    for record in records:
        describe_inputs(args, record, generation)
    if like is not None:
        warn_of_changes(like[0], records[0], like[1])
    picture = generation.plan.num_frames == 1 and not args.live
    with contextlib.ExitStack() as places:
        paths = [
            places.enter_context(output_place(args.output, args.format, number, prompts, picture)) for number in numbers
        ]
        if len(numbers) == 1:
            notes = {"record": records[0], "output": str(paths[0]), "live": args.live, "format": args.format}
            generation.notes[NOTES] = notes | {"device": args.device, "dtype": args.dtype}
        job = FileJob(generation, paths, records, args.live, args.state, args.json, args.format == "frames", sheet)
        carry_out(job, watch(generation))


def _own_batch(args: Generate, pipe: "NovaPipeline") -> int:
    """How many results are made together where nobody says it."""
    return 4 if pipe.device.type == "cuda" and args.image is None and args.video is None else 1


def _sheet(args: Generate, path: Path, prompts: Sequence[str]) -> Sheet:
    from nova_video.io.media import check_output as check_place

    if path.suffix.lower() not in SHEET_SUFFIXES:
        raise InputError(f"cannot write the sheet {path}: expected {', '.join(SHEET_SUFFIXES)}")
    check_place(path)
    title = prompts[0] if len(set(prompts)) == 1 else f"{len(prompts)} results of {len(set(prompts))} sentences"
    return Sheet(path, title, f"made by {model_of(args)}")


def _check_length(args: Generate, plan: "Plan") -> None:
    """Raises for a clip in a format of one picture."""
    suffix = suffix_of(args.output, args.format, picture=plan.num_frames == 1)
    if suffix.lower() in (".jpg", ".jpeg") and plan.num_frames != 1:
        raise InputError(f"got {plan.num_frames} frames for a {suffix[1:]}: expected 1, or another format")


def _file_of_live(args: Generate) -> Path | None:
    """The file that is named and that another process may be writing in place."""
    return args.output if args.live and args.output is not None and not args.output.is_dir() else None


def _resume(args: Generate, path: Path) -> None:
    """Go on from the state in a file, and keep it up to date."""
    from nova_video.pipeline.own_parts import CHECKS
    from nova_video.pipeline.records import read_record
    from nova_video.pipeline.saving import read_notes

    for field in fields(args):
        if getattr(args, field.name) != field.default and field.name not in WITH_RESUME:
            flag = flag_of(field.name)
            raise InputError(f"got {flag} with --resume: expected none, the settings are those in {path}")
    found = read_notes(path).get(NOTES)
    if found is None:
        raise InputError(f"{path} was not kept by nova generate --state: expected a file that was")
    notes = read_record(StateNotes, found, f"{path}: its notes")
    wanted = args.format or notes.format
    output = args.output or path.with_name(f"{path.stem}{Path(notes.output).suffix}")  # never a place the file names
    if output == path:
        raise InputError(f"{path} holds the state: expected --output with another file for the result")
    check_output(output, notes.live, wanted)
    if notes.live:
        _check_live(output, notes.record)
    elif args.output is None and output.exists():
        raise InputError(f"{output} is there already: expected --output with the file to write")
    if args.state is not None:
        check_state(args.state)
    record = notes.record
    model, lora, scale = _parts_of(path, record)
    with all_held(path, args.state, output if notes.live else None):
        pipe = load_pipeline(
            model if args.model is None else model_of(args),
            args.device or notes.device or "auto",
            args.dtype or notes.dtype or "auto",
            low_memory_of(args),
            lora,
            scale,
            args.head,
        )
        generation = pipe.resume(path, **{name: getattr(args, name) for name in CHECKS})
        with progress(1) as watch:
            job = FileJob(generation, [output], [record], notes.live, args.state or path, args.json, wanted == "frames")
            carry_out(job, watch(generation))


def _check_live(output: Path, record: dict[str, Any]) -> None:
    """The file that a live clip goes on in is the one that this run began: it says so inside."""
    from nova_video.io.media import read_metadata

    if not output.is_file():
        raise InputError(f"there is no file {output}: expected --output with the live clip that the state goes on with")
    if read_metadata(output) != record:
        raise InputError(f"{output} was not made by the run of this state: expected --output with the clip that was")


def _parts_of(path: Path, record: dict[str, Any]) -> tuple[str, Path | None, float]:
    """The model, the adapter and its scale that a state's record names."""
    model, lora, scale = record.get("model"), record.get("lora"), record.get("lora_scale", 1.0)
    if not isinstance(model, str) or not model.strip() or not (lora is None or (isinstance(lora, str) and lora)):
        raise InputError(f"{path}: its record names no model that can be opened: expected --model")
    check_number(f"{path}: its lora_scale", scale, -LIMITS.scale, high=LIMITS.scale)
    return model, None if lora is None else Path(lora), scale


def run_edit(args: Edit, like: "tuple[dict[str, Any], Path] | None" = None) -> None:
    """Makes a part of a picture or clip anew, or adds more around it. `like` is a record to start from."""
    from nova_video.io.decode import MediaFile
    from nova_video.io.inputs import InputClip, enlarge, masks_of, read_masks

    if args.mask is None and args.strength is None and args.outpaint is None:
        raise InputError(f"nothing of {args.file} would be kept: expected --mask, --strength or --outpaint")
    prompt = text_of("the sentence", args.prompt)
    check_output(args.output, wanted=args.format)
    clip = InputClip(MediaFile(args.file))
    masks = None if args.mask is None else read_masks(args.mask)
    if masks is not None:
        masks_of(masks, clip)  # fits it, or is an error
    if args.outpaint is not None:
        clip, masks = enlarge(clip, masks, args.outpaint)
    request = replace(request_of(args, prompt, video=clip, mask_image=masks), seed=seed_of(args))
    check_requests(args, [request])
    pipe = pipeline_of(args)
    generation = pipe.start(request)
    given = {
        "edited": _name(args.file),
        "mask": _name(args.mask),
        "outpaint": args.outpaint,
    }
    record = make_record(args, request, generation, given)
    describe_inputs(args, record, generation)
    if like is not None:
        warn_of_changes(like[0], record, like[1])
    with progress(1) as watch, output_place(args.output, args.format, 0, [prompt], len(clip) == 1) as path:
        job = FileJob(generation, [path], [record], as_json=args.json, as_frames=args.format == "frames")
        carry_out(job, watch(generation))


# What was typed -------------------------------------------------------------------------------------------------------


def _prompts(args: Generate) -> list[str]:
    """The sentences of the command line and then of the file; without any, that of the given clip."""
    prompts = [text_of("the sentence", prompt) for prompt in args.prompt]
    _warn_of_lacking_quotes(prompts)
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


def _warn_of_lacking_quotes(prompts: Sequence[str]) -> None:
    if len(prompts) > 2 and not any(" " in prompt for prompt in prompts):
        log.warning("got %d sentences of one word each: a sentence is to be in quotes", len(prompts))


def _sentence_of(path: Path) -> str:
    """The sentence that a clip was made from, the last one if it changed."""
    from nova_video.io.media import read_metadata

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
                what = "sentences" if args.num_images == 1 else "results"
                raise InputError(f"got {flag_of(name)} with {len(prompts)} {what}: expected one, it is for one clip")
    elif args.batch is not None and args.batch > 1:
        raise InputError(f"batch is {args.batch} with one result: expected several sentences, or --num-images")
    if args.batch is not None:
        check_number("batch", args.batch, 1, integer=True, high=MOST_RESULTS)
        if args.batch > 1 and (args.image is not None or args.video is not None):
            raise InputError(f"batch is {args.batch} with a given picture or clip: expected 1")
    if args.sheet is not None and args.live:
        raise InputError("got --sheet with --live: expected one of them")
    if args.image is not None and args.video is not None:
        raise InputError("got both of --image and --continue: expected one of them")
    if args.seconds == math.inf and not args.live:
        raise InputError("--seconds inf has no end: expected --live with it, to write the clip while it is made")


def _name(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _requests(args: Generate, prompts: Sequence[str]) -> "list[GenerateRequest]":
    """One a sentence, each with the next seed."""
    from nova_video.io.inputs import read_clips
    from nova_video.io.media import load_image

    seed = seed_of(args)
    common = request_of(
        args,
        prompts[0],
        image=load_image(args.image) if args.image is not None else None,
        video=read_clips(args.video) if args.video is not None else None,
    )
    later = [(at, text_of("--prompt-at", prompt)) for at, prompt in args.prompt_at]
    return [
        replace(common, prompt=[(0.0, prompt), *later] if later else prompt, seed=seed + index)
        for index, prompt in enumerate(prompts)
    ]
