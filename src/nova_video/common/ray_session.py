"""Connects to the Ray at an address, or starts one for the time of the work.

A Ray that is started here listens on this machine alone, and leaves nothing behind.
"""

import functools
import logging
import os
import re
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from nova_video.common.errors import InputError, first_line
from nova_video.common.extras import install_command

LOCAL = "local"  # the address of a Ray that is started for the work
LEAST_CORES = 2
ENVIRONMENT = {  # of a Ray that is started here
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # its word for: this machine alone, so listen on the loopback device
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_worker_niceness": "0",  # else its workers give way to everything else on the machine
}
QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
PATIENCE = 10.0  # seconds until a cluster answers
LONGEST_FOLDER = 40  # letters: Ray's sockets lie deep in its folder, and their paths may not be long


@dataclass(frozen=True)
class RayNeed:
    """The work that needs a Ray, its extra, and what can be done instead: all for messages."""

    work: str
    extra: str
    instead: str
    least_cores: int = LEAST_CORES
    """Cores that a Ray started here has at least."""
    tells: bool = False
    """The lines that its processes write are shown."""


@contextmanager
def ray_session(address: str, need: RayNeed) -> Iterator[None]:
    """Connected to a Ray: the one at the address, or one of our own. One that this process uses already is taken."""
    environment = {name: value for name, value in ENVIRONMENT.items() if address == LOCAL and name not in os.environ}
    os.environ.update(environment)
    if address == LOCAL and not any(name.startswith("RAY_AUTH_") for name in os.environ):
        os.environ["RAY_AUTH_TOKEN"] = _token()
    folder = tempfile.mkdtemp(prefix="nova-ray-")
    started = False
    try:
        try:
            import ray
        except ImportError as error:
            raise InputError(
                f"{need.work} on Ray needs ray: {install_command(need.extra)}, or {need.instead}"
            ) from error
        if not ray.is_initialized():
            started = True
            if address == LOCAL:
                _start_ray(folder, need)
            else:
                _join_ray(address)
        yield
    finally:
        if started:
            ray.shutdown()
        for name in environment:
            os.environ.pop(name, None)
        shutil.rmtree(folder, ignore_errors=True)


@functools.cache
def _token() -> str:
    """The token of the Ray instance that this process starts.

    Without one, Ray would write a token to the user's home. Ray reads it once, so the process keeps one token.
    """
    return secrets.token_hex(32)


def _start_ray(folder: str, need: RayNeed) -> None:
    """A Ray of our own, with its files in the folder."""
    import ray

    options: dict[str, Any] = {"include_dashboard": False, **QUIET, "log_to_driver": need.tells}
    if len(folder) <= LONGEST_FOLDER:
        options["_temp_dir"] = folder
    try:
        ray.init("local", **options)
        if ray.cluster_resources().get("CPU", 0) < need.least_cores:
            ray.shutdown()
            ray.init("local", num_cpus=need.least_cores, **options)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise InputError(
            f"no Ray could be started here: {_say(error)}: expected {need.instead}, or --ray ADDRESS"
        ) from error


def _join_ray(address: str) -> None:
    import ray

    _knock(address)
    try:
        ray.init(address, **QUIET)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise InputError(f"there is no Ray at {address}: {_say(error)}") from error


def _knock(address: str) -> None:
    """Raises where nobody answers, which Ray takes minutes to say."""
    match = re.fullmatch(r"(?:ray://)?(.+):(\d+)", address)
    if match is None:
        if address == "auto":
            return
        raise InputError(f"the address of Ray is {address!r}: expected HOST:PORT")
    try:
        socket.create_connection((match[1].strip("[]"), int(match[2])), timeout=PATIENCE).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"there is no Ray at {address}: {_say(error)}") from None


def _say(error: BaseException) -> str:
    """The class of an error and what it says, in one line."""
    name, text = type(error).__name__, first_line(error)
    return name if text == name else f"{name}: {text}"
