"""Places of files that are written: names reserved against other processes, locks, and errors that name the file."""

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nova_video.common.errors import InputError

log = logging.getLogger(__name__)


def make_readable(path: Path) -> None:
    """Give a file the mode that the umask asks for: safetensors makes its own for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


@contextmanager
def naming(path: Path, *others: Path) -> Iterator[None]:
    """Errors of the system while `path` is written name it: they name none, or one of `others`, which stand for it."""
    try:
        yield
    except OSError as error:
        name = error.filename
        if error.errno is None or (name is not None and Path(os.fsdecode(name)) not in (path, *others)):
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


@contextmanager
def reserved(path: Path, is_folder: bool = False) -> Iterator[bool]:
    """Holds a name that no file has yet by an empty file or folder; False where the name is taken.

    It is removed if nothing has replaced it or been written to it. An empty file that a killed process left is taken.
    """
    if is_folder:
        try:
            path.mkdir()
        except FileExistsError:
            yield False
            return
        try:
            yield True
        finally:
            with suppress(OSError):
                path.rmdir()  # not if there is something in it
        return
    descriptor = _reserve(path)
    if descriptor is None:
        yield False
        return
    made = os.fstat(descriptor)
    if os.name == "nt":  # no open file can be replaced there
        os.close(descriptor)
    try:
        yield True
    finally:
        with suppress(OSError):
            if os.path.samestat(path.stat(), made) and path.stat().st_size == 0:
                path.unlink()
        if os.name != "nt":
            os.close(descriptor)


def _reserve(path: Path) -> int | None:
    """An open and locked empty file of that name, if no other process has it."""
    try:
        with naming(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        try:
            if not path.is_file() or path.stat().st_size:
                return None
            descriptor = os.open(path, os.O_RDWR)
        except OSError:
            return None
    if _lock(descriptor) and _is_same(path, descriptor) and os.fstat(descriptor).st_size == 0:
        return descriptor
    os.close(descriptor)
    return None


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Writes a file over some time without another process that does so too: raises if there is one."""
    lock = path.with_name(f".{path.name[:100]}.lock")
    while True:
        with naming(path, lock):
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        if not _lock(descriptor):
            os.close(descriptor)
            raise InputError(f"{path} is being written by another process: expected another file, or that one's end")
        if _is_same(lock, descriptor):
            break
        os.close(descriptor)  # the process that had it has just removed it
    try:
        yield
    finally:
        with suppress(OSError):
            lock.unlink()
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Lock an open file until it is closed; False where another process has locked it."""
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        log.warning("no lock can be had here (%s): another process may write the same file", error.strerror)
    return True


def _is_same(path: Path, descriptor: int) -> bool:
    """True if the path still leads to the open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except OSError:
        return False
