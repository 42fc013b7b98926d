"""Where a backbone's weights lie, or how they get there."""

from __future__ import annotations

from pathlib import Path

import comfy.utils

from ..inversion_core.downloads import fetch
from ..inversion_core.features import Backbone, FeatureError
from .folders import EXTRACTORS


def weights_file(backbone: Backbone, download: bool) -> Path:
    """The backbone's file in one of ComfyUI's `feature_extractors` folders, fetched if it is missing and may be.

    Raises:
        FeatureError: it is missing; the message says which file goes where, and what a download would take.
        DownloadError: the download failed.
    """
    found = EXTRACTORS.find(backbone.file)
    if found is not None:
        return found
    target = EXTRACTORS.new(backbone.file)
    pinned = backbone.download
    if pinned is None or not download:
        hint = (
            "it has no automatic download, as its hash is not known"
            if pinned is None
            else f"or turn on 'download' here, which accepts the {pinned.licence}"
        )
        raise FeatureError(
            f"{backbone.name} needs the file {target}: fetch model.safetensors from "
            f"https://huggingface.co/{backbone.source} and give it that name; {hint}"
        )
    bar = comfy.utils.ProgressBar(1)
    fetch(pinned.url, target, pinned.sha256, lambda done, total: bar.update_absolute(done, total or done))
    return target
