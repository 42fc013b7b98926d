"""ComfyUI's UNet models (SD1.x, SD2.x, SDXL, the demo model): injections on the stock samplers.

Nothing is attached to the shared model. A clone of the ModelPatcher carries one OUTER_SAMPLE wrapper; when a run
starts, the wrapper puts a `_Run` into that run's own copy of the options, and the copy dies with the run.

Inside a run, `attn1_patch` appends the references' hidden states to the tokens of the call, so that they go through
the model's own projections (LoRA, fp8 and offload keep working), and `optimized_attention_override` takes q, k and v
apart again and hands them to the operator.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import comfy.model_patcher
import comfy.patcher_extension
from comfy.ldm.modules.attention import SpatialTransformer, SpatialVideoTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, UNetModel, Upsample
from torch import Tensor

from ..attention import Attend
from ..injection import Injection, Window
from ..sites import Part, Site
from .base import Crop, Grid, HostError, limits, require_channels, tokens_to_map
from .comfy_attention import Options, Override, Replacement, follow
from .comfy_references import BANK, ReferencePasses, require_own_trajectory
from .report import Report
from .session import FEATURES, AttentionCall, Layer, Rows, Session, States

KEY = "shape_and_appearance"


def attach(model: comfy.model_patcher.ModelPatcher, *injections: Injection) -> comfy.model_patcher.ModelPatcher:
    """A clone of the model with further injections; the model itself is not touched.

    Raises:
        HostError: the model is not one of ComfyUI's UNets, or a reference has another number of latent channels.
        ValueError: an injection's sites mean nothing on this model.
    """
    sites = sites_of(model.model.diffusion_model)
    for reference in (one for injection in injections for one in injection.references):
        require_channels(reference, model.model.latent_format.latent_channels, type(model.model).__name__)
        require_own_trajectory(reference, model.model)
    clone = model.clone()
    new = tuple(injection for injection in injections if not injection.neutral)
    Session(new, sites)  # raises here, while the artist looks at this node, what would else be raised by the sampler
    if not new:
        return clone
    kind = comfy.patcher_extension.WrappersMP.OUTER_SAMPLE
    earlier = [one for old in clone.get_wrappers(kind, KEY) for one in old.injections]
    clone.remove_wrappers_with_key(kind, KEY)
    clone.add_wrapper_with_key(kind, KEY, _OuterSample((*earlier, *new)))
    return clone


def last_report(model: comfy.model_patcher.ModelPatcher) -> Report:
    """The report of the last finished run with this patched model.

    Raises:
        HostError: the model carries no injection, or nothing was sampled with it yet.
    """
    wrappers = model.get_wrappers(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, KEY)
    if not wrappers:
        raise HostError("this model carries no injection: connect the MODEL that comes out of KV Injection")
    report = _REPORTS.get(wrappers[0])
    if report is None:
        raise HostError(
            "nothing was sampled with this model yet: connect the sampler's output, so that the report is made after it"
        )
    return report


def sites_of(unet: Any) -> list[Site]:
    """The model's self-attentions, in the order in which they run.

    Raises:
        HostError: the model is not one of ComfyUI's image UNets.
    """
    return [site for site, _ in _walk(unet)]


def _walk(unet: Any) -> Iterator[tuple[Site, Any]]:
    """Each self-attention's place and layer."""
    if not isinstance(unet, UNetModel) or any(isinstance(one, SpatialVideoTransformer) for one in unet.modules()):
        raise HostError(
            f"KV Injection works on UNet models (SD1.x, SD2.x, SDXL and the demo model), but this model is a "
            f"{type(unet).__name__}: load a checkpoint of one of these families"
        )
    scale = 1
    parts: tuple[tuple[Part, Any], ...] = (
        ("input", unet.input_blocks),
        ("middle", [unet.middle_block]),
        ("output", unet.output_blocks),
    )
    for part, blocks in parts:
        for number, block in enumerate(blocks):
            for module in block:
                if isinstance(module, Downsample):
                    scale *= 2
                elif isinstance(module, Upsample):
                    scale //= 2
                elif isinstance(module, SpatialTransformer):
                    for index, transformer in enumerate(module.transformer_blocks):
                        if transformer.disable_self_attn:  # its attn1 reads the prompt
                            continue
                        yield Site(part, number, index, scale), transformer.attn1


