"""What a self-supervised ViT sees in a picture: tokens, CLS, keys, self-similarity; and the ViTs the pack knows.

The networks are timm's own (`forward_intermediates` for tokens, a forward hook on the projection of a block for its
keys); timm is imported when the first one is built. Pictures are (B, 3, H, W) in [0, 1], sRGB, of any size.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CACHE_BYTES = 256 << 20
"""What an extractor keeps of the pictures it saw last, in main memory."""

RGB = tuple[float, float, float]
Descriptor = Literal["keys", "tokens"]


class FeatureError(RuntimeError):
    """A backbone, its file or a picture that cannot be worked with; the message says which and what to do."""


@dataclass(frozen=True)
class Download:
    """One file at Hugging Face, pinned: what arrives is refused unless it has this hash."""

    repository: str
    revision: str
    sha256: str
    licence: str
    file: str = "model.safetensors"

    @property
    def url(self) -> str:
        return f"https://huggingface.co/{self.repository}/resolve/{self.revision}/{self.file}"


@dataclass(frozen=True)
class Backbone:
    """A ViT and how a picture is made ready for it.

    Attributes:
        name: what an artist chooses by.
        file: name of its safetensors file.
        model: its name in timm; None: a plain `timm.models.vision_transformer.VisionTransformer` of these `options`.
        options: keyword arguments for timm.
        patch: side of a patch in pixels.
        size: side of the square whose area a picture is resized to, unless asked otherwise.
        mean, std: of the RGB channels, as in its training.
        source: the Hugging Face repository that has the file; "" if there is none.
        download: the same, pinned; None where no hash is known, so that the artist fetches the file by hand.
    """

    name: str
    file: str
    model: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    patch: int = 16
    size: int = 224
    mean: RGB = IMAGENET_MEAN
    std: RGB = IMAGENET_STD
    source: str = ""
    download: Download | None = None


def _known(name: str, model: str, patch: int, size: int, revision: str = "", sha256: str = "") -> Backbone:
    source = f"timm/{model}"
    download = Download(source, revision, sha256, "DINOv3 License") if sha256 else None
    return Backbone(name, f"{model}.safetensors", model=model, patch=patch, size=size, source=source, download=download)


# DINO: arXiv 2104.14294. DINOv2 with registers: arXiv 2304.07193, 2309.16588. DINOv3: arXiv 2508.10104.
# The sizes give about 30 x 30 tokens each: 28, 28, 37, 32. Those of DINO's /8 are Splice's (224).
BACKBONES: Mapping[str, Backbone] = {
    backbone.name: backbone
    for backbone in (
        _known("dino-vits8", "vit_small_patch8_224.dino", 8, 224),
        _known("dino-vits16", "vit_small_patch16_224.dino", 16, 448),
        _known("dino-vitb8", "vit_base_patch8_224.dino", 8, 224),
        _known("dino-vitb16", "vit_base_patch16_224.dino", 16, 448),
        _known("dinov2-vits14-reg", "vit_small_patch14_reg4_dinov2.lvd142m", 14, 518),
        _known("dinov2-vitb14-reg", "vit_base_patch14_reg4_dinov2.lvd142m", 14, 518),
        _known("dinov2-vitl14-reg", "vit_large_patch14_reg4_dinov2.lvd142m", 14, 518),
        _known(
            "dinov3-vits16",
            "vit_small_patch16_dinov3.lvd1689m",
            16,
            512,
            "3bf4720a82ec2066db88137180ff1f83a675cef0",
            "2a1ec16ae28ffa07bc0ead0241ee7df9fc26451fe6f9f839b7b3afa0a906b040",
        ),
        _known(
            "dinov3-vitb16",
            "vit_base_patch16_dinov3.lvd1689m",
            16,
            512,
            "c6a5fb7d12bbd3cf3b0079253141c3332aaed7da",
            "1f9ed8a2378d65e24bb710ba522ac9fa7be4e036d7aefb4384ce022833926332",
        ),
        _known(
            "dinov3-vitl16",
            "vit_large_patch16_dinov3.lvd1689m",
            16,
            512,
            "30c1109559f65dea34316b0d4842d35c5771fe11",
            "45172f209c9583c40538afc26b60a07033e6fcc2e8c30228338e6b2e932e7941",
        ),
    )
}
"""The backbones that come as files of their own, by name."""


def build(backbone: Backbone) -> nn.Module:
    """The timm module with random weights, for pictures of any size.

    Raises:
        FeatureError: the installed timm does not know the model.
    """
    import timm
    from timm.models.vision_transformer import VisionTransformer

    options = {"num_classes": 0, "dynamic_img_size": True, **backbone.options}
    # Inference tensors, which ComfyUI would have us make, could not be differentiated through.
    with torch.inference_mode(False):
        if backbone.model is None:
            model = VisionTransformer(patch_size=backbone.patch, **options)
        elif timm.is_model(backbone.model):
            model = timm.create_model(backbone.model, pretrained=False, **options)
        else:
            raise FeatureError(
                f"timm {timm.__version__} does not know {backbone.model}: `pip install -U timm`, or choose another one"
            )
    return model.eval().requires_grad_(False)


def load(backbone: Backbone, path: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The timm module with the weights of a safetensors file.

    Raises:
        FeatureError: there is no such file, it cannot be read, or it holds another network.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise FeatureError(f"the weights of {backbone.name} are not at {path}")
    model = build(backbone)
    try:
        with torch.inference_mode(False):
            model.load_state_dict(load_file(path))
            return model.to(dtype)
    except (SafetensorError, OSError) as error:
        raise FeatureError(f"{path} cannot be read ({error}): fetch it again") from error
    except RuntimeError as error:
        raise FeatureError(f"{path} does not hold the weights of {backbone.name}: {error}") from error


@dataclass(frozen=True, eq=False)
class Features:
    """What a backbone sees in a batch of pictures at one block. N = h * w tokens, row by row.

    Attributes:
        grid: (h, w) of the tokens.
        tokens: (B, N, C), the block's output.
        normed: (B, N, C), the same after the network's last LayerNorm.
        keys: (B, heads, N, D), of the block's self-attention, before any rotary embedding.
        cls, cls_normed: (B, C), the CLS token in the same two forms; None if the backbone has none.
        cls_key: (B, heads, D), its key; None if the backbone has none.
        content: a name for the picture's pixels and all that was done with them: equal means equal.
    """

    grid: tuple[int, int]
    tokens: Tensor
    normed: Tensor
    keys: Tensor
    cls: Tensor | None
    cls_normed: Tensor | None
    cls_key: Tensor | None
    content: str

    def descriptors(self, kind: Descriptor) -> Tensor:
        """(B, N, C): the keys with their heads side by side, or the normed tokens."""
        if kind == "keys":
            return self.keys.transpose(1, 2).flatten(2)
        return self.normed

    def to(self, device: torch.device | str) -> Features:
        """The same on another device; ordinary tensors, also inside inference mode."""
        with torch.inference_mode(False):
            moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in vars(self).values() if isinstance(x, Tensor))


def self_similarity(features: Features, *, with_cls: bool = False) -> Tensor:
    """Cosine similarity of every pair of keys, heads side by side: (B, N, N), float32, differentiable.

    The structure descriptor of Splice (arXiv 2201.00424). It says how a picture is laid out, whatever its colours.

    Args:
        features: of any block.
        with_cls: put the CLS token's key first, as Splice does: (B, N + 1, N + 1).

    Raises:
        FeatureError: `with_cls`, but the backbone has no CLS token.
    """
    keys = features.descriptors("keys")
    if with_cls:
        if features.cls_key is None:
            raise FeatureError("this backbone has no CLS token: choose one that has, such as DINO's")
        keys = torch.cat((features.cls_key.flatten(1)[:, None], keys), dim=1)
    keys = F.normalize(keys.float(), dim=-1)
    return keys @ keys.transpose(1, 2)


class RawFeatures(NamedTuple):
    """A block's output and keys for all tokens, those that come before the patches included."""

    tokens: Tensor
    normed: Tensor
    keys: Tensor


