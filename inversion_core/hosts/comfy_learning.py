"""Learning on ComfyUI's UNet models (SD1.x, SD2.x, SDXL, the demo model) as they are loaded and patched.

Nodes run in inference mode, and the weights are made there: autograd can neither record nor save them. Inside
`learning_model` each such weight is seen through a second tensor on the same memory that autograd accepts, and the text
encoder's LayerNorms get copies of what ComfyUI changes in place; leaving it undoes both.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Literal

import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.sd
import torch
from comfy.ldm.modules.attention import BasicTransformerBlock, attention_pytorch
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel
from torch import Tensor, nn

from ..learning.model import FEED_FORWARD, PROJECTIONS, Attention, Conditioning, Prediction, Schedule
from .base import HostError
from .checkpointing import checkpointed
from .comfy_inversion import Vectors, family_of, placing_tokenizer, text_tokenizers

Part = Literal["encoder", "middle", "decoder"]
PARTS: dict[str, Part] = {"input_blocks": "encoder", "middle_block": "middle", "output_blocks": "decoder"}
ACTIVATIONS = 3.0
"""Memory of a pass with gradients, as a multiple of what ComfyUI reckons for one without."""


@contextmanager
def learning_model(
    model: comfy.model_patcher.ModelPatcher, clip: comfy.sd.CLIP, latent_shape: Sequence[int]
) -> Iterator[ComfyLearningModel]:
    """Load model and CLIP, and make them fit for autograd while inside.

    Args:
        latent_shape: (B, C, h, w) of the largest batch that goes through the model at once.

    Raises:
        HostError: the model is no UNet of a supported kind.
    """
    _require_supported(model)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_flagged())
        memory = model.memory_required([2 * latent_shape[0], *latent_shape[1:]]) * ACTIVATIONS
        comfy.model_management.load_models_gpu([model, clip.patcher], memory_required=memory)
        for module in (model.model, clip.cond_stage_model):
            stack.enter_context(_frozen_for_autograd(module))
        stack.enter_context(_kept_from_inplace(clip.cond_stage_model))
        opened = ComfyLearningModel(model, clip, (latent_shape[-2], latent_shape[-1]))
        unet = model.model.diffusion_model
        blocks = (one for one in unet.modules() if isinstance(one, (BasicTransformerBlock, ResBlock)))
        stack.enter_context(checkpointed(blocks, opened))
        yield opened


@contextmanager
def decoder(opened: ComfyLearningModel, vae: comfy.sd.VAE) -> Iterator[Callable[[Tensor], Tensor]]:
    """Load the VAE beside an opened model; while inside, what it yields makes latents (B, C, h, w) of that model into
    pictures (B, 3, H, W) in [0, 1], with gradients."""
    memory = vae.memory_used_decode(torch.Size((1, *opened.latent_shape)), vae.vae_dtype) * ACTIVATIONS
    comfy.model_management.load_models_gpu([vae.patcher], memory_required=memory)
    with _frozen_for_autograd(vae.first_stage_model):

        def decode(latents: Tensor) -> Tensor:
            given = opened.as_sampled(latents).to(vae.device, vae.vae_dtype)
            return vae.process_output(vae.first_stage_model.decode(given).float()).to(latents.device)

        yield decode


def fingerprint(model: comfy.model_patcher.ModelPatcher, clip: comfy.sd.CLIP) -> str:
    """A hash of some values of every weight and every patch on it; the same whether or not the model is loaded."""
    digest = hashlib.sha256(f"{family_of(model)} {clip.layer_idx}".encode())
    digest.update(repr(sorted(map(str, model.model_options["transformer_options"]))).encode())
    for patcher in (model, clip.patcher):
        for name, value in sorted(patcher.model.state_dict().items()):
            original = patcher.backup[name].weight if name in patcher.backup else value
            digest.update(f"{name} {tuple(value.shape)} ".encode() + _few(original))
            for strength, patch, *_ in patcher.patches.get(name, []):
                weights = getattr(patch, "weights", patch)
                digest.update(repr(strength).encode() + b"".join(_few(one) for one in _tensors(weights)))
    return digest.hexdigest()


def _few(value: Tensor) -> bytes:
    return value.detach().flatten()[:16].to("cpu", torch.float32).numpy().tobytes()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _tensors(one)


class ComfyLearningModel:
    """A `LearningModel` on a loaded MODEL and CLIP. Made by `learning_model`."""

    def __init__(
        self, model: comfy.model_patcher.ModelPatcher, clip: comfy.sd.CLIP, latent_size: tuple[int, int]
    ) -> None:
        self._patcher, self._clip, self._base = model, clip, model.model
        self.latent_shape = (self._base.latent_format.latent_channels, *latent_size)
        self.family = family_of(model)
        self.prediction: Prediction = _prediction(self._base.model_sampling)
        self.checkpointing: Callable[[], AbstractContextManager[None]] | None = None

    @property
    def device(self) -> torch.device:
        """Where the UNet computes."""
        return self._patcher.load_device

    def as_sampled(self, latents: Tensor) -> Tensor:
        """Latents as the VAE knows them."""
        return self._base.process_latent_out(latents)

    def attentions(self) -> dict[str, Attention]:
        """Every attention of the UNet by its path in it."""
        found: dict[str, Attention] = {}
        for path, block in self._base.diffusion_model.named_modules():
            if not isinstance(block, BasicTransformerBlock):
                continue
            part = PARTS[path.split(".")[0]]
            for name in ("attn1", "attn2"):
                module: Any = getattr(block, name)
                if module is None:
                    continue
                reads_itself = block.switch_temporal_ca_to_sa if name == "attn2" else not block.disable_self_attn
                layers = {projection: module.get_submodule(projection) for projection in PROJECTIONS}
                found[f"{path}.{name}"] = Attention("self" if reads_itself else "cross", part, module.heads, layers)
        return found

    def feed_forwards(self) -> dict[str, nn.Module]:
        """The linear layers behind the attentions by their paths in the UNet."""
        return {
            f"{path}.ff.{part}": block.ff.get_submodule(part)
            for path, block in self._base.diffusion_model.named_modules()
            if isinstance(block, BasicTransformerBlock)
            for part in FEED_FORWARD
        }

    @torch.no_grad()
    def words(self, text: str) -> dict[str, Tensor]:
        """Embeddings of the words' tokens, the prompt's start and end left out."""
        result = {}
        for name, tokenizer in text_tokenizers(self._clip).items():
            ids = tokenizer.tokenizer(text)["input_ids"][tokenizer.tokens_start :]
            if tokenizer.tokenizer_adds_end_token:
                ids = ids[:-1]
            table = getattr(self._clip.cond_stage_model, name).transformer.get_input_embeddings()
            indices = torch.tensor([ids], dtype=torch.long, device=table.weight.device)
            result[tokenizer.embedding_key] = table(indices, out_dtype=torch.float32)[0].clone()
        return result

    def encode(self, prompts: Sequence[str], learned: Mapping[str, Vectors]) -> Conditioning:
        """Prompts through ComfyUI's own tokenizers and encoders; equal prompts are encoded once."""
        clip = copy.copy(self._clip)
        clip.tokenizer = placing_tokenizer(clip, learned)
        encoder = clip.cond_stage_model
        encoder.reset_clip_options()
        if clip.layer_idx is not None:
            encoder.set_clip_options({"layer": clip.layer_idx})
        distinct = list(dict.fromkeys(prompts))
        encoded = {}
        for prompt in distinct:
            tokens = clip.tokenize(prompt)
            context, pooled = encoder.encode_token_weights(tokens)[:2]
            encoded[prompt] = (context.to(self.device), pooled, _places(tokens, learned, context.shape[1]))
        rows = [encoded[prompt] for prompt in prompts]
        lengths = {context.shape[1] for context, _, _ in rows}
        if len(lengths) > 1:
            raise HostError(
                f"the prompts of one batch have {', '.join(map(str, sorted(lengths)))} tokens, but must have one "
                "length: take fewer vectors or a shorter class word"
            )
        pooled = None if rows[0][1] is None else torch.cat([pooled.to(self.device) for _, pooled, _ in rows])
        places = {name: torch.cat([row[2][name] for row in rows]).to(self.device) for name in learned}
        return Conditioning(torch.cat([context for context, _, _ in rows]), pooled, places)

    def schedule(self, level: Tensor) -> Schedule:
        """The model's own noise levels; variance preserving."""
        sigma = self._sigma(level)
        alpha = (1 + sigma.square()).rsqrt()
        return Schedule(alpha, alpha * sigma)

    def _sigma(self, level: Tensor) -> Tensor:
        """ComfyUI's sigma (B,): the noise's deviation when the clean latent counts 1."""
        sigmas = self._base.model_sampling.sigmas
        index = (level.to(sigmas.device) * len(sigmas)).long().clamp(0, len(sigmas) - 1)
        return sigmas[index].to(level.device, torch.float32)

    def predict(self, noisy: Tensor, level: Tensor, conditioning: Conditioning) -> Tensor:
        """Through `apply_model`, so with every patch and wrapper that is on the model."""
        sigma, (alpha, _) = self._sigma(level), self.schedule(level)
        scaled = noisy / alpha.view(-1, 1, 1, 1)
        clean = self._base.apply_model(
            scaled, sigma, transformer_options=self._options(sigma), **self._conditions(noisy, conditioning)
        )
        by_row = sigma.view(-1, 1, 1, 1)
        if self.prediction == "eps":
            return (scaled - clean) / by_row
        # v = (alpha x - x0) / s with s = sigma alpha, the noise's share in the variance-preserving latent x.
        return (alpha.view(-1, 1, 1, 1) * noisy - clean) / (by_row * alpha.view(-1, 1, 1, 1))

    def _options(self, sigma: Tensor) -> dict[str, Any]:
        options = dict(self._patcher.model_options["transformer_options"])
        # ComfyUI's default on the CPU saves memory by slicing; autograd has to keep it all anyway.
        options.setdefault("optimized_attention_override", _attention)
        return {**options, "sigmas": sigma, "cond_or_uncond": [0]}

    def _conditions(self, noisy: Tensor, conditioning: Conditioning) -> dict[str, Tensor]:
        height, width = (8 * side for side in self.latent_shape[1:])
        conds = self._base.extra_conds(
            cross_attn=conditioning.context,
            pooled_output=conditioning.pooled,
            noise=noisy,
            device=noisy.device,
            width=width,
            height=height,
        )
        return {name: cond.cond for name, cond in conds.items()}


