"""ICAE: what is encoded is read without adapters, by weights that never change."""

from __future__ import annotations

import copy
import importlib.util
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from condensing import causal_lm, opt, padded, words
from fewer.summaries import Summary, SummaryError
from fewer.summaries.icae import ICAE

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")


def coder(slots: int = 4, **more: object) -> ICAE:
    torch.manual_seed(0)
    settings = dict(rate=2, r=8, alpha=16, dropout=0.0, enough=4, silent=1, eos=2)
    made = ICAE(copy.deepcopy(causal_lm("llama")), slots, **settings | more)
    for name, p in made.encoder.named_parameters():
        if "lora_B" in name:  # zero at first: the encoder would be the model
            p.data.normal_(std=0.2)
    return made.eval()


def test_without_peft_one_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'fewer\[lora\]'"):
        ICAE(causal_lm("llama"))


@needs_peft
@torch.no_grad()
def test_the_decoder_is_the_model_that_was_given() -> None:
    made, ids = coder(), words(2, 6)
    before = causal_lm("llama")(ids).logits
    assert torch.equal(made.model(ids).logits, before)
    summary = made.summary(ids)
    assert torch.equal(made.model(ids).logits, before)
    made.encoder.base_model.enable_adapter_layers()
    assert not torch.allclose(made.model(ids).logits, before, atol=1e-2)
    made._off()
    table = made.model.get_input_embeddings()
    whole = torch.cat([made.encode(ids)[0], made.tasks[2].expand(2, 1, -1), table(words(2, 3, 1))], 1)
    assert_close(summary.logits(words(2, 3, 1)), causal_lm("llama")(inputs_embeds=whole).logits[:, 5:])


@needs_peft
@torch.no_grad()
def test_memory_is_the_last_states_of_the_adapted_model() -> None:
    made, ids = coder(), words(2, 6)
    x = torch.cat([made.model.get_input_embeddings()(ids), made.memory.expand(2, -1, -1)], 1)
    made.encoder.base_model.enable_adapter_layers()
    states = made.model.model(inputs_embeds=x).last_hidden_state[:, -4:]
    made._off()
    assert_close(made.encode(ids)[0], states)


@needs_peft
@torch.no_grad()
def test_long_texts_are_encoded_in_segments_of_equal_length() -> None:
    """11 tokens with 4 slots for 8: two segments, of six and five, and their order is used."""
    made, ids, behind = coder(), words(1, 11), words(1, 3, 1)
    memory, valid = made.encode(ids)
    assert valid.all()
    assert_close(memory, torch.cat([made.encode(part)[0] for part in ids.split(6, 1)], 1), atol=1e-5, rtol=1e-4)
    plain = made._summary(memory, valid, "prompt")
    swapped = made._summary(memory.roll(4, 1), valid, "prompt")
    assert plain.position.tolist() == [9]
    assert (plain.logits(behind) - swapped.logits(behind)).abs().max() > 1e-3


@needs_peft
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_nothing(side: str) -> None:
    made = coder()
    rows = [words(1, 16)[0], words(1, 8, 1)[0]]
    summary, behind = made.summary(*padded(rows, side)), words(2, 3, 2)
    assert summary.valid.sum(1).tolist() == [9, 5]
    for i, row in enumerate(rows):
        alone = made.summary(row[None]).logits(behind[i : i + 1])
        assert_close(summary.logits(behind)[i : i + 1], alone, atol=2e-5, rtol=1e-4)


@needs_peft
@torch.no_grad()
def test_the_losses_by_hand() -> None:
    made = coder()
    ids, mask = padded([words(1, 6)[0], words(1, 4, 1)[0]], "right")
    total, count = 0.0, 0
    for row in (ids[0], ids[1, :4]):
        target = torch.cat([row, torch.tensor([2])])
        logits = made.summary(row[None], task="repeat")
        scores = made.model(**logits.given(target[None])).logits[0, -len(target) - 1 : -1]
        total, count = total + float(F.cross_entropy(scores, target, reduction="sum")), count + len(target)
    assert_close(float(made(ids, mask, task="repeat")["loss"]), total / count, rtol=1e-4, atol=0)
    text = words(2, 8, 3)
    scores = made.model(**made.summary(text[:, :4], task="continue").given(text[:, 4:])).logits[:, -5:-1]
    want = F.cross_entropy(scores[:, 1:].flatten(0, 1), text[:, 5:].flatten())  # the first is silent
    assert_close(made(text, task="continue")["loss"], want, rtol=1e-4, atol=1e-6)
    labels = text.masked_fill(torch.arange(8) < 6, -100)
    told = made(ids, mask, labels, prompt=text, task="prompt")
    scores = made.model(**made.summary(ids, mask).given(text)).logits[:, -9:-1]
    assert_close(
        told["loss"], F.cross_entropy(scores[:, 6:].flatten(0, 1), text[:, 6:].flatten()), rtol=1e-4, atol=1e-6
    )


