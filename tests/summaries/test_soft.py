"""Soft prompts for hard ones, and contrastive conditioning."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from transformers import LogitsProcessorList

from condensing import causal_lm, padded, words
from fewer.summaries import Contrastive, Summary, SummaryError, joined, soft

LMS = ("llama", "gpt2", "opt")
PROMPT = words(1, 8, 5)[0]


def hard(kind: str = "llama", seed: int = 5, length: int = 8) -> Summary:
    return Summary.of_prompt(causal_lm(kind), words(1, length, seed))


# -- distillation -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", LMS)
@torch.no_grad()
def test_a_prompt_in_full_is_the_prompt(kind: str) -> None:
    """n = P with the prompt's own embeddings: KL 0, and the logits are those of the prompt read as ids."""
    model, texts = causal_lm(kind), words(3, 6)
    exact = soft.distill(model, PROMPT, texts, count=8, steps=0)
    assert float(soft.divergence(hard(kind), exact, texts)) < 1e-9
    whole = model(torch.cat([PROMPT.expand(3, -1), texts], 1)).logits
    assert_close(exact.logits(texts), whole[:, 8:], atol=1e-5, rtol=1e-4)
    assert exact.position.tolist() == [8]
    shifted = Summary(model, exact.valid, exact.position + 1, exact.embeddings)
    assert kind == "llama" or float(soft.divergence(hard(kind), shifted, texts)) > 1e-4  # positions count


@torch.no_grad()
def test_the_divergence_by_hand() -> None:
    """The hard prompt is the teacher; each token counts once, the first one too; padding does not."""
    model, short = causal_lm("llama"), soft.distill(causal_lm("llama"), PROMPT, words(1, 2), count=2, steps=0)
    ids, mask = padded([words(1, 6)[0], words(1, 3, 1)[0]], "right")
    total, tokens = 0.0, 0
    for i in range(2):
        row = ids[i][mask[i].bool()][None]
        p = model(torch.cat([PROMPT[None], row], 1)).logits[:, 7:-1].double().log_softmax(-1)
        q = model(torch.cat([PROMPT[None, :2], row], 1)).logits[:, 1:-1].double().log_softmax(-1)
        total, tokens = total + float((p.exp() * (p - q)).sum()), tokens + row.shape[1]
    assert_close(float(soft.divergence(hard(), short, ids, mask)), total / tokens, rtol=1e-4, atol=0)


def test_more_embeddings_say_more() -> None:
    """On held-out texts: below no prompt, and no worse with more; the model is left alone, to the bit."""
    model = causal_lm("llama")
    before, texts, held = copy.deepcopy(model.state_dict()), words(64, 6), words(64, 6, 1)
    bos = torch.tensor([1])
    with torch.no_grad():
        none = float(soft.divergence(hard(), Summary.of_prompt(model, bos[None]), held))
    found = []
    for count in (1, 4):
        draws = torch.Generator().manual_seed(0)
        made = soft.distill(model, PROMPT, texts, count=count, steps=60, lr=0.05, batch=16, generator=draws)
        assert made.embeddings.dtype == torch.float32
        with torch.no_grad():
            found.append(float(soft.divergence(hard(), made, held)))
    assert found[1] < found[0] < none
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_float32_embeddings_in_half_a_model() -> None:
    model = copy.deepcopy(causal_lm("llama")).bfloat16()
    made = soft.distill(model, PROMPT, words(8, 5), count=2, steps=3, start="vocabulary")
    assert made.embeddings.dtype == torch.float32
    assert made.logits(words(2, 3)).dtype == torch.bfloat16


@torch.no_grad()
def test_what_is_saved_writes_the_same(tmp_path) -> None:
    model, behind = causal_lm("llama"), words(2, 4, 3)
    made = soft.distill(model, PROMPT, words(4, 5), count=3, steps=2)
    written = model.generate(**made.inputs(behind), max_new_tokens=4, do_sample=False)
    for name, one in (("soft", made), ("kv", made.prefilled())):
        one.save(tmp_path / name)
        again = Summary.load(tmp_path / name, model)
        assert torch.equal(model.generate(**again.inputs(behind), max_new_tokens=4, do_sample=False), written)


def test_what_cannot_be_is_refused() -> None:
    model, texts = causal_lm("llama"), words(2, 4)
    with pytest.raises(SummaryError, match=r"needs a prompt of \(P,\) ids"):
        soft.distill(model, PROMPT[:0], texts)
    with pytest.raises(SummaryError, match=r"start is \(1, 3\); needs \(4, 32\)"):
        soft.distill(model, PROMPT, texts, start=torch.zeros(1, 3))
    with pytest.raises(SummaryError, match="pad right"):
        soft.divergence(hard(), hard(), *padded([texts[0], texts[1, :2]], "left"))
    with pytest.raises(SummaryError, match="foretell no first token"):
        soft.divergence(hard(), hard().prefilled(), texts)
    with pytest.raises(SummaryError, match="finite weight"):
        Contrastive(hard(), hard(), float("nan"))


