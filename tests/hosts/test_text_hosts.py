"""Text encoders: padding on either side, local windows, a row for every token, and nothing else than the reduction."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import fewer
from fewer.core import Budget, KeepRatio, Plan, Reducer, Signals, Site, Tokens, select
from fewer.hosts.attention import spying
from fewer.runtime.program import SessionError
from fewer.testing import Honest
from fewer.testing.checks import same_snapshot, snapshot

VOCAB, PAD = 60, 1
LENGTHS = (18, 9, 13)
KINDS = ("bert", "roberta", "distilbert", "modernbert", "xlm-roberta")
MAIN = ("bert", "distilbert", "modernbert")  # RoBERTa's blocks are BERT's
CLOSE = dict(atol=2e-5, rtol=2e-4)


@dataclass(frozen=True)
class Before(Honest):
    """The tokens with the largest first channel go on; their lengths are all alike behind a LayerNorm."""

    budget: Budget = KeepRatio(0.6)
    layers: tuple[int, ...] | None = (1, 2)
    site: ClassVar[Site] = Site.BEFORE_BLOCK

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        return select.top(signals.hidden[..., 0].float(), self.budget, tokens, at=signals.at)


@dataclass(frozen=True)
class Mid(Before):
    layers: tuple[int, ...] | None = (0, 1)
    site: ClassVar[Site] = Site.MID_BLOCK


@dataclass(frozen=True)
class After(Mid):
    site: ClassVar[Site] = Site.AFTER_BLOCK


@dataclass(frozen=True)
class Around(Before):
    site: ClassVar[Site] = Site.AROUND_BLOCK


@dataclass(frozen=True)
class Uneven(Before):
    """Those above the average of their text go on."""

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        score = signals.hidden[..., 0]
        real = torch.ones_like(score) if tokens.valid is None else tokens.valid.float()
        kept = (score >= (score * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)) & (real > 0)
        kept[:, 0] = True
        return Plan.keep((~kept).to(torch.int8).argsort(dim=-1, stable=True), tokens.n, kept.sum(-1))

    @property
    def adaptive(self) -> bool:
        return True


SITES = [Before(), Mid(), After()]
METHODS = [*SITES, Around(), Uneven(), "tome:r=2", "evit:keep=0.6,layers=0+1", "random:keep=0.6,layers=0+1",
           "cls_topk:keep=0.6,layers=0+1"]  # fmt: skip


def name(method: Reducer | str) -> str:
    return method if isinstance(method, str) else type(method).__name__


@cache
def encoder(kind: str) -> nn.Module:
    """Three blocks of width 32 with weights large enough that attention is not flat."""
    from transformers import AutoConfig, AutoModel

    size: dict[str, Any] = dict(vocab_size=VOCAB, pad_token_id=PAD, max_position_embeddings=40)
    if kind == "distilbert":
        size |= dict(dim=32, n_layers=3, n_heads=4, hidden_dim=64)
    else:
        size |= dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64)
    if kind == "modernbert":
        size |= dict(local_attention=8, global_attn_every_n_layers=2, bos_token_id=0, eos_token_id=2, cls_token_id=0,
                     sep_token_id=2, reference_compile=False)  # fmt: skip
    torch.manual_seed(0)
    net = AutoModel.from_config(AutoConfig.for_model(kind, **size))
    for p in net.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.2)
    return net.eval()


def texts(kind: str, side: str = "right", lengths: tuple[int, ...] = LENGTHS) -> dict[str, Tensor]:
    """Texts of these lengths, padded on a side, with the positions each has alone where the model takes any."""
    n = max(lengths)
    ids, mask = torch.full((len(lengths), n), PAD), torch.zeros(len(lengths), n, dtype=torch.long)
    for i, m in enumerate(lengths):
        own = slice(0, m) if side == "right" else slice(n - m, n)
        ids[i, own] = torch.randint(3, VOCAB, (m,), generator=torch.Generator().manual_seed(m))
        mask[i, own] = 1
    given = {"input_ids": ids, "attention_mask": mask}
    if kind in ("bert", "modernbert"):
        given["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return given


def features(net: nn.Module, given: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return net(**given).last_hidden_state


def alone(given: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    own = given["attention_mask"][i] > 0
    return {k: v[i : i + 1, own] for k, v in given.items()}


@contextmanager
def hiding(net: nn.Module, gone: list[Tensor]) -> Iterator[None]:
    """The slow twin: all rows stay, those marked in gone[layer] (B, N) are seen by nobody. Needs padded texts, for
    then every block is given a mask."""
    blocks = fewer.hosts.find(net).blocks

    def hide(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        lost = gone[blocks.index(module)][:, None, None]
        args = list(args)
        where = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.dim() == 4]
        mask = args[where[0]] if where else kwargs["attention_mask"]
        assert mask.dtype == torch.bool
        if where:
            args[where[0]] = mask & ~lost
        else:
            kwargs = {**kwargs, "attention_mask": mask & ~lost}
        return tuple(args), kwargs

    handles = [block.register_forward_pre_hook(hide, with_kwargs=True) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def absent(session: fewer.Session, n: int) -> list[Tensor]:
    """(B, N) bool per layer: the tokens that do not reach its attention."""
    late = session.methods[0].site is not Site.BEFORE_BLOCK
    gone = []
    for layer in range(len(session.host.blocks)):
        kept = session.last.kept(layer - late)
        none = torch.ones(len(kept), n + 1, dtype=torch.bool)
        gone.append(none.scatter(-1, kept.masked_fill(kept < 0, n), False)[:, :n])
    return gone


# -- numbers -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "method", ["tome:r=0", "evit:keep=1.0,layers=1", Before(KeepRatio(1.0)), Around(KeepRatio(1.0))], ids=name
)
def test_keeping_all_is_the_model_to_the_bit(kind: str, side: str, method: Reducer | str) -> None:
    net, given = encoder(kind), texts(kind, side)
    plain = features(net, given)
    with fewer.apply(net, method):
        assert torch.equal(features(net, given), plain)
    assert torch.equal(features(net, given), plain)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", [*SITES, Uneven()], ids=name)
def test_what_left_is_seen_by_nobody_and_nothing_else_changes(kind: str, side: str, method: Reducer) -> None:
    net, given = encoder(kind), texts(kind, side)
    real = given["attention_mask"] > 0
    with fewer.apply(net, method) as session:
        got = features(net, given)
        gone = absent(session, 18)
        for layer in range(3):
            kept = session.kept(layer)
            assert bool((torch.where(kept < 0, 99, kept).diff() >= 0).all())
        first = real.to(torch.int8).argmax(-1)
        assert not bool(gone[2][torch.arange(3), first].any())  # the class token
    assert bool((gone[2] & real).any(-1).all())
    with hiding(net, gone):
        want = features(net, given)
    there = real & ~gone[2]
    assert got.shape == want.shape
    assert_close(got[there], want[there], **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", METHODS, ids=name)
def test_a_batch_changes_no_text(kind: str, side: str, method: Reducer | str) -> None:
    net, given = encoder(kind), texts(kind, side)
    if kind == "distilbert" and side == "left":
        pytest.skip("DistilBERT counts positions from the padding on: a text alone is another text")
    with fewer.apply(net, method):
        together = features(net, given)
        for i in range(3):
            own = given["attention_mask"][i] > 0
            assert_close(features(net, alone(given, i))[0], together[i, own], **CLOSE)


@pytest.mark.parametrize("kind", MAIN)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", METHODS, ids=name)
def test_masked_and_gathered_execution_agree(kind: str, side: str, method: Reducer | str) -> None:
    net, given = encoder(kind), texts(kind, side)
    with fewer.apply(net, method) as session:
        gathered, kept = features(net, given), session.kept(-1)
    with fewer.apply(net, method, execution="masked") as session:
        masked = features(net, given)
        origin = session.origin
    there = torch.zeros(3, 19, dtype=torch.bool).scatter(-1, kept.masked_fill(kept < 0, 18), True)[:, :18]
    there &= given["attention_mask"] > 0
    assert_close(masked[there], gathered[there], **CLOSE)
    if not isinstance(method, Around):
        where = torch.arange(18).expand(3, -1)
        assert torch.equal(origin[there], where[there])  # rows of the output are where they were


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", [Before(), Uneven(), "tome:r=2", "evit:keep=0.6,layers=0+1"], ids=name)
def test_packed_and_padded_execution_agree(kind: str, side: str, method: Reducer | str) -> None:
    net, given = encoder(kind), texts(kind, side)
    real = given["attention_mask"] > 0
    with fewer.apply(net, method):
        padded = features(net, given)
    with fewer.apply(net, method, execution="packed"):
        packed = features(net, given)
    assert_close(packed[real], padded[real], **CLOSE)


def test_packing_is_refused_where_windows_are_local() -> None:
    with pytest.raises(SessionError, match="packed execution does not carry"):
        fewer.apply(encoder("modernbert"), Before(), execution="packed")


@pytest.mark.parametrize("kind", MAIN)
@pytest.mark.parametrize("method", SITES, ids=name)
def test_a_dropped_token_keeps_its_last_value(kind: str, method: Reducer) -> None:
    net, given = encoder(kind), texts(kind, lengths=(18,))
    first = method.acts_at(3)[0]
    blocks = fewer.hosts.find(net).blocks
    seen: list[Tensor] = []

    def look(_module: nn.Module, _args: tuple, out: Any) -> None:
        seen.append(out if isinstance(out, Tensor) else out[0])

    handles = [block.register_forward_hook(look) for block in blocks]
    entered: list[Tensor] = []
    handles.append(blocks[0].register_forward_pre_hook(lambda _, args: entered.append(args[0])))
    features(net, given)
    for handle in handles:
        handle.remove()
    with fewer.apply(net, method) as session:
        out = features(net, given)
        kept = session.kept(first)[0].tolist()
    gone = [i for i in range(18) if i not in kept]
    assert len(gone) > 5
    value = seen[first] if method.site is Site.AFTER_BLOCK else (entered + seen)[first]
    value = net.final_norm(value) if kind == "modernbert" else value
    assert_close(out[0, gone], value[0, gone], **CLOSE)


def test_a_merged_token_has_the_value_of_its_row() -> None:
    net, given = encoder("bert"), texts("bert", "left")
    with fewer.apply(net, "tome:r=2") as session:
        out = features(net, given)
        origin, kept = session.origin, session.kept(-1)
    merged = 0
    for i, m in enumerate(LENGTHS):
        for j in range(18 - m, 18):
            stands = int(kept[i, origin[i, j]])
            assert torch.equal(out[i, j], out[i, stands])
            merged += stands != j
    assert merged == 3 * 6


def test_blocks_that_run_on_few_rows_leave_the_others_alone() -> None:
    net, given = encoder("bert"), texts("bert", lengths=(18,))
    with torch.no_grad():
        plain = net(**given, output_hidden_states=True).hidden_states
    with fewer.apply(net, Around(layers=(2,))) as session:
        out = features(net, given)
        assert session.counts == [18, 18, 18]
        assert session.last.ledger.entries[2].attention == 11
        assert session.last.steps == []
    same = (out == plain[2]).all(-1)[0]
    assert int(same.sum()) == 7
    assert not bool(same[0])


def test_a_window_is_one_of_places_not_of_rows() -> None:
    """ModernBERT's local blocks look 4 places to each side: with every second token gone, at half as many rows."""

    @dataclass(frozen=True)
    class Even(Before):
        layers: tuple[int, ...] | None = (1,)

        def plan(self, signals: Signals, tokens: Tokens) -> Plan:
            return Plan.keep(torch.arange(0, tokens.n, 2).expand(tokens.batch, -1), tokens.n)

    net, given = encoder("modernbert"), texts("modernbert", lengths=(18,))
    seen: list[Tensor] = []
    with fewer.apply(net, Even()), spying(lambda module, q, k, v, mask, kwargs: seen.append(mask)):
        features(net, given)
    local = seen[1]
    place = torch.arange(0, 18, 2)
    want = (place[:, None] - place).abs() <= 4
    assert torch.equal((local if local.dtype == torch.bool else local >= 0)[0, 0], want)


