"""diffusers' UNet pipelines (SD1.x, SD2.x, SDXL): injections by attention processors.

    import torch
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import load_image

    from inversion_core.hosts.diffusers import attach
    from inversion_core.presets import PRESETS
    from inversion_core.reference import Reference

    pipe = StableDiffusionPipeline.from_pretrained("folder/of/a/model")

    @torch.no_grad()
    def encode(path: str) -> Reference:
        pixels = pipe.image_processor.preprocess(load_image(path)).to(pipe.device, pipe.dtype)
        return Reference(pipe.vae.encode(pixels).latent_dist.mode().float().cpu())

    edit = PRESETS["default"].injections([encode("zebra.png")], encode("horse.png"))
    with attach(pipe, *edit) as report:
        picture = pipe("a horse", num_inference_steps=30).images[0]
    print(report.text())

A reference's latent is as the autoencoder gave it; it is multiplied by the autoencoder's `scaling_factor` here. Its
conditioning is a `Prompt`, or None for the run's negative prompt (its positive one without guidance).

Guaranteed: the same weights, references, noise and noise levels give the same picture as in the ComfyUI host; outside
the `with` block the pipeline is as it was; a layer's own processor keeps computing its attention. Not here: a preset's
`color`, a step on the predicted clean latent, which is outside of the UNet and hence of attention processors. Refused
by name: inpainting UNets, compiled UNets, perturbed attention guidance, packages that merge or tile tokens.

Different from the ComfyUI host: without guidance a pipeline knows no negative prompt, so a reference without a `Prompt`
sees the positive one; a reference's pass goes through whatever else is installed on the UNet (FreeU, IP-Adapter).
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor, nn

from ..bank import BankKey, ReferenceBank
from ..injection import Injection
from ..reference import Reference
from ..sites import Part, Site
from .base import Crop, Grid, HostError, inside, require_channels, tokens_to_map
from .diffusers_processor import Around
from .diffusers_references import NoiseLevels, Passes, Prompt, UNetArguments, model_key
from .report import Report
from .session import FEATURES, Layer, Rows, Session, States

__all__ = ["Prompt", "attach", "sites_of"]

_FORWARD = inspect.signature(UNet2DConditionModel.forward)


@contextmanager
def attach(
    pipe: DiffusionPipeline, *injections: Injection, bank: ReferenceBank | None = None, guided: bool | None = None
) -> Iterator[Report]:
    """Within the `with` block, every evaluation of the pipeline's UNet carries out the injections.

    Args:
        pipe: any pipeline with a `unet` (UNet2DConditionModel), a `vae` and a `scheduler` with `alphas_cumprod`.
        injections: all that shall act together; the block cannot be nested in another one of the same pipeline.
        bank: keeps what the model saw in its references. None: one of 1 GiB on the device and 2 GiB of RAM for this
            block. One that is handed from block to block serves them all: it tells models by their weights, LoRAs with
            their strengths, and schedules; not by other packages' changes to the UNet.
        guided: whether each batch is [negative rows, positive rows]. None asks the running pipeline
            (`do_classifier_free_guidance`). Whoever calls `pipe.unet` in a loop of their own must say it.

    Yields:
        The report of everything that happens in the block, complete after it.

    Raises:
        HostError: on entry, what the host cannot work with; while sampling, a batch or scheduler that it does not
            understand; on exit, if no attention call was changed in the whole block.
        ValueError: on entry, an injection's sites mean nothing on this model.
    """
    unet = unet_of(pipe)
    places = places_of(unet)
    channels = unet.config["in_channels"]
    for reference in (one for injection in injections for one in injection.references):
        require_channels(reference, channels, type(pipe).__name__)
    if any(injection.refresh is not None for injection in injections):
        raise HostError(
            "an injection asks for a refresh, but a UNet of diffusers does not say what clean picture it predicts: "
            "leave refresh out"
        )
    bank = ReferenceBank(device_budget=1 << 30, ram_budget=2 << 30) if bank is None else bank
    new = tuple(injection for injection in injections if not injection.neutral)
    host = _Host(pipe, unet, places, Session(new, [place.site for place in places]), bank, guided)
    report = host.session.report
    if not new:
        yield report
        return
    started = time.perf_counter()
    with ExitStack() as attached:
        host.enter(attached)
        yield report
    report.seconds, report.bytes = time.perf_counter() - started, bank.stats.device_bytes + bank.stats.ram_bytes
    report.finish()
    if not report.calls:
        raise HostError(
            "the injections changed nothing: the UNet never ran in this block, or never inside a window. Sample with "
            "this very pipeline inside the block, and widen the windows or the part of the schedule that it samples"
        )


def sites_of(unet: UNet2DConditionModel) -> list[Site]:
    """The model's self-attentions under ComfyUI's names, in the order in which they run.

    Raises:
        HostError: the model's blocks are not those of SD1.x, SD2.x and SDXL.
    """
    return [place.site for place in places_of(unet)]


def places_of(unet: UNet2DConditionModel) -> list[Place]:
    """Where those self-attentions are; raises as `sites_of`."""
    return list(_walk(unet))


class Place(NamedTuple):
    """A transformer block with self-attention, that layer, and the module that knows the grid of its tokens."""

    site: Site
    layer: Attention
    transformer: Transformer2DModel
    block: BasicTransformerBlock


def unet_of(pipe: Any) -> UNet2DConditionModel:
    """The pipeline's UNet; HostError if this host cannot work with it."""
    unet = getattr(pipe, "unet", None)
    if not isinstance(unet, UNet2DConditionModel):
        raise HostError(
            f"{type(pipe).__name__} has a {type(unet).__name__} where a UNet2DConditionModel is needed: use a pipeline "
            "of SD1.x, SD2.x or SDXL, and attach before the UNet is compiled (Flux and SD3 have a host of their own, "
            "inversion_core.hosts.diffusers_dit)"
        )
    if any(module._compiled_call_impl is not None for module in unet.modules()):
        raise HostError("this UNet is compiled, which would freeze the injections into it: use it uncompiled")
    taken, given = unet.config["in_channels"], unet.config["out_channels"]
    if taken != given:
        raise HostError(
            f"this UNet takes {taken} channels and gives {given}, so it needs more than a latent (inpainting, say): "
            "use the model of the same family that generates whole pictures"
        )
    return unet


