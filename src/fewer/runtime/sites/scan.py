"""A pass over a state-space model."""

from __future__ import annotations

from torch import Tensor

from ...core import Plan, Reducer, Soft, Tokens
from ...hosts import Call, HostError
from .blocks import Pass


def check_causal(plan: Plan) -> None:
    """Raises HostError for rows that are made of all tokens at once."""
    if isinstance(plan, Soft):
        raise HostError(
            "the rows of this method are mixtures of all tokens, and none of them has a place in a causal text; choose "
            "a method that prunes or merges"
        )


class StateSpaceRun(Pass):
    """A pass over a state-space model: no mask but which rows are real. The last token of each sample stays: the next
    one is predicted from it."""

    def opening(self, tokens: Tokens) -> Tokens:
        return tokens.protect(tokens.last)

    def leaving(self, reducer: Reducer, plan: Plan, x: Tensor, layer: int) -> None:
        check_causal(plan)

    def call(self, layer: int) -> Call:
        if self.tokens.policy is not None:
            raise HostError(
                "a state-space model cannot leave out masked rows, which the training form of a method needs; call "
                "model.eval(), or train on a model with attention"
            )
        call = Call()
        call.real = self.tokens.valid if self.steps else None
        return call

    def bias(self, layer: int, full: Tensor | None) -> Tensor | None:
        return None if self.steps else full
