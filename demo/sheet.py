"""One picture that shows several side by side, each under its name."""

from collections.abc import Mapping

from PIL import Image, ImageDraw, ImageFont, ImageOps

_PANEL = 384  # three times the demo world's pictures
_MARGIN = 16
_TITLE = 40
_BACKGROUND = "white"
_INK = "black"


def contact_sheet(pictures: Mapping[str, Image.Image]) -> Image.Image:
    """A row of panels, in the mapping's order. Small pictures grow by a whole factor and keep their pixels sharp."""
    width = _MARGIN + len(pictures) * (_PANEL + _MARGIN)
    sheet = Image.new("RGB", (width, _TITLE + _PANEL + _MARGIN), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=20)
    for place, (name, picture) in enumerate(pictures.items()):
        left = _MARGIN + place * (_PANEL + _MARGIN)
        draw.text((left + _PANEL / 2, _TITLE / 2), name, fill=_INK, font=font, anchor="mm")
        panel = _fit(picture.convert("RGB"))
        sheet.paste(panel, (left + (_PANEL - panel.width) // 2, _TITLE + (_PANEL - panel.height) // 2))
    return sheet


def _fit(picture: Image.Image) -> Image.Image:
    factor = _PANEL // max(picture.size)
    if factor >= 1:
        return ImageOps.scale(picture, factor, Image.Resampling.NEAREST)
    return ImageOps.contain(picture, (_PANEL, _PANEL), Image.Resampling.BICUBIC)