@needs_peft
def test_tasks_are_drawn() -> None:
    text = words(2, 10)
    for made, want in (
        (coder(repeats=1.0), "repeat"),
        (coder(repeats=0.0), "continue"),
        (coder(repeats=0.0, enough=6), "repeat"),
    ):
        assert torch.equal(made(text)["loss"], made(text, task=want)["loss"])


@needs_peft
def test_what_learns_and_what_does_not() -> None:
    made = coder()
    made(words(2, 8), task="repeat")["loss"].backward()
    got = {name for name, p in made.named_parameters() if p.grad is not None and float(p.grad.abs().max()) > 0}
    assert got == {name for name, p in made.named_parameters() if p.requires_grad}
    assert all("lora_" in name or name in ("memory", "tasks") for name in got)
    assert any("lora_A" in name for name in got)
    own = causal_lm("llama").state_dict()
    kept = {k.replace(".base_layer", ""): v for k, v in made.model.state_dict().items() if "lora_" not in k}
    assert kept.keys() == own.keys()
    assert all(torch.equal(v, own[k]) for k, v in kept.items())


@needs_peft
def test_it_learns_to_repeat() -> None:
    """Eight random texts of six tokens come back from four slots, written by the frozen decoder."""
    made = coder(r=16).train()
    ids = words(8, 6)
    learner = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], 2e-2)
    rates = torch.optim.lr_scheduler.OneCycleLR(learner, 2e-2, total_steps=250)
    for _ in range(250):
        learner.zero_grad()
        made(ids, task="repeat")["loss"].backward()
        learner.step()
        rates.step()
    with torch.no_grad():
        right = (made(ids, task="repeat")["logits"][:, :6].argmax(-1) == ids).float().mean()
    assert right > 0.95


@needs_peft
@torch.no_grad()
def test_what_is_saved_writes_the_same(tmp_path) -> None:
    made, ids, behind = coder(), words(2, 6), words(2, 3, 1)
    summary = made.summary(ids)
    written = made.model.generate(**summary.inputs(behind), max_new_tokens=4, do_sample=False)
    summary.save(tmp_path / "memory")
    made.save(tmp_path / "coder")
    plain = copy.deepcopy(causal_lm("llama"))  # who reads needs no adapters
    again = Summary.load(tmp_path / "memory", plain)
    assert torch.equal(plain.generate(**again.inputs(behind), max_new_tokens=4, do_sample=False), written)
    loaded = ICAE.load(tmp_path / "coder", plain).eval()
    assert (loaded.slots, loaded.rate, loaded.enough, loaded.silent, loaded.eos) == (4, 2, 4, 1, 2)
    assert torch.equal(loaded.summary(ids).embeddings, summary.embeddings)
    assert any("lora_" in name and p.requires_grad for name, p in loaded.named_parameters())


@needs_peft
def test_what_cannot_be_is_refused() -> None:
    made, ids = coder(), words(2, 4)
    with pytest.raises(SummaryError, match="task='sing' is none of"):
        made.summary(ids, task="sing")
    with pytest.raises(SummaryError, match="nothing to encode"):
        made.summary(ids[:, :0])
    with pytest.raises(SummaryError, match="pad right"):
        made(*padded([ids[0], ids[1, :2]], "left"))
    with pytest.raises(SummaryError, match="needs `prompt` and its `labels`"):
        made(ids, task="prompt")
    with pytest.raises(SummaryError, match="1 tokens are left"):
        made(ids[:, :1], task="continue")
    with pytest.raises(SummaryError, match="slots=0"):
        ICAE(causal_lm("llama"), 0)
    with pytest.raises(SummaryError, match="learned positions"):
        ICAE(opt(), 4)
