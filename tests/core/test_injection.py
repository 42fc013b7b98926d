"""What an artist may ask for, and what of it is left to do at one moment."""

import copy
import math

import pytest
import torch

from inversion_core.attention import AttentionEdit
from inversion_core.injection import Injection, Window
from inversion_core.reference import Reference

REFERENCE = Reference(torch.zeros(1, 4, 4, 4))


@pytest.mark.parametrize(("start", "end"), [(0.5, 0.4), (-0.1, 1.0), (0.0, 1.1), (math.nan, 1.0), (0.0, math.nan)])
def test_a_window_must_lie_in_the_schedule(start: float, end: float) -> None:
    with pytest.raises(ValueError, match=rf"{start} to {end}.*0 <= start <= end <= 1"):
        Window(start, end)


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.0), (0.0, 1.0), (0.3, 0.3), (1.0, 1.0)])
def test_windows_at_the_bounds_are_fine(start: float, end: float) -> None:
    assert (Window(start, end).start, Window(start, end).end) == (start, end)


def test_an_injection_needs_a_reference() -> None:
    with pytest.raises(ValueError, match="appearance reference, a shape reference or both"):
        Injection(AttentionEdit())


@pytest.mark.parametrize("value", [-0.01, 1.01, math.nan])
def test_feature_strength_is_a_share(value: float) -> None:
    with pytest.raises(ValueError, match=f"feature_strength is {value}.*between 0 and 1"):
        Injection(AttentionEdit(), shape=REFERENCE, feature_strength=value)


def test_an_empty_output_mask_is_refused() -> None:
    with pytest.raises(ValueError, match="output mask is empty.*disconnect"):
        Injection(AttentionEdit(), (REFERENCE,), mask=torch.zeros(1, 1, 8, 8))


def test_copies_of_a_hosts_options_share_the_injection() -> None:
    injection = Injection(AttentionEdit(), (REFERENCE,), sites="output.0")
    assert copy.deepcopy([{"patch": injection}])[0]["patch"] is injection
    assert copy.copy(injection).appearance == (REFERENCE,)


def test_only_strength_zero_is_neutral() -> None:
    assert Injection(AttentionEdit(strength=0.0), (REFERENCE,)).neutral
    assert not Injection(AttentionEdit(strength=0.01), (REFERENCE,)).neutral


def test_all_at_work_is_the_edit_itself() -> None:
    edit = AttentionEdit(shape_query=1.0, shape_key=0.5, qk_stats=True, strength=0.7)
    assert Injection(edit, (REFERENCE,), shape=REFERENCE).at(appearance=True, shape=True) == edit


@pytest.mark.parametrize("window", ["closed", "no reference"])
def test_without_appearance_only_the_shape_is_left(window: str) -> None:
    edit = AttentionEdit(shape_query=1.0, shape_key=0.5, qk_stats=True, strength=0.7)
    injection = Injection(edit, () if window == "no reference" else (REFERENCE,), shape=REFERENCE)
    left = injection.at(appearance=window == "no reference", shape=True)
    assert left == AttentionEdit(reference="none", shape_query=1.0, shape_key=0.5, strength=0.7)


@pytest.mark.parametrize("window", ["closed", "no reference"])
def test_without_shape_only_the_appearance_is_left(window: str) -> None:
    edit = AttentionEdit(shape_query=1.0, shape_key=0.5, qk_stats=True, strength=0.7)
    injection = Injection(edit, (REFERENCE,), shape=None if window == "no reference" else REFERENCE)
    assert injection.at(appearance=True, shape=window == "no reference") == AttentionEdit(qk_stats=True, strength=0.7)


def test_nothing_at_work_is_no_edit() -> None:
    injection = Injection(AttentionEdit(shape_query=1.0, qk_stats=True), (REFERENCE,), shape=REFERENCE)
    assert injection.at(appearance=False, shape=False) is None
    assert Injection(AttentionEdit(), (REFERENCE,), shape=REFERENCE).at(appearance=False, shape=True) is None


def test_matching_statistics_alone_is_an_edit() -> None:
    edit = AttentionEdit(reference="none", qk_stats=True)
    assert Injection(edit, (REFERENCE,)).at(appearance=True, shape=False) == edit
