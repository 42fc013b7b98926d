"""Every preset on every UNet family: it acts, its report is true, and a warm bank gives the same bits for no rows."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from inversion_core.hosts.comfy_references import BANK
from inversion_core.hosts.comfy_unet import attach, last_report, sites_of
from inversion_core.hosts.report import Report
from inversion_core.hosts.session import FEATURES
from inversion_core.presets import PRESETS
from inversion_core.reference import Reference
from inversion_core.sites import select

from .models import POOLED, Patcher, demo_patcher, prompt, random, sample, sd15_patcher, sd21_patcher, sdxl_patcher

VISIBLE = 1e-3
STEPS = 3
"""At 0, 50 and almost 100 % of the schedule: every window of every preset holds at least one of them."""

FAMILIES: dict[str, Callable[[], Patcher]] = {
    "demo": demo_patcher,
    "sd1.5": sd15_patcher,
    "sd2.1": sd21_patcher,
    "sdxl": sdxl_patcher,
}
SHAPE = Reference(random(1, 4, 16, 16, seed=1))
LEFT_OF_REFERENCE = torch.cat((torch.ones(1, 1, 16, 8), torch.zeros(1, 1, 16, 8)), dim=3)
APPEARANCE = Reference(random(1, 4, 16, 16, seed=2), mask=LEFT_OF_REFERENCE)


class Family:
    """A model of the family, what it gives untouched, and how it is asked."""

    def __init__(self, name: str) -> None:
        extra: Any = {"pooled_output": random(1, POOLED, seed=10)} if name == "sdxl" else {}
        self.model = FAMILIES[name]()
        self.asked: Any = {"positive": prompt(101, **extra), "negative": prompt(102, **extra), "steps": STEPS}
        self.plain = self.sample(self.model)

    def sample(self, model: Patcher) -> Tensor:
        return sample(model, **self.asked)

    def run(self, model: Patcher) -> tuple[Tensor, Report]:
        return self.sample(model), last_report(model)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    with torch.inference_mode():
        return Family(request.param)


@pytest.fixture(scope="module")
def demo() -> Family:
    with torch.inference_mode():
        return Family("demo")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_acts_and_says_so_and_is_the_same_from_a_warm_bank(family: Family, name: str) -> None:
    preset = PRESETS[name]
    patched = attach(family.model, *preset.injections([APPEARANCE], SHAPE))
    cold, first = family.run(patched)
    warm, second = family.run(patched)

    assert torch.isfinite(cold).all()
    assert (cold - family.plain).abs().max() > VISIBLE
    assert torch.equal(cold, warm)
    assert torch.equal(family.sample(family.model), family.plain)

    assert first.rows == second.rows == 2 * STEPS
    assert first.reference_rows == sum(ROWS[name])
    assert (second.reference_rows, second.hits) == (0, first.reference_rows + first.hits)
    assert first.bytes == second.bytes == BANK.stats.ram_bytes > 0

    sites = sites_of(family.model.model.diffusion_model)
    rules = {rule for step in preset.steps for rule in (step.sites, step.shape_sites) if rule is not None}
    chosen = set().union(*(select(rule, sites) for rule in rules))
    assert set(first.chosen) == chosen
    assert set(first.calls) - {FEATURES} == chosen - set(first.silent)
    assert (FEATURES in first.calls) == any(step.feature_strength > 0 for step in preset.steps)
    assert set(first.change) == set(first.calls) - {FEATURES}
    assert all(0 < change < 10 for change in first.change.values())
    assert first.calls == second.calls
    assert first.change == second.change
    assert all(site in first.text() for site in first.chosen)


def test_presets_of_strength_zero_are_the_plain_model(family: Family) -> None:
    neutral = [one for preset in PRESETS.values() for one in preset.injections([APPEARANCE], SHAPE, strength=0.0)]
    assert torch.equal(family.sample(attach(family.model, *neutral)), family.plain)


def test_the_reading_picture_shows_the_part_of_the_reference_that_may_be_read(family: Family) -> None:
    for name in ("default", "masactrl", "style-aligned"):
        _, report = family.run(attach(family.model, *PRESETS[name].injections([APPEARANCE])))
        reading = report.reading
        assert reading is not None
        assert reading.max() == 1
        height, width = reading.shape
        assert (reading[:, width // 2 :] == 0).all()
        assert (reading[:, : width // 2] > 0).all()


def test_edits_that_read_no_keys_have_no_reading_picture(family: Family) -> None:
    _, report = family.run(attach(family.model, *PRESETS["ctrl-x"].injections([APPEARANCE])))
    assert report.reading is None


ROWS = {
    "default": (3, 3),
    "masactrl": (2, 2),
    "cross-image": (1, 1),
    "style-aligned": (3, 2),
    "visual-style": (3, 2),
    "style-id": (3, 3),
    "ctrl-x": (2, 2),
}
"""How many of the three noise levels lie in the windows of the appearance and of the shape."""


@pytest.mark.parametrize("name", PRESETS)
def test_a_reference_costs_one_row_a_noise_level_in_its_window(demo: Family, name: str) -> None:
    """Whatever the prompts, and for all the edits of a preset together."""
    appearance, shape = ROWS[name]
    _, alone = demo.run(attach(demo.model, *PRESETS[name].injections([APPEARANCE])))
    BANK.clear()
    _, both = demo.run(attach(demo.model, *PRESETS[name].injections([APPEARANCE], SHAPE)))
    assert (alone.reference_rows, both.reference_rows) == (appearance, appearance + shape)
