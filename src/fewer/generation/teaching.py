"""Training with heads for several tokens: the model's loss becomes the sum of its own and each head's.

with MultiToken(model, Layers.of(model, 3)):              # or Chained.of
    Trainer(model, args, train_dataset=...).train()       # the heads are trained, saved and resumed with the model

One head's logits are in memory at a time: each head goes forward and backward before the next one does, and what they
ask of the trunk goes through it once, in their sum. Source: Gloeckle et al., arXiv:2404.19737, sec. 2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .heads import NAME, Heads, HeadsError, Read, unembedding_of

IGNORED = -100


def loss(
    model: nn.Module, heads: Heads, x: Tensor, labels: Tensor, given: Mapping[str, Any] | None = None,
    items: Tensor | int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The heads' cross-entropy: its sum, whose gradients are made on the way, and each head's, (n,), without gradient.

    x        (B, N, C): what the heads see of the model, `Heads.reading`. given: the other arguments that come with it
    labels   (B, N) long, not shifted; -100 is not taught. Head k, from 1, at position t is taught label t + 1 + k: of a
             text's last 1 + k positions it learns nothing
    items    what the sums are divided by; None = each head's own number of labels
    """
    learning = [p for p in (*heads.parameters(), *unembedding_of(model).parameters()) if p.requires_grad]
    targets = [_target(heads, labels, 1 + k) for k in range(1, 1 + heads.count)]
    total, each = _Sequential.apply(
        lambda z: heads.groups(z, given or {}), lambda: heads.unembedding(model), targets, items, x, *learning
    )
    return total, each


def _target(heads: Heads, labels: Tensor, ahead: int) -> Tensor:
    """(B, N) long: the label so far ahead of each position, by its place among the heads' words."""
    target = F.pad(labels[:, ahead:], (0, min(ahead, labels.shape[1])), value=IGNORED)
    if heads.words is None:
        return target
    place = target.new_full((max(int(heads.words.max()), int(target.max())) + 1,), IGNORED)
    place[heads.words] = torch.arange(len(heads.words), device=target.device)
    return place[target.clamp(min=0)].masked_fill(target == IGNORED, IGNORED)


class _Sequential(torch.autograd.Function):
    """Forward makes the gradients too, group by group of heads, logits by logits; backward hands them on."""

    @staticmethod
    def forward(
        ctx: Any, groups: Callable[[Tensor], Any], unembedding: Callable[[], Callable[[Tensor], Tensor]],
        targets: Sequence[Tensor], items: Tensor | int | None, x: Tensor, *learning: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        wanted = [i for i, p in enumerate((x, *learning)) if p.requires_grad]
        z = x.detach().requires_grad_(x.requires_grad)
        sources = [(z, *learning)[i] for i in wanted]
        sums: list[Tensor | None] = [None] * len(sources)
        losses: list[Tensor] = []

        def add(gradients: Sequence[Tensor | None]) -> None:
            for i, gradient in enumerate(gradients):
                if gradient is not None:
                    sums[i] = gradient.detach() if sums[i] is None else sums[i].add_(gradient)  # type: ignore[union-attr]

        left = iter(targets)
        with torch.enable_grad():
            for group in groups(z):
                asked = []
                for state in group:
                    leaf = state.detach().requires_grad_(state.requires_grad)
                    one = _cross_entropy(unembedding()(leaf), next(left), items)
                    losses.append(one.detach())
                    if one.requires_grad:
                        own, *rest = torch.autograd.grad(one, [leaf, *sources], allow_unused=True)
                        asked.append(own)
                        add(rest)
                    del one
                if asked and group[0].requires_grad:
                    add(torch.autograd.grad(group, sources, asked, allow_unused=True))
        ctx.made = dict(zip(wanted, sums, strict=True))
        each = torch.stack(losses)
        ctx.mark_non_differentiable(each)
        return each.sum(), each

    @staticmethod
    def backward(ctx: Any, asked: Tensor, _: Tensor) -> Any:
        made = (ctx.made.get(i) for i in range(len(ctx.needs_input_grad) - 4))
        return (None, None, None, None, *(None if g is None else g * asked.to(g.dtype) for g in made))


def _cross_entropy(logits: Tensor, target: Tensor, items: Tensor | int | None) -> Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / ((target != IGNORED).sum() if items is None else torch.as_tensor(items, device=total.device)).clamp(
        1
    )


class MultiToken:
    """A model that learns with its heads: every call with labels has the sum of all losses for its `loss`.

    heads   stand in the model as `model.multitoken` while this is on: they move, train, are given to optimisers and
            saved with it, by `save_pretrained` also in a file of their own, multitoken.safetensors
    losses  (n,) of the last call, detached, one for each head

    With a frozen model (`model.requires_grad_(False)` before), the heads alone learn. A context manager; `remove` may
    be called twice. Raises HeadsError where the model has heads on.
    """

    def __init__(self, model: nn.Module, heads: Heads) -> None:
        self.model, self.heads = model, heads
        self.losses: Tensor | None = None
        if hasattr(model, NAME):
            raise HeadsError(f"{type(model).__name__} has {NAME!r} already: remove() the heads that are on")
        with ExitStack() as undo:
            # Read before they stand in the model, for blocks are looked for in it.
            self._read: Read = undo.enter_context(heads.reading(model))
            undo.callback(model.register_forward_hook(self._taught, with_kwargs=True).remove)
            model.add_module(NAME, heads.train(model.training))
            undo.callback(delattr, model, NAME)
            if (own := getattr(model, "save_pretrained", None)) is not None:
                vars(model)["save_pretrained"] = wraps(own)(self._along(own))
                undo.callback(vars(model).pop, "save_pretrained")
            self._undo = undo.pop_all()

    def remove(self) -> None:
        """Take the heads off: the model is as it was."""
        self._undo.close()

    def __enter__(self) -> MultiToken:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _taught(self, model: nn.Module, _args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        labels = kwargs.get("labels")
        if labels is None:
            return output
        if getattr(output, "loss", None) is None:
            raise HeadsError(f"{type(output).__name__} has no loss to add to: call the model with return_dict=True")
        x, given = self._read.take()
        if x.shape[:2] != labels.shape:
            raise HeadsError(f"labels are {tuple(labels.shape)} for rows {tuple(x.shape[:2])}: give one for each token")
        total, self.losses = loss(model, self.heads, x, labels, given, kwargs.get("num_items_in_batch"))
        output["loss"] = output.loss + total
        return output

    def _along(self, own: Callable[..., Any]) -> Callable[..., Any]:
        def save_pretrained(save_directory: Any, *args: Any, **kwargs: Any) -> Any:
            saved = own(save_directory, *args, **kwargs)
            if kwargs.get("is_main_process", args[0] if args else True):
                whole = kwargs.get("state_dict") or {}
                state = {k.removeprefix(f"{NAME}."): v for k, v in whole.items() if k.startswith(f"{NAME}.")}
                self.heads.save(Path(save_directory), state=state or None)
            return saved

        return save_pretrained
