"""Prints what the changelog says about one version: `python tools/release_notes.py 0.1.0`."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def package_version(root: Path = ROOT) -> str:
    """The version that the package states."""
    text = (root / "src" / "nova_video" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.+)"$', text, re.M)
    assert found is not None
    return found[1]


def release_notes(changelog: str, version: str) -> str:
    """The section of the changelog about `version`, without its title.

    Raises a ValueError if there is no such section or it is empty.
    """
    found = re.search(
        rf"^## \[?{re.escape(version)}(?:\]| |$)[^\n]*\n(.*?)(?=^## |^\[[^\]]+\]: |\Z)", changelog, re.M | re.S
    )
    if found is None or not found[1].strip():
        raise ValueError(f"CHANGELOG.md has nothing about {version}: expected a section '## [{version}] - YYYY-MM-DD'")
    return found[1].strip() + "\n"


def main(version: str) -> None:
    if version != package_version():
        sys.exit(f"the version is {version}: expected {package_version()}, as src/nova_video/__init__.py states")
    try:
        print(release_notes((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), version), end="")
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(sys.argv[1])
