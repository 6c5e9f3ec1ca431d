"""The scripts that commits and releases go through."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import commit_subject  # noqa: E402
import release_notes  # noqa: E402

CHANGELOG = """# Changelog

## [Unreleased]

## [0.2.0] - 2027-01-02

### Added

- One thing.

## [0.1.0] - 2026-11-30

- The first.
"""


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        ("Refuse a folder that is not there", None),
        ("Pass over cover pictures\n\nThey are no frames.\n", None),
        ("Add " + 69 * "x", "has 73 letters"),
        ("Added a test", "open with a verb"),
        ("add a test", "open with a verb"),
        ("Adds a test", "open with a verb"),
        ("Add a test.", "full stop"),
        ("Add a test\nof something", "second line"),
    ],
)
def test_subjects_of_commits(message: str, fault: str | None) -> None:
    found = commit_subject.fault(message)
    assert found is None if fault is None else fault in (found or "")


def test_notes_are_one_section_of_the_changelog() -> None:
    assert release_notes.release_notes(CHANGELOG, "0.2.0") == "### Added\n\n- One thing.\n"
    assert release_notes.release_notes(CHANGELOG, "0.1.0") == "- The first.\n"
    for version in ("Unreleased", "0.1", "0.3.0"):
        with pytest.raises(ValueError, match=f"nothing about {re.escape(version)}"):
            release_notes.release_notes(CHANGELOG, version)


def test_this_version_is_in_the_changelog_and_the_citation() -> None:
    version = release_notes.package_version()
    assert release_notes.release_notes((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), version)
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_workflows_run_targets_that_the_makefile_has() -> None:
    """Steps run `make`, and little else, so that whoever develops can run the same."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    files = [*(ROOT / ".github" / "workflows").glob("*.yml"), ROOT / ".pre-commit-config.yaml", ROOT / ".ci" / "run"]
    called = set()
    for file in files:
        for line in re.findall(r"(?:run: |entry: |^)make ([^\n#]+)", file.read_text(encoding="utf-8"), re.M):
            called |= {word for word in line.split() if re.fullmatch("[a-z-]+", word)}
    assert {"check", "test", "test-slow", "docs", "build", "check-wheel", "release-notes"} <= called <= targets
