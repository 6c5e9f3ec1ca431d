"""The settings of a server, each declared once; the flags of `nova serve` follow from them."""

import os
from dataclasses import dataclass
from pathlib import Path

from nova_video.common.option_fields import check_options, option


def own_folder() -> Path:
    """The folder of the server's database and results where nobody names one."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "nova-video" / "serve"


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Where a server listens, where it keeps its jobs, and the bounds that it sets."""

    host: str = option(
        "127.0.0.1", "Address to listen on; 0.0.0.0 is every network this machine is in.", metavar="ADDRESS"
    )
    port: int = option(8000, "Port to listen on; 0 takes a free one.", low=0, high=65535, metavar="N")
    folder: str | None = option(
        None,
        "Folder, or fsspec URL, of results and saved states.",
        unset="~/.local/state/nova-video/serve",
        metavar="FOLDER",
    )
    database: str | None = option(
        None,
        "SQLAlchemy URL of the database of jobs.",
        unset="SQLite in the folder, if that is on this machine",
        metavar="URL",
    )
    keep_days: float = option(
        7.0, "Results are removed after so many days.", low=0, above=True, high=3650, metavar="DAYS"
    )
    queue: int = option(100, "Jobs that may wait; more are answered 429.", low=1, high=100_000, metavar="N")
    queue_per_key: int = option(50, "Jobs of one API key that may wait or run.", low=1, high=100_000, metavar="N")
    deadline: float = option(
        3600.0, "A job that has not ended after so many seconds fails.", low=1, high=864_000, metavar="SECONDS"
    )
    batch: int | None = option(
        None,
        "Jobs of the same shape and settings that are computed together.",
        low=1,
        high=64,
        unset="4 on a GPU, else 1",
        metavar="N",
    )
    api_key: str | None = option(None, "A file with one API key a line; requests need one of them.", metavar="FILE")
    cors: str | None = option(
        None, "Origins whose pages may call this server, separated by commas.", unset="none", metavar="ORIGINS"
    )
    body_mb: float = option(64.0, "Largest request body, in 10^6 bytes.", low=0, above=True, high=10_000, metavar="MB")
    max_pixels: int = option(
        2_097_152, "Most pixels of a frame, asked for or uploaded.", low=1, high=100_000_000, metavar="N"
    )
    max_frames: int = option(1200, "Most frames of a clip, asked for or uploaded.", low=1, high=1_000_000, metavar="N")
    max_session: float = option(
        3600.0,
        "A live session without end stops after so many seconds of video.",
        low=1,
        high=864_000,
        metavar="SECONDS",
    )
    lead: float = option(
        2.0,
        "A live session without end is made at most so many seconds ahead of what its viewers have played.",
        low=0.1,
        high=3600,
        metavar="SECONDS",
    )
    patience: float = option(
        20.0,
        "A client that sends nothing for so many seconds in the middle of a request is answered 408.",
        low=0,
        above=True,
        high=3600,
        metavar="SECONDS",
    )
    connections: int = option(1000, "Connections at a time; more are answered 503.", low=1, high=100_000, metavar="N")
    hosts: str | None = option(
        None,
        "Names that requests may call this server by, separated by commas; others are answered 403.",
        unset="all, or on a loopback address this machine's own",
        metavar="NAMES",
    )
    grace: float = option(
        30.0,
        "At its end, the server waits so many seconds for running jobs to be saved.",
        low=0,
        high=3600,
        metavar="SECONDS",
    )
    warm: bool = option(False, "Compile and sample once before the server says that it is ready.")
    log_json: bool = option(False, "Write the log as JSON objects, one a line.")
    log_prompts: bool = option(False, "Write prompts into the log.")

    def __post_init__(self) -> None:
        check_options(self)
