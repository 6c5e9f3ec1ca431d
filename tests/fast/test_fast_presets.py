"""Presets in the fast engine, and what fp8 needs."""

from typing import Any

import pytest
import torch

from nova_video.common.errors import InputError
from nova_video.fast.fast_engine import DirectRunner, FastEngine
from nova_video.fast.fp8 import check_fp8
from nova_video.sampling.guidance import Guidance
from nova_video.sampling.presets import PRESETS
from test_presets import made
from test_sampling import GUIDANCES, close


@pytest.mark.parametrize("preset", ["balanced", "fast"])
@pytest.mark.parametrize("guidance", [GUIDANCES[1], GUIDANCES[3], GUIDANCES[-1]], ids=str)
@pytest.mark.parametrize("folder", ["text-to-video", "rotary-flow"])
def test_fast_engine_takes_the_same_shortcuts(folder: str, guidance: Guidance, preset: Any) -> None:

    def fast(model: Any) -> FastEngine:
        return FastEngine(model, DirectRunner(set_multiple=8))

    with torch.no_grad():
        plain, _ = made(PRESETS[preset], guidance, folder)
        close(made(PRESETS[preset], guidance, folder, make_engine=fast)[0], plain)


def test_fp8_needs_a_gpu_that_has_it() -> None:
    with pytest.raises(InputError, match="fp8 is for a GPU: got a model on cpu"):
        check_fp8(torch.device("cpu"), torch.bfloat16)