def _attention(plain: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any) -> Tensor:
    return attention_pytorch(q, k, v, heads, *args, **kwargs)


def _places(tokens: Mapping[str, list], learned: Mapping[str, Vectors], length: int) -> dict[str, Tensor]:
    """Where the learned vectors stand among the prompt's tokens: name -> bool (1, length)."""
    # All encoders of a CLIP have the same places up to the end of the prompt, so one of them will do.
    chunks = tokens["l"] if "l" in tokens else next(iter(tokens.values()))
    flat = [entry[0] for chunk in chunks for entry in chunk]
    result = {}
    for name, vectors in learned.items():
        starts = {vector.data_ptr() for value in vectors.values() for vector in value}
        hits = [isinstance(one, Tensor) and one.data_ptr() in starts for one in flat]
        result[name] = torch.tensor([hits[:length]])
    return result


def _require_supported(model: comfy.model_patcher.ModelPatcher) -> None:
    unet = model.model.diffusion_model
    if not isinstance(unet, UNetModel):
        raise HostError(
            "inversions are learned on UNet models (SD1.x, SD2.x, SDXL and the demo model), but this model is a "
            f"{type(unet).__name__}: load a checkpoint of one of these families"
        )
    if model.model.concat_keys:
        raise HostError("this is an inpainting model: learn on the plain checkpoint of its family")
    _prediction(model.model.model_sampling)


