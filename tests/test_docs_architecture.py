"""The drawing of the packages and the page about them follow the code."""

import re
import sys
from pathlib import Path

import nova_video

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))

from drawing import packages  # noqa: E402

PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks" / "README.md"]
PATH = re.compile(r"`((?:src|docs|tests|tools|recipes|benchmarks|examples)/[\w./-]+|\w+/[\w/-]+\.py)`")


def test_the_drawing_is_that_of_the_imports() -> None:
    drawn = (ROOT / "docs" / "images" / "packages.svg").read_text(encoding="utf-8")
    assert drawn == packages.draw_packages(), "run `make drawing`"


def test_every_package_has_its_place_and_its_line() -> None:
    folders = {path.parent.name for path in (ROOT / "src" / "nova_video").glob("*/__init__.py")}
    assert {*packages.PLACES} == {*packages.package_imports()} == folders | {"nova_worlds"}
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| \[`(\w+)`\]", page, re.M)) == {*packages.PLACES}


def test_an_arrow_stands_for_an_import(tmp_path: Path) -> None:
    for name, text in {
        "cli": "from nova_video.io.media import read\ndef run():\n    import nova_video.common.errors",
        "io": "from nova_video.common import errors",
        "common": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import nova_video.cli",
    }.items():
        (tmp_path / "nova_video" / name).mkdir(parents=True)
        (tmp_path / "nova_video" / name / "part.py").write_text(text)
    imports = packages.package_imports(tmp_path)
    assert imports == {"cli": {"io", "common"}, "io": {"common"}, "common": set()}
    assert packages.arrows(imports) == [("cli", "io"), ("io", "common")]
    assert packages.arrows({"cli": set(), "common": {"cli"}}) == [("common", "cli")]  # against the order


def test_paths_on_the_pages_exist() -> None:
    """A path in backticks is one of the repository, or one below src/nova_video."""
    homes = [ROOT, ROOT / "src", ROOT / "src" / "nova_video"]
    elsewhere = re.compile(r"\[`[^`]+`\]\(https:")
    lost = [
        f"{page.name}: {path}"
        for page in PAGES
        for path in PATH.findall(elsewhere.sub("", page.read_text(encoding="utf-8")))
        if not any((home / path).exists() for home in homes)
    ]
    assert lost == []


def test_the_reference_has_every_public_name() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    listed = re.findall(r"^::: nova_video\.(\w+)$", text, re.M)
    assert sorted(listed) == sorted({*nova_video.__all__} - {"__version__"})
