"""Composition Score: how well a result joins the shape of one picture and the appearance of another."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..inversion_core.features import FeatureExtractor as Extractor
from ..inversion_core.metrics import CompositionScore as Score
from ..inversion_core.metrics import composition_score
from .features import seeing
from .host import single_image
from .newer import found_by
from .picture_mask import picture_mask
from .sheet import table
from .sockets import FeatureExtractor


class CompositionScore(io.ComfyNode):
    """FEATURES, three IMAGEs and optional MASKs -> text and a table."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ShapeAppearanceCompositionScore",
            **found_by("metric", "self-similarity", "splice", "benchmark"),
            display_name="Composition Score",
            category="shape & appearance",
            description=(
                "Measures how well a result keeps the shape of one picture and takes the appearance of another. "
                "Compare scores of one backbone, block and size only; the usual ones are those of dino-vitb8 as it is."
            ),
            inputs=[
                FeatureExtractor.Input("features", tooltip="From Load Feature Extractor."),
                io.Image.Input("result", tooltip="One picture: what came out."),
                io.Image.Input("shape", tooltip="The picture whose shape it should have."),
                io.Image.Input("appearance", tooltip="The picture whose appearance it should have."),
                io.Mask.Input("result_mask", optional=True, tooltip="Where the object is in the result."),
                io.Mask.Input(
                    "shape_mask", optional=True, tooltip="Where it is in the shape picture. Both give the overlap."
                ),
                io.Mask.Input("appearance_mask", optional=True, tooltip="Where it is in the appearance picture."),
                *seeing(),
            ],
            outputs=[
                io.String.Output(display_name="text", tooltip="The scores, a line each."),
                io.Image.Output(display_name="table", tooltip="The same as a picture, to save beside the result."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        features: Extractor,
        result,
        shape,
        appearance,
        block,
        size,
        result_mask=None,
        shape_mask=None,
        appearance_mask=None,
    ) -> io.NodeOutput:
        pictures, masks = [], []
        for image, mask, name in (
            (result, result_mask, "result"),
            (shape, shape_mask, "shape"),
            (appearance, appearance_mask, "appearance"),
        ):
            pictures.append(single_image(image, f"the {name}")[0].movedim(-1, 0).cpu())
            masks.append(None if mask is None else picture_mask(mask, image, f"the {name} mask")[0].cpu())
        found = composition_score(
            features,
            *pictures,
            result_mask=masks[0],
            shape_mask=masks[1],
            appearance_mask=masks[2],
            block=block,
            size=size or None,
        )
        title, rows = f"{found.backbone}, block {found.block}, {found.size} px", lines(found)
        text = "\n".join([title, *(f"{name}: {value} ({remark})" for name, value, remark in rows)])
        return io.NodeOutput(text, table(title, rows), ui=ui.PreviewText(text))


def lines(score: Score) -> list[tuple[str, str, str]]:
    """Name, value and meaning of each score."""

    def number(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    return [
        (
            "self-similarity distance",
            number(score.self_similarity_distance, 4),
            "to the shape picture; 0 is its layout",
        ),
        ("CLS similarity", number(score.cls_similarity, 3), "to the appearance picture; 1 is its look"),
        ("mask overlap (IoU)", number(score.mask_iou, 3), "of result and shape, with both masks; 1 is the same"),
        ("colour difference", number(score.color_difference, 1), "to the appearance, CIELAB; below 2.3 is unseen"),
    ]
