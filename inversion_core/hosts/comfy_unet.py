"""ComfyUI's UNet models (SD1.x, SD2.x, SDXL, the demo model): injections on the stock samplers.

Nothing is attached to the shared model. A clone of the ModelPatcher carries one OUTER_SAMPLE wrapper; when a run
starts, the wrapper puts a `_Run` into that run's own copy of the options, and the copy dies with the run.

Inside a run, `attn1_patch` appends the references' hidden states to the tokens of the call, so that they go through
the model's own projections (LoRA, fp8 and offload keep working), and `optimized_attention_override` takes q, k and v
apart again and hands them to the operator. Other packs' overrides and replacements are called, never overwritten.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import comfy.model_patcher
import comfy.patcher_extension
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import Tensor

from ..attention import AttentionEdit, ReferenceTokens, Tokens, edited_attention
from ..injection import Injection, Site, Window
from ..reference import Reference, ReferenceBank
from .base import Crop, Grid, HostError, inside, map_to_tokens, mask_to_tokens, require_channels, tokens_to_map

KEY = "shape_and_appearance"
BANK_BYTES = 1 << 30
"""What the references' hidden states of one run may take on the device; beyond it they are computed again."""

Options = dict[str, Any]


def attach(model: comfy.model_patcher.ModelPatcher, injection: Injection) -> comfy.model_patcher.ModelPatcher:
    """A clone of the model with one more injection; the model itself is not touched.

    Raises:
        HostError: the model is not one of ComfyUI's UNets, or a reference has another number of latent channels.
    """
    unet = model.model.diffusion_model
    if not isinstance(unet, UNetModel):
        raise HostError(
            f"KV Injection works on UNet models (SD1.x, SD2.x, SDXL and the demo model), but this model is a "
            f"{type(unet).__name__}: load a checkpoint of one of these families"
        )
    if injection.edit.qk_stats or injection.edit.reference == "normalise":
        raise HostError(
            "this host carries out replace, extend and the shape's queries and keys, but neither qk_stats nor "
            f"reference='normalise' (the edit is {injection.edit}): leave them out"
        )
    for reference in injection.references:
        require_channels(reference, model.model.latent_format.latent_channels, type(model.model).__name__)
    clone = model.clone()
    if injection.neutral:
        return clone
    kind = comfy.patcher_extension.WrappersMP.OUTER_SAMPLE
    earlier = [one for old in clone.get_wrappers(kind, KEY) for one in old.injections]
    clone.remove_wrappers_with_key(kind, KEY)
    clone.add_wrapper_with_key(kind, KEY, _OuterSample((*earlier, injection)))
    return clone


def default_feature_blocks(unet: UNetModel) -> frozenset[int]:
    """The decoder block whose incoming features carry the layout: a third of the way up, as in Plug-and-Play
    (arXiv 2211.12572), which is output block 4 of SD1.5's 12."""
    return frozenset({round(len(unet.output_blocks) / 3)})


