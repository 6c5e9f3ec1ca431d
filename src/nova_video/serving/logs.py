"""The log of a server: one line an event, as text or JSON, with the id of its request.

Prompts are written only when asked.
"""

import contextvars
import json
import logging
import time
from typing import Any

from nova_video.io.text import printable
from nova_video.serving.serve_settings import ServeSettings

REQUEST_ID: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="")
"""The id of the request that is worked on."""
PRIVATE = ("prompt", "negative_prompt")
"""Facts that are written only if `ServeSettings.log_prompts` asks."""

log = logging.getLogger("nova_video.serving")


def log_event(event: str, level: int = logging.INFO, **facts: Any) -> None:
    """Writes one line about an event; facts that are None are left out."""
    told = {name: value for name, value in facts.items() if value is not None}
    log.log(level, event, extra={"facts": told, "request_id": told.pop("request_id", REQUEST_ID.get())})


class LineFormatter(logging.Formatter):
    """Makes one line of a record, with nothing in it that a terminal or a reader of lines would obey."""

    def __init__(self, as_json: bool, prompts: bool) -> None:
        super().__init__()
        self.as_json = as_json
        self.prompts = prompts

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        facts = {"time": moment, "level": record.levelname.lower(), "event": record.getMessage()}
        request_id = getattr(record, "request_id", REQUEST_ID.get())
        if request_id:
            facts["request_id"] = request_id
        given: dict[str, Any] = getattr(record, "facts", {})
        facts |= {name: value for name, value in given.items() if self.prompts or name not in PRIVATE}
        if record.exc_info:
            facts["error"] = self.formatException(record.exc_info)
        if self.as_json:
            return json.dumps(facts, default=str)
        first = " ".join(printable(str(facts.pop(name))) for name in ("time", "level", "event"))
        return " ".join([first, *(f"{name}={_plain(value)}" for name, value in facts.items())])


def _plain(value: object) -> str:
    """A value as one word, quoted if it has spaces."""
    text = printable(f"{value:.6g}" if isinstance(value, float) else str(value))
    return json.dumps(text, ensure_ascii=False) if not text or any(letter in text for letter in ' "=') else text


def write_lines(settings: ServeSettings) -> None:
    """Lets this process write its log in the form that the settings ask for."""
    for handler in logging.getLogger().handlers:
        handler.setFormatter(LineFormatter(settings.log_json, settings.log_prompts))
