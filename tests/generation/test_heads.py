"""Multi-token prediction: what heads are taught, that it is the plain sum, and that it takes the memory of one head."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments

from decoders import VOCAB, decoder, prompt
from fewer.generation import Chained, Heads, HeadsError, Layers, MultiToken, load, loss, packaged, swift
from fewer.generation.heads import FILE
from fewer.recipes.multitoken import MultiTokens, train
from fewer.runtime.modules import read_card

KINDS: list[type[Heads]] = [Chained, Layers]
FAMILIES = ["llama", "gemma3", "gpt2"]


def fresh(family: str = "llama") -> Any:
    return copy.deepcopy(decoder(family)).double().train()


def made(kind: Any, model: nn.Module, count: int = 3, words: Tensor | None = None) -> Any:
    """Heads that say something each."""
    heads = kind.of(model, count, words).double()
    torch.manual_seed(2)
    for p in heads.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return heads


def batch() -> tuple[Tensor, Tensor]:
    ids, mask = prompt(12, 9)
    return ids, ids.masked_fill(mask == 0, -100)


def naive(model: Any, heads: Heads, ids: Tensor, labels: Tensor) -> list[Tensor]:
    """The paper's sum as it is written, all logits at once."""
    with heads.reading(model) as read:
        model(ids)
    states = heads(*read.take())
    top = model.get_output_embeddings()
    found = []
    for k, state in enumerate(states, 1):
        logits = F.linear(state[:, : -1 - k], top.weight)
        found.append(F.cross_entropy(logits.transpose(1, 2), labels[:, 1 + k :], ignore_index=-100))
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradients_are_those_of_the_plain_sum(family: str, kind: Any) -> None:
    """Of trunk, heads and unembedding, in a loss that is scaled, as Trainer does for steps that add up."""
    model, (ids, labels) = fresh(family).eval(), batch()  # no dropout: both are to draw the same
    heads = made(kind, model).eval()
    own = model(ids, labels=labels).loss
    each = naive(model, heads, ids, labels)
    ((own + sum(each)) / 3).backward()
    parameters = dict(model.named_parameters()) | {f"heads {k}": p for k, p in heads.named_parameters()}
    want = {name: p.grad for name, p in parameters.items()}
    for p in parameters.values():
        p.grad = None
    with MultiToken(model, heads) as taught:
        total = model(ids, labels=labels).loss
        assert_close(total, own + sum(each))
        assert taught.losses is not None
        assert_close(taught.losses, torch.stack(each))
        (total / 3).backward()
    for name, p in parameters.items():
        assert_close(p.grad, want[name], msg=name)
    assert all(grad is not None for grad in want.values())


@pytest.mark.parametrize("kind", KINDS)
def test_one_heads_logits_are_in_memory_at_a_time(kind: Any) -> None:
    model, (ids, labels) = fresh(), batch()
    heads = made(kind, model)
    alive: list[weakref.ref[Tensor]] = []
    most = [0]

    class Counting(kind):  # type: ignore[misc]
        def unembedding(self, model: nn.Module) -> Any:
            own = super().unembedding(model)

            def logits(x: Tensor) -> Tensor:
                gc.collect()
                most[0] = max(most[0], sum(ref() is not None for ref in alive))
                out = own(x)
                alive.append(weakref.ref(out))
                return out

            return logits

    heads.__class__ = Counting
    with MultiToken(model, heads):
        model(ids, labels=labels).loss.backward()
    assert len(alive) == 3
    assert most == [0]


