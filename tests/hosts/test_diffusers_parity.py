"""The same weights, edit and noise in ComfyUI's host and in diffusers': the same picture.

The tolerance comes from the models themselves. Without any edit the two implementations of one UNet differ by the
rounding of float32, and that difference is measured for each model and schedule. An edited picture depends on at most
three passes through the model at each noise level, the picture's own, the appearance's and the shape's, each with a
difference of that size, and on the edit's own arithmetic: four times the plain difference is allowed. What an edit
does is to be a hundred times that at least, else the comparison would show nothing.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from inversion_core.correspondence import Correspondence, Matching
from inversion_core.cross_feature import cross_feature
from inversion_core.features import Features
from inversion_core.hosts import comfy_unet, diffusers
from inversion_core.hosts.base import HostError
from inversion_core.hosts.diffusers_references import NoiseLevels
from inversion_core.injection import Injection, Refresh, Window
from inversion_core.presets import PRESETS
from inversion_core.reference import Reference

from .diffusers_models import FAMILIES, Twins, by_comfy, by_diffusers, twins
from .models import NOISE, POOLED, prompt, random

# numpy 2 asks arrays for a keyword that torch's tensors do not know, inside diffusers' schedulers.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

EVALUATION, STEPS = (600,), (800, 500, 150)
"""Timesteps: a single evaluation inside every preset's windows, and a run that leaves the windows of some."""
SHAPE, APPEARANCE = (random(1, 4, *size, seed=i) * 4 for i, size in enumerate([(16, 16), (12, 20)]))
"""Latents as an autoencoder gives them, one of another size and aspect than the picture."""


class Plain(NamedTuple):
    """Without an edit: ComfyUI's picture, and how far diffusers' is from it."""

    picture: Tensor
    difference: float


class Subject:
    """A model in both hosts; what it does without an edit is computed once."""

    def __init__(self, family: str) -> None:
        self.both = twins(family)
        self._plain: dict[Any, Plain] = {}

    def plain(self, timesteps: Sequence[int], cfg: float, rows: int) -> Plain:
        key = (timesteps, cfg, rows)
        if key not in self._plain:
            picture, other = (by(self.both, timesteps, NOISE[:rows], cfg) for by in (comfy, by_diffusers))
            self._plain[key] = Plain(picture, difference(picture, other))
        return self._plain[key]

    def require_parity(
        self,
        edit: Sequence[Injection],
        timesteps: Sequence[int],
        *,
        cfg: float = 3.0,
        rows: int = 1,
        theirs: Sequence[Injection] | None = None,
    ) -> None:
        """The edit is visible and the same in both hosts; `theirs` where diffusers needs it in other words."""
        plain = self.plain(timesteps, cfg, rows)
        model = comfy_unet.attach(self.both.comfy, *edit)
        expected = by_comfy(model, self.both, timesteps, NOISE[:rows], cfg)
        with diffusers.attach(self.both.pipe, *(theirs or edit)):
            found = by_diffusers(self.both, timesteps, NOISE[:rows], cfg)
        tolerance = 4 * plain.difference
        assert difference(expected, plain.picture) > 100 * tolerance
        assert difference(found, expected) < tolerance


def comfy(both: Twins, *run: Any) -> Tensor:
    return by_comfy(both.comfy, both, *run)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Subject:
    return Subject(request.param)


def difference(a: Tensor, b: Tensor) -> float:
    assert torch.isfinite(a).all() and torch.isfinite(b).all()
    return float((a - b).abs().max())


def part(height: int, width: int, rows: slice, columns: slice) -> Tensor:
    mask = torch.zeros(1, 1, height, width)
    mask[..., rows, columns] = 1
    return mask


def injections(preset: str, masked: bool) -> tuple[Injection, ...]:
    if not masked:
        return PRESETS[preset].injections([Reference(APPEARANCE)], Reference(SHAPE))
    appearance = Reference(APPEARANCE, part(12, 20, slice(2, 11), slice(0, 13)), noise_seed=1)
    shape = Reference(SHAPE, part(16, 16, slice(3, 16), slice(0, 12)))
    output = part(128, 128, slice(0, 80), slice(8, 128))
    return PRESETS[preset].injections([appearance], shape, strength=0.8, shape_strength=0.7, mask=output)


def test_without_an_edit_both_hosts_differ_by_rounding(model: Subject) -> None:
    """Ten thousand float32 roundings of the picture's own size; a wrong weight or noise level is far above."""
    for timesteps in (EVALUATION, STEPS):
        picture, found = model.plain(timesteps, 3.0, 1)
        assert 0 < found < 1e4 * torch.finfo(torch.float32).eps * float(picture.std())


