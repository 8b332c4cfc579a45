"""The golden files: numbers that the methods' own authors' code gave, and the models they were taken from.

    golden = Golden.load("tome_vit_a")
    model = golden.model("transformers")              # the same function as golden.model("timm")
    logits = run(model, golden.image)

The small seeded models of `fewer.testing.models` are re-exported, with timm importable even without torchvision.
`signals` makes up what a method sees, for cases computed by hand.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

import tvstub  # noqa: F401  (timm becomes importable)
from fewer.core import Place, Seen, Signals, Tokens
from fewer.testing.models import KINDS, Shape, images, run, tiny_vit

__all__ = ["KINDS", "Golden", "Shape", "grouping", "images", "run", "signals", "tiny_vit", "to_transformers"]

GOLDENS = Path(__file__).parent / "goldens"
Library = Literal["transformers", "timm"]


@dataclass(frozen=True)
class Golden:
    """One file of numbers that a method's own authors' code gave."""

    name: str
    arrays: dict[str, Tensor]
    config: dict[str, Any]

    @classmethod
    @cache
    def load(cls, name: str) -> Golden:
        with np.load(GOLDENS / f"{name}.npz") as file:
            arrays = {k: torch.from_numpy(file[k]) for k in file if file[k].dtype.kind in "fiub"}
            return cls(name, arrays, json.loads(str(file["config"])))

    def __getitem__(self, key: str) -> Tensor:
        return self.arrays[key]

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    @property
    def image(self) -> Tensor:
        return self.arrays["image"]

    @property
    def settings(self) -> Iterator[dict[str, Any]]:
        """The hyper-parameters of each run; its outputs are `golden[f"{tag}.logits"]` and so on."""
        yield from self.config["settings"]

    @property
    def weights(self) -> dict[str, Tensor]:
        """The model's state dict, in timm's names."""
        return {k[2:]: v for k, v in self.arrays.items() if k.startswith("w.")}

    @property
    def shape(self) -> Shape:
        m = self.config["model"]
        return Shape(m["img_size"], m["patch_size"], m["depth"], m["embed_dim"], m["num_heads"], m["num_classes"])

    def model(self, library: Library) -> nn.Module:
        """The golden's model with its weights, in eval mode. transformers has none without a class token."""
        distilled, more = "dist_token" in self.weights, self.config["model"]
        if library == "timm":
            options = {k: more[k] for k in ("class_token", "global_pool") if k in more}
            model = KINDS["timm_distilled" if distilled else "timm"](self.shape, options)
            model.load_state_dict(self.weights)
        else:
            root = "deit" if distilled else "vit"
            model = KINDS[root](self.shape, {})
            model.load_state_dict(to_transformers(self.weights, root))
        return model.eval()

    def libraries(self) -> tuple[Library, ...]:
        return ("timm", "transformers") if "cls_token" in self.weights else ("timm",)


RENAMED = (
    ("patch_embed.proj.", "{root}.embeddings.patch_embeddings.projection."),
    ("cls_token", "{root}.embeddings.cls_token"),
    ("dist_token", "{root}.embeddings.distillation_token"), ("pos_embed", "{root}.embeddings.position_embeddings"),
    ("blocks.", "{root}.layers."), ("attn.proj.", "attention.o_proj."), ("norm1.", "layernorm_before."),
    ("norm2.", "layernorm_after."),
)  # fmt: skip
HEADS = {
    "vit": {"norm.": "vit.layernorm.", "head.": "classifier."},
    "deit": {"norm.": "deit.layernorm.", "head.": "cls_classifier.", "head_dist.": "distillation_classifier."},
}


def to_transformers(weights: dict[str, Tensor], root: str) -> dict[str, Tensor]:
    """A timm ViT's state dict in the names of transformers' ViT or DeiT; fused q, k, v are cut apart."""
    out = {}
    for name, value in weights.items():
        for head, renamed in HEADS[root].items():
            if name.startswith(head):
                name = name.replace(head, renamed, 1)
                break
        else:
            for ours, theirs in RENAMED:
                name = name.replace(ours, theirs.format(root=root))
        if ".attn.qkv." in name:
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                out[name.replace(".attn.qkv.", f".attention.{part}_proj.")] = piece
        else:
            out[name] = value
    return out


def grouping(origin: Tensor) -> Tensor:
    """An origin map with its rows renamed: each input token gets the smallest input token of its row, dropped ones -1.

    origin: (B, N0), the row of each input token, -1 = dropped. Two maps that group alike become equal, whatever the
    order of their rows.
    """
    same = origin[:, :, None] == origin[:, None, :]
    first = same.to(torch.int8).argmax(-1)
    return torch.where(origin < 0, -1, first)


# -- hand-made signals ------------------------------------------------------------------------------------------------
def signals(
    k: Tensor, *, v: Tensor | None = None, hidden: Tensor | None = None, prefix: int = 1, place: Place | None = None,
    grid: tuple[int, int] | None = None, **streams: Any,
) -> Signals:  # fmt: skip
    """What a method would see in a block with one head. k: (B, N, d) or (N, d); every query is the first unit vector,
    so that the attention logits are the first channel of the keys. v, hidden: (B, N, C), the keys by default."""
    k = torch.as_tensor(k, dtype=torch.float32)
    k = k[None] if k.dim() == 2 else k
    b, n = k.shape[:2]
    q = torch.zeros_like(k)
    q[..., 0] = 1
    v = k if v is None else v
    seen = Seen(q[:, None], k[:, None], v[:, None], 1.0)
    tokens = Tokens.plain(b, n, prefix, **streams)
    at = Place(start=tokens.free_count) if place is None else place
    return Signals(k if hidden is None else hidden, tokens, at, seen, grid, prefix=prefix)