class FeatureExtractor(ABC):
    """A loaded backbone with its preprocessing. Remembers the pictures it saw last, by their content.

    Attributes:
        name: of the backbone.
        weights: a name for its weights and their precision: equal means equal.
        patch, size, mean, std: as in `Backbone`.
        depth: number of blocks.
        prefix: tokens before the patches: CLS first if `has_cls`, then registers.
    """

    name: str
    weights: str
    patch: int
    size: int
    mean: RGB
    std: RGB
    depth: int
    prefix: int
    has_cls: bool

    def __init__(self) -> None:
        self._seen = Recent[Features](CACHE_BYTES, lambda features: features.bytes)

    def __deepcopy__(self, memo: dict) -> FeatureExtractor:
        return self  # hosts that copy their options share the network and what it remembers

    def __call__(self, images: Tensor, *, block: int = -1, size: int | None = None, grad: bool = False) -> Features:
        """Features of a batch of pictures.

        Args:
            images: (B, 3, H, W) in [0, 1].
            block: which, from 0; negative counts from the last.
            size: side in pixels of the square whose area the pictures are resized to, aspect kept, both sides rounded
                to multiples of the patch; None: the backbone's own.
            grad: keep the graph, so that a loss on the features has a gradient with respect to `images`. Works inside
                inference mode.

        Returns:
            Features on the device and in the dtype of the network. Without `grad` they may be ones it remembers.

        Raises:
            ValueError: images of another shape, a block that does not exist, or `grad` with images that require none.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.numel():
            raise ValueError(f"the images are {tuple(images.shape)}, needed is (B, 3, H, W)")
        if not -self.depth <= block < self.depth:
            raise ValueError(
                f"block is {block}, but {self.name} has blocks 0 to {self.depth - 1} (or -1, the last, ...)"
            )
        if size is not None and size < 1:
            raise ValueError(f"size is {size}, but it must be at least 1 pixel; None takes the backbone's own")
        if grad and not images.requires_grad:
            raise ValueError("grad=True but the images require no gradient: images.requires_grad_() outside inference")
        block, size = block % self.depth, self.size if size is None else size
        content = digest(images, self.weights, block, size)
        if grad:
            return self._extract(images, block, size, True, content)
        seen = self._seen.get(content)
        if seen is None:
            seen = self._extract(images, block, size, False, content)
            self._seen.put(content, seen.to("cpu"))
        return seen.to(self.device)

    def _extract(self, images: Tensor, block: int, size: int, grad: bool, content: str) -> Features:
        height, width = fitted_size(images.shape[2], images.shape[3], self.patch, size)
        self._load(images.shape[0] * (height // self.patch) * (width // self.patch), grad)
        # Outside inference mode, so that also features without a gradient may enter a graph later.
        with torch.inference_mode(False), torch.set_grad_enabled(grad):
            fitted = prepare(images.to(self.device), self.patch, size, self.mean, self.std)
            tokens, normed, keys = self._forward(fitted, block, grad)
            patches = slice(self.prefix, None)
            return Features(
                (fitted.shape[2] // self.patch, fitted.shape[3] // self.patch),
                tokens[:, patches],
                normed[:, patches],
                keys[:, :, patches],
                tokens[:, 0] if self.has_cls else None,
                normed[:, 0] if self.has_cls else None,
                keys[:, :, 0] if self.has_cls else None,
                content,
            )

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where features come from and lie."""

    @abstractmethod
    def _load(self, tokens: int, grad: bool) -> None:
        """See that the network lies on its device, with room for so many tokens."""

    @abstractmethod
    def _forward(self, pixels: Tensor, block: int, grad: bool) -> RawFeatures:
        """Run the network on prepared pixels (float32, on its device) up to and including the block."""


