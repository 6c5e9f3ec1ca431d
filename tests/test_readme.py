"""What the README and the model card say is so: their numbers are those of the files beside the weights."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from nova_worlds.judging.rates import Rate
from nova_worlds.rendering.lexicon import COLORS, MOTIONS
from nova_worlds.rendering.split import is_held_out

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
MODEL = ROOT / "src" / "nova_video" / "models" / "emoji"
CARD = MODEL / "README.md"
PAGES = [*sorted(ROOT.glob("*.md")), CARD, *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = ("autoencoder", "emoji-image", "emoji-video", "emoji-beyond")  # in the order of training
SCORES = {  # in scores.json -> on the pages
    "background": "background",
    "motion": "motion",
    "object": "object",
    "object_top5": "object among the five best",
    "all": "background, motion and object",
    "relation": "relation of two objects",
    "both_objects": "both of two objects",
}
LINK = re.compile(r"!?\[[^\]]*\]\(([^)#\s]*)(?:#([^)\s]+))?\)")
MOTIONS_SPUN = [motion for motion in MOTIONS if motion.startswith("spinning")]


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    return json.loads((MODEL / "scores.json").read_text(encoding="utf-8"))


def rate_of(record: dict[str, Any]) -> Rate:
    return Rate(record["right"], record["of"])


def tables(page: Path) -> dict[str, list[list[str]]]:
    """First cell of every row of the page's tables -> the other cells of the rows that start so."""
    rows: dict[str, list[list[str]]] = {}
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("| "):
            first, *rest = (cell.strip() for cell in line.strip("|").split("|"))
            rows.setdefault(first, []).append(rest)
    return rows


def test_scores_of_the_readme(recorded: dict[str, Any]) -> None:
    shown = tables(README)
    for key, label in SCORES.items():
        rate = rate_of(recorded["scores"]["generated"][key])
        assert [str(rate), str(rate.total)] in shown[label + " (pictures)" * (key in ("relation", "both_objects"))]


def test_scores_of_the_model_card(recorded: dict[str, Any]) -> None:
    shown = tables(CARD)
    for key, label in SCORES.items():
        rates = [rate_of(recorded["scores"][source][key]) for source in ("generated", "autoencoder", "real renders")]
        assert [text for rate in rates for text in (str(rate), str(rate.total))] in shown[label]
    for motion in MOTIONS:
        by_score = {key: rate_of(rate) for key, rate in recorded["scores"]["generated"]["by_motion"][motion].items()}
        total = by_score["motion"].total
        assert [str(total), str(by_score["motion"]), str(by_score["object"])] in shown[motion]


def test_weak_spots_are_told(recorded: dict[str, Any]) -> None:
    by_motion = recorded["scores"]["generated"]["by_motion"]
    still = by_motion["staying still"]["motion"]
    spun = [by_motion[motion]["object"] for motion in MOTIONS_SPUN]
    right, asked = sum(rate["right"] for rate in spun), sum(rate["of"] for rate in spun)
    text = " ".join(README.read_text(encoding="utf-8").split())
    assert f"asked to stay still only {still['right']} of {still['of']} do" in text
    assert f"spinning objects only {right} of {asked} are recognised" in text
    assert f"{asked - right} of {asked} are not recognised" in CARD.read_text(encoding="utf-8")


def test_judge_reads_what_the_readme_says(recorded: dict[str, Any]) -> None:
    """That the judge finds everything in 400 real renders, and all but two objects in reconstructions of them."""
    for key, missed in (("background", 0), ("motion", 0), ("object", 2)):
        assert rate_of(recorded["scores"]["real renders"][key]) == Rate(400, 400)
        assert rate_of(recorded["scores"]["autoencoder"][key]) == Rate(400 - missed, 400)


@pytest.mark.parametrize("page", [README, CARD], ids=["README", "card"])
def test_command_and_device_of_the_scores(page: Path, recorded: dict[str, Any]) -> None:
    text = page.read_text(encoding="utf-8")
    assert f"\n{recorded['command']}\n" in text
    assert recorded["device"] in text


