"""The folder of results: a folder for each job, on this machine or at any fsspec URL.

A file appears whole or not at all. A local folder is used directly; a remote one through temporary files.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem

from nova_video.common.errors import InputError, first_line
from nova_video.io.files import atomic_path, make_folder

STATE = "state.safetensors"
INIT = "live/init.mp4"
VIDEO = "video.mp4"
THUMBNAIL = "thumbnail.webp"
SPRITESHEET = "spritesheet.webp"


def fragment_name(number: int) -> str:
    return f"live/{number:06d}.m4s"


def image_name(number: int) -> str:
    return f"image-{number}.png"


def partial_name(number: int, image: int) -> str:
    """The name of a canvas on the way: number `number` of those that were asked for, of image `image`."""
    return f"partial-{number}-{image}.png"


class ResultFolder:
    """The files of all jobs, by the job's id and their name. Its methods may be called from any thread."""

    def __init__(self, url: str) -> None:
        """Opens a folder, and makes it if there is none. InputError if nothing can be written there."""
        try:
            self.system, root = fsspec.core.url_to_fs(url)
            self.local = Path(root) if isinstance(self.system, LocalFileSystem) else None
            """The folder, if it is on this machine."""
            if self.local is not None:
                make_folder(self.local)
            else:
                self.system.makedirs(root, exist_ok=True)
        except InputError:
            raise
        except Exception as error:  # every file system has its own
            raise InputError(
                f"folder is {url!r}: expected a folder or a URL that fsspec opens ({first_line(error)})"
            ) from None
        self.root = root.rstrip("/")

    def place(self, id: str, name: str = "") -> str:
        """The path of a file, or of a job's folder, within the file system."""
        return f"{self.root}/{id}/{name}" if name else f"{self.root}/{id}"

    # Writing ----------------------------------------------------------------------------------------------------------

    def write(self, id: str, name: str, data: bytes) -> None:
        with self.writing(id, name) as path:
            path.write_bytes(data)

    @contextmanager
    def writing(self, id: str, name: str) -> Iterator[Path]:
        """A path to write a file to, which is in its place when the block ends well."""
        if self.local is not None:
            place = self.local / id / name
            place.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(place) as path:
                yield path
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / Path(name).name
            yield path
            self.system.makedirs(self.place(id, name).rpartition("/")[0], exist_ok=True)
            self.system.put_file(str(path), self.place(id, name))

    def remove(self, id: str, *names: str) -> None:
        """Removes these files of a job, or without names all of them. Those that are not there are no error."""
        if not names and self.local is not None:
            shutil.rmtree(self.local / id, ignore_errors=True)
            return
        for place in [self.place(id, name) for name in names] or [self.place(id)]:
            with suppress(FileNotFoundError):
                self.system.rm(place, recursive=not names)

    # Reading ----------------------------------------------------------------------------------------------------------

    def read(self, id: str, name: str) -> bytes:
        """The bytes of a file. FileNotFoundError if there is none."""
        data: bytes = self.system.cat_file(self.place(id, name))
        return data

    def open(self, id: str, name: str) -> BinaryIO:
        """A file to read in parts. FileNotFoundError if there is none."""
        file: BinaryIO = self.system.open(self.place(id, name), "rb")
        return file

    def size(self, id: str, name: str) -> int | None:
        """The bytes of a file; None: there is none."""
        try:
            facts: dict[str, Any] = self.system.info(self.place(id, name))
        except FileNotFoundError:
            return None
        return int(facts["size"])

    def has(self, id: str, name: str) -> bool:
        return bool(self.system.exists(self.place(id, name)))

    @contextmanager
    def reading(self, id: str, *names: str) -> Iterator[list[Path]]:
        """Local paths of files while the block runs."""
        if self.local is not None:
            yield [self.local / id / name for name in names]
            return
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder) / Path(name).name for name in names]
            for path, name in zip(paths, names, strict=True):
                self.system.get_file(self.place(id, name), str(path))
            yield paths

    def ids(self) -> list[str]:
        """The jobs that have a folder."""
        entries = self.system.ls(self.root, detail=True, refresh=True)
        return [entry["name"].rstrip("/").rpartition("/")[2] for entry in entries if entry["type"] == "directory"]