class Management(Protocol):
    """A host's memory management of one network."""

    device: torch.device
    """Where the network works."""

    def load(self, room: int) -> None:
        """Bring the network there, with so many bytes to spare for activations."""


class TimmExtractor(FeatureExtractor):
    """A timm VisionTransformer, or one of its relatives with blocks whose `attn` has a joint `qkv` projection.

    Args:
        model: as `build` or `load` give it.
        backbone: what it is.
        management: a host's; None leaves the network where it is.
    """

    def __init__(self, model: nn.Module, backbone: Backbone, management: Management | None = None) -> None:
        super().__init__()
        self.model, self.backbone, self._management = model, backbone, management
        self.name, self.patch, self.size = backbone.name, backbone.patch, backbone.size
        self.mean, self.std = backbone.mean, backbone.std
        network: Any = model
        self.depth, self.prefix = len(network.blocks), network.num_prefix_tokens
        self.has_cls = network.cls_token is not None
        self.weights = digest(backbone.name, network.norm.weight, network.patch_embed.proj.weight)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device if self._management is None else self._management.device

    def _load(self, tokens: int, grad: bool) -> None:
        if self._management is not None:
            network: Any = self.model
            # Widest is the MLP: 4 C in and out of its activation, beside the residual stream and q, k, v.
            self._management.load(tokens * network.embed_dim * 16 * 4 * (self.depth if grad else 1))

    def _forward(self, pixels: Tensor, block: int, grad: bool) -> RawFeatures:
        network: Any = self.model
        if grad:
            leave_inference_mode(network)
        attention = network.blocks[block].attn
        found: list[Tensor] = []

        def keep(module: nn.Module, inputs: tuple[Tensor, ...], qkv: Tensor) -> None:
            b, n, _ = qkv.shape
            keys = qkv.reshape(b, n, 3, attention.num_heads, -1)[:, :, 1].transpose(1, 2)
            found.append(attention.k_norm(keys))

        with ExitStack() as stack:
            stack.callback(attention.qkv.register_forward_hook(keep).remove)
            ((tokens, prefix),) = network.forward_intermediates(
                pixels.to(next(network.parameters()).dtype),
                indices=[block],
                return_prefix_tokens=True,
                stop_early=True,
                output_fmt="NLC",
                intermediates_only=True,
            )
        tokens = torch.cat((prefix, tokens), dim=1)
        return RawFeatures(tokens, network.norm(tokens), found[0])


