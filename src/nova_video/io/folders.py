"""Walking through local folders that may hold anything."""

import errno
import os
import stat
from collections.abc import Iterator

A_FOLDER = "is a folder: expected a file"
NO_FILE = "is a pipe, a socket or a device: expected a file"
DEAD_LINK = "is a link that leads nowhere: expected a file"


def walk(root: str) -> Iterator[tuple[str, str | None]]:
    """Paths below a folder, each with the reason why it cannot be read as a file, if there is one.

    Links are followed, and a folder is entered once, whatever leads to it. Nothing is opened but folders, so that a
    pipe does not stop the walk.
    """
    waiting, seen = [""], set()
    while waiting:
        folder = waiting.pop()
        try:
            status = os.stat(os.path.join(root, folder))
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(os.path.join(root, folder)) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            yield folder or ".", f"is a folder that cannot be read ({error.strerror}): expected one that can"
            continue
        below = []
        for entry in found:
            path = os.path.join(folder, entry.name)
            problem = _problem(entry)
            if problem == A_FOLDER:
                below.append(path)
            yield path, problem
        waiting += reversed(below)


def _problem(entry: "os.DirEntry[str]") -> str | None:
    """Why an entry cannot be read as a file; whether it may be read is found out when it is."""
    try:
        if entry.is_file():
            return None
        if entry.is_dir():
            return A_FOLDER
        mode = entry.stat().st_mode
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            return DEAD_LINK
        return f"cannot be read ({error.strerror}): expected a file"
    return None if stat.S_ISREG(mode) else NO_FILE
