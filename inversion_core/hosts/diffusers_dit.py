"""diffusers' Flux and SD3 pipelines: injections by attention processors.

    with attach(pipe, *PRESETS["default"].injections([zebra], horse, transformer=True)) as report:
        picture = pipe("a horse", num_inference_steps=30).images[0]

References are made as for diffusers' UNet pipelines (`diffusers`); their latents are shifted and scaled here as the
autoencoder says. Their conditioning is a `Prompt`, its pooled embeddings as `added_cond_kwargs={"pooled_projections":
...}`, or None for the batch's first row: the negative prompt where it stands in the batch, as in SD3; for Flux the
prompt of the call.

Guaranteed: the same weights, references, noise and noise levels give the same picture as in the ComfyUI host; outside
the `with` block the pipeline is as it was. The layers' own processors stay at work: what is taken over is the call of
`scaled_dot_product_attention` inside them, so other attention backends are refused. Not here: a preset's `color`.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..bank import BankKey, ReferenceBank
from ..fingerprint import digest
from ..injection import Injection
from ..reference import Reference
from ..sites import Site
from .base import Crop, Grid, HostError, inside, require_channels
from .diffusers_processor import Around
from .diffusers_references import Prompt, weights_key
from .families import FAMILIES, Family, Layout
from .joint import Joint
from .places import Place, Places, turned
from .report import Report
from .session import Rows, Session, States

__all__ = ["Prompt", "attach", "sites_of"]

Arguments = dict[str, Any]
"""Keyword arguments of a transformer's `forward`."""

_COMFY = {
    FluxTransformer2DModel: "comfy.ldm.flux.model.Flux",
    SD3Transformer2DModel: "comfy.ldm.modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper",
}
"""diffusers' classes and their names in `families`."""


_PROMPT = ("encoder_hidden_states", "pooled_projections", "guidance")
"""What tells a transformer about a prompt, row by row of the batch."""


@contextmanager
def attach(
    pipe: DiffusionPipeline, *injections: Injection, bank: ReferenceBank | None = None, guided: bool | None = None
) -> Iterator[Report]:
    """Within the `with` block, every evaluation of the pipeline's transformer carries out the injections.

    Args:
        pipe: any pipeline with a `transformer` of Flux or SD3, a `vae` and a flow-matching `scheduler`.
        injections: all that shall act together; the block cannot be nested in another one of the same pipeline.
        bank: keeps what the model saw in its references; None: one for this block.
        guided: whether each batch is [negative rows, positive rows]. None: as SD3's pipelines say; never on Flux, whose
            pipelines call the transformer for each prompt alone, and there every call counts as a positive prompt's.

    Yields:
        The report of everything that happens in the block, complete after it.

    Raises:
        HostError: on entry, what the host cannot work with; while sampling, a batch or an attention that it does not
            understand; on exit, if no attention call was changed in the whole block.
        ValueError: on entry, an injection's sites mean nothing on this model.
    """
    model, family = _transformer(pipe)
    sites = {site.name: layer for site, layer in _walk(model)}
    for reference in (one for injection in injections for one in injection.references):
        require_channels(reference, pipe.vae.config.latent_channels, type(pipe).__name__)
    if any(injection.refresh is not None for injection in injections):
        raise HostError("an injection asks for a refresh, which this host has not: leave refresh out")
    bank = ReferenceBank(device_budget=1 << 30, ram_budget=2 << 30) if bank is None else bank
    new = tuple(family.fitted(injection) for injection in injections if not injection.neutral)
    session = Session(new, sites_of(model), projected=True)
    if not new:
        yield session.report
        return
    host, started = _Host(pipe, model, family, session, bank, guided), time.perf_counter()
    with ExitStack() as attached:
        host.enter(attached, sites)
        yield session.report
    report = session.report
    report.seconds, report.bytes = time.perf_counter() - started, bank.stats.device_bytes + bank.stats.ram_bytes
    report.finish()
    if not report.calls:
        raise HostError(
            "the injections changed nothing: the transformer never ran in this block, or never inside a window. Sample "
            "with this very pipeline inside the block, and widen the windows or the part of the schedule it samples"
        )


def sites_of(model: Any) -> list[Site]:
    """The model's self-attentions under ComfyUI's names, in the order in which they run."""
    return [site for site, _ in _walk(model)]


def _walk(model: Any) -> Iterator[tuple[Site, Any]]:
    """Each site and its attention layer."""
    for number, block in enumerate(model.transformer_blocks):
        yield Site("double", number, 0, 2), block.attn
        if getattr(block, "attn2", None) is not None:
            yield Site("double", number, 1, 2), block.attn2
    for number, block in enumerate(getattr(model, "single_transformer_blocks", ())):
        yield Site("single", number, 0, 2), block.attn


