"""The names that users import, and the version that tells its commit."""

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import nova_video
from nova_video.common import version
from nova_video.common.fast_parts import find_fast
from nova_video.common.moved import NEW_PLACES

PACKAGE = Path(nova_video.__file__).parent


@pytest.mark.parametrize("name", nova_video.__all__)
def test_public_name_is_imported_from_its_home(name: str) -> None:
    value = getattr(nova_video, name)
    if name != "__version__":
        assert value is getattr(importlib.import_module(nova_video._HOMES[name]), name)
        assert value.__name__ == name
        assert value.__module__ == nova_video._HOMES[name]
        assert value.__doc__


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.asname: node.module for node in block.body for alias in node.names}  # type: ignore[attr-defined]
    assert seen == nova_video._HOMES
    assert {*nova_video.__all__} <= {*dir(nova_video)}


def test_other_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'NovaPipelines'"):
        nova_video.NovaPipelines  # noqa: B018


def test_import_loads_no_library() -> None:
    program = (
        "import sys, nova_video; print([m for m in sys.modules if m.startswith(('torch', 'numpy', 'nova_video.'))])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "['nova_video.common', 'nova_video.common.moved']\n"  # which finds old names of modules


def test_checkout_tells_its_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(version, "PACKAGE", tmp_path / "src" / "nova_video")
    version.PACKAGE.mkdir(parents=True)
    assert version.commit() is None  # neither a checkout nor a wheel
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "One"], ["tag", "v1"]):
        subprocess.run([*git, *command], check=True, capture_output=True)
    found = version.commit()
    assert found is not None
    assert re.fullmatch("[0-9a-f]{7,}", found)


def test_wheel_tells_its_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(version, "PACKAGE", tmp_path)
    (tmp_path / version.COMMIT_FILE).write_text("0123456\n")
    assert version.commit() == "0123456"


def test_no_git_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(version, "PACKAGE", tmp_path / "src" / "nova_video")
    (tmp_path / ".git").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert version.commit() is None


@pytest.mark.parametrize(
    ("old", "name", "new"),
    [
        ("nova_video.errors", "InputError", "nova_video.common.errors"),
        ("nova_video.media", "atomic_path", "nova_video.io.files"),
        ("nova_video.given", "read_clips", "nova_video.io.inputs"),
        ("nova_video.generation", "FrameReady", "nova_video.pipeline.events"),
        ("nova_video.text.encoders", "load_text_encoder", "nova_video.text.load"),
    ],
)
def test_a_module_is_found_by_its_place_in_0_1(old: str, name: str, new: str) -> None:
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=f"{old} has moved: import from nova_video"):
        module = importlib.import_module(old)
    assert getattr(module, name) is getattr(importlib.import_module(new), name)
    with pytest.raises(AttributeError, match="has moved to"):
        _ = module.no_such_name


def test_old_places_name_modules_that_exist() -> None:
    for places in NEW_PLACES.values():
        for place in places.split():
            if place.startswith("fast.") and find_fast("fast_engine") is None:
                continue  # an installation without the fast parts
            assert importlib.util.find_spec(f"nova_video.{place}") is not None, place
    assert importlib.import_module("nova_video.pipeline").NovaPipeline is nova_video.NovaPipeline
