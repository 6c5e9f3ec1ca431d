"""The pipeline as people use it: opening, what a call returns and refuses, and that calls do not touch each other."""

import inspect
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from nova_video import NovaPipeline
from nova_video.common.errors import InputError
from nova_video.io.pixels import image_to_pixels, output_form, unit_frames
from nova_video.model import set_sizes
from nova_video.pipeline.conditions import encode_prompts
from nova_video.pipeline.request import GenerateRequest
from nova_video.pipeline.settings import CheckpointSettings, Defaults

CONFORMANCE = Path(__file__).parent / "conformance"
CASES = [("text-to-image", "generate"), ("text-to-image", "generate_noguidance")]
CASES += [("text-to-video", "generate"), ("rotary-flow", "generate")]
QUICK = {"num_inference_steps": 2, "num_diffusion_steps": 2}


def open_pipe(folder: Path | str) -> NovaPipeline:
    pipe = NovaPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def features(tokens: int = 5, seed: int = 1) -> Tensor:
    return torch.randn(tokens, 32, generator=seeded(seed))


@pytest.fixture(scope="module")
def images() -> NovaPipeline:
    return open_pipe(CONFORMANCE / "text-to-image")


@pytest.fixture(scope="module")
def videos(tiny_checkpoint: Path) -> NovaPipeline:
    return open_pipe(tiny_checkpoint)


@pytest.fixture(scope="module")
def flow() -> NovaPipeline:
    return open_pipe(CONFORMANCE / "rotary-flow")


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    assert got.shape == expected.shape
    error = (got - expected).abs().max() / expected.abs().max()
    assert error < tolerance, f"relative error {error:.2e}"


# Reference cases ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("folder", "name"), CASES)
def test_reference_cases(folder: str, name: str) -> None:
    pipe = open_pipe(str(CONFORMANCE / folder) if name == "generate" else CONFORMANCE / folder)
    case = json.loads((CONFORMANCE / folder / "cases.json").read_text())["cases"][name]
    tensors = load_file(CONFORMANCE / folder / f"{name}.safetensors")

    def call(output_type: str) -> Tensor:
        result = pipe(
            prompt_embeds=[tensors[key] for key in sorted(tensors) if key.startswith("prompt_embeds")],
            num_frames=4 * (case.get("max_latent_length", 1) - 1) + 1,
            num_inference_steps=case["num_inference_steps"],
            num_diffusion_steps=case["num_diffusion_steps"],
            guidance_scale=case["guidance_scale"],
            num_images_per_prompt=case["num_images_per_prompt"],
            generator=seeded(case["seed"]),
            output_type=output_type,
        )
        return result.images if "max_latent_length" not in case else result.frames

    close(call("latent"), tensors["latents"])
    if "pixels" in tensors:
        pixels = (tensors["pixels"] / 2 + 0.5).clamp(0, 1)
        close(call("pt"), pixels if pixels.dim() == 4 else pixels.transpose(1, 2))


# What a call returns --------------------------------------------------------------------------------------------------


KEYWORDS: dict[str, Any] = {
    "negative_prompt": "b",
    "height": 64,
    "width": 96,
    "num_frames": 5,
    "fps": 8,
    "num_inference_steps": 2,
    "num_diffusion_steps": 2,
    "guidance_scale": 2.0,
    "guidance_trunc": 1.0,
    "guidance_renorm": 0.5,
    "image_guidance_scale": 1.0,
    "motion_flow": 3.0,
    "flow_shift": 2.0,
    "num_images_per_prompt": 2,
    "output_type": "np",
    "seconds": 0.5,
    "context_frames": 9,
    "sink_frames": 1,
    "history_noise": 0.1,
    "reanchor_frames": 8,
    "hold_statistics": 0.5,
    "compile": False,
    "preset": "fast",
    "solver": "dpm++",
    "last_steps": 0.5,
    "guided_sets": 0.5,
    "guidance_every": 2,
    "fp8": True,
    "memory_gb": 2.0,
    "num_videos_per_prompt": 2,
    "sets": 2,
    "num_sets": 2,
    "diffusion_steps": 2,
    "seed": 3,
}
"""Every keyword of a call that is a setting, those of version 0.1 and their new names -> a value."""
ALIASES = {
    "num_inference_steps": "sets",
    "num_sets": "sets",
    "num_diffusion_steps": "diffusion_steps",
    "num_videos_per_prompt": "num_images_per_prompt",
}


