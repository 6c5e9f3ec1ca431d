"""Writing to the file system: whole files or none, locks against other processes, and errors that name the file."""

import errno
import hashlib
import logging
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nova_video.common.errors import InputError

HASH_DIGITS = 16  # digits of the SHA-256 of a file

log = logging.getLogger(__name__)


def make_readable(path: Path) -> None:
    """Give a file the mode that the umask asks for: safetensors makes its own for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


@contextmanager
def name_errors(path: Path, *others: Path) -> Iterator[None]:
    """System errors while `path` is written name it, also where they name nothing or one of `others`."""
    try:
        yield
    except OSError as error:
        name = error.filename
        if error.errno is None or (name is not None and Path(os.fsdecode(name)) not in (path, *others)):
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


def file_mark(path: Path) -> str:
    """A mark of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:HASH_DIGITS]


def check_writable(folder: Path) -> None:
    """Raises for a folder that no file can be made in. It makes one to find out."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"cannot write to {folder}: the folder is not writable ({error.strerror})") from error


def make_folder(folder: Path) -> None:
    """Make a folder, or raise InputError if it could not be written to later."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}; expected a folder") from error
    check_writable(folder)


def name_beside(path: Path, ending: str = "part") -> Path:
    """A new hidden name in the same folder, for a file that will replace `path` or keep its content."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.{ending}")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; renamed to it when the block ends well, removed when it does not."""
    temporary = name_beside(path)
    try:
        with name_errors(path, temporary):
            yield temporary
            make_readable(temporary)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Makes the folder if need be and locks it: raises if another process has the lock.

    The lock ends with the process, however that ends, and processes that it starts do not inherit it.
    """
    import fcntl  # not on Windows, where clips can be made and neither encoding nor training is at home

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise InputError(f"{folder}: another process is writing there: expected it to end first") from None
            log.warning("%s: whether another process writes there cannot be told: %s", folder, error.strerror)
        yield


@contextmanager
def reserve_name(path: Path, is_folder: bool = False) -> Iterator[bool]:
    """Reserves a free name by an empty file or folder; yields False where the name is taken.

    The empty file is removed at the end, unless it was replaced or written to. An empty file that a killed process left
    counts as free.
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
        with name_errors(path):
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
def lock_file(path: Path) -> Iterator[None]:
    """Locks a file that is written over some time: raises if another process has the lock."""
    lock = path.with_name(f".{path.name[:100]}.lock")
    while True:
        with name_errors(path, lock):
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
