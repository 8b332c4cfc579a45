"""SpAtten: importance adds up over blocks and steps, what went never returns, and a schedule says how many."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import fewer
from decoders import decoder, prompt
from fewer.core import Place
from fewer.core.budgets import BudgetError, Cascade
from fewer.testing.models import tiny_vit

LAYERS = 3


def test_the_schedule_by_hand() -> None:
    budget = Cascade(0.4, of="start", rounding="ceil")
    counts = [budget.keep(100, Place(i, 12, i, 12, 100)) for i in range(12)]
    assert counts[:3] == [100, 100, 100]  # 15 % of 12 is 2, but three blocks are the least
    assert counts[3:] == [94, 87, 80, 74, 67, 60, 54, 47, 40]  # a ninth of 60 less in each, rounded up
    assert [Cascade.dense(n) for n in (1, 3, 12, 24, 40)] == [0, 2, 3, 4, 6]
    with pytest.raises(BudgetError, match="one share"):
        Cascade((0.5, 0.2))


def maps(model, ids) -> list[torch.Tensor]:
    """Attention of all blocks, nothing pruned: (B, H, N, N) each."""
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            return list(model(ids, output_attentions=True, use_cache=False).attentions)
    finally:
        model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("average", [False, True])
def test_importance_without_pruning_is_the_sum_of_columns_over_blocks(average: bool) -> None:
    model, (ids, _) = decoder("llama"), prompt(13)
    columns = torch.stack([m.sum((1, 2)) for m in maps(model, ids)]).cumsum(0)  # (layers, B, N)
    seen: list[torch.Tensor] = []
    method = fewer.parse(f"spatten:keep=1.0,average={str(average).lower()}")
    ask = type(method).importance

    def listen(self, signals, tokens):
        seen.append(ask(self, signals, tokens))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), fewer.apply(model, method):
        patch.setattr(type(method), "importance", listen)
        model(ids, use_cache=False)
    assert len(seen) == LAYERS  # asked in the dense blocks too
    heads = model.config.num_attention_heads
    for layer, mine in enumerate(seen, 1):
        queries = torch.arange(13, 0, -1.0) * layer if average else 1
        assert_close(mine, columns[layer - 1] / queries, atol=1e-4, rtol=1e-4)
        if not average:
            assert_close(mine.sum(-1), torch.full((1,), layer * heads * 13.0))  # rows of a softmax sum to one


def test_the_last_block_keeps_the_highest_sums_of_all_blocks() -> None:
    model, (ids, _) = decoder("llama"), prompt(13)
    total = torch.stack([m.sum((1, 2)) for m in maps(model, ids)]).sum(0)[0]
    with torch.no_grad(), fewer.apply(model, "spatten:keep=0.5") as session:
        model(ids, use_cache=False)
        assert session.counts[-1] == 7  # half of the 12 that may go, rounded up, and the last token
        best = total[:12].argsort(descending=True)[:6]
        assert sorted(session.last.kept(2)[0].tolist()) == sorted([*best.tolist(), 12])


def test_on_an_encoder_with_padding_each_text_keeps_its_own_share() -> None:
    model = tiny_vit("bert")
    ids = torch.randint(3, 50, (2, 16), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(16) < torch.tensor([[16], [9]])).long()
    with torch.no_grad(), fewer.apply(model, "spatten:keep=0.5") as session:
        model(ids * mask, attention_mask=mask)
        counts = session.counts.tolist()
    assert counts == [[16, 9]] * 3 + [[9, 5]]  # half of 15 and of 8, rounded up, and the first


def six_blocks() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128,
    )  # fmt: skip
    net = LlamaForCausalLM(config).eval()
    for p in net.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.2)
    return net


@pytest.mark.parametrize("forms", [["spatten_decode:keep=0.2"], ["spatten:keep=0.3", "spatten_decode:keep=0.2"]])
def test_what_a_block_dropped_is_in_no_later_block_and_never_returns(forms: list[str]) -> None:
    model = six_blocks()
    ids, _ = prompt(25, 25)
    cache = DynamicCache(config=model.config)
    before: list[list[set[int]]] | None = None
    with torch.no_grad(), fewer.apply(model, forms) as session:
        for step in range(8):
            model(ids if not step else ids[:, step : step + 1], past_key_values=cache, logits_to_keep=1)
            kept = [[set(row.tolist()) - {-1} for row in session.kept(layer)[:, 0]] for layer in range(6)]
            for upper, lower in pairwise(kept):
                assert all(b <= a for a, b in zip(upper, lower, strict=True))
            if before is not None:
                for layer in range(6):
                    new = {24 + step}
                    assert all(b <= a | new for a, b in zip(before[layer], kept[layer], strict=True))
            assert len(kept[-1][0]) <= -(-0.2 * (25 + step) // 1) + 1 < len(kept[0][0])
            before = kept


def test_importance_goes_on_over_steps() -> None:
    """With nothing pruned, what is kept for each token is the sum of columns over all blocks and all steps."""
    model, (ids, _) = decoder("llama"), prompt(12)
    want = torch.stack([m.sum((1, 2)) for m in maps(model, ids)]).sum(0)
    with torch.no_grad(), fewer.apply(model, "spatten_decode:keep=1.0") as session:
        cache = DynamicCache(config=model.config)
        model(ids[:, :8], past_key_values=cache, logits_to_keep=1)
        for t in range(8, 12):
            model(ids[:, t : t + 1], past_key_values=cache)
        got = next(iter(cache.layers[0].memory.values()))["importance"][..., 0]
    assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert session.ledger.stored == [12.0] * LAYERS


def test_the_newest_token_stays() -> None:
    with pytest.raises(BudgetError, match="recent=0"):
        fewer.parse("spatten_decode:recent=0")