# -- conduct -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", MAIN)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", [Before(), "tome:r=2", "dynamicvit:keep=0.6,layers=0+1"], ids=name)
def test_gradients_reach_every_token(kind: str, side: str, method: Reducer | str) -> None:
    net, given = encoder(kind), texts(kind, side)
    x = net.get_input_embeddings()(given.pop("input_ids")).detach().requires_grad_()
    torch.manual_seed(1)
    modules = "untrained" if isinstance(method, str) and "dynamic" in method else None
    with fewer.apply(net, method, modules=modules) as session:
        net.train()
        try:
            out = net(inputs_embeds=x, **given).last_hidden_state
        finally:
            net.eval()
        (out * given["attention_mask"][..., None]).square().sum().backward()
        for p in session.modules.parameters():
            assert p.grad is not None
            assert bool(p.grad.isfinite().all())
    real = given["attention_mask"] > 0
    assert bool(x.grad.isfinite().all())
    assert bool((x.grad.abs().sum(-1)[real] > 0).all())
    assert not bool(x.grad[~real].any())
    for p in net.parameters():
        p.grad = None


@pytest.mark.parametrize("kind", KINDS)
def test_removal_leaves_no_trace(kind: str) -> None:
    net, given = encoder(kind), texts(kind, "left")
    plain, before = features(net, given), snapshot(net)
    session = fewer.apply(net, "tome:r=2")
    features(net, given)
    session.remove()
    session.remove()
    same_snapshot(before, snapshot(net), "after remove()")
    assert torch.equal(features(net, given), plain)


def test_the_ledger_by_hand() -> None:
    """BERT of width 32, MLP of 64; 18 tokens, the class token and 0.6 of the 17 others from block 1 on."""
    net, given = encoder("bert"), texts("bert", lengths=(18,))
    with fewer.apply(net, Before(layers=(1,))) as session:
        features(net, given)
        ledger = session.ledger

    def block(n: int) -> int:
        return n * 4 * 32 * 32 + 2 * n * n * 32 + n * 2 * 32 * 64

    assert session.counts == [18, 11, 11]
    assert ledger.gflops_full * 1e9 == pytest.approx(3 * block(18))
    assert ledger.gflops_model * 1e9 == pytest.approx(block(18) + 2 * block(11))


def test_counts_are_those_of_each_text() -> None:
    net, given = encoder("distilbert"), texts("distilbert")
    with fewer.apply(net, Before(layers=(1,))) as session:
        features(net, given)
        assert session.counts.tolist() == [[18, 9, 13], [11, 5, 8], [11, 5, 8]]
        ledger = session.ledger
    assert ledger.entries[1].attention == pytest.approx((11 + 5 + 8) / 3)
