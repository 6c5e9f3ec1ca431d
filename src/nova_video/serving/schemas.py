"""The words of requests over HTTP, as pydantic models that OpenAPI shows.

A request's words are the settings of `GenerateRequest`, under their names, keys and aliases, and the few of the OpenAI
dialect that are declared here. The setting itself checks its word, so that a message reads the same in Python, in the
shell and here. In forms every value is text: text that stands for a number, a switch or a list is read as that.
"""

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import Field as RecordField
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, WithJsonSchema, create_model

from nova_video.common.checks import quote, shorten
from nova_video.common.errors import InputError, unknown
from nova_video.common.option_fields import (
    aliases_of,
    check_option,
    choices_of,
    facts_of,
    is_timed,
    json_schema,
    key_of,
    kind_of,
    option,
    option_fields,
)
from nova_video.pipeline.keywords import CALL_HINTS
from nova_video.pipeline.own_parts import CHECKS
from nova_video.pipeline.request import GenerateRequest

WITHHELD = (*CHECKS, "memory_gb", "output_type", "num_images_per_prompt")
"""Settings that are no caller's: code, this machine's memory, and what the dialect says in its own way."""
HINTS = {
    **CALL_HINTS,
    **dict.fromkeys(CHECKS, "none: a request names no code"),
    "memory_gb": "none: the server bounds its memory",
    "output_type": "output_format for pictures; a video is mp4",
    "num_images_per_prompt": "n for pictures, and a request for each video",
    "num_videos_per_prompt": "a request for each video",
    "n": "a request for each video",
    "true_cfg_scale": "guidance_scale",
    "guidance_scale_2": "guidance_scale, which may change in time",
    "preencode_mp4": "none: a video is encoded while it is made",
    "style": "the prompt, in which a style may be said",
    "input_fidelity": "strength, 0 to 1: the share that is made anew",
    "moderation": "none: this server moderates nothing",
    "markup": "mask",
    "mask_image": "mask",
}
"""RequestWords that others know -> what to say here."""
PLACE = {"type": "string", "contentMediaType": "application/octet-stream"}
"""The schema of a file in a form."""
SCHEMAS: dict[str, dict[str, Any]] = {
    "prompt": {"type": "string"},
    "negative_prompt": {"type": "string"},
    "timeline": {
        "type": "array",
        "minItems": 1,
        "items": {
            "type": "array",
            "prefixItems": [{"type": "number", "minimum": 0}, {"type": "string"}],
            "minItems": 2,
            "maxItems": 2,
        },
    },
    "extra_params": {"type": "object"},
    "seconds": {"anyOf": [{"type": "string"}, {"type": "number"}]},
}
"""RequestWords that HTTP has in a form of their own."""
FORMS = {
    "timeline": "a list of [seconds, sentence] pairs",
    "extra_params": "a JSON object",
    "stream": "true or false",
}


class WordError(InputError):
    """Wrong input that one word of a request carries."""

    def __init__(self, message: str, word: str | None, code: str | None = None) -> None:
        super().__init__(message)
        self.word = word
        self.code = code


# Words of the dialect -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CommonWords:
    """RequestWords that every request may have besides the settings of `GenerateRequest`."""

    model: str | None = option(None, "Name of the loaded model, which GET /v1/models tells.", unset="that model")
    size: str | None = option(None, "WIDTHxHEIGHT in pixels, such as 128x128, or auto.", unset="the model's own")
    timeline: str | None = option(
        None, "Sentences in time: [seconds, sentence] pairs. With a prompt, that is the sentence from 0 on."
    )
    context: int | None = option(None, "The same as context_frames.", low=1)
    lora: str | None = option(None, "Name of a LoRA that the server was started with.", unset="all of them")
    extra_params: str | None = option(None, "An object of more of these words.")
    user: str | None = option(None, "A name for the caller's own records. It changes nothing.")
    safety_identifier: str | None = option(None, "The same as user.")


