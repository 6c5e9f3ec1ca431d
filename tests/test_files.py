"""Places of files: names that two processes do not share, locks that end with their process, errors with a name."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nova_video.common.errors import InputError
from nova_video.io.files import atomic_path, lock_file, name_errors, reserve_name


@contextmanager
def another_process(program: str, path: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process that has entered `program`, and stays there until its input ends."""
    program = f"import sys, pathlib\nfrom nova_video.io.files import *\npath = pathlib.Path(sys.argv[1])\n{program}:\n"
    command = [sys.executable, "-c", f"{program}    print('there', flush=True); sys.stdin.read()", str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        yield process


def test_a_reserved_name_is_taken_once(tmp_path: Path) -> None:
    path = tmp_path / "whale.png"
    with reserve_name(path) as first, reserve_name(path) as second:
        assert (first, second) == (True, False)
    assert not path.exists()
    with pytest.raises(KeyboardInterrupt), reserve_name(path):
        raise KeyboardInterrupt
    assert not path.exists()
    with reserve_name(path), atomic_path(path) as part:
        part.write_text("whale")
    assert path.read_text() == "whale"
    with reserve_name(path) as free:
        assert not free
    assert path.read_text() == "whale"


def test_a_name_that_a_killed_process_left_is_free(tmp_path: Path) -> None:
    path = tmp_path / "whale.png"
    with another_process("with reserve_name(path)", path) as process:
        with reserve_name(path) as free:
            assert not free
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert path.exists()
        with reserve_name(path) as free:
            assert free
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_another_process_writes(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    with another_process("with lock_file(path)", path) as process:
        with (
            pytest.raises(InputError, match=r"clip.mp4 is being written by another process: expected another file"),
            lock_file(path),
        ):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        with lock_file(path), lock_file(tmp_path / "other.mp4"):
            pass
    assert list(tmp_path.iterdir()) == []


def test_errors_name_the_file_that_is_written(tmp_path: Path) -> None:
    path, part = tmp_path / "whale.png", tmp_path / ".part"
    for filename in (None, str(part)):
        with pytest.raises(OSError, match="No space left") as caught, name_errors(path, part):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), filename)
        assert caught.value.filename == str(path)
    with pytest.raises(OSError, match="gone") as caught, name_errors(path, part):
        raise OSError(errno.ENOENT, "gone", "another")
    assert caught.value.filename == "another"
    with pytest.raises(FileNotFoundError) as caught, atomic_path(tmp_path / "gone" / "whale.png") as part:
        part.write_text("whale")
    assert caught.value.filename == str(tmp_path / "gone" / "whale.png")
