"""The benchmark of inversions: its truth, its scale, and that it goes on where it stopped."""

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.appearance_loss import probe
from benchmarks.fewer import fewest
from benchmarks.inversion import crossed as crossings
from benchmarks.inversion import joint, methods
from benchmarks.inversion.__main__ import Bench, fewer
from benchmarks.inversion.concepts import Concept, concepts, newcomers, together
from benchmarks.inversion.crossed import LOOKS, ROWS, by_shape, composed, crossed, said
from benchmarks.inversion.measures import appearance_figures, shape_figures
from benchmarks.inversion.tables import COLUMNS, tables
from demo import world
from demo.generate import generate
from demo.judge import Judge
from demo.model import DemoModel, load_demo_model
from inversion_core.learning.inversion import Kind
from inversion_core.learning.plan import Plan


def test_truth_scores_as_truth_and_another_appearance_does_not() -> None:
    judge = Judge.load()
    (concept,) = concepts("appearance", 1, tuning=True)
    wanted = concept.wanted(8)
    truth = torch.from_numpy(np.stack([world.render(one.truth).image for one in wanted]))
    found = appearance_figures(truth, wanted, judge)
    assert found["appearance"] > 0.95
    assert found["shape_obeyed"] == found["texture"] == 1
    drawn = map(world.sample, range(100))
    other = next(one for one in drawn if one.appearance.colour != concept.factors.appearance.colour)
    changed = [world.compose(one.truth, other, one.truth) for one in wanted]
    pictures = torch.from_numpy(np.stack([world.render(one).image for one in changed]))
    assert appearance_figures(pictures, wanted, judge)["appearance"] < 0.6
    assert appearance_figures(torch.full_like(truth, 0.5), wanted, judge)["appearance"] < 0.6


def test_a_shape_is_present_or_not() -> None:
    judge = Judge.load()
    (concept,) = concepts("shape", 1, tuning=True)
    wanted = concept.wanted(8)
    truth = torch.from_numpy(np.stack([world.render(one.truth).image for one in wanted]))
    assert shape_figures(truth, wanted, judge)["shape_present"] == 1
    assert shape_figures(truth.flip(0), wanted, judge)["prompt_obeyed"] < 0.5


def test_prompts_say_something_else_about_all_but_the_concept() -> None:
    for kind in ("shape", "appearance"):
        for concept in concepts(kind, 8, tuning=False):
            own = concept.factors
            assert (own.shape in world.WITHHELD_SHAPES) == (kind == "shape")
            assert (own.appearance.texture in world.WITHHELD_TEXTURES) == (kind == "appearance")
            for one in concept.wanted(6):
                assert (one.truth.shape == own.shape) == (kind == "shape")
                assert (one.truth.appearance == own.appearance) == (kind == "appearance")
                assert not any(word in one.prompt for word in (*world.WITHHELD_SHAPES, *world.WITHHELD_TEXTURES))
    shape, look = concepts("shape", 1, False)[0], concepts("appearance", 1, False)[0]
    assert together(shape, look, 1)[0].prompt.startswith("a <look> <form> on ")


def test_dear_methods_may_have_fewer_concepts_and_say_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bench = Bench(steps=2, prompts=1, tuning=True)
    bench.folder = tmp_path
    monkeypatch.setattr(bench, "alone", lambda name, concept: {"appearance": float(concept.seed % 10), "steps": 2})
    assert bench.run(["appearance"], "ours: attention on mask alone", 1)["appearance"] == {}
    found = bench.run(["appearance"], "ours, textual inversion", 3, fewest(["textual inversion=1"], fewer()))[
        "appearance"
    ]
    assert (found["ours"]["concepts"], found["ours"]["appearance"]) == (3, 1)
    assert (found["textual inversion"]["concepts"], found["textual inversion"]["appearance"]) == (1, 0)
    asked = fewest(["others=1", "joint=2"], fewer())
    assert not {"ours", "textual inversion"} & set(asked)
    assert (asked["dreambooth lora"], asked["joint"]) == (1, 2)
    for wrong in ("ours", "ours=0", "mine=2"):
        with pytest.raises(SystemExit, match=f"--fewer: '{wrong}'"):
            fewest([wrong], fewer())