_REPORTS: WeakKeyDictionary[_OuterSample, Report] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class _OuterSample:
    """The only thing an attached model carries. Immutable; everything that changes lives in a `_Run`."""

    injections: tuple[Injection, ...]

    def __deepcopy__(self, memo: dict) -> _OuterSample:
        return self

    def __call__(self, executor: Any, noise: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        guider = executor.class_obj
        run = _Run(self.injections, guider, Grid(*noise.shape[-2:]))
        run.enter(guider.model_options.setdefault("transformer_options", {}))
        started = time.perf_counter()
        try:
            result = executor(noise, *args, **kwargs)
        finally:
            BANK.offload()
        run.finish(time.perf_counter() - started)
        _REPORTS[self] = run.session.report
        return result


class _Prompt(NamedTuple):
    """A prompt's place in the picture, (height, width, top, left) in latent cells or None for all of it, and its list.

    ComfyUI gives a region of the positive prompt a counterpart in the negative list under the same name: `positive` is
    then None.
    """

    positive: bool | None
    area: tuple[int, ...] | None


@dataclass
class _Run:
    """One sampling run: ComfyUI's hooks on one side, the session on the other."""

    injections: tuple[Injection, ...]
    guider: Any
    full: Grid
    session: Session = field(init=False)
    _passes: ReferencePasses = field(init=False)
    _layers: dict[str, Layer] = field(init=False)
    _feature_block: int = field(init=False)
    _patches: list = field(default_factory=list, init=False)
    _taken: dict[tuple, bool] = field(default_factory=dict, init=False)
    _prompts: dict[Any, _Prompt] = field(default_factory=dict, init=False)
    _limits: dict[Window, tuple[float, float]] = field(default_factory=dict, init=False)
    _call: AttentionCall | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        places = list(_walk(self.guider.model_patcher.model.diffusion_model))
        self.session = Session(self.injections, [site for site, _ in places])
        self._layers = {site.name: Layer(attn.to_q, attn.to_k, attn.heads) for site, attn in places}
        self._feature_block = min(site.number for site, _ in places if site.part == "output") + 1
        self._passes = ReferencePasses(self.guider, self._recording, self.session.report)

    def enter(self, options: Options) -> None:
        """Listen to the run's evaluations of the model, through the run's own transformer options."""
        kind = comfy.patcher_extension.WrappersMP.APPLY_MODEL
        comfy.patcher_extension.add_wrapper_with_key(kind, KEY, self.apply_model, options)

    def finish(self, seconds: float) -> None:
        """Complete the report; raise if no attention call was changed in the whole run."""
        report = self.session.report
        if not report.calls:
            raise HostError(
                "KV Injection changed nothing: none of its attention sites ran inside its window. Widen start and end "
                "percent, or check that the sampler's denoise reaches that part of the schedule"
            )
        report.seconds, report.bytes = seconds, BANK.stats.device_bytes + BANK.stats.ram_bytes
        report.finish()

    # --- every evaluation of the model -------------------------------------------------------------------------------

    def apply_model(
        self,
        executor: Any,
        x: Tensor,
        t: Tensor,
        c_concat: Any,
        c_crossattn: Any,
        control: Any,
        options: Options,
        **kwargs: Any,
    ) -> Tensor:
        """Before the model runs: decide what is active at this sigma and see that its references are known."""
        base = executor.class_obj
        sigma = float(t.flatten()[0])  # the one wait for the device in a step
        self._prompts = self._named_prompts()
        self.session.report.rows += x.shape[0]
        wanted = self.session.wanted
        try:
            self.session.begin(
                lambda reference: self._passes.states(base, reference, wanted(reference), sigma, x),
                lambda window: self._inside(base.model_sampling, window, sigma),
            )
            options = self._hooked(options) if self.session.active else options
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
        finally:
            self.session.end()
            self._call = None

    def _named_prompts(self) -> dict[Any, _Prompt]:
        """The run's prompts by ComfyUI's names for them."""
        found: dict[Any, _Prompt] = {}
        for name, conds in self.guider.conds.items():
            for cond in conds:
                key, positive = cond.get("uuid"), name == "positive"
                known = found.get(key)
                unsure = known is not None and known.positive is not positive
                found[key] = _Prompt(None if unsure else positive, cond.get("area"))
        return found

    def _hooked(self, options: Options) -> Options:
        """The options of this evaluation with our hooks around every other pack's.

        Around those of this very evaluation: a prompt may bring its own, and guidance methods add some to their calls.
        """
        patches, replaced = dict(options.get("patches", {})), options.get("patches_replace", {})
        self._patches = patches.get("attn1_patch", [])
        patches["attn1_patch"] = [self.attn1_patch]
        patches["output_block_patch"] = [*patches.get("output_block_patch", []), self.output_block_patch]
        owners = replaced.get("attn1", {})
        standing = self.guider.model_options["transformer_options"].get("patches_replace", {}).get("attn1", {})
        self._taken = {place: standing.get(place) is not owner for place, owner in owners.items()}
        ours = {place: one if self._taken[place] else Replacement(self, one) for place, one in owners.items()}
        return {
            **options,
            "patches": patches,
            "patches_replace": {**replaced, "attn1": ours},
            "optimized_attention_override": Override(self, options.get("optimized_attention_override")),
        }

    def _inside(self, sampling: Any, window: Window, sigma: float) -> bool:
        """Whether a sigma lies in a window, whose limits are asked of the model once: each waits for the device."""
        if window not in self._limits:
            self._limits[window] = limits(sampling, window)
        start, end = self._limits[window]
        return end < sigma <= start

    def _recording(self, names: frozenset[str], states: States) -> Options:
        """Transformer options that record a reference's pass."""

        def self_attention(n: Tensor, context: Tensor, value: Tensor, extra: Options) -> tuple:
            if _site(extra) in names:
                states[_site(extra)] = tokens_to_map(n, _grid(extra))
            return n, context, value

        def decoder_block(h: Tensor, skip: Tensor, options: Options) -> tuple:
            if FEATURES in names and options["block"][1] == self._feature_block:
                states[FEATURES] = h
            return h, skip

        return {"patches": {"attn1_patch": [self_attention], "output_block_patch": [decoder_block]}}

    # --- inside the model ---------------------------------------------------------------------------------------------

    def output_block_patch(self, h: Tensor, skip: Tensor, options: Options) -> tuple[Tensor, Tensor]:
        """Blend the shape references' features into what enters the block after the first with self-attention."""
        if options["block"][1] == self._feature_block:
            h = self.session.features(h, self._rows(h, options))
        return h, skip

    def attn1_patch(self, n: Tensor, context: Tensor, value: Tensor, extra: Options) -> tuple[Tensor, Tensor, Tensor]:
        """Append the references' hidden states to the tokens of this self-attention."""
        site = _site(extra)
        layer = None if self._left_alone(extra) else self._layers.get(site)
        call = None if layer is None else self.session.prepare(site, n, _grid(extra), self._rows(n, extra), layer)
        self._call = call
        if call is None:
            for patch in self._patches:
                n, context, value = patch(n, context, value, extra)
            return n, context, value
        value = call.hidden if value is n else value
        context = call.hidden if context is n else context
        hidden, carried = call.hidden, call.carried
        for patch in self._patches:
            hidden, context, value, carried = follow(patch, hidden, context, value, carried, extra)
        return call.join(hidden, context, value, carried)

    def _left_alone(self, extra: Options) -> bool:
        """Whether a pack took this attention over for this evaluation only, as perturbed-attention guidance does: what
        it computes there need not be an attention at all."""
        block, number = extra["block"][:2]
        place = (block, number, extra["block_index"])
        return self._taken.get(place, self._taken.get((block, number), False))

    @property
    def pending(self) -> bool:
        """Whether the attention call that comes next was prepared."""
        return self._call is not None

    def attention(self, q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
        """The prepared call, edited."""
        call, self._call = self._call, None
        assert call is not None
        return call.attention(q, k, v, attend)

    def _rows(self, x: Tensor, options: Options) -> list[Rows]:
        chunks = options["cond_or_uncond"]
        size = x.shape[0] // len(chunks)
        seen = Grid(*options["original_shape"][-2:])
        whole = Crop(0, 0, seen, seen)
        found = []
        for i, (kind, key) in enumerate(zip(chunks, options["uuids"], strict=True)):
            # By the guider's own lists where they tell: the order of the kinds is the guider's affair, and guidance
            # methods change it.
            positive, area = self._prompts.get(key, _Prompt(None, None))
            positive = kind == 0 if positive is None else positive
            crop = whole if area is None else Crop(area[2], area[3], seen, self.full)
            found.append(Rows(i * size, (i + 1) * size, positive, crop))
        return found


def _site(extra: Options) -> str:
    part, number = extra["block"][:2]
    return f"{part}.{number}.{extra['block_index']}"


def _grid(extra: Options) -> Grid:
    return Grid(*extra["activations_shape"][-2:])
