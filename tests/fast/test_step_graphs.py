"""Training steps that are recorded: the numbers of plain steps, and recordings that several processes share."""
# ruff: noqa: F401, F811  (fixtures of other files are arguments here)

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from nova_video.common.errors import InputError
from nova_video.fast.graphs import Recording
from nova_video.fast.training_graphs import StepGraphs
from nova_video.training.checkpoint import Average
from nova_video.training.dataset_task import DatasetTask
from nova_video.training.processes import Processes
from nova_video.training.recipe import (
    DatasetTransformerRecipe,
)
from nova_video.training.stepper import Stepper, make_optimizer, set_rate
from test_dataset_training import CLIPS, CPU, SMALL, dataset, recipe

# Recorded steps -------------------------------------------------------------------------------------------------------


class DirectRecorder:
    """Records by keeping what was to be done, with the batch that it reads, as a graph does."""

    def __init__(self, room: int = 100, fails: bool = False, keeps: Sequence[int] = ()) -> None:
        """`keeps`: the calls that make something to stay, counted from 1."""
        self.room, self.fails, self.keeps = room, fails, keeps
        self.called = self.recorded = self.released = 0

    def call(self, work: Callable[[], None]) -> bool:
        self.called += 1
        work()
        return self.called in self.keeps

    def has_room(self) -> bool:
        return self.recorded < self.room

    def record(self, work: Callable[[], None], arguments: dict[str, Any]) -> Recording:
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        self.recorded += 1
        return Recording(work, None, 0)

    def wait(self) -> None:
        pass

    def renew(self) -> None:
        self.released += 1


def take_steps(recipe: DatasetTransformerRecipe, recorder: DirectRecorder | None) -> tuple[list[Any], list[Any], Any]:
    """Of twelve steps of three variants: what was logged, the weights and averages after them, and the newest batch."""
    torch.manual_seed(0)
    task, processes = DatasetTask(recipe, CPU), Processes(recipe)
    task.open_data([0], 1, {})
    optimizer, average = make_optimizer(task.model, recipe.optimizer, CPU), Average(task.model, 0.9)
    stepper = Stepper(task, processes.spread(task), optimizer, average, recipe, processes, [0])
    assert stepper.graphs is None
    if recorder is not None:
        stepper.graphs = StepGraphs(recorder)
    variants = task.variants()[0]
    chosen = [next(v for v in variants if v.size.bucket == bucket) for bucket in (CLIPS, SMALL)] + [variants[1]]
    numbers = []
    for number in range(12):
        set_rate(optimizer, 1e-3 * (1 + number))
        stepper.step(number, chosen[number % 3])
        numbers.append(stepper.numbers())
    return numbers, [*task.model.parameters(), *average.averages.values()], stepper.newest


@pytest.mark.parametrize(
    ("recorder", "called"),
    [(DirectRecorder(), 3), (DirectRecorder(room=1), 3 + 2 * 3), (DirectRecorder(fails=True), 12)],
    ids=["all", "no-room", "fails"],
)
def test_recorded_steps_are_the_plain_ones(
    recipe: DatasetTransformerRecipe, recorder: DirectRecorder, called: int
) -> None:
    """Every batch reaches a recorded step, with its random numbers: the same losses and weights, to the last bit."""
    plain, recorded = take_steps(recipe, None), take_steps(recipe, recorder)
    assert plain[0] == recorded[0]
    assert len({line["loss"] for line in plain[0]}) == 12
    assert all(torch.equal(*pair) for pair in zip(plain[1], recorded[1], strict=True))
    assert torch.equal(plain[2].latents, recorded[2].latents)
    assert recorder.called == called


def test_recordings_that_do_not_know_of_what_stays_are_made_again() -> None:
    """The third call, of another variant, keeps something that a recording from before would overwrite."""
    done: list[str] = []
    recorder = DirectRecorder(keeps=[3])
    graphs = StepGraphs(recorder)
    for name in "aabbcabca":
        graphs(name, {}, lambda batch, name=name: done.append(name))
    assert "".join(done) == "aabbcabca"
    assert (recorder.called, recorder.recorded, len(graphs)) == (3, 2 + 3, 3)


def test_recordings_can_be_let_go_of() -> None:
    done: list[str] = []
    recorder = DirectRecorder()
    graphs = StepGraphs(recorder)
    for name in "aab":
        graphs(name, {}, lambda batch, name=name: done.append(name))
    graphs.release()
    assert (len(graphs), recorder.released) == (0, 1)
    for name in "abab":
        graphs(name, {}, lambda batch, name=name: done.append(name))
    assert "".join(done) == "aababab"
    assert (recorder.called, recorder.recorded) == (2, 1 + 2)


def test_processes_let_go_of_recordings_together() -> None:
    """What stays on one of them counts for all."""
    others = [True, True, True, False, True, True]  # room, a call, room, a call that keeps something there, room twice
    recorder = DirectRecorder()
    graphs = StepGraphs(recorder, lambda own: others.pop(0) and own)
    for name in "aabbcdca":
        graphs(name, {}, lambda batch: None)
    assert (recorder.called, others) == (4, [])


def test_processes_record_the_same_steps() -> None:
    """Where all have room; and one that cannot record ends the run: the others have."""
    room, done = [True, False], []
    recorder = DirectRecorder()
    graphs = StepGraphs(recorder, lambda own: own and (not room or room.pop(0)))
    for number in range(9):
        graphs("ab"[number % 2], {"x": torch.tensor(number)}, lambda batch: done.append(int(batch["x"])))
    assert done == list(range(9))
    assert (recorder.called, recorder.recorded, len(graphs), room) == (5, 1, 1, [])  # one call of "a", all of "b"
    failing = StepGraphs(DirectRecorder(fails=True), lambda own: own)
    failing("a", {}, lambda batch: None)
    with pytest.raises(
        InputError, match="operation not permitted when stream is capturing; expected cuda_graph = false"
    ):
        failing("a", {}, lambda batch: None)
