"""An own head in place of the denoiser: one MLP that reads token, feature and timestep side by side.

    python own_head.py     # makes a tiny model with it, samples, saves it and opens it again

In a recipe, run where this file is: `head = "own_head:PlainMlp"` under [model]. What was trained opens with
`NovaPipeline.from_pretrained(folder, head=PlainMlp)`.
"""

import tempfile

import torch
from torch import Tensor, nn

from nova_video.model.embeddings import timestep_frequencies


class PlainMlp(nn.Module):
    """Any module that is made like the paper's `Denoiser`, and called like it."""

    def __init__(self, depth: int, width: int, condition_dim: int, channels: int, patch: int) -> None:
        super().__init__()
        values = channels * patch * patch
        layers: list[nn.Module] = [nn.Linear(values + condition_dim + 256, width), nn.SiLU()]
        for _ in range(depth):
            layers += [nn.Linear(width, width), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(width, values))

    def forward(self, noisy: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        """noisy (B, S, P), timestep (B,) or (B, S), features z (B, S, D) -> prediction (B, S, P)."""
        time = timestep_frequencies(timestep).to(noisy.dtype)  # (B, [S,] 256)
        if timestep.dim() == 1:
            time = time.unsqueeze(1).expand(-1, noisy.shape[1], -1)
        return self.layers(torch.cat([noisy, condition.to(noisy.dtype), time], dim=-1))


def main() -> None:
    from nova_video import NovaPipeline
    from nova_video.model import NOVATransformer3DModel
    from nova_video.sampling.schedulers import new_scheduler

    torch.manual_seed(0)
    model = NOVATransformer3DModel(
        image_size=(64, 64),
        text_token_dim=32,
        text_token_len=8,
        image_base_size=(4, 4),
        video_base_size=(1, 2, 2),
        arch=("vit_d2w64", "vit_d2w64", "mlp_d2w64"),
        head=PlainMlp,
    )
    pipe = NovaPipeline(model, new_scheduler("flow"))
    call = {"prompt_embeds": [torch.randn(3, 32)], "output_type": "latent", "seed": 0, "num_inference_steps": 4}
    latents = pipe(**call).images
    with tempfile.TemporaryDirectory() as folder:
        pipe.save_pretrained(folder)
        again = NovaPipeline.from_pretrained(folder, head=PlainMlp)
        print("opened again, the same latents:", torch.equal(again(**call).images, latents))


if __name__ == "__main__":
    main()
