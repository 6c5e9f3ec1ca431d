"""What people do with any diffusers pipeline, and what diffusers' own tests of its pipelines check.

Those tests are a mixin in diffusers' repository (tests/pipelines/test_pipelines_common.py), not in its package. Each of
its checks has a test here or in test_pipeline.py, test_lora.py or test_memory.py, but for these:

- `test_callback_inputs` changes latents from the callback: here sets are final, and a changed tensor is refused.
- `test_callback_cfg` changes guidance from the callback through an attribute of the pipeline: it would reach other
  calls that share the pipeline. `guidance_scale` takes a timeline.
- `test_encode_prompt_works_in_isolation` is kept, with features as a list, since prompts have different lengths.
- attention processors, `test_attention_slicing_forward_pass` and xformers: there are no processors to swap; the two
  switches change nothing and say so.
- group offload of the transformer and the autoencoder: both stay whole on the device, and `low_memory` replaces it.
- StableDiffusion's safety checker and IP adapters: there are none.
"""

import json
import logging
import re
import threading
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForText2Image, DiffusionPipeline
from diffusers.hooks import apply_layerwise_casting
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nova_video import NovaPipeline
from nova_video.common.errors import InputError
from nova_video.io.media import read_frames, read_metadata
from nova_video.pipeline.result import GenerateResult
from nova_video.pipeline.settings import CheckpointSettings, Defaults

QUICK: dict[str, Any] = {"num_inference_steps": 2, "num_diffusion_steps": 2}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint: Path) -> NovaPipeline:
    opened = quiet(NovaPipeline.from_pretrained(tiny_checkpoint))
    opened.settings = CheckpointSettings(None, Defaults(num_frames=5, fps=8, **QUICK))
    return opened


def draw(pipe: Any, **options: Any) -> np.ndarray:
    made = pipe(**{"prompt": "a whale", "generator": seeded(), "output_type": "np", **options})[0]
    return np.asarray(made)


# Results --------------------------------------------------------------------------------------------------------------


