"""The one list of the pack's nodes."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .attention import CustomPreset, KVInjection
from .cache import LoadReferenceCache, SaveReferenceCache
from .color import AdaINColorGuidance, AdaINColorMatch
from .cross_feature import CrossFeatureAttention
from .demo import DemoPicture, LoadDemoModel
from .evaluation import CompositionScore
from .features import LoadFeatureExtractor, PreviewCorrespondence, PreviewFeatures
from .folders import register_folders
from .inversion import AppearanceInversion, ApplyInversion, LoadInversion, SaveInversion, ShapeInversion
from .newer import require_editable_attention
from .noise import InvertReference
from .reference import EncodeReference
from .report import InjectionReport
from .structure import SelfSimilarityGuidance


class ShapeAppearanceExtension(ComfyExtension):
    """What ComfyUI asks for the nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        require_editable_attention()
        register_folders()
        return [
            LoadDemoModel,
            DemoPicture,
            EncodeReference,
            InvertReference,
            KVInjection,
            CustomPreset,
            CrossFeatureAttention,
            SelfSimilarityGuidance,
            InjectionReport,
            SaveReferenceCache,
            LoadReferenceCache,
            AdaINColorMatch,
            AdaINColorGuidance,
            ShapeInversion,
            AppearanceInversion,
            ApplyInversion,
            SaveInversion,
            LoadInversion,
            LoadFeatureExtractor,
            PreviewFeatures,
            PreviewCorrespondence,
            CompositionScore,
        ]
