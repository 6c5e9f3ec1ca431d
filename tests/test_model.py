"""The network against the reference tensors: parts, losses and gradients, at 1e-5 of the largest value."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.hooks import apply_group_offloading
from safetensors.torch import load_file
from torch import Tensor

from nova_video.common.errors import InputError
from nova_video.model import NOVATransformer3DModel, mask_ratios, patchify, set_sizes, unpatchify
from nova_video.model.embeddings import space_table
from nova_video.model.patches import gather_tokens, scatter_tokens
from nova_video.training.loss import LossDraws, NoiseTable, loss_parts, losses, total_loss

CONFORMANCE = Path(__file__).parent / "conformance"
FOLDERS = ["text-to-image", "text-to-video", "rotary-flow"]
TRAINED = [*FOLDERS, "published-video"]


def open_model(folder: str) -> NOVATransformer3DModel:
    model = NOVATransformer3DModel.from_pretrained(CONFORMANCE / folder / "transformer", torch_dtype=torch.float32)
    return model.eval()


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert got.shape == expected.shape
    error = (got - expected).abs().max() / expected.abs().max()
    assert error < tolerance, f"relative error {error:.2e}"


def prompts(tensors: dict[str, Tensor], prefix: str) -> tuple[Tensor, Tensor]:
    features = [tensors[f"{prefix}.{i}"] for i in range(2)]
    lengths = torch.tensor([len(f) for f in features])
    return torch.nn.utils.rnn.pad_sequence(features, batch_first=True), lengths


@pytest.mark.parametrize("folder", FOLDERS)
@torch.no_grad()
def test_parts(folder: str) -> None:
    model = open_model(folder)
    parts = load_file(CONFORMANCE / folder / "parts.safetensors")
    noisy = parts["denoiser.noisy"]
    grid = (noisy.shape[2], noisy.shape[3])
    positions = model.positions(3 if model.has_motion else 1, grid)

    close(model.image_encoder.patch_embed(parts["patch.in"]), parts["patch.out"])
    close(patchify(parts["patch.in"], 2), parts["patch.patchify"])
    close(model.embed_tokens(parts["patch.patchify"]), parts["patch.out"])
    close(model.text_embed(*prompts(parts, "text.in")), parts["text.out"])
    visible, tokens = parts["encoder.visible_ids"].squeeze(-1), parts["encoder.tokens"]
    if positions.image_space is not None:
        tokens = tokens + positions.image_space
    out = model.image_encoder(
        parts["encoder.cond"], gather_tokens(tokens, visible), visible, tokens, positions.image_rotary
    )
    close(out, parts["encoder.out"])
    z = parts["denoiser.cond"]
    tokens = patchify(noisy, 2)
    close(model.image_decoder(tokens, parts["denoiser.timestep"], z), parts["denoiser.out"])

    # a set alone, and the same set among the untouched noise
    ids = parts["denoiser.pred_ids"].squeeze(-1)
    alone = model.image_decoder(gather_tokens(tokens, ids), parts["denoiser.timestep"], gather_tokens(z, ids))
    close(scatter_tokens(tokens, ids, alone), parts["denoiser.out_packed"])
    if "mixer.out" in parts:
        close(model.mix(parts["mixer.first"], parts["mixer.frame"]), parts["mixer.out"])
    if model.motion_embed is not None:
        close(model.motion_embed(torch.tensor([5.0, 2.0]), torch.full((2,), 12.0)), parts["motion.out"])
        condition = model.embed_condition(
            *prompts(parts, "text.in"), motion=torch.tensor([5.0, 2.0]), fps=torch.full((2,), 12.0)
        )
        close(condition, torch.cat([parts["motion.text"], parts["motion.out"]], dim=1))
    if "video_pos.space" in parts:
        close(positions.video_space, parts["video_pos.space"])
    if "video_pos.time" in parts:
        close(positions.time, parts["video_pos.time"])


@pytest.mark.parametrize("folder", TRAINED)
def test_loss_and_gradients(folder: str) -> None:
    model = open_model(folder)
    case = json.loads((CONFORMANCE / folder / "cases.json").read_text())["cases"]["train"]
    tensors = load_file(CONFORMANCE / folder / "train.safetensors")
    scheduler_class = FlowMatchEulerDiscreteScheduler if folder == "rotary-flow" else DDPMScheduler
    table = NoiseTable.from_scheduler(scheduler_class.from_pretrained(CONFORMANCE / folder / "scheduler"), "cpu")

    latents = tensors["latents"]
    latents = latents.unsqueeze(2) if latents.dim() == 4 else latents  # (B, C, F, h, w)
    visible = tensors["visible_ids"].squeeze(-1)  # (B * F, V)
    every = torch.arange(tensors["noise"].shape[1]).expand(len(visible), -1)
    hidden = torch.stack([row[~torch.isin(row, ids)] for row, ids in zip(every, visible, strict=True)])
    rows = hidden.repeat(case["loss_repeat"], 1)
    draws = LossDraws(visible, hidden, tensors["timestep"].gather(1, rows), gather_tokens(tensors["noise"], rows))
    motion = None if case["motion_flow"] is None else torch.tensor(case["motion_flow"])
    condition = model.embed_condition(*prompts(tensors, "prompt_embeds"), motion=motion, fps=torch.full((2,), 12.0))
    found = losses(model, latents, latents, condition, table, draws)
    parts = loss_parts(found.by_frame)
    released = total_loss(found, "released")
    assert set(parts) == {name for name in tensors if name.startswith("loss")}
    for name, value in parts.items():
        close(value.detach(), tensors[name])
    close(released.detach(), tensors.get("minimised", sum(parts.values()).detach()))
    released.backward()
    checked = [name for name in tensors if name.startswith("grad.")]
    assert len(checked) == (6 if folder == "published-video" else 4)
    for name in checked:
        close(model.get_parameter(name.removeprefix("grad.")).grad, tensors[name])


@pytest.mark.parametrize("folder", FOLDERS)
@torch.no_grad()
def test_frame_by_frame_equals_all_frames_at_once(folder: str) -> None:
    model = open_model(folder)
    frames = 3 if model.has_motion else 1
    grid = (8, 8) if folder == "text-to-image" else (8, 12)
    latents = torch.randn(2, 4, frames, *grid)
    text, lengths = torch.randn(2, 5, 32), torch.tensor([5, 0])
    condition = model.embed_condition(text, lengths, torch.full((2,), 5.0), torch.full((2,), 12.0))
    positions = model.positions(frames, grid)
    expected = model.encode_frames(condition, latents, positions)
    cache, first = model.new_cache(2, positions), None
    for f in range(frames):
        tokens = model.embed_history(None if f == 0 else latents[:, :, f - 1], f, 2, positions)
        if f == 0:
            feature = model.encode_context(condition, tokens[:, None], positions, cache)[:, 0]
        else:
            feature = model.encode_frame(tokens, f, positions, cache)
        first = feature if first is None else first
        close(feature if f == 0 else model.mix(first, feature), expected[:, f])


@torch.no_grad()
def test_hidden_tokens_do_not_matter() -> None:
    model = open_model("rotary-flow")
    positions = model.positions(1, (8, 12))
    condition, tokens = torch.randn(1, 6, 64), torch.randn(1, 24, 64)
    ids = torch.tensor([[3, 17, 5]])
    other = scatter_tokens(torch.randn_like(tokens), ids, gather_tokens(tokens, ids))
    assert torch.equal(
        model.encode_tokens(condition, tokens, ids, positions), model.encode_tokens(condition, other, ids, positions)
    )
    assert model.encode_tokens(condition, tokens, ids[:, :0], positions).shape == tokens.shape


def test_set_sizes_follow_the_cosine() -> None:
    assert set_sizes(16, 4) == [1, 4, 5, 6]
    assert sum(set_sizes(1440, 64)) == 1440
    assert set_sizes(4, 64) == [1, 1, 1, 1]


def test_mask_ratios_are_a_truncated_normal() -> None:
    ratios = mask_ratios(100_000, torch.Generator().manual_seed(0))
    assert ratios.min() >= 0.7
    assert ratios.max() <= 1.0
    # mean of a normal(1, 0.25) cut to [0.7, 1]: 1 - 0.25 (phi(0) - phi(1.2)) / (Phi(0) - Phi(-1.2))
    assert ratios.mean().item() == pytest.approx(0.8667, abs=1e-3)


def test_unpatchify_inverts_patchify() -> None:
    latents = torch.randn(2, 4, 6, 8)
    assert torch.equal(unpatchify(patchify(latents, 2), 2, (6, 8)), latents)


def test_space_table_runs_over_columns_first() -> None:
    table = space_table(2, 3, 16)
    assert torch.equal(table[1], torch.cat([space_table(1, 3, 16)[1, :8], space_table(2, 1, 16)[0, 8:]]))


def test_released_sizes_have_the_released_parameter_count() -> None:
    with torch.device("meta"):
        model = NOVATransformer3DModel(
            image_size=(480, 768),
            image_base_size=(30, 48),
            video_base_size=(16, 15, 24),
            video_mixer_rank=24,
            arch=("vit_d16w1024", "vit_d32w1024", "mlp_d3w1280"),
        )
    assert sum(value.numel() for value in model.state_dict().values()) == pytest.approx(645.5e6, abs=0.05e6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_padding_table_is_stored_and_never_trained(dtype: torch.dtype) -> None:
    folder = CONFORMANCE / "text-to-image" / "transformer"
    model = NOVATransformer3DModel.from_pretrained(folder, torch_dtype=dtype)
    stored = load_file(folder / "diffusion_pytorch_model.safetensors")["text_embed.weight"]
    assert torch.equal(model.text_embed.weight, stored.to(dtype))
    assert "text_embed.weight" in model.state_dict()
    assert "text_embed.weight" not in dict(model.named_parameters())
    assert not model.requires_grad_(True).text_embed.weight.requires_grad


@pytest.mark.parametrize("how", ["leaf_level", "block_level"])
def test_device_and_dtype_are_those_of_diffusers(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of weights that wait elsewhere, and of those kept in fewer bits."""
    model = open_model("text-to-image").to(torch.bfloat16)
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.bfloat16)
    blocks = 1 if how == "block_level" else None
    apply_group_offloading(model, onload_device=torch.device("cpu"), offload_type=how, num_blocks_per_group=blocks)
    monkeypatch.setattr(ModelMixin, "device", property(lambda module: torch.device("cuda")))
    assert model.device == torch.device("cuda")  # whatever diffusers says

    model = open_model("text-to-image").to(torch.bfloat16)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert model.dtype == super(type(model), model).dtype == torch.bfloat16


@pytest.mark.parametrize(("stride", "multiple"), [(4, 32), (8, 32), (16, 32), (32, 64)])
def test_sizes_are_multiples_of_a_temporal_token(stride: int, multiple: int) -> None:
    """The temporal encoder's patch is twice the spatial one, 15 // stride + 1."""
    arch = ("vit_d1w32", "vit_d2w32", "mlp_d1w32")
    model = NOVATransformer3DModel(image_size=multiple, image_stride=stride, text_token_dim=8, arch=arch)
    assert model.size_multiple == multiple
    assert model.video_encoder.patch_embed(torch.zeros(1, 4, multiple // stride, multiple // stride)).shape[1] == 1
    with pytest.raises(InputError, match=f"expected multiples of {multiple}"):
        NOVATransformer3DModel(image_size=multiple // 2, image_stride=stride, text_token_dim=8, arch=arch)