def test_images_or_frames_come_first(pipe: NovaPipeline) -> None:
    clip = pipe("a whale", generator=seeded(), output_type="np")
    assert clip[0] is clip.frames
    assert clip.to_tuple()[0] is clip.frames
    picture = pipe("a whale", num_frames=1, generator=seeded(), output_type="np")
    assert picture[0] is picture.images
    as_tuple = pipe("a whale", num_frames=1, generator=seeded(), output_type="np", return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert np.array_equal(as_tuple[0], picture.images)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_results_save_themselves_with_their_record(pipe: NovaPipeline, tmp_path: Path, output_type: str) -> None:
    result = pipe(["a whale", "a red apple"], generator=[seeded(3), seeded(4)], output_type=output_type)
    paths = result.save(tmp_path / "clip.mp4")
    assert [path.name for path in paths] == ["clip-1.mp4", "clip-2.mp4"]
    records = [read_metadata(path) for path in paths]
    assert [(record["prompt"], record["seed"]) for record in records] == [("a whale", 3), ("a red apple", 4)]
    assert records[0]["settings"]["sets"] == 2
    assert records[0]["settings"]["num_frames"] == 5
    (path,) = pipe("a whale", num_frames=1, generator=seeded(), output_type=output_type).save(tmp_path / "whale.png")
    saved = np.asarray(Image.open(path))
    assert saved.shape == (64, 96, 3)
    assert np.array_equal(saved, (draw(pipe, num_frames=1)[0] * 255).round().astype(np.uint8))


def test_frames_are_saved_as_a_numbered_sequence(tmp_path: Path) -> None:
    clip = np.arange(2 * 2 * 4 * 4 * 3).reshape(2, 2, 4, 4, 3) % 256 / 255
    one = GenerateResult(frames=clip[:1], fps=8, seeds=(3,))
    paths = one.save(tmp_path / "frame-%03d.png")
    assert [path.name for path in paths] == ["frame-001.png", "frame-002.png"]
    assert np.array_equal(read_frames(paths[1])[0][0], np.round(clip[0, 1] * 255))
    assert read_metadata(paths[0]) == {"seed": 3}
    with pytest.raises(InputError, match="got frame-%03d.png for 2 clips"):
        GenerateResult(frames=clip, fps=8, seeds=(3, 4)).save(tmp_path / "frame-%03d.png")


def test_latents_and_unknown_formats_are_not_saved(pipe: NovaPipeline, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="output_type is 'latent'"):
        pipe("a whale", num_frames=1, output_type="latent").save(tmp_path / "whale.png")
    with pytest.raises(InputError, match="extension"):
        pipe("a whale", num_frames=1).save(tmp_path / "whale.xyz")
    assert not list(tmp_path.iterdir())


def test_results_show_themselves_in_a_notebook(pipe: NovaPipeline) -> None:
    picture, clip = (pipe("a whale", num_frames=count)._repr_html_() for count in (1, 5))
    assert picture.startswith('<img src="data:image/png;base64,')
    assert '<video controls loop autoplay muted src="data:video/mp4;base64,' in clip
    assert pipe("a whale", num_frames=1, output_type="latent")._repr_html_() is None


# Saving, opening, sharing parts ---------------------------------------------------------------------------------------


def test_ways_to_another_pipeline_keep_parts_and_settings(pipe: NovaPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "saved")
    expected = draw(pipe)
    ways = {
        "components": NovaPipeline(**pipe.components),
        "from_pipe": NovaPipeline.from_pipe(pipe),
        "NovaPipeline": NovaPipeline.from_pretrained(tmp_path / "saved"),
        "DiffusionPipeline": DiffusionPipeline.from_pretrained(str(tmp_path / "saved")),
        "AutoPipeline": AutoPipelineForText2Image.from_pretrained(str(tmp_path / "saved")),
        "AutoPipeline.from_pipe": AutoPipelineForText2Image.from_pipe(pipe),
    }
    for name, other in ways.items():
        assert type(other) is NovaPipeline, name
        assert other.settings == pipe.settings, name
        assert np.array_equal(draw(quiet(other)), expected), name
    assert ways["from_pipe"].transformer is pipe.transformer


@pytest.mark.parametrize("part", ["transformer", "scheduler", "vae", "text_encoder", "tokenizer"])
def test_parts_given_to_diffusers_own_pipeline_are_taken(pipe: NovaPipeline, tmp_path: Path, part: str) -> None:
    pipe.save_pretrained(tmp_path)
    mine = getattr(pipe, part)
    assert getattr(DiffusionPipeline.from_pretrained(str(tmp_path), **{part: mine}), part) is mine
    if part in NovaPipeline._optional_components:
        assert getattr(DiffusionPipeline.from_pretrained(str(tmp_path), **{part: None}), part) is None
        without = {name: value for name, value in pipe.components.items() if name != part}
        assert getattr(NovaPipeline(**without), part) is None


def test_from_pipe_leaves_the_dtype_of_shared_parts(tiny_checkpoint: Path) -> None:
    half = NovaPipeline.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16)
    assert NovaPipeline.from_pipe(half).transformer.dtype == torch.bfloat16
    assert NovaPipeline.from_pipe(half, vae=None).vae is None
    with pytest.raises(InputError, match="vea is no argument of from_pipe: expected vae"):
        NovaPipeline.from_pipe(half, vea=None)


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("shards_first", [True, False])
def test_saves_into_the_same_folder(
    tiny_checkpoint: Path, tmp_path: Path, shards_first: bool, variant: str | None
) -> None:
    """One with shards and one without: the later one is what opens."""
    pipe = quiet(NovaPipeline.from_pretrained(tiny_checkpoint))  # its own, since its weights change
    for shards in (shards_first, not shards_first):
        for part in (pipe.transformer, pipe.vae, pipe.text_encoder):
            next(part.parameters()).data.fill_(float(shards))
        pipe.save_pretrained(tmp_path, variant=variant, max_shard_size="200KB" if shards else None)
    opened = NovaPipeline.from_pretrained(tmp_path, variant=variant)
    for part in (opened.transformer, opened.vae, opened.text_encoder):
        assert next(part.parameters()).unique().tolist() == [float(not shards_first)]


