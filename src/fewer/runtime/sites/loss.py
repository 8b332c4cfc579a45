"""The training loss: which tokens of a text teach."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core import Hard, Plan, Signals, Site, Tokens
from ...core.attention import full_precision
from ...core.place import Place
from ...spec import text
from ..program import Bound, SessionError
from ..trace import BEHIND, Step, Trace

IGNORED = -100  # a label that does not count, as everywhere in transformers


class LossSite:
    """Methods are shown each token's loss, (B, N, 1), and the model's loss becomes the mean of those that stay.

    All tokens are computed. A call without labels is as it was.
    """

    title = "training loss"

    def __init__(self, bound: Bound) -> None:
        self.bound, self.host, self.program = bound, bound.host, bound.program
        self.trace: Trace | None = None

    def attach(self, undo: ExitStack) -> None:
        undo.callback(self.bound.model.register_forward_hook(self._taught, with_kwargs=True).remove)

    def _taught(self, _model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        labels = kwargs.get("labels")
        if labels is None or getattr(output, "loss", None) is None:
            return output
        logits = output.logits
        if self.host.kind in ("decoder", "scan"):  # each position says the next one
            logits, labels = logits[:, :-1], labels[:, 1:]
        if logits.dim() != 3 or logits.shape[:2] != labels.shape:
            raise SessionError(
                f"{text(self.program.methods[0])} chooses which tokens teach, and the labels are of shape "
                f"{tuple(labels.shape)}, not one for each of the {tuple(logits.shape[:2])} positions"
            )
        each = F.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none", ignore_index=IGNORED)
        teaches = self._chosen(each.detach(), labels != IGNORED)
        output.loss = (each * teaches).sum() / teaches.sum().clamp(min=1)
        return output

    def _chosen(self, each: Tensor, valid: Tensor) -> Tensor:
        """(B, N) bool: the tokens that teach. each: (B, N), their losses; valid: (B, N) bool, those with a label."""
        b, n = each.shape
        tokens = Tokens.plain(b, n, 0, device=each.device, valid=valid)
        trace = self.trace = Trace(self.host, tokens, len(self.program.methods), each.element_size(), None)
        front = Plan.keep((~valid).to(torch.int8).argsort(dim=-1, stable=True), n, valid.sum(-1))
        trace.steps.append(Step(-1, -1, front))
        x, tokens = front.gather(each[..., None]), tokens.after(front)
        for turn in self.program.at(Site.LOSS, 0):
            method = self.program.methods[turn.method]
            place = Place(0, 1, 0, 1, n, note=trace.notes.append, starts=valid.sum(-1))
            signals = Signals(
                x, tokens, place, modules=self.bound.modules_of(turn.method, 0), training=self.bound.training,
                memory=trace.memory[turn.method],
            )  # fmt: skip
            with full_precision(x):
                plan = method.plan(signals, tokens)
            if not isinstance(plan, Hard) or plan.averages:
                raise SessionError(f"{text(method)} makes rows that are no tokens; choose a method that only prunes")
            trace.steps.append(Step(-1, turn.method, plan))
            x, tokens = plan.gather(x), tokens.after(plan)
        trace.tokens, lengths = tokens, tokens.unpadded.sum(-1)
        for block in trace.blocks:
            block.rows, block.computed = [n] * 3, [[n]] * 3
            block.rows[BEHIND], block.lengths[BEHIND] = tokens.n, lengths
        trace.notes.append("all tokens are computed; those that are counted teach")
        chosen = torch.zeros(b, n + 1, dtype=torch.bool, device=each.device)
        return chosen.scatter(1, torch.where(tokens.unpadded, tokens.place(), n), True)[:, :n]
