"""Idea 4 of docs/findings.md: one query, B's CLS token, reads B's appearance out of the model's own features."""

from __future__ import annotations

from dataclasses import replace

from inversion_core.correspondence import Correspondence, Matching
from inversion_core.cross_feature import cross_feature
from inversion_core.hosts import comfy_color, comfy_injection
from inversion_core.hosts.comfy_color import ColorGuidance
from inversion_core.injection import Window
from inversion_core.presets import Preset

from .methods import Result, Studio, neutral
from .pairs import Pair


def read_by_cls(
    preset: Preset, studio: Studio, pair: Pair, *, temperature: float = 0.1, end: float = 1.0, color: bool = True
) -> Result:
    """As Cross-Feature Attention, but every place asks with the CLS token of B's picture.

    So all of them read one mixture of values, weighted by how much a patch of B is like the whole of it.
    """
    a, b = studio.reference(pair, "a"), studio.reference(pair, "b")
    assert a.picture is not None
    assert b.picture is not None
    asked, seen = studio.see(a.picture), studio.see(b.picture)
    assert seen.cls_normed is not None
    asked = replace(asked, normed=seen.cls_normed[:, None].expand_as(asked.normed))
    matching = Matching(centred=False, temperature=temperature, top_k=256, balance=0.0)
    found = Correspondence(asked, seen, matching, a.mask, b.mask)
    model = comfy_injection.attach(studio.demo.model, cross_feature([b], a, (found,), window=Window(0.0, end)))
    if color:
        assert preset.color is not None
        guidance = ColorGuidance(b, window=preset.color, mask=a.mask, required=False)
        model = comfy_color.attach(model, guidance)
    return studio.sample(pair, neutral(pair), model=model)
