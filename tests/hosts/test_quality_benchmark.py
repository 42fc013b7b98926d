"""The quality benchmark on both of the demo's networks."""

import pytest
import torch

from benchmarks.quality import methods
from benchmarks.quality.__main__ import _methods, with_gain
from benchmarks.quality.methods import ATTENTION, DIT_PAGE, OURS, UNET_ONLY, Studio
from benchmarks.quality.pairs import pairs
from demo.model import load_demo_model


@pytest.fixture(scope="module")
def studio() -> Studio:
    return Studio(load_demo_model(network="DiT"))


def test_every_method_runs_on_the_transformer(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "STEPS", 6)
    (pair,) = pairs(1, tuning=True)
    plain = DIT_PAGE["prompt only"](studio, pair)
    for name, method in {**DIT_PAGE, **ATTENTION, "colour guidance alone": OURS["colour guidance alone"]}.items():
        if name in UNET_ONLY:
            continue
        made = method(studio, pair)
        assert made.picture.shape == (128, 128, 3)
        assert bool(torch.isfinite(made.picture).all())
        if name != "prompt only":
            assert not torch.equal(made.picture, plain.picture), name
            assert (made.rows > plain.rows) == (name != "colour guidance alone"), name


def test_presets_without_a_form_on_transformers_are_left_out(studio: Studio) -> None:
    assert _methods("attention", "UNet").keys() - _methods("attention", "DiT").keys() == UNET_ONLY
    (pair,) = pairs(1, tuning=True)
    for name in UNET_ONLY:
        with pytest.raises(ValueError, match=name):
            methods.ATTENTION[name](studio, pair)


def test_gain_is_over_the_plain_method_on_the_same_pair() -> None:
    results = {
        "plain": [{"appearance": 0.25}, {"appearance": 0.5}],
        "other": [{"appearance": 1.0}, {"appearance": 0.5}],
    }
    found = with_gain(results, "plain")
    assert [row["gain"] for row in found["other"]] == [0.75, 0.0]
    assert [row["gain"] for row in found["plain"]] == [0.0, 0.0]
    assert with_gain(results, "absent") == results
