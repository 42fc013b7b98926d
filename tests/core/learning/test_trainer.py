"""The loop: resuming, stopping, running out of memory, going wrong."""

import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from inversion_core.learning import files
from inversion_core.learning.model import LearningError
from inversion_core.learning.trainer import History, Lesson, Progress, Stage, train


class Line(nn.Module):
    """Fits y = 3 x + 1 from noisy points, two of them a row, drawn from (stage, step, row)."""

    def __init__(self) -> None:
        super().__init__()
        self.slope, self.shift = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.slope.weight)
        nn.init.zeros_(self.shift.weight)

    @property
    def groups(self) -> Mapping[str, nn.Module]:
        return {"slope": self.slope, "shift": self.shift}

    def losses(self, stage: Stage, step: int, rows: Sequence[int]) -> Mapping[str, Tensor]:
        return {"square": torch.stack([self._row(hash((stage.steps, step, row)) % 2**31) for row in rows])}

    def evaluate(self, stage: Stage) -> float:
        with torch.no_grad():
            return float(torch.stack([self._row(seed) for seed in range(16)]).mean())

    def after_step(self) -> None:
        pass

    def save_memory(self) -> bool:
        return False

    def _row(self, seed: int) -> Tensor:
        x, noise = torch.randn(2, 2, 1, generator=torch.Generator().manual_seed(seed))
        made = self.slope(x) + self.shift(torch.ones_like(x))
        return (made - 3 * x - 1 - 0.01 * noise).square().mean()


STAGES = (
    Stage("slope", 12, {"slope": 0.5}, batch=4),
    Stage("both", 20, {"slope": 0.2, "shift": 0.5}, batch=3),
)


class Killed(BaseException):
    """Not even an Exception: as Ctrl-C, or ComfyUI's Cancel."""


def at(step: int, what: Callable[[], None]) -> Callable[[Progress], None]:
    def progress(news: Progress) -> None:
        if news.done == step:
            what()

    return progress


def kill() -> None:
    raise Killed


def state(lesson: Line) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in lesson.state_dict().items()}


def trained(micro_batch: int = 4, lesson: Line | None = None, **options: object) -> tuple[dict[str, Tensor], History]:
    lesson = lesson or Line()
    history = train(lesson, STAGES, micro_batch=micro_batch, **options)  # pyright: ignore[reportArgumentType]
    return state(lesson), history


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_it_learns_and_says_how() -> None:
    found, history = trained()
    assert float(found["slope.weight"]) == pytest.approx(3, abs=0.3)
    assert float(found["shift.weight"]) == pytest.approx(1, abs=0.3)
    assert [step for step, _ in history.evaluations] == sorted({step for step, _ in history.evaluations})
    assert history.evaluations[0][0] == 0
    assert history.evaluations[-1][1] < 0.1 * history.evaluations[0][1]
    assert len(history.losses["square"]) == history.evaluations[-1][0]


def test_the_same_twice_and_frozen_groups_stay() -> None:
    assert same(trained()[0], trained()[0])
    lesson = Line()
    train(lesson, STAGES[:1], micro_batch=4)
    assert float(lesson.shift.weight.detach()) == 0
    assert float(lesson.slope.weight.detach()) != 0


@pytest.mark.parametrize("killed_at", [1, 7, 12, 13, 25, 32])
def test_a_killed_training_ends_as_one_that_was_not(killed_at: int, tmp_path: Path) -> None:
    whole, history = trained()
    checkpoint = tmp_path / "state.safetensors"
    with pytest.raises(Killed):
        trained(checkpoint=checkpoint, job="a", progress=at(killed_at, kill))
    # Another process begins with other values.
    other = Line()
    nn.init.constant_(other.slope.weight, 9.0)
    nn.init.constant_(other.shift.weight, 9.0)
    again, resumed = trained(lesson=other, checkpoint=checkpoint, job="a")
    assert same(whole, again)
    assert resumed == history
    assert list(tmp_path.iterdir()) == []