@dataclass(frozen=True, kw_only=True)
class ImageWords(CommonWords):
    """RequestWords of the dialect about pictures."""

    n: int | None = option(None, "How many pictures; each takes the next seed.", low=1, high=10, unset="1")
    response_format: Literal["b64_json", "url"] | None = option(
        None, "Pictures in the answer, or links to them.", unset="b64_json"
    )
    output_format: Literal["png", "jpeg", "webp"] | None = option(None, "Format of the pictures.", unset="png")
    output_compression: int | None = option(
        None, "Quality of jpeg and webp; png loses nothing.", low=0, high=100, unset="90"
    )
    stream: bool | None = option(None, "Send the picture as it fills in, as server-sent events.", unset="false")
    partial_images: int | None = option(
        None, "With stream: how many pictures of the canvas on the way.", low=0, high=3, unset="0"
    )
    quality: Literal["auto", "standard"] | None = option(None, "preset and sets say how fine pictures are.")
    background: Literal["auto", "opaque"] | None = option(None, "Pictures have no transparent parts.")


@dataclass(frozen=True, kw_only=True)
class SessionWords(CommonWords):
    """Words that start a live session besides those of every video."""

    format: Literal["m4s"] | None = option(None, "Form of the frames: fragments of mp4.", unset="m4s")
    endless: bool | None = option(None, "No end, until it is stopped.", unset="false")
    previews: bool | None = option(None, "Send small pictures of the canvas as it fills.", unset="false")


# Models of requests ---------------------------------------------------------------------------------------------------


class RequestWords(BaseModel):
    """The words of one request."""

    model_config = ConfigDict(extra="forbid")

    def given(self) -> dict[str, Any]:
        """The words that are there, by the names of their settings; null is none."""
        found: dict[str, Any] = {}
        said: dict[str, str] = {}
        for word in sorted(self.model_fields_set):
            value, name = getattr(self, word), SETTINGS.get(word, word)
            if value is None:
                continue
            if found.setdefault(name, value) != value:
                raise WordError(f"got {said[name]} {quote(found[name])} and {word} {quote(value)}: expected one", word)
            said[name] = word
        return found


def _other_words() -> dict[str, str]:
    """Keys, aliases and further words of settings -> their names."""
    keys = {key_of(each): name for name, each in option_fields(GenerateRequest).items()}
    return {**keys, **aliases_of(GenerateRequest), "context": "context_frames"}


SETTINGS = _other_words()


def words_model(
    name: str,
    own: type[Any],
    *,
    media: Mapping[str, str],
    required: Collection[str],
    example: Mapping[str, Any],
    without: Collection[str] = (),
) -> type[RequestWords]:
    """The model of one request: settings of `GenerateRequest`, the words of `own`, and media with their help."""
    found: dict[str, Any] = {}
    for record in (GenerateRequest, own):
        for word, each in option_fields(record).items():
            if word not in without and (record is own or word not in WITHHELD):
                found |= _fields(record, word, each, required)
    for word, text in media.items():
        schema = {"anyOf": [PLACE, {"type": "object"}], "description": text}
        found[word] = (Annotated[Any, WithJsonSchema(schema)], ... if word in required else None)
    shown = {"json_schema_extra": {"examples": [dict(example)]}}
    return create_model(name, __base__=RequestWords, __cls_kwargs__=shown, **found)


def _fields(record: type[Any], word: str, each: "RecordField[Any]", required: Collection[str]) -> dict[str, Any]:
    """The pydantic fields of one setting: under its name, and optional ones under its other words."""
    schema = {**json_schema(record)["properties"][word], **SCHEMAS.get(word, {})}
    if word in SCHEMAS and "anyOf" not in SCHEMAS[word]:
        schema.pop("anyOf", None)
    check = BeforeValidator(lambda value: _check_word(record, word, each, value))
    found = {word: (Annotated[Any, check, WithJsonSchema(schema)], ... if word in required else None)}
    if record is GenerateRequest:
        same = WithJsonSchema({**schema, "description": f"The same as {word}."})
        others = {other for other in (key_of(each), *facts_of(each).aliases) if other != word}
        found |= dict.fromkeys(sorted(others), (Annotated[Any, check, same], None))
    return found


