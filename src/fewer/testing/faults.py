"""Something broken for every check: methods and hosts that a check must refuse, so that no check can always pass."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fewer.core import Budget, Group, Hard, Plan, Reducer, Remove, Signals, Threshold, Tokens, reducer, select
from fewer.hosts import Call
from fewer.runtime.costs import Ledger
from fewer.runtime.session import Session

from . import checks
from .hosts import TinyHost


def planted(cls: type[Reducer]) -> type[Reducer]:
    """Turn a class with a `plan` into a method that exists only here."""
    broken = dataclass(frozen=True)(cls)
    return reducer(cls.__name__.lower(), paper="none", acts="prune", on="vision", training="free")(broken)


def norms(x: Tensor) -> Tensor:
    """(B, N), float32: lengths of the features, an honest score."""
    return x.float().norm(dim=-1)


@planted
class Honest(Reducer):
    """Nothing wrong with it: the longest tokens stay."""

    budget: Budget = Remove(3)

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        return select.top(norms(signals.hidden), self.budget, tokens, at=signals.at)


@planted
class DropsOneAnyway(Honest):
    """Told to keep everything, lets the last token go."""

    budget: Budget = Threshold(0.0)

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        return Plan.keep(torch.arange(tokens.n - 1, device=signals.device).expand(tokens.batch, -1), tokens.n)


@planted
class SampleZeroDecides(Honest):
    """The first image's scores rank the tokens of all."""

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        score = norms(signals.hidden)[:1].expand(tokens.batch, -1)
        return select.top(score, self.budget, tokens, at=signals.at)


@planted
class PaddingVotes(Honest):
    """Scores are distances to a mean in which padding counts."""

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        away = norms(signals.hidden - signals.hidden.mean(dim=1, keepdim=True))
        return select.top(away, self.budget, tokens, at=signals.at)


@planted
class TossesACoin(Honest):
    """Random scores without a seed."""

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        return select.top(torch.rand_like(norms(signals.hidden)), self.budget, tokens, at=signals.at)


@planted
class RootOfZero(Honest):
    """Rows are weighted by the root of something that is zero: its slope is infinite."""

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        slope = (signals.hidden.float().sum(-1) * 0).sqrt()
        return Plan.soft(torch.diag_embed(1 + slope)[:, :-3])


@planted
class CountsByDtype(Honest):
    """Drops one token more in half precision."""

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        more = int(signals.hidden.dtype != torch.float32)
        return select.top(norms(signals.hidden), Remove(3 + more), tokens, at=signals.at)


@planted
class RanksTheCLS(Honest):
    """Forgets that some tokens are protected."""

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        score = norms(signals.hidden)
        score[:, 0] = -1
        return select.top(score, self.budget, replace(tokens, prefix=0), at=signals.at)


@planted
class OneTooMany(Honest):
    """Keeps one token more than it may."""

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        return select.top(norms(signals.hidden), Remove(2), tokens, at=signals.at)


@planted
class CountsTwice(Honest):
    """The last token stands for two rows."""

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        where = torch.arange(tokens.n - 2, device=signals.device)
        twice = torch.cat([where, where[-1:]])
        return Hard(tokens.n, twice.expand(tokens.batch, -1))


@planted
class PopsItsSchedule(Honest):
    """Takes its counts from a shared list that it fills anew when it is empty: an exception leaves it half eaten."""

    schedule: ClassVar[list[int]] = []

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        if not self.schedule:
            self.schedule.extend([1, 2, 6])
        return select.top(norms(signals.hidden), Remove(self.schedule.pop()), tokens, at=signals.at)


@planted
class AsksForAnItem(Honest):
    """Reads a value back to decide something."""

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        score = norms(signals.hidden)
        return select.top(score if score.sum().item() > 0 else -score, self.budget, tokens, at=signals.at)


@planted
class LooksAtTheLast(Honest):
    """Ranks by the attention of the last token, whether it is real or not."""

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        score = signals.attention_rows(Group(tokens.n - 1, tokens.n)).mean(dim=(1, 2))
        return select.top(score, self.budget, tokens, at=signals.at)


@dataclass(frozen=True)
class DeafHost(TinyHost):
    """Masked tokens are still attended to."""

    def session(self, model: nn.Module, method: Reducer, **options: Any) -> Session:
        session = super().session(model, method, **options)
        attending = session.host.attending

        def deaf(layer: int, call: Call, x: Tensor) -> AbstractContextManager[Any]:
            call.policy = None
            return attending(layer, call, x)

        session.host.attending = deaf  # type: ignore[method-assign]
        return session


@dataclass(frozen=True)
class LeavesOneHook(TinyHost):
    """A hook stays behind on a block, where it does nothing."""

    def session(self, model: nn.Module, method: Reducer, **options: Any) -> Session:
        session = super().session(model, method, **options)
        session.host.blocks[0].register_forward_hook(lambda *_: None)
        return session


class _UpsideDown(Session):
    """A session that restores from the bottom up."""

    def restore(self, features: Tensor, fill: float | Tensor = 0.0) -> Tensor:
        return super().restore(features, fill).flip(1)


@dataclass(frozen=True)
class RestoresUpsideDown(TinyHost):
    """Rows return to the wrong patches."""

    def session(self, model: nn.Module, method: Reducer, **options: Any) -> Session:
        session = super().session(model, method, **options)
        session.__class__ = _UpsideDown
        return session


class _Flattering(Session):
    """A session whose ledger counts one row less in the MLP of the last block."""

    @property
    def ledger(self) -> Ledger:
        ledger = super().ledger
        ran = ledger.entries[-1].ran
        assert ran is not None
        ran.mlp -= 1
        return ledger


@dataclass(frozen=True)
class FlattersItself(TinyHost):
    """The ledger says less than was computed."""

    def session(self, model: nn.Module, method: Reducer, **options: Any) -> Session:
        session = super().session(model, method, **options)
        session.__class__ = _Flattering
        return session


@dataclass(frozen=True)
class Fault:
    """A broken method, or an honest one on a broken host."""

    method: Reducer
    host: TinyHost = field(default_factory=TinyHost)


FAULTS: dict[checks.Check, list[Fault]] = {
    checks.keep_all_is_identity: [Fault(DropsOneAnyway())],
    checks.batch_changes_nobody: [Fault(SampleZeroDecides())],
    checks.padding_changes_nothing: [Fault(PaddingVotes()), Fault(LooksAtTheLast())],
    checks.masked_equals_gathered: [Fault(Honest(), DeafHost())],
    checks.same_input_same_output: [Fault(TossesACoin())],
    checks.gradients_reach: [Fault(RootOfZero())],
    checks.dtypes: [Fault(CountsByDtype())],
    checks.protected_survive: [Fault(RanksTheCLS())],
    checks.budget_is_met: [Fault(OneTooMany())],
    checks.trace_is_partition: [Fault(CountsTwice())],
    checks.restore_has_shape_and_order: [Fault(Honest(), RestoresUpsideDown())],
    checks.ledger_counts_what_ran: [Fault(Honest(), FlattersItself())],
    checks.exception_leaves_clean: [Fault(PopsItsSchedule())],
    checks.removal_is_exact: [Fault(Honest(), LeavesOneHook())],
    checks.no_sync: [Fault(AsksForAnItem())],
}
