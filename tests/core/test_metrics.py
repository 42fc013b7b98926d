"""What composition is measured by: the ends of the scale, the order between, and what must not count."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from skimage.color import rgb2lab
from torch import Tensor

from demo import world
from demo.vit import BACKBONE
from demo.weights import FOLDER
from inversion_core.features import Backbone, FeatureError, Features, TimmExtractor, load
from inversion_core.metrics import (
    CompositionScore,
    appearance_distance,
    appearance_score,
    cls_similarity,
    color_difference,
    composition_score,
    mask_iou,
    self_similarity_distance,
)

SIZE = 64
RED, BLUE, GREEN, YELLOW = (0.9, 0.1, 0.1), (0.1, 0.1, 0.9), (0.1, 0.7, 0.2), (0.9, 0.9, 0.1)


def flat(colour: tuple[float, float, float], size: int = SIZE) -> Tensor:
    return torch.tensor(colour).view(3, 1, 1).expand(3, size, size).clone()


def stripes(first: tuple[float, float, float], second: tuple[float, float, float], period: int = 16) -> Tensor:
    is_first = (torch.arange(SIZE) % period < period // 2).expand(SIZE, SIZE)
    return torch.where(is_first, flat(first), flat(second))


def disc(size: int = SIZE, x: float = 0.5, y: float = 0.5, radius: float = 0.3) -> Tensor:
    """Hard-edged, (H, W)."""
    centres = (torch.arange(size) + 0.5) / size
    return (torch.hypot(centres[None] - x, centres[:, None] - y) < radius).float()


def box(size: int = SIZE) -> Tensor:
    """Its edges lie on the grid of the coarsest scale."""
    mask = torch.zeros(size, size)
    mask[16:48, 16:48] = 1
    return mask


def test_iou_of_known_overlaps() -> None:
    whole, left, middle = torch.ones(4, 4), torch.zeros(4, 4), torch.zeros(4, 4)
    left[:, :2] = 1
    middle[:, 1:3] = 1
    assert mask_iou(whole, whole) == 1
    assert mask_iou(whole, left) == mask_iou(left, whole) == 0.5
    assert mask_iou(left, middle) == pytest.approx(1 / 3)
    assert mask_iou(left, 1 - left) == 0


def test_iou_counts_what_is_more_than_half_covered() -> None:
    assert mask_iou(torch.tensor([[0.51, 0.5]]), torch.tensor([[1.0, 0.0]])) == 1


def test_iou_without_any_object() -> None:
    empty = torch.zeros(4, 4)
    assert mask_iou(empty, empty) == 1
    assert mask_iou(empty, torch.ones(4, 4)) == 0


@pytest.mark.parametrize("truth", [flat(BLUE), stripes(YELLOW, GREEN)], ids=["flat", "striped"])
def test_the_truth_scores_one_and_the_source_zero(truth: Tensor) -> None:
    source, mask = flat(RED), disc()
    assert appearance_score(truth, truth, source, mask) == 1
    assert appearance_score(source, truth, source, mask) == 0


@pytest.mark.parametrize("truth", [flat(BLUE), stripes(YELLOW, GREEN)], ids=["flat", "striped"])
def test_mixtures_lie_between_in_their_order(truth: Tensor) -> None:
    source, mask = flat(RED), disc()
    scores = [appearance_score(torch.lerp(source, truth, t), truth, source, mask) for t in (0, 0.25, 0.5, 0.75, 1)]
    assert scores == sorted(scores)
    assert len(set(scores)) == 5


def test_a_result_further_away_than_the_source_scores_below_zero() -> None:
    assert appearance_score(flat((0.0, 1.0, 0.0)), flat((0.9, 0.1, 0.5)), flat(RED), disc()) < 0


def test_the_right_colours_in_the_wrong_texture_are_not_the_truth() -> None:
    truth, source, mask = stripes(YELLOW, GREEN), flat(RED), disc()
    mean = torch.lerp(flat(YELLOW), flat(GREEN), 0.5)
    assert 0 < appearance_score(mean, truth, source, mask) < 0.95
    assert 0 < appearance_score(stripes(YELLOW, GREEN, period=4), truth, source, mask) < 0.95


def test_where_in_the_object_a_colour_sits_counts_little() -> None:
    """The same two halves exchanged, against other colours in the same halves."""
    is_left = (torch.arange(SIZE) < SIZE // 2).expand(SIZE, SIZE)
    halves = torch.where(is_left, flat(RED), flat(BLUE))
    exchanged = torch.where(is_left, flat(BLUE), flat(RED))
    others = torch.where(is_left, flat(GREEN), flat(YELLOW))
    mask = disc()
    assert appearance_distance(halves, exchanged, mask, mask) < 0.25 * appearance_distance(halves, others, mask, mask)


def test_moving_picture_and_mask_together_changes_nothing() -> None:
    picture, mask = stripes(YELLOW, GREEN), disc(radius=0.2)
    moved, moved_mask = (torch.roll(x, (8, 12), (-2, -1)) for x in (picture, mask))
    assert appearance_distance(picture, moved, mask, moved_mask) == pytest.approx(0, abs=1e-5)


def test_the_background_never_counts() -> None:
    truth, source, mask = stripes(YELLOW, GREEN), flat(RED), box()
    result = torch.lerp(source, truth, 0.5)
    on_noise = torch.where(mask > 0, result, torch.rand(result.shape, generator=torch.Generator().manual_seed(0)))
    assert appearance_score(on_noise, truth, source, mask) == appearance_score(result, truth, source, mask)


def test_the_background_never_counts_on_an_outline_off_the_grid_either() -> None:
    picture, mask = stripes(YELLOW, GREEN), disc()
    other = torch.where(mask > 0, picture, flat(BLUE))
    assert appearance_distance(picture, other, mask, mask) == 0


def test_distance_is_symmetric() -> None:
    a, b, mask = stripes(YELLOW, GREEN), flat(RED), disc()
    assert appearance_distance(a, b, mask, mask) == pytest.approx(appearance_distance(b, a, mask, mask), rel=1e-5)


def test_the_pictures_may_differ_in_size() -> None:
    small, large = disc(64), disc(96)
    same = appearance_distance(flat(RED, 64), flat(RED, 96), small, large)
    assert same < 0.25 * appearance_distance(flat(RED, 64), flat(BLUE, 96), small, large)


def test_an_object_of_a_pixel_still_has_an_appearance() -> None:
    mask = torch.zeros(SIZE, SIZE)
    mask[30, 31] = 1
    assert appearance_distance(flat(RED), flat(BLUE), mask, mask) > 0


def test_an_empty_mask_and_equal_ends_are_refused() -> None:
    with pytest.raises(ValueError, match="mask is empty"):
        appearance_distance(flat(RED), flat(BLUE), torch.zeros(SIZE, SIZE), disc())
    with pytest.raises(ValueError, match="look the same"):
        appearance_score(flat(RED), flat(BLUE), flat(BLUE), disc())


def features(seed: int, grid: tuple[int, int] = (2, 3), has_cls: bool = True) -> Features:
    generator = torch.Generator().manual_seed(seed)
    n = grid[0] * grid[1]
    tokens = torch.randn(1, n, 8, generator=generator)
    keys = torch.randn(1, 2, n + 1, 4, generator=generator)
    cls = torch.randn(1, 8, generator=generator) if has_cls else None
    cls_key = keys[:, :, 0] if has_cls else None
    return Features(grid, tokens, tokens, keys[:, :, 1:], cls, cls, cls_key, str(seed))


def test_the_self_similarity_distance_by_its_definition() -> None:
    a, b = features(1), features(2)

    def similarity(one: Features) -> np.ndarray:
        assert one.cls_key is not None
        keys = torch.cat((one.cls_key[:, :, None], one.keys), dim=2)[0].permute(1, 0, 2).flatten(1).double().numpy()
        return np.array([[u @ v / np.linalg.norm(u) / np.linalg.norm(v) for v in keys] for u in keys])

    assert self_similarity_distance(a, b) == pytest.approx(((similarity(a) - similarity(b)) ** 2).mean(), rel=1e-5)
    assert self_similarity_distance(a, a) == 0
    without = (replace(a, cls_key=None), replace(b, cls_key=None))
    expected = ((similarity(a) - similarity(b))[1:, 1:] ** 2).mean()
    assert self_similarity_distance(*without) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match=r"on \(2, 3\) and \(3, 2\): resize"):
        self_similarity_distance(a, features(1, (3, 2)))


def test_the_cls_similarity_is_a_cosine() -> None:
    a, b = features(1), features(2)
    assert a.cls_normed is not None and b.cls_normed is not None
    u, v = a.cls_normed[0].double().numpy(), b.cls_normed[0].double().numpy()
    assert cls_similarity(a, b) == pytest.approx(u @ v / np.linalg.norm(u) / np.linalg.norm(v), rel=1e-5)
    assert cls_similarity(a, a) == pytest.approx(1)
    with pytest.raises(FeatureError, match="no CLS token"):
        cls_similarity(features(1, has_cls=False), b)


def test_the_colour_difference_is_in_cielab() -> None:
    expected = np.linalg.norm(rgb2lab(np.array([[RED]])) - rgb2lab(np.array([[BLUE]])))
    assert color_difference(flat(RED), flat(BLUE, 40)) == pytest.approx(expected, rel=2e-3)
    half = torch.where((torch.arange(SIZE) < SIZE // 2).expand(SIZE, SIZE), flat(RED), flat(GREEN))
    left = (torch.arange(SIZE) < SIZE // 2).expand(SIZE, SIZE).float()
    assert color_difference(half, flat(BLUE), left) == pytest.approx(expected, rel=2e-3)
    assert color_difference(flat(RED), half, None, left) == pytest.approx(0, abs=1e-3)
    with pytest.raises(ValueError, match="mask is empty"):
        color_difference(half, half, left, torch.zeros(SIZE, SIZE))


@pytest.fixture(scope="module")
def demo_vit() -> TimmExtractor:
    backbone = Backbone(**BACKBONE)
    return TimmExtractor(load(backbone, FOLDER / backbone.file), backbone)


def rendered(factors: world.Factors) -> tuple[Tensor, Tensor]:
    found = world.render(factors)
    return torch.from_numpy(found.image).permute(2, 0, 1), torch.from_numpy(found.mask)


def test_the_true_composition_scores_above_both_pictures_it_is_made_of(demo_vit: TimmExtractor) -> None:
    a, b = world.demo_pair()
    (shape, shape_mask), (appearance, appearance_mask) = rendered(a), rendered(b)

    def score(result: Tensor, mask: Tensor) -> CompositionScore:
        return composition_score(
            demo_vit,
            result,
            shape,
            appearance,
            result_mask=mask,
            shape_mask=shape_mask,
            appearance_mask=appearance_mask,
        )

    true = score(*rendered(world.compose(a, b, a)))
    own, other = score(shape, shape_mask), score(appearance, appearance_mask)
    assert (true.backbone, true.block, true.size) == ("demo-vit", 5, 128)
    assert own.self_similarity_distance == 0
    assert true.self_similarity_distance < other.self_similarity_distance
    assert true.cls_similarity is not None and own.cls_similarity is not None and other.cls_similarity is not None
    assert own.cls_similarity < true.cls_similarity < other.cls_similarity
    assert other.cls_similarity == pytest.approx(1)
    assert true.mask_iou == own.mask_iou == 1
    assert other.mask_iou is not None and other.mask_iou < 0.9
    assert true.color_difference < 0.5 * own.color_difference
    assert other.color_difference == 0


def test_pictures_may_differ_in_size_and_masks_may_be_missing(demo_vit: TimmExtractor) -> None:
    a, b = world.demo_pair()
    (shape, shape_mask), (appearance, appearance_mask) = rendered(a), rendered(b)
    large = world.render(a, 256)
    plain = composition_score(demo_vit, shape, torch.from_numpy(large.image).permute(2, 0, 1), appearance)
    assert plain.mask_iou is None
    assert plain.self_similarity_distance < 1e-3
    assert plain.color_difference == pytest.approx(color_difference(shape, appearance))
    goal = composition_score(
        demo_vit, shape, shape, appearance, shape_mask=shape_mask, appearance_mask=appearance_mask, size=96, block=2
    )
    assert (goal.block, goal.size) == (2, 96)
    assert goal.color_difference == pytest.approx(color_difference(shape, appearance, shape_mask, appearance_mask))