def test_sites_have_comfyuis_names_and_scales(model: Subject) -> None:
    unet = model.both.comfy.model.diffusion_model
    assert diffusers.sites_of(model.both.pipe.unet) == comfy_unet.sites_of(unet)


@pytest.mark.parametrize("timesteps", [EVALUATION, STEPS], ids=["evaluation", "steps"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_gives_the_same_picture(
    model: Subject, preset: str, masked: bool, timesteps: Sequence[int]
) -> None:
    model.require_parity(injections(preset, masked), timesteps)


def by_features(share: float, **changes: Any) -> Injection:
    """Cross-Feature Attention of random features on the masked pair."""
    one = injections("default", True)[0]
    (appearance,), shape = one.appearance, one.shape
    assert shape is not None
    looks = []
    for grid, seed in (((7, 7), 21), ((5, 8), 22)):
        tokens = random(1, grid[0] * grid[1], 12, seed=seed)
        looks.append(Features(grid, tokens, tokens, tokens[:, None], None, None, None, str(seed)))
    match = Correspondence(looks[0], looks[1], Matching(), shape.mask, appearance.mask)
    return replace(cross_feature([appearance], shape, (match,), share=share, window=Window(0.0, 0.5)), **changes)


@pytest.mark.parametrize("share", [1.0, 0.6])
def test_reading_by_features_gives_the_same_picture(model: Subject, share: float) -> None:
    model.require_parity((by_features(share),), STEPS)


@pytest.mark.parametrize("model", ["sd15"], indirect=True)
def test_diffusers_refuses_to_look_at_the_picture_anew(model: Subject) -> None:
    refresh = Refresh(1, lambda _: pytest.fail("looked"))
    with (
        pytest.raises(HostError, match="leave refresh out"),
        diffusers.attach(model.both.pipe, by_features(1.0, refresh=refresh)),
    ):
        pass


def test_without_guidance_the_reference_sees_the_prompt(model: Subject) -> None:
    """ComfyUI would take the negative prompt, which diffusers' pipelines do not even know without guidance."""
    positive = model.both.positive
    ((embeds, extra),) = positive
    added = {"text_embeds": extra["pooled_output"]} if extra else {}
    ours, theirs = (
        PRESETS["default"].injections([Reference(APPEARANCE, conditioning=told)]) for told in (positive, None)
    )
    model.require_parity(ours, EVALUATION, cfg=1.0, theirs=theirs)
    said = PRESETS["default"].injections([Reference(APPEARANCE, conditioning=diffusers.Prompt(embeds, added))])
    model.require_parity(ours, EVALUATION, cfg=1.0, theirs=said)


def test_a_reference_with_a_prompt_of_its_own(model: Subject) -> None:
    """As each host has prompts; with the run's own the picture is another one."""
    extra = {"pooled_output": random(1, POOLED, seed=8)} if model.both.positive[0][1] else {}
    told = prompt(7, **extra)
    added = {"text_embeds": extra["pooled_output"]} if extra else {}
    ours, theirs, other = (
        PRESETS["default"].injections([Reference(APPEARANCE, conditioning=one)])
        for one in (told, diffusers.Prompt(told[0][0], added), None)
    )
    model.require_parity(ours, STEPS, theirs=theirs)
    with diffusers.attach(model.both.pipe, *theirs):
        found = by_diffusers(model.both, STEPS)
    with diffusers.attach(model.both.pipe, *other):
        assert difference(found, by_diffusers(model.both, STEPS)) > 100 * model.plain(STEPS, 3.0, 1).difference


@pytest.mark.parametrize("model", ["sd15"], indirect=True)
def test_a_batch_of_pictures_from_pure_noise(model: Subject) -> None:
    model.require_parity(injections("style-id", True), (999, 500), rows=2)


@pytest.mark.parametrize("model", ["sd15"], indirect=True)
@pytest.mark.parametrize("percent", [0.0, 0.1, 0.5, 0.7, 0.9, 1.0])
def test_sampling_percent_means_the_same(model: Subject, percent: float) -> None:
    """Both decide at the same noise level, up to the float32 in which diffusers keeps its schedule."""
    levels = NoiseLevels.of(model.both.pipe.scheduler)
    expected = model.both.comfy.get_model_object("model_sampling").percent_to_sigma(percent)
    assert min(levels.percent_to_sigma(percent), 1e9) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("model", ["sd15"], indirect=True)
def test_both_refuse_a_run_outside_every_window(model: Subject) -> None:
    edit = injections("cross-image", False)
    with pytest.raises(HostError, match="changed nothing"):
        by_comfy(comfy_unet.attach(model.both.comfy, *edit), model.both, (999,))
    with pytest.raises(HostError, match="changed nothing"), diffusers.attach(model.both.pipe, *edit):
        by_diffusers(model.both, (999,))
