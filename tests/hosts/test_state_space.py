"""Tokens leave between the blocks of Mamba and Mamba-2: the state then reads what is left, and nothing else changes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import fewer
from decoders import VOCAB, prompt
from fewer.compat import cache_of, cached
from fewer.core import Budget, KeepRatio, Reducer, SignalError, Site
from fewer.hosts import HostError
from fewer.runtime.program import SessionError
from fewer.testing import Honest
from fewer.testing.checks import same_snapshot, snapshot

KINDS = ("mamba", "mamba2")
CLOSE = dict(atol=2e-5, rtol=2e-4)
GREEDY = dict(max_new_tokens=6, do_sample=False)
MERGES = "utrc:keep=0.6,layers=0+2"
DROPS = "utrc:keep=0.6,pruned=1,layers=0+2"


@dataclass(frozen=True)
class Before(Honest):
    budget: Budget = KeepRatio(0.6)
    layers: tuple[int, ...] | None = (1, 3)
    site: ClassVar[Site] = Site.BEFORE_BLOCK


@cache
def scan(kind: str) -> nn.Module:
    """Four blocks of width 32, weights large enough that the states say something."""
    from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

    torch.manual_seed(7)
    size = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=4, state_size=8, pad_token_id=0, bos_token_id=1,
                eos_token_id=2, initializer_range=0.25)  # fmt: skip
    if kind == "mamba":
        model: nn.Module = MambaForCausalLM(MambaConfig(**size))
    else:
        model = Mamba2ForCausalLM(Mamba2Config(**size, num_heads=8, head_dim=8, n_groups=2, chunk_size=8))
    model.generation_config.eos_token_id = None
    return model.eval()


def logits(model: nn.Module, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(ids, attention_mask=mask).logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["utrc:keep=1.0", "random:keep=1.0,layers=0", Before(KeepRatio(1.0))], ids=str)
def test_keeping_all_is_the_model_to_the_bit(kind: str, method: str | Reducer) -> None:
    model = scan(kind)
    ids, mask = prompt(17, 9, 13)
    plain, words = logits(model, ids, mask), model.generate(ids, attention_mask=mask, **GREEDY)
    with fewer.apply(model, method):
        assert torch.equal(logits(model, ids, mask), plain)
        assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), words)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [MERGES, DROPS, Before()], ids=str)
def test_later_blocks_are_the_models_own_on_the_rows_that_are_left(kind: str, method: str | Reducer) -> None:
    """An independent reference: the model itself, its blocks fed with what the plans make of the features. It then
    writes on from the same states."""
    model = scan(kind)
    ids, _ = prompt(21)
    words = prompt(4, seed=3)[0]
    with torch.no_grad(), fewer.apply(model, method) as session:
        out = model(ids, use_cache=True)
        steps, origin = session.last.steps, session.last.kept(3)[0]
        late = session.methods[0].site is Site.AFTER_BLOCK
        assert int(origin[-1]) == 20
        assert bool((origin.diff() > 0).all())
        got = [model(words[:, i : i + 1], **cached(model, cache_of(out)), use_cache=True).logits for i in range(4)]
        got_more = torch.cat(got, 1)
    blocks = model.backbone.layers
    handles = []
    for step in steps:
        if step.layer + late < len(blocks):
            handles.append(blocks[step.layer + late].register_forward_pre_hook(
                lambda _, args, plan=step.plan: (plan.reduce(args[0]), *args[1:])
            ))  # fmt: skip
    with torch.no_grad():
        want = model(ids, use_cache=True)
        for handle in handles:
            handle.remove()
        more = [model(words[:, i : i + 1], **cached(model, cache_of(want)), use_cache=True).logits for i in range(4)]
    assert_close(out.logits[:, origin], want.logits, **CLOSE)
    assert_close(got_more, torch.cat(more, 1), **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_left_keep_their_last_value(kind: str) -> None:
    model = scan(kind)
    ids, _ = prompt(16)
    with torch.no_grad():
        seen: list[Tensor] = []
        handle = model.backbone.layers[1].register_forward_hook(lambda _, __, out: seen.append(out))
        model.backbone(ids)
        handle.remove()
        with fewer.apply(model, "utrc:keep=0.6,pruned=1,layers=1") as session:
            out = model.backbone(ids).last_hidden_state
            gone = [i for i in range(16) if i not in session.last.kept(1)[0].tolist()]
        assert len(gone) == 6
        assert out.shape == (1, 16, 32)
        assert_close(out[0, gone], model.backbone.norm_f(seen[0])[0, gone], **CLOSE)
        with fewer.apply(model, "utrc:keep=0.6,pruned=0,layers=1") as session:
            out = model.backbone(ids).last_hidden_state
            row = session.last.rows(1)[0]
    for i in range(16):  # who merged has the value of the row it is in
        assert torch.equal(out[0, i], out[0, int(session.last.kept(1)[0, row[i]])])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [MERGES, DROPS, Before(), "random:keep=0.6,layers=0+2"], ids=str)
def test_a_batch_changes_no_text(kind: str, method: str | Reducer) -> None:
    model = scan(kind)
    ids, mask = prompt(20, 9, 14)
    with fewer.apply(model, method):
        together = logits(model, ids, mask)
        words = model.generate(ids, attention_mask=mask, **GREEDY)
        for i, n in enumerate((20, 9, 14)):
            assert_close(logits(model, ids[i : i + 1, -n:])[0], together[i, -n:], **CLOSE)
            assert torch.equal(model.generate(ids[i : i + 1, -n:], **GREEDY)[0, n:], words[i, 20:])


@pytest.mark.parametrize("kind", KINDS)
def test_removal_leaves_no_trace(kind: str) -> None:
    model = scan(kind)
    ids, mask = prompt(17, 9)
    plain, before = logits(model, ids, mask), snapshot(model)
    session = fewer.apply(model, MERGES)
    model.generate(ids, attention_mask=mask, **GREEDY)
    session.remove()
    session.remove()
    same_snapshot(before, snapshot(model), "after remove()")
    assert torch.equal(logits(model, ids, mask), plain)


def test_gradients_reach_every_token() -> None:
    model = scan("mamba2")
    ids, mask = prompt(17, 9)
    x = model.get_input_embeddings()(ids).detach().requires_grad_()
    with fewer.apply(model, "utrc:keep=0.6,pruned=0,layers=0+2"):
        model(inputs_embeds=x, attention_mask=mask).logits[:, -1].square().sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())
    assert bool((x.grad.abs().sum(-1)[mask > 0] > 0).all())


def test_what_cannot_be_done_is_refused() -> None:
    model = scan("mamba")
    for execution in ("masked", "packed"):
        with pytest.raises(SessionError, match="state-space model reads every row"):
            fewer.apply(model, MERGES, execution=execution)
    with pytest.raises(HostError, match="KV cache"):
        fewer.apply(model, "snapkv:keep=0.5")
    ids, _ = prompt(9)
    with fewer.apply(model, "tome:r=2"), pytest.raises(SignalError, match="the block has none"):
        model(ids)
    with fewer.apply(model, "sdtp:keep=0.6,layers=1", modules="untrained"):
        model.train()
        try:
            with pytest.raises(HostError, match="training form"):
                model(ids)
        finally:
            model.eval()
        assert logits(model, ids).isfinite().all()


def test_the_ledger_by_hand() -> None:
    """Mamba of width 32, inner width 64, state 8, a step of rank 2: 20 tokens in two blocks, 12 in the other two. The
    short convolution is left out."""
    model = scan("mamba")
    ids, _ = prompt(20)
    with fewer.apply(model, Before(KeepRatio(0.6), layers=(2,))) as session:
        logits(model, ids)
        ledger = session.ledger
    mixer = model.backbone.layers[0].mixer
    inner, state, rank = 64, 8, mixer.time_step_rank
    token = 32 * 2 * inner + inner * (rank + 2 * state) + rank * inner + inner * 32 + 3 * inner * state
    assert session.counts == [20, 20, 12, 12]
    assert ledger.gflops_model * 1e9 == pytest.approx(2 * 20 * token + 2 * 12 * token)
    assert ledger.ceiling == pytest.approx(80 / 64)
