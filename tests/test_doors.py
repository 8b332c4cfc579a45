"""Places that are in no block: the input text, the training loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import fewer
from decoders import VOCAB, decoder, prompt
from fewer.core import Budget, KeepRatio, Plan, Signals, Site, Tokens, select
from fewer.core.errors import SignalError
from fewer.runtime.state import Lifetime, State
from fewer.testing import Honest
from fewer.testing.checks import same_snapshot, snapshot
from fewer.testing.models import tiny_vit


@dataclass(frozen=True)
class Dearest(Honest):
    """Tokens of the highest loss teach."""

    budget: Budget = KeepRatio(0.5)
    layers: tuple[int, ...] | None = None
    site: ClassVar[Site] = Site.LOSS

    def plan(self, signals: Signals, tokens: Tokens) -> Plan:
        return select.top(signals.hidden[..., 0], self.budget, tokens, at=signals.at)


def bert() -> Any:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64
    )
    return BertModel(config).eval()


# -- the input text ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("lengths", [(20,), (20, 9)], ids=str)
def test_a_shorter_text_is_read_as_those_words_alone(lengths: tuple[int, ...]) -> None:
    """The reference: the model given the words that stay, at the positions they had."""
    model = decoder("llama")
    ids, mask = prompt(*lengths)
    before = snapshot(model)
    with torch.no_grad(), fewer.apply(model, "random:site=text,keep=0.5") as session:
        got = model(ids, attention_mask=mask).logits
        kept = session.kept(0)
    same_snapshot(before, snapshot(model), "after a session on the text")
    assert session.origin.shape == ids.shape
    for i, length in enumerate(lengths):
        mine = kept[i][kept[i] >= 0]
        assert len(mine) == (length - 1) // 2 + 1  # the last word stays, and half of the others
        assert int(mine[-1]) == ids.shape[1] - 1
        places = (mine - (ids.shape[1] - length))[None]
        with torch.no_grad():
            want = model(ids[i : i + 1, mine], position_ids=places).logits
        assert_close(got[i, -len(mine) :], want[0], atol=1e-5, rtol=1e-5)
    assert session.ledger.gflops < session.ledger.gflops_full
    assert f"tokens {ids.shape[1]} -> " in session.report()


def test_all_words_are_the_model_to_the_bit() -> None:
    model = decoder("qwen3")
    ids, mask = prompt(12, 7)
    with torch.no_grad():
        plain = model(ids, attention_mask=mask).logits
        with fewer.apply(model, "random:site=text,keep=1.0"):
            assert torch.equal(model(ids, attention_mask=mask).logits, plain)


@pytest.mark.parametrize("lengths", [(20,), (20, 9)], ids=str)
def test_generate_goes_on_behind_a_shorter_text(lengths: tuple[int, ...]) -> None:
    model = decoder("llama")
    ids, mask = prompt(*lengths)
    with torch.no_grad(), fewer.apply(model, "random:site=text,keep=0.5") as session:
        text = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
        kept = session.kept(0)
    for i, length in enumerate(lengths):
        mine = kept[i][kept[i] >= 0]
        read, places = ids[i : i + 1, mine], mine - (ids.shape[1] - length)
        for step in range(6):
            with torch.no_grad():
                word = model(read, position_ids=places[None]).logits[:, -1].argmax(-1)
            assert word == text[i, ids.shape[1] + step]
            read, places = torch.cat([read, word[None]], 1), torch.cat([places, places[-1:] + 1])


def test_an_encoder_gives_rows_of_the_words_that_stay_and_they_go_back() -> None:
    model, (ids, _) = bert(), prompt(16)
    with torch.no_grad(), fewer.apply(model, "random:site=text,keep=0.5") as session:
        rows = model(ids).last_hidden_state
        dense = session.restore(rows)
    kept = session.kept(0)[0]
    assert rows.shape[1] == len(kept) == 8
    assert int(kept[0]) == 0, "the class token stays"
    assert_close(dense[0, kept[1:] - 1], rows[0, 1:])


def test_a_text_stands_beside_methods_in_the_blocks() -> None:
    model, (ids, mask) = decoder("llama"), prompt(24)
    with torch.no_grad(), fewer.apply(model, ["random:site=text,keep=0.5", "snapkv:keep=0.5,window=2,kernel=3"]) as on:
        model.generate(ids, attention_mask=mask, max_new_tokens=1, do_sample=False)
        assert on.ledger.logical == [12] * 3
        assert on.counts == [6.0] * 3


@pytest.mark.parametrize(("form", "why"), [("evit:site=text", "parameter"), ("tome:site=text", "parameter")])
def test_methods_that_know_no_text_say_so(form: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        fewer.apply(decoder("llama"), form)


# -- the input text, read by the model first ---------------------------------------------------------------------------
def surprisals(model: Any, front: list[int], ids: list[int]) -> list[float]:
    with torch.no_grad():
        p = model(torch.tensor([[*front, *ids]])).logits[0].log_softmax(-1)
    found = [float("nan") if not front and not i else -float(p[len(front) + i - 1, x]) for i, x in enumerate(ids)]
    known = [value for value in found if value == value]
    return [sum(known) / len(known) if value != value else value for value in found]


def llmlingua(model: Any, ids: list[int], keep: float, segment: int) -> list[int]:
    """The places that stay of a prompt whose last token does: segment by segment, behind what stayed."""
    n, front, stays = len(ids), [], []
    left = int((n - 1) * keep)
    for first in range(0, n, segment):
        mine = list(range(first, min(first + segment, n)))
        free = [i for i in mine if i < n - 1]
        value = dict(zip(mine, surprisals(model, front, [ids[i] for i in mine]), strict=True))
        due = int(left * (free[-1] + 1 if free else n - 1) / (n - 1) + 0.5 + 1e-6) - len(stays)
        stays += sorted(free, key=lambda i: -value[i])[:due]
        front = [ids[i] for i in sorted(stays)]
    return [*sorted(stays), n - 1]


@pytest.mark.parametrize("lengths", [(31,), (31, 14, 22)], ids=str)
def test_llmlingua_in_a_model_keeps_what_surprises_it(lengths: tuple[int, ...]) -> None:
    model = decoder("llama")
    ids, mask = prompt(*lengths)
    before = snapshot(model)
    with torch.no_grad(), fewer.apply(model, "llmlingua:keep=0.5,segment=8") as session:
        got = model(ids, attention_mask=mask).logits
        kept, report = session.kept(0), session.report()
        out = model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    same_snapshot(before, snapshot(model), "after a session on the text")
    assert "llmlingua:segment=8 reads the text with the model first, which is not counted here" in report
    for i, length in enumerate(lengths):
        pad = ids.shape[1] - length
        mine = kept[i][kept[i] >= 0]
        want = llmlingua(model, ids[i, pad:].tolist(), 0.5, 8)
        assert (mine - pad).tolist() == want
        places = torch.tensor([want])
        with torch.no_grad():
            alone = model(ids[i : i + 1, mine], position_ids=places).logits
        assert_close(got[i, -len(want) :], alone[0], atol=1e-5, rtol=1e-5)
        assert int(alone[0, -1].argmax()) == int(out[i, ids.shape[1]])


def test_a_text_can_be_read_for_one_method_and_cut_by_another() -> None:
    model, (ids, mask) = decoder("gpt2"), prompt(30)
    both = ["random:site=text,tokens=15", "llmlingua:keep=0.5,segment=50"]
    with torch.no_grad(), fewer.apply(model, both[0]) as session:
        model(ids, attention_mask=mask)
        drawn = session.kept(0)[0].tolist()
    with torch.no_grad(), fewer.apply(model, both) as session:
        model(ids, attention_mask=mask)
        left = session.kept(0)[0].tolist()
    want = llmlingua(model, ids[0, drawn].tolist(), 0.5, 50)
    assert left == [drawn[i] for i in want]


def test_a_beginning_of_sequence_stays() -> None:
    model, (ids, mask) = decoder("llama"), prompt(20, 20)
    begun = ids.clone()
    begun[:, 0] = model.config.bos_token_id
    with torch.no_grad(), fewer.apply(model, "llmlingua:keep=0.2") as session:
        model(begun, attention_mask=mask)
        assert session.kept(0)[:, 0].tolist() == [0, 0]
        assert session.counts == [2 + int(0.2 * 18)] * 3


def test_what_cannot_read_the_text_is_refused() -> None:
    with pytest.raises(
        fewer.SessionError, match="llmlingua reads the text with the model it is put into, and BertModel does not"
    ):
        fewer.apply(bert(), "llmlingua:keep=0.5")
    with pytest.raises(fewer.SessionError, match="has this very model read the text before it is cut, and snapkv"):
        fewer.apply(decoder("llama"), ["llmlingua:keep=0.5", "snapkv:keep=0.5,window=2,kernel=3"])
    ids, _ = prompt(12)
    for form, why in [
        ("selective_context:keep=0.5", "token ids alone do not say where a phrase ends: choose unit=token"),
        ("selective_context:keep=0.5,unit=token", "where a sentence ends"),
        ("llmlingua:unit=word", "where a word ends"),
        ("longllmlingua:keep=0.5", "give question= to fewer.Compressor's call"),
        ("llmlingua2:keep=0.5,unit=token", "LlamaForCausalLM is a language model; this method takes an encoder"),
    ]:
        with fewer.apply(decoder("llama"), form) as session, pytest.raises(SignalError, match=why):
            session.model(ids)
        assert decoder("llama")(ids).logits.shape[1] == 12, "nothing is left behind"
    with (
        torch.no_grad(),
        fewer.apply(decoder("llama"), "selective_context:keep=0.5,unit=token,context=text") as session,
    ):
        decoder("llama")(ids)
        assert session.counts == [6] * 3


def test_pictures_are_no_text() -> None:
    with pytest.raises(fewer.SessionError, match="reads no plain text"):
        fewer.apply(tiny_vit(), "random:site=text,keep=0.5")
    with (
        fewer.apply(decoder("llama"), "random:site=text,keep=0.5"),
        pytest.raises(fewer.SessionError, match="called without input_ids"),
    ):
        decoder("llama")(inputs_embeds=torch.zeros(1, 4, 32))


# -- the training loss -------------------------------------------------------------------------------------------------
def losses(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    logits = model(ids).logits[:, :-1].transpose(1, 2)
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:], reduction="none")


def test_the_dearest_tokens_teach_and_no_others() -> None:
    model = decoder("llama")
    ids, mask = prompt(16, 10)
    labels = ids.masked_fill(mask == 0, -100)
    each = losses(model, ids, labels)
    best = [each[0].topk(7).values, each[1, 6:].topk(5).values]  # half of 15 labels; of 10: padding says the first one
    with fewer.apply(model, Dearest()) as session:
        out = model(ids, labels=labels)
        assert_close(out.loss, torch.cat(best).mean())
        assert [int(n) for n in session.last.counts[-1]] == [7, 5]
        assert session.ledger.gflops == session.ledger.gflops_full
        assert "all tokens are computed" in session.report()
        model.zero_grad()
        out.loss.backward()
        got = model.lm_head.weight.grad.clone()
    model.zero_grad()
    torch.cat(
        [losses(model, ids, labels)[0].topk(7).values, losses(model, ids, labels)[1, 6:].topk(5).values]
    ).mean().backward()
    assert_close(got, model.lm_head.weight.grad)
    model.zero_grad(set_to_none=True)


def test_all_tokens_teach_as_ever_and_a_call_without_labels_is_untouched() -> None:
    model, (ids, _) = decoder("llama"), prompt(12)
    plain = model(ids, labels=ids).loss
    with fewer.apply(model, Dearest(KeepRatio(1.0))) as session:
        assert_close(model(ids, labels=ids).loss, plain)
        assert torch.equal(model(ids).logits, model(ids).logits)
    assert session.last.tokens.n == 11


# -- what is remembered ------------------------------------------------------------------------------------------------
def test_state_ends_with_its_lifetime() -> None:
    state = State()
    state.of(Lifetime.CALL, 0, "guided")["added"] = 1
    state.of(Lifetime.SESSION, 0)["seen"] = 2
    assert state.of(Lifetime.CALL, 0, "guided") == {"added": 1}
    assert state.of(Lifetime.CALL, 0, "free") == {}
    state.end(Lifetime.CALL)
    assert state.of(Lifetime.CALL, 0, "guided") == {}
    assert state.of(Lifetime.SESSION, 0) == {"seen": 2}
