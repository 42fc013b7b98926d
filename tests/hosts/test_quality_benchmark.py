"""The quality benchmark: what it keeps, when it makes a picture anew, what it measures, on both networks."""

from __future__ import annotations

import ast
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import appearance_loss, color, correspondence, demo_model
from benchmarks.fewer import fewest
from benchmarks.inversion import concepts, crossed
from benchmarks.quality import kept, methods, state
from benchmarks.quality.__main__ import _methods, against, fewer, markdown, summary
from benchmarks.quality.groups import ATTENTION, DIT_PAGE, GROUPS, OURS, PLACED, TABLE, UNET_ONLY
from benchmarks.quality.measures import MEASURES, Judges, measure
from benchmarks.quality.methods import Studio
from benchmarks.quality.pairs import Pair, pairs
from benchmarks.quality.recolored import recolored
from demo.model import load_demo_model
from demo.train import autoencoder, judge, latents, vit
from demo.train.data import TRAINING_SEED
from inversion_core.presets import PRESETS

DEFAULT = partial(methods.injected, PRESETS["default"])


@pytest.fixture(scope="module")
def judges() -> Judges:
    return Judges.load()


@pytest.fixture(scope="module")
def studio() -> Studio:
    return Studio(load_demo_model(network="DiT"))


def test_every_method_has_a_state_of_its_own() -> None:
    everything = {name: one for group in TABLE for name, one in GROUPS[group].items()}
    states = [state.state_of(one, network) for one in everything.values() for network in state.NETWORKS]
    assert len(set(states)) == len(states) == 2 * len(everything)


def test_a_networks_weights_count_for_its_own_pictures_only(monkeypatch: pytest.MonkeyPatch) -> None:
    before = [state.state_of(DEFAULT, network) for network in ("UNet", "DiT")]
    weights = state._weights
    monkeypatch.setattr(state, "_weights", lambda name: "trained on" if name == state.DIT else weights(name))
    after = [state.state_of(DEFAULT, network) for network in ("UNet", "DiT")]
    assert after[0] == before[0] and after[1] != before[1]


def test_no_method_reads_a_table_that_its_state_leaves_out() -> None:
    tree = ast.parse(Path(methods.__file__).read_text(encoding="utf-8"))
    assigned = [node for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign) and state._is_table(node)]
    assert [ast.unparse(node).split(" = ")[0] for node in assigned] == ["Method"]  # a type
    assert "PRESETS" not in {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def test_what_a_method_does_changes_its_state_and_what_it_says_of_itself_does_not() -> None:
    preset = PRESETS["default"]
    said = partial(methods.injected, replace(preset, source="found elsewhere", differences=("none",)))
    sharper = replace(preset.steps[0], edit=replace(preset.steps[0].edit, contrast=2.0))
    done = partial(methods.injected, replace(preset, steps=(sharper,)))
    assert state.state_of(said, "UNet") == state.state_of(DEFAULT, "UNet")
    assert state.state_of(done, "UNet") != state.state_of(DEFAULT, "UNet")
    assert state.state_of(partial(DEFAULT, shape="flat a"), "UNet") != state.state_of(DEFAULT, "UNet")


def test_a_picture_depends_on_what_its_method_can_reach_and_on_nothing_else() -> None:
    reached = state._closure(("benchmarks/quality/methods.py",))
    assert {
        "inversion_core/attention.py",
        "inversion_core/hosts/comfy_unet.py",
        "demo/model.py",
        "demo/vit.py",
    } <= reached
    assert not any(name.startswith(("nodes/", "inversion_core/learning/", "demo/train/")) for name in reached)
    assert not {"demo/judge.py", "benchmarks/quality/groups.py"} & reached


def test_comments_docstrings_and_tables_do_not_count_but_code_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "ROOT", tmp_path)
    monkeypatch.setattr(state, "TABLES", ("m.py",))

    def code(text: str) -> str:
        (tmp_path / "m.py").write_text(text, encoding="utf-8")
        state._code.cache_clear()
        return state._code("m.py")

    first = code('"""One."""\nA = 3\nT = {"a": f}\ndef f():\n    """Says."""\n    return 1\n')
    assert code("A = 3\nT = dict(b=f)\n# more\ndef f():\n    return 1\n") == first
    assert code("A = 4\ndef f():\n    return 1\n") != first
    assert code("A = 3\ndef f():\n    return 2\n") != first
    state._code.cache_clear()