@pytest.mark.parametrize("name", KEYWORDS)
def test_every_keyword_reaches_the_request(videos: NovaPipeline, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[GenerateRequest] = []

    def start(request: GenerateRequest, generator: object) -> None:
        requests.append(request)
        raise InputError("started")

    monkeypatch.setattr(videos, "start", start)
    for call in (videos, videos.stream):
        with pytest.raises(InputError, match="started"):
            call("a whale", **{name: KEYWORDS[name]})
    for request in requests:
        assert getattr(request, ALIASES.get(name, name)) == getattr(request, name) == KEYWORDS[name]


def test_signature() -> None:
    """A call shows every setting and what belongs to the call alone; its first arguments may be given by place."""
    parameters = inspect.signature(NovaPipeline.__call__).parameters
    assert list(parameters)[1:11] == [
        *("prompt", "negative_prompt", "image", "height", "width", "num_frames", "fps", "num_inference_steps"),
        *("num_diffusion_steps", "guidance_scale"),
    ]
    own = {"generator", "return_dict", "callback_on_step_end", "callback_on_step_end_tensor_inputs"}
    media = {"video", "mask_image", "strength", "prompt_embeds", "negative_prompt_embeds", "disable_progress_bar"}
    assert own | media | KEYWORDS.keys() - ALIASES.keys() <= parameters.keys()


def test_output_types_of_one_frame(images: NovaPipeline) -> None:
    def call(output_type: str) -> Any:
        result = images(prompt_embeds=[features(), features(3)], generator=seeded(), output_type=output_type, **QUICK)
        assert result.frames is None
        assert not result.stopped
        return result.images

    pt, np_, pil, latent = (call(kind) for kind in ("pt", "np", "pil", "latent"))
    assert (pt.shape, pt.dtype) == ((2, 3, 64, 64), torch.float32)
    assert pt.min() >= 0
    assert pt.max() <= 1
    assert np.array_equal(np_, pt.permute(0, 2, 3, 1).numpy())
    assert [picture.size for picture in pil] == [(64, 64)] * 2
    assert np.abs(np.asarray(pil[1]) / 255 - np_[1]).max() <= 0.5 / 255 + 1e-6
    assert latent.shape == (2, 4, 1, 8, 8)


def test_output_types_of_clips_trimmed_to_the_frames_asked_for(videos: NovaPipeline) -> None:
    def call(output_type: str, num_frames: int = 3) -> Any:
        result = videos("a whale", num_frames=num_frames, fps=7, generator=seeded(), output_type=output_type, **QUICK)
        assert result.images is None
        assert (result.fps, result.seeds) == (7, (0,))
        return result.frames

    pt, np_, pil, latent = (call(kind) for kind in ("pt", "np", "pil", "latent"))
    assert pt.shape == (1, 3, 3, 64, 96)
    assert np.array_equal(np_, pt.permute(0, 1, 3, 4, 2).numpy())
    assert [[picture.size for picture in clip] for clip in pil] == [[(96, 64)] * 3]
    assert latent.shape == (1, 4, 2, 8, 12)
    assert torch.equal(call("pt", 5)[:, :3], pt)


def test_defaults_are_the_released_ones_or_the_checkpoint_s_own(tmp_path: Path) -> None:
    shutil.copytree(CONFORMANCE / "rotary-flow", tmp_path / "own")
    steps: list[int] = []

    def call(pipe: NovaPipeline) -> Any:
        steps.clear()
        return pipe(
            prompt_embeds=[features()],
            output_type="latent",
            generator=seeded(),
            callback_on_step_end=lambda _pipe, step, *_: steps.append(step),
        )

    result = call(open_pipe(tmp_path / "own"))
    assert (result.images.shape, result.fps, len(steps)) == ((1, 4, 1, 8, 12), 12, len(set_sizes(24, 64)))
    explicit = open_pipe(tmp_path / "own")(
        prompt_embeds=[features()],
        output_type="latent",
        generator=seeded(),
        num_frames=1,
        fps=12,
        num_inference_steps=64,
        num_diffusion_steps=25,
        guidance_scale=5.0,
        motion_flow=5.0,
        height=64,
        width=96,
    )
    assert torch.equal(explicit.images, result.images)

    CheckpointSettings(None, Defaults(num_frames=5, fps=8, num_inference_steps=2, num_diffusion_steps=3)).save(
        tmp_path / "own"
    )
    result = call(open_pipe(tmp_path / "own"))
    assert (result.frames.shape, result.fps, len(steps)) == ((1, 4, 2, 8, 12), 8, 4)


def test_every_number_counts(videos: NovaPipeline) -> None:
    """Each argument changes the result: none is an option that does nothing."""

    def call(**values: Any) -> Tensor:
        arguments: dict[str, Any] = {"prompt": "a whale", "num_frames": 5, "output_type": "latent", **QUICK, **values}
        return videos(generator=seeded(), **arguments).frames

    plain = call()
    for name, value in {
        "prompt": "a red apple",
        "negative_prompt": "a red apple",
        "fps": 30,
        "motion_flow": 1.0,
        "num_inference_steps": 3,
        "num_diffusion_steps": 3,
        "guidance_scale": 2.0,
        "guidance_trunc": 900.0,
        "guidance_renorm": 0.1,
        "image_guidance_scale": 2.0,
        "image": Image.new("RGB", (96, 64), "red"),
    }.items():
        assert not torch.equal(call(**{name: value}), plain), name


def test_images_per_prompt_in_place(images: NovaPipeline) -> None:
    """p0, p0, p1, p1: each picture with its own generator is the one its prompt gives alone."""
    prompts = [features(seed=1), features(seed=2)]
    together = images(
        prompt_embeds=prompts,
        num_images_per_prompt=2,
        generator=[seeded(seed) for seed in range(4)],
        output_type="latent",
        **QUICK,
    )
    assert together.seeds == (0, 1, 2, 3)
    for index in range(4):
        alone = images(
            prompt_embeds=[prompts[index // 2]], generator=seeded(index), output_type="latent", **QUICK
        ).images
        close(together.images[index : index + 1], alone)


def test_seed(images: NovaPipeline) -> None:
    """The seed fixes the result whatever ran before, and without one the result tells what was drawn."""
    request = GenerateRequest(prompt_embeds=[features()], seed=5, output_type="latent", **QUICK)
    first = images.generate(request).images
    drawn = images(prompt_embeds=[features()], output_type="latent", **QUICK)
    torch.manual_seed(3)
    assert torch.equal(images.generate(request).images, first)
    assert torch.equal(
        images(prompt_embeds=[features()], generator=seeded(5), output_type="latent", **QUICK).images, first
    )
    assert not torch.equal(drawn.images, first)
    again = images(prompt_embeds=[features()], generator=seeded(drawn.seeds[0]), output_type="latent", **QUICK)
    assert torch.equal(again.images, drawn.images)


# Prompts --------------------------------------------------------------------------------------------------------------


def test_negative_prompts(videos: NovaPipeline) -> None:
    """Text is guided from the encoded empty string; features from the padding table alone."""

    def call(**values: Any) -> Tensor:
        return videos(generator=seeded(), output_type="latent", **QUICK, **values).images

    encoded = list(encode_prompts(videos._parts(), ["a whale", ""]).values())
    assert encoded[1].shape == (2, 32)  # the empty string still has its two special tokens
    plain = call(prompt="a whale")
    assert torch.equal(call(prompt="a whale", negative_prompt=""), plain)
    assert torch.equal(call(prompt_embeds=[encoded[0]], negative_prompt_embeds=[encoded[1]]), plain)
    table = call(prompt_embeds=[encoded[0]])
    assert torch.equal(call(prompt_embeds=[encoded[0]], negative_prompt_embeds=[encoded[0][:0]]), table)
    assert not torch.equal(table, plain)
    pair = call(prompt=["a whale", "a red apple"], negative_prompt=["blue", "green"])
    close(
        call(prompt=["a whale", "a red apple"], negative_prompt="blue")[0], pair[0]
    )  # one text less in the encoder's batch


def test_guidance_off_with_features(images: NovaPipeline) -> None:
    off = images(prompt_embeds=[features()], guidance_scale=1.0, generator=seeded(), output_type="latent", **QUICK)
    zero = images(prompt_embeds=[features()], guidance_scale=0, generator=seeded(), output_type="latent", **QUICK)
    assert torch.equal(off.images, zero.images)
    barely = images(
        prompt_embeds=[features()], guidance_scale=1.0001, generator=seeded(), output_type="latent", **QUICK
    )
    assert (off.images - barely.images).abs().max() < 1e-2


def test_named_text_encoder_is_loaded_when_first_needed(tiny_text_encoder: Path, tmp_path: Path) -> None:
    shutil.copytree(CONFORMANCE / "rotary-flow", tmp_path / "named")
    CheckpointSettings(str(tiny_text_encoder), Defaults(num_inference_steps=2, num_diffusion_steps=2)).save(
        tmp_path / "named"
    )
    pipe = open_pipe(tmp_path / "named")
    assert not pipe._named_encoder.is_loaded
    first = pipe("a whale", generator=seeded(), output_type="latent").images
    assert pipe._named_encoder.is_loaded
    assert torch.equal(pipe("a whale", generator=seeded(), output_type="latent").images, first)
    assert not torch.equal(pipe("an apple", generator=seeded(), output_type="latent").images, first)


# A picture to begin with ----------------------------------------------------------------------------------------------


def test_image_to_video(videos: NovaPipeline) -> None:
    """Frame 0 is the picture as the autoencoder has it, sampled with the generator's first numbers."""
    picture = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    result = videos("a whale", image=picture, num_frames=5, generator=seeded(7), output_type="latent", **QUICK)
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None].float().sub(127.5).div(127.5)
    with torch.no_grad():
        posterior = videos.vae.encode(pixels).latent_dist
    noise = torch.randn(1, 4, 8, 12, generator=seeded(7))
    expected = (posterior.mean + posterior.std * noise) * videos.vae.config.scaling_factor
    close(result.frames[:, :, 0], expected)
    assert result.frames.shape == (1, 4, 2, 8, 12)
    other = videos("a whale", image=255 - picture, num_frames=5, generator=seeded(7), output_type="latent", **QUICK)
    assert not torch.equal(other.frames[:, :, 1], result.frames[:, :, 1])
    as_picture = Image.fromarray(picture)
    same = videos("a whale", image=as_picture, num_frames=5, generator=seeded(7), output_type="latent", **QUICK)
    assert torch.equal(same.frames, result.frames)


def test_image_of_any_size_covers_and_is_cropped() -> None:
    picture = Image.new("RGB", (40, 10), "black")
    picture.paste("white", (15, 0, 25, 10))  # the middle square
    pixels = image_to_pixels(picture, (32, 32))
    assert pixels.shape == (1, 3, 32, 32)
    assert (pixels > 0.9).float().mean() > 0.9
    gray = image_to_pixels(Image.new("L", (7, 9), 128), (32, 64))
    assert torch.all(gray == (128 - 127.5) / 127.5)
    exact = np.random.default_rng(0).integers(0, 256, (32, 64, 3), np.uint8)
    back = output_form(unit_frames(image_to_pixels(exact, (32, 64)).unsqueeze(2)), "pil")
    assert np.array_equal(np.asarray(back[0][0]), exact)


# Sizes ----------------------------------------------------------------------------------------------------------------


def test_another_size_with_rotary_positions(flow: NovaPipeline) -> None:
    result = flow(
        prompt_embeds=[features()], height=96, width=32, num_frames=5, output_type="latent", flow_shift=2.0, **QUICK
    )
    assert result.frames.shape == (1, 4, 2, 12, 4)


# Callbacks ------------------------------------------------------------------------------------------------------------


def test_callback_after_every_set(flow: NovaPipeline) -> None:
    seen: list[tuple[int, int]] = []
    shown: list[dict[str, Tensor]] = []

    def watch(pipe: NovaPipeline, step: int, frame: int, tensors: dict[str, Tensor]) -> None:
        assert pipe is flow
        seen.append((step, frame))
        shown.append({name: tensor.clone() for name, tensor in tensors.items()})

    result = flow(prompt_embeds=[features()], num_frames=5, output_type="latent", callback_on_step_end=watch, **QUICK)
    assert seen == [(0, 0), (1, 0), (2, 1), (3, 1)]
    assert shown[0]["latents"].shape == (1, 4, 8, 12)
    assert shown[0]["revealed"].shape == (1, 4, 6)
    assert [int(tensors["revealed"].sum()) for tensors in shown] == [7, 24, 7, 24]
    hidden = ~shown[0]["revealed"].repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert shown[0]["latents"][0, :, hidden[0]].abs().max() == 0
    assert torch.equal(shown[1]["latents"], result.frames[:, :, 0])
    assert torch.equal(shown[3]["latents"], result.frames[:, :, 1])


@pytest.mark.parametrize(("stop_at", "frames"), [(0, 1), (1, 1), (2, 1), (3, 2), (4, 2), (5, 3)])
def test_returning_false_stops_with_what_there_is(flow: NovaPipeline, stop_at: int, frames: int) -> None:
    calls: list[int] = []

    def stop(_pipe: NovaPipeline, step: int, _frame: int, _tensors: dict[str, Tensor]) -> bool:
        calls.append(step)
        return step != stop_at

    arguments: dict[str, Any] = {"prompt_embeds": [features()], "num_frames": 9, "output_type": "latent", **QUICK}
    whole = flow(generator=seeded(), **arguments).frames
    result = flow(generator=seeded(), callback_on_step_end=stop, **arguments)
    assert calls == list(range(stop_at + 1))
    assert result.stopped == (stop_at < 5)
    assert result.frames.shape[2] == frames
    if stop_at > 0:
        assert torch.equal(result.frames, whole[:, :, :frames])
    else:
        assert result.frames.count_nonzero() == 7 * 16  # one set of the first frame


def test_stopped_pictures_are_decoded(images: NovaPipeline) -> None:
    result = images(prompt_embeds=[features()], callback_on_step_end=lambda *_: False, **QUICK)
    assert result.stopped
    assert result.images[0].size == (64, 64)


# Calls do not touch each other ----------------------------------------------------------------------------------------


def test_a_failed_call_leaves_nothing_behind(videos: NovaPipeline) -> None:
    arguments: dict[str, Any] = {"prompt": "a whale", "num_frames": 5, "output_type": "latent", **QUICK}
    parts = [videos.transformer, videos.vae, videos.text_encoder]
    before = videos(generator=seeded(), **arguments).frames
    attributes = [{name: set(vars(module)) for name, module in part.named_modules()} for part in parts]
    scheduler = str(vars(videos.scheduler))

    def fail(*_: Any) -> None:
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        videos(generator=seeded(9), callback_on_step_end=fail, **arguments)
    assert [{name: set(vars(module)) for name, module in part.named_modules()} for part in parts] == attributes
    assert str(vars(videos.scheduler)) == scheduler
    assert torch.equal(videos(generator=seeded(), **arguments).frames, before)


def test_two_threads_share_a_pipeline(videos: NovaPipeline) -> None:
    """Different requests, their sets interleaved by force: each result is the one it has alone."""
    calls: list[dict[str, Any]] = [
        {"prompt": "a whale", "num_frames": 5, "num_inference_steps": 3, "num_diffusion_steps": 4},
        {"prompt": "a red apple", "num_frames": 9, "num_inference_steps": 2, "num_diffusion_steps": 3, "fps": 4},
    ]
    alone = [videos(generator=seeded(i), output_type="latent", **call).frames for i, call in enumerate(calls)]
    together: list[Any] = [None, None]
    turn = threading.Barrier(2, timeout=60)

    def work(index: int) -> None:
        def meet(_pipe: NovaPipeline, step: int, *_: Any) -> None:
            if step < 6:  # both have at least six sets
                turn.wait()

        together[index] = videos(
            generator=seeded(index), output_type="latent", callback_on_step_end=meet, **calls[index]
        ).frames

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(2):
        assert torch.equal(together[index], alone[index])


def test_no_gradients_and_no_global_random_numbers(images: NovaPipeline) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    latents = images(prompt_embeds=[features()], generator=seeded(), output_type="latent", **QUICK).images
    assert torch.equal(torch.rand(3), expected)
    assert not latents.requires_grad


# Opening, saving, moving ----------------------------------------------------------------------------------------------


def test_save_and_reopen(videos: NovaPipeline, tmp_path: Path) -> None:
    pipe = NovaPipeline(
        videos.transformer,
        videos.scheduler,
        videos.vae,
        videos.text_encoder,
        videos.tokenizer,
        CheckpointSettings(None, Defaults(num_inference_steps=2, num_diffusion_steps=2, num_frames=5, fps=8)),
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["_class_name"] == "NovaPipeline"
    assert not [path for path in (tmp_path / "saved").rglob("*") if path.suffix in (".bin", ".pt")]
    reopened = open_pipe(str(tmp_path / "saved"))
    assert reopened.settings == pipe.settings
    first = pipe("a whale", generator=seeded(), output_type="latent")
    again = reopened("a whale", generator=seeded(), output_type="latent")
    assert torch.equal(again.frames, first.frames)
    assert again.fps == 8


def test_save_without_optional_parts_and_in_shards(flow: NovaPipeline, tmp_path: Path) -> None:
    flow.save_pretrained(tmp_path / "saved", variant="fp16", max_shard_size="500KB")
    assert len(list((tmp_path / "saved" / "transformer").glob("*.safetensors"))) > 1
    reopened = open_pipe(tmp_path / "saved")
    assert reopened.vae is None
    for key, value in flow.transformer.state_dict().items():
        assert torch.equal(reopened.transformer.state_dict()[key], value)


def test_torch_dtype() -> None:
    folder = CONFORMANCE / "text-to-image"
    assert open_pipe(folder).transformer.dtype == open_pipe(folder).vae.dtype == torch.float32
    pipe = NovaPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    assert pipe.transformer.dtype == pipe.vae.dtype == torch.bfloat16
    pipe.set_progress_bar_config(disable=True)
    result = pipe(prompt_embeds=[features()], generator=seeded(), output_type="latent", **QUICK)
    assert result.images.dtype == torch.bfloat16
    assert pipe(prompt_embeds=[features()], **QUICK).images[0].size == (64, 64)
    by_part = {"transformer": torch.bfloat16, "default": torch.float16}
    mixed = NovaPipeline.from_pretrained(CONFORMANCE / "text-to-video", torch_dtype=by_part)
    assert (mixed.transformer.dtype, mixed.vae.dtype) == (torch.bfloat16, torch.float16)


def test_half_precision_from_text(tiny_checkpoint: Path) -> None:
    half = NovaPipeline.from_pretrained(tiny_checkpoint, torch_dtype=torch.float16)
    half.set_progress_bar_config(disable=True)
    red = Image.new("RGB", (96, 64), "red")
    result = half("a whale", image=red, num_frames=5, generator=seeded(), output_type="latent", **QUICK)
    assert (result.frames.shape, result.frames.dtype) == ((1, 4, 2, 8, 12), torch.float16)
    assert torch.isfinite(result.frames).all()


def test_cpu_offload(tiny_checkpoint: Path, videos: NovaPipeline) -> None:
    """The library's hooks, here with the processor as the device: every part is brought by its call and released."""
    pipe = open_pipe(tiny_checkpoint)
    pipe.enable_model_cpu_offload(device="cpu")
    brought: list[str] = []
    for name in ("text_encoder", "transformer", "vae"):
        hook = getattr(pipe, name)._hf_hook
        original = hook.pre_forward

        def counted(module: Any, *args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
            brought.append(_name)
            return _original(module, *args, **kwargs)

        hook.pre_forward = counted
    arguments: dict[str, Any] = {"prompt": "a whale", "num_frames": 3, "output_type": "pt", **QUICK}
    result = pipe(generator=seeded(), **arguments)
    assert list(dict.fromkeys(brought)) == ["text_encoder", "transformer", "vae"]
    assert torch.equal(result.frames, videos(generator=seeded(), **arguments).frames)
    assert all(hasattr(getattr(pipe, name), "_hf_hook") for name in ("text_encoder", "transformer", "vae"))
    assert torch.equal(pipe(generator=seeded(), **arguments).frames, result.frames)


def test_vae_slicing_and_tiling(images: NovaPipeline) -> None:
    latents: dict[str, Any] = {"prompt_embeds": [features(), features(3)], "output_type": "pt", **QUICK}
    whole = images(generator=seeded(), **latents).images
    images.enable_vae_slicing()
    sliced = images(generator=seeded(), **latents).images
    images.disable_vae_slicing()
    torch.testing.assert_close(sliced, whole, rtol=1e-4, atol=1e-5)
    images.enable_vae_tiling()
    assert images.vae.use_tiling
    assert images(generator=seeded(), **latents).images.shape == whole.shape
    images.disable_vae_tiling()
    assert not images.vae.use_tiling


def test_progress_bar(flow: NovaPipeline, capsys: pytest.CaptureFixture[str]) -> None:
    flow.set_progress_bar_config(disable=False, ascii=True)
    try:
        flow(prompt_embeds=[features()], num_frames=5, output_type="latent", **QUICK)
    finally:
        flow.set_progress_bar_config(disable=True)
    assert "4/4" in capsys.readouterr().err


# Wrong input ----------------------------------------------------------------------------------------------------------


def test_a_call_without_a_progress_bar(flow: NovaPipeline, capsys: pytest.CaptureFixture[str]) -> None:
    flow.set_progress_bar_config(disable=False)
    try:
        flow(prompt_embeds=[features()], output_type="latent", num_inference_steps=2, disable_progress_bar=True)
    finally:
        flow.set_progress_bar_config(disable=True)
    assert capsys.readouterr().err == ""


def test_text_without_a_text_encoder(flow: NovaPipeline) -> None:
    with pytest.raises(InputError, match="has no text_encoder/: expected prompt_embeds"):
        flow("a whale", output_type="latent")


def test_pixels_without_an_autoencoder(flow: NovaPipeline) -> None:
    with pytest.raises(InputError, match="has no vae/, which output_type 'pil' needs"):
        flow(prompt_embeds=[features()])
    with pytest.raises(InputError, match="has no vae/, which an image needs"):
        flow(prompt_embeds=[features()], image=Image.new("RGB", (8, 8)), num_frames=5, output_type="latent")
    with pytest.raises(InputError, match="which slicing needs"):
        flow.enable_vae_slicing()


def test_text_encoder_of_another_width(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from conftest import save_tiny_bert

    shutil.copytree(tiny_checkpoint, tmp_path / "wide")
    shutil.rmtree(tmp_path / "wide" / "text_encoder")
    save_tiny_bert(tmp_path / "wide" / "text_encoder", width=64)
    with pytest.raises(InputError, match="64 wide: expected 32"):
        open_pipe(tmp_path / "wide")("a whale", output_type="latent", **QUICK)


def test_the_null_prompt_is_an_empty_sentence(videos: NovaPipeline) -> None:
    """It is encoded like any other; guided by itself it is what guidance off gives."""
    steps: dict[str, Any] = {"num_frames": 1, "num_inference_steps": 2, "num_diffusion_steps": 2}
    steps["output_type"] = "latent"
    made = [videos("", guidance_scale=scale, generator=seeded(), **steps).images for scale in (1.0, 4.0)]
    torch.testing.assert_close(made[0], made[1], rtol=1e-4, atol=1e-5)


def test_no_code_of_a_checkpoint_is_run_on_request() -> None:
    NovaPipeline.from_pretrained(CONFORMANCE / "rotary-flow", trust_remote_code=False)
    with pytest.raises(InputError, match="trust_remote_code is True: expected False"):
        NovaPipeline.from_pretrained(CONFORMANCE / "rotary-flow", trust_remote_code=True)
    with pytest.raises(InputError, match="revison is no argument of from_pretrained: expected revision"):
        NovaPipeline.from_pretrained(CONFORMANCE / "rotary-flow", revison="main")


def test_autoencoder_of_other_channels(images: NovaPipeline) -> None:
    vae = AutoencoderKL(latent_channels=8, block_out_channels=[32], norm_num_groups=32)
    with pytest.raises(InputError, match="8 latent channels: expected the transformer's 4"):
        NovaPipeline(images.transformer, images.scheduler, vae)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt": 3}, "prompt is 3"),
        ({"max_latent_length": 9}, r"max_latent_length is no argument .* num_frames = 4 \(n - 1\) \+ 1"),
        ({"latents": torch.zeros(1)}, "latents is no argument of the pipeline: expected generator"),
        ({"num_frame": 9}, "num_frame is no argument of the pipeline: expected num_frames"),
        ({"num_frames": 0}, "num_frames is 0"),
        ({"num_inference_steps": 0}, "sets is 0"),
        ({"num_diffusion_steps": 0}, "diffusion_steps is 0"),
        ({"guidance_scale": -1}, "guidance_scale is -1"),
        ({"height": 100}, "size is 96x100"),
        ({"height": 128}, "size is 96x128: expected 96x64"),
        ({"flow_shift": 2.0}, "flow_shift is 2"),
        ({"generator": [torch.Generator()] * 2}, "generator: got a list of 2"),
    ],
)
def test_wrong_calls_fail_before_any_work(
    videos: NovaPipeline, values: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nova_video.pipeline.conditions.encode_prompts", lambda *_: pytest.fail("work was done"))
    with pytest.raises(InputError, match=message) as caught:
        videos(**{"prompt": "a whale", **values})
    assert "\n" not in str(caught.value)


def test_missing_and_corrupt_models(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'nowhere' not found"):
        NovaPipeline.from_pretrained("nowhere")
    shutil.copytree(CONFORMANCE / "rotary-flow", tmp_path / "copy")
    path = tmp_path / "copy" / "transformer" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(InputError, match="corrupt or truncated"):
        NovaPipeline.from_pretrained(tmp_path / "copy")


# On a GPU -------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("way", ["whole", "offload", "sequential"])
def test_gpu_gives_the_same_picture(tiny_checkpoint: Path, videos: NovaPipeline, way: str) -> None:
    """With the generator on the processor the random numbers are the same, so the pictures are close."""
    red = Image.new("RGB", (96, 64), "red")
    arguments: dict[str, Any] = {"prompt": "a whale", "num_frames": 5, "output_type": "pt", "image": red, **QUICK}
    expected = videos(generator=seeded(), **arguments).frames
    pipe = open_pipe(tiny_checkpoint)
    if way == "whole":
        pipe.to("cuda")
    elif way == "offload":
        pipe.enable_model_cpu_offload()
    else:
        pipe.enable_sequential_cpu_offload()
    close(pipe(generator=seeded(), **arguments).frames.cpu(), expected, 1e-2)
    assert pipe("a whale", generator=torch.Generator("cuda").manual_seed(0), **QUICK).images[0].size == (96, 64)
    if way == "offload":
        assert {part.device.type for part in (pipe.transformer, pipe.vae, pipe.text_encoder)} == {"cpu"}


def test_more_sets_than_tokens_are_said(tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe = NovaPipeline.from_pretrained(tiny_checkpoint)
    pipe.start(GenerateRequest(prompt_embeds=[torch.zeros(2, 32)], num_inference_steps=999, output_type="latent"))
    sets = len(set_sizes(24, 999))
    assert f"sets is 999, and a frame has 24 tokens: each is made in {sets} sets" in caplog.text
