"""What a method is worth in a model on a machine: both passes written down, priced, and set side by side."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fewer import hosts
from fewer.core import Reducer, Site
from fewer.runtime.apply import apply
from fewer.runtime.modules import UNTRAINED, ModulesError
from fewer.spec import parse, text

from .machines import Machine, Price, Processor, steps_of
from .ops import CountedByData, Op, Work, record
from .roofline import by_flops, by_tokens, speed_up

ERROR = 0.06
"""Relative error of foretold speed-ups on a processor, as benchmarks/cost_model.py found it: the median, rounded up."""


@dataclass(frozen=True)
class Row:
    """A block: tokens in its attention and in its MLP, what it costs without the method and with it."""

    layer: int
    attention: float
    mlp: float
    before: float
    after: float


@dataclass(frozen=True)
class Report:
    """What a method is worth. before, after: of a whole pass, in `unit`; low, high: what the speed-up may be, None
    where nothing is known of the error; flops, tokens: what the two naive rules would say."""

    method: str
    machine: str
    basis: str
    counts: str
    phase: str
    unit: str
    rows: list[Row]
    before: float
    after: float
    low: float | None
    high: float | None
    flops: float
    tokens: float
    notes: list[str] = field(default_factory=list)

    @property
    def speed_up(self) -> float:
        return self.before / self.after


@dataclass(frozen=True)
class Passes:
    """How a model is called. call: a pass; fill: what comes before it (the prompt of a decoding step); kind: as in
    `Work`; compute: whether numbers are computed, since counts depend on them."""

    call: Callable[[], Any]
    kind: str
    fill: Callable[[], Any] | None = None
    compute: bool = False


def passes(network: nn.Module, phase: str = "", *, tokens: int = 512, batch: int = 1, given: Tensor | None = None,
           size: tuple[int, int] | None = None) -> Passes:  # fmt: skip
    """Ways to call a model on imagined input, or on what is given: pictures (B, 3, H, W) or token ids (B, N).

    phase    of a decoder: "prefill" (the default) or "decode", one token behind a prompt
    tokens   of a text; batch: samples; size: height and width of a picture where the model does not say

    Raises   ValueError for a phase the model does not have, or a model of images and text.
    """
    host = hosts.find(network)
    if isinstance(host, hosts.VisionLanguageHost):
        raise ValueError("a vision-language model is two: give its vision tower, or its language model, by itself")
    decodes = isinstance(host, hosts.DecoderHost)
    if phase not in ("", "prefill", "decode") or (phase == "decode" and not decodes):
        raise ValueError(f"phase {phase!r}: a decoder has prefill and decode, other models one pass and no phase")
    device = next(network.parameters()).device
    compute = given is not None
    if not host.text:
        made = _pictures(network, batch, size) if given is None else lambda: given
        return Passes(lambda: host.root(made()), "encoder", compute=compute)
    most = host.patches
    if given is None and most and tokens > most:
        raise ValueError(f"tokens={tokens}: this model takes {most} at most")
    ids = given if given is not None else torch.zeros(batch, tokens, dtype=torch.long, device=device)
    if not decodes:
        return Passes(lambda: host.root(input_ids=ids), "encoder", compute=compute)
    if phase != "decode":
        return Passes(lambda: network(ids, use_cache=False), "prompt", compute=compute)
    return _step(network, ids, compute)


def _step(network: nn.Module, ids: Tensor, compute: bool) -> Passes:
    """One token behind a prompt."""
    from transformers import DynamicCache

    from fewer.compat import cached

    held: dict[str, Any] = {}

    def fill() -> None:
        held["cache"] = DynamicCache(config=network.config)  # type: ignore[arg-type]
        network(ids, **cached(network, held["cache"]))

    return Passes(lambda: network(ids[:, -1:], **cached(network, held["cache"])), "step", fill, compute)


def _pictures(network: nn.Module, batch: int, size: tuple[int, int] | None) -> Callable[[], Tensor]:
    weight = next(network.parameters())
    wanted = getattr(getattr(network, "config", None), "image_size", None) or size or (224, 224)
    height, width = (wanted, wanted) if isinstance(wanted, int) else wanted
    return lambda: torch.zeros(batch, _channels(network), height, width, device=weight.device, dtype=weight.dtype)


def _channels(network: nn.Module) -> int:
    patch = hosts.find(network).patch
    return int(patch.weight.shape[1]) if patch is not None and isinstance(patch.weight, Tensor) else 3


def price(network: nn.Module, method: str | Reducer, machine: Machine, way: Passes) -> Report:
    """What a method is worth in a model on a machine. The model is left as it was, and computes nothing unless `way`
    says so.

    Raises   CountedByData where counts depend on the input and none was given; ValueError for a method that acts
             where no pass tells (texts, losses, denoising steps).
    """
    reducer = parse(method)
    if reducer.site in (Site.TEXT, Site.LOSS, Site.DENOISING):
        raise ValueError(
            f"{text(reducer)} acts at {reducer.site.value}: what it saves is no part of a pass of the model"
        )
    if way.kind == "prompt" and reducer.site is Site.KV_CACHE:
        raise ValueError(
            f"{text(reducer)} acts on the KV cache behind a prompt, which is read whole: ask for phase decode "
            "(--phase decode), where tokens are written behind what the cache holds"
        )
    blocks = hosts.find(network).blocks
    plain = Work(_recorded(way, blocks, reducer), kind=way.kind)
    with _on(network, reducer) as session:
        ops = _recorded(way, blocks, reducer)
        counts, notes = _counted(session, way, reducer)
        reduced = Work(ops, counts, way.kind)
    full = max((n for pair in counts for n in pair), default=0.0)
    if way.kind == "step":
        full = max((op.shape[2] for op in plain.ops if op.kind == "attention"), default=full)
    plain.tokens = [(full, full)] * len(counts)
    before, after = machine.price(plain), machine.price(reduced, plain)
    low = high = None
    if isinstance(machine, Processor):
        guess = speed_up(machine.profile, plain, reduced, ERROR)
        low, high = guess.low, guess.high
    if tiles := steps_of(machine, [n for pair in counts for n in pair]):
        notes.append(tiles)
    return Report(
        text(reducer), machine.title, machine.basis, machine.counts, way.kind, before.unit,
        _rows(counts, before, after), before.total, after.total, low, high, by_flops(plain, reduced),
        by_tokens(plain, reduced) if counts else 1.0, notes,
    )  # fmt: skip


def _recorded(way: Passes, blocks: Any, reducer: Reducer) -> list[Op]:
    try:
        return record(way.call, blocks, compute=way.compute, prepare=way.fill)
    except CountedByData as error:
        raise CountedByData(_told(reducer)) from error


def _told(reducer: Reducer) -> str:
    return (
        f"{text(reducer)} keeps as many tokens as the input asks for, so shapes do not tell what it costs: give an "
        "input (--input FILE, or given= in Python), and the pass is computed"
    )


def _on(network: nn.Module, reducer: Reducer) -> AbstractContextManager[Any]:
    try:
        return apply(network, reducer)
    except ModulesError:
        return apply(network, reducer, modules=UNTRAINED)  # they cost what trained ones do


def _counted(session: Any, way: Passes, reducer: Reducer) -> tuple[list[tuple[float, float]], list[str]]:
    """Tokens of each block in attention and MLP; of a decoding step rows of the cache that are read."""
    from torch._subclasses.fake_tensor import DataDependentOutputException

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ledger = session.ledger
            if way.kind == "step":
                return [(float(n), 1.0) for n in ledger.read], list(ledger.notes)
            reading = getattr(ledger, "reading", ledger)
            return [(float(e.attention), float(e.mlp)) for e in reading.entries], list(reading.notes)
    except DataDependentOutputException as error:
        raise CountedByData(_told(reducer)) from error


def _rows(counts: list[tuple[float, float]], before: Price, after: Price) -> list[Row]:
    return [
        Row(i, attention, mlp, before.layers.get(i, 0.0), after.layers.get(i, 0.0))
        for i, (attention, mlp) in enumerate(counts)
    ]


__all__ = ["ERROR", "Passes", "Report", "Row", "passes", "price"]