def _prediction(sampling: Any) -> Prediction:
    known: tuple[tuple[type, Prediction], ...] = (
        (comfy.model_sampling.V_PREDICTION, "v"),
        (comfy.model_sampling.EPS, "eps"),
    )
    strange = (comfy.model_sampling.EDM, comfy.model_sampling.X0)
    for kind, name in known:
        if isinstance(sampling, kind) and not isinstance(sampling, strange) and getattr(sampling, "sigma_data", 1) == 1:
            return name
    bases = ", ".join(base.__name__ for base in type(sampling).__mro__[1:3])
    raise HostError(
        f"this model's sampling ({bases}) is not one that inversions are learned with: those that predict noise (eps) "
        "or velocity (v) on SD's schedule are. Disconnect nodes that change it, such as ModelSamplingDiscrete"
    )


@contextmanager
def _flagged() -> Iterator[None]:
    """Tells newer ComfyUI that training is going on."""
    management: Any = comfy.model_management
    if not hasattr(management, "in_training"):
        yield
        return
    before = management.in_training
    management.in_training = True
    try:
        yield
    finally:
        management.in_training = before


@contextmanager
def _frozen_for_autograd(module: nn.Module) -> Iterator[None]:
    """No parameter collects a gradient, and those made in inference mode are seen through ordinary ones on the same
    memory, as autograd can keep no others. Puts the old objects and flags back afterwards."""
    replaced: list[tuple[dict[str, Any], str, nn.Parameter]] = []
    frozen: list[nn.Parameter] = []
    try:
        for owner in module.modules():
            own = owner._parameters
            for name, parameter in own.items():
                if parameter is None:
                    continue
                if parameter.is_inference() and type(parameter.data) is Tensor:
                    own[name] = _alias(parameter)
                    replaced.append((own, name, parameter))
                elif parameter.requires_grad:
                    parameter.requires_grad_(False)
                    frozen.append(parameter)
        yield
    finally:
        for own, name, parameter in replaced:
            own[name] = parameter
        for parameter in frozen:
            parameter.requires_grad_(True)


def _alias(parameter: nn.Parameter) -> nn.Parameter:
    """An ordinary parameter on the memory of one made in inference mode."""
    alias = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
    alias.set_(parameter.untyped_storage(), parameter.storage_offset(), parameter.size(), parameter.stride())
    return nn.Parameter(alias, requires_grad=False)


@contextmanager
def _kept_from_inplace(text: nn.Module) -> Iterator[None]:
    """ComfyUI's text model adds to the residual stream in place; its LayerNorms get copies, for autograd to keep."""
    handles = []
    try:
        for layer in text.modules():
            if isinstance(layer, nn.LayerNorm):
                handles.append(layer.register_forward_pre_hook(lambda _, inputs: (inputs[0].clone(), *inputs[1:])))
        yield
    finally:
        for handle in handles:
            handle.remove()
