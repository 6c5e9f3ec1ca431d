"""The benchmark beyond one clip on drawn shapes: right answers score 100, frozen, unchanged and wrong ones what they
deserve."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from nova_video.cli.arguments import PartName as TypedPart
from nova_video.cli.arguments import parse
from nova_video.cli.main import main
from nova_video.common.errors import InputError
from nova_worlds.evaluation.editing import EditingReport, EditingSettings, asked_cases, evaluate_editing
from nova_worlds.evaluation.editing_parts import (
    LAST_STEERED,
    NUM_GIVEN,
    NUM_STEERED,
    PARTS,
    SETTLE,
    Case,
    Part,
    PartName,
    Steer,
)
from nova_worlds.evaluation.paths import has_room, render_path, steered_path
from nova_worlds.evaluation.report import contact_sheet, print_editing, write_report
from nova_worlds.evaluation.world_benchmark import GENERATED, REAL, RECONSTRUCTED, LongSettings
from nova_worlds.rendering.clips import CANVAS, SIZES, SPAN, object_path
from nova_worlds.rendering.lexicon import COLORS, MOTIONS, STILL
from nova_worlds.rendering.shapes import prepare_shapes
from nova_worlds.rendering.world import EmojiWorld

Change = Callable[[Part, Case, Tensor], Tensor]
"""What the stand-in makes of the right answer (N, F, H, W, 3)."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> EmojiWorld:
    return prepare_shapes(tmp_path_factory.mktemp("worlds") / "shapes", score_clips=1)


@pytest.fixture(autouse=True)
def few_real_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nova_worlds.evaluation.editing.JUDGE_CLIPS", 12)


class Answers:
    """Stands in for a pipeline: knows the cases by their seeds and gives the right answers, after `change`."""

    def __init__(self, world: EmojiWorld, settings: EditingSettings, change: Change = lambda *given: given[2]) -> None:
        self.world, self.settings, self.change = world, settings, change
        self.vae: Any = None
        self.calls: list[dict[str, Any]] = []

    def __call__(self, prompt: list[Any], **given: Any) -> SimpleNamespace:
        (name,) = self.settings.parts
        part = PARTS[name]
        rows = torch.tensor([g.initial_seed() - self.settings.seed for g in given["generator"]])
        case = asked_cases(part, self.world, self.settings).select(rows)
        assert prompt == part.prompts(self.world, case)
        assert given["num_frames"] == part.num_frames
        assert given["output_type"] == "np"
        assert (given["video"] is not None) == (part.given_frames > 0)
        assert (given["mask_image"] is not None) == (part.holes is not None)
        if given["video"] is not None:
            assert np.array_equal(given["video"], part.given(self.world, case).numpy())
        if part.holes is not None:
            assert np.array_equal(~given["mask_image"], part.known(case)[0, 0, :, :, 0].numpy())
        self.calls.append({"prompt": prompt, **given})
        answer = part.put_given(self.world, case, part.real(self.world, case))
        frames = self.change(part, case, answer).numpy() / 255
        return SimpleNamespace(images=list(frames[:, 0]), frames=list(frames))


def settings_of(part: PartName, count: int = 10, **others: Any) -> EditingSettings:
    return EditingSettings(parts=(part,), num_clips=count, batch_size=6, **others)


def evaluate(world: EmojiWorld, part: PartName, change: Change = lambda *given: given[2]) -> EditingReport:
    settings = settings_of(part)
    return evaluate_editing(Answers(world, settings, change), world, settings)


def percent(report: EditingReport) -> dict[str, float]:
    (part,) = report.parts.values()
    return {name: round(100 * rate.value) for name, rate in part.rates[GENERATED].items()}


@pytest.mark.parametrize("part", PARTS)
def test_right_answers_score_full_marks(world: EmojiWorld, part: PartName) -> None:
    scores = percent(evaluate(world, part))
    assert scores.pop("old_object", 0) == 0
    assert scores.pop("motion_new", 100) >= 80  # bouncing is not always told in nine frames
    for name in ("motion_17", "motion_at_once"):  # reported, but not what there must be room for
        assert scores.pop(name, 100) >= 50
    assert set(scores.values()) == {100}
    assert ("given_kept" in scores) == (part != "steer-alone")


def test_frozen_clips_are_not_carried_on(world: EmojiWorld) -> None:
    def frozen(part: Part, case: Case, answer: Tensor) -> Tensor:
        return torch.cat(
            (
                answer[:, :NUM_GIVEN],
                answer[:, NUM_GIVEN - 1 : NUM_GIVEN].expand(-1, SPAN - NUM_GIVEN, -1, -1, -1),
            ),
            dim=1,
        )

    report = evaluate(world, "continue", frozen)
    still = report.parts["continue"].groups["by motion"]["staying still"]["motion"].total
    assert report.parts["continue"].rates[GENERATED]["motion"].right == still
    assert report.parts["continue"].rates[GENERATED]["motion_new"].right == still
    assert (percent(report)["object"], percent(report)["given_kept"]) == (100, 100)


