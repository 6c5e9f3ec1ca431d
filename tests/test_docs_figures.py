"""The pictures of the docs say what the model does: what is drawn is compared with the model itself."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))

import figures  # noqa: E402
from drawing import attention, autoencoder, beyond, curves, network, requests, samples, showcase, style, training  # noqa: E402

from nova_video.autoencoders import AutoencoderKLCausalTiny  # noqa: E402
from nova_video.model import set_sizes  # noqa: E402
from nova_video.model.attention import block_causal_mask  # noqa: E402
from nova_video.pipeline.pipeline import NovaPipeline  # noqa: E402


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint: Path) -> NovaPipeline:
    pipe = NovaPipeline.from_pretrained(tiny_checkpoint)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def request_of_8_sets(pipe: NovaPipeline) -> requests.Revelation:
    return requests.reveal_frame(pipe, seed=3, num_sets=8)


def test_temporal_mask_is_the_models() -> None:
    mask = attention.temporal_mask(5, 4, 3)
    assert np.array_equal(mask, block_causal_mask(5, 4, 3, torch.device("cpu")).numpy())
    figure = attention.draw_temporal_mask(mask, 5, 4)
    drawn = np.asarray(figure.axes[0].images[0].get_array())
    plt.close(figure)
    assert np.array_equal(drawn > 0, mask)
    assert set(drawn[-1]) == {1, 2, 3, 4}  # the last frame reads text and motion and all frames, each in its colour


@torch.no_grad()
def test_temporal_mask_is_what_features_depend_on(pipe: NovaPipeline) -> None:
    """Frame g's tokens carry the latents of frame g - 1: changing those changes the features of the mask's rows."""
    model, num_frames = pipe.transformer, 4
    grid = (8, 12)
    positions = model.positions(num_frames, grid)
    tokens = grid[0] * grid[1] // 16
    condition = torch.randn(1, 3, model.width, generator=torch.Generator().manual_seed(0))
    latents = torch.randn(1, 4, num_frames, *grid, generator=torch.Generator().manual_seed(1))
    before = model.video_encoder(condition, _frames(model, latents, positions), None)
    mask = attention.temporal_mask(3, tokens, num_frames)
    first_token = [3 + frame * tokens for frame in range(num_frames)]
    for changed in range(1, num_frames):
        other = latents.clone()
        other[:, :, changed - 1] += 1
        after = model.video_encoder(condition, _frames(model, other, positions), None)
        moved = ((after - before).abs().amax((0, 2, 3)) > 1e-4).tolist()
        assert moved == [bool(mask[row, first_token[changed]]) for row in first_token]


def _frames(model: torch.nn.Module, latents: torch.Tensor, positions: object) -> torch.Tensor:
    """(1, F, Lc, D): what the temporal encoder reads of each frame."""
    given = [None, *latents.unbind(2)[:-1]]
    return torch.stack([model.embed_history(x, f, 1, positions) for f, x in enumerate(given)], dim=1)


def test_sets_are_drawn_as_the_sampler_makes_them(pipe: NovaPipeline, request_of_8_sets: requests.Revelation) -> None:
    """The drawn order and sizes are those that a request with the same seed reveals its tokens in."""
    drawn = request_of_8_sets
    count = drawn.rows * drawn.columns
    assert drawn.sizes == set_sizes(count, 8)
    assert sorted(drawn.order.tolist()) == list(range(count))
    filling = samples.record_filling(pipe, "a whale", 3, num_frames=5, num_sets=8, num_diffusion_steps=1)
    sets = attention.set_of_token(drawn.order, drawn.sizes).reshape(drawn.rows, drawn.columns)
    assert [moment.frame for moment in filling.moments] == [0] * len(drawn.sizes) + [1] * len(drawn.sizes)
    for step, moment in enumerate(filling.moments):
        assert np.array_equal(moment.revealed, sets <= step % len(drawn.sizes))
    figure = attention.draw_sets(drawn.order, drawn.sizes, drawn.rows, drawn.columns, 8)
    assert np.array_equal(np.asarray(figure.axes[0].images[0].get_array()), sets)
    plt.close(figure)


@torch.no_grad()
def test_spatial_masks_are_the_tokens_that_blocks_get(
    pipe: NovaPipeline, request_of_8_sets: requests.Revelation
) -> None:
    model, drawn = pipe.transformer, request_of_8_sets
    visible, chosen = drawn.moment(4)
    count, condition_tokens = drawn.rows * drawn.columns, drawn.condition_tokens
    first, second = attention.spatial_masks(condition_tokens, count, visible)
    lengths: list[int] = []
    hooks = [
        block.register_forward_hook(lambda module, inputs, output: lengths.append(inputs[0].shape[1]))
        for block in model.image_encoder.blocks
    ]
    positions = model.positions(1, (2 * drawn.rows, 2 * drawn.columns))
    condition = torch.randn(1, condition_tokens, model.width)
    model.encode_tokens(condition, torch.randn(1, count, model.width), torch.from_numpy(visible)[None], positions)
    for hook in hooks:
        hook.remove()
    half = len(lengths) // 2
    assert lengths[:half] == [int(first.any(1).sum())] * half
    assert lengths[half:] == [int(second.any(1).sum())] * (len(lengths) - half)
    assert not first[condition_tokens + chosen].any()
    assert np.flatnonzero(first[0][condition_tokens:]).tolist() == sorted(visible.tolist())

    figure = attention.draw_spatial_attention([(visible, chosen)], condition_tokens, drawn.rows, drawn.columns)
    images = [np.asarray(axes.images[0].get_array()) for axes in figure.axes[:3]]
    plt.close(figure)
    assert np.array_equal(images[1] > 0, first)
    assert np.array_equal(images[2] > 0, second)
    assert set(np.flatnonzero(images[0] == 4)) == set(chosen.tolist())


def test_our_autoencoder_is_drawn_causal() -> None:
    vae = AutoencoderKLCausalTiny(block_out_channels=(16, 16, 16), norm_num_groups=4)
    encoder, decoder = autoencoder.encoder_reads(vae, 9, side=32), autoencoder.decoder_reads(vae, 3, side=4)
    for latent in range(3):
        last = 4 * latent  # the last pixel frame of that latent frame
        assert encoder[latent, last]
        assert not encoder[latent, last + 1 :].any()
        assert decoder[last, latent]
        assert not decoder[: max(0, last - 3), latent].any()
    figure = autoencoder.draw_autoencoder(encoder, decoder)
    assert np.array_equal(np.asarray(figure.axes[0].images[0].get_array()), encoder)
    assert np.array_equal(np.asarray(figure.axes[1].images[0].get_array()), decoder.T)
    plt.close(figure)


def test_training_draws() -> None:
    shares = training.revealed_shares(64)
    assert shares.sum() == pytest.approx(1)
    assert not shares[round(0.3 * 64) + 1 :].any()  # mask ratios start at 0.7
    figure = training.draw_training(64, (0, 8, 48), (0.5, 0.3, 0.2))
    assert len(figure.axes) == 2
    plt.close(figure)


def test_diagrams_name_the_checkpoints_sizes(
    pipe: NovaPipeline, request_of_8_sets: requests.Revelation, tmp_path: Path
) -> None:
    overview = network.draw_overview(pipe.transformer, 4, request_of_8_sets)
    denoiser = network.draw_denoiser(pipe.transformer)
    words = [text.get_text() for figure in (overview, denoiser) for text in figure.axes[0].texts]
    for expected in ("2 blocks, width 64", "spatial encoder\n4 blocks", "2 blocks, 64 wide", "noisy token\n16 values"):
        assert any(expected in text for text in words), expected
    for name, figure in (("overview.png", overview), ("denoiser.png", denoiser)):
        style.save(figure, tmp_path / name)
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 800
            assert picture.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def test_cover_hides_what_is_not_revealed() -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8))
    revealed = np.array([[True, False, True], [False, True, False]])
    out = np.asarray(samples.cover(picture, revealed))
    shown = revealed.repeat(16, axis=0).repeat(16, axis=1)
    assert np.array_equal(out[shown], np.asarray(picture)[shown])
    assert len(np.unique(out[~shown], axis=0)) == 2  # grey and the rim of its cells


def test_filling_becomes_an_animation(pipe: NovaPipeline, tmp_path: Path) -> None:
    filling = samples.record_filling(pipe, "a whale", 0, num_frames=5, num_sets=3, num_diffusion_steps=2)
    samples.draw_filling(pipe, filling, tmp_path / "filling.webp")
    with Image.open(tmp_path / "filling.webp") as animation:
        assert animation.n_frames == len(filling.moments) + 5
        assert animation.info["loop"] == 0


def test_denoising_is_recorded_step_by_step(pipe: NovaPipeline) -> None:
    run = samples.record_denoising(pipe, "a whale", 0, num_sets=4, chosen=2)
    steps = pipe.defaults.num_diffusion_steps
    assert len(run.timesteps) == steps
    assert len(run.values) == steps + 1
    assert run.timesteps == sorted(run.timesteps, reverse=True)
    assert sorted(run.ids.tolist()) == np.flatnonzero(run.chosen).tolist()
    assert not run.before[:, run.ids].any()  # nothing there before the set
    # The values that the last step led to are in the frame that a call of the plain loop makes.
    latents = pipe(
        "a whale",
        num_frames=1,
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        compile=False,
    ).images
    tokens = samples.patchify(latents[:, :, 0], pipe.transformer.patch_size)
    assert torch.allclose(tokens[:, run.ids], run.values[-1], atol=1e-5)
    plt.close(samples.draw_denoising(pipe, run, "a whale", stages=3))


def test_guidance_is_compared_on_the_same_random_numbers(pipe: NovaPipeline) -> None:
    figure = samples.draw_guidance(pipe, ["a whale"], (1, 1, 4), seed=0)
    off, again, guided = (np.asarray(axes.images[0].get_array()) for axes in figure.axes)
    plt.close(figure)
    assert np.array_equal(off, again)
    assert not np.array_equal(off, guided)


def test_showcase_plays_every_clip(pipe: NovaPipeline, tmp_path: Path) -> None:
    prompts = ["a whale", "an owl", "a red apple", "a pear", "a fox on a very wide blue background indeed"]
    clips, fps = showcase.make_clips(pipe, prompts, seed=1, num_frames=5)
    alone = pipe("an owl", num_frames=5, generator=torch.Generator().manual_seed(1)).frames[0]
    assert [np.asarray(frame).tolist() for frame in clips[1]] == [np.asarray(frame).tolist() for frame in alone]
    showcase.draw_sheet(clips, prompts, fps, tmp_path / "sheet.webp")
    with Image.open(tmp_path / "sheet.webp") as sheet:
        assert sheet.n_frames == 5
        assert sheet.info["loop"] == 0
        assert sheet.width < 4.5 * showcase.SIDE + 5 * showcase.GAP
        assert sheet.height > 2 * showcase.SIDE  # five clips are two rows


def test_curves_are_the_logs(tmp_path: Path) -> None:
    rows = {
        "autoencoder.jsonl": [{"seconds": 10.0, "psnr": 20.0}, {"seconds": 20.0, "psnr": 25.0}],
        "emoji-image.jsonl": [
            {"seconds": 30.0, "loss": 1.0},
            {"seconds": 30.0, "held_out_loss": 0.5, "held_out_loss_wrong_object": 0.6},
            {"seconds": 30.0, "score_object": 40.0},
        ],
        "emoji-video.jsonl": [
            {"seconds": 8.0, "loss": 0.4},
            {"seconds": 8.0, "held_out_loss": 0.3, "held_out_loss_wrong_motion": 0.7},
            {"seconds": 8.0, "score_object": 60.0},
        ],
        "emoji-beyond.jsonl": [
            {"seconds": 4.0, "loss": 0.3},
            {"seconds": 4.0, "held_out_loss": 0.2, "held_out_loss_wrong_motion": 0.8},
            {"seconds": 4.0, "score_object": 80.0},
        ],
    }
    for name, entries in rows.items():
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in entries))
    figure = curves.draw_curves(tmp_path)
    psnr, scores, *stages = figure.axes
    drawn = psnr.lines[0]
    objects = next(line for line in scores.lines if line.get_label() == "object")
    losses = [{line.get_label(): list(line.get_ydata()) for line in axes.lines} for axes in stages]
    plt.close(figure)
    assert (list(drawn.get_xdata()), list(drawn.get_ydata())) == ([10.0, 20.0], [20.0, 25.0])
    assert list(objects.get_xdata()) == [30.0, 38.0, 42.0]  # a stage follows the one before
    assert list(objects.get_ydata()) == [40.0, 60.0, 80.0]
    assert losses == [
        {"with its own caption": [0.5], "with another object": [0.6]},
        {"with its own caption": [0.3], "with another motion": [0.7]},
        {"with its own caption": [0.2], "with another motion": [0.8]},
    ]


def test_the_script_draws_what_the_pages_show(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Every picture of the README and the docs; those of trained weights are drawn by the functions tested above.

    Those of benchmarks are the sheets that the benchmarks write, and those of the page are taken in a browser.
    """
    figures.main(figures.Figures(str(tiny_checkpoint), tmp_path, structure_only=True))
    trained = {"filling.webp", "denoising.png", "guidance.png", "emoji.webp", "training-curve.png", *beyond.TRAINED}
    measured = {
        path.name
        for path in (ROOT / "docs" / "images").iterdir()
        if path.name.startswith(("beyond-", "drift", "page-"))
    }
    drawn = {path.name for path in tmp_path.iterdir()} | trained | measured
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    shown = {name for page in pages for name in re.findall(r"\]\((?:docs/)?images/([^)]+)\)", page.read_text("utf-8"))}
    assert shown == drawn
    assert shown == {path.name for path in (ROOT / "docs" / "images").iterdir()}