def fitted_size(height: int, width: int, patch: int, size: int) -> tuple[int, int]:
    """Height and width of a picture resized to the area of `size` x `size` pixels, in whole patches, at least one."""
    scale = size / math.sqrt(height * width) / patch
    return max(1, round(height * scale)) * patch, max(1, round(width * scale)) * patch


def prepare(images: Tensor, patch: int, size: int, mean: RGB, std: RGB) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1] as a ViT takes them: float32, resized (see `fitted_size`), normalised."""
    target = fitted_size(images.shape[2], images.shape[3], patch, size)
    images = images.float()
    if tuple(images.shape[2:]) != target:
        images = F.interpolate(images, size=target, mode="bicubic", antialias=True).clamp(0, 1)
    offset, scale = (images.new_tensor(values).view(3, 1, 1) for values in (mean, std))
    return (images - offset) / scale


def principal_colors(descriptors: Tensor, mask: Tensor | None = None) -> Tensor:
    """The three main directions in which descriptors differ, as red, green and blue.

    Args:
        descriptors: (N, C); of several pictures at once, if their colours are to mean the same.
        mask: (N,) bool, those that the directions and the range are taken from; None: all.

    Returns:
        (N, 3) in [0, 1], float32; the middle 96 % of each direction spans the range.
    """
    x = descriptors.float()
    chosen = x if mask is None else x[mask]
    mean = chosen.mean(0)
    _, vectors = torch.linalg.eigh((chosen - mean).T @ (chosen - mean))
    vectors = vectors[:, -3:].flip(1)
    # An eigenvector has no sign of its own: the largest entry shall be positive, or colours would flip by rounding.
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    low, high = torch.quantile((chosen - mean) @ vectors, torch.tensor([0.02, 0.98], device=x.device), dim=0)
    return (((x - mean) @ vectors - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)


Value = TypeVar("Value")


class Recent(Generic[Value]):
    """Values by key, least recently used first out once together they exceed a number of bytes.

    Args:
        budget: in bytes. A value larger than that is not kept.
        size: of one value, in bytes.
    """

    def __init__(self, budget: int, size: Callable[[Value], int]) -> None:
        self._budget, self._size, self._used = budget, size, 0
        self._values: OrderedDict[str, Value] = OrderedDict()

    def get(self, key: str) -> Value | None:
        """The value of this key, now the most recently used; None if there is none."""
        if key in self._values:
            self._values.move_to_end(key)
        return self._values.get(key)

    def put(self, key: str, value: Value) -> None:
        """Keep a value, unless the key has one."""
        if key in self._values or self._size(value) > self._budget:
            return
        self._values[key] = value
        self._used += self._size(value)
        while self._used > self._budget:
            _, oldest = self._values.popitem(last=False)
            self._used -= self._size(oldest)


def digest(*parts: object) -> str:
    """A name for a content: tensors by shape, type and values, all else by `str`."""
    name = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            values = part.detach().cpu().contiguous()
            name.update(f"{tuple(values.shape)} {values.dtype} ".encode())
            name.update(values.flatten().view(torch.uint8).numpy().tobytes())
        else:
            name.update(f"{part}\0".encode())
    return name.hexdigest()


def leave_inference_mode(model: nn.Module) -> None:
    """Replace weights that a host made or moved in inference mode: nothing can be differentiated through them."""
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if weight.is_inference():
                setattr(module, name, nn.Parameter(weight.clone(), requires_grad=False))
        for name, value in module.named_buffers(recurse=False):
            if value.is_inference():
                setattr(module, name, value.clone())
