"""The meaning of requests in the OpenAI dialect: settings of `GenerateRequest`, media, and words of the answer.

Nothing is fetched and no path is opened: media are files of the request, data: URLs, or results of earlier jobs.
"""

import math
import re
import tempfile
from collections.abc import Mapping
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
from nova_video.serving.jobs import Job, Kind, Status
from nova_video.serving.schemas import CommonWords, ImageWords, RequestWords, SessionWords, WordError, read_words
from nova_video.serving.service import JobService
from nova_video.serving.submission import Upload
from nova_video.serving.uploads import check_upload

SIZE = re.compile(r"(\d{1,6})x(\d{1,6})", re.ASCII)
STRENGTH = 0.5
"""The share that an edit makes anew if neither mask nor strength tells it."""
REFERENCES = ("input_reference", "image_reference", "video_reference")
OWN_WORDS = {*option_fields(CommonWords), *option_fields(ImageWords), *option_fields(SessionWords)}
"""Words that are no settings of `GenerateRequest`."""
IN_FORM = ("n", "response_format", "output_format", "output_compression", "stream", "partial_images")
"""Words that decide the answer."""
STILL = ("image", "image_reference")
"""RequestWords whose file is a picture of one frame."""
HALF = 128  # of alpha: below it a mask is transparent


