"""A sample's result does not depend on how much padding stands beside it, nor on which side, nor on what was there
before: every method, alone and behind others, on an encoder, a decoder and an image model. Alone there is no padding.
Prompts with pictures: `batch_changes_nobody` in test_contract_visual.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import fewer
from fewer.core import Reducer, Site, Tokens
from fewer.core.errors import SignalError
from fewer.core.plan import PlanError
from fewer.hosts import HostError
from fewer.runtime.program import SessionError
from fewer.testing import fitted
from fewer.testing.models import images, tiny_vit

OTHER_PLACES = (Site.KV_CACHE, Site.BRIDGE, Site.TEXT, Site.AROUND_OPERATION, Site.DENOISING)
LENGTHS = (17, 9, 13, 4)
CLOSE: dict[str, Any] = {"atol": 2e-5, "rtol": 1e-4}
# Forms that count in another way than the method does by itself.
FORMS = [
    "ppt:keep=0.8,of=start", "ppt:r=3,tau=0", "ppt:r=3,tau=1e9", "ats:tokens=3", "ats:keep=0.5",
    "token_transforming:tokens=3", "token_transforming:keep=0.5", "ends:keep=0.5", "tome:keep=0.7",
    "tome:threshold=0.5", "tofu:keep=0.6", "turbo:r=4", "atc:tokens=5", "atc:keep=0.5,of=start", "dpc_knn:tokens=5",
    "kmedoids:tokens=5", "pool:tokens=3", "pool:keep=0.5", "grid:tokens=3", "grid:keep=0.5", "radial:tokens=3",
    "radial:keep=0.5", "random:keep=0.5,of=start", "cls_topk:mass=0.7", "evit:keep=0.5", "evit:keep=0.6,fuse=false",
    "tome:keep=0.7,proportional=false", "tofu:keep=0.6,proportional=false", "atc:tokens=5,proportional=false",
]  # fmt: skip
# What needs another model, or the same prefix or count in every sample, and says so.
ELSEWHERE = {"dynamic_pooling", "utrc", "pumer", "turbo_cross", "dart", "dynamic_llava", "fastv", "fitprune",
             "framefusion", "pyramiddrop", "sparsevlm", "topv"}  # fmt: skip
EVEN = {"diffrate", "spvit"}
ROWS = {"leap", "evit", "heatvit", "madtp", "spvit", "tokenlearner"}  # no place among the words of a causal text
SIZES = {"atc", "ppt", "tofu", "token_transforming", "tome", "turbo"}  # a decoder's cache carries none
REFUSED = {
    "bert": ELSEWHERE | EVEN, "llama": ELSEWHERE | ROWS | SIZES | {"diffrate"},
    "vit": ELSEWHERE | EVEN,
}  # fmt: skip
BEFORE = {"bert": "random:tokens=8,layers=0", "llama": "random:tokens=8,layers=0", "vit": "cls_topk:mass=0.5,layers=0"}


@cache
def model(kind: str) -> nn.Module:
    return tiny_vit(kind, depth=3)


def methods() -> Iterator[tuple[str, Reducer]]:
    for name, cls in fewer.registered().items():
        if name not in ("vtw", "dyvte") and cls().site not in OTHER_PLACES and cls.card.on != "video":
            yield name, fitted(cls)
    for form in FORMS:
        method = fewer.parse(form)
        yield form, method if method.layers is None else replace(method, layers=(1, 2))  # type: ignore[type-var]


def refused(kind: str, method: Reducer) -> bool:
    if method.card.name not in REFUSED[kind]:
        return False
    if kind != "llama" or method.card.name in ELSEWHERE | {"diffrate"}:
        return True
    return bool(method.extra) or method.proportional or method.card.name in ("leap", "tokenlearner")


def cases(refuses: bool) -> list[Any]:
    return [
        pytest.param(kind, method, id=f"{kind}-{name}")
        for kind in REFUSED for name, method in methods() if refused(kind, method) == refuses
    ]  # fmt: skip


def answers(kind: str, forms: list[Any], given: dict[str, Tensor]) -> Tensor:
    net = model(kind)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with fewer.apply(net, forms, modules="untrained"):
            out = net(**given, **({"use_cache": False} if kind == "llama" else {}))
    return out.logits if kind == "vit" else out.last_hidden_state


def samples(kind: str) -> list[dict[str, Tensor]]:
    """Each by itself."""
    if kind == "vit":
        return [{"pixel_values": x[None]} for x in images(4)]
    rng = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(3, 50, (1, n), generator=rng)} for n in LENGTHS]


def batched(kind: str, side: str) -> dict[str, Tensor]:
    if kind == "vit":
        return {"pixel_values": images(4)}
    ids = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.long)
    for row, sample in zip(ids, samples(kind), strict=True):
        n = sample["input_ids"].shape[1]
        row[:n] = sample["input_ids"][0]
        if side == "left":
            row.copy_(row.roll(max(LENGTHS) - n))
    mask = (ids > 0).long()
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def together_is_alone(kind: str, forms: list[Any]) -> None:
    alone = [answers(kind, forms, sample) for sample in samples(kind)]
    for side in ("right", "left"):
        together = answers(kind, forms, batched(kind, side))
        for i, own in enumerate(alone):
            mine = together[i : i + 1]
            if kind != "vit":
                n = LENGTHS[i]
                mine = mine[:, :n] if side == "right" else mine[:, -n:]
            assert_close(mine, own, **CLOSE, msg=lambda m, i=i, side=side: f"sample {i}, padding on the {side}: {m}")  # type: ignore[misc]


@pytest.mark.parametrize(("kind", "method"), cases(refuses=False))
def test_padding_changes_nothing(kind: str, method: Reducer) -> None:
    together_is_alone(kind, [method])


@pytest.mark.parametrize(("kind", "method"), cases(refuses=False))
def test_padding_changes_nothing_behind_another_method(kind: str, method: Reducer) -> None:
    together_is_alone(kind, [BEFORE[kind], method if method.layers is not None else replace(method, layers=(1, 2))])  # type: ignore[type-var]


@pytest.mark.parametrize(("kind", "method"), cases(refuses=True))
def test_what_cannot_be_padded_says_so(kind: str, method: Reducer) -> None:
    forms = [BEFORE[kind], method] if kind == "vit" else [method]  # images are padded where counts differ
    with pytest.raises((HostError, SessionError, SignalError, PlanError, ValueError)):
        answers(kind, forms, batched(kind, "right"))


@pytest.mark.parametrize(("side", "fault"), [("right", lambda t: -t.place() % t.n), ("left", lambda t: t.place())])
def test_the_watchdog_bites(side: str, fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that knows how wide the batch is, and one that counts the padding in front of a text."""
    monkeypatch.setattr(Tokens, "ordinal", fault)
    with pytest.raises(AssertionError, match=f"padding on the {side}"):
        together_is_alone("bert", [fewer.parse("ends:keep=0.5,layers=1+2")])
