"""Small ComfyUI text encoders with random weights whose outputs fit the models of `models`, and diffusers' twins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.sd
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.supported_models_base
import comfy.text_encoders.sd2_clip
import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from demo.text import WIDTH, clip_target
from demo.train.data import reset

from .diffusers_models import FAMILIES, Pipe, Twins, pipeline, twins
from .models import POOLED

TOKENIZER = Path(comfy.sd1_clip.__file__).parent / "sd1_tokenizer"
LAYERS = 3


def demo_clip(embeddings: Path | None = None) -> Any:
    """The demo's text encoder with random weights, half precision as ComfyUI has text encoders on the CPU."""
    clip = comfy.sd.CLIP(
        target=clip_target(),
        embedding_directory=None if embeddings is None else str(embeddings),
        parameters=1,
        model_options={"dtype": torch.float16},
    )
    _randomise(clip)
    return clip


def sd1_clip() -> Any:
    """SD1.x's encoder, tiny."""
    return _clip(comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel, {"clip_l": WIDTH})


def sd2_clip() -> Any:
    """SD2.x's OpenCLIP-H, tiny."""
    module = comfy.text_encoders.sd2_clip
    return _clip(module.SD2Tokenizer, module.SD2ClipModel, {"clip_h": WIDTH})


def sdxl_clip() -> Any:
    """SDXL's two encoders, tiny."""
    module = comfy.sdxl_clip
    return _clip(module.SDXLTokenizer, module.SDXLClipModel, {"clip_l": WIDTH - POOLED, "clip_g": POOLED})


def _clip(tokenizer: Any, model: Any, widths: dict[str, int]) -> Any:
    options: dict[str, Any] = {"dtype": torch.float32}
    for name, width in widths.items():
        options[f"{name}_model_config"] = {
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_attention_heads": width // 8,
            "num_hidden_layers": LAYERS,
        }
    target = comfy.supported_models_base.ClipTarget(tokenizer, model)
    clip = comfy.sd.CLIP(target=target, parameters=1, model_options=options)
    for name, width in widths.items():
        getattr(clip.tokenizer, name).embedding_size = width
    _randomise(clip)
    return clip


def _randomise(clip: Any) -> None:
    torch.manual_seed(1)
    reset(clip.cond_stage_model)
    for module in clip.cond_stage_model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.1)


# --- diffusers --------------------------------------------------------------------------------------------------------

_CLIPS = {"sd15": sd1_clip, "sd21": sd2_clip, "sdxl": sdxl_clip}


def whole_twins(name: str) -> tuple[Twins, Any]:
    """A model of `diffusers_models.FAMILIES` in both worlds with its text encoders, and ComfyUI's CLIP.

    Call it outside of inference mode: nothing could be learned on the pipeline otherwise.
    """
    both, clip = twins(name), _CLIPS[name]()
    _, _, predicts, factor = FAMILIES[name]
    parts: dict[str, Any] = {}
    for suffix, encoder in zip(("", "_2"), _encoders(clip), strict=False):
        parts[f"tokenizer{suffix}"] = CLIPTokenizer.from_pretrained(TOKENIZER, pad_token=_pad(name, suffix))
        parts[f"text_encoder{suffix}"] = _twin(encoder, name, projected=suffix == "_2")
    torch.manual_seed(3)
    return both._replace(pipe=pipeline(both.pipe.unet, predicts, factor, **parts)), clip


def saved_pipeline(name: str, folder: Path) -> Pipe:
    """The same pipeline, written where `from_pretrained` finds it."""
    pipe = whole_twins(name)[0].pipe
    pipe.save_pretrained(folder)
    return pipe


def _encoders(clip: Any) -> list[Any]:
    model = clip.cond_stage_model
    return [getattr(model, name) for name in ("clip_l", "clip_h", "clip_g") if hasattr(model, name)]


def _pad(name: str, suffix: str) -> str:
    """What diffusers' own folders pad with."""
    return "!" if name == "sd21" or suffix == "_2" else "<|endoftext|>"


def _twin(encoder: Any, name: str, *, projected: bool) -> Any:
    """transformers' module with the weights of ComfyUI's; SD2.x's without the last layer, as it comes."""
    weights = encoder.transformer.state_dict()
    width = weights["text_model.final_layer_norm.weight"].shape[0]
    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_attention_heads=width // 8,
        num_hidden_layers=LAYERS - (name == "sd21"),
        projection_dim=width,
        hidden_act="gelu" if name == "sd21" or projected else "quick_gelu",
        bos_token_id=49406,
        eos_token_id=49407,
    )
    model = (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)
    # transformers 4 calls a plain text model's weights as ComfyUI does, 5 leaves their first word out.
    short = {key.removeprefix("text_model."): value for key, value in weights.items()}
    model.load_state_dict({key: short[key.removeprefix("text_model.")] for key in model.state_dict()})
    return model.eval()
