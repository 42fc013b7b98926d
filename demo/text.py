"""The demo's text encoder: ComfyUI's SD1-type CLIP with a small config and a small vocabulary of its own."""

from __future__ import annotations

from typing import Any

import comfy.sd1_clip
import comfy.supported_models_base

from .vocabulary import END, START, TOKENIZER_FOLDER, load_vocabulary

MAX_LENGTH = 32
"""Tokens in one chunk of a prompt, start and end included; longer prompts become several chunks, as in SD1."""
WIDTH = 128
"""Width of a token's embedding and of the conditioning."""


class _Tokenizer(comfy.sd1_clip.SDTokenizer):
    def __init__(self, embedding_directory: Any = None, tokenizer_data: dict | None = None) -> None:
        super().__init__(
            tokenizer_path=str(TOKENIZER_FOLDER),
            max_length=MAX_LENGTH,
            embedding_directory=embedding_directory,
            embedding_size=WIDTH,
            embedding_key="clip_l",
            tokenizer_data=tokenizer_data or {},
        )


class _Prompt(comfy.sd1_clip.SD1Tokenizer):
    def __init__(self, embedding_directory: Any = None, tokenizer_data: dict | None = None) -> None:
        data = {**(tokenizer_data or {}), "clip_l_tokenizer_class": _Tokenizer}
        super().__init__(embedding_directory=embedding_directory, tokenizer_data=data)


class _Encoder(comfy.sd1_clip.SDClipModel):
    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: dict | None = None) -> None:
        tokens = load_vocabulary()
        super().__init__(
            device=device,
            dtype=dtype,
            max_length=MAX_LENGTH,
            textmodel_json_config={
                "hidden_act": "quick_gelu",
                "hidden_size": WIDTH,
                "intermediate_size": 4 * WIDTH,
                "max_position_embeddings": MAX_LENGTH,
                "num_attention_heads": 4,
                "num_hidden_layers": 3,
                "vocab_size": len(tokens),
                "eos_token_id": tokens[END],
            },
            special_tokens={"start": tokens[START], "end": tokens[END], "pad": tokens[END]},
            return_projected_pooled=False,
            model_options=model_options or {},
        )
        # ComfyUI always makes CLIP's own 49,408 embeddings; ours has its own, much smaller vocabulary.
        embedding = self.operations.Embedding(len(tokens), WIDTH, dtype=dtype, device=device)
        self.transformer.set_input_embeddings(embedding)


class _Clip(comfy.sd1_clip.SD1ClipModel):
    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: dict | None = None) -> None:
        options = {**(model_options or {}), "clip_l_class": _Encoder}
        super().__init__(device=device, dtype=dtype, model_options=options)


def clip_target() -> comfy.supported_models_base.ClipTarget:
    """What `comfy.sd.CLIP` builds the text encoder from."""
    return comfy.supported_models_base.ClipTarget(_Prompt, _Clip)
