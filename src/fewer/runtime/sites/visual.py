"""A decoder reads a prompt with visual rows in it: the pass in which methods see those rows only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...compat import without_cache
from ...core import (
    Group,
    Hard,
    Masked,
    Plan,
    Reducer,
    Seen,
    Signals,
    Tokens,
    View,
    Visual,
    VisualReducer,
    attention,
)
from ...core.errors import SignalError
from ...core.place import Place
from ...core.plan import on_device, take
from ...core.visual import acts_on_visual_rows
from ...core.visual.layout import Standing, lifted, view, written
from ...hosts import Call
from ..trace import Step
from .blocks import Beside, BlockSite
from .compact_positions import at_positions
from .prefill import DecoderPrefill
from .visual_context import VisualContext

if TYPE_CHECKING:
    from ..kv.layer import ReducedLayer


class VisualPrefill(DecoderPrefill):
    """A reading whose prompts hold visual rows: methods made for them plan over these, text and separators stay."""

    def __init__(
        self, site: BlockSite, x: Tensor, at: Mapping[int, ReducedLayer], valid: Tensor | None, at_rope: Tensor | None,
        context: VisualContext, *, compact: bool, answers: Tensor | None,
    ) -> None:  # fmt: skip
        super().__init__(site, x, at, valid, at_rope)
        self.context, self.renumbers, self.answers = context, compact, answers
        self.trace.beside, context.embedded, self.embedded = context, x, x
        self.standing = Standing.of(context.layout)
        self._kwargs: dict[str, Any] = {}
        self._renumbered: tuple[Tensor, Tensor] | None = None  # places of this block's rows, and their new positions

    # -- the sites ----------------------------------------------------------------------------------------------------
    def bias(self, layer: int, full: Tensor | None) -> Tensor | None:
        """As of any prefill; of blocks that keep a state, those without padding only.

        Raises   SignalError where prompts are left with different numbers of rows and some blocks keep a state.
        """
        if not self.steps or self.host.layers[layer].attention is not None:
            return super().bias(layer, full)
        if self.tokens.valid is not None and not bool(self.tokens.valid.all()):
            raise SignalError(
                "prompts of this batch are left with different numbers of rows, and blocks of this model keep a "
                "state that would read the padding behind the shorter ones; give it prompts and pictures of one "
                "length, or one prompt at a time"
            )
        return None

    def before(self, layer: int, x: Tensor) -> Tensor:
        if layer == 0 and self.context.present is not None:
            x = self._without_absent(x)
        return super().before(layer, x)

    def after(self, layer: int, x: Tensor, call: Call) -> Tensor:
        return super().after(layer, self.context.deepened(layer, x, self.tokens.place()), call)

    def streams(self, layer: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        self._kwargs, self._renumbered = kwargs, None
        moved = super().streams(layer, kwargs)
        held = self.at.get(layer)
        old = None if held is None else held.shift
        if not self.renumbers or not (self.steps or old is not None):
            return moved
        ids = kwargs.get("position_ids")
        first = self.tokens.place()[:, :1]
        first = self.start + first if ids is None else ids.expand(len(first), -1).gather(-1, first)
        if old is not None:
            first = first - old[:, None]
        if held is not None:
            left = first.new_full(first.shape[:1], self.tokens.n)
            here = left if self.tokens.valid is None else self.tokens.valid.sum(-1)
            entered = self.first.n if self.first.valid is None else self.first.valid.sum(-1)
            gone = entered - here
            held.shift = gone if old is None else old + gone
        at = first + torch.arange(self.tokens.n, device=first.device)
        self._renumbered = self.tokens.place(), at
        return at_positions(self.decoder, layer, moved, at)

    def _without_absent(self, x: Tensor) -> Tensor:
        """Rows whose patches were dropped inside the vision tower stand empty in the prompt: they go."""
        layout, present = self.context.layout, self.context.present
        assert present is not None
        if self.tokens.valid is not None:
            x, _ = self._gathered(x, Beside(), self.tokens.valid, 0)
        place = self.tokens.place()
        source = layout.source.gather(-1, place)
        keep = (source < 0) | present[source.clamp(min=0)]
        width: int | None = None
        if self.context.share is not None and layout.located:
            kept, of = self.context.share
            most = [c * kept // of for c in layout.counts]
            self.standing = self.standing.reduced(layout, "image", most, True)
            width = max(self.standing.rows)
        else:
            self.standing = replace(self.standing, exact=False, exact_totals=False)
        if self.tokens.valid is not None:
            keep = keep & self.tokens.valid
        order = (~keep).to(torch.int8).argsort(dim=-1, stable=True)[:, :width]
        same = width is not None and self.tokens.valid is None and len(set(self.standing.rows)) == 1
        plan = Plan.keep(order, self.tokens.n, None if same else keep.sum(-1))
        self.steps.append(Step(-1, -1, plan, x))
        self.tokens = self.tokens.after(plan)
        return plan.gather(x)

    # -- plans --------------------------------------------------------------------------------------------------------
    def leaving(self, reducer: Reducer, plan: Plan, x: Tensor, layer: int) -> None:
        super().leaving(reducer, plan, x, layer)
        if not acts_on_visual_rows(reducer):  # the device alone knows how many of those that go are visual
            self.standing = replace(self.standing, exact=False, exact_totals=False)

    def _all_stay(self, reducer: Reducer, tokens: Tokens, place: Place) -> bool:
        if not acts_on_visual_rows(reducer):
            return super()._all_stay(reducer, tokens, place)
        if reducer.adaptive or getattr(reducer, "changes", False):
            return not any(self.standing.totals)
        image = _scope(reducer) == "image"
        counts, exact = self.standing.of_scope(image)
        start, _ = Standing.of(self.context.layout).of_scope(image)
        quiet = replace(place, note=lambda _: None)
        stays = (reducer.budget.keep(c, replace(quiet, start=s)) == c for c, s in zip(counts, start, strict=True))
        return not any(counts) or (exact and all(stays))

    def _planned(
        self, method: int, hidden: Tensor, tokens: Tokens, place: Place, seen: Seen | None, branch: Tensor | None
    ) -> tuple[Plan, Tensor]:
        reducer = self.program.methods[method]
        if not acts_on_visual_rows(reducer):
            return super()._planned(method, hidden, tokens, place, seen, branch)
        layout, scope = self.context.layout, _scope(reducer)
        shown = view(layout, self.standing, tokens, scope)
        inner = Tokens.plain(shown.lines, shown.n, device=hidden.device, valid=shown.valid)
        start, _ = Standing.of(layout).of_scope(scope == "image")
        alike = shown.valid is None and len(set(start)) == 1
        starts = None if alike else on_device(list(start), hidden.device)
        signals = Signals(
            shown.of(hidden), inner, replace(place, start=max(start), starts=starts), None, layout.grid,
            self.bound.modules_of(method, place.stage), self.bound.training, self.trace.memory[method],
            beside=self._beside(shown, hidden, tokens, place, seen, reducer.site.sees_attention),
        )  # fmt: skip
        plan = reducer.plan(signals, inner)
        if isinstance(plan, Masked):
            policy = torch.ones(*hidden.shape[:2], 1, device=hidden.device)
            policy = written(policy, plan.policy[..., None], shown.index, shown.sample, shown.valid)
            return Plan.mask(policy[..., 0]), hidden
        anchors = plan if isinstance(plan, Hard) else Plan.keep(plan.position, plan.n, plan.lengths)
        untrimmed = anchors
        if reducer.adaptive:  # the device alone knows how many stay: one look, or the others would be carried along
            anchors = anchors.trimmed()
        rows = None
        if isinstance(reducer, VisualReducer) and type(reducer).rows is not VisualReducer.rows:
            rows = reducer.rows(signals, plan)
        elif untrimmed is not plan or untrimmed.averages:
            rows = plan.reduce(signals.hidden)
        if rows is not None:
            rows = rows[:, : anchors.m]
            slot, real = shown.index.gather(-1, anchors.anchor), _real(anchors, shown)
            if not getattr(reducer, "changes", False):  # lines that lose nothing here are as they would be alone
                had = shown.n if shown.valid is None else shown.valid.sum(-1)
                left = anchors.m if real is None else real.sum(-1)
                whole = torch.as_tensor(left == had, device=hidden.device).expand(shown.lines)
                rows = torch.where(whole[:, None, None], take(signals.hidden, anchors.anchor).to(rows.dtype), rows)
            hidden = written(hidden, rows, slot, shown.sample, real)
        full, self.standing = lifted(anchors, shown, tokens, scope, self.standing, layout)
        return full, hidden

    def _given(self) -> dict[str, Any]:
        """A block's arguments at the rows that are left, without a cache: to look at its attention before it runs."""
        given = {**super().streams(0, without_cache(self._kwargs)), "attention_mask": None}
        return {name: value for name, value in given.items() if name != "use_cache"}

    def _beside(
        self, shown: View, hidden: Tensor, tokens: Tokens, place: Place, seen: Seen | None, behind: bool
    ) -> Visual:
        """behind: whether the site is behind its block's attention, so that the block ahead is the next one."""
        origin = tokens.place()
        text = self.context.layout.text.gather(-1, origin)
        if tokens.valid is not None:
            text = text & tokens.valid
        if self.answers is not None:
            text = text & ~self.answers.gather(-1, origin)
        ahead_known = behind and place.layer + 1 < place.layers

        def tables() -> tuple[Tensor, Tensor]:
            given = self._kwargs["position_embeddings"]
            if self._renumbered is not None:
                standing, at = self._renumbered
                new = at.new_zeros(len(standing), self.first.n).scatter(-1, standing, at.expand_as(standing))
                rotary = self.decoder.rotary(place.layer)
                assert rotary is not None
                return rotary.tables(new.gather(-1, origin), given[0].dtype)
            cos, sin = (take(t.expand(len(origin), -1, -1), origin) for t in given)
            return cos, sin

        def peek(queries: Group) -> Tensor:
            given = {**self._given(), "position_embeddings": tables()}
            upcoming = self.decoder.peek(place.layer + 1, hidden, given, tokens.valid)
            return attention.rows(upcoming, queries)

        return Visual(
            shown, hidden, text, take(self.embedded, origin), tokens.valid, seen, self.context.tower,
            self.context.guide(shown), place.spend, peek if ahead_known else None,
            tables if "position_embeddings" in self._kwargs else None, self.host.final_norm, origin=origin,
        )  # fmt: skip


def _scope(reducer: Reducer) -> Any:
    return getattr(reducer, "scope", "image")


def _real(plan: Hard, shown: View) -> Tensor | None:
    """(R, M) bool: which of a plan's rows are no padding; None = all."""
    stays = None if shown.valid is None else shown.valid.gather(-1, plan.anchor)
    if plan.valid is None or stays is None:
        return plan.valid if stays is None else stays
    return plan.valid & stays
