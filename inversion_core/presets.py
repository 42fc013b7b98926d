"""Published methods, and our own, as data: one frozen value each.

A preset says what becomes of a self-attention, where and when. Windows are sampling percent, so that they fit any
number of steps; sites are rules (`sites.select`), so that they fit any UNet, and others for diffusion transformers,
which have neither a decoder nor levels. What a method does outside the self-attention is told in `differences`, with
what stands in for it here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from .attention import AttentionEdit
from .injection import Injection, Window
from .reference import Reference


@dataclass(frozen=True)
class Step:
    """One edit of a preset, with fields as of `Injection`; several where windows differ from site to site.

    `blocks` and `shape_blocks` are `sites` and `shape_sites` on a diffusion transformer; without `blocks` the step has
    no place there. "appearance" means the blocks that carry it in the model's family.
    """

    edit: AttentionEdit
    sites: str
    window: Window = Window()
    shape_window: Window = Window(0.0, 0.8)
    shape_sites: str | None = None
    feature_strength: float = 0.0
    rows: Literal["all", "positive"] = "all"
    positions: Literal["own", "shared"] = "own"
    blocks: str | None = None
    shape_blocks: str | None = None


@dataclass(frozen=True)
class Preset:
    """A method.

    Attributes:
        name: what artists choose it by.
        source: paper, or how it was found.
        steps: its edits.
        differences: from the authors' code.
        color: when the predicted clean latent takes the reference's colours, as the method does it; None: never.
        shape: whether the method itself takes a shape reference. Where it does not and one is given, its queries enter
            at the method's sites for the first 80 % of the sampling: our addition.
    """

    name: str
    source: str
    steps: tuple[Step, ...]
    differences: tuple[str, ...] = ()
    color: Window | None = None
    shape: bool = True

    def injections(
        self,
        appearance: Sequence[Reference],
        shape: Reference | None = None,
        *,
        strength: float = 1.0,
        shape_strength: float = 1.0,
        shape_end: float = 1.0,
        mask: Tensor | None = None,
        transformer: bool = False,
    ) -> tuple[Injection, ...]:
        """The method on these references.

        Args:
            appearance: whose appearance is taken; at least one.
            shape: whose layout is kept.
            strength: 0 to 1, of everything; 0 is the untouched model.
            shape_strength: 0 to 1, share of the method's own shape injection.
            shape_end: sampling percent by which the shape is let go at the latest, 0 to 1; 1 is the method's own end.
            mask: (1, 1, h, w), where the output is edited.
            transformer: whether the model is a diffusion transformer, not a UNet.

        Raises:
            ValueError: no appearance reference, a share outside its range, a method that has no form on a transformer.
        """
        if not appearance:
            raise ValueError(f"{self.name} needs an appearance reference, but got none: connect one")
        if not 0 <= shape_strength <= 1:
            raise ValueError(f"shape_strength is {shape_strength}, but it must be between 0 and 1")
        if not 0 <= shape_end <= 1:
            raise ValueError(f"shape_end is {shape_end}, but it must be between 0 and 1")
        kept = shape if shape_strength > 0 and shape_end > 0 else None
        made = []
        for step in self._on_transformers() if transformer else self.steps:
            own = step.edit.shape_query if self.shape else 1.0
            edit = replace(
                step.edit,
                shape_query=0.0 if kept is None else own * shape_strength,
                shape_key=0.0 if kept is None else step.edit.shape_key * shape_strength,
                strength=strength,
            )
            made.append(
                Injection(
                    edit,
                    tuple(appearance),
                    window=step.window,
                    sites=step.sites,
                    shape=kept,
                    shape_window=step.shape_window.until(shape_end),
                    shape_sites=step.shape_sites,
                    feature_strength=step.feature_strength * shape_strength,
                    mask=mask,
                    rows=step.rows,
                    positions=step.positions,
                )
            )
        return tuple(made)

    def _on_transformers(self) -> tuple[Step, ...]:
        """The steps as a diffusion transformer's: it has no decoder whose features could be blended."""
        steps = tuple(
            replace(step, sites=step.blocks, shape_sites=step.shape_blocks, feature_strength=0.0)
            for step in self.steps
            if step.blocks is not None
        )
        if not steps:
            others = ", ".join(name for name, one in PRESETS.items() if any(step.blocks for step in one.steps))
            raise ValueError(
                f"{self.name} changes what a UNet's layers are given, and has no form for a diffusion transformer such "
                f"as this model: choose another of {others} (docs/dit.md: which reads where)"
            )
        return steps


