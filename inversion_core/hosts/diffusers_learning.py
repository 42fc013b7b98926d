"""Learning on diffusers' pipelines of SD1.x, SD2.x and SDXL, without ComfyUI.

    pipe = StableDiffusionPipeline.from_pretrained("folder/of/a/model")
    with learning_model(pipe) as model:
        material = prepare(model.encode_pictures, pictures, masks, plan)
        inversion, history = learn(model, material, plan)
    save_inversion(inversion, Path("my-chair.safetensors"))

Names of layers, encoders and families are ComfyUI's, so that Load Inversion reads the file. Guaranteed: the same
weights, noise and prompts give the same losses and gradients as the ComfyUI host, up to rounding, and the pipeline is
afterwards as it was. Different from it: prompts are plain text without weights, of one chunk of 77 tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from ..fingerprint import digest, weights_fingerprint
from ..learning.inversion import Inversion
from ..learning.model import FEED_FORWARD, PROJECTIONS, Attention, Conditioning, Prediction, Schedule
from ..learning.offset import EVERYWHERE, adding
from ..sites import Site
from .base import HostError
from .checkpointing import checkpointed
from .diffusers import places_of, unet_of

__all__ = ["DiffusersLearningModel", "family_of", "fingerprint", "learning_model"]

PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "v_prediction": "v"}
ENCODERS = {
    "SD1.x": {"clip_l": ("tokenizer", "text_encoder")},
    "SD2.x": {"clip_h": ("tokenizer", "text_encoder")},
    "SDXL": {"clip_l": ("tokenizer", "text_encoder"), "clip_g": ("tokenizer_2", "text_encoder_2")},
}
"""Family -> ComfyUI's name of each text encoder -> the pipeline's attributes."""

Vectors = Mapping[str, Tensor]
"""Text encoder ("clip_l", "clip_g", ...) -> (n, C)."""


def family_of(pipe: Any) -> str:
    """The pipeline's family as inversions name it.

    Raises:
        HostError: it is of none that is learned on.
    """
    config = unet_of(pipe).config
    if config["addition_embed_type"] == "text_time":
        family = "SDXL"
    elif config["addition_embed_type"] is None and config["class_embed_type"] is None:
        # Both have one text encoder; their transformers differ in how they project what comes in.
        family = "SD2.x" if config["use_linear_projection"] else "SD1.x"
    else:
        raise HostError(
            f"this UNet wants {config['addition_embed_type'] or config['class_embed_type']} besides a prompt: "
            "inversions are learned on SD1.x, SD2.x and SDXL"
        )
    missing = [name for pair in ENCODERS[family].values() for name in pair if getattr(pipe, name, None) is None]
    if missing:
        raise HostError(
            f"this {family} pipeline has no {', '.join(missing)}: load it whole (SDXL's refiner cannot be learned on)"
        )
    return family


def fingerprint(pipe: Any) -> str:
    """A hash of some values of every weight that learning depends on."""
    family = family_of(pipe)
    modules = {name: getattr(pipe, name) for _, name in ENCODERS[family].values()}
    modules |= {"unet": pipe.unet, "vae": pipe.vae}
    weights = {f"{of}.{name}": value for of, one in modules.items() for name, value in one.state_dict().items()}
    return digest([family, pipe.scheduler.config["prediction_type"], weights_fingerprint(weights)])


@contextmanager
def learning_model(pipe: Any, inversions: Sequence[Inversion] = ()) -> Iterator[DiffusersLearningModel]:
    """Make a pipeline fit for autograd while inside.

    Args:
        pipe: a pipeline of SD1.x, SD2.x or SDXL, whole and on its device.
        inversions: learned before; they act at full strength and stay as they are, ``<name>`` known in prompts.

    Raises:
        HostError: the pipeline cannot be learned on.
        LearningError: an inversion is of another family.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        opened = DiffusersLearningModel(pipe, {one.name: one.vectors(1.0) for one in inversions})
        for module in opened.modules:
            stack.enter_context(_frozen(module))
        for encoder in opened.encoders.values():
            stack.callback(encoder.table.register_forward_hook(encoder.place).remove)
        layers = EVERYWHERE.layers(opened)
        for one in inversions:
            one.require_family(opened.family)
            for handle in _changed(layers, one, opened.device):
                stack.callback(handle.remove)
        blocks = (one for one in pipe.unet.modules() if isinstance(one, (BasicTransformerBlock, ResnetBlock2D)))
        stack.enter_context(checkpointed(blocks, opened))
        yield opened


