"""Which tokens teach: Rho-1, UPFT, texts that end early, patches left out while training."""

from __future__ import annotations

import socket
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

import fewer
from decoders import VOCAB, prompt
from fewer.core import SignalError
from fewer.methods.training.rho1 import _gathered, _largest
from fewer.testing.models import tiny_vit
from fewer.training.prefixes import Prefixes


def llama(seed: int, words: int = VOCAB) -> Any:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=words, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=64,
        )
    )  # fmt: skip


def pair() -> tuple[Any, Any]:
    """A model and a reference that is another."""
    return llama(3).train(), llama(5).eval()


def each(model: Any, ids: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
    logits = model(ids, attention_mask=mask).logits[:, :-1].transpose(1, 2)
    return F.cross_entropy(logits, labels[:, 1:], reduction="none")


def batch() -> tuple[Tensor, Tensor, Tensor]:
    ids, mask = prompt(16, 9)
    return ids, mask, ids.masked_fill(mask == 0, -100)


# -- Rho-1 -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("share", [0.3, 0.6, 0.7])
def test_the_largest_excess_of_the_batch_teaches(share: float) -> None:
    model, reference = pair()
    ids, mask, labels = batch()
    own, theirs = each(model, ids, labels, mask), each(reference, ids, labels, mask)
    valid = labels[:, 1:] != -100
    excess = (own - theirs).detach()[valid]
    count = int(share * len(excess) + 1e-9)
    best = sorted(range(len(excess)), key=lambda i: (-float(excess[i]), i))[:count]
    want = own[valid][best].mean()
    with fewer.apply(model, "rho1", keep=share, guide=reference) as session:
        out = model(ids, attention_mask=mask, labels=labels)
        assert_close(out.loss, want)
        assert sum(int(n) for n in session.last.counts[-1]) == count
        out.loss.backward()
    got = model.lm_head.weight.grad.clone()
    model.zero_grad()
    each(model, ids, labels, mask)[valid][best].mean().backward()
    assert_close(got, model.lm_head.weight.grad)
    assert all(p.grad is None for p in reference.parameters())


def test_in_each_sample() -> None:
    model, reference = pair()
    ids, mask, labels = batch()
    own, theirs = each(model, ids, labels, mask), each(reference, ids, labels, mask)
    with fewer.apply(model, "rho1:keep=0.5,over=sample", guide=reference) as session:
        model(ids, attention_mask=mask, labels=labels)
        assert [int(n) for n in session.last.counts[-1]] == [7, 4]
        kept = session.last.tokens
        for row, count in enumerate((7, 4)):
            excess = (own - theirs)[row].masked_fill(labels[row, 1:] == -100, -torch.inf)
            assert set(kept.place()[row][kept.unpadded[row]].tolist()) == set(excess.topk(count).indices.tolist())


def test_all_tokens_are_plain_training() -> None:
    model, reference = pair()
    ids, mask, labels = batch()
    plain = model(ids, attention_mask=mask, labels=labels).loss
    with fewer.apply(model, "rho1:keep=1.0", guide=reference):
        assert_close(model(ids, attention_mask=mask, labels=labels).loss, plain)


def test_ties_go_to_the_first() -> None:
    """A model held against itself has no excess anywhere."""
    model, _ = pair()
    ids, mask, labels = batch()
    own = each(model, ids, labels, mask)
    with fewer.apply(model, "rho1:keep=0.5", guide=llama(3)) as session:
        assert_close(model(ids, attention_mask=mask, labels=labels).loss, own[0, :12].mean())  # half of 15 and 9
        assert [int(n) for n in session.last.counts[-1]] == [12, 0]


def test_steps_whose_gradients_are_added_up_are_one_batch() -> None:
    """As Trainer does it: each step is told how many labels there are in all."""
    model, reference = pair()
    halves = [prompt(12, 12), prompt(12, 4)]
    with fewer.apply(model, "rho1:keep=0.5", guide=reference):
        for ids, mask in halves:
            labels = ids.masked_fill(mask == 0, -100)
            valid = int((labels[:, 1:] != -100).sum())
            alone = model(ids, attention_mask=mask, labels=labels).loss
            part = model(ids, attention_mask=mask, labels=labels, num_items_in_batch=torch.tensor(40)).loss
            assert_close(part, alone * valid / 40)


def test_what_it_cannot_do_is_said() -> None:
    model, reference = pair()
    ids, _, labels = batch()
    with fewer.apply(model, "rho1"), pytest.raises(SignalError, match="guide=reference"):
        model(ids, labels=labels)
    with fewer.apply(model, "rho1", guide=reference), pytest.raises(fewer.SessionError, match="return_dict=True"):
        model(ids, labels=labels, return_dict=False)
    with pytest.raises(ValueError, match="one share"):
        fewer.apply(model, "rho1:tokens=4", guide=reference)
    with pytest.raises(fewer.SessionError, match="vision-language models"):
        fewer.apply(model, "snapkv:keep=0.5", guide=reference)
    other = llama(0, VOCAB + 4)
    with fewer.apply(model, "rho1", guide=other), pytest.raises(fewer.SessionError, match=f"knows {VOCAB + 4} tokens"):
        model(ids, labels=labels)


def test_noise_teaches_less_than_by_chance() -> None:
    """Random words cost the model and its reference the same; what can be learned stands out."""
    torch.manual_seed(0)
    n, noisy = 32, torch.rand(64, 32) < 0.3
    clean = (torch.arange(n) * 3 + torch.randint(VOCAB, (64, 1))) % VOCAB
    ids = torch.where(noisy, torch.randint(VOCAB, (64, n)), clean)
    reference, model = llama(0).train(), llama(1).train()
    optimiser = torch.optim.AdamW(reference.parameters(), lr=3e-3)
    for step in range(60):
        some = clean[torch.randint(64, (16,), generator=torch.Generator().manual_seed(step))]
        reference(some, labels=some).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    with fewer.apply(model, "rho1:keep=0.5", guide=reference.eval()) as session:
        model(ids, labels=ids)
        place, there = session.last.tokens.place(), session.last.tokens.unpadded
    hit = noisy[:, 1:].gather(1, place)[there].float().mean()
    assert hit < 0.15, f"{hit:.2f} of those that teach are noise, and 0.30 of all are"


def _process(rank: int, port: int, scores: Tensor, valid: Tensor, out: Any) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    mine = slice(0, 10) if rank == 0 else slice(10, 16)  # of different lengths
    values, real, start = _gathered(scores[mine], valid[mine])
    stays = _largest(values[None], real[None], real.sum(), 0.4)[0]
    out[rank] = stays[start : start + len(scores[mine])].tolist()
    dist.destroy_process_group()


@pytest.mark.slow
def test_several_processes_choose_as_one_would() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.manual_seed(0)
    scores, valid = torch.randn(16), torch.rand(16) < 0.8
    want = _largest(scores[None], valid[None], valid.sum(), 0.4)[0].tolist()
    with mp.Manager() as manager:
        out = manager.dict()
        mp.spawn(_process, (port, scores, valid, out), nprocs=2)
        assert out[0] + out[1] == want


# -- UPFT --------------------------------------------------------------------------------------------------------------
def test_the_first_labels_teach() -> None:
    model, _ = pair()
    ids, mask, _ = batch()
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :10] = -100  # the question
    own = each(model, ids, labels, mask)
    with fewer.apply(model, "upft:tokens=3,whole=0") as session:
        loss = model(ids, attention_mask=mask, labels=labels).loss
        assert [int(n) for n in session.last.counts[-1]] == [3, 3]
    assert_close(loss, own[:, 9:12].mean())
    with fewer.apply(model, "upft:tokens=3,whole=1"):
        assert_close(model(ids, attention_mask=mask, labels=labels).loss, own[:, 9:].mean())