MASACTRL = Preset(
    "masactrl",
    "MasaCtrl: Tuning-Free Mutual Self-Attention Control (Cao et al., ICCV 2023, arXiv 2304.08465)",
    (Step(AttentionEdit("replace"), "decoder.fine", Window(0.08, 1.0), blocks="appearance"),),
    (
        "the source is forward-noised; the authors invert it with DDIM (choose that policy for the reference)",
        "sites by level: the last 6 of SD1.5's 16 and of SDXL's 70 self-attentions, as theirs",
        "masked: outside the output mask the attention stays plain; theirs reads the source's background there",
    ),
    shape=False,
)

CROSS_IMAGE = Preset(
    "cross-image",
    "Cross-Image Attention for Zero-Shot Appearance Transfer (Alaluf et al., SIGGRAPH 2024, arXiv 2311.03335)",
    (
        Step(
            AttentionEdit("replace", shape_query=1.0, contrast=1.67),
            "decoder.finest",
            Window(0.1, 0.9),
            Window(0.1, 0.9),
            rows="positive",
            blocks="appearance",
        ),
        Step(
            AttentionEdit("replace", shape_query=1.0, contrast=1.67),
            "decoder.mid?",
            Window(0.1, 0.7),
            Window(0.1, 0.7),
            rows="positive",
        ),
    ),
    (
        "swap guidance is the sampler's own: only the positive rows are edited, so cfg leads from the plain prediction "
        "to the swapped one when both prompts are the same; the authors' scale falls from 3.5 to 1.75",
        "queries are the shape reference's in every step; theirs are the output's own, which starts as the inverted "
        "shape image",
        "both references are forward-noised; the authors use edit-friendly inversion",
        "the object masks come with the references; theirs are clustered from the attention",
        "colours are matched in the prediction, theirs in the noisy latent",
    ),
    color=Window(0.2, 1.0),
)

STYLE_ALIGNED = Preset(
    "style-aligned",
    "Style Aligned Image Generation via Shared Attention (Hertz et al., CVPR 2024, arXiv 2312.02133)",
    (Step(AttentionEdit("extend", qk_stats=True, reference_bias=math.log(2)), "all", blocks="all"),),
    (
        "the reference is forward-noised; the authors invert it with DDIM",
        "the reference's pass sees one prompt; theirs sees the prompt and the empty one",
    ),
    shape=False,
)

VISUAL_STYLE = Preset(
    "visual-style",
    "Visual Style Prompting with Swapping Self-Attention (Jeong et al., 2024, arXiv 2402.12974)",
    (Step(AttentionEdit("replace"), "decoder.finest", blocks="appearance"),),
    (
        "sites by level: the last 6 of SDXL's 70 self-attentions, as theirs",
        "the reference's pass sees the negative prompt unless it is given its own",
        "colours are matched where 15 to 10 % of the schedule are left, as theirs, by per-channel moments",
    ),
    color=Window(0.85, 0.9),
    shape=False,
)

STYLE_ID = Preset(
    "style-id",
    "Style Injection in Diffusion (Chung et al., CVPR 2024, arXiv 2312.09008)",
    (
        Step(
            AttentionEdit("replace", shape_query=0.75, temperature=1.5),
            "decoder.fine",
            shape_window=Window(),
            blocks="appearance",
        ),
    ),
    (
        "content and style are forward-noised; the authors invert both with DDIM and start from "
        "AdaIN(content noise, style noise); here the sampler's noise starts it and colours are matched in the first "
        "tenth of the sampling",
    ),
    color=Window(0.0, 0.1),
)

CTRL_X = Preset(
    "ctrl-x",
    "Ctrl-X: Controlling Structure and Appearance Without Guidance (Lin et al., NeurIPS 2024, arXiv 2406.07540)",
    (
        Step(
            AttentionEdit("normalise", shape_query=1.0, shape_key=1.0),
            "encoder, decoder[1:-1]",
            Window(0.0, 0.6),
            Window(0.0, 0.6),
            shape_sites="decoder.coarse",
            feature_strength=1.0,
            rows="positive",
        ),
    ),
    (
        "the shape's features enter after the decoder's first block with attention; theirs inside it, after its first "
        "convolutions",
        "no self-recurrence (theirs repeats steps between 10 and 50 %)",
    ),
)

DEFAULT = Preset(
    "default",
    "our own: the best found on the demo world's tuning pairs (docs/presets.md)",
    (
        Step(
            AttentionEdit("replace", shape_query=1.0),
            "all",
            shape_window=Window(),
            feature_strength=1.0,
            blocks="appearance",
            shape_blocks="all",
        ),
    ),
    color=Window(0.2, 0.95),
)

PRESETS: dict[str, Preset] = {
    preset.name: preset for preset in (DEFAULT, MASACTRL, CROSS_IMAGE, STYLE_ALIGNED, VISUAL_STYLE, STYLE_ID, CTRL_X)
}
"""By name, ours first."""