class DiffusersLearningModel:
    """A `LearningModel` on a pipeline. Made by `learning_model`."""

    def __init__(self, pipe: Any, known: Mapping[str, Vectors]) -> None:
        self._pipe, self._unet, self._known = pipe, unet_of(pipe), known
        self.family = family_of(pipe)
        self.prediction: Prediction = _prediction(pipe.scheduler)
        self.checkpointing: Callable[[], AbstractContextManager[None]] | None = None
        self.encoders = {
            name: _Encoder(name, *(getattr(pipe, attribute) for attribute in pair))
            for name, pair in ENCODERS[self.family].items()
        }
        self._alphas: Tensor = pipe.scheduler.alphas_cumprod
        self._attentions = dict(self._found())

    @property
    def modules(self) -> list[nn.Module]:
        """Everything that gradients may flow through."""
        return [self._unet, self._pipe.vae, *(one.model for one in self.encoders.values())]

    @property
    def device(self) -> torch.device:
        """Where the UNet computes."""
        return self._unet.device

    def attentions(self) -> dict[str, Attention]:
        """Every attention of the UNet by its path in ComfyUI's UNet."""
        return self._attentions

    def _found(self) -> Iterator[tuple[str, Attention]]:
        for site, _, _, block in places_of(self._unet):
            at = _path(site)
            part = {"input": "encoder", "middle": "middle", "output": "decoder"}[site.part]
            for name, kind in (("attn1", "self"), ("attn2", "cross")):
                module: Any = getattr(block, name)
                if module is None:
                    continue
                if getattr(module, "fused_projections", False):
                    raise HostError("the UNet's projections are fused: call pipe.unet.unfuse_qkv_projections() first")
                layers = {projection: module.get_submodule(projection) for projection in PROJECTIONS}
                yield f"{at}.{name}", Attention(kind, part, module.heads, layers)  # pyright: ignore[reportArgumentType]

    def feed_forwards(self) -> dict[str, nn.Module]:
        """The linear layers behind the attentions by their paths in ComfyUI's UNet."""
        return {
            f"{_path(site)}.ff.{part}": block.ff.get_submodule(part)
            for site, _, _, block in places_of(self._unet)
            for part in FEED_FORWARD
        }

    @torch.no_grad()
    def words(self, text: str) -> dict[str, Tensor]:
        """Embeddings of the words' tokens."""
        return {name: encoder.words(text) for name, encoder in self.encoders.items()}

    def knows_word(self, word: str) -> bool:
        """Whether a word is one token of a text encoder's vocabulary."""
        return any(len(encoder.ids(word)) == 1 for encoder in self.encoders.values())

    def encode(self, prompts: Sequence[str], learned: Mapping[str, Vectors]) -> Conditioning:
        """Prompts through the pipeline's own tokenizers and encoders; equal prompts are encoded once."""
        distinct = list(dict.fromkeys(prompts))
        rows = torch.tensor([distinct.index(prompt) for prompt in prompts], device=self.device)
        contexts, pooled, places = [], None, {}
        for name, encoder in self.encoders.items():
            vectors = {key: value[name] for key, value in {**self._known, **learned}.items()}
            found = encoder.encode(distinct, vectors, hidden=self.family == "SDXL")
            contexts.append(found.context.to(self.device)[rows])
            if found.pooled is not None:
                pooled = found.pooled.to(self.device)[rows]
            # All encoders have the same places up to the end of the prompt, so the last one's will do.
            places = {key: found.places[key].to(self.device)[rows] for key in learned}
        return Conditioning(torch.cat(contexts, dim=2), pooled, places)

    def schedule(self, level: Tensor) -> Schedule:
        """The noise levels of the scheduler's training timesteps; variance preserving."""
        kept = self._alphas.to(level.device, torch.float32)[self._timestep(level)]
        return Schedule(kept.sqrt(), (1 - kept).sqrt())

    def _timestep(self, level: Tensor) -> Tensor:
        return (level * len(self._alphas)).long().clamp(0, len(self._alphas) - 1)

    def predict(self, noisy: Tensor, level: Tensor, conditioning: Conditioning) -> Tensor:
        """Through the UNet itself, so with every adapter that is on it."""
        dtype = self._unet.dtype
        told: dict[str, Any] = {}
        if self.family == "SDXL":
            assert conditioning.pooled is not None
            height, width = (self._pipe.vae_scale_factor * side for side in noisy.shape[-2:])
            ids = torch.tensor([[height, width, 0, 0, height, width]], device=noisy.device, dtype=dtype)
            told["added_cond_kwargs"] = {
                "text_embeds": conditioning.pooled.to(dtype),
                "time_ids": ids.expand(len(noisy), -1),
            }
        context = conditioning.context.to(dtype)
        return self._unet(noisy.to(dtype), self._timestep(level), context, return_dict=False, **told)[0].float()

    @torch.no_grad()
    def encode_pictures(self, pictures: Tensor) -> Tensor:
        """Pictures (B, H, W, 3) in [0, 1] -> latents (B, C, h, w) as the UNet knows them."""
        vae = self._pipe.vae
        latents = vae.encode((pictures * 2 - 1).permute(0, 3, 1, 2).to(vae.device, vae.dtype)).latent_dist.mode()
        latents = latents.float()
        mean, std = (vae.config.get(f"latents_{name}") for name in ("mean", "std"))
        if mean is not None and std is not None:
            mean, std = (torch.tensor(one, device=latents.device).view(1, -1, 1, 1) for one in (mean, std))
            return (latents - mean) / std * vae.config["scaling_factor"]
        return (latents - (vae.config.get("shift_factor") or 0.0)) * vae.config["scaling_factor"]


