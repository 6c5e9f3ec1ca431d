"""Checks the subject of a commit message: `python3 tools/commit_subject.py FILE` (a hook of pre-commit)."""

import re
import sys
from pathlib import Path

MOST_LETTERS = 72
VERBS = {"Bring", "Embed", "Feed", "Focus", "Seed", "Speed"}  # they look like other forms of a verb


def fault(message: str) -> str | None:
    """The first rule of CONTRIBUTING.md that the subject breaks; None if it breaks none."""
    lines = [line for line in message.splitlines() if not line.startswith("#")]
    subject = lines[0] if lines else ""
    if subject.startswith(("fixup! ", "squash! ", "Merge ", "Revert ")):
        return None
    if len(subject) > MOST_LETTERS:
        return f"the subject has {len(subject)} letters: expected at most {MOST_LETTERS}"
    first = subject.split(" ")[0]
    if not re.fullmatch("[A-Z][a-z-]+", first) or (first not in VERBS and re.search("(ed|ing|[^s]s)$", first)):
        return "the subject does not open with a verb: expected one such as Add, Refuse or Measure"
    if subject.endswith("."):
        return "the subject ends with a full stop: expected none"
    if len(lines) > 1 and lines[1]:
        return "the second line is not empty: expected an empty line behind the subject"
    return None


if __name__ == "__main__":
    found = fault(Path(sys.argv[1]).read_text(encoding="utf-8"))
    sys.exit(found)
