"""The commit of this code. A build writes it into the wheel; in a checkout git is asked."""

import subprocess
from pathlib import Path

import nova_video

PACKAGE = Path(nova_video.__file__).parent
COMMIT_FILE = "_commit.txt"  # hatch_build.py puts it into wheels and source archives


def commit() -> str | None:
    """Abbreviated commit of this code, with "-dirty" behind it if files were changed; None if it cannot be known."""
    written = PACKAGE / COMMIT_FILE
    if written.is_file():
        return written.read_text(encoding="utf-8").strip() or None
    checkout = PACKAGE.parents[1]
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=7"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