def test_a_kill_between_two_checkpoints_goes_back_to_the_earlier(tmp_path: Path) -> None:
    """What kill -9 leaves: a checkpoint of some earlier step."""
    checkpoint, kept = tmp_path / "state.safetensors", tmp_path / "kept"
    whole, _ = trained()

    def keep() -> None:
        kept.write_bytes(checkpoint.read_bytes())

    # Told before the step's own checkpoint is written: what is kept is of step 8.
    trained(checkpoint=checkpoint, job="a", save_every_s=0.0, progress=at(9, keep))
    checkpoint.write_bytes(kept.read_bytes())
    seen: list[int] = []
    again, _ = trained(checkpoint=checkpoint, job="a", progress=lambda news: seen.append(news.done))
    assert seen[0] == 9
    assert same(whole, again)


@pytest.mark.parametrize("killed_at", [0, 5, 13])
def test_killed_in_the_midst_of_a_step_it_goes_on_from_the_one_before(killed_at: int, tmp_path: Path) -> None:
    class Cancelled(Line):
        calls = 0

        def losses(self, stage: Stage, step: int, rows: Sequence[int]) -> Mapping[str, Tensor]:
            self.calls += 1
            if self.calls == 2 * killed_at + 2:
                raise Killed
            return super().losses(stage, step, rows)

    checkpoint, seen = tmp_path / "state.safetensors", []
    with pytest.raises(Killed):
        trained(2, Cancelled(), checkpoint=checkpoint, job="a")
    again, _ = trained(2, checkpoint=checkpoint, job="a", progress=lambda news: seen.append(news.done))
    assert seen[0] == killed_at + 1
    assert same(trained(2)[0], again)


def test_a_checkpoint_of_another_job_is_refused(tmp_path: Path) -> None:
    checkpoint = tmp_path / "state.safetensors"
    with pytest.raises(Killed):
        trained(checkpoint=checkpoint, job="a", progress=at(3, kill))
    with pytest.raises(LearningError, match="belongs to other pictures"):
        trained(checkpoint=checkpoint, job="b")


class Hungry(Line):
    """Memory for two rows only."""

    def __init__(self, rows: int, message: str = "CUDA out of memory. Tried to allocate") -> None:
        super().__init__()
        self.rows, self.message, self.asked = rows, message, []

    def losses(self, stage: Stage, step: int, rows: Sequence[int]) -> Mapping[str, Tensor]:
        self.asked.append(len(rows))
        if len(rows) > self.rows:
            raise RuntimeError(self.message)
        return super().losses(stage, step, rows)


@pytest.mark.parametrize(
    "message", ["CUDA out of memory. Tried to allocate", "DefaultCPUAllocator: can't allocate memory: you tried"]
)
def test_out_of_memory_halves_the_micro_batch_and_changes_only_rounding(message: str) -> None:
    hungry = Hungry(2, message)
    found, history = trained(lesson=hungry)
    assert history.micro_batch == 2
    assert hungry.asked[:3] == [4, 2, 2]
    assert hungry.asked.count(4) == 1
    for name, value in trained()[0].items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def test_with_no_memory_for_one_row_the_lesson_is_asked_to_save_some() -> None:
    class Saving(Hungry):
        def save_memory(self) -> bool:
            before, self.rows = self.rows, 1
            return before == 0

    saving = Saving(0)
    found, history = trained(lesson=saving)
    assert history.micro_batch == 1
    assert saving.asked[:4] == [4, 2, 1, 1]
    for name, value in trained()[0].items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def test_no_memory_for_one_row_is_an_error_that_says_so() -> None:
    with pytest.raises(LearningError, match="one row at a time"):
        trained(lesson=Hungry(0))


