"""The encoder methods in BERT, DistilBERT, RoBERTa and ModernBERT: what they change, and what they must not."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import fewer
from fewer.core.learned import Whole
from fewer.methods.language.leap import Router

KINDS = ("bert", "distilbert", "roberta", "modernbert")
COUNTED = [
    "power_bert:keep=0.6", "ltp:keep=0.6", "length_adaptive:keep=0.6", "pyramid_bert:keep=0.6",
    "ends:keep=0.6,layers=0+2", "random:keep=0.6,layers=0+2", "cls_topk:keep=0.6,layers=0+2",
    "trbert:keep=0.6,layers=1+2", "leap:keep=0.6", "leap:keep=0.6,summary=false",
]  # fmt: skip
ADAPTIVE = ["power_bert", "ltp:threshold=0.2,learned=false", "ltp:threshold=0.2", "trbert:layers=1+2", "leap"]
LENGTHS = (11, 7, 15)


@cache
def model(kind: str) -> nn.Module:
    """Three blocks of width 32 with weights large enough that attention is not flat."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    size: dict[str, Any] = dict(vocab_size=50, num_labels=3, pad_token_id=0)
    if kind == "distilbert":
        size |= dict(dim=32, n_layers=3, n_heads=4, hidden_dim=64, max_position_embeddings=32)
    else:
        size |= dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
                     max_position_embeddings=40)  # fmt: skip
    if kind == "modernbert":
        size |= dict(local_attention=8, global_attn_every_n_layers=2, bos_token_id=1, eos_token_id=2, cls_token_id=1,
                     sep_token_id=2, reference_compile=False)  # fmt: skip
    torch.manual_seed(0)
    net = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(kind, **size))
    for p in net.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.2)
    return net.eval()


def batch(lengths: tuple[int, ...] = LENGTHS) -> dict[str, Tensor]:
    """Texts of these lengths, padded behind."""
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for i, n in enumerate(lengths):
        ids[i, :n] = torch.randint(3, 50, (n,), generator=torch.Generator().manual_seed(n))
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def logits(net: nn.Module, given: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return net(**given).logits


def session(net: nn.Module, form: str, **more: Any) -> fewer.Session:
    """A session whose untrained modules decide something."""
    torch.manual_seed(1)
    on = fewer.apply(net, form, modules="untrained" if fewer.parse(form).modules(4, 2, 1, 8) else None, **more)
    with torch.no_grad():
        for module in on.modules.modules():
            if isinstance(module, Whole):
                next(module.parameters())[6:] = 0
            if isinstance(module, Router):
                module.decide[-1].bias.zero_()
    return on


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", COUNTED)
def test_keeping_all_is_the_model(kind: str, form: str) -> None:
    net, given = model(kind), batch()
    want = logits(net, given)
    with session(net, form.replace("0.6", "1.0")):
        assert torch.equal(logits(net, given), want)
    assert torch.equal(logits(net, given), want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", COUNTED + ADAPTIVE)
def test_a_batch_changes_nobody(kind: str, form: str) -> None:
    net = model(kind)
    with session(net, form) as on:
        together = logits(net, batch())
        rows = sum(e.attention + e.mlp for e in on.ledger.entries)
        assert rows < 2 * 3 * sum(LENGTHS) / 3 - 1  # something went
        for i, n in enumerate(LENGTHS):
            assert_close(logits(net, batch((n,)))[0], together[i], atol=1e-5, rtol=1e-4)
    assert (together - logits(net, batch())).abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
@pytest.mark.parametrize("form", [f for f in COUNTED + ADAPTIVE if not f.startswith("leap")])
def test_masked_is_gathered(kind: str, form: str) -> None:
    net, given = model(kind), batch()
    with session(net, form):
        want = logits(net, given)
    with session(net, form, execution="masked"):
        assert_close(logits(net, given), want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("form", COUNTED + ADAPTIVE)
def test_packed_is_padded(form: str) -> None:
    net, given = model("bert"), batch()
    with session(net, form):
        want = logits(net, given)
    with session(net, form, execution="packed"):
        assert_close(logits(net, given), want, atol=1e-5, rtol=1e-4)


def test_tokens_that_leap_are_the_same_to_the_bit() -> None:
    net, given = model("bert"), batch()
    with session(net, "leap:tokens=3,layers=1") as on, torch.no_grad():
        hidden = net.bert(**given, output_hidden_states=True).hidden_states
        assert [e.mlp for e in on.ledger.entries][1] == 5  # three, the class token and the summary
    same = (hidden[1] == hidden[2]).all(-1)
    for i, n in enumerate(LENGTHS):
        assert int((~same[i, :n]).sum()) == 4
        assert not same[i, 0]


def test_dropped_tokens_keep_their_last_value() -> None:
    net, given = model("bert"), batch((12,))
    with torch.no_grad():
        full = net.bert(**given, output_hidden_states=True).hidden_states
    with session(net, "length_adaptive:tokens=4,layers=1") as on, torch.no_grad():
        out = net.bert(**given).last_hidden_state
        kept = on.last.kept(1)[0].tolist()
    gone = [i for i in range(12) if i not in kept]
    assert len(gone) == 7
    assert torch.equal(out[0, gone], full[1][0, gone])  # of the block before, as the paper restores them


def test_trained_modules_travel(tmp_path) -> None:
    net, given = model("bert"), batch()
    for form in ("power_bert", "ltp:threshold=0.2", "trbert:layers=1+2", "leap"):
        with session(net, form) as on:
            want = logits(net, given)
            on.save_modules(tmp_path)
        with fewer.apply(net, form, modules=tmp_path):
            assert torch.equal(logits(net, given), want)
