"""How sites are named and chosen."""

import pytest

from inversion_core.sites import Site, select

from .unet_sites import SD15

FLAT = [Site("output", 0, index, 1) for index in range(3)]


def blocks(rules: str, sites: list[Site] = SD15) -> list[str]:
    chosen = select(rules, sites)
    return [site.name for site in sites if site.name in chosen]


def test_a_site_is_named_as_comfyui_writes_it() -> None:
    assert Site("output", 3, 1, 4).name == "output.3.1"
    assert Site("output", 3, 1, 4).block == "output.3"


@pytest.mark.parametrize(
    ("rules", "numbers"),
    [
        ("decoder", range(3, 12)),
        ("decoder.coarse", (3, 4, 5)),
        ("decoder.mid", (6, 7, 8)),
        ("decoder.finest", (9, 10, 11)),
        ("decoder.fine", range(6, 12)),
        ("decoder[1:-1]", range(4, 11)),
        ("decoder[-2:]", (10, 11)),
        ("decoder[:2]", (3, 4)),
        ("output.7", (7,)),
        ("output.7.0", (7,)),
        ("output.9, output.4,decoder[:1]", (3, 4, 9)),
        ("output.99?, output.4", (4,)),
    ],
)
def test_rules_choose_decoder_blocks(rules: str, numbers: range | tuple[int, ...]) -> None:
    assert blocks(rules) == [f"output.{number}.0" for number in numbers]


def test_parts_and_all() -> None:
    assert blocks("encoder") == [f"input.{number}.0" for number in (1, 2, 4, 5, 7, 8)]
    assert blocks("middle") == ["middle.0.0"]
    assert blocks("all") == [site.name for site in SD15]


def test_a_block_means_all_its_sites_and_a_slice_counts_blocks() -> None:
    assert blocks("output.0", FLAT) == ["output.0.0", "output.0.1", "output.0.2"]
    assert blocks("output.0.1", FLAT) == ["output.0.1"]
    assert blocks("decoder[:1]", FLAT) == blocks("decoder", FLAT)


def test_with_a_single_level_fine_is_that_level() -> None:
    assert blocks("decoder.fine", FLAT) == blocks("decoder.coarse", FLAT) == blocks("decoder", FLAT)


@pytest.mark.parametrize("rules", ["", "output.1", "decoder.middle", "decoder[20:]", "decoder, nowhere", "Decoder"])
def test_a_rule_that_means_nothing_is_an_error_that_shows_what_there_is(rules: str) -> None:
    with pytest.raises(
        ValueError, match=r"means no self-attention.*input\.1, .*middle\.0, .*output\.11;.*decoder\.fine"
    ):
        select(rules, SD15)


def test_a_question_mark_allows_nothing() -> None:
    assert select("decoder.mid?", FLAT) == frozenset()


FLUX = [Site("double", number, 0, 2) for number in range(3)] + [Site("single", number, 0, 2) for number in range(5)]
SD3 = [Site("double", number, index, 2) for number in range(4) for index in range(2 if number < 2 else 1)]


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ("double", "double.0 double.1 double.2"),
        ("single[-2:]", "single.3 single.4"),
        ("double[:1], single.2", "double.0 single.2"),
        ("double.1.0", "double.1"),
        ("early", "double.0 double.1"),
        ("mid", "double.2 single.0 single.1 single.2"),
        ("late", "single.3 single.4"),
    ],
)
def test_rules_choose_a_transformers_blocks(rules: str, expected: str) -> None:
    assert blocks(rules, FLUX) == [f"{name}.0" for name in expected.split()]


def test_a_transformers_block_with_two_attentions_is_one_block() -> None:
    assert blocks("double.1", SD3) == ["double.1.0", "double.1.1"]
    assert blocks("early", SD3) == ["double.0.0", "double.0.1"]


@pytest.mark.parametrize("rules", ["decoder", "double.9", "double[9:]", "double.fine", "middle"])
def test_what_a_transformer_lacks_is_refused_with_what_it_has(rules: str) -> None:
    with pytest.raises(ValueError, match=r"means no self-attention.*double\.0, .*single\.4;.*early, mid, late"):
        select(rules, FLUX)


@pytest.mark.parametrize("rules", ["double", "late", "single[1:]"])
def test_a_unet_has_no_transformers_blocks(rules: str) -> None:
    with pytest.raises(ValueError, match=r"means no self-attention.*input\.1, .*decoder\.fine"):
        select(rules, SD15)
