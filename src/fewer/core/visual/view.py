"""Visual tokens in a language model's sequence: where they stand, and what a method may look at besides them.

A method for vision-language models sees visual rows only: one line of R per image or video (`scope = "image"`) or per
prompt (`scope = "prompt"`). Its plan is made over these rows; the session lifts it to the whole sequence, in which text
and separators stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from .. import attention
from ..attention import Seen
from ..errors import SignalError
from ..tokens import Group

Scope = Literal["image", "prompt"]


@dataclass(frozen=True, eq=False)
class View:
    """The visual rows of a batch of sequences, padded to N per line.

    sample              (R,) long, the sequence each line stands in
    index               (R, N) long, places in that sequence, ascending; those of padding are other rows' places
    valid               (R, N) bool, False = padding; None = all real
    item                (R, N) long, number of the image or video in its sequence
    tile, time, row, column    (R, N) long: the crop of an image, the frame of a video, the cell in it. Rows and columns
                        count within a tile. Of padding they are anything, -1 included
    source              (R, N) long, the row of the vision tower's output (all tiles laid end to end, class tokens left
                        out) it was projected from; None where several share one
    crops               (R, 2) long, the rows and columns of crops (tiles 1 and up, in raster order) that an image was
                        cut into; None = not known
    cells               (height, width) of every tile and frame, where all came in full, row by row; else None
    """

    sample: Tensor
    index: Tensor
    item: Tensor
    tile: Tensor
    time: Tensor
    row: Tensor
    column: Tensor
    valid: Tensor | None = None
    source: Tensor | None = None
    crops: Tensor | None = None
    cells: tuple[int, int] | None = None

    @property
    def lines(self) -> int:
        return self.index.shape[0]

    @property
    def n(self) -> int:
        return self.index.shape[1]

    def of(self, stream: Tensor) -> Tensor:
        """Rows of a stream of the sequence. (B, S, ...) -> (R, N, ...)."""
        return stream[self.sample[:, None], self.index]


class Unplaced(View):
    """The same where it is not known which part of the picture a row shows. Raises SignalError for those who ask."""

    def __getattribute__(self, name: str) -> Any:
        if name in ("row", "column"):
            raise SignalError(
                "where each visual row of this model stands in its picture is not known, so that no method can go by "
                "places; choose one that compares rows or looks at attention, such as divprune or fastv"
            )
        return super().__getattribute__(name)


@dataclass(eq=False)
class Tower:
    """What the vision tower gave. T tiles of P patches each, `prefix` tokens in front of them.

    features   (T * P, C), what enters the projector; where the projector joins patches, P counts the joined ones
    levels     block -> (T * P, C), its output, for the blocks a method names in `taps`
    pixels     (T, 3, h, w), what entered the tower; None where it is not one picture per tile
    project    (*, M, C) -> (*, M, d), the model's projector
    seen       block -> its attention call over (T, H, prefix + P, d); the blocks a method declared in `looks_at`
    layer      the block whose output is used
    cls        (T, C) class tokens of the used layer; None where the tower has none
    """

    features: Tensor
    project: Callable[[Tensor], Tensor]
    layer: int = 0
    seen: Mapping[int, Seen] = field(default_factory=dict)
    prefix: int = 0
    cls: Tensor | None = None
    levels: Mapping[int, Tensor] = field(default_factory=dict)
    pixels: Tensor | None = None


@dataclass(eq=False)
class Visual:
    """What a method may look at besides the visual rows themselves. R lines of N visual rows, S rows in a sequence.

    view      where the visual rows stand
    hidden    (B, S, d), all rows of the sequence at this site
    embedded  (B, S, d), the same rows as they entered the language model
    text      (B, S) bool, True = a text token: neither visual, separator nor padding
    origin    (B, S) long, which row of the prompts each of them was; None where all are there
    real      (B, S) bool, False = padding; None = no padding
    seen      this block's attention call over the sequence; None at the bridge
    tower     what the vision tower gave; None inside a video or where the tower shows nothing
    guide     ((R, N, J), (R, Q, J)): visual rows and pieces of the question in the joint space of an image-text model;
              None without one
    spend     called with FLOPs per sequence
    peek      queries -> the attention (B, H, Q, S) they would pay in the block ahead; None behind the last one and in
              front of a block
    tables    gives the cosine and sine that rotated this block's queries and keys, half-split, (B or 1, S, d) each;
              None where positions are no rotation
    norm      the language model's norm behind its last block; None where it is not known
    """

    view: View
    hidden: Tensor
    text: Tensor
    embedded: Tensor | None = None
    origin: Tensor | None = field(default=None, kw_only=True)
    real: Tensor | None = None
    seen: Seen | None = None
    tower: Tower | None = None
    guide: tuple[Tensor, Tensor] | None = None
    spend: Callable[[int], None] = field(default=lambda flops: None, repr=False)
    peek: Callable[[Group], Tensor] | None = field(default=None, repr=False)
    tables: Callable[[], tuple[Tensor, Tensor]] | None = field(default=None, repr=False)
    norm: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)

    # -- the language model's side ------------------------------------------------------------------------------------
    def attended(self, queries: Group) -> Tensor:
        """(R, H, Q, N) float32: what some rows of the sequence look at, visual columns of the softmax over all keys.

        queries: places in the sequence, a run or (B, Q)."""
        seen = self._seen()
        _, h, s, d = seen.q.shape
        self.spend(2 * h * len(queries) * s * d)
        return self._columns(attention.rows(seen, queries))

    def ahead(self, queries: Group) -> Tensor:
        """The same of the block ahead, whose queries and keys are computed for it: (R, H, Q, N) float32."""
        if self.peek is None:
            raise SignalError("no block is known ahead of this site: act behind a block that is not the last one")
        return self._columns(self.peek(queries))

    def _columns(self, paid: Tensor) -> Tensor:
        """(B, H, Q, S) -> (R, H, Q, N)."""
        paid = paid[self.view.sample]
        index = self.view.index[:, None, None, :].expand(-1, paid.shape[1], paid.shape[2], -1)
        return paid.gather(-1, index)

    def last(self) -> Group:
        """The last real token of each sequence."""
        s = self.hidden.shape[1]
        if self.real is None:
            return Group(s - 1, s)
        where = torch.arange(s, device=self.real.device)
        return Group(index=torch.where(self.real, where, -1).amax(-1, keepdim=True))

    def words(self, behind: bool = True) -> tuple[Tensor, Tensor]:
        """Text tokens of each line's sequence: places (R, T) long, ascending, and (R, T) bool, False = padding.

        behind: only those behind the line's last visual token, where there are any; else all."""
        text = self.text[self.view.sample]
        if behind:
            where = torch.arange(text.shape[1], device=text.device)
            last = self.view.index if self.view.valid is None else self.view.index.masked_fill(~self.view.valid, -1)
            later = text & (where > last.amax(-1, keepdim=True))
            text = torch.where(later.any(-1, keepdim=True), later, text)
        width = int(text.sum(-1).max()) if text.device.type == "cpu" else text.shape[1]
        index = (~text).to(torch.int8).argsort(dim=-1, stable=True)[:, :width]
        return index, text.gather(-1, index)

    def wording(self) -> tuple[Tensor, Tensor]:
        """The same tokens' features: (R, T, d), and (R, T) bool."""
        index, valid = self.words()
        return self.hidden[self.view.sample[:, None], index], valid

    @property
    def keys(self) -> Tensor:
        """(R, G, N, d): this block's keys of the visual rows."""
        k = self._seen().k
        return k.transpose(1, 2)[self.view.sample[:, None], self.view.index].transpose(1, 2)

    def _seen(self) -> Seen:
        if self.seen is None:
            raise SignalError(
                "attention of the language model is not known at the bridge; act behind one of its blocks"
            )
        return self.seen

    # -- the tower's side ---------------------------------------------------------------------------------------------
    def encoder(self) -> Tower:
        """The tower; raises SignalError where it shows nothing."""
        if self.tower is None or self.view.source is None:
            raise SignalError(
                "what the vision tower gave for each visual token is not known here (a video whose frames are pooled, "
                "or a model whose tower cannot be entered); choose a method that looks at the projected tokens alone, "
                "such as divprune"
            )
        return self.tower

    @property
    def features(self) -> Tensor:
        """(R, N, C): what entered the projector, row by row."""
        return self.encoder().features[self.view.source]

    def project(self, rows: Tensor) -> Tensor:
        """(R, M, C) -> (R, M, d), by the model's projector."""
        return self.encoder().project(rows)

    def look(self, layer: int | None = None) -> Seen:
        """The attention call of a tower block; None = the one whose output is used. Negative counts from the end."""
        tower = self.encoder()
        layer = tower.layer if layer is None else layer
        if layer not in tower.seen:
            raise SignalError(f"the tower's block {layer} was not watched: declare it in looks_at")
        return tower.seen[layer]

    def class_attention(self, layer: int | None = None, wide: bool = False) -> Tensor:
        """(R, H, N) float32: attention of each tile's class token, softmax over the tile's whole row.

        wide: all heads taken as one of full width (H = 1), as LLaVA-PruMerge does.
        Raises SignalError for a tower without a class token."""
        tower, seen = self.encoder(), self.look(layer)
        if tower.cls is None:
            raise SignalError(
                "this vision tower has no class token; choose a method that does without, such as divprune"
            )
        if wide:
            q, k, v = (x.transpose(1, 2).flatten(2)[:, None] for x in (seen.q, seen.k, seen.v))
            seen = Seen(q, k, v, q.shape[-1] ** -0.5)
        self._spend_looking(seen, 1)
        return self._rows(attention.rows(seen, Group(0, 1))[:, :, 0, tower.prefix :])

    def received(self, layer: int | None = None) -> Tensor:
        """(R, H, N) float32: attention each patch receives, averaged over the tile's patches."""
        tower, seen = self.encoder(), self.look(layer)
        self._spend_looking(seen, seen.q.shape[2] - tower.prefix)
        mass = attention.mass(seen, Group(tower.prefix, seen.q.shape[2]))[..., tower.prefix :]
        return self._rows(mass / (seen.q.shape[2] - tower.prefix))

    def importance(self, layer: int | None = None) -> Tensor:
        """(R, N) float32: class attention averaged over heads; attention received where there is no class token."""
        if self.encoder().cls is None:
            return self.received(layer).mean(1)
        return self.class_attention(layer).mean(1)

    def offered(self, layer: int | None = None) -> Tensor:
        """(R, H, N, d): keys of a tower block."""
        k = self.look(layer).k[:, :, self.encoder().prefix :]
        return k.transpose(1, 2).flatten(0, 1)[self.view.source].transpose(1, 2)

    def level(self, block: int) -> Tensor:
        """(R, N, C): the output of a tower block named in `taps`, class token left out."""
        tower = self.encoder()
        if block not in tower.levels:
            raise SignalError(f"the output of the tower's block {block} was not kept: name it in taps")
        return tower.levels[block][self.view.source]

    def _spend_looking(self, seen: Seen, queries: int) -> None:
        """So many queries of each tile, asked again: FLOPs per sequence."""
        tiles, heads, n, d = seen.q.shape
        self.spend(2 * heads * queries * n * d * tiles // self.hidden.shape[0])

    def _rows(self, per_patch: Tensor) -> Tensor:
        """(T, H, P) -> (R, H, N)."""
        return per_patch.transpose(1, 2).flatten(0, 1)[self.view.source].transpose(1, 2)