# -- steering ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("prefilled", [False, True])
@pytest.mark.parametrize("kind", LMS)
@torch.no_grad()
def test_steering_by_hand(kind: str, prefilled: bool) -> None:
    """Three forward passes written out, step by step, on a padded batch and contexts of different lengths."""
    model, plus, minus = causal_lm(kind), words(1, 7, 11), words(1, 4, 12)
    made = [Summary.of_prompt(model, c) for c in (plus, minus)]
    ids, mask = padded([words(1, 5)[0], words(1, 3, 1)[0]], "left")
    steer = Contrastive(*(one.prefilled() if prefilled else one for one in made), 0.7, least=1e-9, mask=mask)
    steps = 3
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=steps, do_sample=False, logits_processor=LogitsProcessorList([steer]),
        output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    for i in range(2):
        row = ids[i][mask[i].bool()][None]
        for t in range(steps):
            logs = [
                F.log_softmax(model(torch.cat([*context, row], 1)).logits[0, -1], -1)
                for context in ((), (plus,), (minus,))
            ]
            want = F.log_softmax(logs[0] + 0.7 * (logs[1] - logs[2]), -1)
            assert_close(out.scores[t][i], want, atol=1e-4, rtol=1e-3)
            row = torch.cat([row, want.argmax()[None, None]], 1)
        assert out.sequences[i, -steps:].tolist() == row[0, -steps:].tolist()


@torch.no_grad()
def test_no_weight_is_plain_sampling() -> None:
    model, ids = causal_lm("llama"), words(2, 4)
    runs = []
    for processors in ([], [Contrastive(hard(), hard(seed=9), 0.0)]):
        torch.manual_seed(3)
        every = LogitsProcessorList(processors)
        runs.append(model.generate(ids, do_sample=True, max_new_tokens=6, logits_processor=every))
    assert torch.equal(*runs)


@torch.no_grad()
def test_steering_raises_what_the_context_raises() -> None:
    model, ids = causal_lm("llama"), words(4, 4)
    plain = model(ids).logits[:, -1].log_softmax(-1)
    gap = [hard(seed=s).take([0] * 4).logits(ids)[:, -1].log_softmax(-1) for s in (5, 9)]
    toward = [Contrastive(hard(), hard(seed=9), w, least=0.0)(ids, plain) for w in (-1.0, 1.0, 3.0)]
    means = [float((x.exp() * (gap[0] - gap[1])).sum(-1).mean()) for x in toward]
    assert means == sorted(means)
    timid = Contrastive(hard(), hard(seed=9), 3.0, least=0.05)(ids, plain)
    rare = plain.exp() < 0.05
    offset = (timid - plain).masked_fill(~rare, float("nan"))
    spread = [row[~row.isnan()] for row in offset]
    assert all(float(row.max() - row.min()) < 1e-4 for row in spread)  # not steered among themselves


@torch.no_grad()
def test_beams_and_one_run_after_the_other() -> None:
    """What was read is used only where it fits: reordered rows and a new prompt are read anew."""
    model, ids = causal_lm("llama"), words(2, 4)

    def run(steer: Contrastive, given: torch.Tensor, beams: int) -> torch.Tensor:
        return model.generate(given, do_sample=False, num_beams=beams, max_new_tokens=4,
                              logits_processor=LogitsProcessorList([steer]))  # fmt: skip

    class Forgetful(Contrastive):
        def __call__(self, input_ids, scores):
            self._read = None
            return super().__call__(input_ids, scores)

    one = Contrastive(hard(), hard(seed=9), 1.0)
    for given, beams in ((ids, 3), (ids, 1), (words(2, 4, 8), 1)):
        assert torch.equal(run(one, given, beams), run(Forgetful(hard(), hard(seed=9), 1.0), given, beams))


@torch.no_grad()
def test_two_prompts_one_behind_the_other_are_both_read() -> None:
    """Joined, two exact prompts are the two prompts in one text."""
    model, a, b, ids = causal_lm("llama"), words(1, 4, 5), words(1, 3, 6), words(2, 4)
    both = joined([Summary.of_prompt(model, a), Summary.of_prompt(model, b)])
    whole = model(torch.cat([a.expand(2, -1), b.expand(2, -1), ids], 1)).logits[:, 7:]
    assert_close(both.logits(ids), whole, atol=1e-5, rtol=1e-4)