def test_variants(pipe: NovaPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "both")
    other = NovaPipeline.from_pipe(pipe)
    other.save_pretrained(tmp_path / "both", variant="fp16")
    (tmp_path / "both" / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    weights = tmp_path / "both" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(b"no weights")
    assert np.array_equal(draw(quiet(NovaPipeline.from_pretrained(tmp_path / "both", variant="fp16"))), draw(pipe))
    with pytest.raises(InputError, match="corrupt or truncated"):
        NovaPipeline.from_pretrained(tmp_path / "both")
    with pytest.raises(InputError, match="variant is 'bf16': expected one that"):
        NovaPipeline.from_pretrained(tmp_path / "both", variant="bf16")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_safetensors": False}, "use_safetensors is False: expected True"),
        ({"low_cpu_mem_usage": False}, "low_cpu_mem_usage is False: expected True"),
        ({"device_map": "balanced"}, "device_map is 'balanced': expected one device"),
        ({"device_map": {"transformer": 0}}, "expected one device such as 'cuda'"),
        ({"device_map": "nowhere"}, "device_map is 'nowhere': expected a device"),
        ({"torch_dtype": "float16"}, "torch_dtype is 'float16': expected a dtype"),
        ({"torch_dtype": torch.float16, "dtype": torch.float16}, "got both of torch_dtype and dtype"),
        ({"custom_pipeline": "x"}, "custom_pipeline is no argument.*no code"),
        ({"quantization_config": {}}, "quantization_config is no argument.*fp8=True"),
        ({"pretrained_model_name_or_path": None}, "model is None: expected a folder or a hub id"),
        ({"revison": "main"}, "revison is no argument of from_pretrained: expected revision"),
    ],
)
def test_ways_to_open_that_are_refused(tiny_checkpoint: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        NovaPipeline.from_pretrained(**{"pretrained_model_name_or_path": tiny_checkpoint, **options})


def test_ways_to_open_that_change_nothing_here(tiny_checkpoint: Path, tmp_path: Path) -> None:
    opened = NovaPipeline.from_pretrained(
        tiny_checkpoint,
        dtype={"transformer": torch.bfloat16, "default": torch.float32},
        use_safetensors=True,
        device_map="cpu",
        cache_dir=tmp_path,
        force_download=True,
        low_cpu_mem_usage=True,
    )
    assert (opened.transformer.dtype, opened.vae.dtype) == (torch.bfloat16, torch.float32)


# The Hub, with a stand-in ---------------------------------------------------------------------------------------------


def test_push_to_hub_takes_a_card_that_opens_it(
    pipe: NovaPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: dict[str, Any] = {}

    def create(repo_id: str, **options: Any) -> Any:
        made["created"] = (repo_id, options)
        return type("Url", (), {"repo_id": f"someone/{repo_id}"})

    def upload(repo_id: str, folder_path: Path, **options: Any) -> str:
        made["files"] = sorted(str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*.*"))
        made["card"] = huggingface_hub.ModelCard.load(Path(folder_path) / "README.md")
        made["uploaded"] = (repo_id, options)
        return "https://hub/commit"

    monkeypatch.setattr(huggingface_hub, "create_repo", create)
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload)
    base = tmp_path / "my-base"
    pipe.save_pretrained(base)
    (base / "README.md").write_text("---\nlicense: mit\ndatasets:\n- someone/clips\ntags:\n- whales\n---\n")
    assert NovaPipeline.from_pretrained(base).push_to_hub("whales", private=True) == "https://hub/commit"
    assert made["created"] == ("whales", {"exist_ok": True, "private": True})
    assert made["uploaded"][0] == "someone/whales"
    assert {"model_index.json", "nova.json", "README.md"} <= set(made["files"])
    assert not [name for name in made["files"] if name.endswith((".py", ".bin"))]
    data = made["card"].data.to_dict()
    assert (data["base_model"], data["license"], data["datasets"]) == ("my-base", "mit", ["someone/clips"])
    assert {"whales", "nova-video", "text-to-video"} <= set(data["tags"])
    assert re.findall(r"NovaPipeline.from_pretrained\(.*\)", made["card"].content) == [
        "NovaPipeline.from_pretrained('whales')"
    ]
    pipe.save_pretrained(tmp_path / "again", push_to_hub=True, repo_id="whales", commit_message="New")
    assert made["uploaded"][1]["commit_message"] == "New"
    with pytest.raises(InputError, match="safe_serialization is False: expected True"):
        pipe.save_pretrained(tmp_path / "pickles", safe_serialization=False)
    with pytest.raises(InputError, match="repo is no argument of save_pretrained"):
        pipe.save_pretrained(tmp_path / "none", repo="x")


def test_saved_folders_name_their_classes(pipe: NovaPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "NovaPipeline"
    assert index["scheduler"] == ["diffusers", "DDPMScheduler"]
    assert getattr(diffusers, index["_class_name"]) is NovaPipeline


# Batches and prompts --------------------------------------------------------------------------------------------------


def test_a_batch_holds_what_each_prompt_gives_alone(pipe: NovaPipeline) -> None:
    prompts = ["a whale", "a red apple moving left", "the blue apple"]
    together = draw(pipe, prompt=prompts, num_frames=1, generator=[seeded(n) for n in range(3)])
    for number, prompt in enumerate(prompts):
        alone = draw(pipe, prompt=prompt, num_frames=1, generator=seeded(number))
        np.testing.assert_allclose(together[number], alone[0], atol=1e-4)


def test_several_for_a_prompt_by_either_name(pipe: NovaPipeline) -> None:
    several = draw(pipe, prompt=["a whale", "a red apple"], num_frames=1, num_images_per_prompt=2)
    assert len(several) == 4
    assert np.array_equal(draw(pipe, prompt=["a whale", "a red apple"], num_frames=1, num_videos_per_prompt=2), several)
    with pytest.raises(InputError, match="num_images_per_prompt 2 and num_videos_per_prompt 3"):
        pipe("a whale", num_images_per_prompt=2, num_videos_per_prompt=3)


def test_encoded_prompts_give_what_sentences_give(pipe: NovaPipeline) -> None:
    embeds, negatives = pipe.encode_prompt(["a whale", "a red apple"], negative_prompt="blue")
    again = draw(pipe, prompt=None, prompt_embeds=embeds, negative_prompt_embeds=negatives)
    assert np.array_equal(again, draw(pipe, prompt=["a whale", "a red apple"], negative_prompt="blue"))
    assert pipe.encode_prompt("a whale", do_classifier_free_guidance=False)[1] is None


def test_encode_prompt_takes_the_arguments_of_others(pipe: NovaPipeline) -> None:
    """The order is that of StableDiffusion: device, pictures a prompt, guidance, negatives."""
    expected, negatives = pipe.encode_prompt(["a whale", "a red apple"], negative_prompt="blue")
    rows, others = pipe.encode_prompt(["a whale", "a red apple"], "cpu", 2, True, "blue", prompt_embeds=None)
    assert negatives is not None
    assert others is not None
    assert len(others) == 1
    for made, row in zip([*rows, *others], [*expected[:1] * 2, *expected[1:] * 2, *negatives], strict=True):
        torch.testing.assert_close(made, row, rtol=0, atol=0)
    embeds, both = pipe.encode_prompt("a whale", device=torch.device("cpu"), num_images_per_prompt=2)
    twice = draw(pipe, prompt="a whale", num_frames=1, num_images_per_prompt=2)
    made = draw(pipe, prompt=None, prompt_embeds=embeds, negative_prompt_embeds=both, num_frames=1)
    np.testing.assert_allclose(made, twice, atol=1e-4)  # the shapes of two prompts are not those of one


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda"}, "device is 'cuda': expected cpu"),
        ({"device": "nowhere"}, "device is 'nowhere': expected cpu"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0: expected a whole number"),
        ({"num_videos_per_prompt": 2}, "num_videos_per_prompt is no argument.*: expected num_images_per_prompt"),
        ({"prompt_embeds": []}, "prompt_embeds is no argument of encode_prompt: expected it in the call"),
        ({"clip_skip": 2}, "clip_skip is no argument of encode_prompt: expected prompt_embeds"),
    ],
)
def test_encode_prompt_refuses_the_rest(pipe: NovaPipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        pipe.encode_prompt("a whale", **options)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("latents", "generator for a fixed start"),
        ("guidance_rescale", "guidance_renorm"),
        ("num_inference_step", "num_inference_steps"),
        ("sigmas", "diffusion_steps and flow_shift"),
        ("eta", "DDPMScheduler"),
    ],
)
def test_unknown_arguments_name_what_to_write(pipe: NovaPipeline, name: str, expected: str) -> None:
    with pytest.raises(InputError, match=f"{name} is no argument of the pipeline: expected .*{expected}"):
        pipe("a whale", **{name: 1})


def test_sets_are_told_from_denoising_steps(pipe: NovaPipeline) -> None:
    with pytest.raises(InputError, match="sets is 0: .*num_inference_steps counts sets.*diffusion_steps"):
        pipe("a whale", num_inference_steps=0)


# Callbacks ------------------------------------------------------------------------------------------------------------


def test_callbacks_see_their_own_call(pipe: NovaPipeline) -> None:
    seen: list[Any] = []

    def watch(called: NovaPipeline, step: int, frame: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        own = (called.guidance_scale, called.do_classifier_free_guidance, called.num_timesteps, called.interrupt)
        seen.append((step, frame, sorted(tensors), own))
        return tensors

    draw(pipe, guidance_scale=[(0, 3.0), (0.1, 1.0)], callback_on_step_end=watch)
    own = [(3.0, True, 4, False), (1.0, False, 4, False)]
    names = ["latents", "revealed"]
    assert seen == [(0, 0, names, own[0]), (1, 0, names, own[0]), (2, 1, names, own[1]), (3, 1, names, own[1])]
    assert (pipe.guidance_scale, pipe.num_timesteps, pipe.interrupt) == (5.0, None, False)
    seen.clear()
    draw(pipe, num_frames=1, callback_on_step_end=watch, callback_on_step_end_tensor_inputs=["latents"])
    assert [names for _, _, names, _ in seen] == [["latents"], ["latents"]]


def test_callbacks_that_cannot_be_followed_are_refused(pipe: NovaPipeline) -> None:
    with pytest.raises(InputError, match="tensor_inputs has 'prompt_embeds': expected of latents and revealed"):
        pipe("a whale", callback_on_step_end=print, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    with pytest.raises(InputError, match="tensor_inputs has 'prompt_embeds'"):
        pipe("a whale", callback_on_step_end=diffusers.callbacks.SDCFGCutoffCallback(cutoff_step_ratio=0.5))
    with pytest.raises(InputError, match="callback_on_step_end is 5: expected a function"):
        pipe("a whale", callback_on_step_end=5)
    with pytest.raises(InputError, match="returned another latents: expected what it got"):
        pipe("a whale", callback_on_step_end=lambda *given: {"latents": given[3]["latents"] * 0})


def test_interrupting_stops_its_own_call_alone(pipe: NovaPipeline) -> None:
    """From a callback the call that it belongs to; from elsewhere all calls that run."""
    meet, results = threading.Barrier(2, timeout=60), {}

    def work(name: str) -> None:
        def step_end(called: NovaPipeline, step: int, *_: Any) -> None:
            if step < 2:
                meet.wait()
            if name == "stops" and step == 1:
                called._interrupt = True
                assert called.interrupt

        results[name] = pipe("a whale", generator=seeded(), output_type="np", callback_on_step_end=step_end)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("stops", "goes on")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (results["stops"].stopped, results["stops"].frames.shape[1]) == (True, 1)
    assert (results["goes on"].stopped, results["goes on"].frames.shape[1]) == (False, 5)

    def from_elsewhere(called: NovaPipeline, *_: Any) -> None:
        other = threading.Thread(target=setattr, args=(called, "_interrupt", True))
        other.start()
        other.join()

    assert pipe("a whale", callback_on_step_end=from_elsewhere).stopped
    assert not pipe("a whale").stopped


# Switches -------------------------------------------------------------------------------------------------------------


def test_switches_without_an_effect_say_so(pipe: NovaPipeline, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        pipe.enable_attention_slicing()
        pipe.enable_xformers_memory_efficient_attention()
    assert ["changes nothing" in record.message for record in caplog.records] == [True, True]


def test_layerwise_casting_rounds_the_weights_of_blocks(tiny_checkpoint: Path) -> None:
    """Stored in 8 bits, computed in float32: what a model with weights rounded beforehand gives, in threads too."""
    cast, rounded = (quiet(NovaPipeline.from_pretrained(tiny_checkpoint)) for _ in range(2))
    cast.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    for encoder in (rounded.transformer.video_encoder, rounded.transformer.image_encoder):
        for module in encoder.blocks.modules():
            if isinstance(module, torch.nn.Linear):
                module.to(torch.float8_e4m3fn).to(torch.float32)
    stored = cast.transformer.image_encoder.blocks[0]
    assert (stored.attn.qkv.weight.dtype, stored.norm1.weight.dtype) == (torch.float8_e4m3fn, torch.float32)
    assert cast.transformer.dtype == torch.float32
    expected = draw(rounded, num_frames=5, **QUICK)
    made: list[np.ndarray] = []
    threads = [threading.Thread(target=lambda: made.append(draw(cast, num_frames=5, **QUICK))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for compile in (True, False):
        made.append(draw(cast, num_frames=5, compile=compile, **QUICK))
    assert len(made) == 4
    for each in made:
        np.testing.assert_allclose(each, expected, atol=1e-4)
    with pytest.raises(InputError, match="cast already"):
        cast.transformer.enable_layerwise_casting()


@pytest.mark.parametrize("patterns", [{}, {"skip_modules_pattern": ("norm",)}], ids=["auto", "embeddings"])
def test_the_librarys_layerwise_casting_computes(tiny_checkpoint: Path, patterns: dict[str, Any]) -> None:
    """diffusers' function casts single layers, also those outside of blocks."""
    cast, rounded = (quiet(NovaPipeline.from_pretrained(tiny_checkpoint)) for _ in range(2))
    apply_layerwise_casting(cast.transformer, torch.float8_e4m3fn, torch.float32, **patterns)
    names = {name for name, value in cast.transformer.named_parameters() if value.dtype == torch.float8_e4m3fn}
    assert "image_encoder.blocks.0.attn.qkv.weight" in names
    assert "image_decoder.time_cond_embed.timestep_proj.fc1.weight" in names
    for name, value in rounded.transformer.named_parameters():
        if name in names:
            value.data = value.data.to(torch.float8_e4m3fn).to(torch.float32)
    expected = draw(rounded, num_frames=5, **QUICK)
    for compile in (True, False):
        np.testing.assert_allclose(draw(cast, num_frames=5, compile=compile, **QUICK), expected, atol=1e-4)


@pytest.mark.parametrize("kind", [{"offload_type": "leaf_level"}, {"num_blocks_per_group": 1}])
def test_group_offload_leaves_transformer_and_autoencoder_whole(
    pipe: NovaPipeline, tiny_checkpoint: Path, kind: dict[str, Any]
) -> None:
    offloaded = quiet(NovaPipeline.from_pretrained(tiny_checkpoint))
    offloaded.enable_group_offload(torch.device("cpu"), **kind)
    hooked = {
        name: any(hasattr(module, "_diffusers_hook") for module in getattr(offloaded, name).modules())
        for name in ("text_encoder", "transformer", "vae")
    }
    assert hooked == {"text_encoder": True, "transformer": False, "vae": False}
    options = {"num_frames": 5, "fps": 8, **QUICK}
    assert np.array_equal(draw(offloaded, **options), draw(pipe))


class NoFloat64(TorchDispatchMode):
    """Fails where a tensor that is no table of a scheduler is in float64, which Apple's GPUs (mps) lack."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, list | tuple) else [made]:
            assert not (isinstance(tensor, Tensor) and tensor.dtype == torch.float64 and tensor.dim() > 1), func
        return made


def test_nothing_is_computed_in_float64(pipe: NovaPipeline) -> None:
    with NoFloat64():
        draw(pipe, image=Image.new("RGB", (96, 64)), guidance_renorm=0.5, image_guidance_scale=1.0)
        draw(pipe, compile=False, preset="fast", history_noise=0.1)


def test_to_another_dtype_and_back(tiny_checkpoint: Path) -> None:
    moved = quiet(NovaPipeline.from_pretrained(tiny_checkpoint))
    assert moved.to(torch.bfloat16).transformer.dtype == torch.bfloat16
    assert draw(moved, **QUICK).dtype == np.float32
    assert moved.to("cpu", torch.float32).vae.dtype == torch.float32


@pytest.mark.parametrize("device", ["mps", "cuda:99", torch.device("cuda:99"), 99, -1, "nowhere", "auto"])
def test_to_a_device_that_is_not_there(pipe: NovaPipeline, monkeypatch: pytest.MonkeyPatch, device: Any) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for move in (lambda: pipe.to(device), lambda: pipe.to(device=device), lambda: pipe.to(device, torch.float32)):
        with pytest.raises(InputError, match="device") as caught:
            move()
        assert "\n" not in str(caught.value)
    assert pipe.device.type == "cpu"


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("transformer", None, "transformer is None: expected NOVATransformer3DModel"),
        ("scheduler", None, "scheduler is None: expected SchedulerMixin"),
        ("vae", torch.nn.Linear(1, 1), "vae is Linear: expected ModelMixin"),
        ("text_encoder", "a/folder", "text_encoder is str: expected PreTrainedModel"),
    ],
)
def test_parts_that_are_none(pipe: NovaPipeline, part: str, value: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"{message}$"):
        NovaPipeline(**pipe.components | {part: value})


def test_a_transformer_that_torch_compile_wraps_is_a_part(pipe: NovaPipeline) -> None:
    wrapped = torch.compile(pipe.transformer)
    assert NovaPipeline(**pipe.components | {"transformer": wrapped}).transformer is wrapped
