"""The environment in which the tests run against another version of ComfyUI."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from scripts import other_comfyui


def test_it_borrows_packages_and_prefers_its_own(tmp_path: Path) -> None:
    python = other_comfyui.make(tmp_path / "other")
    own = other_comfyui.packages_of(python)
    (own / "einops.py").write_text("__version__ = 'its own'")
    code = "import einops, numpy, torchaudio.transforms; print(numpy.__file__, einops.__version__, sep='\\n')"
    said = subprocess.run([python, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    borrowed, version = said.split("\n", 1)
    assert Path(borrowed).is_relative_to(other_comfyui.packages_of(Path(sys.executable)))
    assert version.strip() == "its own"