def test_results_are_found_again_and_only_under_their_own_name(tmp_path: Path) -> None:
    store = kept.Kept(tmp_path, {"default": DEFAULT, "flat": partial(DEFAULT, shape="flat a")}, "UNet")
    made = store.add("default", 5, methods.Result(torch.rand(8, 8, 3), 40, 1.5, untouched=1.0))
    again = store.result("default", 5)
    assert again is not None and torch.equal(again.picture, made.picture)
    assert (again.rows, again.seconds, again.untouched) == (40, 1.5, 1.0)
    assert store.result("default", 6) is None and store.result("flat", 5) is None
    assert store.figures("default", 5) is None
    store.add_figures("default", 5, {"shape_iou": 0.5})
    assert store.figures("default", 5) == {"shape_iou": 0.5}
    assert not list(tmp_path.glob("partial*"))


def test_the_true_answer_is_the_best_and_the_given_pictures_are_not(judges: Judges) -> None:
    pair = Pair(77)
    truth, a, b = (torch.from_numpy(one.image) for one in (pair.truth, pair.shape, pair.appearance))
    best, shape, look = (measure(one, pair, judges) for one in (truth, a, b))
    assert set(best) == set(MEASURES)
    assert best["appearance"] == 1 and best["shape_iou"] > 0.95 and best["colour_delta_e"] == 0
    assert shape["appearance"] == 0 and shape["vit_layout"] == 0 and shape["judge_layout"] == pytest.approx(0, abs=1e-9)
    assert look["vit_look"] == pytest.approx(1) and look["judge_look"] == pytest.approx(1)
    assert look["shape_iou"] < best["shape_iou"]
    assert best["judge_look"] > shape["judge_look"]


def test_on_the_place_the_truth_has_its_background(judges: Judges) -> None:
    pair = Pair(77)
    assert pair.c.background != pair.a.background
    truth = torch.from_numpy(pair.placed_truth.image)
    right, wrong = (measure(truth, pair, judges, placed=placed) for placed in (True, False))
    assert right["background"] == 1 and right["appearance"] == 1
    assert wrong["background"] < 1


def test_what_is_placed_leaves_the_place_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "STEPS", 2)
    with torch.inference_mode():
        made = PLACED["default on C"](Studio(load_demo_model()), Pair(77))
    assert made.untouched == 1
    place = torch.from_numpy(Pair(77).place)
    assert float((made.picture - place).abs().max()) > 0.1


def test_a_recoloured_picture_takes_b_s_colours_inside_a_s_mask_and_nothing_else_changes(judges: Judges) -> None:
    pair = Pair(77)
    picture = torch.from_numpy(pair.shape.image)
    made = recolored(lambda *_: methods.Result(picture, 80, 1.0, untouched=0.5), Studio(load_demo_model()), pair)
    outside = torch.from_numpy(pair.shape.mask) == 0
    assert torch.equal(made.picture[outside], picture[outside])
    before, after = (measure(one, pair, judges)["colour_delta_e"] for one in (picture, made.picture))
    assert after < 0.2 * before
    assert (made.rows, made.untouched) == (80, 0.5) and made.seconds > 1


def test_a_table_may_hold_placed_methods_beside_others() -> None:
    row = dict.fromkeys((*MEASURES, "rows", "seconds"), 1.0)
    text = markdown(summary({"prompt only": [row], "default on C": [{**row, "untouched": 0.5}]}), 1)
    first, _, plain, placed = text.splitlines()[:4]
    column = [cell.strip() for cell in first.split("|")].index("untouched")
    assert [line.split("|")[column].strip() for line in (plain, placed)] == ["", "0.50"]


