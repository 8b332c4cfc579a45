"""Text encoders of Hugging Face transformers: the table. Their attention runs as the vision transformers' does."""

from __future__ import annotations

from typing import Any

from .base import Family


def _bert(name: str, stem: str) -> Family:
    """BERT's layout under another name: the norm behind each residual addition, the output parts in modules of their
    own."""
    return Family(
        name, (f"{stem}Model",), f"{stem}Layer", "attention.output.LayerNorm", "attention.self",
        "output.LayerNorm", "intermediate", post_norm=True,
        after_attention=("attention.output.dense", "attention.output.dropout"),
        after_mlp=("output.dense", "output.dropout"), prefix=lambda m: 1, has_cls=lambda m: True,
    )  # fmt: skip


def _windowed(block: Any) -> bool:
    return block.attn.sliding_window is not None


FAMILIES = (
    _bert("BERT (and MiniLM)", "Bert"),
    _bert("RoBERTa", "Roberta"),
    _bert("XLM-RoBERTa", "XLMRoberta"),
    Family(
        "DistilBERT", ("DistilBertModel",), "TransformerBlock", "sa_layer_norm", "attention", "output_layer_norm",
        "ffn", post_norm=True, prefix=lambda m: 1, has_cls=lambda m: True,
    ),
    Family(
        "ModernBERT (rotary, local and global)", ("ModernBertModel",), "ModernBertEncoderLayer", "attn_norm", "attn",
        "mlp_norm", "mlp", final_norm="final_norm", local=_windowed, prefix=lambda m: 1, has_cls=lambda m: True,
    ),
)  # fmt: skip