def _check_word(record: type[Any], word: str, each: "RecordField[Any]", value: Any) -> Any:
    """The value of one word, or an InputError."""
    if value is None:
        return None
    if word in ("timeline", "extra_params"):
        value = _from_text(value) if isinstance(value, str) else value
        if not isinstance(value, list if word == "timeline" else dict):
            raise InputError(f"{word} is {quote(value)}: expected {FORMS[word]}")
        return value
    kind = kind_of(each)
    if kind is str or (word in SCHEMAS and word != "seconds"):
        if not isinstance(value, str):
            raise InputError(f"{word} is {quote(value)}: expected a text")
        return value
    if isinstance(value, str) and not choices_of(kind):
        value = _from_text(value)
    if isinstance(value, list) and not is_timed(each):
        raise InputError(f"{word} is {quote(value)}: expected {'true or false' if kind is bool else 'a number'}")
    check_option(record, word, value)
    return value


def _from_text(text: str) -> Any:
    """The value that a text stands for; text that is none of JSON stays text."""
    plain = text.strip()
    if plain.lower() in ("true", "false"):
        return plain.lower() == "true"
    if plain.lower() == "inf":
        return math.inf
    try:
        return json.loads(plain)
    except (ValueError, RecursionError):
        return text


def read_words(model: type[RequestWords], values: Mapping[str, Any]) -> dict[str, Any]:
    """The words of a request by the names of their settings; InputError names the first one that is wrong."""
    try:
        return model.model_validate(dict(values)).given()
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
    unknown_first = sorted(found, key=lambda one: one["type"] != "extra_forbidden")
    first = unknown_first[0]
    word = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        if word in HINTS:
            raise WordError(f"unknown field {word}: expected {HINTS[word]}", word, "unknown_field")
        message = str(unknown("field", shorten(word, 60), list(model.model_fields)))
        raise WordError(message, shorten(word, 60), "unknown_field")
    if first["type"] == "missing":
        raise WordError(f"{word} is missing: expected it", word, "missing_field")
    raise WordError(str(first["ctx"]["error"]), word) from None


VIDEO = {"prompt": "a red apple moving left", "seconds": "2", "size": "128x128", "seed": 7}
IMAGE_PLACE = "A picture: a file, a data: URL, or an object with one as image_url."
VIDEO_PLACE = "A clip: a file, a data: URL, or an object with one as video_url or with the id of an earlier video."
MASK_PLACE = "White parts are made anew; of a picture with transparency, its transparent parts."

VideoCreate = words_model(
    "VideoCreate",
    CommonWords,
    media={
        "input_reference": "The first frame, or a clip to go on from.",
        "image_reference": IMAGE_PLACE,
        "video_reference": VIDEO_PLACE,
        "mask": MASK_PLACE,
    },
    required=(),
    example=VIDEO,
)
SessionStart = words_model(
    "SessionStart",
    SessionWords,
    media={"image_reference": IMAGE_PLACE, "video_reference": VIDEO_PLACE},
    required=(),
    example={"prompt": "a red apple moving left", "size": "128x128", "endless": True, "seed": 7},
)
VideoEdit = words_model(
    "VideoEdit",
    CommonWords,
    media={"video": VIDEO_PLACE, "mask": MASK_PLACE},
    required=("video",),
    example={"prompt": "a green apple moving left", "video": {"id": "video_0123"}, "strength": 0.5},
)
VideoExtend = words_model(
    "VideoExtend",
    CommonWords,
    media={"video": VIDEO_PLACE},
    required=("video", "seconds"),
    example={"prompt": "a red apple moving right", "video": {"id": "video_0123"}, "seconds": "2"},
    without=("num_frames", "strength"),
)
VideoRemix = words_model(
    "VideoRemix", CommonWords, media={}, required=(), example={"prompt": "a green apple moving left"}
)
STILL = ("num_frames", "seconds", "timeline", "fps")
ImageCreate = words_model(
    "ImageCreate",
    ImageWords,
    media={},
    required=("prompt",),
    example={"prompt": "a red apple", "n": 2, "size": "128x128"},
    without=(*STILL, "strength"),
)
ImageEdit = words_model(
    "ImageEdit",
    ImageWords,
    media={"image": IMAGE_PLACE, "mask": MASK_PLACE},
    required=("image", "prompt"),
    example={"prompt": "a green apple", "image": {"image_url": "data:image/png;base64,..."}, "strength": 0.5},
    without=STILL,
)
