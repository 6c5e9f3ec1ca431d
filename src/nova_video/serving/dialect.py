"""What requests in the OpenAI dialect mean here: settings of `GenerateRequest`, media, and what answers repeat.

Nothing is fetched and no path is opened: media are files of the request, data: URLs, or results of earlier jobs.
"""

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import PurePath
from typing import Any

from PIL import Image

from nova_video.common.checks import LIMITS, quote
from nova_video.common.errors import InputError, MediaError
from nova_video.common.option_fields import option_fields
from nova_video.io.decode import MediaFile
from nova_video.io.inputs import InputClip, frames_at
from nova_video.model.lora import active_adapters
from nova_video.serving.bodies import SentFile, file_of_url, read_object
from nova_video.serving.jobs import Job, Status
from nova_video.serving.schemas import ImageWords, WordError, Words, read_words
from nova_video.serving.service import JobService
from nova_video.serving.submission import Upload
from nova_video.serving.uploads import check_upload

SIZE = re.compile(r"(\d{1,6})x(\d{1,6})", re.ASCII)
STRENGTH = 0.5
"""The share that an edit makes anew if neither mask nor strength tells it."""
TOLD = ("user", "safety_identifier", "model", "quality", "background")
"""Words that are checked and change nothing."""
STILL = ("image", "image_reference")
"""Words whose file is a picture of one frame."""
HALF = 128  # of alpha: below it a mask is transparent


@dataclass
class Wish:
    """One request, in the words of `JobService.submit`."""

    options: dict[str, Any]
    media: dict[str, Upload | Job] = field(default_factory=dict)
    form: dict[str, Any] = field(default_factory=dict)
    clip: "SentFile | Job | None" = None
    """What `video` of the media is."""


def wish_of(service: JobService, model: type[Words], values: Mapping[str, Any]) -> Wish:
    """The settings of a request, without its media, which stay under their words."""
    words = read_words(model, _with_extra(values))
    _check_model(service, words.pop("model", None))
    _check_lora(service, words.pop("lora", None))
    for word in TOLD:
        words.pop(word, None)
    _read_size(words)
    _read_timeline(words)
    form = {word: words.pop(word) for word in option_fields(ImageWords) if word in words}
    return Wish(words, form=form)


def _with_extra(values: Mapping[str, Any]) -> dict[str, Any]:
    """The words of a request with those of its `extra_params`."""
    found = dict(values)
    extra = found.pop("extra_params", None)
    if extra is None:
        return found
    extra = read_object(extra, "extra_params") if isinstance(extra, str) else extra
    if not isinstance(extra, dict):
        raise WordError(f"extra_params is {quote(extra)}: expected a JSON object", "extra_params")
    if twice := sorted(extra.keys() & found.keys()):
        raise WordError(f"got {twice[0]} twice, once in extra_params: expected it once", twice[0])
    if "extra_params" in extra:
        raise WordError("extra_params has extra_params: expected the words of a request", "extra_params")
    return found | extra


def _check_model(service: JobService, name: str | None) -> None:
    if name not in (None, "", service.model):
        raise WordError(
            f"model is {quote(name)}: expected {service.model}, the one that is loaded", "model", "model_not_found"
        )


def _check_lora(service: JobService, name: str | None) -> None:
    """A LoRA is part of the loaded model: asking for it is right where it is the one that is on."""
    active = sorted(active_adapters(service.pipe.transformer))
    if name is None or active == [name]:
        return
    expected = f"{' and '.join(active)}, which the server runs with" if active else "none: the server runs without one"
    raise WordError(f"lora is {quote(name)}: expected {expected}", "lora")


def _read_size(words: dict[str, Any]) -> None:
    """Takes `size` apart."""
    size = words.pop("size", None)
    if size in (None, "auto"):
        return
    found = SIZE.fullmatch(size)
    if found is None:
        raise WordError(f"size is {quote(size)}: expected WIDTHxHEIGHT in pixels, such as 128x128, or auto", "size")
    for word, value in zip(("width", "height"), map(int, found.groups()), strict=True):
        if not 1 <= value <= LIMITS.side:
            raise WordError(f"size is {quote(size)}: expected sides of 1 to {LIMITS.side:,} pixels", "size")
        if words.setdefault(word, value) != value:
            raise WordError(f"got size {size} and {word} {words[word]}: expected one of them", "size")