def _transformer(pipe: Any) -> tuple[Any, Family]:
    model = getattr(pipe, "transformer", None)
    name = next((name for kind, name in _COMFY.items() if isinstance(model, kind)), None)
    if model is None or name is None:
        raise HostError(
            f"{type(pipe).__name__} has a {type(model).__name__} where the transformer of Flux or SD3 is needed: use a "
            "pipeline of these, or inversion_core.hosts.diffusers for UNets; attach before the model is compiled"
        )
    if any(module._compiled_call_impl is not None for module in model.modules()):
        raise HostError("this transformer is compiled, which would freeze the injections into it: use it uncompiled")
    channels, taken = pipe.vae.config.latent_channels, model.config.in_channels
    if taken != channels * (1 if isinstance(model, SD3Transformer2DModel) else 4):
        raise HostError(
            f"this transformer takes {taken} channels, more than a picture of {channels} gives (inpainting, say): use "
            "the model of the same family that generates whole pictures"
        )
    return model, FAMILIES[name]


@dataclass(frozen=True)
class FlowLevels:
    """The noise levels of straight paths: sigma is the share of noise, 1 at the start.

    Attributes:
        share: the noise level of a share of the schedule counted from its end, both in (0, 1).
    """

    share: Callable[[float], float]

    @classmethod
    def of(cls, scheduler: Any, tokens: int) -> FlowLevels:
        """As the scheduler's configuration says, for a picture of so many tokens.

        Raises:
            HostError: the scheduler is not one of flow matching.
        """
        config = scheduler.config
        if "shift" not in config:
            raise HostError(
                f"{type(scheduler).__name__} is no scheduler of flow matching, so the noise of a reference cannot be "
                "known: use FlowMatchEulerDiscreteScheduler"
            )
        factor = float(config["shift"])
        if config.get("use_dynamic_shifting", False):
            ends = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
            low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
            factor = low + (high - low) * (tokens - ends[0]) / (ends[1] - ends[0])
            factor = math.exp(factor) if config.get("time_shift_type", "exponential") == "exponential" else factor
        return cls(lambda t: factor * t / (1 + (factor - 1) * t))

    def percent_to_sigma(self, percent: float) -> float:
        """The noise level at this share of the schedule, as ComfyUI counts: everything lies between 0 and 1."""
        if percent <= 0:
            return math.inf
        return 0.0 if percent >= 1 else self.share(1 - percent)


