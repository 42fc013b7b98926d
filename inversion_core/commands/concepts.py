"""What a command line asks to be learned: pictures in folders, and their masks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..learning.inversion import Kind
from ..learning.model import LearningError
from ..learning.pictures import fitted

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
MASK = ".mask.png"
"""``chair.mask.png`` is the mask of ``chair.jpg``: white where the object is."""
CLASS_WORDS: dict[Kind, str] = {"shape": "shape", "appearance": "texture"}


@dataclass(frozen=True)
class Concept:
    """One inversion to learn.

    Attributes:
        pictures: folder they lie in.
        kind: "shape" or "appearance".
        token: its name, with brackets or without; by default the folder's.
        class_word: the words it begins as.
        shape: file of a shape inversion of these pictures, which stays frozen.
    """

    pictures: Path
    kind: Kind
    token: str = ""
    class_word: str = ""
    shape: Path | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise LearningError(
                f"{self.pictures}: the kind is {self.kind!r}, but must be {' or '.join(get_args(Kind))}"
            )
        if self.shape is not None and self.kind == "shape":
            raise LearningError(f"{self.pictures}: a frozen shape is for learning an appearance beside it")

    @property
    def written(self) -> str:
        """The token as the user has it."""
        return self.token or self.pictures.resolve().name

    @property
    def words(self) -> str:
        """The class word."""
        return self.class_word or CLASS_WORDS[self.kind]


def concepts_of(file: Path) -> list[Concept]:
    """Concepts from a JSON array of objects with the fields of `Concept`; paths are relative to the file.

    Raises:
        LearningError: it cannot be read or says something else.
    """
    known = {field.name for field in fields(Concept)}
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(entries, list) or not entries:
            raise LearningError(f"{file} must hold a JSON array with at least one object")
        found = []
        for number, entry in enumerate(entries):
            if not isinstance(entry, dict) or not {"pictures", "kind"} <= entry.keys() <= known:
                raise LearningError(
                    f"entry {number} of {file} must be an object with pictures and kind, and of "
                    f"{', '.join(sorted(known))} nothing else"
                )
            paths = {key: file.parent / entry[key] for key in ("pictures", "shape") if entry.get(key)}
            found.append(Concept(**{**entry, **paths}))
        return found
    except (OSError, ValueError) as error:
        raise LearningError(f"the list of concepts {file} cannot be read: {error}") from error


def read(folder: Path, size: int) -> tuple[Tensor, Tensor | None]:
    """The pictures (B, H, W, 3) of a folder, at most `size` on a side, and their masks (B, H, W), or None if there are
    none. Pictures of different sizes are cut to squares at the centre and reduced to the smallest.

    Raises:
        LearningError: there is no picture, one cannot be read, is too small, or some have masks and some not.
    """
    files = _files(folder)
    masked = {file: file.with_name(file.stem + MASK) for file in files}
    missing = [file.name for file, mask in masked.items() if not mask.is_file()]
    if missing and len(missing) < len(files):
        raise LearningError(
            f"{folder}: {', '.join(missing)} lack a mask such as {masked[files[0]].name}, others have one"
        )
    loaded = []
    for file in files:
        picture = _opened(file).convert("RGB")
        mask = Image.new("L", picture.size, 255) if missing else _opened(masked[file]).convert("L")
        if mask.size != picture.size:
            raise LearningError(
                f"{masked[file]} is {mask.width}x{mask.height}, but its picture is {picture.width}x{picture.height}: "
                "save the mask at the picture's size"
            )
        loaded.append((picture, mask))
    if len({picture.size for picture, _ in loaded}) > 1:
        loaded = _squares(loaded, size)
    pictures = torch.stack([torch.from_numpy(np.array(picture, dtype=np.float32)) / 255 for picture, _ in loaded])
    masks = torch.stack([torch.from_numpy(np.array(mask, dtype=np.float32)) / 255 for _, mask in loaded])
    pictures, masks = fitted(pictures, masks, size)
    return pictures, None if missing else masks


def write_mask(masks: Tensor, path: Path) -> None:
    """Masks (B, H, W) side by side as one picture."""
    Image.fromarray((torch.cat(list(masks), dim=1).clamp(0, 1) * 255).round().to(torch.uint8).numpy()).save(path)


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise LearningError(f"{folder} is no folder: name one that holds a concept's pictures")
    found = [one for one in sorted(folder.iterdir()) if one.suffix.lower() in SUFFIXES and not one.name.endswith(MASK)]
    if not found:
        raise LearningError(f"{folder} holds no picture ({', '.join(SUFFIXES)})")
    stems = [one.stem for one in found]
    if len(set(stems)) < len(stems):
        raise LearningError(f"{folder} holds pictures that differ in their endings only, so masks would be mixed up")
    return found


def _opened(file: Path) -> Image.Image:
    try:
        with Image.open(file) as image:
            return ImageOps.exif_transpose(image)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError) as error:
        raise LearningError(f"{file} cannot be read as a picture: {error}") from error


def _squares(loaded: Sequence[tuple[Image.Image, Image.Image]], size: int) -> list[tuple[Image.Image, Image.Image]]:
    side = min(size, *(min(picture.size) for picture, _ in loaded))
    wanted = (side, side)
    return [(ImageOps.fit(picture, wanted), ImageOps.fit(mask, wanted)) for picture, mask in loaded]
