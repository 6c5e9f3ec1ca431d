"""Real camera clips with captions, all the way: encoded, trained on, killed and gone on with, and a clip made."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nova_video.data.dataset import list_shards
from nova_video.io import media
from nova_video.training.checkpoint import newest_checkpoint

ROOT = Path(__file__).parents[2]
CAPTIONS = {
    "bikes": "Cars, bicycles and people in a city street. The camera cuts from place to place.",
    "carphone_pristine": "A man with a red bow tie talks in a moving car. He looks into the camera.",
    "bigbuckbunny": "A large grey rabbit comes out of its hole in a green meadow. It stretches and yawns.",
}
NOVA = [sys.executable, "-m", "nova_video"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def videos(camera_clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of clips with a .txt beside each."""
    folder = tmp_path_factory.mktemp("camera") / "videos"
    folder.mkdir()
    for name, caption in CAPTIONS.items():
        shutil.copy(camera_clips / f"{name}.mp4", folder)
        (folder / f"{name}.txt").write_text(caption)
    return folder


def test_from_a_folder_of_videos_to_a_clip(videos: Path) -> None:
    folder = videos.parent
    dataset = folder / "dataset"
    encode = [*NOVA, "encode", str(videos), "-o", str(dataset), "--cuts", "--frames", "9", "--no-ray"]
    subprocess.run(encode, check=True, timeout=600)
    shards = list_shards(dataset)
    assert sum(shard.rows for found in shards.values() for shard in found) >= 8
    assert len(shards) == 2  # the street is wider than the others
    inspect = [*NOVA, "data", "inspect", str(dataset), "--sources", str(videos)]
    subprocess.run(inspect, check=True, timeout=300, cwd=folder)

    def command(output: str) -> list[str]:
        settings = ["--dataset.path", str(dataset), "--dataset.batch", "1", "--dataset.workers", "1", "--steps", "9"]
        logs = [
            "--log.every",
            "1",
            "--log.checkpoint-every",
            "3",
            "--log.sample-every",
            "0",
            "--log.validate-every",
            "0",
        ]
        where = ["--device", "cpu", "--output", str(folder / output)]
        return [*NOVA, "train", str(ROOT / "recipes" / "finetune.toml"), *settings, *logs, *where]

    subprocess.run(command("whole"), check=True, timeout=600)
    run = subprocess.Popen(command("killed"))
    checkpoints = folder / "killed" / "checkpoints"
    deadline = time.monotonic() + 300
    while newest_checkpoint(checkpoints) is None and time.monotonic() < deadline:
        time.sleep(0.02)
    run.kill()
    run.wait(timeout=60)
    assert newest_checkpoint(checkpoints).stem < "step-00000009"
    subprocess.run(command("killed"), check=True, timeout=600)
    whole, killed = (load_file(newest_checkpoint(folder / name / "checkpoints")) for name in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    losses = [
        [json.loads(line)["loss"] for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "killed")
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 9

    made = folder / "made.mp4"
    model = ["--model", str(folder / "killed" / "model"), "--sets", "4", "--diffusion-steps", "5"]
    subprocess.run([*NOVA, "generate", CAPTIONS["bigbuckbunny"], "-o", str(made), "--seed", "0", *model], check=True)
    frames, fps = media.read_frames(made)
    assert (len(frames), fps) == (9, 8.0)
