"""The optional packages: how to install them, by a command that works where nova-video itself was installed from."""

import json
import shlex
import shutil
import sys
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname


def install_command(extra: str) -> str:
    """The pip command that brings an extra: from the checkout or the folder that nova-video is installed from, if any.

    >>> install_command("train")  # in an editable checkout
    "pip install -e '.[train]'"
    """
    pip = "pip" if _is_own_pip(shutil.which("pip")) else f"{shlex.quote(sys.executable)} -m pip"
    return f"{pip} install {_requirement(extra)}"


def _requirement(extra: str) -> str:
    """The argument of pip: the folder of the package, its URL or its name, with the extra."""
    try:
        record = json.loads(metadata.distribution("nova-video").read_text("direct_url.json") or "{}")
    except metadata.PackageNotFoundError:
        record = {}
    if "dir_info" in record:
        folder = Path(url2pathname(urlsplit(record["url"]).path))
        place = shlex.quote(f"{'.' if folder == Path.cwd() else folder}[{extra}]")
        return f"-e {place}" if record["dir_info"].get("editable") else place
    if "url" in record:
        vcs = record.get("vcs_info", {}).get("vcs")
        return shlex.quote(f"nova-video[{extra}] @ {f'{vcs}+' if vcs else ''}{record['url']}")
    return shlex.quote(f"nova-video[{extra}]")


def _is_own_pip(found: str | None) -> bool:
    return found is not None and Path(found).parent == Path(sys.executable).parent
