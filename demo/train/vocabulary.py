"""``python -m demo.train.vocabulary``: write the demo's BPE vocabulary, CLIP's file format with the world's words.

Every word the world uses is one token; any other text falls back to smaller pieces and single bytes, as in CLIP.
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise

from .. import world
from ..vocabulary import END, START, TOKENIZER_FOLDER

END_OF_WORD = "</w>"


def words() -> list[str]:
    """All words that captions are made of, the withheld ones too: their embeddings stay untrained."""
    names = [*world.COLOURS, *world.TEXTURES, *world.SHAPES, *world.BACKGROUNDS]
    return sorted({*names, "a", "an", "the", "on", "in", "of", "and", "with", "made", "shape", "picture", "background"})


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in CLIP's order."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) for byte in visible] + [chr(256 + i) for i in range(len(hidden))]


def merges(vocabulary: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent first, until every word is one symbol."""
    split = {word: [*word[:-1], word[-1] + END_OF_WORD] for word in vocabulary}
    found: list[tuple[str, str]] = []
    while True:
        counts = Counter(pair for symbols in split.values() for pair in pairwise(symbols))
        if not counts:
            return found
        best = max(counts, key=lambda pair: (counts[pair], pair))
        found.append(best)
        for word, symbols in split.items():
            split[word] = _join(symbols, best)


def _join(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    i = 0
    while i < len(symbols):
        if tuple(symbols[i : i + 2]) == pair:
            joined.append("".join(pair))
            i += 2
        else:
            joined.append(symbols[i])
            i += 1
    return joined


def main() -> None:
    found = merges(words())
    letters = byte_alphabet()
    symbols = [*letters, *(letter + END_OF_WORD for letter in letters), *("".join(pair) for pair in found), START, END]
    TOKENIZER_FOLDER.mkdir(exist_ok=True)
    vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
    (TOKENIZER_FOLDER / "vocab.json").write_text(json.dumps(vocabulary, indent=0) + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in found)]
    (TOKENIZER_FOLDER / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END, "model_max_length": 32}
    config = {"tokenizer_class": "CLIPTokenizer", "do_lower_case": True, **special}
    (TOKENIZER_FOLDER / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
