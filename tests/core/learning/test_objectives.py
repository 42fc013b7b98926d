"""Objectives against closed forms."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from inversion_core.learning import objectives
from inversion_core.learning.model import LearningError, Prediction, Schedule

PREDICTIONS: list[Prediction] = ["eps", "v", "flow"]


def schedule(prediction: Prediction, level: float = 0.3, rows: int = 2) -> Schedule:
    if prediction == "flow":
        return Schedule(torch.full((rows,), 1 - level), torch.full((rows,), level))
    return Schedule(torch.full((rows,), math.cos(level)), torch.full((rows,), math.sin(level)))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perfect_output_gives_the_clean_latent_back(prediction: Prediction) -> None:
    clean, noise, now = random(2, 4, 3, 3), random(2, 4, 3, 3, seed=1), schedule(prediction)
    noisy = objectives.noised(clean, noise, now)
    output = objectives.target(prediction, clean, noise, now)
    torch.testing.assert_close(objectives.clean_estimate(prediction, output, noisy, now), clean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("level", [0.05, 0.3, 0.9])
def test_min_snr_weighs_the_error_of_the_clean_estimate_by_the_clipped_snr(
    prediction: Prediction, level: float
) -> None:
    """Whatever the model predicts, the same wrong clean estimate must cost the same."""
    clean, noise, now = random(2, 4, 3, 3), random(2, 4, 3, 3, seed=1), schedule(prediction, level)
    noisy = objectives.noised(clean, noise, now)
    output = objectives.target(prediction, clean, noise, now) + 0.1 * random(2, 4, 3, 3, seed=2)
    wrong = objectives.clean_estimate(prediction, output, noisy, now) - clean
    error = (output - objectives.target(prediction, clean, noise, now)).square().mean((1, 2, 3))
    snr = (now.alpha / now.sigma) ** 2
    expected = snr.clamp(max=5) * wrong.square().mean((1, 2, 3))
    torch.testing.assert_close(error * objectives.min_snr(prediction, now), expected, rtol=1e-5, atol=0)


def test_min_snr_is_the_papers_for_eps_and_v() -> None:
    now = schedule("eps", 0.2, 1)
    snr = float((now.alpha / now.sigma) ** 2)
    assert float(objectives.min_snr("eps", now)) == pytest.approx(min(snr, 5) / snr, rel=1e-5)
    assert float(objectives.min_snr("v", now)) == pytest.approx(min(snr, 5) / (snr + 1), rel=1e-5)


def test_the_mask_says_whose_error_counts() -> None:
    output, wanted = torch.zeros(2, 3, 2, 2), torch.zeros(2, 3, 2, 2)
    wanted[:, :, 0, 0], wanted[:, :, 1, 1] = 2, 1
    mask = torch.zeros(2, 1, 2, 2)
    mask[:, :, 0, 0] = 1
    assert objectives.masked_diffusion(output, wanted, mask, 0).tolist() == [4, 4]
    assert objectives.masked_diffusion(output, wanted, mask, 1).tolist() == [1.25, 1.25]
    expected = (4 + 0.5 * 1) / (1 + 0.5 * 3)
    assert objectives.masked_diffusion(output, wanted, mask, 0.5).tolist() == pytest.approx([expected] * 2)


def test_attention_maps_are_shares_of_the_marked_words() -> None:
    q, k = random(2, 5, 6), random(2, 4, 6, seed=1)
    places = torch.tensor([[True, False, False, True], [False, True, False, False]])
    found = objectives.attention_map(q, k, places, heads=2)
    qs, ks = q.numpy().reshape(2, 5, 2, 3), k.numpy().reshape(2, 4, 2, 3)
    logits = np.einsum("bnhd,bmhd->bhnm", qs, ks) / np.sqrt(3)
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = (weights * places.numpy()[:, None, None]).sum(-1).mean(1)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)
    everything = objectives.attention_map(q, k, torch.ones(2, 4, dtype=torch.bool), heads=2)
    torch.testing.assert_close(everything, torch.ones_like(everything))


def test_break_a_scene_is_zero_where_the_map_is_the_mask_at_any_scale() -> None:
    mask = torch.tensor([[1.0, 0.5, 0.0, 0.0]])
    assert objectives.attention_on_mask(mask * 0.03, mask).tolist() == pytest.approx([0])
    assert objectives.attention_on_mask(torch.tensor([[0.2, 0.2, 0.2, 0.2]]), mask).tolist() == pytest.approx(
        [(0 + 0.25 + 1 + 1) / 4]
    )


def test_distillation_is_zero_against_itself_and_the_l1_of_two_attentions_otherwise() -> None:
    q, k, v = random(2, 5, 6), random(2, 5, 6, seed=1), random(2, 5, 6, seed=2)
    whole, every = torch.ones(2, 5, dtype=torch.float64), torch.ones(5, dtype=torch.bool)
    itself = objectives.attention_distillation(q[:1], k[:1], v[:1], k[:1], v[:1], 2, whole[:1], every)
    assert itself.tolist() == [0]

    k_ref, v_ref = random(1, 7, 6, seed=3), random(1, 7, 6, seed=4)
    readable = torch.tensor([True, True, False, True, False, True, True])
    mask = torch.tensor([[1, 0, 1, 0, 0], [0, 1, 1, 1, 1]], dtype=torch.float64)
    found = objectives.attention_distillation(q, k, v, k_ref, v_ref, 2, mask, readable)

    def attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        split = [x.reshape(-1, 2, 3).transpose(0, 1) for x in (query, keys, values)]
        weights = (split[0] @ split[1].transpose(1, 2) / math.sqrt(3)).softmax(-1)
        return (weights @ split[2]).transpose(0, 1).reshape(-1, 6)

    for row in range(2):
        own, wanted = attend(q[row], k[row], v[row]), attend(q[row], k_ref[0][readable], v_ref[0][readable])
        expected = ((own - wanted).abs().mean(1) * mask[row]).sum() / mask[row].sum()
        assert float(found[row]) == pytest.approx(float(expected), rel=1e-5)


def test_distillation_gives_no_gradient_to_its_target() -> None:
    q, k, v = (random(1, 3, 4, seed=i).requires_grad_() for i in range(3))
    k_ref, v_ref = (random(1, 3, 4, seed=i).requires_grad_() for i in (3, 4))
    whole, every = torch.ones(1, 3), torch.ones(3, dtype=torch.bool)
    objectives.attention_distillation(q, k, v, k_ref, v_ref, 1, whole, every).sum().backward()
    assert q.grad is not None
    assert k_ref.grad is None
    assert v_ref.grad is None


@pytest.mark.parametrize(
    ("tokens", "grid"), [(15 * 9, (15, 9)), (8 * 5, (8, 5)), (4 * 3, (4, 3)), (2 * 2, (2, 2)), (1, (1, 1))]
)
def test_grids_halve_upwards_rounded(tokens: int, grid: tuple[int, int]) -> None:
    assert objectives.grid_of(tokens, (15, 9)) == grid


@pytest.mark.parametrize("tokens", [100, 16 * 16 + 1, 0])
def test_a_number_of_tokens_that_is_no_grid_is_refused(tokens: int) -> None:
    with pytest.raises(LearningError, match="no halving of the latent's 16x16"):
        objectives.grid_of(tokens, (16, 16))


def test_moments_are_zero_for_the_same_values_in_another_order() -> None:
    values = torch.tensor([[1.0, 2.0, 3.0, 6.0], [0.0, 0.0, 4.0, 4.0]])
    mean, std = values.mean(1), values.std(1, unbiased=False)
    shuffled = torch.full((1, 2, 3, 2), 9.0)
    shuffled.flatten(2)[0, :, [5, 1, 2, 0]] = values
    mask = torch.ones(1, 1, 3, 2)
    mask.flatten(2)[..., [3, 4]] = 0
    assert objectives.moments(shuffled, mask, mean, std).tolist() == pytest.approx([0], abs=1e-9)
    assert objectives.moments(shuffled + 2, mask, mean, std).tolist() == pytest.approx([4], rel=1e-5)


def test_token_mse_is_the_mean_squared_difference() -> None:
    assert float(objectives.token_mse(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1.0, 1.0]))) == 3.5


def test_whitened_features_have_no_mean_and_unit_covariance() -> None:
    features = (random(200, 5) @ random(5, 5, seed=1) + 3).float()
    white = objectives.Whitening.fit(features, eps=0)(features)
    torch.testing.assert_close(white.mean(0), torch.zeros(5), rtol=0, atol=1e-4)
    torch.testing.assert_close(white.T @ white / 199, torch.eye(5), rtol=0, atol=1e-3)
    with pytest.raises(LearningError, match="at least 2"):
        objectives.Whitening.fit(features[:1])


def test_the_projected_loss_is_zero_when_the_head_hits_the_direction() -> None:
    head = nn.Linear(2, 2, bias=False).requires_grad_(False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    vectors = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    assert float(objectives.projected(vectors, head, torch.tensor([0.0, 5.0]))) == pytest.approx(0)
    assert float(objectives.projected(vectors, head, torch.tensor([-1.0, 0.0]))) == pytest.approx(1)


def test_features_count_less_the_more_noise_there_is() -> None:
    now = Schedule(torch.tensor([1.0, 0.6, 0.0]), torch.tensor([0.0, 0.8, 1.0]))
    opposite = torch.tensor([[1.0, 0.0]] * 3)
    found = objectives.feature_distance(opposite, torch.tensor([-1.0, 0.0]), now)
    assert found.tolist() == pytest.approx([2, 0.36 * 2, 0])