def logged(recipe: str) -> list[dict[str, Any]]:
    """Every line of a run's log."""
    lines = (MODEL / "training" / f"{recipe}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_seconds_and_steps_of_the_training() -> None:
    shown, told = tables(CARD), []
    for recipe in RECIPES:
        last = logged(recipe)[-1]
        (_, seconds, steps), *_ = shown[f"[`{recipe}.toml`](training/{recipe}.toml)"]
        assert (seconds, steps) == (f"{last['seconds']:.0f}", f"{last['step']:,}")
        told.append(seconds)
    text = README.read_text(encoding="utf-8")
    assert f"train for {', '.join(told[:-1])} and {told[-1]} seconds" in text
    assert all(f"\nnova train recipes/{recipe}.toml\n" in text for recipe in RECIPES)


def test_scores_on_the_way() -> None:
    shown = tables(CARD)
    columns = ("background", "motion", "object", "all", "relation", "both_objects")
    for label, recipe in zip(("stage one (pictures)", "stage two", "stage three"), RECIPES[1:], strict=True):
        last = logged(recipe)[-1]
        scores = [f"{last[f'score_{name}']:.1f}" if f"score_{name}" in last else "" for name in columns]
        assert shown[label] == [scores]


def test_early_signs() -> None:
    """What the page on training reads off the curves, of the stages that are scored on the same clips."""
    text = " ".join((ROOT / "docs" / "training.md").read_text(encoding="utf-8").split())
    last = [[row for row in logged(recipe) if "held_out_loss" in row][-1] for recipe in RECIPES[2:]]
    own = [row["held_out_loss"] for row in last]
    assert "goes from {:.2f} to {:.2f}".format(*own) in text
    gaps = [row["held_out_loss_wrong_motion"] - row["held_out_loss"] for row in last]
    assert "the gap to another motion from {:.2f} to {:.2f}".format(*gaps) in text
    gaps = [row["held_out_loss_wrong_object"] - row["held_out_loss"] for row in last]
    assert "about as it was ({:.2f} and {:.2f})".format(*gaps) in text


def test_quality_of_the_autoencoder() -> None:
    psnr = logged("autoencoder")[-1]["psnr"]
    assert f"The autoencoder reaches {psnr:.1f} dB on held-out clips" in CARD.read_text(encoding="utf-8")


def test_sizes_of_the_weights() -> None:
    text = CARD.read_text(encoding="utf-8")
    total = 0
    for part in ("transformer", "vae"):
        size = (MODEL / part / "diffusion_pytorch_model.safetensors").stat().st_size
        total += size
        assert f"| {size / 2e6:.1f} M | {size / 1e6:.1f} MB |" in text  # two bytes a parameter
    assert f"together they are {total / 1e6:.0f} MB" in README.read_text(encoding="utf-8")
    assert total < 32e6


def test_sentences_of_the_picture_were_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    from drawing.showcase import PROMPTS

    sentence = re.compile(rf"an? (.+) ({'|'.join(MOTIONS)})(?: slowly| quickly)? on an? (\w+) background")
    combinations = [sentence.fullmatch(prompt).groups() for prompt in PROMPTS]
    assert {motion for _, motion, _ in combinations} == set(MOTIONS)
    assert {color for _, _, color in combinations} == set(COLORS)
    for combination in combinations:
        assert is_held_out(*combination), combination


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        place = (page.parent / target).resolve() if target else page
        assert place.exists(), f"{page.name} links to {target}"
        if anchor:
            titles = re.findall(r"^#+ (.+)$", place.read_text(encoding="utf-8"), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


def test_nothing_is_left_to_fill_in() -> None:
    for page in PAGES:
        assert not re.search(r"TODO|FIXME|TBD|<the |<this |fills this", page.read_text(encoding="utf-8")), page


def test_seconds_of_the_start() -> None:
    found = json.loads((ROOT / "benchmarks" / "measured" / "first_picture.json").read_text(encoding="utf-8"))
    text = " ".join((ROOT / "docs" / "speed.md").read_text(encoding="utf-8").split())
    picture, clip = (row["processor_seconds"] for row in found["rows"])
    assert f"{picture:.1f} seconds of processor time for a picture of the bundled model and {clip:.1f} for its" in text
    assert f"`{found['command']}` on two cores of `{found['device']}`" in text
    assert found["cores"] == 2
    assert "after {:.1f} and {:.1f} seconds".format(*(row["seconds"] for row in found["rows"])) in text


def test_times_of_the_page_on_speed() -> None:
    pairs = json.loads((ROOT / "benchmarks" / "measured" / "pairs.json").read_text(encoding="utf-8"))
    text = " ".join((ROOT / "docs" / "speed.md").read_text(encoding="utf-8").split())
    times = f"{pairs['fast_seconds']:.1f} seconds instead of {pairs['plain_seconds']:.1f}"
    assert f"{times}, {pairs['times_as_fast']:.1f} times as fast" in text
    assert pairs["device"] in text
    assert pairs["command"] in text
