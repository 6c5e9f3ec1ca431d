"""What of a prompt a small model does not know is said; nothing is said of a caption that it was trained on."""

import json
import logging
import random
import shutil
from pathlib import Path

import pytest

from nova_video import NovaPipeline
from nova_video.cli.main import main
from nova_video.common.errors import InputError
from nova_video.io.checkpoints import PACKAGED_MODELS
from nova_video.text.vocabulary import HINT, VOCABULARY_FILE, Vocabulary, WordList
from nova_worlds.rendering.captions import (
    CLIP_WORDINGS,
    IMAGE_WORDINGS,
    PAIR_WORDINGS,
    clip_caption,
    image_caption,
    pair_caption,
)
from nova_worlds.rendering.lexicon import COLORS, MOTIONS, RELATIONS, SPEEDS
from nova_worlds.rendering.shapes import prepare_shapes

CAPTIONS = 2000  # drawn of each kind


@pytest.fixture(scope="module")
def emoji() -> Vocabulary:
    found = Vocabulary.load(PACKAGED_MODELS / "emoji")
    assert found is not None
    return found


@pytest.fixture(scope="module")
def names(emoji: Vocabulary) -> list[str]:
    return [name for found in emoji.words if found.kind == "object" for name in found.phrases]


def test_bundled_model_knows_its_words(emoji: Vocabulary, names: list[str]) -> None:
    assert len(names) == 285
    counts = {kind: sum(len(each.phrases) for each in emoji.words if each.kind == kind) for kind in ("motion", "speed")}
    assert counts == {"motion": len(MOTIONS), "speed": 2}


def test_no_caption_of_training_is_unknown(emoji: Vocabulary, names: list[str]) -> None:
    rng = random.Random(0)
    for _ in range(CAPTIONS):
        first, second, color = rng.choice(names), rng.choice(names), rng.choice(COLORS)
        clip = clip_caption(first, rng.choice(MOTIONS), rng.choice(SPEEDS), color, rng.randrange(len(CLIP_WORDINGS)))
        image = image_caption(first, color, rng.randrange(len(IMAGE_WORDINGS)))
        wording, mirrored = rng.randrange(len(PAIR_WORDINGS)), rng.random() < 0.5
        pair = pair_caption(first, rng.choice(RELATIONS), second, color, wording, mirrored)
        for caption, picture in ((clip, False), (image, True), (pair, True)):
            for written in (caption, caption.upper(), caption.capitalize() + "."):
                assert emoji.problems(written, picture) == [], written


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [
        ("a wale moving left", 'not known: "wale"; did you mean "whale"?'),
        ("ein Wal", 'not known: "ein wal"'),
        ("a dog on a skateboard at sunset", 'not known: "skateboard at sunset"'),
        ("an elefant bouncing", 'not known: "elefant"; did you mean "elephant"?'),
        ("a blue apple on a white background", 'not known: "blue apple"; did you mean "red apple" or "green apple"?'),
        ("a hippo moving up", 'not known: "hippo"; did you mean "hippopotamus"?'),
        (
            "a whale spinning",
            'not known: "spinning"; did you mean "spinning clockwise" or "spinning counterclockwise"?',
        ),
        ("a purple whale on a white background", 'not known: "purple"'),
        ("two whales", 'not known: "two whales"; did you mean "whale"?'),
        ("🐋 moving left", 'not known: "🐋"'),
        ("moving left on a blue background", 'no object that is known in "moving left on a blue background"'),
        ("a whale moving up moving left", '2 motions in "a whale moving up moving left": expected 1 at most'),
        (
            "a whale on a red background on a blue background",
            '2 backgrounds in "a whale on a red background on a blue background": expected 1 at most',
        ),
        ("a whale on a red apple", 'the words are known, but not put together so: "a whale on a red apple"'),
        ("a whale above", 'the words are known, but not put together so: "a whale above"'),
        ("a whale above a dog", 'known of pictures alone, which have one frame: "a whale above a dog"'),
    ],
)
def test_what_is_not_known_is_said(emoji: Vocabulary, prompt: str, problem: str) -> None:
    assert emoji.problems(prompt) == [problem]


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a whale",
        "The whale, moving left.",
        "whale on blue background",
        "cherries are bouncing",
        "owl on a red background growing",
    ],
)
def test_harmless_wordings_are_known(emoji: Vocabulary, prompt: str) -> None:
    """Case, articles, punctuation, the order of the parts, and parts that are left out."""
    assert emoji.problems(prompt) == []


def test_a_call_names_each_problem_once(emoji: Vocabulary) -> None:
    prompts = ["a wale", "a whale", "a wale"]
    assert emoji.check(prompts, ["blurry whale"]) == (
        'not known: "wale"; did you mean "whale"?',
        'not known: "blurry" (negative prompt)',
    )


def test_a_file_says_the_same_again(emoji: Vocabulary, tmp_path: Path) -> None:
    emoji.save(tmp_path)
    assert Vocabulary.load(tmp_path) == emoji
    assert Vocabulary.load(tmp_path.parent) is None