def test_a_method_is_for_the_kinds_it_means_something_for() -> None:
    assert not [name for name in methods.METHODS if "," in name]  # --methods is a list by commas
    assert methods.METHODS["ours"].kinds == ("shape", "appearance")
    for name, method in methods.METHODS.items():
        for kind in method.kinds:
            plan = method.plan(kind, 8)
            assert sum(stage.steps for stage in plan.stages) == 8
            assert name == "ours" or not method.augmented or method.whole or plan != methods.ours(kind, 8), name


def test_every_kind_of_method_runs_and_what_is_kept_is_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.inference_mode():
        bench = Bench(steps=2, prompts=1, tuning=True)
        bench.folder = tmp_path
        before = bench.demo.model.model.diffusion_model.state_dict()["out.2.weight"].clone()
        names = "ours, textual inversion, dreambooth lora, full fine-tune"
        kinds = ["shape", "appearance", "both"]
        figures = bench.run(kinds, names, 1)
        assert torch.equal(bench.demo.model.model.diffusion_model.state_dict()["out.2.weight"], before)
        monkeypatch.setattr(methods, "learned", None)
        assert bench.run(kinds, names, 1) == figures
    assert set(figures["shape"]) == set(map(str.strip, names.split(",")))
    assert {"shape_present", "prompt_obeyed", "seconds_per_step", "steps"} <= figures["shape"]["ours"].keys()
    assert {"appearance", "shape_obeyed"} <= figures["both"]["ours"].keys()
    assert figures["appearance"]["ours"]["steps"] == 2
    assert "| full fine-tune |" in tables(figures)["shape"]
    assert bench.sheet(kinds, 1).size == (128 * 3, 128 * 3)


