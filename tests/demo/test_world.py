"""The demo world: known from a seed, and every factor exchangeable on its own."""

from dataclasses import replace

import numpy as np
import pytest

from demo import world

MANY = range(600)


def pooled(mask: np.ndarray, factor: int) -> np.ndarray:
    side = mask.shape[0] // factor
    return mask.reshape(side, factor, side, factor).mean(axis=(1, 3))


def test_the_world_is_as_large_as_promised() -> None:
    assert len(world.SHAPES) >= 16
    assert len(world.WITHHELD_SHAPES) == 4
    assert len(world.TEXTURES) == 7
    assert len(world.WITHHELD_TEXTURES) == 1
    assert len(world.COLOURS) == 8
    assert any(top != bottom for top, bottom in world.BACKGROUNDS.values())
    assert world.SIZE == 128


def test_a_seed_says_it_all() -> None:
    for seed in (0, 7, 1_000_123):
        first, second = (world.render(world.sample(seed)) for _ in range(2))
        assert world.sample(seed) == world.sample(seed)
        np.testing.assert_array_equal(first.image, second.image)
        np.testing.assert_array_equal(first.mask, second.mask)
    assert len({world.sample(seed) for seed in MANY}) == len(MANY)


def test_drawing_does_not_touch_numpys_global_state() -> None:
    np.random.seed(3)
    expected = np.random.random()
    np.random.seed(3)
    world.render(world.sample(1))
    assert np.random.random() == expected


def test_by_default_everything_is_drawn_but_what_is_withheld() -> None:
    drawn = [world.sample(seed) for seed in MANY]
    assert {f.shape for f in drawn} == set(world.SHAPES) - set(world.WITHHELD_SHAPES) == set(world.TRAINED_SHAPES)
    assert {f.appearance.texture for f in drawn} == set(world.TRAINED_TEXTURES)
    assert set(world.TRAINED_TEXTURES).isdisjoint(world.WITHHELD_TEXTURES)
    assert {f.appearance.colour for f in drawn} == set(world.COLOURS)
    assert {f.background for f in drawn} == set(world.BACKGROUNDS)


def test_what_is_withheld_can_be_asked_for() -> None:
    drawn = [world.sample(seed, shapes=world.WITHHELD_SHAPES, textures=world.WITHHELD_TEXTURES) for seed in range(60)]
    assert {f.shape for f in drawn} == set(world.WITHHELD_SHAPES)
    assert {f.appearance.texture for f in drawn} == set(world.WITHHELD_TEXTURES)


def test_position_size_and_rotation_vary_and_the_object_stays_in_the_picture() -> None:
    poses = [world.sample(seed).pose for seed in MANY]
    for name in ("x", "y", "radius", "rotation"):
        assert np.std([getattr(pose, name) for pose in poses]) > 0.02, name
    for seed in range(40):
        coverage = world.mask(world.sample(seed, shapes=tuple(world.SHAPES)))
        assert coverage.sum() > 0.03 * coverage.size
        cut = coverage[0].sum() + coverage[-1].sum() + coverage[:, 0].sum() + coverage[:, -1].sum()
        assert cut < 0.03 * 4 * world.SIZE, "more than a tip lies outside the picture"


def test_prompts_and_values_name_the_factors() -> None:
    factors = world.sample(3)
    words = [world.value(factors, name) for name in ("colour", "texture", "shape", "background")]
    assert world.prompt(factors) == "a {} {} {} on {}".format(*words)


def test_a_picture_is_floats_in_range() -> None:
    for seed in range(10):
        image, coverage = world.render(world.sample(seed, textures=world.TEXTURES))
        assert (image.shape, image.dtype) == ((128, 128, 3), np.float32)
        assert (coverage.shape, coverage.dtype) == ((128, 128), np.float32)
        assert 0 <= image.min() <= image.max() <= 1
        assert coverage.min() == 0
        assert coverage.max() == 1


