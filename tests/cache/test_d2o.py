"""Merging in the cache: which rows fold into which, with what weight, and that nothing else changes."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close
from transformers import DynamicCache

import fewer
from decoders import decoder, prompt
from fewer.compat import cached


def read(model, ids, mask=None) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    place = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
    model(ids, attention_mask=mask, position_ids=place, **cached(model, cache))
    return cache


def folded(k: torch.Tensor, x: torch.Tensor, kept: list[int], first: int) -> torch.Tensor:
    """(K, d): one head, row by row. k: (S, d) keys, x: keys or values; rows before `first` are padding."""
    gone = [i for i in range(first, k.shape[0]) if i not in kept]
    twin, like = {}, {}
    for i in gone:
        cosine = [float(torch.cosine_similarity(k[i], k[j], dim=0)) for j in kept]
        like[i] = max(cosine)
        twin[i] = kept[cosine.index(like[i])]
    mean = sum(like.values()) / len(like)
    rows = []
    for j in kept:
        members = [i for i in gone if twin[i] == j and like[i] >= mean]
        total = math.e + sum(math.exp(like[i]) for i in members)
        rows.append((math.e * x[j] + sum(math.exp(like[i]) * x[i] for i in members)) / total)
    return torch.stack(rows)


@pytest.mark.parametrize("lengths", [(40,), (40, 23)])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rows_fold_into_their_twins(family, lengths):
    model = decoder(family)
    ids, mask = prompt(*lengths)
    with torch.no_grad():
        plain = read(model, ids, mask)
        with fewer.apply(model, "d2o:keep=0.4") as session:
            cache = read(model, ids, mask)
            kept = [session.kept(layer) for layer in range(3)]
        with fewer.apply(model, "h2o:keep=0.4,decodes=false") as session:
            read(model, ids, mask)
            assert all(torch.equal(session.kept(layer), kept[layer]) for layer in range(3))
        with fewer.apply(model, "d2o:keep=0.4,merge=false"):
            rows = read(model, ids, mask).layers[1]
    for index, layer in enumerate(cache.layers):
        k, v = layer.view()
        for b, n in enumerate(lengths):
            for g in range(k.shape[1]):
                mine = [row for row in kept[index][b, g].tolist() if row >= 0]
                assert len(mine) == int(0.4 * n)
                full = plain.layers[index]
                for got, x in ((k, full.keys), (v, full.values)):
                    wanted = folded(full.keys[b, g], x[b, g], mine, 40 - n)
                    assert_close(got[b, g, : len(mine)], wanted, atol=1e-5, rtol=1e-5)
    merged, dropped = cache.layers[1].view()[1], rows.view()[1]
    assert not torch.equal(merged, dropped)  # something was folded


def test_a_row_and_its_copy_become_one_and_strangers_are_dropped():
    from fewer.core import Place, Seen
    from fewer.core.cache import CacheSignals, Rows
    from fewer.spec import parse

    k = torch.eye(4)[None, None, [0, 1, 0, 2, 3, 0]]  # rows 0, 2 and 5 are alike; 1, 3, 4 are like nobody
    v = torch.arange(6.0).view(1, 1, 6, 1).expand(-1, -1, -1, 4)
    q = torch.zeros(1, 1, 6, 4)
    rows = Rows(1, 6, totals=(6,))
    plan = parse("d2o:tokens=2,recent=0.0").plan(
        CacheSignals(k, rows, Place(0, 1), Seen(q, k, v, 1.0, causal=True)), rows
    )
    assert plan.position.tolist() == [[[0, 1]]]  # uniform attention: the earliest have gathered most
    assert_close(plan.reduce(v)[0, 0, :, 0], torch.tensor([(0 + 2 + 5) / 3, 1.0]))  # e for each of the three


def test_a_padded_batch_writes_what_each_prompt_writes_alone():
    model = decoder("llama")
    lengths = (40, 18)
    ids, mask = prompt(*lengths)
    settings = dict(max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True)
    with fewer.apply(model, "d2o:keep=0.4"):
        together = model.generate(ids, attention_mask=mask, **settings)
        for i, n in enumerate(lengths):
            alone = model.generate(ids[i : i + 1, -n:], **settings)
            for x, y in zip(alone.logits, together.logits, strict=True):
                assert_close(x[0], y[i], rtol=2e-4, atol=2e-4)
    with pytest.raises(ValueError, match=r"recent=1\.5"):
        fewer.apply(model, "d2o:recent=1.5")
