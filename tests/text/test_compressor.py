"""Compressors: texts as long as was asked for, with what must stay in them, and clear words where that cannot be."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fewer
from fewer.compression import CompressionError, Compressor, Prompt, Shelf, SourceError
from fewer.compression.compressed import counted
from fewer.core.errors import SignalError
from fewer.core.written import BEFORE, BEHIND
from wording import KINDS, ODD, PROSE, chooser, prose, reader, tokenizer

LENGTHS = (5, 6, 7, 9, 12, 20, 50, 120, 199, 400, 1200, 3000)
RATES = (0.1, 0.3, 0.5, 0.7, 0.9)
FILES = """Open `src/app/main.py` and look at parse_config(); it reads CONFIG_DIR, and does not check the 3 keys.
```py
def parse_config(path):
    # nothing here
    return json.load(open(path))
```
Then write to ops@example.org that build 4f2a9c failed at 12:30, please, as soon as you can.
"""
ANSWER = json.dumps({"city": "Port Erin", "built": 1863, "notes": [PROSE[:200], PROSE[200:420]], "ok": True}, indent=1)


def compressor(method: str = "llmlingua", kind: str = "bpe", **more: Any) -> Compressor:
    if method.startswith("llmlingua2"):
        return Compressor(method, chooser(), tokenizer("wordpiece"), **more)
    return Compressor(method, reader(kind), tokenizer(kind), **more)


def inside(short: str, text: str) -> bool:
    rest = iter(text)
    return all(c in rest for c in short)


# -- as long as was asked for ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS[:3])
def test_texts_are_as_long_as_was_asked_for(kind: str) -> None:
    make = compressor(kind=kind)
    for tokens in LENGTHS:
        text = prose(tokens, kind)
        for rate in RATES:
            one = make(text, rate=rate)
            assert one.before == tokens
            assert one.after == counted(one.text, tokenizer(kind))
            assert abs(one.after - max(1, round(rate * tokens))) <= 1, (tokens, rate)
            assert not one.notes
            assert inside(one.text, text)
            assert one.rate == one.after / tokens


@pytest.mark.parametrize("counter", KINDS)
@pytest.mark.parametrize("kind", KINDS[:2])
def test_tokens_are_those_of_the_model_that_is_paid_for(kind: str, counter: str) -> None:
    make = compressor(kind=kind, counter=tokenizer(counter))
    for tokens in LENGTHS[4:]:
        text = prose(tokens, kind)
        whole = counted(text, tokenizer(counter))
        for rate in RATES:
            one = make(text, rate=rate)
            assert one.before == whole
            assert one.after == counted(one.text, tokenizer(counter))
            assert abs(one.after - round(rate * whole)) <= 1, (tokens, rate)


@pytest.mark.parametrize(
    "method", ["selective_context:unit=token", "llmlingua:unit=word", "llmlingua2", "random:site=text"]
)
def test_other_methods_are_as_long(method: str) -> None:
    make = compressor(method)
    for tokens in (60, 500):
        text = prose(tokens, "wordpiece" if method == "llmlingua2" else "bpe")
        for rate in (0.3, 0.6):
            one = make(text, rate=rate)
            assert abs(one.after - round(rate * tokens)) <= 1
            assert inside(one.text, text)


def test_what_is_not_as_long_is_told() -> None:
    """Whole sentences can miss a number, and say so."""
    one = compressor("selective_context:unit=sentence")(PROSE, rate=0.1)
    assert abs(one.after - 0.1 * one.before) > 1
    asked = round(0.1 * one.before)
    assert one.notes == (f"{asked} tokens were asked for and {one.after} are left: no sentence is cut to fit",)


def test_the_share_is_the_methods_the_calls_or_a_number() -> None:
    text = prose(100)
    assert compressor("llmlingua:keep=0.4")(text).after in (39, 40, 41)
    assert compressor("llmlingua:tokens=30")(text).after in (29, 30, 31)
    assert compressor("llmlingua:r=30")(text).after in (69, 70, 71)
    assert compressor("llmlingua:keep=0.4")(text, rate=0.8).after in (79, 80, 81)
    assert compressor("llmlingua:keep=0.4")(text, tokens=20).after in (19, 20, 21)
    assert compressor("llmlingua:tokens=3000")(text).text == text


# -- all, nothing, and odd texts ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["llmlingua", "selective_context", "llmlingua2"])
def test_all_of_a_text_is_the_text_byte_for_byte(method: str) -> None:
    make = compressor(method)
    for text in [*ODD, PROSE, FILES, ANSWER]:
        one = make(text, rate=1.0)
        assert one.text == text
        assert one.rate == 1.0
        assert not one.dropped
        assert one.diff() == ([(True, text)] if text else [])


@pytest.mark.parametrize("kind", KINDS[:3])
@pytest.mark.parametrize("text", ODD, ids=range(len(ODD)))
def test_odd_texts(kind: str, text: str) -> None:
    one = compressor(kind=kind)(text, rate=0.5)
    assert inside(one.text, text)
    assert one.after <= one.before
    assert one.text.encode("utf-8").decode() == one.text
    assert bool(one.text.strip()) == bool(text.strip())


@given(text=st.text(max_size=50), rate=st.floats(0.01, 1))
def test_any_text(text: str, rate: float) -> None:
    one = compressor()(text, rate=rate)
    assert inside(one.text, text)
    assert one.after <= one.before
    assert "".join(piece for _, piece in one.diff()) == text


# -- what stays --------------------------------------------------------------------------------------------------------
def test_words_and_kinds_that_stay() -> None:
    make = compressor(force=["mayor", "."], protect=("digits", "negations"))
    one = make(PROSE, rate=0.45)
    assert not one.notes
    for word in ("mayor", "1863", "14", "1881", "1884", "1890", "not", "Nobody", "didn't", "never"):
        assert word in one.text, word
    assert one.text.count(".") == PROSE.count(".")
    assert abs(one.after - round(0.45 * one.before)) <= 1
    text = prose(150)
    assert "zebra" in compressor()(Prompt((text + " zebra",), force=("zebra",)), rate=0.05).text


def test_identifiers_and_code_stay() -> None:
    one = compressor(protect=("identifiers", "code"))(FILES, rate=0.8)
    assert not one.notes
    assert one.text != FILES
    for piece in ("`src/app/main.py`", "parse_config()", "CONFIG_DIR", "ops@example.org", "4f2a9c",
                  FILES[FILES.index("```py") : FILES.rindex("```") + 3]):  # fmt: skip
        assert piece in one.text, piece


def test_json_stays_json_with_less_prose() -> None:
    text = f"The tool said:\n{ANSWER}\nThat was all that it said."
    one = compressor(protect=["json"])(text, rate=0.6)
    assert not one.notes
    value, whole = json.loads(one.text[one.text.index("{") : one.text.rindex("}") + 1]), json.loads(ANSWER)
    assert {**value, "notes": 0, "city": 0} == {**whole, "notes": 0, "city": 0}
    assert all(
        inside(short, long) and short != long for short, long in zip(value["notes"], whole["notes"], strict=True)
    )
    assert abs(one.after - round(0.6 * one.before)) <= 1


def test_instructions_and_questions_stay() -> None:
    one = compressor()([PROSE[:400], PROSE[400:]], instruction="Read all of it.", question="Who sold it?", rate=0.4)
    assert one.text.startswith("Read all of it.\n\n")
    assert one.text.endswith("Who sold it?")
    assert abs(one.after - round(0.4 * one.before)) <= 1
    assert {part for i, part in enumerate(one.source.parts) if i in {*one.order}} >= {BEFORE, BEHIND}


def test_documents_are_put_in_order_of_what_they_say_of_the_question() -> None:
    documents = [PROSE[:200], PROSE[200:400], PROSE[400:600], PROSE[600:800]]
    make = compressor("longllmlingua:slack=9")
    one = make(documents, question="Who sold the blocks?", rate=0.6)
    relevance = []
    for document in documents:
        ids = tokenizer("bpe")(document + "\n\n")["input_ids"]
        asked = tokenizer("bpe")(
            "Who sold the blocks?" + " We can get the answer to this question in the given documents."
        )
        row = torch.tensor([ids + asked["input_ids"]])
        with torch.no_grad():
            p = reader()(input_ids=row).logits[0, :-1].log_softmax(-1)
        relevance.append(float(p.gather(-1, row[0, 1:, None])[len(ids) - 1 :].mean()))
    parts = [one.source.parts[i] for i in one.order]
    assert list(dict.fromkeys(parts)) == [*sorted(range(4), key=lambda d: -relevance[d]), BEHIND]
    assert one.text.endswith("Who sold the blocks?")
    assert abs(one.after - round(0.6 * one.before)) <= 1


# -- side by side ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["llmlingua:segment=40", "llmlingua:segment=30,unit=word", "selective_context",
                                    "longllmlingua:segment=50", "llmlingua2"])  # fmt: skip
def test_a_batch_is_as_each_alone(method: str) -> None:
    make = compressor(method, protect=("digits",))
    prompts = [Prompt((PROSE[:300], PROSE[300:500]), "Say it.", "Who?"), Prompt((PROSE,), question="When was it?"),
               Prompt((PROSE[500:],), question="Why?", force=("rocks",)),
               Prompt((ODD[8] * 5,), question="What?")]  # fmt: skip
    together = make.batch(prompts, rate=0.6)
    by_twos = compressor(method, protect=("digits",), side=2).batch(prompts, rate=0.6)
    assert [one.text for one in by_twos] == [one.text for one in together]
    for one, prompt in zip(together, prompts, strict=True):
        alone = make(prompt, rate=0.6)
        assert one.text == alone.text
        assert (one.before, one.after, one.order) == (alone.before, alone.after, alone.order)
    assert make.batch([]) == []


# -- gates -------------------------------------------------------------------------------------------------------------
def test_what_would_not_get_shorter_is_left_as_it_was() -> None:
    class Whole:
        """A tokenizer that has long words for this text alone."""

        is_fast = False

        def __call__(self, text: str, **_options: Any) -> dict[str, list[int]]:
            return {"input_ids": [0] * (20 if text == PROSE else 21 + len(text))}

    one = compressor(counter=Whole())(PROSE, rate=0.9)
    loose = compressor(counter=Whole(), gate=False)(PROSE, rate=0.9)
    assert loose.text != PROSE
    assert loose.after >= loose.before == 20
    assert one.text == PROSE
    assert one.rate == 1.0
    assert one.notes == (f"left as it was: shortened, it has {loose.after} tokens, and had 20",)


def test_a_text_of_which_nothing_would_be_left() -> None:
    one = compressor(kind="llama")("x", rate=0.5)  # one character of two tokens
    assert (one.text, one.notes) == ("x", ("left as it was: nothing would be left of it",))


def test_an_open_code_fence_is_not_let_through() -> None:
    text = "```\nx = 1\n```\n" + PROSE[:300]
    found = {}
    for seed in range(20):  # of some cuts only one fence is left
        method = f"random:site=text,seed={seed}"
        loose = compressor(method, gate=False)(text, rate=0.5)
        found[seed] = loose.text.count("```") == 1
        one = compressor(method)(text, rate=0.5)
        assert (one.notes == ("left as it was: a code fence is open",)) == found[seed]
        assert one.text == (text if found[seed] else loose.text)
    assert len({*found.values()}) == 2


# -- ids ---------------------------------------------------------------------------------------------------------------
def test_what_leaves_is_on_the_shelf() -> None:
    shelf = Shelf()
    one = compressor(shelf=shelf)(PROSE, rate=0.3)
    assert one.dropped
    for name, (a, b) in one.dropped.items():
        assert shelf.restore(name) == PROSE[a:b]
    again = compressor()(PROSE, rate=0.3)
    assert again.dropped == one.dropped  # the same ids wherever it is done


# -- bad input ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("given", "words"), [
    ({"rate": 0}, r"rate=0 is outside \(0, 1\]"), ({"rate": 1.5}, r"rate=1.5 is outside \(0, 1\]"),
    ({"rate": -0.5}, "outside"), ({"rate": float("nan")}, "rate=nan is outside"), ({"rate": float("inf")}, "outside"),
    ({"tokens": 0}, "tokens=0: ask for one token or more"), ({"tokens": -3}, "tokens=-3"),
    ({"rate": 0.5, "tokens": 4}, "rate=0.5 and tokens=4: give one of them"),
])  # fmt: skip
def test_impossible_lengths_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(CompressionError, match=words):
        compressor()(PROSE, **given)


def test_less_than_what_must_stay_is_refused() -> None:
    with pytest.raises(CompressionError, match=r"20 of \d+ tokens are asked for, and some \d+ must stay"):
        compressor()(PROSE, instruction=PROSE, tokens=20)
    with pytest.raises(CompressionError, match="must stay: ask for more, or force less"):
        compressor(force=[",", ".", "the", "and", "a", "of"])(PROSE, rate=0.05)


def test_at_least_one_text_is_read_at_a_time() -> None:
    with pytest.raises(CompressionError, match="side=0: read one text at a time, or more"):
        compressor(side=0)


def test_nothing_is_nothing() -> None:
    for nothing in ("", [], [""], ["", ""]):
        one = compressor()(nothing, rate=0.5)
        assert (one.text, one.before, one.after, one.rate, one.dropped, one.diff()) == ("", 0, 0, 1.0, {}, [])


def test_methods_that_act_elsewhere_are_refused() -> None:
    with pytest.raises(CompressionError, match=r"tome.* acts .*, inside a model: fewer\.apply"):
        compressor("tome")
    with pytest.raises(CompressionError, match="names no number of tokens; give keep, tokens or r"):
        compressor("llmlingua:mass=0.5")(PROSE)


def test_what_must_stay_is_known_before_any_text_comes() -> None:
    with pytest.raises(ValueError, match="protect=colours"):
        compressor(protect=["colours"])
    with pytest.raises(ValueError, match="force=''"):
        compressor(force=[""])


def test_readers_that_cannot_do_it_are_refused() -> None:
    from transformers import (
        BertConfig,
        BertForMaskedLM,
        BertForSequenceClassification,
        LlamaModel,
        T5Config,
        T5ForConditionalGeneration,
    )

    small = BertConfig(vocab_size=600, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
                       initializer_range=0.3)  # fmt: skip
    t5 = T5Config(vocab_size=600, d_model=32, d_ff=32, d_kv=16, num_layers=1, num_heads=2)
    for model, words in [
        (T5ForConditionalGeneration(t5), "T5ForConditionalGeneration does not read a text by itself: give a causal"),
        (BertForMaskedLM(small), "BertForMaskedLM sees what comes behind a token"),
        (BertForSequenceClassification(small), "BertForSequenceClassification says nothing about each token"),
        (LlamaModel(reader().config), "LlamaModel does not read a text by itself"),
    ]:
        with pytest.raises(SignalError, match=words):
            Compressor("llmlingua", model, tokenizer("bpe"))("One text of some words, to be read by a model.")
    with pytest.raises(CompressionError, match="LlamaForCausalLM reads tokens: give its tokenizer too"):
        Compressor("llmlingua", reader())
    with pytest.raises(SignalError, match="LlamaForCausalLM is a language model; this method takes an encoder"):
        Compressor("llmlingua2", reader(), tokenizer("bpe"))(PROSE)
    with pytest.raises(SignalError, match="BertForTokenClassification says which words stay"):
        Compressor("llmlingua", chooser(), tokenizer("wordpiece"))(PROSE)
    with pytest.raises(SignalError, match="give question="):
        compressor("longllmlingua")(PROSE)


def test_a_tokenizer_without_offsets_is_refused() -> None:
    class Slow:
        is_fast = False

        def __call__(self, text: str, **_options: Any) -> dict[str, list[int]]:
            return {"input_ids": [ord(c) % 600 for c in text]}

    with pytest.raises(SourceError, match="take a fast tokenizer"):
        Compressor("llmlingua", reader(), Slow())(PROSE)
    one = compressor(counter=Slow())(PROSE[:300], rate=0.5)  # to count with it is enough
    assert one.before == 300
    assert abs(one.after - 150) <= 1


def test_a_text_longer_than_the_readers_window() -> None:
    make = Compressor("llmlingua:segment=40", reader(positions=128), tokenizer("bpe"))
    assert make.window == 128
    one = make(prose(900), rate=0.5)
    assert abs(one.after - 450) <= 1
    with pytest.raises(SignalError, match="a segment of 200 tokens fills the window of 128"):
        Compressor("llmlingua", reader(positions=128), tokenizer("bpe"))(prose(900), rate=0.5)


@pytest.mark.parametrize("unit", ["token", "sentence"])
@pytest.mark.parametrize("tokens", [60, 75, 90, 105, 120])
@pytest.mark.parametrize("method", ["longllmlingua:slack=1", "llmlingua:slack=1"])
def test_the_question_stands_behind_documents_that_came_back(method: str, tokens: int, unit: str) -> None:
    """To be as long as asked, a text may get back some of a document that had left as a whole."""
    whole = [f"{one} It was number {i}, and the one behind it was another." for i, one in enumerate(PROSE.split(". "))][
        :9
    ]
    short = compressor(f"{method},unit={unit}")(whole, question="Who looks after the boards?", tokens=tokens)
    assert short.text.endswith("Who looks after the boards?")
    if method.startswith("llmlingua"):
        assert short.order == sorted(short.order)


# -- for real ----------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.download
def test_a_real_reader_keeps_what_it_could_not_guess() -> None:
    make = fewer.Compressor("llmlingua:keep=0.5", "smollm2-135m")
    text = PROSE.replace("\n", " ")
    one = make(text)
    assert abs(one.after - 0.5 * one.before) <= 1.5
    kept = {i for i in one.order}
    from fewer.runtime.reading import LanguageReader

    ids = torch.tensor([one.source.ids])
    plain = LanguageReader(make.model, ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids)).surprisal[0]
    inside, outside = (plain[[i for i in range(len(plain)) if (i in kept) == side]] for side in (True, False))
    assert float(inside.mean()) > 2 * float(outside.mean())
    for rate in (0.2, 0.35, 0.8):
        short = make(text, rate=rate)
        assert abs(short.after - round(rate * short.before)) <= 1
