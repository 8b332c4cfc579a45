"""The training loss: which tokens of a text teach."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
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
        if labels is None:
            return output
        if getattr(output, "loss", None) is None:
            raise SessionError(
                f"{text(self.program.methods[0])} chooses which tokens teach, and {type(output).__name__} has no "
                "loss to choose in: call the model with return_dict=True"
            )
        logits = output.logits
        if self.host.kind in ("decoder", "scan"):  # each position says the next one
            logits, labels = logits[:, :-1], labels[:, 1:]
        if logits.dim() != 3 or logits.shape[:2] != labels.shape:
            raise SessionError(
                f"{text(self.program.methods[0])} chooses which tokens teach, and the labels are of shape "
                f"{tuple(labels.shape)}, not one for each of the {tuple(logits.shape[:2])} positions"
            )
        valid = labels != IGNORED

        def against() -> Tensor:
            return self._asked(args, kwargs, labels, logits.shape[-1]).masked_fill(~valid, 0)

        each = F.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none", ignore_index=IGNORED)
        teaches, share, among = self._chosen(each.detach(), valid, against)
        items = kwargs.get("num_items_in_batch")  # of all steps whose gradients are added up
        output["loss"] = (each * teaches).sum() / ((among if items is None else items) * share).clamp(min=1)
        return output

    def _asked(self, args: tuple, kwargs: dict[str, Any], labels: Tensor, words: int) -> Tensor:
        """(B, N) float32: the reference model's losses of the same labels."""
        guide = self.bound.guide
        if not isinstance(guide, nn.Module):
            raise SessionError(f"guide={guide!r}: what losses are held against is a model, such as a smaller one")
        given = {k: v for k, v in kwargs.items() if k not in ("labels", "num_items_in_batch")}
        with torch.no_grad():
            answer: Any = guide(*args, **given)
        logits = answer.logits[:, : labels.shape[1]]
        if logits.shape[-1] != words:
            raise SessionError(
                f"the reference model knows {logits.shape[-1]} tokens and the model {words}: both must have the same"
            )
        return F.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none", ignore_index=IGNORED)

    def _chosen(self, each: Tensor, valid: Tensor, against: Callable[[], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N) bool: the tokens that teach; which share of those with a label that is, and of how many: of several
        processes that train together the share in all, and the mean number.

        each: (B, N), their losses; valid: (B, N) bool, those with a label; against: what they cost the reference.
        """
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
                against=None if self.bound.guide is None else partial(_rows, against, tokens),
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
        chosen = chosen.scatter(1, torch.where(tokens.unpadded, tokens.place(), n), True)[:, :n]
        counts, processes = _of_all(torch.stack([chosen.sum(), valid.sum()]))
        return chosen, counts[0] / counts[1].clamp(min=1), counts[1] / processes


def _of_all(counts: Tensor) -> tuple[Tensor, int]:
    """Counts summed over the processes that train together, and how many these are; one alone where nothing learns."""
    if not (torch.is_grad_enabled() and dist.is_available() and dist.is_initialized()):
        return counts, 1
    dist.all_reduce(counts)
    return counts, dist.get_world_size()


def _rows(against: Callable[[], Tensor], tokens: Tokens) -> Tensor:
    """What the tokens that are left cost the reference model, (B, N)."""
    return against().gather(1, tokens.place())
