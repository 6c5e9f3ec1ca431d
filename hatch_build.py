"""Writes the commit into wheels and source archives, where `nova --version` reads it."""

import subprocess
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

COMMIT_FILE = "nova_video/_commit.txt"


class CommitHook(BuildHookInterface[Any]):
    """Adds a file with the commit, without writing it into the checkout."""

    PLUGIN_NAME = "commit"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = Path(self.root)
        if version == "editable" or not (root / ".git").exists():
            return  # a checkout asks git itself; a source archive carries the file already
        command = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=7"]
        commit = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
        written = Path(self.directory) / "commit.txt"
        written.parent.mkdir(parents=True, exist_ok=True)
        written.write_text(commit, encoding="utf-8")
        place = COMMIT_FILE if self.target_name == "wheel" else f"src/{COMMIT_FILE}"
        build_data["force_include"][str(written)] = place

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        (Path(self.directory) / "commit.txt").unlink(missing_ok=True)