def test_some_samples_stay_whole() -> None:
    model, _ = pair()
    ids = torch.randint(VOCAB, (200, 8), generator=torch.Generator().manual_seed(0))
    with fewer.apply(model, "upft:tokens=2,whole=0.25") as session, torch.no_grad():
        model(ids, labels=ids)
        counts = session.last.tokens.unpadded.sum(-1)
    assert set(counts.tolist()) == {2, 7}
    assert 30 <= int((counts == 7).sum()) <= 70  # 50 on average, five standard deviations about


def test_examples_end_behind_the_first_labels() -> None:
    example = {
        "input_ids": list(range(9)),
        "labels": [-100] * 3 + list(range(3, 9)),
        "attention_mask": [1] * 9,
        "id": "x",
    }
    cut = Prefixes(2, whole=0)(example, 0)
    assert cut == {"input_ids": [0, 1, 2, 3, 4], "labels": [-100] * 3 + [3, 4], "attention_mask": [1] * 5, "id": "x"}
    assert Prefixes(6, whole=0)(example, 0) == example
    assert Prefixes(2, whole=1)(example, 0) == example
    ended = Prefixes(2, whole=0, end=99)(example, 0)
    assert (ended["labels"][-2:], len(ended["attention_mask"])) == ([4, 99], 6)
    share = sum(Prefixes(2, whole=0.1).keeps(i) for i in range(2000)) / 2000
    assert 0.07 < share < 0.13
    with pytest.raises(ValueError, match="9 input_ids and 2 labels"):
        Prefixes()({"input_ids": list(range(9)), "labels": [1, 2]}, 0)
    with pytest.raises(ValueError, match="tokens=0"):
        Prefixes(0)


# -- PatchDropout ------------------------------------------------------------------------------------------------------
def test_patches_are_left_out_while_training_and_never_later() -> None:
    model = tiny_vit()
    x = torch.randn(4, 3, *[model.config.image_size] * 2)
    with torch.no_grad():
        plain = model(x)[0]
    with fewer.apply(model, "patch_dropout:keep=0.5") as session:
        with torch.no_grad():
            assert torch.equal(model(x)[0], plain)
        model.train()
        model(x)[0].sum().backward()
        free = session.last.first.free_count
        assert session.last.tokens.n == session.last.first.n - free + free // 2
        first = session.kept(0)
        model(x)
        assert not torch.equal(first, session.kept(0)), "another draw at every step"
        assert not torch.equal(first[0], first[1]), "and for every picture"
    assert model.vit.embeddings.patch_embeddings.projection.weight.grad is not None
