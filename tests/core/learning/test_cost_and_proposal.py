"""What is said before learning begins: what it will cost, and where the object seems to be."""

import time
from dataclasses import replace

import pytest
from torch import Tensor

from inversion_core.learning.cost import Cost, foreseen
from inversion_core.learning.material import prepare
from inversion_core.learning.model import Conditioning, LearningError
from inversion_core.learning.plan import Plan
from inversion_core.learning.proposal import propose_masks
from inversion_core.learning.recipes import stages
from inversion_core.metrics import mask_iou

from .toy import ToyModel, encode, picture

PLAN = Plan("shape", "x", "chair", stages("shape", 20, 4), variants=4)


class SlowModel(ToyModel):
    """A row takes at least a hundredth of a second, and memory fails for `fits` of the passes without checkpointing."""

    fails = False

    def predict(self, noisy: Tensor, level: Tensor, conditioning: Conditioning) -> Tensor:
        time.sleep(0.01 * len(noisy))
        if self.fails and self.checkpointing is None:
            raise RuntimeError("CUDA out of memory. Tried to allocate")
        return super().predict(noisy, level, conditioning)


def test_the_cost_is_of_all_rows_of_all_steps() -> None:
    model, material = SlowModel(), prepare(encode, *picture(), PLAN)
    cost = foreseen(model, material, PLAN)
    assert cost.seconds > 20 * 4 * 0.01
    assert "20 steps of 4 pictures: about 0:" in cost.text()
    assert cost.row_bytes is None


def test_without_memory_for_a_row_the_cost_is_that_with_checkpointing_and_learning_begins_without() -> None:
    model = SlowModel()
    model.fails = True
    assert foreseen(model, prepare(encode, *picture(), PLAN), PLAN).seconds > 0
    assert model.checkpointing is None


def test_what_stands_out_is_proposed() -> None:
    pictures, masks = picture(size=64)
    found = propose_masks(ToyModel(), encode(pictures), "chair", (64, 64))
    assert found.shape == masks.shape
    assert mask_iou(found[0], masks[0]) > 0.8


def test_a_proposal_needs_a_word() -> None:
    with pytest.raises(LearningError, match="gives no token"):
        propose_masks(ToyModel(), encode(picture()[0]), "", (32, 32))


def test_a_plan_may_keep_to_some_noise_levels() -> None:
    with pytest.raises(LearningError, match=r"noise levels 0\.5 to 0\.5"):
        replace(PLAN.stages[0], levels=(0.5, 0.5))


def test_as_many_rows_at_once_as_memory_holds() -> None:
    assert Cost(1.0, None, 10, 16).rows(free=0) == 16
    assert Cost(1.0, 1000, 10, 16).rows(free=10_000) == 8
    assert Cost(1.0, 1000, 10, 4).rows(free=10_000) == 4
    assert Cost(1.0, 1000, 10, 16).rows(free=100) == 1