def _read_timeline(words: dict[str, Any]) -> None:
    """Makes one prompt of a sentence and sentences in time."""
    timeline = words.pop("timeline", None)
    if timeline is None:
        return
    starts = isinstance(timeline[0], list) and bool(timeline[0]) and timeline[0][0] == 0 if timeline else False
    if "prompt" in words and starts and timeline[0][1:] != [words["prompt"]]:
        raise WordError("got a prompt and a timeline that begins at 0: expected one of them for second 0", "timeline")
    words["prompt"] = timeline if starts or "prompt" not in words else [[0, words["prompt"]], *timeline]


# Media ----------------------------------------------------------------------------------------------------------------


def take_video_media(service: JobService, wish: Wish, owner: str) -> None:
    """What a video begins with: a first frame, or a clip to go on from; with a mask or strength, what to edit."""
    given = {
        word: wish.options.pop(word)
        for word in ("input_reference", "image_reference", "video_reference")
        if word in wish.options
    }
    if len(given) > 1:
        first, second = list(given)[:2]
        raise WordError(f"got both of {first} and {second}: expected one of them", second)
    for word, value in given.items():
        sent = _sent(service, word, value, owner)
        is_picture = sent.is_picture if isinstance(sent, SentFile) else sent.kind == "image"
        if (word == "image_reference") > is_picture:
            raise WordError(f"{word} is a clip: expected a picture, or the clip as video_reference", word)
        if is_picture and word != "video_reference":
            wish.media["image"] = _upload(sent)
        else:
            _take_video(wish, sent)
    _take_mask(service, wish, "input_reference")


def take_clip(service: JobService, wish: Wish, owner: str) -> Job | None:
    """The clip of an edit or extension; the job that it is of, if it is one's result."""
    sent = _sent(service, "video", wish.options.pop("video"), owner)
    _take_video(wish, sent)
    _take_mask(service, wish, "video")
    if isinstance(sent, SentFile):
        return None
    for name in ("width", "height", "fps"):  # the clip goes on as it is
        wish.options.setdefault(name, sent.settings.get(name))
    wish.form["source_video_id"] = sent.id
    return sent


def take_picture(service: JobService, wish: Wish, owner: str) -> None:
    """The picture of an edit; without a mask, its transparent parts are the mask, as OpenAI has it."""
    sent = _sent(service, "image", wish.options.pop("image"), owner)
    if isinstance(sent, SentFile) and not sent.is_picture:
        raise WordError("image is a clip: expected a picture, or the clip at /v1/videos/edits", "image")
    wish.media["image"] = _upload(sent)
    tells = {"mask", "strength"} & wish.options.keys()
    mask = None if tells or isinstance(sent, Job) else _transparent_parts(sent)
    if mask is not None:
        wish.media["mask_image"] = Upload(mask, ".png")
    _take_mask(service, wish, "image")


def _take_video(wish: Wish, sent: SentFile | Job) -> None:
    wish.media["video"] = _upload(sent)
    wish.clip = sent


def edit_by_default(wish: Wish) -> None:
    """An edit needs to know how much to change."""
    if "mask_image" not in wish.media and "strength" not in wish.options:
        wish.options["strength"] = STRENGTH
        wish.form["notes"] = [f"strength is {STRENGTH:g}, since neither mask nor strength was given"]


def _take_mask(service: JobService, wish: Wish, edited: str) -> None:
    value = wish.options.pop("mask", None)
    if value is None:
        return
    if not wish.media:
        raise WordError(f"got mask without {edited}: expected what is to be edited", "mask")
    sent = _checked(service, value if isinstance(value, SentFile) else file_of_url("mask", _url_of("mask", value)))
    mask = _transparent_parts(sent) if sent.is_picture else None
    wish.media["mask_image"] = Upload(sent.data, sent.suffix) if mask is None else Upload(mask, ".png")


def _transparent_parts(sent: SentFile) -> bytes | None:
    """A mask, white where a picture is transparent, as PNG; None where it is nowhere."""
    try:
        with Image.open(BytesIO(sent.data)) as picture:
            if not picture.has_transparency_data or getattr(picture, "n_frames", 1) > 1:
                return None
            alpha = picture.convert("RGBA").getchannel("A")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise WordError(f"{sent.word} cannot be read: expected a whole picture", sent.word) from None
    if alpha.getextrema()[0] >= HALF:
        return None
    mask = BytesIO()
    alpha.point(lambda value: 255 if value < HALF else 0).save(mask, "PNG")
    return mask.getvalue()