@pytest.mark.parametrize("way", joint.WAYS)
def test_both_are_learned_from_one_picture(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jointly, each lesson sees the other's token and offset; what comes out knows both words and changes the model."""

    def small(kind: Kind, steps: int) -> Plan:
        plan = methods.ours(kind, steps)
        stages = tuple(replace(stage, batch=2) for stage in plan.stages)
        return replace(plan, stages=stages, variants=4, vectors=1, rank=2)

    monkeypatch.setattr(joint, "ours", small)
    (newcomer,) = newcomers(1, tuning=True)
    assert newcomer.factors.shape in world.WITHHELD_SHAPES
    assert newcomer.factors.appearance.texture in world.WITHHELD_TEXTURES
    with torch.inference_mode():
        demo = load_demo_model()
        found = joint.learned_both(way, newcomer, 2, demo)
        assert len(found.model.patches) > len(demo.model.patches) == 0
        told = [generate(one, ["a <look> <form>"], [1], steps=2) for one in (found, found, demo)]
    assert torch.equal(told[0], told[1])
    assert not torch.equal(told[0], told[2])


def test_crossed_pairs_have_the_shape_of_the_one_and_the_look_of_the_other() -> None:
    pairs = crossed(8, tuning=False)
    assert len({pair.seed for pair in pairs}) == len({(pair.shape_of.seed, pair.look_of.seed) for pair in pairs}) == 32
    assert len({pair.b.appearance.colour for pair in pairs}) == LOOKS
    for pair in pairs:
        assert pair.a == pair.shape_of.factors
        assert pair.b == pair.look_of.factors
        truth = world.compose(pair.a, pair.b, pair.a)
        assert np.array_equal(pair.truth.image, world.render(truth).image)
    assert said("shape", "appearance")(pairs[0]) == f"a <look> <form> on {pairs[0].a.background}"
    assert said()(pairs[0]) == f"a shape on {pairs[0].a.background}"


def test_what_is_judged_together_was_neither_tuned_on_nor_judged_alone() -> None:
    pairs = crossed(16, tuning=False)
    seen = {one.seed for tuning in (False, True) for one in concepts("shape", 1000, tuning)}
    assert not seen & {one.seed for pair in pairs for one in (pair.shape_of, pair.look_of)}
    assert not {pair.seed for pair in pairs} & {pair.seed for pair in crossed(100, tuning=True)}


def test_intervals_are_over_shapes() -> None:
    pairs = crossed(2, tuning=True)
    figures = [{"x": float(one)} for one in (0, 1, 2, 3, 10, 10, 10, 10)]
    assert by_shape(figures, pairs) == [{"x": 1.5}, {"x": 10.0}]


def test_what_was_composed_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures stay as long as what was learned does; a row that needs nothing learned asks for nothing."""
    rows = {name: ROWS[name] for name in ("prompt only", "workflow + learned shape")}
    monkeypatch.setattr(crossings, "ROWS", rows)
    bench = Bench(2, 1, tuning=True)
    bench.folder, learned = tmp_path, []

    def applied(name: str, of: list[Concept]) -> DemoModel:
        learned.append((name, [one.seed for one in of]))
        return load_demo_model()

    monkeypatch.setattr(bench, "applied", applied)
    (pair, *_) = crossed(1, tuning=True)
    with torch.inference_mode():
        found, ((*_, first, second),) = composed(bench, [pair])
        again, ((*_, kept, _),) = composed(bench, [pair])
    assert learned == [("ours", []), ("ours", [pair.shape_of.seed])]
    assert found == again
    assert np.array_equal(first, kept)
    assert not np.array_equal(first, second)
    monkeypatch.setattr(bench, "state", lambda name, kinds: f"another {kinds}")
    with torch.inference_mode():
        composed(bench, [pair])
    assert len(learned) == 4


def test_the_command_writes_figures_tables_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run as a program, where what a module defines itself would be known by another name."""
    monkeypatch.setattr(crossings, "ROWS", {name: ROWS[name] for name in ("prompt only", "workflow + learned shape")})
    monkeypatch.setattr(crossings, "CROSSINGS", 1)
    monkeypatch.setattr(Bench, "applied", lambda *_: load_demo_model())
    figures = {key: 0.25 for key in COLUMNS["shape"] if key != "concepts"}
    monkeypatch.setattr(Bench, "alone", lambda *_: figures)
    begin = Bench.__init__

    def begun(bench: Bench, *arguments: Any) -> None:
        begin(bench, *arguments)
        bench.folder = tmp_path

    monkeypatch.setattr(Bench, "__init__", begun)
    made, page, sheet = tmp_path / "found.json", tmp_path / "page.md", tmp_path / "sheet.jpg"
    page.write_text("<!-- composed -->\n<!-- end of composed -->\n<!-- alone -->\n<!-- end of alone -->\n", "utf-8")
    words = ["--steps", "2", "--prompts", "1", "--shapes", "2", "--tuning"]
    words += ["--json", str(made), "--docs", str(page), "--sheet", str(sheet)]
    monkeypatch.setattr(sys, "argv", ["composed", *words])
    runpy.run_module("benchmarks.inversion.composed", run_name="__main__")
    found = json.loads(made.read_text("utf-8"))
    assert (found["pairs"], found["shapes"]) == (2, 2)
    assert set(found["methods"]) == {"prompt only", "workflow + learned shape"}
    assert found["alone"]["ours"]["shape_present"] == 0.25
    text = page.read_text("utf-8")
    assert "| workflow + learned shape |" in text
    assert "| ours | 2 | 0.25 |" in text
    with Image.open(sheet) as shown:
        assert shown.size == (128 * 5, 128 * 2)


def test_a_probe_finds_what_is_linear_and_nothing_where_there_is_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(40).repeat_interleave(4)
    x = torch.randn(160, 6, generator=generator)
    y = x @ torch.randn(6, 3, generator=generator)
    held = torch.arange(8)
    assert probe(x, y, groups, held) > 0.99
    assert abs(probe(x, torch.randn(160, 3, generator=generator), groups, held)) < 0.1
