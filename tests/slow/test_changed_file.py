"""The file of a clip that changed while it was made tells how to make it again."""

import numpy as np
import pytest

from conftest import Run
from nova_video import GenerateRequest, NovaPipeline
from nova_video.io.media import read_frames

pytestmark = pytest.mark.slow


def test_its_file_is_made_again(run: Run) -> None:
    pipe = NovaPipeline.from_pretrained("emoji")
    request = GenerateRequest(
        "a frog spinning clockwise on a blue background", num_frames=9, sets=2, diffusion_steps=2, seed=0
    )
    generation = pipe.start(request)
    generation.run(lambda _pipe, step, *_: step < 2, show_progress=False)
    assert generation.change("a frog growing on a red background", motion_flow=2.0, guidance_scale=3.0) == 5
    generation.run(show_progress=False).save("changed.mp4")
    code, _, errors = run("generate", "--like", "changed.mp4", "-o", "again.mp4")
    assert code == 0, errors
    changed, again = (np.stack(list(read_frames(name)[0])) for name in ("changed.mp4", "again.mp4"))
    assert np.array_equal(changed, again)
