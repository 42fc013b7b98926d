"""diffusers pipelines from a folder or a single file. Nothing is downloaded unless the caller says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline

from .base import HostError


def load_pipeline(model: str, dtype: torch.dtype, *, config: str = "", download: bool = False) -> Any:
    """A pipeline of SD1.x, SD2.x or SDXL on the CPU; its autoencoder in float32, as half precision overflows in some.

    Args:
        model: a folder as `save_pretrained` writes it, a single checkpoint file, or a model's name on the hub.
        config: for a single file a folder of the same family (its weights are not read), as a checkpoint holds neither
            tokenizer nor configuration; or the name of one on the hub.
        download: whether names of the hub are asked for there, where they are not in its local cache.

    Raises:
        HostError: it cannot be loaded; the message says what is missing.
    """
    try:
        if Path(model).is_file():
            pipe = _single_file(model, config, download)
        else:
            if not Path(model).is_dir() and not download:
                raise HostError(
                    f"{model} is neither a file nor a folder here: mend the path, or add --download if it is a model's "
                    "name on the hub"
                )
            pipe = DiffusionPipeline.from_pretrained(model, local_files_only=not download)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise HostError(f"{model} cannot be loaded as a diffusers pipeline: {error}") from error
    # The keyword for it has changed its name in diffusers.
    for name, module in pipe.components.items():
        if isinstance(module, torch.nn.Module):
            module.to(torch.float32 if name == "vae" else dtype)
    return pipe


def _single_file(file: str, config: str, download: bool) -> Any:
    # Without a local configuration diffusers asks the hub for one, even if told to keep to local files.
    if not Path(config).joinpath("model_index.json").is_file() and not (config and download):
        raise HostError(
            f"{file} is a single file, which holds no tokenizer and no configuration: add --config with the folder of "
            "a diffusers model of the same family (model_index.json, tokenizer and the like; no weights are needed)"
        )
    # The class is that of the configuration, which from_single_file does not look up.
    told: Any = DiffusionPipeline.load_config(config, local_files_only=not download)
    kind = StableDiffusionXLPipeline if "XL" in told["_class_name"] else StableDiffusionPipeline
    return kind.from_single_file(file, config=config, local_files_only=not download)
