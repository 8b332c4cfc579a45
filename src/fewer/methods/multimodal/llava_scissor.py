"""LLaVA-Scissor: tokens that hang together become one, in each frame, then over all of them. arXiv:2506.21862."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewer.core import Budget, BudgetError, Plan, Signals, Threshold, Tokens, VisualReducer, reducer
from fewer.core.match import unit
from fewer.core.visual.frames import by_frame, rows_of


@reducer("llava_scissor", paper="arXiv:2506.21862", acts="merge", on="multimodal", training="free")
@dataclass(frozen=True)
class LLaVAScissor(VisualReducer):
    """Semantic connected components: two tokens are linked whose cosine exceeds a threshold; what is connected becomes
    its mean. First in every frame, then once over what all frames gave. At last every token joins the representative it
    is most like, which counts as one more.

    budget: the cosine above which tokens are linked. There is no number that stays: the picture decides.

    Components are exact; the authors sample nodes, all of them below 2,000 tokens.
    """

    budget: Budget = Threshold(0.9)

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        if not isinstance(self.budget, Threshold):
            raise BudgetError(f"llava_scissor takes a threshold of similarity, threshold=0.9, not {self.budget!r}")
        cut, lines = self.budget.value, []
        for line, x in enumerate(signals.hidden.float()):
            if cut == float("-inf") or cut >= 1:
                place = tokens.unpadded[line].nonzero().flatten()
                lines.append((place, torch.eye(tokens.n, device=x.device)[place]))
                continue
            weights, places = [], []
            for frame in by_frame(signals, tokens, line):
                for members in _parts(components(x[frame], cut)):
                    row = torch.zeros(tokens.n, device=x.device)
                    row[frame[members]] = 1 / len(members)
                    weights.append(row)
                    places.append(frame[members[0]])
            first, place = torch.stack(weights), torch.stack(places)
            signals.at.spend(2 * tokens.n**2 * x.shape[-1] // max(len(signals.hidden), 1))
            parts = _parts(components(first @ x, cut))
            made = torch.stack([first[members].mean(0) for members in parts])
            place = torch.stack([place[members].min() for members in parts])
            real = tokens.unpadded[line].nonzero().flatten()
            near = (unit(x[real]) @ unit(made @ x).T).argmax(-1)
            joined = torch.zeros_like(made)
            joined[near, real] = 1
            count = joined.sum(-1, keepdim=True)
            lines.append((place, (made + joined) / (count + 1)))
        return rows_of(lines, tokens.n)


def components(x: Tensor, cut: float) -> Tensor:
    """(N,) long: for each row of x (N, C) the first row it is connected with, by links of cosine above the cut."""
    u = unit(x)
    link = (u @ u.T) > cut
    link.fill_diagonal_(True)
    label = torch.arange(len(x), device=x.device)
    while True:  # the smallest label spreads along links, and labels jump to the label of theirs
        new = torch.where(link, label[None], len(x)).amin(-1)
        new = new[new]
        if torch.equal(new, label):
            return label
        label = new


def _parts(label: Tensor) -> list[Tensor]:
    return [(label == c).nonzero().flatten() for c in label.unique()]
