"""Agile-Quant: who pays attention to the start, what is rounded, and what stays as it was."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import fewer
from cases import normal, seeds
from decoders import decoder, prompt
from fewer.core import Group, KeepRatio, Place, Seen, Signals, Tokens, attention, naive
from fewer.core.cache.quantised import rounded
from fewer.methods.language.agile_quant import AgileQuant
from fewer.testing.checks import same_snapshot, snapshot

GREEDY = dict(max_new_tokens=5, do_sample=False)


@given(seeds, st.sampled_from([1, 2, 7, 16]), st.booleans())
def test_attention_paid_against_the_slow_twin(seed: int, n: int, causal: bool) -> None:
    q, k = normal(seed, 1, 2, n, 4), normal(seed + 1, 1, 1, n, 4)
    got = attention.paid(Seen(q, k, k, 0.5, causal=causal), Group(0, min(2, n)))
    assert got.shape == (1, 2, n)
    for head in range(2):
        want = naive.paid(q[0, head].tolist(), k[0, 0].tolist(), 0.5, range(min(2, n)), causal)
        assert_close(got[0, head], torch.tensor(want), atol=1e-5, rtol=1e-5)


def test_attention_paid_in_chunks_and_to_an_index_per_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = normal(0, 2, 2, 9, 4), normal(1, 2, 2, 9, 4)
    seen = Seen(q, k, k, 0.5, causal=True)
    index = Group(index=torch.tensor([[1], [3]]))
    whole = attention.paid(seen, index)
    full = attention.rows(seen, Group(0, 9))
    assert_close(whole, torch.stack([full[0, :, :, 1], full[1, :, :, 3]]))
    monkeypatch.setattr(attention, "CHUNK", 40)
    assert_close(attention.paid(seen, index), whole)


def test_who_ignores_the_start_leaves() -> None:
    """Of six tokens the first and the last stay; the others pay 0.1, 0.5, 0.3 and 0.2 to the first."""
    paid = torch.tensor([0.9, 0.1, 0.5, 0.3, 0.2, 0.6])
    logits = torch.zeros(6, 2)
    logits[:, 0], logits[:, 1] = paid.log(), ((1 - paid) / 5).log()
    q, k = logits[None, None], torch.tensor([[1.0, 0]] + [[0.0, 1]] * 5)[None, None]
    tokens = Tokens.plain(1, 6)
    tokens = tokens.protect(tokens.last)
    seen = Seen(q, k, k, 1.0)
    signals = Signals(torch.zeros(1, 6, 4), tokens, Place(layer=10, layers=32, start=5), seen)
    assert AgileQuant(KeepRatio(0.5, rounding="ceil")).plan(signals, tokens).position.tolist() == [[0, 2, 3, 5]]
    assert_close(signals.attention_paid(Group(0, 1))[0, 0], paid)


def test_settings() -> None:
    assert AgileQuant().acts_at(32) == (10, 11, 12)
    assert AgileQuant().acts_at(3) == (0, 1)
    assert AgileQuant(bits=None).activation_bits is None
    for bits in (1, 9):
        with pytest.raises(ValueError, match=f"bits={bits}"):
            AgileQuant(bits=bits)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounding_is_per_token_and_symmetric(bits: int) -> None:
    x = normal(0, 3, 5, 16) * torch.tensor([1e-3, 1.0, 50.0])[:, None, None]
    y = rounded(x, bits)
    top = 2 ** (bits - 1) - 1
    step = x.abs().amax(-1, keepdim=True) / top
    assert_close(y / step, (y / step).round(), atol=1e-3, rtol=0)
    assert bool(((y - x).abs() <= step / 2 * 1.001).all())
    assert_close(rounded(-x, bits), -y)
    assert y.dtype == x.dtype
    assert torch.equal(rounded(torch.zeros(1, 2, 4), bits), torch.zeros(1, 2, 4))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt2"])
def test_without_bits_and_keeping_all_it_is_the_model_to_the_bit(family: str) -> None:
    model = decoder(family)
    ids, mask = prompt(20, 9, 14)
    with torch.no_grad():
        plain = model(ids, attention_mask=mask).logits
        words = model.generate(ids, attention_mask=mask, **GREEDY)
        with fewer.apply(model, "agile_quant:keep=1.0,bits=none"):
            assert torch.equal(model(ids, attention_mask=mask).logits, plain)
            assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), words)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_bits_are_those_of_every_matrix_of_the_blocks_and_nothing_is_left(family: str) -> None:
    """The reference: the same model, its matrices fed with rounded inputs by hand."""
    model = decoder(family)
    ids, _ = prompt(15)
    before = snapshot(model)
    matrices = [m for block in _blocks(model) for m in block.modules() if type(m).__name__ in ("Linear", "Conv1D")]
    assert len(matrices) == 3 * (7 if family == "llama" else 4)
    with torch.no_grad():
        plain = model(ids).logits
        with fewer.apply(model, "agile_quant:keep=1.0,bits=4"):
            got = model(ids).logits
        same_snapshot(before, snapshot(model), "agile_quant after remove()")
        handles = [m.register_forward_pre_hook(lambda _, args: (rounded(args[0], 4),)) for m in matrices]
        want = model(ids).logits
        for handle in handles:
            handle.remove()
    assert_close(got, want)
    assert not torch.allclose(got, plain, atol=1e-2)


def _blocks(model: torch.nn.Module) -> torch.nn.ModuleList:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


@pytest.mark.parametrize("bits", ["none", "8"])
def test_a_batch_changes_no_text(bits: str) -> None:
    model = decoder("qwen3")
    ids, mask = prompt(20, 9, 14)
    place = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad(), fewer.apply(model, f"agile_quant:keep=0.6,layers=0+1,bits={bits}"):
        together = model(ids, attention_mask=mask, position_ids=place).logits
        for i, n in enumerate((20, 9, 14)):
            alone = model(ids[i : i + 1, -n:]).logits[0]
            if bits == "none":
                assert_close(alone, together[i, -n:], atol=2e-5, rtol=2e-4)
            else:  # a sum in another order may round to the next step
                assert (alone - together[i, -n:]).abs().mean() < 0.05
