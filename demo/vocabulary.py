"""The demo's BPE vocabulary: CLIP's file format, the world's words (made by `python -m demo.train.vocabulary`)."""

from __future__ import annotations

import json
from pathlib import Path

START, END = "<|startoftext|>", "<|endoftext|>"
TOKENIZER_FOLDER = Path(__file__).resolve().parent / "tokenizer"


def load_vocabulary() -> dict[str, int]:
    """Token -> index."""
    return json.loads((TOKENIZER_FOLDER / "vocab.json").read_text(encoding="utf-8"))