def test_wrong_objects_backgrounds_and_given_frames_are_seen(world: EmojiWorld) -> None:
    def others(part: Part, case: Case, answer: Tensor) -> Tensor:
        asked = replace(
            case.asked,
            object=(case.asked.object + 1) % len(world),
            background=(case.asked.background + 1) % len(COLORS),
        )
        return part.real(world, replace(case, asked=asked))

    for part in ("continue-long", "inpaint"):
        scores = percent(evaluate(world, part, others))
        assert [scores[name] for name in ("background", "object", "all", "given_kept")] == [0, 0, 0, 0]


@pytest.mark.parametrize("part", ["steer", "steer-anywhere"])
def test_a_change_that_is_not_obeyed_is_seen(world: EmojiWorld, part: PartName) -> None:
    def unmoved(part: Part, case: Case, answer: Tensor) -> Tensor:
        path = object_path(replace(case.given, num_frames=NUM_STEERED))
        return render_path(world, case.asked, path)

    scores = percent(evaluate(world, part, unmoved))
    assert (scores["motion"], scores["background"], scores["given_kept"]) == (0, 100, 100)
    assert scores["object"] >= 90


def test_a_picture_left_as_it_was_is_not_filled_in(world: EmojiWorld) -> None:
    def unchanged(part: Part, case: Case, answer: Tensor) -> Tensor:
        return part.given(world, case)

    scores = percent(evaluate(world, "inpaint", unchanged))
    assert (scores["object"], scores["old_object"], scores["given_kept"]) == (0, 100, 100)
    scores = percent(evaluate(world, "inpaint-pair", unchanged))
    assert (scores["object"], scores["other_object"], scores["all"]) == (0, 100, 0)


@pytest.mark.parametrize("part", ["inpaint", "inpaint-pair"])
def test_holes_cover_what_is_replaced_and_nothing_else(world: EmojiWorld, part: PartName) -> None:
    case = asked_cases(PARTS[part], world, settings_of(part, 40))
    old, new, known = PARTS[part].given(world, case), PARTS[part].real(world, case), PARTS[part].known(case)
    assert torch.equal(torch.where(known, old, 0), torch.where(known, new, 0))
    assert (old != new).any(dim=4).flatten(1).any(dim=1).all()
    if part == "inpaint-pair":
        assert sorted(case.hole.unique().tolist()) == [0, 1, 2, 3]


def test_steered_paths(world: EmojiWorld) -> None:
    generator = torch.Generator().manual_seed(1)
    case = PARTS["steer"].ask(world, 60, generator, "heldout")
    assert not (case.given.motion == case.asked.motion).any()
    assert has_room(case.given, case.asked, LAST_STEERED).all()
    path, begun = steered_path(case.given, case.asked), object_path(case.given)
    for name in ("centre", "size", "angle"):
        assert torch.equal(getattr(path, name)[:, :NUM_GIVEN], getattr(begun, name))
    assert path.size.shape == (60, NUM_STEERED)
    still = case.asked.motion == STILL
    assert torch.equal(
        path.centre[still, NUM_GIVEN:],
        path.centre[still, NUM_GIVEN - 1 : NUM_GIVEN].expand(-1, NUM_STEERED - NUM_GIVEN, -1),
    )
    grown = path.size[:, -1] / path.size[:, NUM_GIVEN - 1]
    assert (grown[case.asked.motion == MOTIONS.index("growing")] > 1.45).all()
    left = case.asked.motion == MOTIONS.index("moving left")
    way = path.centre[left, NUM_GIVEN - 1, 0] - path.centre[left, -1, 0]
    assert torch.allclose(way, torch.tensor([1.25, 2.25, 3.375])[case.asked.speed[left]] * (NUM_STEERED - NUM_GIVEN))
    bounces = case.asked.motion == MOTIONS.index("bouncing")
    y = path.centre[bounces, NUM_GIVEN - 1 :, 1]
    assert (y.amax(dim=1) - y.amin(dim=1)).min() > 25
    assert (path.size[:, :LAST_STEERED] >= SIZES[0] * 0.7).all()


def test_there_is_not_always_room(world: EmojiWorld) -> None:
    case = Steer(room=False).ask(world, 200, torch.Generator().manual_seed(0), "heldout")
    fits = has_room(case.given, case.asked, LAST_STEERED)
    assert 40 < fits.sum() < 160
    assert fits[case.asked.motion == STILL].all()
    path = steered_path(case.given, replace(case.asked, num_frames=LAST_STEERED))
    centre, half = path.centre[:, NUM_GIVEN:], path.size[:, NUM_GIVEN:, None] / 2
    inside = ((centre >= half - 0.01) & (centre + half <= CANVAS + 0.01)).all(dim=2).all(dim=1)
    assert inside[fits].all()
    assert not inside.all()