def _sent(service: JobService, word: str, value: Any, owner: str) -> SentFile | Job:
    """A file of the request, or the job whose result is meant."""
    if isinstance(value, SentFile):
        return _checked(service, value)
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = read_object(value, word)
    if isinstance(value, dict) and set(value) == {"id"} and isinstance(value["id"], str):
        return _finished(service, word, value["id"], owner)
    return _checked(service, file_of_url(word, _url_of(word, value)))


def _checked(service: JobService, sent: SentFile) -> SentFile:
    """A file whose head is that of a picture or clip within the server's bounds."""
    try:
        check_upload(sent.word, sent.data, service.settings, still=sent.word in STILL)
    except InputError as error:
        raise WordError(str(error), sent.word) from None
    return sent


def _url_of(word: str, value: Any) -> Any:
    """The URL of a reference, which may be an object with one."""
    if not isinstance(value, dict):
        return value
    for key in ("image_url", "video_url", "url"):
        if set(value) == {key}:
            inner = value[key]
            return inner.get("url") if isinstance(inner, dict) else inner
    if "file_id" in value:
        raise WordError(f"{word} has a file_id: expected a file or a data: URL, this server keeps no files", word)
    raise WordError(f"{word} is {quote(value)}: expected a file, a data: URL or an object with one as image_url", word)


def _finished(service: JobService, word: str, id: str, owner: str) -> Job:
    job = service.get(id, owner)
    if job.status is not Status.COMPLETED:
        raise WordError(f"{word} {job.id} is {job.status}: expected a completed one", word)
    return job


def _upload(sent: SentFile | Job) -> Upload | Job:
    return Upload(sent.data, sent.suffix) if isinstance(sent, SentFile) else sent


def media_of(service: JobService, job: Job) -> dict[str, Upload | Job]:
    """What another job was given, for one that is made of the same."""
    try:
        return {
            name: Upload(service.results.read(job.id, file), PurePath(file).suffix) for name, file in job.inputs.items()
        }
    except FileNotFoundError:
        raise InputError(f"{job.id} lacks what it was given: expected a job whose files are still kept") from None


# Lengths --------------------------------------------------------------------------------------------------------------


def round_length(service: JobService, wish: Wish) -> None:
    """Makes whole latent frames of `seconds`: the nearest number of frames to seconds times fps that has them."""
    seconds = wish.options.get("seconds")
    if not isinstance(seconds, int | float) or seconds == float("inf") or "num_frames" in wish.options:
        return
    fps, stride = _fps(service, wish), service.pipe.capabilities.temporal_stride
    given = 1 if wish.clip is None else _count(wish.clip, fps)
    del wish.options["seconds"]
    wish.options["num_frames"] = max(1, given + stride * round((seconds * fps - given) / stride))


def extend(service: JobService, wish: Wish) -> None:
    """Makes `seconds` more of a clip: the request counts all frames, those of the clip as well."""
    seconds = wish.options.pop("seconds")
    if seconds == float("inf"):
        wish.options["num_frames"] = seconds
        return
    fps, stride = _fps(service, wish), service.pipe.capabilities.temporal_stride
    wish.options["num_frames"] = _count(wish.clip, fps) + stride * max(1, round(seconds * fps / stride))


def _count(clip: SentFile | Job | None, fps: float) -> int:
    """How many frames a clip has at a rate."""
    if isinstance(clip, Job):
        return len(frames_at(clip.frames, clip.settings["fps"], fps))
    assert clip is not None  # an extension has one
    with tempfile.NamedTemporaryFile(suffix=clip.suffix) as file:
        file.write(clip.data)
        file.flush()
        try:
            return InputClip(MediaFile(file.name)).count(fps)
        except MediaError as error:
            raise WordError(f"{clip.word} {str(error).removeprefix(file.name).lstrip(': ')}", clip.word) from None


def _fps(service: JobService, wish: Wish) -> float:
    found = wish.options.get("fps")
    return float(service.pipe.defaults.fps if found is None else found)