def test_a_model_that_learns_more_knows_both_worlds(emoji: Vocabulary, tmp_path: Path) -> None:
    world = prepare_shapes(tmp_path / "shapes", score_clips=1)
    own = world.vocabulary(frames=(1,), pairs=False)
    assert own.problems("a ring on a white background", picture=True) == []
    assert own.problems("a ring moving left") == ['not known: "moving left"']
    both = emoji + own
    assert both.problems("a ring moving left") == both.problems("a whale moving left") == []
    assert emoji.problems("a ring moving left") != []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "is not a vocabulary"),
        ("{", "is not a vocabulary"),
        ('{"format": 2}', "format is 2: expected 1"),
        ('{"format": 1, "words": [{"kind": "object"}]}', "is not a vocabulary"),
        ('{"format": 1, "words": [], "clips": ["{object}"], "pictures": [], "ignored": []}', "expected the kind of"),
        ('{"format": 1, "words": [], "clips": ["[on"], "pictures": [], "ignored": []}', "as many opening brackets"),
        ('{"format": 1, "words": [], "clips": "on", "pictures": [], "ignored": []}', "expected a list of texts"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / VOCABULARY_FILE).write_text(content)
    with pytest.raises(InputError, match=message):
        Vocabulary.load(tmp_path)


@pytest.fixture(scope="module")
def small(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with a vocabulary."""
    folder = tmp_path_factory.mktemp("vocabulary") / "small"
    shutil.copytree(tiny_checkpoint, folder)
    objects, motions = WordList("object", "things", ("whale", "apple")), WordList("motion", "motions", ("moving left",))
    Vocabulary((objects, motions), ("{object} [{motion}]",), (), ("a", "the")).save(folder)
    return folder


QUICK = {"num_inference_steps": 1, "num_diffusion_steps": 1, "num_frames": 5, "output_type": "latent", "seed": 0}


def test_python_is_warned_once_a_call(small: Path, caplog: pytest.LogCaptureFixture) -> None:
    from nova_video.pipeline.request import GenerateRequest

    pipe = NovaPipeline.from_pretrained(small)
    for prompt, said in (
        ("a whale moving left", []),
        ([(0, "a whale"), (0.2, "an appel")], ['not known: "an appel"; did you mean "apple"?']),
        (["a wale", "the whale"], ['not known: "wale"; did you mean "whale"?']),
    ):
        caplog.clear()
        generation = pipe.start(GenerateRequest(prompt=prompt, **QUICK))
        assert list(generation.warnings) == said
        assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
            f"{line} {HINT}" for line in said
        ]


def test_a_record_has_the_problems_of_its_own_prompt(small: Path) -> None:
    from nova_video.pipeline.request import GenerateRequest

    result = NovaPipeline.from_pretrained(small).generate(GenerateRequest(["a wale", "a whale"], **QUICK))
    assert [record["warnings"] for record in result.records] == [['not known: "wale"; did you mean "whale"?'], []]


def test_words_travel_with_the_checkpoint(small: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    NovaPipeline.from_pretrained(small).save_pretrained(tmp_path)
    assert Vocabulary.load(tmp_path) == Vocabulary.load(small)
    assert NovaPipeline.from_pretrained(tiny_checkpoint).settings.vocabulary is None
    assert NovaPipeline.from_pretrained(small, transformer=tiny_checkpoint).settings.vocabulary is None


def test_an_adapter_may_know_other_words(small: Path, tmp_path: Path) -> None:
    from peft import LoraConfig

    pipe = NovaPipeline.from_pretrained(small)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["qkv"]), "own")
    pipe.save_lora_weights(tmp_path, "own")
    pipe = NovaPipeline.from_pretrained(small)
    pipe.load_lora_weights(tmp_path)
    assert pipe.settings.vocabulary is None


def test_command_says_it(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "made.mp4"
    settings = ["--num-frames", "5", "--sets", "1", "--diffusion-steps", "1", "--seed", "0"]
    assert main(["generate", "a wale", "-o", str(output), "--model", str(small), "--json", *settings]) == 0
    printed = capsys.readouterr()
    line = 'not known: "wale"; did you mean "whale"?'
    assert json.loads(printed.out)["warnings"] == [line]
    assert main(["info", str(output), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["warnings"] == [line]


def test_words_are_printed(capsys: pytest.CaptureFixture[str], emoji: Vocabulary) -> None:
    assert main(["words"]) == 0
    printed = capsys.readouterr().out
    assert "animals and nature (157)" in printed
    assert "backgrounds (12)" in printed
    assert main(["words", "apple", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["words"]
    assert [entry["phrases"] for entry in found] == [["pineapple", "red apple", "green apple"]]
    assert main(["words", "zzz"]) == 2
    assert "no word of emoji has 'zzz' in it" in capsys.readouterr().err


def test_a_model_of_any_text_has_no_words(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["words", "--model", str(tiny_checkpoint)]) == 2
    assert "a released checkpoint reads any text" in capsys.readouterr().err