def test_other_errors_are_not_taken_for_lack_of_memory() -> None:
    hungry = Hungry(0, "mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        trained(lesson=hungry)
    assert hungry.asked == [4]


class Broken(Line):
    def losses(self, stage: Stage, step: int, rows: Sequence[int]) -> Mapping[str, Tensor]:
        found = super().losses(stage, step, rows)
        return {"square": found["square"] * (math.nan if step == 5 else 1.0)}


def test_a_loss_that_is_no_number_ends_it_before_anything_is_spoiled() -> None:
    broken, seen = Broken(), []
    with pytest.raises(LearningError, match=r"loss is nan at step 5 \(square nan\)"):
        trained(lesson=broken, progress=lambda _: seen.append(state(broken)))
    assert len(seen) == 5
    assert same(state(broken), seen[-1])


def test_a_full_disk_ends_it_and_the_checkpoint_before_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tmp_path / "state.safetensors"

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(LearningError, match=r"cannot be written.*No space left"):
        fill = at(7, lambda: patch.setattr(files, "save_file", full))
        trained(checkpoint=checkpoint, job="a", save_every_s=0.0, progress=fill)
    assert list(tmp_path.iterdir()) == [checkpoint]
    seen: list[int] = []
    again, _ = trained(checkpoint=checkpoint, job="a", progress=lambda news: seen.append(news.done))
    assert seen[0] == 7
    assert same(trained()[0], again)


class Flat(Line):
    def evaluate(self, stage: Stage) -> float:
        return 1.0


def test_a_flat_stage_ends_early() -> None:
    stages = (Stage("long", 100, {"slope": 0.1}), Stage("short", 2, {"shift": 0.1}))
    flat = Flat()
    history = train(flat, stages, micro_batch=4)
    assert history.stopped_early == ["long"]
    assert len(history.losses["square"]) == 6 * 10 + 2
    assert float(flat.shift.weight.detach()) != 0


def test_progress_counts_all_stages() -> None:
    seen: list[Progress] = []
    trained(progress=seen.append)
    assert [news.done for news in seen] == list(range(1, 33))
    assert {news.total for news in seen} == {32}
    assert seen[-1].seconds_left == 0
    assert [news.stage for news in seen] == ["slope"] * 12 + ["both"] * 20


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (lambda: Stage("s", 0, {"slope": 1.0}), "0 steps"),
        (lambda: Stage("s", 1, {"slope": 1.0}, batch=0), "of 0 rows"),
        (lambda: Stage("s", 1, {"slope": 0.0}), "learns nothing"),
        (lambda: train(Line(), [Stage("s", 1, {"colour": 1.0, "slope": 1.0})], micro_batch=1), "there is slope, shift"),
    ],
)
def test_stages_that_make_no_sense_are_refused(stage: Callable[[], object], message: str) -> None:
    with pytest.raises(LearningError, match=message):
        stage()


def test_the_result_is_an_average_over_the_last_steps() -> None:
    """With decay 0 it is the last step itself."""
    averaged, last = Line(), Line()
    for lesson, decay in ((averaged, 0.98), (last, 0.0)):
        train(lesson, [Stage("s", 10, {"slope": 0.5}, average=decay)], micro_batch=4)
    assert float(averaged.slope.weight.detach()) < float(last.slope.weight.detach())


def test_a_line_is_a_lesson() -> None:
    lesson: Lesson = Line()
    assert set(lesson.groups) == {"slope", "shift"}


_KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = [{root!r}, {here!r}]
from inversion_core.learning.trainer import train
from test_trainer import STAGES, Line, at

train(
    Line(), STAGES, micro_batch=4, checkpoint=Path({checkpoint!r}), job="a", save_every_s=0.0,
    progress=at({step}, lambda: os.kill(os.getpid(), signal.SIGKILL)),
)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no such signal")
@pytest.mark.parametrize("step", [8, 21])
def test_after_kill_9_the_end_is_that_of_a_run_that_was_not_killed(step: int, tmp_path: Path) -> None:
    here, checkpoint = Path(__file__).resolve().parent, tmp_path / "state.safetensors"
    script = _KILLED.format(root=str(here.parents[2]), here=str(here), checkpoint=str(checkpoint), step=step)
    environment = {**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    seen: list[int] = []
    again, _ = trained(checkpoint=checkpoint, job="a", progress=lambda news: seen.append(news.done))
    assert seen[0] == step
    assert same(trained()[0], again)
    assert list(tmp_path.iterdir()) == []
