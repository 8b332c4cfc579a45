"""What an attention module is told about logical positions, told of the rows a reduced cache holds instead.

Masks, ALiBi and tables of positions reach modules that ask no attention table as arguments with an entry per key. Those
of the stored rows are picked; what an argument's shape cannot say (other rows in each head, where it has no heads) goes
into a bias on the logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

LOW = torch.finfo(torch.float32).min


def at_rows(
    given: Mapping[str, Any], x: Tensor, place: Tensor, logical: int, heads: int, *, holes: bool,
    band: Tensor | None = None, asking: Tensor | None = None,
) -> tuple[dict[str, Any], Tensor | None]:  # fmt: skip
    """An attention module's arguments for the rows it will get, and what must be added to its logits besides.

    given: arguments by name; x: (B, Q, C), the features among them; place: (B or 1, 1 or G, S) long, which of the
    `logical` keys each row is, below zero = out of sight; holes: whether some are; band: (..., P, P) bool, see
    `band_of`; asking: (B, Q) long, which of them the queries are, by default the last.
    Returns the arguments and a bias, (B, 1 or H, 1 or Q, S) float32, or None.
    """
    b, q = x.shape[:2]
    place = place.expand(b, -1, -1)
    index = place.clamp(min=0)[:, :, None]
    bias = torch.zeros(place.shape, device=x.device).masked_fill(place < 0, LOW)[:, :, None] if holes else None
    if band is not None:
        table = band.flatten(0, -2)
        if asking is None:
            asking = torch.arange(logical - q, logical, device=x.device).expand(b, -1)
        seen = table[asking.clamp(min=0)[:, None, :, None], index]  # (B, 1 or G, Q, S)
        hidden = torch.zeros(seen.shape, device=x.device).masked_fill(~seen, LOW)
        bias = hidden if bias is None else bias + hidden
    if bias is not None and bias.shape[1] > 1:
        bias = bias.repeat_interleave(heads // bias.shape[1], dim=1)
    index = index if index.shape[1] == 1 else index.repeat_interleave(heads // index.shape[1], dim=1)
    told = dict(given)
    for name, value in given.items():
        full = _by_head(value, x, logical, heads)
        if full is None:
            continue
        lead = max(full.shape[1], index.shape[1])
        picked = full.expand(b, lead, -1, -1).gather(-1, index.expand(b, lead, full.shape[2], -1))
        if lead == full.shape[1] and (value.dim() == 4 or full.shape[0] == b):
            told[name] = picked if value.dim() == 4 else picked.reshape(*value.shape[:-1], -1)
            continue
        # The module's last query sees its own key: that is what its mask says of a row in sight.
        sight = value[..., -1:, -1:] if value.dtype == torch.bool else value.new_zeros(())
        told[name] = sight.expand(*value.shape[:-1], place.shape[-1])
        if value.dtype == torch.bool:
            shown = full[..., -1:, -1:]
            picked = torch.zeros(picked.shape, device=x.device).masked_fill(picked != shown, LOW)
        bias = picked.float() if bias is None else bias + picked
    return told, None if bias is None else bias.clamp_min(LOW)


def _by_head(value: Any, x: Tensor, logical: int, heads: int) -> Tensor | None:
    """An argument that has an entry per key, as (B or 1, 1 or H, Q or 1, logical); None for any other."""
    if not isinstance(value, Tensor) or value.dim() not in (3, 4) or value.shape == x.shape:
        return None
    b = x.shape[0]
    if value.dim() == 4:
        fits = value.shape[-1] == logical and value.shape[0] in (1, b) and value.shape[1] in (1, heads)
        return value if fits else None
    first, queries, keys = value.shape
    if value.is_floating_point() and first == heads and queries == 1 and keys > logical:
        return value[None, ..., -logical:]  # a table up to the longest text: its end is meant
    if keys != logical:
        return None
    if first == b * heads:
        return value.unflatten(0, (b, heads))
    if first == heads and value.is_floating_point():
        return value[None]
    return value[:, None] if first in (1, b) else None


def band_of(module: nn.Module) -> str | None:
    """The name of a buffer inside a module, (..., P, P) bool, that says which positions see which, where that is less
    than all earlier ones."""
    for name, buffer in module.named_buffers():
        if buffer.dtype != torch.bool or buffer.dim() < 2 or buffer.shape[-1] != buffer.shape[-2]:
            continue
        if buffer.shape[-1] > 1 and not torch.equal(buffer, torch.ones_like(buffer).tril()):
            return name
    return None


class Unbanded(TorchFunctionMode):
    """While this is open, on this thread, who slices a band finds all earlier positions in it. Its module slices it by
    the number of its keys, which says nothing of their places once rows are gone: `at_rows` hides by these."""

    def __init__(self, band: Tensor) -> None:
        super().__init__()
        self.band = band

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is Tensor.__getitem__ and args[0] is self.band:
            args = (torch.ones_like(self.band).tril(), *args[1:])
        return func(*args, **(kwargs or {}))


__all__ = ["Unbanded", "at_rows", "band_of"]