def test_a_block_is_run_and_forgotten_before_the_next() -> None:
    """Layers, which share nothing, go one by one: a head's activations are gone when the next head begins."""
    model, (ids, labels) = fresh(), batch()
    heads = made(Layers, model)
    inside: list[weakref.ref[Tensor]] = []
    left = []
    for block in heads.block:
        block.mlp.register_forward_pre_hook(
            lambda _m, _a: (gc.collect(), left.append(sum(ref() is not None for ref in inside)))[1]
        )
        block.mlp.register_forward_hook(lambda _m, _a, out: inside.append(weakref.ref(out)))
    with MultiToken(model, heads):
        model(ids, labels=labels)
    assert left == [0, 0, 0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_untrained_heads_foretell_what_the_model_does(family: str, kind: Any) -> None:
    """The ordinary model is the head that is not there: a copy of its end says what it says."""
    model, ids = fresh(family).eval(), batch()[0]
    heads = kind.of(model, 2).double()
    with heads.reading(model) as read, torch.no_grad():
        want = model(ids).logits
        for state in heads(*read.take()):
            got = heads.unembedding(model)(state)
            assert torch.equal(got.argmax(-1), want.argmax(-1))


def test_each_head_is_taught_the_token_so_far_ahead() -> None:
    """A head that is certain of the right token has no loss, and the text's end teaches nothing."""
    model = fresh()
    ids = torch.randint(3, VOCAB, (1, 8), generator=torch.Generator().manual_seed(0))
    unembed = model.get_output_embeddings().weight

    class Knowing(Chained):
        def groups(self, x: Tensor, given: Any) -> Any:
            yield [x * 0 + k for k in range(1, 4)]

        def unembedding(self, model: nn.Module) -> Any:
            def logits(state: Tensor) -> Tensor:
                k = int(state[0, 0, 0])
                told = torch.roll(ids, -(1 + k), 1)  # what the last 1 + k positions are told is wrong
                return 200.0 * F.one_hot(told, VOCAB).double()

            return logits

    heads = Knowing(3, unembed.shape[1]).double()
    x = torch.zeros(1, 8, unembed.shape[1], dtype=torch.float64)
    total, each = loss(model, heads, x, ids)
    assert_close(each, torch.zeros(3, dtype=torch.float64))
    assert float(total.detach()) == 0
    spoiled = ids.clone()
    spoiled[0, 4] = (spoiled[0, 4] + 1) % VOCAB
    _, each = loss(model, heads, x, spoiled)  # one of 6, 5 and 4 labels
    assert_close(each, torch.tensor([200 / 6, 200 / 5, 200 / 4], dtype=torch.float64))
    _, each = loss(model, heads, x, spoiled, items=10)
    assert_close(each, torch.full((3,), 20.0, dtype=torch.float64))


def test_words_that_heads_do_not_know_teach_nothing() -> None:
    model, (ids, labels) = fresh(), batch()
    known = torch.arange(3, VOCAB, 2)
    heads = made(Chained, model, 2, known)
    with heads.reading(model) as read:
        model(ids)
    states = heads(*read.take())
    _, each = loss(model, heads, states[0] * 0 + 1, labels)
    for k, one in enumerate(each, 1):
        wanted = labels[:, 1 + k :]
        places = torch.isin(wanted, known)
        x = heads(states[0] * 0 + 1)[k - 1][:, : -1 - k][places]
        logits = x @ model.get_output_embeddings().weight[known].T
        want = F.cross_entropy(logits, torch.searchsorted(known, wanted[places]))
        assert_close(one, want)
    written = swift(model.eval(), ids[:1], heads=heads, max_new_tokens=8, order=0, least=0.0, nodes=8)
    plain = model.generate(ids[:1], max_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(ids[:1]))
    assert torch.equal(written.sequences, plain)


def test_a_frozen_model_stays_and_its_heads_learn() -> None:
    model, (ids, labels) = fresh(), batch()
    model.requires_grad_(False)
    heads = Chained.of(model, 2).double()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimiser = torch.optim.Adam(heads.parameters(), lr=1e-2)
    losses = []
    with MultiToken(model, heads) as taught:
        for _ in range(20):
            model(ids, labels=labels).loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            assert taught.losses is not None
            losses.append(float(taught.losses.sum()))
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_off_is_off() -> None:
    model, (ids, labels) = fresh().eval(), batch()
    before = (model(ids, labels=labels).loss, list(model.state_dict()), dict(vars(model)))
    taught = MultiToken(model, Chained.of(model, 2))
    with pytest.raises(HeadsError, match="already"):
        MultiToken(model, Chained.of(model, 2))
    assert any(name.startswith("multitoken.") for name, _ in model.named_parameters())
    assert model(ids).loss is None
    taught.remove()
    taught.remove()
    assert torch.equal(model(ids, labels=labels).loss, before[0])
    assert list(model.state_dict()) == before[1]
    assert vars(model).keys() == before[2].keys()
    assert not model._forward_hooks
    assert not model.lm_head._forward_pre_hooks


@pytest.mark.parametrize("kind", KINDS)
def test_in_trainer(kind: Any, tmp_path: Path) -> None:
    """The plain Trainer: the loss falls, two small steps are one, the heads are saved and go on from a checkpoint."""
    rows = [{"input_ids": [5 + (i + j) % 4 for j in range(12)]} for i in range(8)]
    rows = [row | {"labels": row["input_ids"]} for row in rows]

    def run(steps: int, size: int, folder: Path, resume: bool = False) -> tuple[Any, Heads, list[float]]:
        model = copy.deepcopy(decoder("llama")).train()
        heads = kind.of(model, 2)
        arguments = TrainingArguments(
            str(folder), max_steps=steps, per_device_train_batch_size=size, gradient_accumulation_steps=4 // size,
            learning_rate=3e-3, lr_scheduler_type="constant", logging_steps=1, save_steps=3, report_to=[],
            use_cpu=True, disable_tqdm=True, max_grad_norm=0.0, seed=1,
        )  # fmt: skip
        with MultiToken(model, heads):
            trainer = Trainer(model, arguments, train_dataset=rows)
            trainer.train(resume_from_checkpoint=resume)
            trainer.save_model(str(folder / "end"))
        return model, heads, [line["loss"] for line in trainer.state.log_history if "loss" in line]

    model, heads, losses = run(6, 4, tmp_path / "a")
    assert losses[-1] < 0.8 * losses[0]
    assert_close(run(2, 2, tmp_path / "b")[2], losses[:2], rtol=1e-3, atol=1e-3)
    again = load(tmp_path / "a" / "end", model)
    for name, value in heads.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    (tmp_path / "a" / "checkpoint-6").rename(tmp_path / "a" / "gone")
    _, resumed, _ = run(6, 4, tmp_path / "a", resume=True)
    for name, value in heads.state_dict().items():
        assert_close(resumed.state_dict()[name], value, msg=name)
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7]])
    written = swift(model.eval(), ids, heads=again, max_new_tokens=12, order=0)
    plain = model.generate(ids, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(ids))
    assert torch.equal(written.sequences, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_gives_them_back(kind: Any, tmp_path: Path) -> None:
    model = fresh("qwen3")
    heads = made(kind, model, 2, torch.arange(4, 30))
    file = heads.save(tmp_path, {"recipe": "mine"})
    assert file == tmp_path / FILE
    assert read_card(file)["recipe"] == "mine"
    for source in (file, tmp_path):
        again = load(source, model)
        assert type(again) is kind
        assert not again.training
        for name, value in heads.state_dict().items():
            assert torch.equal(again.state_dict()[name], value), name
    half = heads.save(tmp_path / "half.safetensors", dtype=torch.float16)
    with safe_open(half, "pt") as opened:
        assert {opened.get_tensor(k).dtype for k in opened.keys()} == {torch.float16, torch.int32}  # noqa: SIM118
    assert next(load(half, model).parameters()).dtype == torch.float64


def test_files_that_do_not_fit_are_named(tmp_path: Path) -> None:
    model = fresh()
    with pytest.raises(HeadsError, match=r"fewer train multitoken"):
        load(tmp_path, model)
    Chained(2, 16).save(tmp_path / "narrow.safetensors")
    with pytest.raises(HeadsError, match="width 16, and this one's is 32"):
        load(tmp_path / "narrow.safetensors", model)
    (tmp_path / "text.safetensors").write_text("no")
    with pytest.raises(HeadsError, match="does not hold heads"):
        load(tmp_path / "text.safetensors", model)
    with pytest.raises(HeadsError, match="one head or more"):
        Chained(0, 16)
    with pytest.raises(HeadsError, match="no output embeddings"):
        Chained.of(model.model, 2)
    assert packaged(model) is None


# -- the recipe --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["chained", "layers"])
def test_heads_learn_a_habit_of_the_text(kind: Any, tmp_path: Path) -> None:
    """A round of twelve words with slips: the recipe's heads find it, untrained ones and the frequent word do not."""
    rng = torch.Generator().manual_seed(0)
    slips = torch.randint(3, VOCAB, (1200,), generator=rng)
    ids = (3 + 4 * (torch.arange(1200) % 12)).where(torch.rand(1200, generator=rng) < 0.95, slips)
    model = copy.deepcopy(decoder("llama")).float()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    recipe = MultiTokens(heads=2, kind=kind, words=55, steps=60, batch=4, length=24, lr=1e-2, test=4, begin=2, write=8,
                         half=False, bfloat16=False)  # fmt: skip
    said: list[str] = []
    report = train(recipe, tmp_path, model=(model, None), ids=ids, log=said.append)
    assert report.first["trained"][0] > report.first["untrained"][0] + 0.3
    assert report.first["trained"][0] > report.first["frequent"][0] + 0.3
    assert report.fourth["trained"][0] >= report.first["trained"][0]
    assert report.covered > 0.9
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    heads = load(tmp_path, model)
    assert heads.count == 2
    assert "first" in read_card(tmp_path / FILE)
    assert said


def test_recipes_that_make_no_sense_are_refused() -> None:
    for bad in ({"heads": 0}, {"length": 4}, {"kind": "wide"}):
        with pytest.raises(ValueError, match=str(*bad)):
            MultiTokens(**bad)