def _walk(unet: UNet2DConditionModel) -> Iterator[Place]:
    # ComfyUI's input block 0 is conv_in; a downsampler is a block by itself, an upsampler belongs to the one before.
    down: Any = unet.down_blocks
    up: Any = unet.up_blocks
    scale, number = 1, 1
    for block in down:
        yield from _block("input", number, scale, block)
        number += len(block.resnets)
        if block.downsamplers is not None:
            number, scale = number + 1, scale * 2
    if unet.mid_block is not None:
        yield from _block("middle", 0, scale, unet.mid_block)
    number, decoder = 0, 0
    for block in up:
        for place in _block("output", number, scale, block):
            decoder += 1
            yield place
        number += len(block.resnets)
        if block.upsamplers is not None:
            scale //= 2
    if not decoder:
        raise HostError("this UNet has no self-attention in its decoder: use a model of SD1.x, SD2.x or SDXL")


def _block(part: Part, number: int, scale: int, block: Any) -> Iterator[Place]:
    for i, transformer in enumerate(getattr(block, "attentions", ())):
        if not isinstance(transformer, Transformer2DModel):
            raise HostError(
                f"{type(block).__name__} attends by {type(transformer).__name__}, but known is Transformer2DModel, as "
                "in SD1.x, SD2.x and SDXL: use a model of one of these families"
            )
        for index, inner in enumerate(transformer.transformer_blocks):
            if isinstance(inner, BasicTransformerBlock) and not inner.only_cross_attention:
                at = number if part == "middle" else number + i
                yield Place(Site(part, at, index, scale), inner.attn1, transformer, inner)


