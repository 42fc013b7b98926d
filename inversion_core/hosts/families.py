"""The diffusion transformers that KV Injection knows, as data: their attention calls, and the order of their tokens.

Known by the name of ComfyUI's class, so that nothing of ComfyUI is imported here. A class that only descends from one
of these is another model: its blocks and its tokens may lie elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ..injection import Injection
from ..sites import Part, Site
from .base import Grid, HostError

Block = tuple[Part, int]
"""A block as ComfyUI tells it to patches: its type and its number."""


class Call(NamedTuple):
    """One attention call. `site`: where the picture's tokens are in it; None: a prompt's or a cross-attention's."""

    block: Block | None
    site: Site | None


class Layout(NamedTuple):
    """The order of the tokens in an attention call: others, the picture frame by frame and row by row, others.

    The others are the prompt's, those of further pictures in the same sequence (Kontext, Qwen-Image-Edit), and filling.
    """

    before: int
    frames: int
    grid: Grid
    after: int

    @property
    def picture(self) -> slice:
        """The picture's tokens."""
        return slice(self.before, self.before + self.frames * self.grid.height * self.grid.width)

    @property
    def total(self) -> int:
        """All tokens."""
        return self.picture.stop + self.after


class Sequences(NamedTuple):
    """What decides the order of the tokens: the latent's shape, the prompt's length, and what else the model takes."""

    latent: Sequence[int]
    text: int
    conds: Mapping[str, Any]


class Rotary(NamedTuple):
    """Places turned into queries and keys, in pairs of neighbouring channels.

    Attributes:
        embedder: what of the model makes turns (1, 1, N, D / 2, 2, 2) of places (1, N, axes): frame, row, column,
            others.
        centred: whether rows and columns are counted from the middle of a picture.
        first: the number of the picture's first frame.
    """

    embedder: str
    centred: bool = False
    first: Callable[[Layout], int] = lambda layout: 0


@dataclass(frozen=True)
class Family:
    """One kind of diffusion transformer.

    Attributes:
        name: for people.
        model: ComfyUI's class.
        calls: a model's attention calls in their order.
        layout: the tokens of the joint attention.
        rotary: how queries and keys come with their places turned into them (they cannot be resized then); None: they
            do not.
        appearance: which sites the presets read the appearance at. From the published editing methods for such models;
            not measured here on the large ones.
    """

    name: str
    model: str
    calls: Callable[[Any], Iterator[Call]]
    layout: Callable[[Any, Sequences], Layout]
    rotary: Rotary | None
    appearance: str

    def sites(self, model: Any) -> list[Site]:
        """A model's sites, in the order in which they run."""
        return [call.site for call in self.calls(model) if call.site is not None]

    def rules(self, rules: str) -> str:
        """Rules of `sites.select` with what "appearance" means in this family."""
        return ", ".join(self.appearance if one.strip() == "appearance" else one.strip() for one in rules.split(","))

    def fitted(self, injection: Injection) -> Injection:
        """An injection as models of this family carry it out.

        Raises:
            HostError: they cannot.
        """
        if injection.edit.reference == "normalise":
            raise HostError(
                "'normalise' (Ctrl-X) changes what enters a UNet's attention layer, and a diffusion transformer gives "
                "no hook there: choose 'replace' or 'extend', or another preset (docs/dit.md: which works where)"
            )
        return replace(
            injection,
            sites=self.rules(injection.sites),
            shape_sites=None if injection.shape_sites is None else self.rules(injection.shape_sites),
            feature_strength=0.0,  # of a UNet's decoder; there is none here
        )

    def require_same_size(self, reference: Sequence[int], picture: Sequence[int]) -> None:
        """Raise HostError where a shape reference's queries cannot stand in for the picture's; shapes of latents."""
        if len(picture) == 5 and picture[2] > 1:
            raise HostError(
                f"the picture is a video of {picture[2]} latent frames, and a still shape reference cannot lay it out: "
                "disconnect the shape reference, the appearance works alone"
            )
        if self.rotary is not None and tuple(reference[-2:]) != tuple(picture[-2:]):
            raise HostError(
                f"the shape reference's latent has {reference[-2]} x {reference[-1]} cells, but the picture's has "
                f"{picture[-2]} x {picture[-1]}: on {self.name} both must be of one size, resize the shape's image"
            )

    def layout_at(self, site: Site, model: Any, sequences: Sequences) -> Layout:
        """The tokens at a site. A block's second call is of the picture alone (SD3.5 medium)."""
        layout = self.layout(model, sequences)
        return layout if site.index == 0 else layout._replace(before=0, after=0)


def is_transformer(model: Any) -> bool:
    """Whether a `diffusion_model` is of a known family."""
    return _name(model) in FAMILIES


def family_of(model: Any) -> Family:
    """The family of a `diffusion_model`.

    Raises:
        HostError: it is none of the known ones.
    """
    if not is_transformer(model):
        raise unknown(model)
    return FAMILIES[_name(model)]


def unknown(model: Any) -> HostError:
    """The error for a `diffusion_model` that no host knows."""
    known = ", ".join(family.name for family in FAMILIES.values())
    return HostError(
        f"KV Injection works on UNet models (SD1.x, SD2.x, SDXL and the demo model) and on diffusion transformers "
        f"({known}), but this model is a {type(model).__name__}: load a checkpoint of one of these families"
    )


