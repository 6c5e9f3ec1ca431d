"""Checks names and docstrings for plain English: `python tools/plain_english.py` (a part of `make check`).

CONTRIBUTING.md states the rules. `plain_english.json` records how many offences each module still has; a module may
not gain one. `--record` lowers the recorded counts after some were mended, or follows modules that moved.
"""

import ast
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("src", "tools", "examples", "integrations")
RECORD = Path(__file__).with_suffix(".json")
MOST_WORDS = 20
OPENING = re.compile(r"(Of|What|Whether|The same|As|That|Those)\b")
IRREGULAR = re.compile(
    r"asked|begun|broken|built|chosen|come|done|drawn|fallen|felt|found|given|gone|heard|held|hidden|kept|known|laid|left"
    r"|lost|made|meant|met|said|seen|sent|shown|spent|spoken|taken|told|thrown|unsaid|written"
)
NOT_PARTICIPLES = {
    "embed": "a verb",
    "opening": "a noun: the first word of a sentence",
    "seed": "a noun",
    "speed": "a noun",
    "need": "a verb",
    "feed": "a verb",
    "string": "a noun",
    "ring": "a noun",
    "swing": "a noun and a verb",
    "thing": "a noun",
    "bring": "a verb",
    "embedding": "a noun: the vector of a token",
    "padding": "a noun: the filled places",
    "masking": "a noun: the method",
    "sampling": "a noun: the method",
    "training": "a noun: the method",
    "timing": "a noun: a measured duration",
    "rounding": "a noun: the size of an error",
    "tiling": "a noun: the method",
    "streaming": "a noun: the method",
    "setting": "a noun: one option",
    "recording": "a noun: one recorded graph",
    "terminated": "an exception's name states what happened",
    "rejected": "an exception's name states what happened",
}


@dataclass(frozen=True)
class Offence:
    path: str
    line: int
    rule: str
    text: str


def main(arguments: list[str]) -> int:
    offences = find_offences(ROOT)
    counts = count(offences)
    recorded: dict[str, dict[str, int]] = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    if arguments == ["--record"]:
        before, after = totals(recorded), totals(counts)
        grown = [rule for rule, number in after.items() if recorded and number > before[rule]]
        if grown:
            print(f"the number of offences grew: {', '.join(grown)}; mend them instead", file=sys.stderr)
            return 1
        lines = [f"{json.dumps(path)}: {json.dumps(rules, sort_keys=True)}" for path, rules in sorted(counts.items())]
        RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        return 0
    if arguments == ["--list"]:
        for offence in offences:
            print(f"{offence.path}:{offence.line}: {offence.rule}: {offence.text}")
        return 0
    return compare(offences, counts, recorded)


def compare(offences: list[Offence], counts: dict[str, dict[str, int]], recorded: dict[str, dict[str, int]]) -> int:
    """1 if a module has more offences than recorded, with each of its offences on a line; else 0."""
    code = 0
    for path, rules in sorted(counts.items()):
        for rule, number in rules.items():
            allowed = recorded.get(path, {}).get(rule, 0)
            if number > allowed:
                code = 1
                for offence in offences:
                    if (offence.path, offence.rule) == (path, rule):
                        print(f"{path}:{offence.line}: {rule}: {offence.text}")
                print(f"{path} has {number} of these: expected at most {allowed}")
    mended = sum(totals(recorded).values()) - sum(totals(counts).values())
    if code == 0 and mended > 0:
        print(f"{mended} offences fewer than recorded: lower the record by `python tools/plain_english.py --record`")
    return code


def count(offences: list[Offence]) -> dict[str, dict[str, int]]:
    """Number of offences by path and rule."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for offence in offences:
        found[offence.path][offence.rule] += 1
    return {path: dict(rules) for path, rules in found.items()}


def totals(counts: dict[str, dict[str, int]]) -> Counter[str]:
    """Number of offences by rule, over all modules."""
    total: Counter[str] = Counter()
    for rules in counts.values():
        total.update(rules)
    return total


def find_offences(root: Path) -> list[Offence]:
    """Every offence below `root`, in the order of the files."""
    found: list[Offence] = []
    classes: dict[str, list[tuple[str, int]]] = defaultdict(list)
    files: dict[str, list[str]] = defaultdict(list)
    for path in sorted(path for folder in FOLDERS for path in (root / folder).rglob("*.py")):
        name = path.relative_to(root).as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found += [Offence(name, line, rule, text) for line, rule, text in (*docstrings(tree), *names(tree))]
        if path.is_relative_to(root / "src"):
            if not path.stem.startswith("__"):
                files[path.name].append(name)
            for node in tree.body:
                if isinstance(node, ast.ClassDef):
                    classes[node.name].append((name, node.lineno))
    for shared, places in classes.items():
        if len(places) > 1:
            found += [Offence(path, line, "class name is not unique", shared) for path, line in places]
    for shared, paths in files.items():
        if len(paths) > 1:
            found += [Offence(path, 1, "file name is not unique", shared) for path in paths]
    return sorted(found, key=lambda offence: (offence.path, offence.line))


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str, str]]:
    """(line, rule, text) of every docstring, fields' included, that is too long or opens without a subject."""
    for line, text in _every_docstring(tree):
        first = first_sentence(text)
        if count_words(first) > MOST_WORDS:
            yield line, f"first sentence has more than {MOST_WORDS} words", first
        if OPENING.match(text):
            yield line, "docstring opens without a subject", first


def first_sentence(text: str) -> str:
    """The text up to the first full stop or empty line, on one line."""
    paragraph = " ".join(text.strip().split("\n\n")[0].split())
    return re.split(r"(?<=[.?!])\s", paragraph, maxsplit=1)[0]


def count_words(sentence: str) -> int:
    """Number of words; shapes and other remarks in brackets do not count, nor do signs and numbers."""
    plain = re.sub(r"\([^()]*\)|\[[^][]*\]", " ", sentence)
    return sum(any(letter.isalpha() for letter in word) for word in plain.split())


def _every_docstring(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            for before, statement in zip([None, *node.body], node.body, strict=False):
                field = isinstance(node, ast.ClassDef | ast.Module) and isinstance(before, ast.AnnAssign | ast.Assign)
                if (before is None or field) and isinstance(statement, ast.Expr):
                    value = statement.value
                    if isinstance(value, ast.Constant) and isinstance(value.value, str):
                        yield statement.lineno, value.value


def names(tree: ast.Module) -> Iterator[tuple[int, str, str]]:
    """(line, rule, name) of every function, class and variable of the module whose name is one participle."""
    for node in tree.body:
        found: list[str] = []
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found = [node.name]
        elif isinstance(node, ast.Assign):
            found = [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found = [node.target.id]
        for name in found:
            if is_participle(name):
                yield node.lineno, "name is a participle", name


def is_participle(name: str) -> bool:
    """True for `shown`, `_Loaded` and `KEPT`; false for `shown_rows`, `LoadedModel` and `embed`."""
    word = name.strip("_")
    if "_" in word or (not word.isupper() and re.search(r"[a-z][A-Z]", word)):
        return False
    word = word.lower()
    return word not in NOT_PARTICIPLES and bool(
        IRREGULAR.fullmatch(word) or (len(word) > 4 and word.endswith(("ed", "ing")))
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
