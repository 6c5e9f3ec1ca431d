"""An own rule of guidance: the prompt is followed in an interval of noise levels alone (arXiv 2404.07724).

python own_guidance.py                                                          # one picture
nova generate "a whale" --guidance-rule own_guidance:Interval -o star.png        # run where this file is
"""

from dataclasses import dataclass

from torch import Tensor

from nova_video.sampling.guidance import Prediction


@dataclass(frozen=True)
class Interval:
    """e = u + scale (c - u) between two timesteps, and c outside of them; 1000 is noise alone."""

    scale: float = 6.0
    low: float = 100.0
    high: float = 900.0

    @property
    def passes(self) -> int:
        """The encoders run two passes: under the prompt (c), and under the empty one (u)."""
        return 2

    def passes_at(self, timestep: float) -> int:
        return 2 if self.low <= timestep <= self.high else 1

    def combine(self, outputs: Tensor, passes: int) -> Prediction:
        cond, *null = outputs.float().chunk(passes)
        return Prediction(cond, null[0] + self.scale * (cond - null[0]) if null else cond)


def main() -> None:
    from nova_video import NovaPipeline

    pipe = NovaPipeline.from_pretrained("emoji")
    pipe("a whale on a blue background", num_frames=1, seed=0, guidance_rule=Interval(scale=4.0)).images[0].save(
        "interval.png"
    )


if __name__ == "__main__":
    main()
