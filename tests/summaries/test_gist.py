"""Gist tokens: the masks are the official ones, and a gist that was cached is the gist that was trained."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from condensing import causal_lm, golden, padded, words
from fewer.summaries import Collator, Gist, Summary, SummaryError, gist, stacked

LMS = ("llama", "qwen2", "qwen3", "gpt2", "opt")
TOKEN = 60
GIST = Gist(TOKEN, count=2)


def examples(lengths=((5, 4), (2, 6), (7, 3)), seed: int = 0):
    """Instructions and what follows, without gist tokens."""
    drawn = words(len(lengths), 20, seed).clamp(max=TOKEN - 1)
    return [(row[:a], row[10 : 10 + b]) for row, (a, b) in zip(drawn, lengths, strict=True)]


def batch(pairs, side: str) -> dict[str, torch.Tensor]:
    made = [GIST.example(a.tolist(), b[:1].tolist(), b[1:].tolist()) for a, b in pairs]
    return Collator(TOKEN, pad=0, side=side)(made)


# -- masks -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", [0, 2])
def test_masks_are_the_official_ones(seed: int) -> None:
    told = golden("gist_masks", seed)
    ids, token, valid = told["input_ids"], int(told["gist_token"]), told["input_ids"] != told["pad_token"]
    for control, name in (("gist", "gist_mask"), ("positive", "pos_control"), ("negative", "neg_control")):
        assert torch.equal(gist.attention(ids, token, valid, control=control).long(), told[name])
    assert torch.equal(gist.attention(ids, token).long(), told["gist_mask_nopad"])
    rows = (ids == token).any(1)
    assert torch.equal(gist.cross_attention(ids, token, valid)[rows, 0, 0].long(), told["pre_first"][rows])


def test_no_query_of_a_decoder_is_blind_and_none_looks_ahead() -> None:
    made = batch(examples(), "left")
    sees = made["attention_mask"] == 0
    t = sees.shape[-1]
    assert sees.any(-1).all()
    assert not (sees & ~torch.ones(t, t, dtype=torch.bool).tril()).any()


def test_an_unknown_control_is_refused() -> None:
    with pytest.raises(SummaryError, match="control='none' is none of"):
        gist.attention(words(1, 4), TOKEN, control="none")


# -- the token ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("tied", [True, False])
def test_the_new_token_is_the_mean_of_the_others(tied: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=13, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=tied,
    ))  # fmt: skip
    rows = [model.get_input_embeddings().weight.detach().clone(), model.get_output_embeddings().weight.detach().clone()]
    assert gist.add_token(model) == 13
    assert model.config.vocab_size == 14
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    for before, part in zip(rows, (model.get_input_embeddings(), model.get_output_embeddings()), strict=True):
        assert_close(part.weight[13], before.mean(0))
        assert torch.equal(part.weight[:13], before)


def test_a_tokenizer_gets_the_token_too() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?")
    model = copy.deepcopy(causal_lm("llama"))  # 61 rows, of which the tokenizer knows three
    table = model.get_input_embeddings().weight.detach().clone()
    assert gist.add_token(model, tokenizer) == 3
    assert tokenizer("a <GIST><GIST> b")["input_ids"] == [0, 3, 3, 1]
    assert len(model.get_input_embeddings().weight) == 61
    assert_close(model.get_input_embeddings().weight[3], torch.cat([table[:3], table[4:]]).mean(0))


# -- training and use agree --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", LMS)
@torch.no_grad()
def test_cached_gist_is_the_masked_forward(kind: str, side: str) -> None:
    """For each row of a padded batch; instructions are padded on the same side, what follows on the left."""
    model, pairs = causal_lm(kind), examples()
    made = batch(pairs, side)
    labels = made.pop("labels")
    whole = model(**made).logits
    ids, mask = padded([a for a, _ in pairs], side)
    summary = GIST.summary(model, **GIST.after(ids, mask))
    assert summary.position.tolist() == [7, 4, 9]  # where the input stood, and no renumbering
    behind, seen = padded([b for _, b in pairs], "left")
    cached = summary.logits(behind, seen)
    for i, (a, b) in enumerate(pairs):
        start = int((made["input_ids"][i] == TOKEN).nonzero()[-1]) + 1
        assert_close(cached[i, -len(b) :], whole[i, start : start + len(b)], atol=2e-5, rtol=1e-4)
        assert labels[i, start + 1 : start + len(b)].tolist() == b[1:].tolist()
        alone = GIST.summary(model, **GIST.after(a[None]))
        assert_close(alone.logits(b[None])[0], cached[i, -len(b) :], atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_positions_from_zero_would_not_do() -> None:
    """The test above can fail: a summary whose text goes on at k gives other logits."""
    model, (a, b) = causal_lm("llama"), examples()[0]
    summary = GIST.summary(model, **GIST.after(a[None]))
    wrong = Summary(model, summary.valid, summary.position * 0 + 2, rows=summary.rows)
    assert (wrong.logits(b[None]) - summary.logits(b[None])).abs().max() > 1e-2


@torch.no_grad()
def test_what_follows_sees_the_instruction_through_the_gist_alone() -> None:
    model = causal_lm("llama")
    (a, b), other = examples()[0], words(1, 5, seed=9)[0].clamp(max=TOKEN - 1)
    first, changed = (batch([(row, b)], "right") for row in (a, other))
    behind = slice(len(a) + GIST.count, None)
    assert (model(**first).logits - model(**changed).logits)[:, behind].abs().max() > 1e-3  # through the gist
    control = Collator(TOKEN, 0, control="negative")
    cut = [control([GIST.example(row.tolist(), b[:1].tolist(), b[1:].tolist())]) for row in (a, other)]
    assert torch.equal(*(model(**one).logits[:, behind] for one in cut))


@torch.no_grad()
def test_the_instruction_is_not_read_again() -> None:
    """Once it is cached, the tokens it was made of are nowhere: changing them changes nothing."""
    model, (a, b) = causal_lm("llama"), examples()[0]
    given = GIST.after(a[None])
    summary = GIST.summary(model, **given)
    before = summary.logits(b[None])
    given["ids"].fill_(5)
    assert torch.equal(summary.logits(b[None]), before)
    assert [tuple(k.shape) for k, _ in summary.rows] == [(1, 2, GIST.count, 8)] * 3


def test_gradients_reach_the_instruction_through_the_gist_rows_only() -> None:
    """With the keys and values of the gist rows held fixed, nothing of the completion reaches the instruction."""
    model, (a, b) = copy.deepcopy(causal_lm("llama")), examples()[0]
    made = batch([(a, b)], "right")
    made.pop("labels")
    ids = made.pop("input_ids")
    rows = slice(len(a), len(a) + GIST.count)

    def slope(held: bool) -> float:
        x = model.get_input_embeddings()(ids).detach().requires_grad_()

        def hold(_m, _args, output):
            return torch.cat([output[:, : rows.start], output[:, rows].detach(), output[:, rows.stop :]], 1)

        parts = [p for n, p in model.named_modules() if held and n.endswith(("k_proj", "v_proj"))]
        hooks = [part.register_forward_hook(hold) for part in parts]
        model(inputs_embeds=x, **made).logits[:, rows.stop :].square().sum().backward()
        for hook in hooks:
            hook.remove()
        return float(x.grad[:, : rows.start].abs().max())

    assert slope(held=False) > 1e-3
    assert slope(held=True) == 0


# -- use ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", LMS)
def test_generate_goes_on_behind_a_gist(kind: str, tmp_path) -> None:
    """Greedy by hand, one token after the other over the masked whole, is what `generate` writes; saved, too."""
    model, pairs = causal_lm(kind), examples()
    ids, mask = padded([a for a, _ in pairs], "left")
    summary = GIST.summary(model, **GIST.after(ids, mask))
    behind, seen = padded([b for _, b in pairs], "left")
    written = model.generate(**summary.inputs(behind, seen), max_new_tokens=4, do_sample=False)
    assert torch.equal(written[:, : behind.shape[1]], behind)
    for i, (a, b) in enumerate(pairs):
        row = b
        for _ in range(4):
            made = batch([(a, row)], "right")
            made.pop("labels")
            row = torch.cat([row, model(**made).logits[0, -1].argmax()[None]])
        assert written[i, -len(row) :].tolist() == row.tolist()
    summary.save(tmp_path / "gist.safetensors")
    again = Summary.load(tmp_path / "gist.safetensors", model)
    assert torch.equal(model.generate(**again.inputs(behind, seen), max_new_tokens=4, do_sample=False), written)
    assert torch.equal(model.generate(**summary.inputs(behind, seen), max_new_tokens=4, do_sample=False), written)


@torch.no_grad()
def test_one_instruction_serves_many_inputs() -> None:
    model, (a, _) = causal_lm("llama"), examples()[0]
    summary, behind = GIST.summary(model, **GIST.after(a[None])), words(3, 4, seed=3)
    together = summary.logits(behind)
    for i in range(3):
        assert_close(together[i : i + 1], summary.logits(behind[i : i + 1]), atol=1e-5, rtol=1e-4)
    other = GIST.summary(model, **GIST.after(examples(seed=4)[1][0][None]))
    both = stacked([summary, other])
    assert_close(both.take([1, 0]).logits(behind[:2])[1:], summary.logits(behind[1:2]), atol=1e-5, rtol=1e-4)


def test_what_cannot_be_is_refused() -> None:
    model, (a, b) = causal_lm("llama"), examples()[0]
    with pytest.raises(SummaryError, match=r"in each row: \[0\]; needs 2"):
        GIST.summary(model, a[None])
    with pytest.raises(SummaryError, match="do not stand side by side"):
        GIST.summary(model, torch.tensor([[TOKEN, 5, TOKEN]]))
    with pytest.raises(SummaryError, match="full attention in every layer"):
        GIST.summary(causal_lm("mistral-sliding"), **GIST.after(a[None]))
    summary = GIST.summary(model, **GIST.after(a[None]))
    ids, mask = padded([b, b[:2]], "right")
    with pytest.raises(SummaryError, match="pad on the left"):
        summary.inputs(ids, mask)
    with pytest.raises(SummaryError, match="at least one token"):
        summary.inputs(ids[:, :0])
    with pytest.raises(SummaryError, match="2 summaries and 3 texts"):
        summary.take([0, 0]).inputs(words(3, 4))
    with pytest.raises(SummaryError, match="one token or more"):
        Gist(5, count=0)
    with pytest.raises(SummaryError, match="2 input_ids and 1 labels"):
        Collator(TOKEN, 0)([{"input_ids": [1, 2], "labels": [1]}])


def test_a_summary_of_another_model_is_refused(tmp_path) -> None:
    model, (a, _) = causal_lm("llama"), examples()[0]
    GIST.summary(model, **GIST.after(a[None])).save(tmp_path / "s.safetensors")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(1.1)
    with pytest.raises(SummaryError, match="other weights"):
        Summary.load(tmp_path / "s.safetensors", other)
    with pytest.raises(SummaryError, match="than this Qwen2ForCausalLM"):
        Summary.load(tmp_path / "s.safetensors", causal_lm("qwen2"))
    half = copy.deepcopy(model).bfloat16()
    assert Summary.load(tmp_path / "s.safetensors", half).logits(words(1, 3)).dtype == torch.bfloat16


# -- training ----------------------------------------------------------------------------------------------------------
def test_trainer_takes_the_collator(tmp_path) -> None:
    """No forked trainer: the loss falls, and the gist of one of two instructions tells which answer is due."""
    from transformers import Trainer, TrainingArguments

    model = copy.deepcopy(causal_lm("llama"))
    made = [GIST.example([10 + i, 20 + i, 30], [40], [50 + i] * 2) for i in range(2)] * 8
    args = TrainingArguments(
        str(tmp_path), max_steps=40, per_device_train_batch_size=8, learning_rate=5e-3, report_to=[],
        save_strategy="no", disable_tqdm=True, logging_steps=10, remove_unused_columns=False, use_cpu=True, seed=0,
    )  # fmt: skip
    trainer = Trainer(model, args, data_collator=Collator(TOKEN, 0), train_dataset=made)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < 0.05 < losses[0]
    ids = torch.tensor([[10, 20, 30], [11, 21, 30]])
    summary = GIST.summary(model.eval(), **GIST.after(ids))
    behind = torch.tensor([[40], [40]])
    assert model.generate(**summary.inputs(behind), max_new_tokens=2, do_sample=False)[:, 1:].tolist() == [
        [50, 50],
        [51, 51],
    ]


def test_the_mask_has_a_dtype_of_the_models() -> None:
    model = copy.deepcopy(causal_lm("llama")).bfloat16()
    made = Collator(TOKEN, 0, dtype=torch.bfloat16)([GIST.example([5, 6], [7], [8])])
    assert model(**made).loss.isfinite()
    assert isinstance(model, nn.Module)
