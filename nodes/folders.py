"""The pack's own folders among ComfyUI's models: one class, whatever lies in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import folder_paths

EXTENSION = ".safetensors"


@dataclass(frozen=True)
class ModelFolder:
    """A kind of files in ComfyUI's models folder, and wherever extra_model_paths.yaml names it.

    Attributes:
        name: of the folder.
        kind: what an error calls one of its files.
    """

    name: str
    kind: str

    def register(self) -> None:
        """Tell ComfyUI of it; folders that the user's settings name go first. To ComfyUI it need not exist."""
        paths, _ = folder_paths.folder_names_and_paths.get(self.name, ([], set()))
        own = str(Path(folder_paths.models_dir) / self.name)
        folder_paths.folder_names_and_paths[self.name] = (list(dict.fromkeys([*paths, own])), {EXTENSION})

    def names(self) -> list[str]:
        """The files there are."""
        return folder_paths.get_filename_list(self.name)

    def find(self, name: str) -> Path | None:
        """Where a file lies; None if there is none of this name."""
        found = folder_paths.get_full_path(self.name, name)
        return None if found is None else Path(found)

    def path(self, name: str) -> Path:
        """Where a listed file lies.

        Raises:
            ValueError: there is none of this name.
        """
        found = self.find(name)
        if found is None:
            raise ValueError(f"there is no {self.kind} {name!r}; there are: {', '.join(self.names()) or 'none yet'}")
        return found

    def new(self, name: str) -> Path:
        """Where a file of this name is to be written; errors as of `new_file`."""
        return new_file(self.name, name)


CACHES = ModelFolder("reference_caches", "reference cache")
INVERSIONS = ModelFolder("inversions", "inversion")
EXTRACTORS = ModelFolder("feature_extractors", "feature extractor")


def register_folders() -> None:
    """Tell ComfyUI of all of them."""
    for folder in (CACHES, INVERSIONS, EXTRACTORS):
        folder.register()


def new_file(folder: str, name: str) -> Path:
    """Where a safetensors file of this name is to be written in one of ComfyUI's model folders.

    Raises:
        ValueError: the name is empty or leads out of the folder.
    """
    plain = name.strip().removesuffix(EXTENSION)
    if not re.fullmatch(r"[\w\- ]+(\.[\w\- ]+)*", plain):
        raise ValueError(f"{name!r} cannot be the name of a file: use letters, digits, spaces, '-', '_' and '.'")
    return Path(folder_paths.get_folder_paths(folder)[0]) / f"{plain}{EXTENSION}"
