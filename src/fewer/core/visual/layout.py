"""Which rows of a batch of prompts are visual, and where each stands in its image or video."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..plan import Hard, on_device
from ..tokens import Tokens
from .view import Scope, Unplaced, View


@dataclass(frozen=True, eq=False)
class Item:
    """The visual features of one image or video, in the order in which they stand in the prompt.

    tile, time, row, column, source    (n,) long each, see `View`; source None where no row of the tower's output is one
    separator    (n,) bool, True = a learned row between others (a line's end) that shows nothing; None = none is
    crops        rows and columns of crops (tiles 1 and up, in raster order); None = not cut
    placed       whether row and column are places; False = rows are counted, where they stand is not known
    """

    tile: Tensor
    time: Tensor
    row: Tensor
    column: Tensor
    source: Tensor | None = None
    separator: Tensor | None = None
    crops: tuple[int, int] | None = None
    placed: bool = True

    def __len__(self) -> int:
        return self.row.shape[0]

    @property
    def grid(self) -> tuple[int, int] | None:
        """(height, width) of one full tile, row by row; None for anything else."""
        height, width = int(self.row.max()) + 1, int(self.column.max()) + 1
        shown = len(self) if self.separator is None else int((~self.separator).sum())
        one = self.placed and shown == height * width and not (self.tile.any() or self.time.any())
        return (height, width) if one else None

    @property
    def cells(self) -> tuple[int, int] | None:
        """(height, width) of every tile and frame, where all are full and stand row by row; None for anything else."""
        if not self.placed:
            return None
        row, column = (x if self.separator is None else x[~self.separator] for x in (self.row, self.column))
        height, width = int(row.max()) + 1, int(column.max()) + 1
        cell = torch.arange(len(row))
        fits = (row == cell // width % height) & (column == cell % width)
        return (height, width) if len(row) % (height * width) == 0 and bool(fits.all()) else None

    @classmethod
    def in_line(cls, rows: int, first: int | None = None) -> Item:
        """Rows of which only the order is known."""
        order, none = torch.arange(rows), torch.zeros(rows, dtype=torch.long)
        return cls(none, none, none, order, None if first is None else first + order, placed=False)

    @classmethod
    def raster(cls, frames: int, height: int, width: int, tiles: int = 1, first: int | None = None) -> Item:
        """Tiles of frames of height x width cells, each row by row. first: the source of the first feature."""
        sides = [torch.arange(n) for n in (tiles, frames, height, width)]
        tile, time, row, column = (g.flatten() for g in torch.meshgrid(*sides, indexing="ij"))
        return cls(tile, time, row, column, None if first is None else first + torch.arange(len(tile)))


@dataclass(frozen=True, eq=False)
class Layout:
    """Every row of a batch of B prompts of S tokens.

    line      (B, S) long, the image or video a row belongs to, counted through the batch; -1 = none
    text      (B, S) bool, True = neither visual nor a separator nor padding
    item, tile, time, row, column, source    (B, S) long, see `View`; -1 where line is
    samples, counts    of each line: the prompt it stands in, its visual rows
    located   whether `source` is known
    lengths   of each prompt: its rows without padding
    ends_in_text    whether no prompt's last row, which always stays, is visual
    grid      (height, width) of the images where each is one tile of that size; None elsewhere
    cells     (height, width) of every tile and frame, where all are full; None elsewhere
    crops     (lines, 2) long, rows and columns of crops of each line, 0 where it is not cut; None where none is
    placed    whether it is known where rows stand in their picture
    """

    line: Tensor
    text: Tensor
    item: Tensor
    tile: Tensor
    time: Tensor
    row: Tensor
    column: Tensor
    source: Tensor
    samples: tuple[int, ...]
    counts: tuple[int, ...]
    lengths: tuple[int, ...]
    located: bool
    ends_in_text: bool
    grid: tuple[int, int] | None = None
    cells: tuple[int, int] | None = None
    crops: Tensor | None = None
    placed: bool = True

    @classmethod
    def of(cls, shape: tuple[int, int], items: Sequence[Item], places: Sequence[Tensor], real: Tensor | None,
           device: torch.device) -> Layout:  # fmt: skip
        """From items and their places: (n,) long each, into the flattened (B * S) rows. real: (B, S) bool, no padding.

        Everything but the result lies on the CPU."""
        b, s = shape
        names = ("line", "item", "tile", "time", "row", "column", "source")
        streams = {name: torch.full((b * s,), -1) for name in names}
        text = torch.ones(b * s, dtype=torch.bool) if real is None else real.reshape(-1).clone()
        samples, counts, seen, grids, cells = [], [], [0] * b, set(), set()
        located = all(item.source is not None for item in items)
        for number, (item, where) in enumerate(zip(items, places, strict=True)):
            text[where] = False
            shown = torch.ones(len(item), dtype=torch.bool) if item.separator is None else ~item.separator
            where, sample = where[shown], int(where[0]) // s
            streams["line"][where] = number
            streams["item"][where] = seen[sample]
            for name in ("tile", "time", "row", "column"):
                streams[name][where] = getattr(item, name)[shown]
            if located and item.source is not None:
                streams["source"][where] = item.source[shown]
            seen[sample] += 1
            samples.append(sample)
            counts.append(int(shown.sum()))
            grids.add(item.grid)
            cells.add(item.cells)
        last = torch.arange(s).expand(b, s) if real is None else torch.where(real, torch.arange(s), -1)
        ends = bool((streams["line"].view(b, s).gather(-1, last.amax(-1, keepdim=True).clamp(min=0)) < 0).all())
        cut = [item.crops or (0, 0) for item in items]
        crops = torch.tensor(cut, device=device) if any(item.crops for item in items) else None
        moved = {name: stream.view(b, s).to(device) for name, stream in streams.items()}
        return cls(
            text=text.view(b, s).to(device),
            samples=tuple(samples),
            counts=tuple(counts),
            lengths=(s,) * b if real is None else tuple(real.sum(-1).tolist()),
            located=located,
            ends_in_text=ends,
            crops=crops,
            grid=grids.pop() if len(grids) == 1 else None,
            cells=cells.pop() if len(cells) == 1 else None,
            placed=all(item.placed for item in items),
            **moved,
        )

    @property
    def visual(self) -> Tensor:
        """(B, S) bool."""
        return self.line >= 0


@dataclass(frozen=True, eq=False)
class Standing:
    """How many visual rows are still there, of each line and of each prompt that has any; and all rows of each prompt.

    exact, exact_totals    whether the first two are the numbers, not only bounds from above
    rows      of each prompt, at most: text, separators and visual rows
    """

    counts: tuple[int, ...]
    totals: tuple[int, ...]
    rows: tuple[int, ...]
    exact: bool = True
    exact_totals: bool = True

    @classmethod
    def of(cls, layout: Layout) -> Standing:
        """At the start."""
        return cls(layout.counts, _totals(layout, layout.counts), layout.lengths)

    def of_scope(self, image: bool) -> tuple[tuple[int, ...], bool]:
        """The numbers, and whether they are exact, of lines that are images or of those that are prompts."""
        return (self.counts, self.exact) if image else (self.totals, self.exact_totals)

    def reduced(self, layout: Layout, scope: Scope, most: Sequence[int], exact: bool) -> Standing:
        """With at most so many rows left of each line, or with just so many of each."""
        image, rows = scope == "image", list(self.rows)
        before, known = self.of_scope(image)
        left = tuple(map(min, before, most))
        if known:
            for sample, old, new in zip(layout.samples if image else _prompts(layout), before, left, strict=True):
                rows[sample] -= old - new
        if image:
            return Standing(left, _totals(layout, left), tuple(rows), exact, exact)
        totals = dict(zip(_prompts(layout), left, strict=True))
        counts = tuple(min(c, totals[s]) for c, s in zip(self.counts, layout.samples, strict=True))
        return Standing(counts, left, tuple(rows), False, exact)


def _prompts(layout: Layout) -> tuple[int, ...]:
    return tuple(sorted(set(layout.samples)))


def _totals(layout: Layout, counts: Sequence[int]) -> tuple[int, ...]:
    return tuple(sum(c for s, c in zip(layout.samples, counts, strict=True) if s == b) for b in _prompts(layout))


def view(layout: Layout, standing: Standing, tokens: Tokens, scope: Scope) -> View:
    """The visual rows among those that are left, a line per image or per prompt.

    tokens: their `place` says which rows of the layout are left. No synchronisation: widths come from `standing`."""
    place, device = tokens.place(), layout.line.device
    left = layout.line.gather(-1, place)
    if tokens.valid is not None:
        left = left.masked_fill(~tokens.valid, -1)
    counts, exact = standing.of_scope(scope == "image")
    if scope == "image":
        sample = on_device(list(layout.samples), device)
        mine = left[sample] == torch.arange(len(layout.samples), device=device)[:, None]
    else:
        sample = on_device(list(_prompts(layout)), device)
        mine = left[sample] >= 0
    width = min(max(counts), tokens.n)
    index = (~mine).to(torch.int8).argsort(dim=-1, stable=True)[:, :width]
    whole = exact and len(set(counts)) == 1
    valid = None if whole else mine.gather(-1, index)
    origin = place[sample].gather(-1, index)
    streams = {
        name: getattr(layout, name)[sample[:, None], origin] for name in ("item", "tile", "time", "row", "column")
    }
    source = layout.source[sample[:, None], origin].clamp(min=0) if layout.located else None
    crops = layout.crops if scope == "image" else None
    kind = View if layout.placed else Unplaced
    return kind(sample, index, valid=valid, source=source, crops=crops, cells=layout.cells, **streams)


def lifted(
    plan: Hard, seen: View, tokens: Tokens, scope: Scope, standing: Standing, layout: Layout
) -> tuple[Hard, Standing]:
    """A plan over visual rows as one over all rows: text, separators and what is protected stay.

    plan: (R, N) -> (R, M). Returns the plan of the whole sequence, rows ascending, and who is left of each line."""
    b, n = tokens.batch, tokens.n
    slot = seen.index.gather(-1, plan.anchor)
    real = plan.valid
    if seen.valid is not None:
        stays = seen.valid.gather(-1, plan.anchor)
        real = stays if real is None else real & stays
    gone = _marked(seen.index, seen.valid, seen.sample, b, n)
    kept = _marked(slot, real, seen.sample, b, n)
    keep = ~gone | kept
    if tokens.guarded is not None:
        keep = keep | tokens.guarded
    if tokens.valid is not None:
        keep = keep & tokens.valid
    after = standing.reduced(layout, scope, [plan.m] * seen.lines, real is None)
    order = (~keep).to(torch.int8).argsort(dim=-1, stable=True)
    width = min(max(after.rows), n) if layout.ends_in_text else n
    if real is None and tokens.valid is None and layout.ends_in_text and len(set(after.rows)) == 1:
        return Hard(n, order[:, :width]), after
    return Hard(n, order[:, :width], length=keep.sum(-1)), after


def _marked(index: Tensor, valid: Tensor | None, sample: Tensor, b: int, n: int) -> Tensor:
    """(B, n) bool: the rows named by (R, M) indices of the lines' samples."""
    flat = sample[:, None] * n + index
    if valid is not None:
        flat = torch.where(valid, flat, b * n)
    mask = torch.zeros(b * n + 1, dtype=torch.bool, device=index.device)
    mask[flat.reshape(-1)] = True
    return mask[:-1].view(b, n)


def written(x: Tensor, rows: Tensor, slot: Tensor, sample: Tensor, valid: Tensor | None) -> Tensor:
    """x (B, n, C) with rows (R, M, C) at places slot (R, M) of the lines' samples; padding goes nowhere."""
    b, n, c = x.shape
    flat = sample[:, None] * n + slot
    if valid is not None:
        flat = torch.where(valid, flat, b * n)
    roomy = torch.cat([x.reshape(b * n, c), x.new_zeros(1, c)])
    roomy = roomy.index_put((flat.reshape(-1),), rows.reshape(-1, c).to(x.dtype))
    return roomy[:-1].view(b, n, c)