class _Encoder:
    """One CLIP text encoder, in whose prompts ``<name>`` stands for vectors."""

    def __init__(self, name: str, tokenizer: Any, model: Any) -> None:
        self.name, self.tokenizer, self.model = name, tokenizer, model
        self.table: nn.Embedding = model.get_input_embeddings()
        self._placed: list[tuple[int, int, Tensor]] = []
        """Row, first place and vectors of the pass that is going on."""

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def words(self, text: str) -> Tensor:
        """(k, C), float32."""
        ids = torch.tensor(self.ids(text), dtype=torch.long, device=self.table.weight.device)
        return F.embedding(ids, self.table.weight).float()

    def encode(self, prompts: Sequence[str], vectors: Mapping[str, Tensor], hidden: bool) -> Conditioning:
        """Prompts with vectors (n, C) for names; `hidden`: SDXL's way, the last layer but one as it is."""
        for name, one in vectors.items():
            if one.shape[1] != self.table.embedding_dim:
                raise HostError(
                    f"<{name}> has vectors of width {one.shape[1]} for {self.name}, but this model's are "
                    f"{self.table.embedding_dim}: use the model it was learned for"
                )
        length = min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings)
        ids = torch.full((len(prompts), length), self.tokenizer.pad_token_id)
        places = {name: torch.zeros(len(prompts), length, dtype=torch.bool) for name in vectors}
        placed: list[tuple[int, int, Tensor]] = []
        for row, prompt in enumerate(prompts):
            found, spans = self._parsed(prompt, vectors)
            if len(found) > length:
                raise HostError(
                    f"the prompt {prompt!r} has {len(found)} tokens, but {length} fit: take fewer vectors or a shorter "
                    "class word"
                )
            ids[row, : len(found)] = torch.tensor(found)
            for name, first in spans:
                places[name][row, first : first + len(vectors[name])] = True
                placed.append((row, first, vectors[name]))
        self._placed = placed
        try:
            given = self.model(ids.to(self.model.device), output_hidden_states=True)
        finally:
            self._placed = []
        context = given.hidden_states[-2] if hidden else given.last_hidden_state
        return Conditioning(context, given.get("text_embeds"), places)

    def _parsed(self, prompt: str, vectors: Mapping[str, Tensor]) -> tuple[list[int], list[tuple[str, int]]]:
        """Token ids, and where the learned vectors go; their ids are those of no special token."""
        ids, spans = [self.tokenizer.bos_token_id], []
        for piece in re.split(r"(<[^<>]+>)", prompt):
            if piece[:1] == "<" and piece[1:-1] in vectors:
                spans.append((piece[1:-1], len(ids)))
                ids += [0] * len(vectors[piece[1:-1]])
            elif piece.strip():
                ids += self.ids(piece)
        return [*ids, self.tokenizer.eos_token_id], spans

    def place(self, _: nn.Module, __: Any, embedded: Tensor) -> Tensor:
        """A hook on the table: the vectors instead of what the table has at their places."""
        if not self._placed:
            return embedded
        rows = list(embedded.unbind(0))
        for row, first, vectors in self._placed:
            whole = rows[row]
            rows[row] = torch.cat([whole[:first], vectors.to(whole), whole[first + len(vectors) :]])
        return torch.stack(rows)


def _prediction(scheduler: Any) -> Prediction:
    name = scheduler.config.get("prediction_type")
    if name not in PREDICTIONS or getattr(scheduler, "alphas_cumprod", None) is None:
        raise HostError(
            f"this pipeline's {type(scheduler).__name__} predicts {name!r}: inversions are learned on models that "
            f"predict {' or '.join(PREDICTIONS)} on SD's discrete schedule"
        )
    return PREDICTIONS[name]


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """No parameter collects a gradient and no dropout acts; flags are put back afterwards."""
    flags = [(one, one.requires_grad) for one in module.parameters()]
    modes = [(one, one.training) for one in module.modules()]
    if any(one.is_inference() for one, _ in flags):
        raise HostError(
            "the pipeline was loaded in inference mode, where nothing can be learned: load it outside of it"
        )
    try:
        module.requires_grad_(False)
        module.eval()
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for one, mode in modes:
            one.training = mode


def _path(site: Site) -> str:
    """A transformer block's in ComfyUI's UNet."""
    at = "middle_block.1" if site.part == "middle" else f"{site.part}_blocks.{site.number}.1"
    return f"{at}.transformer_blocks.{site.index}"


def _changed(layers: Mapping[str, nn.Module], inversion: Inversion, device: torch.device) -> Iterator[Any]:
    """Hooks that add an inversion's offset to what its layers give."""
    missing = inversion.offset.keys() - layers.keys()
    if missing:
        raise HostError(f"<{inversion.name}> changes {', '.join(sorted(missing))}, which this model has not")

    for name, (up, down) in inversion.offset.items():
        yield layers[name].register_forward_hook(adding(up.to(device), down.to(device)))