def test_compose_exchanges_appearance_and_background_and_nothing_else() -> None:
    a, b, c = (world.sample(seed) for seed in (1, 2, 3))
    made = world.compose(a, b, c)
    assert (made.shape, made.pose) == (a.shape, a.pose)
    assert made.appearance == b.appearance
    assert (made.background, made.background_shift) == (c.background, c.background_shift)
    assert world.compose(a, a, a) == a
    np.testing.assert_array_equal(world.render(made).mask, world.render(a).mask)


def test_outside_the_mask_is_the_background_and_inside_the_appearance_exactly() -> None:
    a, b, c = (world.sample(seed) for seed in (4, 5, 6))
    assert a.background != c.background
    image, coverage = world.render(a)
    outside, inside = coverage == 0, coverage == 1

    other_look = world.render(world.compose(a, b, a)).image
    other_place = world.render(world.compose(a, a, c)).image

    np.testing.assert_array_equal(image[outside], other_look[outside])
    np.testing.assert_array_equal(image[inside], other_place[inside])
    assert np.abs(image[inside] - other_look[inside]).max() > 0.1
    assert np.abs(image[outside] - other_place[outside]).max() > 0.1


def test_the_outline_mixes_both_by_its_coverage() -> None:
    """Plain object on a plain background: each pixel is coverage * one colour + (1 - coverage) * the other."""
    look = replace(world.sample(0, textures=("plain",)).appearance, tone=(1.0, 0.0, 0.5))
    factors = replace(world.sample(0), appearance=look, background="slate", background_shift=(0.0, 0.0, 0.0))
    image, coverage = world.render(factors)
    expected = (
        np.array(world.BACKGROUNDS["slate"][0]) * (1 - coverage[..., None])
        + np.array(look.tone) * (coverage[..., None])
    )
    np.testing.assert_allclose(image, expected, atol=1e-6)


@pytest.mark.parametrize("shape", list(world.SHAPES))
def test_masks_are_anti_aliased(shape: str) -> None:
    """Coverage is what a picture of four times the side would give, averaged: up to a tenth on the mean edge pixel."""
    factors = replace(world.sample(11), shape=shape)
    coverage, fine = world.mask(factors), pooled(world.mask(factors, 512), 4)
    edge = (fine > 0) & (fine < 1)
    assert ((coverage > 0.05) & (coverage < 0.95)).sum() > 0.3 * edge.sum()
    assert np.abs(coverage - fine)[edge].mean() < 0.1
    assert coverage.sum() == pytest.approx(fine.sum(), rel=0.02)


@pytest.mark.parametrize("size", [8, 64, 96, 200])
def test_any_size_shows_the_same_scene(size: int) -> None:
    factors = world.sample(12)
    image, coverage = world.render(factors, size)
    assert image.shape == (size, size, 3)
    assert coverage.mean() == pytest.approx(world.mask(factors).mean(), abs=0.02)


def test_a_picture_of_a_few_pixels_is_refused() -> None:
    with pytest.raises(ValueError, match=r"size is 7.*at least 8"):
        world.render(world.sample(0), 7)


def test_unknown_names_are_refused() -> None:
    factors = world.sample(0)
    with pytest.raises(ValueError, match="unknown shape 'blob'.*circle"):
        world.render(replace(factors, shape="blob"))
    with pytest.raises(ValueError, match="unknown texture 'furry'.*plain"):
        world.render(replace(factors, appearance=replace(factors.appearance, texture="furry")))
    with pytest.raises((KeyError, ValueError), match="nowhere"):
        world.render(replace(factors, background="nowhere"))


def test_the_demo_pair_shows_a_form_no_model_has_seen() -> None:
    shape_of, appearance_of = world.demo_pair()
    assert shape_of.shape in world.WITHHELD_SHAPES
    assert appearance_of.appearance.texture in world.TRAINED_TEXTURES
    assert shape_of.appearance.colour != appearance_of.appearance.colour
