"""The page of integrations/space, driven by gradio's own client over loopback.

gradio 6.31 needs Pillow below 13, so that it may be in an environment of its own: NOVA_GRADIO_PYTHON is the Python of
one that also finds the packages of this project. Without gradio these tests are skipped.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nova_video.io.media import read_frames, read_metadata

ROOT = Path(__file__).parents[2]
APP = ROOT / "integrations" / "space" / "app.py"
PYTHON = os.environ.get("NOVA_GRADIO_PYTHON", sys.executable)
DRIVE = """
import json, sys, threading, time
from gradio_client import Client

def settings(num_frames=None, seed=3, preset="fast", sets=4, guidance_scale=None, motion_flow=None):
    return num_frames, seed, preset, sets, guidance_scale, motion_flow

client = Client(sys.argv[1], verbose=False)
sentence = "a panda growing on a green background"
clip = list(client.submit("clip", sentence, *settings(9), api_name="/make"))
picture = client.submit("picture", "a red aple on a white background", *settings(), api_name="/make").result()
try:
    wrong = client.submit("clip", sentence, *settings(num_frames=100000), api_name="/make").result()
except Exception as error:
    wrong = str(error)
running = client.submit("clip", sentence, *settings(65, preset="", sets=16), api_name="/make")
while not running.done() and not any("frames are final" in str(out) and " 0 frames" not in str(out)
                                     for out in running.outputs()):
    time.sleep(0.1)
client.predict(api_name="/stop")
print(json.dumps({"clip": clip, "picture": picture, "wrong": wrong, "stopped": running.result()}))
"""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the page, in a process of its own on a free port."""
    if subprocess.run([PYTHON, "-c", "import gradio"], capture_output=True).returncode:
        pytest.skip("gradio is not installed: NOVA_GRADIO_PYTHON names an environment that has it")
    folder = tmp_path_factory.mktemp("space")
    own = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1", "GRADIO_NUM_PORTS": "1000"}
    own |= {"PYTHONUNBUFFERED": "1", "GRADIO_TEMP_DIR": str(folder)}
    log = folder / "log.txt"
    with (
        log.open("w") as file,
        subprocess.Popen(
            [PYTHON, str(APP)], env=os.environ | own, stdout=subprocess.PIPE, stderr=file, text=True
        ) as app,
    ):
        assert app.stdout is not None
        line = next((line for line in app.stdout if "http://127.0.0.1" in line), None)
        assert line is not None, log.read_text()[-2000:]
        yield line.split()[-1]
        app.terminate()


def test_page_streams_and_keeps(address: str) -> None:
    driven = subprocess.run([PYTHON, "-c", DRIVE, address], capture_output=True, text=True, timeout=280)
    assert driven.returncode == 0, driven.stderr[-2000:]
    told = json.loads(driven.stdout.splitlines()[-1])
    *looks, (_, frames, clip, _, text) = told["clip"]
    assert len([look for look in looks if "set " in look[-1]]) >= 2  # seen while it was made
    assert len(frames) == len(read_frames(clip)[0]) == 9
    assert read_metadata(clip)["seed"] == 3
    assert "wrong" not in text
    _, _, _, picture, text = told["picture"]
    assert read_metadata(picture)["prompt"] == "a red aple on a white background"
    assert 'not known: "red aple"; did you mean "red apple"?' in text
    assert "num_frames is 100000: expected at most 65 on this page" in told["wrong"]
    _, frames, clip, _, text = told["stopped"]
    assert text.startswith("Stopped: ")
    assert len(frames) == len(read_frames(clip)[0]) < 65
