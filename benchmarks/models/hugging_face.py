"""The rows of ``structured_coverage.py`` from Hugging Face: tiny configurations with two heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers as t
from torch import Tensor, nn

from .case import Case, plain

_WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_TEXT = {**_WIDTH, "vocab_size": 99}
_IMAGE = {**_WIDTH, "image_size": 32, "patch_size": 8}
_DECODER = {**_TEXT, "max_position_embeddings": 64, "use_cache": False}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_TWO_STACKS = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "vocab_size": 99,
    "use_cache": False,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "decoder_start_token_id": 1,
    **_SPECIAL,
}
_STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}

_IDS = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(0))
TEXT = {"input_ids": _IDS, "attention_mask": torch.ones(2, 12, dtype=torch.long)}
SMALL = {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
LARGE = {"pixel_values": torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))}


class TwoHeads(nn.Module):
    """A body with two linear heads on one vector of its last hidden state."""

    def __init__(self, body: nn.Module, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.pool = body, pool
        self.a, self.b = nn.Linear(32, 4), nn.Linear(32, 3)

    def forward(self, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the outputs of the heads."""
        features = self.pool(self.body(**inputs).last_hidden_state)
        return self.a(features), self.b(features)


def first(x: Tensor) -> Tensor:
    """Take the first token."""
    return x[:, 0]


def last(x: Tensor) -> Tensor:
    """Take the last token."""
    return x[:, -1]


def tokens(x: Tensor) -> Tensor:
    """Average over tokens."""
    return x.mean(1)


def places(x: Tensor) -> Tensor:
    """Average over the places of a picture."""
    return x.mean((2, 3))


_Row = tuple[Callable[[], nn.Module], Callable[[Tensor], Tensor], Mapping[str, Tensor]]

_DIRECT: dict[str, tuple[str, dict[str, Any], Callable[[Tensor], Tensor], Mapping[str, Tensor]]] = {
    "BERT": ("Bert", _TEXT, first, TEXT),
    "RoBERTa": ("Roberta", _TEXT, first, TEXT),
    "ELECTRA": ("Electra", {**_TEXT, "embedding_size": 16}, first, TEXT),
    "DeBERTa v2": ("DebertaV2", _TEXT, first, TEXT),
    "MPNet": ("MPNet", _TEXT, first, TEXT),
    "ALBERT": ("Albert", {**_TEXT, "embedding_size": 16}, first, TEXT),
    "DistilBERT": (
        "DistilBert", {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}, first, TEXT,
    ),
    "ViT": ("ViT", _IMAGE, first, SMALL),
    "DeiT": ("DeiT", _IMAGE, first, SMALL),
    "BEiT": ("Beit", _IMAGE, first, SMALL),
    "DINOv2": ("Dinov2", {**_IMAGE, "mlp_ratio": 2}, first, SMALL),
    "Swin": (
        "Swin",
        {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4},
        tokens,
        SMALL,
    ),
    "ConvNeXt": ("ConvNext", _STAGES, places, LARGE),
    "ResNet": ("ResNet", {**_STAGES, "embedding_size": 8, "layer_type": "basic"}, places, LARGE),
    "SegFormer": ("Segformer", {**_STAGES, "num_attention_heads": [1, 2, 3, 4]}, places, LARGE),
    "Llama": ("Llama", {**_DECODER, "num_key_value_heads": 4}, last, TEXT),
    "Llama, grouped queries": ("Llama", {**_DECODER, "num_key_value_heads": 2}, last, TEXT),
    "Qwen2": ("Qwen2", {**_DECODER, "num_key_value_heads": 4}, last, TEXT),
    "Qwen3": ("Qwen3", {**_DECODER, "num_key_value_heads": 4, "head_dim": 8}, last, TEXT),
    "Mistral": ("Mistral", {**_DECODER, "num_key_value_heads": 4}, last, TEXT),
    "GPT-2": (
        "GPT2", {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "use_cache": False, **_SPECIAL}, last, TEXT,
    ),
    "GPT-NeoX": ("GPTNeoX", _DECODER, last, TEXT),
    "OPT": (
        "OPT",
        {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64,
         "word_embed_proj_dim": 32, "max_position_embeddings": 64, "use_cache": False, **_SPECIAL},
        last,
        TEXT,
    ),
    "BART": (
        "Bart", {**_TWO_STACKS, "max_position_embeddings": 64}, last,
        {"input_ids": _IDS, "decoder_input_ids": _IDS},
    ),
    "Whisper": (
        "Whisper",
        {**_TWO_STACKS, "num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 20},
        first,
        {"input_features": torch.randn(2, 16, 40), "decoder_input_ids": _IDS[:, :5]},
    ),
}  # fmt: skip
_BY_NAME: dict[str, _Row] = {
    "CLIP, vision": (lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**_IMAGE)), first, SMALL),
    "CLIP, text": (lambda: t.CLIPTextModel(t.CLIPTextConfig(**_TEXT, **_SPECIAL)), last, TEXT),
    "SigLIP, vision": (lambda: t.SiglipVisionModel(t.SiglipVisionConfig(**_IMAGE)), first, SMALL),
    "T5, encoder": (
        lambda: t.T5EncoderModel(
            # As in T5, its number of buckets is that of nothing else.
            t.T5Config(
                vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=5, relative_attention_num_buckets=20
            )
        ),
        first,
        TEXT,
    ),
}  # fmt: skip

NAMES = (*_DIRECT, *_BY_NAME)


def build(name: str) -> Case:
    """Build a model, and inputs for it."""
    if name in _DIRECT:
        stem, options, pool, inputs = _DIRECT[name]
        body = getattr(t, f"{stem}Model")(getattr(t, f"{stem}Config")(**options))
    else:
        maker, pool, inputs = _BY_NAME[name]
        body = maker()
    return plain(TwoHeads(body, pool), dict(inputs))
