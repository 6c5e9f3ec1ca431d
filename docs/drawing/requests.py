"""Real requests to draw from: orders and revealed tokens as sampling has them, without a prompt."""

from dataclasses import dataclass

import numpy as np
import torch

from nova_video.pipeline.pipeline import NovaPipeline
from nova_video.sampling.generate import generate_sets
from nova_video.sampling.guidance import Guidance
from nova_video.sampling.random import RandomState
from nova_video.sampling.schedulers import request_scheduler
from nova_video.sampling.state import SamplingState, Segment


@dataclass(frozen=True)
class Revelation:
    """One frame of a request that has run: what was revealed when."""

    order: np.ndarray
    """(L,) token ids."""
    sizes: list[int]
    rows: int
    columns: int
    condition_tokens: int
    """Lc, of the spatial encoder."""
    text_tokens: int
    """T, of the temporal encoder: text and, for models of video, motion score and frames per second."""

    def moment(self, sets: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids that `sets` sets have revealed, and those of the next set."""
        visible = sum(self.sizes[:sets])
        return self.order[:visible], self.order[visible : visible + self.sizes[sets]]


@torch.no_grad()
def reveal_frame(pipe: NovaPipeline, seed: int, num_sets: int | None = None) -> Revelation:
    """Sample one frame for the null prompt, with one denoising step a set: the order depends on the seed alone."""
    model = pipe.transformer
    config = model.config
    grid = (config.image_size[0] // config.image_stride, config.image_size[1] // config.image_stride)
    null = torch.zeros(1, 1, config.text_token_dim, dtype=model.dtype)
    number = torch.tensor([float(pipe.defaults.motion_flow)]), torch.tensor([float(pipe.defaults.fps)])
    state = SamplingState.create(
        model,
        [Segment(0, model.embed_condition(null, torch.tensor([0]), *number), Guidance(scale=1.0))],
        num_frames=1,
        grid=grid,
        num_sets=num_sets or pipe.defaults.num_inference_steps,
        num_diffusion_steps=1,
        random=RandomState([torch.Generator().manual_seed(seed)], torch.device("cpu"), model.dtype),
        passes=1,
    )
    ids = torch.empty(0)
    for done in generate_sets(model, request_scheduler(pipe.scheduler, None), state):
        ids = done.ids[0]  # (V,) in order of revelation
    assert state.anchor is not None
    return Revelation(
        order=ids.numpy(),
        sizes=state.sizes(0),
        rows=grid[0] // model.patch_size,
        columns=grid[1] // model.patch_size,
        condition_tokens=state.anchor.shape[1],
        text_tokens=state.segments[0].text.shape[1],
    )