def test_reports_sheets_and_tables(world: EmojiWorld, tmp_path: Path) -> None:
    settings = EditingSettings(parts=("inpaint",), num_clips=4, long=LongSettings(context_frames=33))
    answers = Answers(world, settings)
    steps: list[tuple[str, int, int]] = []
    report = evaluate_editing(
        answers, world, settings, model="answers", command="nova evaluate", on_progress=lambda *s: steps.append(s)
    )
    assert answers.calls[0]["context_frames"] == 33
    assert [g.initial_seed() for g in answers.calls[0]["generator"]] == [0, 1, 2, 3]
    assert steps[0] == ("inpaint: real renders", 12, 12)
    assert steps[-1] == ("inpaint: generated", 4, 4)
    assert RECONSTRUCTED not in report.parts["inpaint"].rates
    write_report(report, tmp_path / "report")
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["inpaint.png", "scores.json"]
    content = json.loads((tmp_path / "report" / "scores.json").read_text())
    assert content["benchmark"] == "editing"
    assert content["settings"]["long"]["context_frames"] == 33
    assert content["parts"]["inpaint"]["scores"][GENERATED]["object"]["percent"] == 100
    assert content["parts"]["inpaint"]["scores"][REAL]["object"]["of"] == 12
    report = evaluate(world, "steer")
    assert report.as_json()["parts"]["steer"]["judged_frames"]["motion"] == [SETTLE, LAST_STEERED - 1]
    assert set(report.as_json()["parts"]["steer"]) >= {"by_motion", "by_first_motion", "by_speed"}
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_editing(report, console)
    text = console.export_text()
    assert "steer: 9 real frames, then a change of motion that there is room for" in text
    assert "spinning counterclockwise" in text


def test_timelines_change_right_behind_what_is_given(world: EmojiWorld) -> None:
    settings = settings_of("steer")
    answers = Answers(world, settings)
    evaluate_editing(answers, world, settings)
    (first, then), *_ = answers.calls[0]["prompt"]
    assert (first[0], then[0]) == (0.0, 9 / 8)
    assert first[1].split()[:2] == then[1].split()[:2]
    assert first[1] != then[1]


def test_given_frames_are_marked_on_the_sheet(world: EmojiWorld) -> None:
    report = evaluate(world, "continue")
    samples = report.parts["continue"].sheet.samples
    assert samples[0].given == NUM_GIVEN
    marked, plain = contact_sheet(samples, 9), contact_sheet([replace(s, given=0) for s in samples], 9)
    blue = [(np.asarray(sheet) == (0, 90, 255)).all(axis=-1).sum() for sheet in (marked, plain)]
    assert blue[0] > blue[1] + 5 * len(samples) * 300


def test_reconstructions_keep_what_is_given(world: EmojiWorld) -> None:
    settings = settings_of("continue")
    answers = Answers(world, settings)
    answers.vae = SimpleNamespace(  # everything gray
        device=torch.device("cpu"),
        dtype=torch.float32,
        encode=lambda clips: SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: clips)),
        decode=lambda latents: SimpleNamespace(sample=torch.zeros_like(latents)),
    )
    rates = evaluate_editing(answers, world, settings).parts["continue"].rates
    assert rates[RECONSTRUCTED]["given_kept"].value == 1
    assert rates[RECONSTRUCTED]["object"].value == 0
    assert rates[GENERATED]["object"].value == 1


def test_a_judge_that_misreads_is_refused(world: EmojiWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of("continue")
    answers = Answers(world, settings)
    monkeypatch.setattr("nova_worlds.judging.judge.MOVES", 100.0)
    with pytest.raises(InputError, match=r"reads only .* of motion right on 12 real renders for 'continue'"):
        evaluate_editing(answers, world, settings)
    assert answers.calls == []


def test_wrong_settings_are_named() -> None:
    with pytest.raises(InputError, match="num_clips is 0"):
        EditingSettings(num_clips=0)
    with pytest.raises(InputError, match=r"parts is \(\): expected some of continue, continue-long"):
        EditingSettings(parts=())


def test_the_command(
    world: EmojiWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare_shapes(tmp_path / "world", score_clips=1)
    monkeypatch.chdir(tmp_path)
    settings = EditingSettings(parts=("inpaint",), num_clips=3)
    monkeypatch.setattr("nova_video.cli.evaluate.load_pipeline", lambda *_: Answers(world, settings))
    typed = ["--data", "world", "-o", "scores", "--parts", "inpaint", "--num-clips", "3"]
    assert main(["evaluate", "beyond", *typed]) == 0
    assert capsys.readouterr().out.endswith("scores\n")
    content = json.loads(Path("scores/scores.json").read_text())
    assert content["command"] == ("nova evaluate editing --data world --parts inpaint --num-clips 3")
    assert content["settings"]["parts"] == ["inpaint"]


def test_the_command_line_knows_every_part_and_default() -> None:
    assert get_args(TypedPart) == get_args(PartName) == tuple(PARTS)
    typed, settings = parse(["evaluate", "beyond"]), EditingSettings()
    for name in ("parts", "num_clips", "split", "seed", "batch_size"):
        assert getattr(typed, name) == getattr(settings, name)
    for name, value in vars(settings.long).items():
        assert getattr(typed, name) == value