def _name(model: Any) -> str:
    return f"{type(model).__module__}.{type(model).__qualname__}"


# --- attention calls --------------------------------------------------------------------------------------------------


def _stack(part: Part, blocks: Sequence[Any], patch: int) -> Iterator[Call]:
    for number in range(len(blocks)):
        yield Call((part, number), Site(part, number, 0, patch))


def _flux_calls(model: Any) -> Iterator[Call]:
    yield from _stack("double", model.double_blocks, model.patch_size)
    yield from _stack("single", model.single_blocks, model.patch_size)


def _sd3_calls(model: Any) -> Iterator[Call]:
    for call, block in zip(_stack("double", model.joint_blocks, model.patch_size), model.joint_blocks, strict=True):
        yield call
        if block.x_block.x_block_self_attn:
            yield Call(call.block, Site("double", call.block[1] if call.block else 0, 1, model.patch_size))


def _qwen_calls(model: Any) -> Iterator[Call]:
    yield from _stack("double", model.transformer_blocks, model.patch_size)


def _lumina_calls(model: Any) -> Iterator[Call]:
    for _ in (*model.context_refiner, *model.noise_refiner):
        yield Call(None, None)
    yield from _stack("double", model.layers, model.patch_size)


def _wan_calls(model: Any) -> Iterator[Call]:
    for call, block in zip(_stack("double", model.blocks, model.patch_size[-1]), model.blocks, strict=True):
        yield call
        for _ in range(2 if hasattr(block.cross_attn, "k_img") else 1):  # a picture's prompt beside the text's
            yield Call(call.block, None)


# --- tokens -----------------------------------------------------------------------------------------------------------


def _picture(latent: Sequence[int], patch: int) -> tuple[int, Grid]:
    """Frames and grid of a latent; one that the patches do not divide is padded."""
    frames = latent[2] if len(latent) == 5 else 1
    return frames, Grid(math.ceil(latent[-2] / patch), math.ceil(latent[-1] / patch))


def _count(latent: Sequence[int], patch: int) -> int:
    frames, grid = _picture(latent, patch)
    return frames * grid.height * grid.width


def _text_picture_others(model: Any, of: Sequences) -> Layout:
    """The prompt, the picture, further pictures."""
    frames, grid = _picture(of.latent, model.patch_size)
    others = sum(_count(one.shape, model.patch_size) for one in of.conds.get("ref_latents") or ())
    return Layout(of.text, frames, grid, others)


def _sd3_layout(model: Any, of: Sequences) -> Layout:
    """Registers, the prompt, the picture."""
    frames, grid = _picture(of.latent, model.patch_size)
    return Layout(model.register_length + of.text, frames, grid, 0)


def _lumina_layout(model: Any, of: Sequences) -> Layout:
    """The prompt and the picture, each filled up to a multiple on Z-Image."""
    frames, grid = _picture(of.latent, model.patch_size)
    multiple = getattr(model, "pad_tokens_multiple", None) or 1
    return Layout(of.text + -of.text % multiple, frames, grid, -(grid.height * grid.width) % multiple)


def _wan_layout(model: Any, of: Sequences) -> Layout:
    """A reference picture, the video, further frames and pictures; the prompt is read by cross-attention."""
    patch = model.patch_size[-1]
    frames, grid = _picture(of.latent, patch)
    first, more = of.conds.get("reference_latent"), of.conds.get("time_dim_concat")
    before = 0 if first is None or model.ref_conv is None else _count(first.shape, patch)
    after = [] if more is None else [more]
    after += of.conds.get("context_latents") or ()
    return Layout(before, frames, grid, sum(_count(one.shape, patch) for one in after))


FAMILIES = {
    family.model: family
    for family in (
        Family("Flux", "comfy.ldm.flux.model.Flux", _flux_calls, _text_picture_others, Rotary("pe_embedder"), "single"),
        Family(
            "Chroma",
            "comfy.ldm.chroma.model.Chroma",
            _flux_calls,
            _text_picture_others,
            Rotary("pe_embedder"),
            "single",
        ),
        Family(
            "SD3",
            "comfy.ldm.modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper",
            _sd3_calls,
            _sd3_layout,
            None,
            "all",
        ),
        Family(
            "Qwen-Image",
            "comfy.ldm.qwen_image.model.QwenImageTransformer2DModel",
            _qwen_calls,
            _text_picture_others,
            Rotary("pe_embedder", centred=True),
            "mid, late",
        ),
        Family(
            "Wan",
            "comfy.ldm.wan.model.WanModel",
            _wan_calls,
            _wan_layout,
            Rotary("rope_embedder", first=lambda layout: int(layout.before > 0)),  # a reference picture is frame 0
            "mid, late",
        ),
        Family(
            "Lumina2 and Z-Image",
            "comfy.ldm.lumina.model.NextDiT",
            _lumina_calls,
            _lumina_layout,
            Rotary("rope_embedder", first=lambda layout: layout.before + 1),  # the prompt's tokens are frames 1, 2, ...
            "mid, late",
        ),
    )
}
"""By ComfyUI's class."""
