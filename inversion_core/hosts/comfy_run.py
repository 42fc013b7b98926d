"""What all of ComfyUI's models have in common under KV Injection: one sampling run, and each evaluation in it.

Nothing is attached to the shared model. A clone of the ModelPatcher carries one OUTER_SAMPLE wrapper; when a run
starts, the wrapper puts a `Run` into that run's own copy of the options, and the copy dies with the run. What differs
between kinds of models, their hooks into the attention, is a subclass's.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import torch
from torch import Tensor

from ..injection import Injection, Window
from ..sites import Site
from .base import Crop, Grid, HostError, limits, require_channels
from .comfy_attention import Options
from .comfy_references import BANK, ReferencePasses, require_own_trajectory
from .report import Report
from .session import Rows, Session, States

KEY = "shape_and_appearance"


def attach(
    model: comfy.model_patcher.ModelPatcher, host: type[Run], injections: tuple[Injection, ...]
) -> comfy.model_patcher.ModelPatcher:
    """A clone of the model with further injections; the model itself is not touched.

    Raises:
        HostError: the model is not of the host's kind, a reference has another number of latent channels, or an
            injection asks for what this kind of model has not.
        ValueError: an injection's sites mean nothing on this model.
    """
    unet = model.model.diffusion_model
    sites = host.sites_of(unet)
    for reference in (one for injection in injections for one in injection.references):
        require_channels(reference, model.model.latent_format.latent_channels, type(model.model).__name__)
        require_own_trajectory(reference, model.model)
    clone = model.clone()
    new = tuple(host.fitted(unet, injection) for injection in injections if not injection.neutral)
    Session(new, sites)  # raises here, while the artist looks at this node, what would else be raised by the sampler
    if not new:
        return clone
    kind = comfy.patcher_extension.WrappersMP.OUTER_SAMPLE
    earlier = [one for old in clone.get_wrappers(kind, KEY) for one in old.injections]
    clone.remove_wrappers_with_key(kind, KEY)
    clone.add_wrapper_with_key(kind, KEY, OuterSample((*earlier, *new), host))
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


@dataclass(frozen=True, eq=False)
class OuterSample:
    """The only thing an attached model carries. Immutable; everything that changes lives in a `Run`."""

    injections: tuple[Injection, ...]
    host: type[Run]

    def __deepcopy__(self, memo: dict) -> OuterSample:
        return self

    def __call__(self, executor: Any, noise: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        guider = executor.class_obj
        run = self.host(self.injections, guider, noise.shape)
        run.enter(guider.model_options.setdefault("transformer_options", {}))
        started = time.perf_counter()
        try:
            result = executor(noise, *args, **kwargs)
        finally:
            BANK.offload()
        run.finish(time.perf_counter() - started)
        _REPORTS[self] = run.session.report
        return result


_REPORTS: WeakKeyDictionary[OuterSample, Report] = WeakKeyDictionary()


class _Prompt(NamedTuple):
    """A prompt's place in the picture, (height, width, top, left) in latent cells or None for all of it, and its list.

    ComfyUI gives a region of the positive prompt a counterpart in the negative list under the same name: `positive` is
    then None.
    """

    positive: bool | None
    area: tuple[int, ...] | None


class Given(NamedTuple):
    """What an evaluation gives to the model: noisy latents, the prompt, and what else it takes by name."""

    x: Tensor
    context: Tensor | None
    conds: dict[str, Any]


@dataclass
class Run(ABC):
    """One sampling run: ComfyUI's hooks on one side, the session on the other.

    Args:
        injections: what is asked for.
        guider: ComfyUI's guider of the run: its model and its prompts.
        shape: of the run's latents, (B, C, h, w) or (B, C, frames, h, w).
    """

    injections: tuple[Injection, ...]
    guider: Any
    shape: torch.Size
    session: Session = field(init=False)
    passes: ReferencePasses = field(init=False)
    _prompts: dict[Any, _Prompt] = field(default_factory=dict, init=False)
    _limits: dict[Window, tuple[float, float]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.session = self.new_session()
        self.passes = ReferencePasses(self.guider, self.recording, self.session.report)

    @property
    def model(self) -> Any:
        """The model itself, ComfyUI's `diffusion_model`."""
        return self.guider.model_patcher.model.diffusion_model

    # --- what differs between kinds of models -------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def sites_of(cls, model: Any) -> list[Site]:
        """The self-attentions of a `diffusion_model`, in the order in which they run.

        Raises:
            HostError: the model is not of this kind.
        """

    @classmethod
    def fitted(cls, model: Any, injection: Injection) -> Injection:
        """An injection as a `diffusion_model` of this kind carries it out.

        Raises:
            HostError: it cannot.
        """
        return injection

    @abstractmethod
    def new_session(self) -> Session:
        """The run's session."""

    @abstractmethod
    def hooked(self, options: Options, given: Given) -> Options:
        """The options of this evaluation with our hooks around every other pack's.

        Around those of this very evaluation: a prompt may bring its own, and guidance methods add some to their calls.
        """

    @abstractmethod
    def recording(self, names: frozenset[str], states: States) -> Options:
        """Transformer options that record a reference's pass into `states`."""

    @abstractmethod
    def leave(self) -> None:
        """The evaluation has ended, whether it succeeded or not."""

    # --- every evaluation of the model --------------------------------------------------------------------------------

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
                lambda reference: self.passes.states(base, reference, wanted(reference), sigma, x),
                lambda window: self._inside(base.model_sampling, window, sigma),
            )
            options = self.hooked(options, Given(x, c_crossattn, kwargs)) if self.session.active else options
            clean = executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
            if self.session.predicted(clean, self.rows(x.shape[0], Grid(*x.shape[-2:]), options)):
                # Whoever looked may have put the model off its device.
                comfy.model_management.load_models_gpu([self.guider.model_patcher])
            return clean
        finally:
            self.session.end()
            self.leave()

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

    def _inside(self, sampling: Any, window: Window, sigma: float) -> bool:
        """Whether a sigma lies in a window, whose limits are asked of the model once: each waits for the device."""
        if window not in self._limits:
            self._limits[window] = limits(sampling, window)
        start, end = self._limits[window]
        return end < sigma <= start

    def rows(self, batch: int, seen: Grid, options: Options) -> list[Rows]:
        """The prompts that this evaluation's batch consists of; `seen` is the latent that it is given."""
        chunks = options["cond_or_uncond"]
        size = batch // len(chunks)
        full = Grid(*self.shape[-2:])
        whole = Crop(0, 0, seen, seen)
        found = []
        for i, (kind, key) in enumerate(zip(chunks, options["uuids"], strict=True)):
            # By the guider's own lists where they tell: the order of the kinds is the guider's affair, and guidance
            # methods change it.
            positive, area = self._prompts.get(key, _Prompt(None, None))
            positive = kind == 0 if positive is None else positive
            # ((frames,) height, width, (first frame,) top, left)
            crop = whole if area is None else Crop(area[-2], area[-1], seen, full)
            found.append(Rows(i * size, (i + 1) * size, positive, crop))
        return found
