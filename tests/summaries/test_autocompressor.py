"""AutoCompressors: the authors' numbers on OPT, and what the loss and its gradient are made of."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from condensing import causal_lm, golden, opt, padded, words
from fewer.summaries import AutoCompressor, Summary, SummaryError, joined
from fewer.summaries.autocompressor import draw_lengths, even_lengths

LMS = ("llama", "qwen3", "gpt2", "opt")


def compressor(kind: str = "llama", count: int = 3, **more: object) -> AutoCompressor:
    made = AutoCompressor(copy.deepcopy(causal_lm(kind)), count, **more).eval()
    made.tokens.data.normal_(std=0.5)
    return made


def base_loss(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    labels = ids if mask is None else ids.masked_fill(mask == 0, -100)
    return model(ids, attention_mask=mask, labels=labels).loss


@pytest.mark.parametrize("seed", [0, 2])
@torch.no_grad()
def test_the_authors_numbers(seed: int) -> None:
    """Seed 0 accumulates, seed 2 replaces. Summaries of OPT have no position, and each segment starts at 0."""
    told = golden("autocompressor_opt", seed)
    model = opt(vocab_size=64)
    missing = model.load_state_dict({k[2:]: v for k, v in told.items() if k.startswith("w.model")}, strict=False)
    assert (missing.missing_keys, missing.unexpected_keys) == (["lm_head.weight"], [])  # tied
    made = AutoCompressor(model, int(told["summary_length"]), accumulate=bool(told["accumulate"])).eval()
    made.tokens.copy_(told["w.embed_summary.weight"])
    ids, lengths = told["input_ids"], told["segment_lengths"].tolist()

    def close(mine: torch.Tensor, name: str) -> None:
        assert_close(mine, told[name], atol=1e-5, rtol=1e-5)

    out = made(ids, labels=ids, lengths=lengths)
    close(out["logits"], "logits")
    close(out["loss"], "loss")
    close(made(ids, lengths=[ids.shape[1]])["logits"], "single_segment_logits")
    summary = made.summary(ids, lengths=lengths)
    close(summary.embeddings, "softprompt")
    close(made.summary(ids[:, : lengths[0]], lengths=lengths[:1]).embeddings, "first_segment_summary")
    close(summary.logits(told["extra_ids"]), "extra_logits_with_softprompt")
    close(summary.prefilled().logits(told["extra_ids"]), "extra_logits_with_softprompt")


@pytest.mark.parametrize("kind", LMS)
@torch.no_grad()
def test_one_segment_and_no_summaries_is_the_models_loss(kind: str) -> None:
    ids, mask = padded([words(1, 9)[0], words(1, 6, 1)[0]], "right")
    labels = ids.masked_fill(mask == 0, -100)
    want = base_loss(causal_lm(kind), ids, mask)
    assert_close(compressor(kind)(ids, mask, labels, lengths=[9])["loss"], want)
    assert_close(compressor(kind, 0)(ids, mask, labels, lengths=[9])["loss"], want)
    apart = compressor(kind, 0)(ids, labels=ids, lengths=[5, 4])["logits"]
    assert_close(apart[:, 5:], causal_lm(kind)(ids[:, 5:]).logits, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_loss_is_one_mean_over_all_tokens_across_borders() -> None:
    """Not a mean of the segments' means; the label of a segment's last token is the next one's first."""
    made, ids = compressor(), words(2, 12)
    lengths = [2, 7, 3]
    out = made(ids, labels=ids, lengths=lengths)
    each = F.cross_entropy(out["logits"][:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    assert each.numel() == 2 * 11
    assert_close(out["loss"], each.mean())
    parts = torch.stack([part.mean() for part in each.split([2, 7, 2], 1)])
    assert (out["loss"] - parts.mean()).abs() > 1e-3
    halves = [made(row, labels=row, lengths=lengths, num_items_in_batch=22)["loss"] for row in ids.split(1)]
    assert_close(halves[0] + halves[1], out["loss"])


@torch.no_grad()
@pytest.mark.parametrize("kind", LMS)
def test_a_segment_written_out(kind: str) -> None:
    """The second segment as one would do it by hand, with the model's own forward."""
    made, ids = compressor(kind), words(1, 8)
    first = made.summary(ids[:, :5], lengths=[5])
    logits = made(ids, lengths=[5, 3])["logits"]
    model = made.model
    table = model.get_input_embeddings()
    x = torch.cat([first.embeddings, table(ids[:, 5:])], 1)
    if kind in ("gpt2", "opt"):
        own = model.transformer.wpe.weight[0] if kind == "gpt2" else model.model.decoder.embed_positions.weight[1]
        x[:, :3] -= own  # a table of positions adds this, whatever we say
        at = torch.tensor([[-1 * (kind == "opt")] * 3 + [0, 1, 2]])
    else:
        at = torch.arange(6)[None]
    assert_close(model(inputs_embeds=x, position_ids=at).logits[:, 3:], logits[:, 5:], atol=1e-5, rtol=1e-4)
    assert first.position.tolist() == [0 if kind in ("gpt2", "opt") else 3]


@pytest.mark.parametrize("accumulate", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", LMS)
@torch.no_grad()
def test_padding_changes_nothing(kind: str, side: str, accumulate: bool) -> None:
    """A padded row is the row alone, also where a whole segment is padding."""
    made = compressor(kind, accumulate=accumulate)
    rows = [words(1, 12)[0], words(1, 7, 1)[0]]
    ids, mask = padded(rows, side)
    lengths, own = [4, 4, 4], [3, 4] if side == "left" else [4, 3]
    logits = made(ids, mask, lengths=lengths)["logits"]
    alone = made(rows[1][None], lengths=own)["logits"][0]
    assert_close(logits[1][mask[1].bool()], alone, atol=2e-5, rtol=1e-4)
    summary, single = made.summary(ids, mask, lengths=lengths), made.summary(rows[1][None], lengths=own)
    assert summary.valid[1].tolist().count(True) == single.valid.sum()
    behind = words(2, 4, 5)
    assert_close(summary.logits(behind)[1:], single.logits(behind[1:]), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("window", "reached"), [(None, {0, 1, 2, 3}), (1, {2, 3}), (2, {3}), (3, {0, 1, 2, 3})])
def test_gradients_stop_behind_so_many_compression_steps(window: int | None, reached: set[int]) -> None:
    """From the last segment's loss back to the tokens of each segment: summaries made before the cut are data."""
    made, ids = compressor(window=window), words(1, 16)
    seen: list[torch.Tensor] = []

    def embed(_m, _args, output):
        seen.append(output.requires_grad_())
        output.retain_grad()
        return output

    made.requires_grad_(False)
    hook = made.model.get_input_embeddings().register_forward_hook(embed)
    out = made(ids, lengths=[4, 4, 4, 4])
    hook.remove()
    out["logits"][:, 12:].square().sum().backward()
    got = {i for i, x in enumerate(seen) if x.grad is not None and float(x.grad.abs().max()) > 0}
    assert len(seen) == 4
    assert got == reached


def test_the_cut_changes_gradients_not_the_loss() -> None:
    ids = words(1, 16)
    losses, slopes = [], []
    for window in (None, 1):
        torch.manual_seed(0)
        made = compressor(window=window)
        loss = made(ids, labels=ids, lengths=[4] * 4)["loss"]
        loss.backward()
        losses.append(loss.detach())
        slopes.append(made.tokens.grad)
    assert torch.equal(*losses)
    assert min(float(x.abs().max()) for x in slopes) > 0
    assert (slopes[0] - slopes[1]).abs().max() > 1e-4


def test_random_lengths() -> None:
    draws = torch.Generator().manual_seed(0)
    found = [tuple(draw_lengths(20, 3, longest=10, shortest=3, generator=draws)) for _ in range(400)]
    assert all(sum(x) == 20 and min(x) >= 3 and max(x) <= 10 for x in found)
    assert all(len({x[i] for x in found}) == 8 for i in range(3))  # each place takes each length from 3 to 10
    assert even_lengths(11, 3) == [4, 4, 3]
    with pytest.raises(SummaryError, match="20 tokens do not part into 3 segments of 1 to 6: 4 segments or more"):
        draw_lengths(20, 3, longest=6)
    made, ids = compressor(segments=3), words(1, 12)
    assert torch.equal(made(ids)["logits"], made(ids, lengths=[4, 4, 4])["logits"])  # even where nothing is learned
    made.train()
    assert len({float(made(ids, labels=ids)["loss"].detach()) for _ in range(6)}) > 1
    assert len(compressor(segments=1, longest=4)._lengths(12)) == 3


@pytest.mark.parametrize("kind", LMS)
@torch.no_grad()
def test_what_is_saved_writes_the_same(kind: str, tmp_path) -> None:
    """Summaries in `generate`: as embeddings, prefilled, saved and loaded; greedy by hand says the same."""
    made = compressor(kind)
    ids, mask = padded([words(1, 12)[0], words(1, 7, 1)[0]], "left")
    behind, seen = padded([words(1, 3, 2)[0], words(1, 5, 3)[0]], "left")
    summary = made.summary(ids, mask, lengths=[6, 6])
    model = made.model
    written = model.generate(**summary.inputs(behind, seen), max_new_tokens=4, do_sample=False)
    assert torch.equal(written[:, :5], behind)
    for i in range(2):
        row = behind[i][seen[i].bool()][None]
        for _ in range(4):
            row = torch.cat([row, summary.take([i]).logits(row)[:, -1].argmax(-1, keepdim=True)], 1)
        assert written[i, -row.shape[1] :].tolist() == row[0].tolist()
    for name, one in (("e", summary), ("kv", summary.prefilled())):
        one.save(tmp_path / name)
        again = Summary.load(tmp_path / name, model)
        assert torch.equal(model.generate(**again.inputs(behind, seen), max_new_tokens=4, do_sample=False), written)
    beams = model.generate(**summary.inputs(behind, seen), max_new_tokens=4, do_sample=False, num_beams=2)
    assert beams.shape == written.shape


@torch.no_grad()
def test_a_compressor_comes_back_from_its_folder(tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    made, ids = compressor(segments=2, longest=9, accumulate=False, window=None), words(1, 8)
    made.save_pretrained(tmp_path)
    again = AutoCompressor.load(tmp_path, AutoModelForCausalLM.from_pretrained(tmp_path)).eval()
    assert (again.count, again.segments, again.longest, again.accumulate, again.window) == (3, 2, 9, False, None)
    assert torch.equal(again(ids)["logits"], made(ids)["logits"])


@torch.no_grad()
def test_summaries_go_on_from_earlier_ones() -> None:
    made, ids = compressor(), words(2, 12)
    whole = made.summary(ids, lengths=[4, 4, 4])
    later = made.summary(ids[:, 8:], lengths=[4], before=made.summary(ids[:, :8], lengths=[4, 4]))
    assert_close(later.embeddings, whole.embeddings)
    first, second = (made.summary(part, lengths=[6]) for part in ids.split(6, 1))
    both = joined([first, second])
    assert both.position.tolist() == [6, 6]
    assert not torch.allclose(both.logits(ids), joined([second, first]).logits(ids), atol=1e-3)
    with pytest.raises(SummaryError, match="cannot be joined"):
        joined([first, second.prefilled()])
    with pytest.raises(SummaryError, match="cannot come before"):
        made.summary(ids, before=first.prefilled())


def test_it_learns_to_carry_over() -> None:
    """A copy task: segment 2 repeats segment 1, one word. With summaries its loss is below that without."""
    torch.manual_seed(0)
    made = AutoCompressor(copy.deepcopy(causal_lm("llama")), 1, segments=2)
    learner = torch.optim.AdamW(made.parameters(), 5e-3)

    def texts(n: int, draws: torch.Generator) -> torch.Tensor:
        word = torch.randint(3, 11, (n, 1), generator=draws)
        return torch.cat([word, torch.full((n, 2), 50), word], 1)

    draws = torch.Generator().manual_seed(0)
    for _ in range(120):
        ids = texts(16, draws)
        labels = ids.clone()
        labels[:, :3] = -100
        loss = made(ids, labels=labels, lengths=[2, 2])["loss"]
        learner.zero_grad()
        loss.backward()
        learner.step()
    made.eval()
    ids = texts(32, torch.Generator().manual_seed(1))
    with torch.no_grad():
        summary = made.summary(ids[:, :2], lengths=[2])
        told = F.cross_entropy(summary.logits(ids[:, 2:])[:, 0], ids[:, 3])
        blind = F.cross_entropy(made.model(ids[:, 2:]).logits[:, 0], ids[:, 3])
    assert told < 0.1
    assert blind > 1.0


def test_trainer_takes_it(tmp_path) -> None:
    from transformers import Trainer, TrainingArguments

    made = compressor(segments=2)
    ids = words(8, 10)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    args = TrainingArguments(
        str(tmp_path), max_steps=30, per_device_train_batch_size=4, gradient_accumulation_steps=2, learning_rate=5e-3,
        report_to=[], save_strategy="no", disable_tqdm=True, logging_steps=5, use_cpu=True, seed=0,
    )  # fmt: skip
    before = made.tokens.detach().clone()
    trainer = Trainer(made, args, train_dataset=rows)
    assert trainer.model_accepts_loss_kwargs
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < 0.5 * losses[0]
    assert (made.tokens - before).abs().max() > 0


def test_what_cannot_be_is_refused() -> None:
    made, ids = compressor(longest=4), words(1, 8)
    for lengths, says in (([3, 4], "that sum"), ([0, 8], "1 or more each"), ([5, 3], "a segment of 5 tokens")):
        with pytest.raises(SummaryError, match=says):
            made(ids, lengths=lengths)
    with pytest.raises(SummaryError, match="count=-1"):
        AutoCompressor(causal_lm("llama"), -1)
    with pytest.raises(ValueError, match="projects embeddings"):
        AutoCompressor(opt(word_embed_proj_dim=16), 2)
