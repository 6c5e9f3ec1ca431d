"""An own training loss: later frames of a clip weigh more, because errors add up as a clip goes on.

In a recipe of kind `transformer` or `world-transformer`: `loss = "own_loss:later_frames"`, run where this file is.
"""

from dataclasses import replace
from typing import Any

import torch

from nova_video.training.loss import Losses, losses


def later_frames(*args: Any) -> Losses:
    """The package's loss, with weights that rise from 0.5 to 1.5 over the frames of a clip."""
    found = losses(*args)
    frames = len(found.by_frame)
    weights = torch.linspace(0.5, 1.5, frames, device=found.by_frame.device) if frames > 1 else 1.0
    by_frame = found.by_frame * weights
    return replace(found, total=by_frame.sum(), by_frame=by_frame)
