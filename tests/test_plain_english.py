"""The check of names and docstrings finds each kind of offence, and the package has no more than recorded."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import plain_english  # noqa: E402

MODULE = '''"""Of a module."""
KEPT = 1
shown_rows = 2

def _loaded(): "Whether it is loaded."

class LoadedModel:
    size: int
    """What it holds."""
    width: int
    """Columns of the model."""

def long_one():
    """This sentence has one word more than the twenty words that the rule allows for the first sentence of a docstring.

    The second one may be as long as it likes."""
'''


def test_each_offence_is_found() -> None:
    tree = ast.parse(MODULE)
    found = [(line, rule.split()[0]) for line, rule, _ in (*plain_english.docstrings(tree), *plain_english.names(tree))]
    assert sorted(found) == [
        (1, "docstring"),
        (2, "name"),
        (5, "docstring"),
        (5, "name"),
        (9, "docstring"),
        (14, "first"),
    ]


@pytest.mark.parametrize("name", ["shown", "_Told", "KEPT", "writing"])
def test_a_participle_alone_is_no_name(name: str) -> None:
    assert plain_english.is_participle(name)
    assert not plain_english.is_participle(f"{name}_rows")


@pytest.mark.parametrize("name", ["Plan", "embed", "TextEmbed", "training", "seed"])
def test_nouns_and_verbs_are_names(name: str) -> None:
    assert not plain_english.is_participle(name)


def test_names_are_unique(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / "src" / folder).mkdir(parents=True)
        (tmp_path / "src" / folder / "card.py").write_text("class Row: ...\n")
        (tmp_path / "src" / folder / "__init__.py").touch()
    rules = [offence.rule for offence in plain_english.find_offences(tmp_path)]
    assert sorted(rules) == 2 * ["class name is not unique"] + 2 * ["file name is not unique"]


def test_a_module_may_not_gain_an_offence(capsys: pytest.CaptureFixture[str]) -> None:
    offences = [plain_english.Offence("src/a.py", line, "name is a participle", "shown") for line in (3, 7)]
    counts = plain_english.count(offences)
    assert plain_english.compare(offences, counts, counts) == 0
    assert plain_english.compare(offences, counts, {"src/a.py": {"name is a participle": 1}}) == 1
    assert "src/a.py:7: name is a participle: shown" in capsys.readouterr().out
    assert plain_english.compare(offences[:1], plain_english.count(offences[:1]), counts) == 0
    assert "1 offences fewer than recorded" in capsys.readouterr().out
