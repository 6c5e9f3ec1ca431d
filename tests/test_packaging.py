"""The versions in constraints.txt cover every package that the extras install, and hints name commands that work."""

import ast
import json
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from nova_video.common.extras import install_command

ROOT = Path(__file__).parents[1]
EXTRAS = ("train", "data", "eval", "demo", "docs", "lowmem", "dev")  # `flash` is for Hopper and Blackwell GPUs


def installed_packages() -> dict[str, str]:
    """Name -> version of what this package's extras need, followed through the requirements of each."""
    found: dict[str, str] = {}
    left = [("nova-video", extra) for extra in EXTRAS]
    done = set(left)
    while left:
        name, extra = left.pop()
        for line in metadata.requires(name) or []:
            needed = Requirement(line)
            if needed.marker is not None and not needed.marker.evaluate({"extra": extra}):
                continue
            key = canonicalize_name(needed.name)
            if key.startswith(("nvidia-", "cuda-", "triton")):
                continue  # torch asks for exact versions of these itself
            found[key] = metadata.version(key)
            for item in [(key, ""), *((key, extra) for extra in needed.extras)]:
                if item not in done:
                    done.add(item)
                    left.append(item)
    return found


def test_constraints_pin_every_package() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines if not line.startswith("#")}
    found = installed_packages()
    assert len(found) > 80
    versions = {name: version.split("+")[0] for name, version in found.items()}  # 2.13.0+cpu is 2.13.0
    assert versions == {name: pins.get(name) for name in versions}


@pytest.mark.parametrize(
    ("record", "command"),
    [
        (None, "install 'nova-video[train]'"),
        ({"url": "file:///a/b", "dir_info": {"editable": True}}, "install -e '/a/b[train]'"),
        ({"url": ROOT.as_uri(), "dir_info": {"editable": True}}, "install -e '.[train]'"),
        ({"url": "file:///a/b%20c", "dir_info": {}}, "install '/a/b c[train]'"),
        ({"url": "https://a/b", "vcs_info": {"vcs": "git"}}, "install 'nova-video[train] @ git+https://a/b'"),
    ],
)
def test_an_extra_is_installed_from_where_the_package_is_from(
    monkeypatch: pytest.MonkeyPatch, record: dict[str, object] | None, command: str
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(metadata.Distribution, "read_text", lambda _, __: record and json.dumps(record))
    monkeypatch.setattr(metadata.PathDistribution, "read_text", lambda _, __: record and json.dumps(record))
    assert install_command("train").endswith(command)


def test_the_package_imports_no_world() -> None:
    """Only the command line does, and only inside the functions of its commands."""
    package, found = ROOT / "src" / "nova_video", []
    for path in package.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        nodes = tree.body if path.parent == package / "cli" else list(ast.walk(tree))
        for node in nodes:
            names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [str(path) for name in names if name.split(".")[0] == "nova_worlds"]
    assert found == []
