"""What resamplers share: modules that make new rows from a line's grid of visual rows, instead of keeping some."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..budgets import Budget, BudgetError
from ..errors import SignalError
from ..learned import ModuleListOf
from ..place import Place
from ..signals import Signals
from ..tokens import Tokens
from .method import Shape


@dataclass(frozen=True)
class Formed(Budget):
    """The count follows from the method's own parameters and from the frames and cells of a line."""

    @property
    def adaptive(self) -> bool:
        return True  # not known from a number of tokens alone

    def keep(self, free: int, at: Place) -> int:
        return free


def agree(budget: Budget, made: int, n: int, at: Place, way_out: str) -> None:
    """Raises BudgetError where `made` rows of a line of n are more than there are, or not what the budget asks for."""
    if made > n:
        raise BudgetError(f"{made} rows would be made of {n} visual tokens, more than there are; {way_out}")
    if not isinstance(budget, Formed) and (asked := budget.keep(n, at)) != made:
        raise BudgetError(f"{made} rows are made of {n} visual tokens, {budget!r} asks for {asked}; {way_out}")


# -- where rows stand -----------------------------------------------------------------------------------------------
def lattice(signals: Signals, tokens: Tokens, *, padded: bool = False) -> tuple[int, int, int]:
    """(T, H, W): the frames or tiles of each line, and the rows and columns of each; a line has T * H * W rows.

    padded: lines may have fewer whole frames than T, padding behind.
    Raises   SignalError where the lines are no full grids. That rows stand in raster order, frame by frame, is checked
             on the CPU; elsewhere the check would wait for the device.
    """
    n, view = tokens.n, signals.visual.view
    cells = signals.grid if view.cells is None else view.cells
    if cells is None:
        raise SignalError("these visual tokens form no known grid; choose a method that needs none, such as divprune")
    h, w = cells
    if n % (h * w) or (tokens.valid is not None and not padded):
        what = f"{n} visual tokens" if tokens.valid is None else f"lines of different length, at most {n} tokens,"
        raise SignalError(
            f"{what} are no full frames of {h} x {w}; give images and videos of one size, all of them unreduced, or "
            "choose a method that needs no grid, such as divprune"
        )
    if view.row.device.type == "cpu":
        cell = torch.arange(n)
        fits = (view.row == cell // w % h) & (view.column == cell % w)
        if tokens.valid is not None:
            real = tokens.valid[:, :: h * w].repeat_interleave(h * w, 1)
            fits = (fits | ~tokens.valid) & (real == tokens.valid)
        if not fits.all():
            raise SignalError(
                f"the visual tokens do not stand row by row in frames of {h} x {w}; choose a method that needs no "
                "grid, such as divprune"
            )
    return n // (h * w), h, w


SEES = ("tower", "projected")


def material(signals: Signals, sees: str) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """(R, N, C'), what rows are made of, and what brings it to the language model's width.

    sees: "tower", what enters the projector; "projected", the visual rows as they are: all there is where the tower
    shows nothing for each row, such as in videos whose frames are pooled behind the projector."""
    if sees == "projected":
        return signals.hidden, lambda x: x
    return signals.visual.features, signals.visual.project


def check_material(sees: str) -> None:
    """Raises ValueError for material there is not."""
    if sees not in SEES:
        raise ValueError(f"sees={sees!r}: choose {' or '.join(SEES)}")


def channels_of(shape: Shape, sees: str) -> int:
    """Channels of this material."""
    return shape.channels if sees == "tower" else shape.width


def runs(size: int, parts: int) -> list[tuple[int, int]]:
    """Windows (start, stop) that cover `size` places evenly, as adaptive pooling has them: they overlap by one place
    where `parts` does not divide `size`."""
    return [(i * size // parts, -(-(i + 1) * size // parts)) for i in range(parts)]


def centres(size: int, parts: int) -> list[int]:
    """The middle place of each of these windows, ascending and distinct for parts <= size."""
    return [(start + stop) // 2 for start, stop in runs(size, parts)]


def sines(places: Sequence[Tensor], width: int) -> Tensor:
    """Sine and cosine positions: the channels are shared out among the axes, each half sines, half cosines, at
    wavelengths from 2 pi to 10,000 times that. places: one (...) tensor per axis. Returns (..., width) float32."""
    each = -(-width // len(places))
    parts = []
    for place in places:
        steps = torch.arange((each + 1) // 2, device=place.device)
        angle = place.float()[..., None] * 10000.0 ** (-2 * steps / max(each, 1))
        parts.append(torch.cat([angle.sin(), angle.cos()], -1)[..., :each])
    return torch.cat(parts, -1)[..., :width]


# -- modules --------------------------------------------------------------------------------------------------------
def heads_of(width: int, size: int) -> int:
    """The number of heads, of about `size` channels, that divides the width."""
    heads = max(1, width // size)
    while width % heads:
        heads -= 1
    return heads


class Attention(nn.Module):
    """Multi-head attention, of rows to themselves or to others of any width."""

    def __init__(self, width: int, heads: int, source: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.kv = nn.Linear(width if source is None else source, 2 * width)

    def forward(self, x: Tensor, source: Tensor | None = None, visible: Tensor | None = None) -> Tensor:
        """x: (B, Q, C), source: (B, S, C'), None = x -> (B, Q, C). visible: bool, broadcastable to (B, 1, Q, S); a
        row that sees nothing gets zeros in front of the last projection."""
        source = x if source is None else source
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(source).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if visible is None:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            blind = ~visible.any(-1, keepdim=True)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible | blind).masked_fill(blind, 0)
        return self.out(y.transpose(1, 2).flatten(2))

    def flops(self, queries: int, sources: int) -> int:
        weights = queries * (self.q.weight.numel() + self.out.weight.numel()) + sources * self.kv.weight.numel()
        return 2 * weights + 4 * queries * sources * self.q.out_features


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm and added to what came in; attention to others between, if asked."""

    def __init__(self, width: int, heads: int, source: int | None = None, ratio: int = 4) -> None:
        super().__init__()
        self.before, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.across = None if source is None else Attention(width, heads, source)
        self.between = None if source is None else nn.LayerNorm(width)
        self.behind = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, ratio * width), nn.GELU(), nn.Linear(ratio * width, width))

    def forward(
        self, x: Tensor, source: Tensor | None = None, visible: Tensor | None = None, seen: Tensor | None = None
    ) -> Tensor:
        """x: (B, Q, C), source: (B, S, C') -> (B, Q, C). visible, seen: masks of the two attentions, as there."""
        x = x + self.attention(self.before(x), visible=visible)
        if self.across is not None and self.between is not None:
            x = x + self.across(self.between(x), source, seen)
        return x + self.mlp(self.behind(x))

    def flops(self, queries: int, sources: int = 0) -> int:
        own = self.attention.flops(queries, queries)
        across = 0 if self.across is None else self.across.flops(queries, sources)
        return own + across + linear_flops(self.mlp, queries)


class Wording(nn.Module):
    """A small encoder of the words around an image: projection, sine positions, blocks, LayerNorm.

    Source   LLaMA-VID's text side, arXiv:2311.17043, sec. 3.1, which starts from a pretrained BERT; this one reads the
             language model's own word embeddings.
    """

    def __init__(self, channels: int, width: int, depth: int) -> None:
        super().__init__()
        self.enter, self.norm = nn.Linear(channels, width), nn.LayerNorm(width)
        self.blocks = ModuleListOf(Block(width, heads_of(width, 64)) for _ in range(depth))

    def forward(self, words: Tensor, real: Tensor) -> Tensor:
        """words: (R, T, d), real: (R, T) bool -> (R, T, width)."""
        place = (real.cumsum(-1) - 1).clamp(min=0)
        x = self.enter(words)
        x = x + sines([place], x.shape[-1]).to(x.dtype)
        for block in self.blocks:
            x = block(x, visible=real[:, None, None])
        return self.norm(x)

    def flops(self, words: int) -> int:
        return 2 * words * self.enter.weight.numel() + sum(b.flops(words) for b in self.blocks)


def mean_of(x: Tensor, real: Tensor) -> Tensor:
    """Mean of the real rows, zero where there are none. x: (R, T, C), real: (R, T) bool -> (R, C)."""
    weight = real[..., None].to(x.dtype)
    return (x * weight).sum(1) / weight.sum(1).clamp_min(1)


def mlp(channels: int, inner: int, width: int) -> nn.Sequential:
    """Linear, GELU, Linear."""
    return nn.Sequential(nn.Linear(channels, inner), nn.GELU(), nn.Linear(inner, width))


def linear_flops(module: nn.Module, rows: int) -> int:
    """Of a module's linear layers and convolutions on so many rows or cells, 2 per weight and row."""
    weighed = (m for m in module.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
    return 2 * rows * sum(m.weight.numel() for m in weighed)