class WordedRequest:
    """One request, as `JobService.submit` takes it: read from words, then completed by what its route is for."""

    def __init__(self, service: JobService, model: type[RequestWords], values: Mapping[str, Any], owner: str) -> None:
        """Reads the words of a request. Its media stay among the options, under their words, until they are taken."""
        words = read_words(model, _with_extra(values))
        _check_model(service, words.get("model"))
        _check_lora(service, words.get("lora"))
        if isinstance(prompt := words.get("prompt"), str) and not prompt.strip():
            raise WordError(f"prompt is {prompt!r}: expected a sentence that is not empty", "prompt")
        words |= _sides(words) | _sentences(words)
        self.service = service
        self.owner = owner
        self.form: dict[str, Any] = {word: words[word] for word in IN_FORM if word in words}
        self.options: dict[str, Any] = {word: value for word, value in words.items() if word not in OWN_WORDS}
        self.media: dict[str, Upload | Job] = {}
        self.clip: SentFile | Job | None = None
        """The `video` of the media."""

    @property
    def is_endless(self) -> bool:
        return math.inf in (self.options.get("num_frames"), self.options.get("seconds"))

    def submit(self, kind: Kind) -> Job:
        """Queues the request; one without end is a live session, which is stopped to be kept."""
        wanted: Kind = "session" if self.is_endless else kind
        several = {"num_images_per_prompt": self.form["n"]} if "n" in self.form else {}
        return self.service.submit(wanted, self.options | several, self.media, self.form, self.owner)

    def require_prompt(self) -> None:
        if "prompt" not in self.options:
            raise WordError("prompt is missing: expected a sentence, or a timeline of them", "prompt", "missing_field")

    # Media ------------------------------------------------------------------------------------------------------------

    def take_references(self) -> None:
        """Takes what a video begins with: a first frame or a clip."""
        given = {word: self.options.pop(word) for word in REFERENCES if word in self.options}
        if len(given) > 1:
            first, second = list(given)[:2]
            raise WordError(f"got both of {first} and {second}: expected one of them", second)
        for word, value in given.items():
            sent = self._find(word, value)
            is_picture = sent.kind == "image" if isinstance(sent, Job) else sent.is_picture
            if word == "image_reference" and not is_picture:
                raise WordError(f"{word} is a clip: expected a picture, or the clip as video_reference", word)
            if is_picture and word != "video_reference":
                self.media["image"] = _upload(sent)
            else:
                self._take_video(sent)
        self._take_mask(REFERENCES[0])

    def take_clip(self) -> None:
        """Takes the clip of an edit or extension; an earlier video goes on in its own size and rate."""
        sent = self._find("video", self.options.pop("video"))
        self._take_video(sent)
        self._take_mask("video")
        if isinstance(sent, Job):
            self.options = {name: sent.settings[name] for name in ("width", "height", "fps")} | self.options
            self.form["source_video_id"] = sent.id

    def take_picture(self) -> None:
        """Takes the picture of an edit; without a mask, its transparent parts are the mask, as OpenAI has it."""
        sent = self._find("image", self.options.pop("image"))
        if isinstance(sent, SentFile) and not sent.is_picture:
            raise WordError("image is a clip: expected a picture, or the clip at /v1/videos/edits", "image")
        self.media["image"] = _upload(sent)
        tells = {"mask", "strength"} & self.options.keys()
        mask = None if tells or isinstance(sent, Job) else _transparent_parts(sent)
        if mask is not None:
            self.media["mask_image"] = Upload(mask, ".png")
        self._take_mask("image")

    def edit_by_default(self) -> None:
        """Says how much an edit makes anew, where nothing else does."""
        if "mask_image" not in self.media and "strength" not in self.options:
            self.options["strength"] = STRENGTH
            self.form["notes"] = [f"strength is {STRENGTH:g}, since neither mask nor strength was given"]

    def repeat(self, source: Job) -> None:
        """Takes settings, seed and media of another job where the request has no others."""
        kept = {name: math.inf if value == "inf" else value for name, value in source.request.items()}
        if {"seconds", "num_frames"} & self.options.keys():
            kept = {name: value for name, value in kept.items() if name not in ("seconds", "num_frames")}
        self.options = kept | self.options
        try:
            self.media = {
                name: Upload(self.service.results.read(source.id, file), PurePath(file).suffix)
                for name, file in source.inputs.items()
            }
        except FileNotFoundError:
            raise InputError(f"{source.id} lacks what it was given: expected a job whose files are kept") from None
        video = self.media.get("video")
        if isinstance(video, Upload):
            self.clip = SentFile("video", video.data, video.suffix)
        self.form["remixed_from_video_id"] = source.id

    def _take_video(self, sent: SentFile | Job) -> None:
        self.media["video"] = _upload(sent)
        self.clip = sent

    def _take_mask(self, edited: str) -> None:
        value = self.options.pop("mask", None)
        if value is None:
            return
        if not self.media:
            raise WordError(f"got mask without {edited}: expected what is to be edited", "mask")
        sent = value if isinstance(value, SentFile) else file_of_url("mask", _url_of("mask", value))
        sent = _check_file(self.service, sent)
        mask = _transparent_parts(sent) if sent.is_picture else None
        self.media["mask_image"] = _upload(sent) if mask is None else Upload(mask, ".png")

    def _find(self, word: str, value: Any) -> SentFile | Job:
        """A file of the request, or the earlier job whose result is meant."""
        if isinstance(value, str) and value.lstrip().startswith("{"):
            value = read_object(value, word)
        if isinstance(value, dict) and set(value) == {"id"} and isinstance(value["id"], str):
            job = self.service.get(value["id"], self.owner)
            if job.status is not Status.COMPLETED:
                raise WordError(f"{word} {job.id} is {job.status}: expected a completed one", word)
            return job
        sent = value if isinstance(value, SentFile) else file_of_url(word, _url_of(word, value))
        return _check_file(self.service, sent)

    # Lengths ----------------------------------------------------------------------------------------------------------

    def round_length(self) -> None:
        """Makes whole latent frames of `seconds`: the number of frames nearest to seconds times fps that has them."""
        seconds = self.options.get("seconds")
        if seconds is None or self.is_endless or "num_frames" in self.options:
            return
        given = 1 if self.clip is None else _count(self.clip, self._fps)
        del self.options["seconds"]
        self.options["num_frames"] = max(1, given + self._stride * round((seconds * self._fps - given) / self._stride))

    def extend(self) -> None:
        """Makes `seconds` more of a clip: the request counts all frames, those of the clip as well."""
        if self.is_endless:
            return
        assert self.clip is not None  # taken before
        more = self.options.pop("seconds") * self._fps
        self.options["num_frames"] = _count(self.clip, self._fps) + self._stride * max(1, round(more / self._stride))

    @property
    def _fps(self) -> float:
        found: float = self.options.get("fps") or self.service.pipe.defaults.fps
        return found

    @property
    def _stride(self) -> int:
        return self.service.pipe.capabilities.temporal_stride


# Words ----------------------------------------------------------------------------------------------------------------


