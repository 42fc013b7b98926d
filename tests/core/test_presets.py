"""The presets as data: what each asks of a host, against what its paper says."""

import math

import pytest
import torch

from inversion_core.attention import AttentionEdit
from inversion_core.injection import Window
from inversion_core.presets import PRESETS, Preset
from inversion_core.reference import Reference
from inversion_core.sites import Site, select

from .unet_sites import SD15, SDXL

A, B = (Reference(torch.full((1, 4, 4, 4), float(value))) for value in range(2))


def sites_of(name: str, sites: list[Site]) -> list[int]:
    """Which of the model's self-attentions the preset reads appearance at, counted from the first."""
    chosen = frozenset().union(*(select(step.sites, sites) for step in PRESETS[name].steps))
    return [i for i, site in enumerate(sites) if site.name in chosen]


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_each_preset_names_its_source_and_acts_on_both_families(preset: Preset) -> None:
    assert preset.name == "default" or "arXiv" in preset.source
    assert preset.name == "default" or preset.differences
    for family in (SD15, SDXL):
        assert sites_of(preset.name, family)


def test_masactrl_begins_with_block_10_of_16_and_64_of_70() -> None:
    assert sites_of("masactrl", SD15) == list(range(10, 16))
    assert sites_of("masactrl", SDXL) == list(range(64, 70))
    assert PRESETS["masactrl"].steps[0].window == Window(4 / 50, 1.0)


def test_visual_style_swaps_in_the_last_6_of_70() -> None:
    assert sites_of("visual-style", SDXL) == list(range(64, 70))
    assert PRESETS["visual-style"].steps[0].window == Window()


def test_cross_image_has_a_window_for_each_resolution() -> None:
    (fine, coarse) = PRESETS["cross-image"].steps
    assert select(fine.sites, SD15) == {"output.9.0", "output.10.0", "output.11.0"}
    assert select(coarse.sites, SD15) == {"output.6.0", "output.7.0", "output.8.0"}
    assert (fine.window, coarse.window) == (Window(0.1, 0.9), Window(0.1, 0.7))
    assert fine.edit == coarse.edit == AttentionEdit("replace", shape_query=1.0, contrast=1.67)


def test_style_id_edits_decoder_blocks_6_to_11() -> None:
    assert select(PRESETS["style-id"].steps[0].sites, SD15) == {f"output.{number}.0" for number in range(6, 12)}
    assert PRESETS["style-id"].steps[0].edit == AttentionEdit("replace", shape_query=0.75, temperature=1.5)


def test_style_aligned_shares_everywhere_with_the_reference_counted_twice() -> None:
    (step,) = PRESETS["style-aligned"].steps
    assert step.edit == AttentionEdit("extend", qk_stats=True, reference_bias=math.log(2))
    assert (step.window, len(sites_of("style-aligned", SD15))) == (Window(), 16)


def test_ctrl_x_follows_the_authors_schedule_for_sdxl() -> None:
    (step,) = PRESETS["ctrl-x"].steps
    appearance = select(step.sites, SDXL)
    decoder = sorted({int(name.split(".")[1]) for name in appearance if name.startswith("output")})
    assert decoder == [1, 2, 3, 4]
    assert {name.split(".")[0] for name in appearance} == {"input", "output"}
    assert step.shape_sites is not None
    assert {name.rsplit(".", 1)[0] for name in select(step.shape_sites, SDXL)} == {"output.0", "output.1", "output.2"}
    assert (step.window, step.shape_window, step.rows) == (Window(0, 0.6), Window(0, 0.6), "positive")


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_without_a_shape_no_preset_asks_for_one(preset: Preset) -> None:
    for one in preset.injections([A]):
        assert (one.appearance, one.shape) == ((A,), None)
        assert (one.edit.shape_query, one.edit.shape_key) == (0, 0)


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_shape_strength_scales_all_of_the_shape_and_strength_all(preset: Preset) -> None:
    full, half = (preset.injections([A, B], B, shape_strength=share, strength=share) for share in (1.0, 0.5))
    for whole, part in zip(full, half, strict=True):
        assert whole.edit.shape_query > 0
        assert part.edit.shape_query == pytest.approx(whole.edit.shape_query / 2)
        assert part.edit.shape_key == pytest.approx(whole.edit.shape_key / 2)
        assert part.feature_strength == pytest.approx(whole.feature_strength / 2)
        assert (whole.edit.strength, part.edit.strength) == (1.0, 0.5)
    assert all(one.shape is None for one in preset.injections([A], B, shape_strength=0.0))


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_a_shape_may_be_let_go_before_the_method_would(preset: Preset) -> None:
    whole = preset.injections([A], B)
    early, late = (preset.injections([A], B, shape_end=end) for end in (0.5, 0.95))
    for own, less, more in zip(whole, early, late, strict=True):
        assert (less.shape_window.start, less.shape_window.end) == (own.shape_window.start, 0.5)
        assert more.shape_window.end == min(own.shape_window.end, 0.95)
        assert less.window == more.window == own.window
    assert all(one.shape is None for one in preset.injections([A], B, shape_end=0.0))
    assert [one.shape_window for one in preset.injections([A], B, shape_end=1.0)] == [o.shape_window for o in whole]
    with pytest.raises(ValueError, match=r"shape_end is -0\.1.*between 0 and 1"):
        preset.injections([A], B, shape_end=-0.1)


def test_a_preset_needs_an_appearance_and_a_share() -> None:
    with pytest.raises(ValueError, match="masactrl needs an appearance reference"):
        PRESETS["masactrl"].injections([])
    with pytest.raises(ValueError, match=r"shape_strength is 1\.5.*between 0 and 1"):
        PRESETS["default"].injections([A], B, shape_strength=1.5)


@pytest.mark.parametrize("preset", [one for name, one in PRESETS.items() if name != "ctrl-x"], ids=lambda one: one.name)
def test_on_a_transformer_a_preset_keeps_its_edit_and_asks_for_the_familys_blocks(preset: Preset) -> None:
    made, first = preset.injections([A], B, transformer=True), preset.injections([A], B)
    assert {one.sites for one in made} <= {"all", "appearance"}
    assert {one.feature_strength for one in made} == {0}
    for one in made:
        assert any((one.edit, one.window, one.rows) == (like.edit, like.window, like.rows) for like in first)


def test_ctrl_x_is_refused_on_a_transformer_with_those_that_are_not() -> None:
    with pytest.raises(
        ValueError, match=r"ctrl-x.*no form for a diffusion transformer.*default, masactrl, .*style-id .*dit\.md"
    ):
        PRESETS["ctrl-x"].injections([A], transformer=True)
