"""The files that deploy a server: they name flags, files and folders that there are."""

import configparser
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from nova_video.cli.arguments import Serve, parse

ROOT = Path(__file__).parents[1]


def instructions() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile, with their arguments on one line."""
    text = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split()[0], line.split(maxsplit=1)[1].strip()) for line in lines]


def served(words: list[str]) -> Serve:
    command = parse(words)
    assert isinstance(command, Serve)
    return command


def entry_point() -> list[str]:
    return list(json.loads(next(rest for name, rest in instructions() if name == "ENTRYPOINT")))


def test_the_image_is_made_of_what_there_is() -> None:
    allowed = re.findall(r"^!(\S+)", (ROOT / ".dockerignore").read_text(encoding="utf-8"), re.MULTILINE)
    copied = [name for kind, rest in instructions() if kind == "COPY" for name in rest.split()[:-1]]
    assert sorted(copied) == sorted(allowed)
    assert all((ROOT / name).exists() for name in copied)
    stages = dict(instructions())
    assert stages["USER"] == "nova"
    command = entry_point()
    assert command[0] == "nova"
    args = served(command[1:])
    assert (args.host, args.port) == ("0.0.0.0", int(stages["EXPOSE"]))
    assert args.folder is not None
    assert Path(args.folder).is_relative_to(stages["VOLUME"])


def test_the_shell_lines_of_the_image_can_be_read() -> None:
    runs = [rest for kind, rest in instructions() if kind == "RUN"]
    for text in runs:
        script = re.sub(r"^--mount=\S+\s+", "", text)
        found = subprocess.run(["sh", "-n", "-c", script], capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stderr
    extras = re.findall(r"'\.\[(.*)\]'", " ".join(runs))
    assert extras == ["demo,serve"]


@pytest.mark.parametrize("profile", ["cpu", "cuda"])
def test_compose_has_a_service_for_each_device(profile: str) -> None:
    made = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
    (service,) = [each for each in made["services"].values() if each["profiles"] == [profile]]
    assert service["build"] == {"context": ".", "args": {"DEVICE": profile}}
    words = [re.sub(r"\$\{MODEL:-(\w+)\}", r"\1", word) for word in service["command"]]
    args = served([*entry_point()[1:], *words])
    assert service["ports"] == [f"127.0.0.1:{args.port}:{args.port}"]  # open to this machine alone
    assert args.hosts is not None, "the container listens everywhere: names are checked"
    assert set(args.hosts.split(",")) == {"localhost", "127.0.0.1"}
    assert service["volumes"] == ["nova:/var/lib/nova-video"]
    assert "nova" in made["volumes"]
    assert float(service["stop_grace_period"].rstrip("s")) > 30  # the default of --grace
    assert ("deploy" in service) == (profile == "cuda")


def test_the_unit_of_systemd_serves_and_waits_for_running_jobs() -> None:
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(ROOT / "deploy" / "nova-serve.service", encoding="utf-8")
    service = unit["Service"]
    words = shlex.split(service["ExecStart"])
    assert words[0].endswith("/bin/nova")
    args = served(words[1:])
    assert args.host == "127.0.0.1"
    assert args.folder == f"/var/lib/{service['StateDirectory']}"
    assert int(service["TimeoutStopSec"]) > (args.grace or 30)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not here")
def test_systemd_takes_the_unit() -> None:
    command = ["systemd-analyze", "verify", "--man=no", str(ROOT / "deploy" / "nova-serve.service")]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    lines = [line for line in said.splitlines() if "/opt/nova-video/bin/nova is not executable" not in line]
    assert lines == []
