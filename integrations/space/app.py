"""A page that makes pictures and clips from sentences, for a Hugging Face Space or any machine: `python app.py`.

The canvas is shown set by set, each frame as soon as it is final, and the whole clip as a file at the end. The file
is not encoded again for the page. Environment: NOVA_MODEL is the bundled model, a folder or a hub id; NOVA_DEVICE is
auto, cpu or cuda.
"""

import json
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from nova_video import FrameReady, GenerateRequest, Generation, InputError, NovaPipeline, PartialFrame
from nova_video.common.devices import choose_device, choose_dtype
from nova_video.common.option_fields import choices_of, facts_of, kind_of, option_fields
from nova_video.io.fragments import join_fragments
from nova_video.io.media import LiveWriter, write_media

MODEL = os.environ.get("NOVA_MODEL", "emoji")
FIELDS = option_fields(GenerateRequest)
CLIP, PICTURE = "clip", "picture"
SETTINGS = ("num_frames", "seed", "preset", "sets", "guidance_scale", "motion_flow")
"""The settings that the page shows, in the order of its fields."""
OF_CLIPS = ("num_frames", "motion_flow")
MOST_FRAMES = int(os.environ.get("NOVA_MOST_FRAMES", "65"))
"""The longest clip that the page makes: a Space is shared."""
EXAMPLES = [
    [CLIP, "a panda growing on a green background"],
    [CLIP, "a sunflower spinning clockwise on a blue background"],
    [CLIP, "a penguin moving left slowly on a cyan background"],
    [CLIP, "an owl bouncing on a green background"],
    [PICTURE, "a red apple on a white background"],
    [PICTURE, "a whale to the left of a red apple on a white background"],
]
FOLDER = Path(tempfile.mkdtemp(prefix="nova-space-"))

SECONDS = 0.2
"""The least time between two looks at the canvas: each is decoded for the page alone."""

PageState = tuple[Any, Any, Any, Any, str]
"""The canvas, the final frames, the files of a clip and of a picture, and a line of text."""


@dataclass
class Visits:
    """The pages that are open now: each may stop the clip that it is making."""

    stops: dict[str, threading.Event] = field(default_factory=dict)

    def begin(self, session: str) -> threading.Event:
        self.stops[session] = threading.Event()
        return self.stops[session]

    def stop(self, session: str) -> None:
        if session in self.stops:
            self.stops[session].set()


VISITS = Visits()


def open_pipe() -> NovaPipeline:
    device = choose_device(os.environ.get("NOVA_DEVICE", "auto"))
    pipe = NovaPipeline.from_pretrained(MODEL, torch_dtype=choose_dtype("auto", device)).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


PIPE = open_pipe()


# Making it ------------------------------------------------------------------------------------------------------------


def make(request: gr.Request, kind: str, prompt: str, *values: Any) -> Iterator[PageState]:
    """Makes a picture or a clip; yields what the page shows after each set and each frame."""
    session = str(request.session_hash)
    stop = VISITS.begin(session)
    try:
        yield from _make(kind, prompt, dict(zip(SETTINGS, values, strict=True)), stop)
    except InputError as error:
        raise gr.Error(str(error), duration=None) from None
    finally:
        VISITS.stops.pop(session, None)


def _make(kind: str, prompt: str, values: dict[str, Any], stop: threading.Event) -> Iterator[PageState]:
    wanted = {name: value for name, value in values.items() if value not in (None, "")}
    wanted = {name: _number(name, value) for name, value in wanted.items()}
    if kind == PICTURE:
        wanted = {name: value for name, value in wanted.items() if name not in OF_CLIPS} | {"num_frames": 1}
    if wanted.get("num_frames", 1) > MOST_FRAMES:
        raise InputError(f"num_frames is {wanted['num_frames']}: expected at most {MOST_FRAMES} on this page")
    generation = PIPE.start(GenerateRequest(prompt, output_type="pil", **wanted))
    frames: list[Image.Image] = []
    place = FOLDER / uuid.uuid4().hex
    shown_frames, shown_at = 0, 0.0
    yield None, [], None, None, "The sentence is read."
    events: Any = generation.stream(preview=True)
    with LiveWriter(place.with_suffix(".part.mp4"), generation.plan.fps, {}) as writer, closing(events):
        for event in events:
            if isinstance(event, FrameReady):
                frames.append(event.frame)
                writer.write(np.asarray(event.frame))
            if time.monotonic() - shown_at >= SECONDS:
                gallery = frames if len(frames) > shown_frames else gr.skip()
                shown_frames, shown_at = len(frames), time.monotonic()
                yield event.frame, gallery, gr.skip(), gr.skip(), _progress(generation, event, len(frames))
            if stop.is_set():
                break
    if not frames:
        yield None, [], None, None, "It was stopped before a frame was final."
        return
    record, text = generation.records[0], _summary(generation, len(frames), stop.is_set())
    path = place.with_suffix(".mp4" if kind == CLIP else ".png")
    if kind == CLIP:
        path.write_bytes(join_fragments(writer.path.read_bytes(), (), record))
    else:
        write_media(np.asarray(frames[0])[None], path, 1, record)
    writer.path.unlink()
    try:  # gradio keeps a copy of its own before it asks for more
        yield frames[-1], frames, *((str(path), None) if kind == CLIP else (None, str(path))), text
    finally:
        path.unlink()


