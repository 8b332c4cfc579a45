"""Ragged execution: samples that keep different numbers of tokens, laid end to end instead of padded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .attention import attend


class Packing:
    """The layout of B samples of different lengths in one row of T = sum(lengths) tokens.

    Built from Python integers: reading the lengths is the one synchronisation packed execution costs per ragged site.
    """

    def __init__(self, lengths: Sequence[int], width: int, device: torch.device) -> None:
        self.lengths, self.width = list(lengths), width
        # The layout is made on the host, where picking by a mask waits for nothing, and copied over.
        rows = torch.arange(width)
        real = rows < torch.tensor(self.lengths)[:, None]
        offset = torch.arange(len(self.lengths))[:, None] * width
        self.valid = real.to(device, non_blocking=True)
        self.index = (offset + rows)[real].to(device, non_blocking=True)  # (T,) into the flattened (B * width) rows

    def pack(self, x: Tensor) -> Tensor:
        """(B, width, C) -> (1, T, C)."""
        return x.reshape(-1, x.shape[-1]).index_select(0, self.index)[None]

    def pad(self, x: Tensor) -> Tensor:
        """(1, ..., T, C) -> (B, ..., width, C), zeros in the padding; the token axis is the second to last."""
        if x.dim() == 3:
            out = x.new_zeros(len(self.lengths) * self.width, x.shape[-1])
            return out.index_copy(0, self.index, x[0]).view(len(self.lengths), self.width, -1)
        h = x.shape[1]
        flat = x[0].transpose(0, 1).reshape(x.shape[-2], -1)  # (T, H * d)
        out = flat.new_zeros(len(self.lengths) * self.width, flat.shape[-1]).index_copy(0, self.index, flat)
        return out.view(len(self.lengths), self.width, h, -1).transpose(1, 2)

    def read(
        self, q: Tensor, packed: tuple[Tensor, Tensor], late: tuple[Tensor, Tensor], scale: float, mask: Tensor | None
    ) -> Tensor:
        """Attention of a few queries on the packed rows of their sample and on late rows behind them; none is padded.

        q: (B, Q, d), all rows visible to all Q; packed keys and values: (T, d); late ones: (B, L, d), B samples or
        heads; mask: (B, 1, width + L), bool or additive, or None. Returns (B, Q, d). Inside, all is float32.
        """
        lengths, width = self.lengths, self.width
        q, (keys, values) = q.float() * scale, late
        behind = q @ keys.float().transpose(-1, -2)
        parts = zip(lengths, packed[0].split(lengths), packed[1].split(lengths), strict=True)
        out = []
        for i, (n, k, v) in enumerate(parts):
            logits = torch.cat([q[i] @ k.float().T, behind[i]], -1)
            if mask is not None:
                shown = torch.cat([mask[i, :, :n], mask[i, :, width:]], -1)
                low = torch.finfo(torch.float32).min
                logits = logits.masked_fill(~shown, low) if shown.dtype == torch.bool else logits + shown.float()
            p = logits.softmax(-1)
            out.append(torch.addmm(p[:, n:] @ values[i].float(), p[:, :n], v.float()))
        return torch.stack(out).to(values.dtype)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None, dropout: float) -> Tensor:
        """The fused kernel sample by sample. q, k, v: (1, H, T, d); bias: (1, 1 or H, 1, T) or None. No padding is
        computed; a sample's result is exactly what it would be alone."""
        parts = zip(
            q.split(self.lengths, 2), k.split(self.lengths, 2), v.split(self.lengths, 2),
            [None] * len(self.lengths) if bias is None else bias.split(self.lengths, 3), strict=True,
        )  # fmt: skip
        return torch.cat([attend(a, b, c, scale, d, dropout) for a, b, c, d in parts], dim=2)
