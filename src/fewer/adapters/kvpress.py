"""Presses of the kvpress library as methods here: `fewer.apply(model, SnapKVPress(compression_ratio=0.5))`.

kvpress 0.5.5 wants transformers < 5.3, this package a later one, so the two are not installed side by side by their
pins. Nothing of kvpress is imported here: a press is anything with its two members,

    compression_ratio                                                            the share of rows that goes
    score(module, hidden_states, keys, values, attentions, kwargs) -> (B, G, S)  higher stays

which is also the shortest way to try a score of one's own that wants the attention module. What kvpress lacks comes
with it: padded batches, bytes really freed, a ledger, beams, and methods that read or store beside it.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor, nn

from ..core import Budget, Card, KeepRatio, Plan, Signals, Tokens
from ..core.budgets import BudgetError
from ..core.cache import CacheReducer, CacheSignals, Rows, top

#: Presses that decide more than scores do, and what does the same here.
OURS = {
    "AdaKVPress": "adakv", "PyramidKVPress": "pyramidkv", "KVzipPress": "kvzip", "ChunkKVPress": "chunkkv",
    "BlockPress": "keydiff", "KeyRerotationPress": "knorm:positions=cache", "MergingPress": "d2o",
}  # fmt: skip
#: Others, and what to do instead.
INSTEAD = {
    "ComposedPress": "give apply a list of methods", "PerLayerCompressionPress": "give apply a method with layers=",
    "DecodingPress": "methods that act while decoding keep their budget at every step: streamingllm, h2o, tova",
    "PrefillDecodingPress": "methods that act while decoding keep their budget at every step: streamingllm, h2o, tova",
    "ThinKPress": "channels of keys are never pruned here; ott stores them in few bits",
    "DMSPress": "tokenbutler and dynamic_context_pruning have learned scores",
    "DuoAttentionPress": "heads with budgets of their own are adakv's",
}  # fmt: skip


class PressError(ValueError):
    """A press that is no score of rows alone."""


@runtime_checkable
class Press(Protocol):
    """What is asked of a press."""

    compression_ratio: float

    def score(
        self, module: nn.Module, hidden_states: Tensor, keys: Tensor, values: Tensor, attentions: Tensor | None,
        kwargs: dict[str, Any],
    ) -> Tensor: ...  # fmt: skip


@dataclass(frozen=True)
class Pressed(CacheReducer):
    """A press at work. It is asked once, when a prompt has filled an empty cache, as kvpress does.

    Every KV head keeps its highest scores, trunc(S (1 - compression_ratio)) rows; `attentions` is None unless the model
    runs its eager attention. Scores see the padding of a batch as tokens; it is dropped first all the same.
    """

    press: Any
    layers: tuple[int, ...] | None = None
    card: ClassVar[Card] = Card("kvpress", "A press of the kvpress library.", "", "prune", "kv-cache", "free")
    attends: ClassVar[bool] = True
    once: ClassVar[bool] = True

    @property
    def budget(self) -> Budget:
        """What the press leaves now: its ratio may be set between prompts."""
        return KeepRatio(1 - self.press.compression_ratio, rounding="trunc")

    def check(self) -> None:
        if not 0 <= self.press.compression_ratio < 1:
            ratio = self.press.compression_ratio
            raise BudgetError(f"compression_ratio={ratio} is outside [0, 1); it is the share of rows that goes")

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        assert isinstance(signals, CacheSignals) and isinstance(tokens, Rows) and signals.attending is not None
        call = signals.attending
        score = self.press.score(call.module, call.hidden, signals.k, signals.v, call.weights, call.arguments)
        return top(score, self.budget, tokens, at=signals.at)

    def attach(self, model: nn.Module, root: nn.Module, attentions: list[nn.Module], undo: ExitStack) -> None:
        """What kvpress does before it starts: let the press look at the model, and attention modules know the rotary
        embedding. The latter comes off again."""
        if hasattr(self.press, "post_init_from_model"):
            self.press.post_init_from_model(model)
        rotary = getattr(root, "rotary_emb", None)
        for module in attentions:
            if rotary is not None and not hasattr(module, "rotary_emb"):
                vars(module)["rotary_emb"] = rotary  # beside the submodules, so that state_dict stays as it is
                undo.callback(vars(module).pop, "rotary_emb", None)


def adapt(item: Any) -> Any:
    """A press as a method; everything else as it is.

    Raises   PressError for a press that changes how rows are cut, naming what does so here, if anything does.
    """
    if isinstance(item, (str, CacheReducer)) or not _is_press(item):
        return item
    line = type(item).__mro__
    cuts = next((c.__name__ for c in line if "compress" in vars(c) or "forward_hook" in vars(c)), "ScorerPress")
    try:
        scores = isinstance(item, Press) and isinstance(item.compression_ratio, float | int)
    except Exception:  # a press of several may have no ratio of its own, and say so by an error
        scores = False
    if not scores or cuts not in ("ScorerPress", "BasePress"):
        name = type(item).__name__
        ours = f"use the method {OURS[name]!r} of this package" if name in OURS else INSTEAD.get(name)
        instead = "" if ours is None else f"; {ours}"
        raise PressError(f"{name} does not only score rows, it cuts them in its own way{instead}")
    return Pressed(item)


def _is_press(item: Any) -> bool:
    """Whether something is a press, whatever it can do."""
    return (
        hasattr(type(item), "compression_ratio")
        or "compression_ratio" in getattr(item, "__dict__", {})
        or any(c.__name__ == "BasePress" for c in type(item).__mro__)
    )