def test_every_method_runs_on_the_transformer(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "STEPS", 6)
    (pair,) = pairs(1, tuning=True)
    plain = DIT_PAGE["prompt only"](studio, pair)
    alone = "colour guidance alone"
    for name, method in {**DIT_PAGE, **ATTENTION, **PLACED, alone: OURS[alone]}.items():
        if name in UNET_ONLY:
            continue
        made = method(studio, pair)
        assert made.picture.shape == (128, 128, 3)
        assert bool(torch.isfinite(made.picture).all())
        if name != "prompt only":
            assert not torch.equal(made.picture, plain.picture), name
            assert (made.rows > plain.rows) == (name != alone), name


def test_presets_without_a_form_on_transformers_are_left_out(studio: Studio) -> None:
    assert _methods(None, "UNet").keys() - _methods(None, "DiT").keys() == UNET_ONLY
    (pair,) = pairs(1, tuning=True)
    for name in UNET_ONLY:
        with pytest.raises(ValueError, match=name):
            ATTENTION[name](studio, pair)


def test_gain_is_over_the_other_method_on_the_same_pair() -> None:
    results = {
        "plain": [{"appearance": 0.25}, {"appearance": 0.5}],
        "other": [{"appearance": 1.0}, {"appearance": 0.5}],
        "fewer": [{"appearance": 0.5}],
        "default on C": [{"appearance": 0.5}],
    }
    found = against(results, "gain", "appearance", "plain")
    assert [row["gain"] for row in found["other"]] == [0.75, 0.0]
    assert [row["gain"] for row in found["plain"]] == [0.0, 0.0]
    assert [row["gain"] for row in found["fewer"]] == [0.25]
    assert found["default on C"] == results["default on C"]
    assert against(results, "gain", "appearance", "absent") == results


def test_a_row_of_fewer_pairs_says_so() -> None:
    row = dict.fromkeys((*MEASURES, "rows", "seconds"), 1.0)
    text = markdown(summary({"prompt only": [row, row], "dear": [row]}), 2)
    first, _, plain, dear = text.splitlines()[:4]
    column = [cell.strip() for cell in first.split("|")].index("pairs")
    assert [line.split("|")[column].strip() for line in (plain, dear)] == ["2", "1"]
    assert "pairs" not in markdown(summary({"prompt only": [row, row]}), 2).splitlines()[0].split(" | ")


def test_groups_may_be_given_fewer_pairs() -> None:
    assert fewest(["placed=16"], fewer()) == dict.fromkeys(PLACED, 16)
    assert fewest(["attention=16", "default=32"], fewer()) == {**dict.fromkeys(ATTENTION, 16), "default": 32}
    for wrong in ("placed", "placed=some", "placed=0", "nobody=3"):
        with pytest.raises(SystemExit, match=wrong):
            fewest([wrong], fewer())


def test_no_judged_picture_was_trained_on_tuned_on_or_drawn_by_another_benchmark() -> None:
    def drawn(first: int) -> set[range]:
        """Seeds of A, and of B and C, which are drawn again where they are too much like A."""
        return {range(first, first + 1000), *(range(first + far, first + far + 1100) for far in (10**7, 2 * 10**7))}

    steps = 10_000  # more than any recipe has
    trained = {
        range(TRAINING_SEED, TRAINING_SEED + max(latents.PICTURES, autoencoder.BATCH * steps)),
        range(judge.FIRST_SEED, judge.FIRST_SEED + judge.BATCH * steps),
        range(vit.FIRST_SEED, vit.FIRST_SEED + 2 * vit.BATCH * steps),
    }
    modules = (appearance_loss, color, crossed, correspondence, demo_model, concepts)
    others = {range(module.FIRST_SEED, module.FIRST_SEED + 10_000) for module in modules}
    for judged in drawn(pairs(1, tuning=False)[0].seed):
        for seeds in trained | others | drawn(pairs(1, tuning=True)[0].seed):
            assert judged.stop <= seeds.start or seeds.stop <= judged.start, (judged, seeds)