def _with_extra(values: Mapping[str, Any]) -> dict[str, Any]:
    """The words of a request with those of its `extra_params`."""
    extra = values.get("extra_params")
    found = {word: value for word, value in values.items() if word != "extra_params"}
    if extra is None:
        return found
    extra = read_object(extra, "extra_params") if isinstance(extra, str) else extra
    if not isinstance(extra, dict):
        raise WordError(f"extra_params is {quote(extra)}: expected a JSON object", "extra_params")
    if twice := sorted(extra.keys() & values.keys()):
        raise WordError(f"got {twice[0]} twice, once in extra_params: expected it once", twice[0])
    return found | extra


def _check_model(service: JobService, name: str | None) -> None:
    if name not in (None, "", service.model):
        message = f"model is {quote(name)}: expected {service.model}, the one that is loaded"
        raise WordError(message, "model", "model_not_found")


def _check_lora(service: JobService, name: str | None) -> None:
    """Refuses a LoRA other than the one that is a part of the loaded model."""
    active = sorted(active_adapters(service.pipe.transformer))
    if name is None or active == [name]:
        return
    expected = f"{' and '.join(active)}, which the server runs with" if active else "none: the server runs without one"
    raise WordError(f"lora is {quote(name)}: expected {expected}", "lora")


def _sides(words: Mapping[str, Any]) -> dict[str, int]:
    """Width and height of `size`."""
    size = words.get("size")
    if size in (None, "auto"):
        return {}
    found = SIZE.fullmatch(size)
    if found is None:
        raise WordError(f"size is {quote(size)}: expected WIDTHxHEIGHT in pixels, such as 128x128, or auto", "size")
    sides = dict(zip(("width", "height"), map(int, found.groups()), strict=True))
    for word, value in sides.items():
        if not 1 <= value <= LIMITS.side:
            raise WordError(f"size is {quote(size)}: expected sides of 1 to {LIMITS.side:,} pixels", "size")
        if words.get(word, value) != value:
            raise WordError(f"got size {size} and {word} {words[word]}: expected one of them", "size")
    return sides


def _sentences(words: Mapping[str, Any]) -> dict[str, Any]:
    """The prompt that a sentence and sentences in time are together."""
    timeline, prompt = words.get("timeline"), words.get("prompt")
    if timeline is None:
        return {}
    first = timeline[0] if timeline else None
    begins = isinstance(first, list) and first[:1] == [0]
    if prompt is not None and begins and first != [0, prompt]:
        raise WordError("got a prompt and a timeline that begins at 0: expected one of them for second 0", "timeline")
    return {"prompt": timeline if begins or prompt is None else [[0, prompt], *timeline]}


# Files ----------------------------------------------------------------------------------------------------------------


def _check_file(service: JobService, sent: SentFile) -> SentFile:
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


def _upload(sent: SentFile | Job) -> Upload | Job:
    return Upload(sent.data, sent.suffix) if isinstance(sent, SentFile) else sent


def _count(clip: SentFile | Job, fps: float) -> int:
    """How many frames a clip has at a rate."""
    if isinstance(clip, Job):
        return len(frames_at(clip.frames, clip.settings["fps"], fps))
    with tempfile.NamedTemporaryFile(suffix=clip.suffix) as file:
        file.write(clip.data)
        file.flush()
        try:
            return InputClip(MediaFile(file.name)).count(fps)
        except MediaError as error:
            raise WordError(f"{clip.word} {str(error).removeprefix(file.name).lstrip(': ')}", clip.word) from None


def _transparent_parts(sent: SentFile) -> bytes | None:
    """A mask, white where a picture is transparent, as PNG; None where it is nowhere."""
    try:
        with Image.open(BytesIO(sent.data)) as picture:
            if not picture.has_transparency_data or getattr(picture, "n_frames", 1) > 1:
                return None
            alpha = picture.convert("RGBA").getchannel("A")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise WordError(f"{sent.word} cannot be read: expected a whole picture", sent.word) from None
    if min(alpha.tobytes()) >= HALF:
        return None
    mask = BytesIO()
    alpha.point(lambda value: 255 if value < HALF else 0).save(mask, "PNG")
    return mask.getvalue()