def _number(name: str, value: Any) -> Any:
    """A whole number as one: the fields of the page give floats."""
    whole = kind_of(FIELDS[name]) is int and isinstance(value, float) and value.is_integer()
    return int(value) if whole else value


def _progress(generation: Generation, event: Any, frames: int) -> str:
    sets = f"set {event.step + 1} of {generation.total_steps}, " if isinstance(event, PartialFrame) else ""
    return f"{sets}{frames} frames are final"


def _summary(generation: Generation, frames: int, stopped: bool) -> str:
    """How it was made, as Markdown, with the words that the model does not know."""
    record = generation.records[0]
    warnings = "".join(f"\n- {line}" for line in record.get("warnings", ()))
    unknown = f"\n\n**The model may draw something wrong:**{warnings}" if warnings else ""
    text = json.dumps(record, indent=1)
    amount = "1 frame" if frames == 1 else f"{frames} frames"
    said = f"{'Stopped: ' if stopped else ''}{amount}, seed {record['seed']}."
    return f"{said}{unknown}\n\n<details><summary>All settings</summary>\n\n```json\n{text}\n```\n</details>"


# The page -------------------------------------------------------------------------------------------------------------


def setting(name: str) -> gr.components.Component:
    """The field of one setting: its help and bounds are those of `GenerateRequest`."""
    facts, choices = facts_of(FIELDS[name]), choices_of(kind_of(FIELDS[name]))
    info = f"{facts.help} Empty: {facts.unset or 'drawn at random'}."
    if choices:
        return gr.Dropdown(["", *choices], value="", label=name, info=info)
    return gr.Number(None, label=name, info=info, minimum=facts.low, maximum=facts.high, precision=None)


def words() -> str:
    """All words of the model, or that it reads any text."""
    vocabulary = PIPE.settings.vocabulary
    if vocabulary is None:
        return "This model reads any text."
    lists = [f"**{each.title}** ({len(each.phrases)}): {', '.join(sorted(each.phrases))}" for each in vocabulary.words]
    templates = [f"- `{template}`" for template in (*vocabulary.clips, *vocabulary.pictures)]
    return "\n\n".join([*lists, "**Sentences**; what is in brackets may be absent", "\n".join(templates)])


def build() -> gr.Blocks:
    with gr.Blocks(title="NOVA", delete_cache=(3600, 86400)) as page:
        gr.Markdown(
            f"# NOVA\nType a sentence, watch a video. The model is `{MODEL}`. Clips are made frame by frame, and each"
            " frame set by set of tokens in random order: you see it happen."
        )
        with gr.Row():
            with gr.Column():
                kind = gr.Radio([CLIP, PICTURE], value=CLIP, label="what to make")
                prompt = gr.Textbox(EXAMPLES[0][1], label="sentence", lines=2)
                with gr.Row():
                    button, stop = gr.Button("Make it", variant="primary"), gr.Button("Stop and keep")
                with gr.Accordion("Settings", open=False):
                    settings = [setting(name) for name in SETTINGS]
                gr.Examples(EXAMPLES, [kind, prompt])
            with gr.Column():
                canvas = gr.Image(label="canvas", type="pil", format="webp", interactive=False)
                told = gr.Markdown()
                clip = gr.Video(label="clip", interactive=False, autoplay=True, loop=True)
                picture = gr.File(label="picture", interactive=False)
                frames = gr.Gallery(label="final frames", columns=6, format="webp", interactive=False)
        with gr.Accordion("Words that the model knows", open=False):
            gr.Markdown(words())
        inputs = [kind, prompt, *settings]
        outputs = [canvas, frames, clip, picture, told]
        gr.on([button.click, prompt.submit], make, inputs, outputs, api_name="make", concurrency_limit=1)
        stop.click(_stop, queue=False, api_name="stop")
    return page


def _stop(request: gr.Request) -> None:
    VISITS.stop(str(request.session_hash))


if __name__ == "__main__":
    build().queue(max_size=20).launch(allowed_paths=[str(FOLDER)])
