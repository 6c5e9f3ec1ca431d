"""An own benchmark: are backgrounds of the colour that the sentence names?

Run it where this file is: `nova evaluate own_benchmark:Backgrounds`. The scores go to a table and to JSON; the pictures
stay in the folder, so that a run that was stopped goes on, and a changed judge reads them again without the model.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from nova_video.evaluation import Benchmark, BenchmarkItem, SampleFile

COLORS = {"white": (250, 250, 250), "red": (220, 40, 40), "green": (50, 170, 80), "blue": (50, 100, 230)}


class Backgrounds(Benchmark):
    """Two pictures of each of eight sentences; the judge looks at the four corners."""

    options = {"num_frames": 1}

    def items(self) -> Sequence[BenchmarkItem]:
        return [
            BenchmarkItem(f"a {thing} on a {color} background", group=color, samples=2, facts=color)
            for color in COLORS
            for thing in ("whale", "cherry")
        ]

    def judge(self, sample: SampleFile) -> Mapping[str, float]:
        picture = sample.frames()[0]  # (H, W, 3)
        corners = picture[[0, 0, -1, -1], [0, -1, 0, -1]].astype(float)  # (4, 3)
        distances = {name: np.abs(corners - color).mean() for name, color in COLORS.items()}
        return {
            "right": min(distances, key=distances.__getitem__) == sample.item.facts,
            "off": distances[sample.item.facts],
        }