@dataclass
class _Host:
    """One `with` block: diffusers' hooks on one side, the session on the other."""

    pipe: Any
    model: Any
    family: Family
    session: Session
    bank: ReferenceBank
    guided: bool | None
    _rows: list[Rows] = field(default_factory=list, init=False)
    _layout: Layout = field(default=Layout(0, 1, Grid(0, 0), 0), init=False)
    _recording: tuple[frozenset[str], States] | None = field(default=None, init=False)
    _key: str | None = field(default=None, init=False)
    _sigma: float = field(default=-1.0, init=False)
    _grid: tuple[Tensor, Grid] | None = field(default=None, init=False)
    """The places that the picture's grid was read from: they wait for the device, and are the same in every step."""
    _described: dict[tuple, tuple[tuple, str]] = field(default_factory=dict, init=False)
    """Digests of what references' passes are told, by the identity of what they come of, which is kept alive."""

    @property
    def _packed(self) -> bool:
        """Whether the model is given tokens, not latents: Flux."""
        return isinstance(self.model, FluxTransformer2DModel)

    def enter(self, attached: ExitStack, layers: dict[str, Any]) -> None:
        """Hook into the transformer until the stack unwinds.

        Raises:
            HostError: another block has done so already.
        """
        if any(isinstance(layer.processor, Around) for layer in layers.values()):
            raise HostError(
                "this pipeline is inside another attach block: give all injections to a single one, "
                "attach(pipe, *first, *second)"
            )
        attached.callback(self.model.register_forward_pre_hook(self._before, with_kwargs=True).remove)
        attached.callback(self.model.register_forward_hook(self._after, always_call=True).remove)
        for site in self.session.sites:
            processor = Around(layers[site.name], partial(self._processed, site))
            attached.callback(processor.detach)
            layers[site.name].set_processor(processor)

    # --- every evaluation of the model --------------------------------------------------------------------------------

    def _before(self, _: nn.Module, args: tuple, kwargs: Arguments) -> None:
        told = inspect.signature(type(self.model).forward).bind(self.model, *args, **kwargs).arguments
        x = told["hidden_states"]
        sigma = float(told["timestep"].flatten()[0]) / (1 if self._packed else 1000)
        layout = self._layout = self._laid_out(told)
        cells = Grid(layout.grid.height * 2, layout.grid.width * 2)
        for injection in self.session.injections:
            if injection.shape is not None:
                self.family.require_same_size(injection.shape.latent.shape, cells)
        # Skip-layer guidance evaluates the positive prompts once more, alone.
        self._rows = self._prompts(x.shape[0], cells, told.get("skip_layers") is not None)
        levels = FlowLevels.of(self.pipe.scheduler, layout.grid.height * layout.grid.width)
        if self._key is None or sigma > self._sigma:  # a run begins: weights and LoRAs may be others
            self._key = digest([weights_key(self.model), *self._scaling()])
            self._described.clear()
        self._sigma = sigma
        self.session.report.rows += x.shape[0]
        self.session.begin(
            lambda reference: self._states(reference, sigma, told), lambda window: inside(levels, window, sigma)
        )

    def _after(self, *_: Any) -> None:
        self.session.end()

    def _laid_out(self, told: Arguments) -> Layout:
        """The tokens: Flux has the prompt's first, then the picture's, then further pictures'; SD3 the picture's."""
        x, text = told["hidden_states"], told["encoder_hidden_states"].shape[1]
        if not self._packed:
            return Layout(0, 1, Grid(x.shape[-2] // 2, x.shape[-1] // 2), text)
        ids = told["img_ids"].reshape(-1, told["img_ids"].shape[-1])
        if self._grid is not None and self._grid[0] is told["img_ids"]:
            grid = self._grid[1]
            return Layout(text, 1, grid, x.shape[1] - grid.height * grid.width)
        ours = ids[ids[:, 0] == 0]
        grid = Grid(*(int(side) + 1 for side in ours[:, 1:3].amax(dim=0).tolist()))
        count = grid.height * grid.width
        if ours.shape[0] != count or not torch.equal(ours, ids[:count]) or x.shape[1] != ids.shape[0]:
            raise HostError(
                f"the transformer was given {x.shape[1]} tokens, which are not one picture of {grid.height} x "
                f"{grid.width} and others after it: this pipeline lays its tokens out otherwise; use FluxPipeline"
            )
        self._grid = told["img_ids"], grid
        return Layout(text, 1, grid, ids.shape[0] - count)

    def _prompts(self, count: int, cells: Grid, alone: bool) -> list[Rows]:
        whole = Crop(0, 0, cells, cells)
        guided = getattr(self.pipe, "do_classifier_free_guidance", False) if self.guided is None else self.guided
        if not guided or alone:
            return [Rows(0, count, True, whole)]
        if count % 2:
            raise HostError(
                f"with guidance the batch is [negative rows, positive rows], but this one has {count} rows: say "
                "attach(..., guided=False) if you call the transformer for each prompt alone"
            )
        return [Rows(0, count // 2, False, whole), Rows(count // 2, count, True, whole)]

    def _scaling(self) -> tuple[float, float]:
        config = self.pipe.vae.config
        return getattr(config, "shift_factor", None) or 0.0, config.scaling_factor

    def _states(self, reference: Reference, sigma: float, told: Arguments) -> States:
        """What the model sees in a reference at this noise level: from the bank, or from one pass that fills it."""
        assert self._key is not None
        arguments, report = self._arguments(reference, told), self.session.report
        key = BankKey(self._key, reference.content, self._digest(reference, arguments, told), sigma)
        names = self.session.wanted(reference)
        states = self.bank.get(key, names, told["hidden_states"].device)
        if states is not None:
            report.hits += 1
            return states
        started, mine, states = time.perf_counter(), self._layout, {}
        shift, scale = self._scaling()
        like = told["hidden_states"]
        clean = (reference.latent.to(like.device, torch.float32) - shift) * scale
        noisy = torch.lerp(clean, reference.noise().to(clean), sigma).to(like.dtype)
        given = {"hidden_states": noisy, **arguments}
        if self._packed:
            given |= {"hidden_states": _packed(noisy), "img_ids": _ids(noisy).to(told["img_ids"])}
        text, grid = given["encoder_hidden_states"].shape[1], Grid(*(side // 2 for side in noisy.shape[-2:]))
        layout = Layout(text, 1, grid, 0) if self._packed else Layout(0, 1, grid, text)
        self._recording, self._layout = (names, states), layout
        try:
            with torch.no_grad():
                # Not by calling the module: the hooks around it are there for the run's own evaluations.
                self.model.forward(**given)
        finally:
            self._recording, self._layout = None, mine
        self.bank.put(key, states)
        report.reference_rows += 1
        report.reference_seconds += time.perf_counter() - started
        return states

    def _arguments(self, reference: Reference, told: Arguments) -> Arguments:
        """What the transformer is told in a reference's pass, besides its latent: the first row's, or its own prompt's.

        Raises:
            HostError: the reference's conditioning is none for diffusers.
        """
        made = {name: told[name][:1] for name in (*_PROMPT, "timestep") if isinstance(told.get(name), Tensor)}
        prompt = reference.conditioning
        if prompt is not None:
            if not isinstance(prompt, Prompt):
                raise HostError(
                    f"the reference's conditioning is a {type(prompt).__name__}, but this is a diffusers pipeline: "
                    "give it inversion_core.hosts.diffusers_dit.Prompt(embeds, added_cond_kwargs), or None"
                )
            made["encoder_hidden_states"] = prompt.embeds.to(made["encoder_hidden_states"])
            made |= {name: x.to(made[name]) for name, x in prompt.added_cond_kwargs.items()}
        if self._packed:
            made["txt_ids"] = told["txt_ids"].new_zeros(made["encoder_hidden_states"].shape[1], 3)
        others = told.get("joint_attention_kwargs") or {}
        return made | {"joint_attention_kwargs": {"scale": others["scale"]} if "scale" in others else None}

    def _digest(self, reference: Reference, arguments: Arguments, told: Arguments) -> str:
        """What the pass is told besides its noise level, by content."""
        made_of = (reference.conditioning, *(told.get(name) for name in _PROMPT), told.get("joint_attention_kwargs"))
        key = tuple(id(one) for one in made_of)
        if key not in self._described:
            content = digest({name: value for name, value in arguments.items() if name != "timestep"})
            self._described[key] = made_of, content
        return self._described[key][1]

    # --- inside the model ---------------------------------------------------------------------------------------------

    def attention(self, site: Site, plain: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One attention call of all tokens, (B, H, N, D), edited; `plain` is the call as it would be."""
        layout = self._layout if site.index == 0 else self._layout._replace(before=0, after=0)
        if q.shape[2] != layout.total:
            raise HostError(
                f"at {site.name} the attention has {q.shape[2]} tokens, but the prompt and the picture explain "
                f"{layout.total}: something else adds tokens, which injections cannot follow. Take it off"
            )

        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            return plain(q, k, v, mask)

        joint = Joint(site, layout, q, k, v, None, attend, lambda: plain(q, k, v, None), joined=False)
        places = None if self.family.rotary is None else Places(0, self.family.rotary.centred, self._move)
        if self._recording is None:
            return joint.edited_by(self.session, self._rows, places)
        joint.keep(*self._recording, places)
        return joint.plain()

    def _move(self, x: Tensor, by: Place) -> Tensor:
        """Tokens moved as this model itself would turn them."""
        cos, sin = (one[0, ::2] for one in self.model.pos_embed(torch.tensor([by], device=x.device)))
        return turned(x, torch.stack((cos, -sin, sin, cos), dim=-1).unflatten(-1, (2, 2)))

    def _processed(self, site: Site, inner: Any, *args: Any, **kwargs: Any) -> Any:
        """In place of a layer's processor: the one that it had, its attention call taken over."""
        with _Taken(self, site) as taken:
            out = inner(*args, **kwargs)
        if taken.calls != 1:
            raise HostError(
                f"at {site.name} {type(inner).__name__} called PyTorch's attention {taken.calls} times instead of "
                "once: use the attention backend 'native', and no IP-Adapter"
            )
        return out


class _Taken(TorchFunctionMode):
    """While it lasts, calls of `scaled_dot_product_attention` go to the host."""

    def __init__(self, host: _Host, site: Site) -> None:
        super().__init__()
        self._host, self._site, self.calls = host, site, 0

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        self.calls += 1
        given = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False)) | kwargs
        if given.pop("attn_mask", None) is not None or given.get("is_causal"):
            raise HostError(f"at {self._site.name} the attention is masked, which injections do not know: leave it out")
        q, k, v = (given.pop(name) for name in ("query", "key", "value"))
        others = {name: value for name, value in given.items() if name != "scale" or value is not None}
        if "scale" in others:
            raise HostError(f"at {self._site.name} the attention has a scale of its own, which injections do not know")

        def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            return func(q, k, v, attn_mask=mask, **others)

        return self._host.attention(self._site, plain, q, k, v)


def _packed(latent: Tensor) -> Tensor:
    """(B, C, h, w) as Flux's tokens (B, h / 2 * w / 2, C * 4)."""
    cells = latent.unflatten(2, (-1, 2)).unflatten(4, (-1, 2))  # B, C, h / 2, 2, w / 2, 2
    return cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def _ids(latent: Tensor) -> Tensor:
    """The places of these tokens, (N, 3)."""
    rows, columns = (torch.arange(side // 2) for side in latent.shape[-2:])
    grid = torch.cartesian_prod(rows, columns)
    return torch.cat((torch.zeros_like(grid[:, :1]), grid), dim=1)