@dataclass(frozen=True, eq=False)
class _OuterSample:
    """The only thing an attached model carries. Immutable; everything that changes lives in a `_Run`."""

    injections: tuple[Injection, ...]

    def __deepcopy__(self, memo: dict) -> _OuterSample:
        return self

    def __call__(self, executor: Any, noise: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        guider = executor.class_obj
        unet = guider.model_patcher.model.diffusion_model
        run = _Run(self.injections, guider, Grid(*noise.shape[-2:]), default_feature_blocks(unet))
        run.enter(guider.model_options.setdefault("transformer_options", {}))
        result = executor(noise, *args, **kwargs)
        run.require_effect()
        return result


class _Active(NamedTuple):
    """An injection at work at the current sigma, with the hidden states of the references that are."""

    injection: Injection
    edit: AttentionEdit | None
    appearance: dict[Any, Tensor] | None
    shape: dict[Any, Tensor] | None


@dataclass
class _Call:
    """What `attn1_patch` leaves for the attention call that follows it."""

    site: Site
    tokens: int
    own_keys: int
    parts: list[_Part]
    rows: list[_Rows]


@dataclass
class _Part:
    """One injection's share of a call: the active edit and where its tokens begin (the shape's: among q, among k)."""

    injection: Injection
    edit: AttentionEdit
    shape_at: tuple[int, int] | None = None
    appearance_at: int | None = None
    appearance_tokens: int = 0
    mask_ref: Tensor | None = None


@dataclass(frozen=True)
class _Rows:
    """Consecutive rows of the batch that belong to one prompt."""

    start: int
    stop: int
    positive: bool
    crop: Crop


@dataclass
class _Run:
    """One sampling run: what is active now, what the references' hidden states are, what was changed."""

    injections: tuple[Injection, ...]
    guider: Any
    full: Grid
    feature_blocks: frozenset[int]
    bank: ReferenceBank = field(default_factory=lambda: ReferenceBank(BANK_BYTES))
    calls: int = 0
    _conds: dict[tuple[str, int], list] = field(default_factory=dict)
    _areas: dict[Any, tuple[int, ...]] = field(default_factory=dict)
    _now: list[_Active] = field(default_factory=list)
    _call: _Call | None = None
    _shared: dict[Any, Any] = field(default_factory=dict)

    def enter(self, options: Options) -> None:
        """Put this run's hooks into the run's own transformer options, after every other pack's."""
        patches = options["patches"] = {name: list(found) for name, found in options.get("patches", {}).items()}
        patches.setdefault("attn1_patch", []).append(self.attn1_patch)
        patches.setdefault("output_block_patch", []).append(self.output_block_patch)
        options["optimized_attention_override"] = _Override(self, options.get("optimized_attention_override"))
        replaced = options.get("patches_replace", {}).get("attn1")
        if replaced:
            owned = {place: _Replacement(self, owner) for place, owner in replaced.items()}
            options["patches_replace"] = {**options["patches_replace"], "attn1": owned}
        kind = comfy.patcher_extension.WrappersMP.APPLY_MODEL
        comfy.patcher_extension.add_wrapper_with_key(kind, KEY, self.apply_model, options)

    def require_effect(self) -> None:
        """Raise if no attention call was changed in the whole run."""
        if self.calls == 0:
            raise HostError(
                "KV Injection changed nothing: none of its attention sites ran inside its window. Widen start and end "
                "percent, or check that the sampler's denoise reaches that part of the schedule"
            )

    # --- every evaluation of the model -------------------------------------------------------------------------------

    def apply_model(self, executor: Any, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Before the model runs: decide what is active at this sigma and see that its references are in the bank."""
        base = executor.class_obj
        sigma = float(t.flatten()[0])  # the one wait for the device in a step
        self._areas = {
            cond["uuid"]: cond["area"]
            for conds in self.guider.conds.values()
            for cond in conds
            if cond.get("area") is not None and "uuid" in cond
        }
        self._now = []
        for injection in self.injections:
            appearance = self._states(base, injection.appearance, injection.window, sigma, x)
            shape = self._states(base, injection.shape, injection.shape_window, sigma, x)
            if appearance is not None or shape is not None:
                edit = injection.at(appearance is not None, shape is not None)
                self._now.append(_Active(injection, edit, appearance, shape))
        try:
            return executor(x, t, *args, **kwargs)
        finally:
            self._now, self._call = [], None
            self._shared.clear()

    def _states(
        self, base: Any, reference: Reference | None, window: Window, sigma: float, like: Tensor
    ) -> dict[Any, Tensor] | None:
        """The reference's hidden states at this sigma, from the bank or from one pass; None outside the window."""
        if reference is None or not inside(base.model_sampling, window, sigma):
            return None
        key = (*_identity(reference), sigma)
        states = self.bank.get(key)
        if states is None:
            states = self._capture(base, reference, sigma, like)
            self.bank.put(key, states)
        return states

    @torch.no_grad()
    def _capture(self, base: Any, reference: Reference, sigma: float, like: Tensor) -> dict:
        """One pass over the re-noised reference: inputs of every self-attention and of every decoder block."""
        latent = base.process_latent_in(reference.latent.to(like.device, torch.float32))
        noise = reference.noise().to(latent)
        level = torch.full((1,), sigma, device=like.device, dtype=torch.float32)
        noisy = base.model_sampling.noise_scaling(level.view(1, 1, 1, 1), noise, latent)
        states: dict[Any, Tensor] = {}

        def reads(*references: Reference | None) -> bool:
            return any(one is not None and _identity(one) == _identity(reference) for one in references)

        def self_attention(n: Tensor, context: Tensor, value: Tensor, extra: Options) -> tuple:
            if any(reads(one.appearance, one.shape) and _chosen(one, _site(extra)) for one in self.injections):
                states[_site(extra)] = tokens_to_map(n, _grid(extra))
            return n, context, value

        def decoder_block(h: Tensor, skip: Tensor, options: Options) -> tuple:
            number = options["block"][1]
            if any(reads(one.shape) and number in self._blocks(one) for one in self.injections):
                states[number] = h
            return h, skip

        hooks = {"attn1_patch": [self_attention], "output_block_patch": [decoder_block]}
        conds = self._reference_conds(base, reference, noise)
        options = {"transformer_options": {"patches": hooks}}
        comfy.samplers.calc_cond_batch(base, [conds], noisy.to(like.dtype), level, options)
        return states

    def _reference_conds(self, base: Any, reference: Reference, noise: Tensor) -> list:
        """The conditioning of the reference's pass, made ready for its size once a run."""
        key = _identity(reference)
        if key not in self._conds:
            if reference.conditioning is not None:
                conds = comfy.sampler_helpers.convert_cond(reference.conditioning)
            else:
                originals = self.guider.original_conds
                conds = [dict(cond) for cond in originals.get("negative") or originals["positive"]]
            conds = [{name: cond[name] for name in cond if name not in _PLACED} for cond in conds[:1]]
            ready = comfy.samplers.process_conds(base, noise, {"positive": conds}, noise.device)
            self._conds[key] = ready["positive"]
        return self._conds[key]

    # --- inside the model ---------------------------------------------------------------------------------------------

    def output_block_patch(self, h: Tensor, skip: Tensor, options: Options) -> tuple[Tensor, Tensor]:
        """Blend the shape reference's decoder features into what enters a feature block."""
        number = options["block"][1]
        for injection, _, _, states in self._now:
            share = injection.feature_strength * injection.edit.strength
            if states is None or share == 0 or number not in self._blocks(injection):
                continue
            parts = []
            for rows in self._rows(h, options):
                part = h[rows.start : rows.stop]
                if injection.rows == "all" or rows.positive:
                    grid = Grid(*h.shape[-2:])
                    wanted = rows.crop.of(states[number], grid, "bilinear").to(part)
                    weight = share
                    if injection.mask is not None:
                        mask = injection.mask.to(part.device, torch.float32)
                        weight = rows.crop.of(mask, grid, "area").to(part) * share
                    part = torch.lerp(part, wanted.expand_as(part), weight)
                parts.append(part)
            h = torch.cat(parts)
            self.calls += 1
        return h, skip

    def attn1_patch(self, n: Tensor, context: Tensor, value: Tensor, extra: Options) -> tuple[Tensor, Tensor, Tensor]:
        """Append the references' hidden states to the tokens of this self-attention."""
        site, grid = _site(extra), _grid(extra)
        self._call = None
        chosen = [now for now in self._now if _chosen(now.injection, site)]
        if not chosen:
            return n, context, value
        if n.shape[1] != grid.height * grid.width:
            raise HostError(
                f"at {site} another patch changed the tokens from {grid.height}x{grid.width} to {n.shape[1]} a row: "
                "KV Injection cannot follow it; disable that patch (HyperTile, token merging) or leave out the site"
            )
        rows = self._rows(n, extra)
        call = _Call(site, n.shape[1], context.shape[1], [], rows)
        queries, keys, values = [n], [context], [value]
        for injection, edit, appearance, shape in chosen:
            if edit is None:
                continue
            part = _Part(injection, edit)
            if shape is not None and (edit.shape_query > 0 or edit.shape_key > 0):
                tokens = torch.cat(
                    [self._fitted(shape, site, grid, r).to(n).expand(r.stop - r.start, -1, -1) for r in rows]
                )
                part.shape_at = _length(queries), _length(keys)
                queries.append(tokens)
                keys.append(tokens)
                values.append(tokens)
            if appearance is not None and edit.reference != "none":
                tokens = map_to_tokens(appearance[site]).to(n).expand(n.shape[0], -1, -1)
                part.appearance_at, part.appearance_tokens = _length(keys), tokens.shape[1]
                part.mask_ref = self._reference_mask(injection, Grid(*appearance[site].shape[-2:]), n.device)
                keys.append(tokens)
                values.append(tokens)
            call.parts.append(part)
        if not call.parts:
            return n, context, value
        self._call = call
        same = value is context
        keys_joined = torch.cat(keys, dim=1)
        return torch.cat(queries, dim=1), keys_joined, keys_joined if same else torch.cat(values, dim=1)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, attend: Callable) -> Tensor:
        """Take the appended tokens apart and let the operator do its work: (B, H, N, D) in and out."""
        call, self._call = self._call, None
        assert call is not None
        own = Tokens(q[:, :, : call.tokens], k[:, :, : call.own_keys], v[:, :, : call.own_keys])
        plain: Tensor | None = None
        total: Tensor | None = None
        for part in call.parts:
            edited = torch.cat([self._edited(part, call, own, q, k, v, rows, attend) for rows in call.rows])
            if total is None:
                total = edited
            else:
                # Several injections on one site add their changes, so that disjoint masks do not disturb each other.
                plain = attend(*own, None) if plain is None else plain
                total = total + (edited - plain)
        self.calls += 1
        assert total is not None
        return total

    def _edited(
        self, part: _Part, call: _Call, own: Tokens, q: Tensor, k: Tensor, v: Tensor, rows: _Rows, attend: Callable
    ) -> Tensor:
        at = slice(rows.start, rows.stop)
        mine = Tokens(*(x[at] for x in own))
        injection = part.injection
        if injection.rows == "positive" and not rows.positive:
            return attend(*mine, None)
        edit, shape, references = part.edit, None, []
        if part.shape_at is not None:
            queries, keys = (slice(start, start + call.tokens) for start in part.shape_at)
            shape = Tokens(q[at, :, queries], k[at, :, keys], v[at, :, keys])
        if part.appearance_at is not None:
            span = slice(part.appearance_at, part.appearance_at + part.appearance_tokens)
            references = [ReferenceTokens(k[at, :, span], v[at, :, span], part.mask_ref)]
        out = edited_attention(edit, mine, references, shape=shape, attend=attend)
        if references and injection.shape is not None and injection.shape.mask is not None:
            # The appearance goes where the shape's object is; around it only the layout is kept.
            around = replace(edit, reference="none")
            layout = edited_attention(around, mine, shape=shape, attend=attend)
            out = torch.lerp(layout, out, self._mask(injection.shape.mask, call, rows, out))
        if injection.mask is not None:
            out = torch.lerp(attend(*mine, None), out, self._mask(injection.mask, call, rows, out))
        return out

    def _blocks(self, injection: Injection) -> frozenset[int]:
        return self.feature_blocks if injection.feature_blocks is None else injection.feature_blocks

    # --- rows, grids and masks ----------------------------------------------------------------------------------------

    def _rows(self, x: Tensor, options: Options) -> list[_Rows]:
        chunks = options["cond_or_uncond"]
        size = x.shape[0] // len(chunks)
        seen = Grid(*options["original_shape"][-2:])
        whole = Crop(0, 0, seen, seen)
        found = []
        for i, (kind, key) in enumerate(zip(chunks, options["uuids"], strict=True)):
            area = self._areas.get(key)
            crop = whole if area is None else Crop(area[2], area[3], seen, self.full)
            found.append(_Rows(i * size, (i + 1) * size, kind == 0, crop))
        return found

    def _fitted(self, states: dict, site: Site, grid: Grid, rows: _Rows) -> Tensor:
        """The shape reference's tokens on the grid of this call, (1, N, C)."""
        return map_to_tokens(rows.crop.of(states[site], grid, "bilinear"))

    def _reference_mask(self, injection: Injection, grid: Grid, device: torch.device) -> Tensor | None:
        reference = injection.appearance
        if reference is None or reference.mask is None:
            return None
        key = ("reference", id(injection), grid)
        if key not in self._shared:
            mask = mask_to_tokens(reference.mask.to(device, torch.float32), grid)
            # A token counts fully once half of it is the object; thin objects keep their best tokens instead.
            self._shared[key] = (mask >= mask.amax().clamp(max=0.5)).float()
        return self._shared[key]

    def _mask(self, mask: Tensor, call: _Call, rows: _Rows, like: Tensor) -> Tensor:
        """A mask over the whole picture at the tokens of this call: (1, 1, N, 1)."""
        grid = _fit_grid(call.tokens, rows.crop.size)
        key = (id(mask), grid, rows.crop)
        if key not in self._shared:
            fitted = rows.crop.of(mask.to(like.device, torch.float32), grid, "area")
            self._shared[key] = fitted.flatten(2).transpose(1, 2)[:, None].to(like.dtype)
        return self._shared[key]


_PLACED = frozenset(
    (
        "area",
        "mask",
        "mask_strength",
        "start_percent",
        "end_percent",
        "control",
        "gligen",
        "default",
        "hooks",
        "uuid_area",
    )
)
"""What places a prompt in the picture or in time, or steers its layout: the reference's pass goes without."""


@dataclass(frozen=True, eq=False)
class _Override:
    """ComfyUI's attention hook: the calls that `attn1_patch` prepared go to the operator, all others go on."""

    run: _Run
    earlier: Callable | None

    def __call__(
        self, func: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any
    ) -> Tensor:
        attention = func if self.earlier is None else _Chained(self.earlier, func)
        if self.run._call is None:
            return attention(q, k, v, heads, *args, **kwargs)
        split = kwargs.pop("skip_reshape", False)
        joined = not kwargs.pop("skip_output_reshape", False)
        kwargs.pop("mask", None)

        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            layout = {"skip_reshape": True, "skip_output_reshape": True}
            return attention(q, k, v, heads, mask=mask, **layout, **kwargs)

        if not split:
            q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        out = self.run.attention(q, k, v, attend)
        return out.transpose(1, 2).flatten(2) if joined else out


@dataclass(frozen=True, eq=False)
class _Chained:
    """Another pack's attention override, called as the attention it overrides."""

    override: Callable
    func: Callable

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.override(self.func, *args, **kwargs)


@dataclass(frozen=True, eq=False)
class _Replacement:
    """Another pack's attn1 replacement at one place: it stays the attention that the operator uses there."""

    run: _Run
    owner: Callable

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra: Options) -> Tensor:
        if self.run._call is None:
            return self.owner(q, k, v, extra)
        heads = extra["n_heads"]

        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            joined = (x.transpose(1, 2).flatten(2) for x in (q, k, v))
            # Masks travel in extra channels of the head: the owner must not split it by the model's own width.
            return self.owner(*joined, {**extra, "dim_head": q.shape[-1]}).unflatten(2, (heads, -1)).transpose(1, 2)

        q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        return self.run.attention(q, k, v, attend).transpose(1, 2).flatten(2)


def _identity(reference: Reference) -> tuple[str, int]:
    """Equal for references that look the same to the model, whatever their masks: they share the bank's entries."""
    return reference.content, id(reference.conditioning)


def _site(extra: Options) -> Site:
    name, number = extra["block"][:2]
    return Site(name, number, extra["block_index"])


def _grid(extra: Options) -> Grid:
    return Grid(*extra["activations_shape"][-2:])


def _fit_grid(tokens: int, size: Grid) -> Grid:
    """The grid of a site whose tokens cover a latent of this size: a UNet halves it, rounding up, some times."""
    grid = size
    while grid.height * grid.width > tokens:
        grid = Grid(math.ceil(grid.height / 2), math.ceil(grid.width / 2))
    return grid


def _chosen(injection: Injection, site: Site) -> bool:
    if injection.sites == "all":
        return True
    return site.block == "output" if injection.sites == "decoder" else site in injection.sites


def _length(parts: Sequence[Tensor]) -> int:
    return sum(part.shape[1] for part in parts)