@dataclass
class _Host:
    """One `with` block: diffusers' hooks on one side, the session on the other."""

    pipe: Any
    unet: UNet2DConditionModel
    places: list[Place]
    session: Session
    bank: ReferenceBank
    guided: bool | None
    rows: list[Rows] = field(default_factory=list, init=False)
    """Of the evaluation that is going on."""
    grid: Grid = field(default=Grid(0, 0), init=False)
    """Of the transformer that runs."""
    _recording: tuple[frozenset[str], States] | None = field(default=None, init=False)
    _run: _Run | None = field(default=None, init=False)
    _timestep: float = field(default=math.inf, init=False)

    def enter(self, attached: ExitStack) -> None:
        """Hook into the UNet until the stack unwinds.

        Raises:
            HostError: another block has done so already.
        """
        if any(isinstance(place.layer.processor, Around) for place in self.places):
            raise HostError(
                "this pipeline is inside another attach block: give all injections to a single one, "
                "attach(pipe, *first, *second)"
            )
        start = self.unet.register_forward_pre_hook(self._before, with_kwargs=True)
        attached.callback(start.remove)
        end = self.unet.register_forward_hook(self._after, always_call=True)
        attached.callback(end.remove)
        for transformer in dict.fromkeys(place.transformer for place in self.places):
            attached.callback(transformer.register_forward_pre_hook(self._enters, with_kwargs=True).remove)
        decoder: Any = self.unet.up_blocks
        resnets = [resnet for block in decoder for resnet in block.resnets]
        at = min(place.site.number for place in self.places if place.site.part == "output") + 1
        if at < len(resnets):
            hook = functools.partial(self._decoder_block, resnets[at - 1].out_channels)
            attached.callback(resnets[at].register_forward_pre_hook(hook).remove)
        for place in self.places:
            processor = Around(place.layer, functools.partial(self._processed, place))
            attached.callback(processor.detach)
            place.layer.set_processor(processor)  # pyright: ignore[reportArgumentType]

    # --- every evaluation of the model --------------------------------------------------------------------------------

    def _before(self, _: nn.Module, args: tuple, kwargs: UNetArguments) -> None:
        """Before the model runs: decide what is active at this timestep and see that its references are known."""
        told = _FORWARD.bind(self.unet, *args, **kwargs).arguments
        if told.get("attention_mask") is not None:
            raise HostError(
                "the UNet got an attention_mask for its self-attentions, which does not fit the references' tokens: "
                "leave it out (encoder_attention_mask is the one for prompts)"
            )
        timestep = _one_timestep(told["timestep"])
        self.rows = self._rows(told["sample"])
        run = self._run
        if run is None or timestep > self._timestep or not run.passes.same_prompts(told):
            run = self._run = self._started(told)
        self._timestep = timestep
        sigma = run.levels.sigma(timestep)
        self.session.report.rows += told["sample"].shape[0]
        self.session.begin(
            lambda reference: self._states(run, reference, sigma, told),
            lambda window: inside(run.levels, window, sigma),
        )

    def _after(self, *_: Any) -> None:
        self.session.end()

    def _started(self, told: UNetArguments) -> _Run:
        """A run begins: the weights, their LoRAs and the scheduler may be others than in the last one."""
        levels = NoiseLevels.of(self.pipe.scheduler)
        model = model_key(self.unet, self.pipe.vae.config.scaling_factor, levels)
        return _Run(Passes(told, self.pipe.vae_scale_factor), levels, model)

    def _rows(self, sample: Tensor) -> list[Rows]:
        count, seen = sample.shape[0], Grid(*sample.shape[-2:])
        whole = Crop(0, 0, seen, seen)
        if not self._is_guided():
            return [Rows(0, count, True, whole)]
        if count % 2:
            raise HostError(
                f"with guidance the batch is [negative rows, positive rows], but this one has {count} rows: use a "
                "pipeline that guides so, or say attach(..., guided=False) if you call the UNet for each prompt alone"
            )
        return [Rows(0, count // 2, False, whole), Rows(count // 2, count, True, whole)]

    def _is_guided(self) -> bool:
        if self.guided is not None:
            return self.guided
        if getattr(self.pipe, "do_perturbed_attention_guidance", False):
            raise HostError("perturbed attention guidance adds rows that injections do not know: set pag_scale to 0")
        try:
            return self.pipe.do_classifier_free_guidance
        except AttributeError as error:
            raise HostError(
                f"{type(self.pipe).__name__} does not say whether it guides ({error}): if you call its UNet yourself, "
                "say attach(..., guided=True) for batches of [negative rows, positive rows], else guided=False"
            ) from error

    def _states(self, run: _Run, reference: Reference, sigma: float, told: UNetArguments) -> States:
        """What the model sees in a reference at this sigma: from the bank, or from one pass that fills it."""
        arguments, described = run.passes.arguments(reference)
        key = BankKey(run.model, reference.content, described, sigma)
        names = self.session.wanted(reference)
        states = self.bank.get(key, names, told["sample"].device)
        if states is not None:
            self.session.report.hits += 1
            return states
        started = time.perf_counter()
        states = self._pass(reference, arguments, names, sigma, told)
        self.bank.put(key, states)
        self.session.report.reference_rows += 1
        self.session.report.reference_seconds += time.perf_counter() - started
        return states

    @torch.no_grad()
    def _pass(
        self, reference: Reference, arguments: UNetArguments, names: frozenset[str], sigma: float, told: UNetArguments
    ) -> States:
        sample, timestep = told["sample"], told["timestep"]
        latent = reference.latent.to(sample.device, torch.float32) * self.pipe.vae.config.scaling_factor
        noisy = (latent + reference.noise().to(latent) * sigma) / math.sqrt(sigma**2 + 1)
        if isinstance(timestep, Tensor):
            timestep = timestep.flatten()[:1]
        states: States = {}
        self._recording = names, states
        try:
            # Not by calling the module: hooks around it, ours among them, are there for the run's own evaluations.
            self.unet.forward(noisy.to(sample.dtype), timestep, **arguments)
        finally:
            self._recording = None
        return states

    # --- inside the model ---------------------------------------------------------------------------------------------

    def _enters(self, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """A transformer starts: its self-attentions see tokens of this grid."""
        hidden = args[0] if args else kwargs["hidden_states"]
        self.grid = Grid(*hidden.shape[-2:])

    def _decoder_block(self, channels: int, _: nn.Module, args: tuple) -> tuple | None:
        """Blend the shape references' features into what enters the block after the first with self-attention.

        What enters is joined with the encoder's skip already; only the first `channels` come from the decoder.
        """
        h = args[0][:, :channels]
        if self._recording is not None:
            names, states = self._recording
            if FEATURES in names:
                states[FEATURES] = h
            return None
        blended = self.session.features(h, self.rows)
        return None if blended is h else (torch.cat((blended, args[0][:, channels:]), dim=1), *args[1:])

    def attention(self, place: Place, hidden: Tensor, inner: Callable[..., Tensor]) -> Tensor | None:
        """The self-attention layer's output (B, N, C), edited; None where it is not ours.

        Args:
            place: which layer.
            hidden: (B, N, C), what enters it.
            inner: the processor that the layer had: it computes every attention.

        Raises:
            HostError: there are not as many tokens as the grid has.
        """
        name = place.site.name
        layer: Any = place.layer
        height, width = self.grid
        if hidden.shape[1] != height * width:
            raise HostError(
                f"at {name} {hidden.shape[1]} tokens enter the self-attention, but the picture has {height} x {width}: "
                "something else merges or tiles them, which injections cannot follow. Take it off"
            )
        if self._recording is not None:
            names, states = self._recording
            if name in names:
                states[name] = tokens_to_map(hidden, self.grid)
            return None
        projections = Layer(layer.to_q, layer.to_k, layer.heads)
        call = self.session.prepare(name, hidden, self.grid, self.rows, projections)
        if call is None:
            return None
        queries, keys, values = call.join(call.hidden, call.hidden, call.hidden, call.carried)
        q, k, v = (_heads(x, layer) for x in (layer.to_q(queries), layer.to_k(keys), layer.to_v(values)))
        out = call.attention(q, k, v, functools.partial(_attend, layer, inner)).transpose(1, 2).flatten(2)
        for module in layer.to_out:
            out = module(out)
        return out

    def _processed(
        self,
        place: Place,
        inner: Callable[..., Tensor],
        attn: Attention,
        hidden_states: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """In place of a layer's processor: calls that the session does not edit go on to the one it had."""
        edited = self.attention(place, hidden_states, inner)
        return inner(attn, hidden_states, *args, **kwargs) if edited is None else edited


class _Run(NamedTuple):
    """What stays the same from the first step of a sampling run to its last."""

    passes: Passes
    levels: NoiseLevels
    model: str


def _attend(
    layer: Attention, processor: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, _: Tensor | None
) -> Tensor:
    """A processor of diffusers as an `Attend` (the operator never passes a mask): it sees a layer whose projections do
    nothing, since q, k and v are projected already."""
    q, k, v = (x.transpose(1, 2).flatten(2) for x in (q, k, v))
    given: Any = copy.copy(layer)
    given._modules = {}
    given.to_q = given.to_k = _unchanged
    given.to_v = lambda _: v
    given.to_kv = lambda k: torch.cat((k, v), dim=-1)
    given.to_out = (_unchanged, _unchanged)
    given.scale = (q.shape[-1] // layer.heads) ** -0.5
    return _heads(processor(given, q, encoder_hidden_states=k), layer)


def _unchanged(x: Tensor) -> Tensor:
    return x


def _heads(x: Tensor, layer: Attention) -> Tensor:
    return x.unflatten(2, (layer.heads, -1)).transpose(1, 2)


def _one_timestep(timestep: Tensor | float) -> float:
    """The timestep of an evaluation: the one wait for the device in a step."""
    if not isinstance(timestep, Tensor):
        return float(timestep)
    values = set(timestep.flatten().tolist())
    if len(values) != 1:
        raise HostError(f"the rows of one batch are at timesteps {sorted(values)}, but a reference has one noise level")
    return float(values.pop())
