"""Learned vectors and low-rank offsets."""

import pytest
import torch
from torch import nn

from inversion_core.learning.model import LearningError
from inversion_core.learning.offset import Offset, Sites, recorded
from inversion_core.learning.token import NORM_LIMIT, Token, name_of

from .toy import WIDTH, WORD, ToyModel


def layers() -> dict[str, nn.Linear]:
    torch.manual_seed(1)
    return {"a.to_k": nn.Linear(6, 5), "a.to_v": nn.Linear(6, 3)}


def sizes(of: dict[str, nn.Linear]) -> dict[str, tuple[int, int]]:
    return {name: (layer.in_features, layer.out_features) for name, layer in of.items()}


@pytest.mark.parametrize(("words", "count"), [(1, 3), (2, 3), (3, 2)])
def test_a_token_begins_as_its_words_repeated_or_cut(words: int, count: int) -> None:
    found = {"clip_l": torch.randn(words, 4), "clip_g": torch.randn(words, 6)}
    token = Token("x", found, count)
    for encoder, vectors in token.vectors.items():
        expected = torch.stack([found[encoder][i % words] for i in range(count)])
        assert torch.equal(vectors.detach(), expected)
        assert torch.equal(token.initial[encoder], expected)


def test_vectors_that_grow_too_long_are_shortened_and_no_others() -> None:
    token = Token("x", {"e": torch.eye(3)}, 3)
    with torch.no_grad():
        token.vectors["e"].mul_(torch.tensor([[10.0], [1.5], [0.1]]))
    token.keep_sane()
    assert token.vectors["e"].norm(dim=1).tolist() == pytest.approx([NORM_LIMIT, 1.5, 0.1], rel=1e-5)


@pytest.mark.parametrize("name", ["", "a b", "<a>", "a:1", "(a)", "../a", "-a"])
def test_names_that_cannot_stand_in_a_prompt_are_refused(name: str) -> None:
    with pytest.raises(LearningError, match="cannot be used in prompts"):
        Token(name, {"e": torch.ones(1, 2)}, 1)


@pytest.mark.parametrize(
    ("text", "name"), [("my-chair", "my-chair"), ("<chair>", "chair"), (" <my-chair> ", "my-chair")]
)
def test_a_name_may_be_written_with_its_brackets(text: str, name: str) -> None:
    assert name_of(text, {"chair"}.__contains__) == name


@pytest.mark.parametrize(
    ("text", "message"), [("chair", "write <chair>"), ("<a b>", "cannot be used"), ("<<a>>", "cannot")]
)
def test_a_common_word_needs_its_brackets(text: str, message: str) -> None:
    with pytest.raises(LearningError, match=message):
        name_of(text, {"chair"}.__contains__)


def test_no_words_no_vectors() -> None:
    with pytest.raises(LearningError, match="gives no token for e"):
        Token("x", {"e": torch.zeros(0, 2)}, 1)
    with pytest.raises(LearningError, match="at least 1"):
        Token("x", {"e": torch.ones(1, 2)}, 0)


def test_a_new_offset_changes_nothing() -> None:
    linear = layers()
    x = torch.randn(2, 6)
    plain = {name: layer(x) for name, layer in linear.items()}
    with Offset(sizes(linear), 2, seed=0).applied(linear):
        assert all(torch.equal(layer(x), plain[name]) for name, layer in linear.items())


def test_an_offset_is_the_product_added_to_the_weight() -> None:
    linear = layers()
    offset = Offset(sizes(linear), 2, seed=0)
    x = torch.randn(4, 7, 6)
    for up, _ in offset.weights().values():
        nn.init.normal_(up)
    with offset.applied(linear):
        changed = {name: layer(x) for name, layer in linear.items()}
    for name, (up, down) in offset.weights().items():
        expected = x @ (linear[name].weight + up @ down).T + linear[name].bias
        torch.testing.assert_close(changed[name], expected)


def test_gradients_reach_up_first_and_never_the_layer() -> None:
    linear = layers()
    for layer in linear.values():
        layer.requires_grad_(False)
    offset = Offset(sizes(linear), 2, seed=0)
    with offset.applied(linear):
        sum(layer(torch.ones(1, 6)).sum() for layer in linear.values()).backward()  # pyright: ignore[reportAttributeAccessIssue]
    for up, down in offset.weights().values():
        assert up.grad is not None
        assert up.grad.abs().sum() > 0
        assert down.grad is not None
        assert torch.equal(down.grad, torch.zeros_like(down))
    assert all(layer.weight.grad is None for layer in linear.values())


def test_the_gradient_is_the_analytic_one() -> None:
    linear = {"a": nn.Linear(3, 2).double()}
    offset = Offset({"a": (3, 2)}, 2, seed=0).double()
    nn.init.normal_(offset.weights()["a"][0])
    x = torch.randn(4, 3, dtype=torch.float64)

    def changed(*_: torch.Tensor) -> torch.Tensor:
        with offset.applied(linear):
            return linear["a"](x)

    assert torch.autograd.gradcheck(changed, tuple(offset.parameters()))


def test_the_layers_are_clean_afterwards_even_after_an_error() -> None:
    linear = layers()
    offset = Offset(sizes(linear), 2, seed=0)
    with pytest.raises(RuntimeError, match="inside"), offset.applied(linear), recorded(linear):
        raise RuntimeError("inside")
    with pytest.raises(KeyError), offset.applied({"a.to_k": linear["a.to_k"]}):
        pass
    assert all(not layer._forward_hooks for layer in linear.values())


def test_what_is_recorded_contains_the_offset() -> None:
    linear = layers()
    offset = Offset(sizes(linear), 2, seed=0)
    for up, _ in offset.weights().values():
        nn.init.normal_(up)
    x = torch.randn(2, 6)
    with offset.applied(linear), recorded(linear) as seen:
        given = {name: layer(x) for name, layer in linear.items()}
    assert all(torch.equal(seen[name], given[name]) for name in linear)


def test_the_rank_is_no_larger_than_the_layer() -> None:
    weights = Offset({"a": (6, 2)}, 8, seed=0).weights()
    assert [tuple(half.shape) for half in weights["a"]] == [(2, 2), (2, 6)]
    with pytest.raises(LearningError, match="rank is 0"):
        Offset({"a": (6, 2)}, 0, seed=0)


@pytest.mark.parametrize(
    ("sites", "expected"),
    [
        (Sites(("cross",)), {"block.attn2.to_k": (WORD, WIDTH), "block.attn2.to_v": (WORD, WIDTH)}),
        (Sites(("self",), ("to_q",)), {"block.attn1.to_q": (WIDTH, WIDTH)}),
        (Sites(("self", "cross"), ("to_k",), ("block.attn1",)), {"block.attn1.to_k": (WIDTH, WIDTH)}),
        (Sites(("feed_forward",)), {"block.ff.net.2": (WIDTH, WIDTH)}),
    ],
)
def test_sites_choose_layers(sites: Sites, expected: dict) -> None:
    found = sites.layers(ToyModel())
    assert {name: (layer.in_features, layer.out_features) for name, layer in found.items()} == expected


def test_sites_that_choose_nothing_say_what_there_is() -> None:
    with pytest.raises(LearningError, match=r"output_blocks.*block\.attn1, block\.attn2"):
        Sites(("self",), within=("output_blocks",)).layers(ToyModel())
