"""Feature extractors in ComfyUI's memory management, and ComfyUI's own CLIP_VISION models as feature extractors."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import comfy.clip_model
import comfy.image_encoders.dino2
import comfy.model_management
import comfy.model_patcher
import torch
from torch import Tensor, nn

from ..features import Backbone, FeatureError, FeatureExtractor, Features, RawFeatures, TimmExtractor, digest, load


def managed_extractor(backbone: Backbone, path: Path, dtype: torch.dtype = torch.float32) -> TimmExtractor:
    """A backbone that ComfyUI loads to its device when it is used, and off it when others need the room.

    Raises:
        FeatureError: as `features.load` does.
    """
    model = load(backbone, path, dtype)
    patcher = comfy.model_patcher.ModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
    return TimmExtractor(model, backbone, _Managed(patcher))


def features_of_latents(see: Callable[[Tensor], Features], vae: Any, base: Any) -> Callable[[Tensor], Features]:
    """From a clean latent (1, C, h, w) as the model scales it to the features of its picture.

    Args:
        see: an extractor with its settings.
        vae: ComfyUI's, of the model or a small one of the same latents.
        base: the model's BaseModel.
    """

    def look(latent: Tensor) -> Features:
        return see(vae.decode(base.process_latent_out(latent.float()))[..., :3].movedim(-1, 1))

    return look


class _Managed:
    """ComfyUI's management of a network made of plain torch layers, which it can move as a whole only."""

    def __init__(self, patcher: comfy.model_patcher.ModelPatcher) -> None:
        self._patcher = patcher
        self.device: torch.device = patcher.load_device

    def load(self, room: int) -> None:
        comfy.model_management.load_models_gpu([self._patcher], memory_required=room, force_full_load=True)


class _Parts(NamedTuple):
    """Where in one of ComfyUI's image encoders things are."""

    network: nn.Module
    blocks: nn.ModuleList
    key: Callable[[Any], nn.Module]
    heads: int
    positions: str
    patch: nn.Module
    norm: nn.Module
    has_cls: bool


def _parts(model: nn.Module) -> _Parts:
    found: Any = model
    if isinstance(model, comfy.clip_model.CLIPVisionModelProjection):
        found = found.vision_model
        return _Parts(
            found,
            found.encoder.layers,
            lambda block: block.self_attn.k_proj,
            found.encoder.layers[0].self_attn.heads,
            "embeddings.position_embedding.weight",
            found.embeddings.patch_embedding,
            found.post_layernorm,
            found.embeddings.class_embedding is not None,
        )
    if isinstance(model, comfy.image_encoders.dino2.Dinov2Model):
        return _Parts(
            found,
            found.encoder.layer,
            lambda block: block.attention.attention.key,
            found.encoder.layer[0].attention.attention.heads,
            "embeddings.position_embeddings",
            found.embeddings.patch_embeddings.projection,
            found.layernorm,
            True,
        )
    raise FeatureError(
        f"this CLIP_VISION is a {type(model).__name__}, but CLIP, SigLIP and DINOv2 are the ones that can be read: "
        "load one of these, or disconnect it and choose a backbone"
    )


class ClipVisionExtractor(FeatureExtractor):
    """A CLIP, SigLIP or DINOv2 image encoder that ComfyUI has loaded, for pictures of any size and shape.

    Differences from ComfyUI's `encode_image`: the picture keeps its shape and position embeddings are resampled to it
    as timm does; colours are not rounded to 8 bits. CLIP's last LayerNorm, trained on the CLS token alone, is applied
    to all tokens for `normed`. No gradients: CLIP's blocks change their input in place.

    Raises:
        FeatureError: an encoder of another kind.
    """

    def __init__(self, clip_vision: Any) -> None:
        super().__init__()
        self._clip_vision = clip_vision
        self._parts = _parts(clip_vision.model)
        patch: Any = self._parts.patch
        self.name = f"CLIP_VISION {type(self._parts.network).__name__} {clip_vision.image_size}"
        self.weights = digest(self.name, clip_vision.dtype, self._parts.norm.weight, patch.weight)
        self.patch, self.size = patch.kernel_size[0], clip_vision.image_size
        self.mean, self.std = tuple(clip_vision.image_mean), tuple(clip_vision.image_std)
        self.depth, self.has_cls = len(self._parts.blocks), self._parts.has_cls
        self.prefix = int(self.has_cls)

    @property
    def device(self) -> torch.device:
        return self._clip_vision.load_device

    def _load(self, tokens: int, grad: bool) -> None:
        if grad:
            raise FeatureError(
                "CLIP_VISION models give no gradients: disconnect it and choose a backbone in Load Feature Extractor"
            )
        comfy.model_management.load_model_gpu(self._clip_vision.patcher)

    def _forward(self, pixels: Tensor, block: int, grad: bool) -> RawFeatures:
        from timm.layers.pos_embed import resample_abs_pos_embed

        parts = self._parts
        grid = [pixels.shape[2] // self.patch, pixels.shape[3] // self.patch]
        side = self._clip_vision.image_size // self.patch
        trained = parts.network.get_parameter(parts.positions)
        positions = resample_abs_pos_embed(
            trained.view(1, -1, trained.shape[-1]), grid, [side, side], num_prefix_tokens=self.prefix
        ).view(*trained.shape[:-2], -1, trained.shape[-1])
        tokens: list[Tensor] = []
        keys: list[Tensor] = []
        with ExitStack() as stack:
            # The next block of CLIP adds to this one's output in place.
            at = parts.blocks[block]
            stack.callback(at.register_forward_hook(lambda *call: tokens.append(call[-1].clone())).remove)
            stack.callback(parts.key(at).register_forward_hook(lambda *call: keys.append(call[-1])).remove)
            torch.func.functional_call(parts.network, {parts.positions: positions}, kwargs={"pixel_values": pixels})
        split = keys[0].unflatten(2, (parts.heads, -1)).transpose(1, 2)
        return RawFeatures(tokens[0], parts.norm(tokens[0]), split)
