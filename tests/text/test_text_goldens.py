"""What the authors' own code keeps, token for token, with `fidelity="code"`: numbers printed by it."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import fewer
import kvgoldens
from fewer.compression import Compressor
from fewer.compression.compressed import kept
from fewer.core import Place, Signals, Tokens
from fewer.core.lingua import BETWEEN, SPARE, cut, runs
from fewer.core.written import Written, leading
from fewer.methods.text.llmlingua2 import above
from fewer.models.zoo import load_model
from fewer.runtime.reading import LanguageReader

GOLDENS = Path(__file__).parent.parent / "goldens"
LINGUA = ("llmlingua_tiny_s0", "llmlingua_smollm2_a")


@cache
def cases(name: str) -> list[dict[str, Any]]:
    return json.loads((GOLDENS / f"{name}.json").read_text())["cases"]


@cache
def ascii_tokenizer() -> Any:
    """A token for each character, its code."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({chr(i): i for i in range(128)}, unk_token="\0"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=made)


@cache
def language_model(name: str) -> tuple[Any, Any]:
    if name == "llmlingua_tiny_s0":
        return kvgoldens.golden(0)[2], ascii_tokenizer()
    return load_model("smollm2-135m")


def tokenized(name: str) -> Any:
    return ascii_tokenizer() if name == "llmlingua_tiny_s0" else language_model(name)[1]


COARSE = {name: cases(name)[6] for name in LINGUA}
REAL = [pytest.param("llmlingua_smollm2_a", marks=[pytest.mark.slow, pytest.mark.download])]


# -- LLMLingua and LongLLMLingua ---------------------------------------------------------------------------------------
class Told:
    """The losses the authors' code had, in the order it had them; NaN in none of them."""

    def __init__(self, calls: list[dict[str, Any]], contrast: bool, start: int) -> None:
        self.calls, self.contrast, self.start = iter(calls), contrast, start

    def _next(self, length: int) -> Tensor:
        with_question = torch.tensor(next(self.calls)["loss"])[-length:]
        if not self.contrast:
            return with_question
        return torch.tensor(next(self.calls)["loss"])[-length:] - with_question

    def first(self, n: int) -> Tensor:
        return self._next(n - 1)

    def again(self, _kept: list[int], start: int, stop: int) -> Tensor:
        return self._next(stop - start - 1)


def lengths(name: str, texts: list[str]) -> list[int]:
    return [len(tokenized(name)(text, add_special_tokens=False)["input_ids"]) for text in texts]


def sequence(name: str, case: dict[str, Any]) -> tuple[list[str], list[float], float]:
    """The contexts that are left, in order, what is added to the share of each, and how many tokens are asked for."""
    args, trace = case["args"], case["trace"]
    whole = lengths(name, [args.get("instruction", ""), *args["context"], args.get("question", "")])
    target = args["rate"] * sum(whole) - whole[0] - whole[-1]
    budget = next((call["context_budget_result"] for call in trace if "context_budget_result" in call), None)
    contexts, ramp = args["context"], [0.0] * len(args["context"])
    if budget:
        contexts = [contexts[i] for i in budget["kept_context_indices_in_order"]]
        ramp = budget["dynamic_ratio"]
    if args.get("use_sentence_level_filter"):
        contexts = shorter(name, contexts, trace, target)
    return contexts, ramp, target


def shorter(name: str, contexts: list[str], trace: list[dict[str, Any]], target: float) -> list[str]:
    """Its filter of sentences: by falling perplexity until 1.4 times the tokens are there."""
    at = next(i for i, call in enumerate(trace) if "context_budget_result" in call)
    calls = [call for call in trace[at + 1 :] if call.get("granularity") == "sentence"]
    score = torch.tensor([[call["loss"][0] for call in calls]])
    stays = leading(score, torch.tensor([[call["n_ids"] for call in calls]]), torch.tensor([1.4 * target]))[0].tolist()
    assert "".join(call["text"] for call in calls) == "".join(contexts)
    found = ["" for _ in contexts]
    done, context = 0, 0
    for call, stay in zip(calls, stays, strict=True):
        if done == len(contexts[context]):
            done, context = 0, context + 1
        found[context] += call["text"] * stay
        done += len(call["text"])
    return found


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("name", [LINGUA[0], *REAL])
def test_tokens_stay_by_the_losses_the_authors_had(name: str, number: int) -> None:
    case = cases(name)[number]
    contexts, ramp, target = sequence(name, case)
    calls = [call for call in case["trace"] if call.get("granularity") == "token"]
    segment = case["args"].get("iterative_size", 200)
    long = [length + BETWEEN for length in lengths(name, contexts)]
    share = target / (sum(long) + 1)
    plan = runs(long, [min(1.0, max(0.0, share + extra)) for extra in ramp], segment)
    ids = tokenized(name)("\n\n".join(contexts), add_special_tokens=False)["input_ids"]
    told = Told(calls, bool(case["args"].get("condition_compare")), 0)
    stays = cut(told.first(len(ids)), told.again, plan, segment)
    assert [ids[i] for i in stays] == case["trace"][-1]["iterative_result_ids"]


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("name", [LINGUA[0], *REAL])
def test_llmlingua_of_a_text_is_the_authors(name: str, number: int) -> None:
    """The whole way, from the text to the text, with the model reading it."""
    case = cases(name)[number]
    args = case["args"]
    model, tokenizer = language_model(name)
    method = f"llmlingua:keep={args['rate']},segment={args.get('iterative_size', 200)},fidelity=code"
    one = Compressor(method, model, tokenizer)(args["context"])
    assert [one.source.ids[i] for i in one.order] == case["trace"][-1]["iterative_result_ids"]
    assert tokenizer.decode([one.source.ids[i] for i in one.order]).replace(" ", "") == case["result"][
        "compressed_prompt"
    ].replace(" ", "")


@pytest.mark.parametrize("name", [LINGUA[0], *REAL])
def test_contexts_are_ranked_as_the_authors_rank_them(name: str) -> None:
    model, tokenizer = language_model(name)
    for number in (3, 4, 5):
        case = cases(name)[number]
        args = case["args"]
        asked = tokenizer(args["question"] + " We can get the answer to this question in the given documents.")
        rows = [tokenizer(context, add_special_tokens=False)["input_ids"] for context in args["context"]]
        ids = torch.tensor([[i for row in rows for i in row]])
        part = torch.tensor([[number for number, row in enumerate(rows) for _ in row]])
        reader = LanguageReader(model, ids, torch.ones_like(ids, dtype=torch.bool), part, [asked["input_ids"]])
        sizes = torch.tensor([[len(row) for row in rows]])
        if number == 3:
            written = Written(reader, part, ids, ids, ids, ids)
            scores, _ = written.by_part(reader.apart(part), torch.ones_like(part, dtype=torch.bool))
        else:
            scores = -reader.relevance
        calls = [call["loss"][0] for call in case["trace"][:3]]
        assert_close(scores[0], torch.tensor(calls), atol=2e-3, rtol=2e-4)
        _, _, target = sequence(name, case)
        limit = {3: target + SPARE, 4: target + 50, 5: target * 1.2}[number]
        chosen = leading(scores if number == 3 else -scores, sizes, torch.tensor([limit]))
        want = case["trace"][3]["context_budget_result"]["kept_context_indices_in_order"]
        assert {*chosen[0].nonzero()[:, 0].tolist()} == {*want}


@pytest.mark.parametrize("name", [LINGUA[0], *REAL])
def test_contexts_alone_are_chosen_as_the_authors_choose_them(name: str) -> None:
    """Their coarse step by itself, up to a hundred tokens beyond a target that is a number."""
    case = COARSE[name]
    args = case["args"]
    sizes = torch.tensor([lengths(name, args["context"])])
    limit = args["target_token"] - lengths(name, [args["question"]])[0] + SPARE
    far = torch.tensor([[call["loss"][0] for call in case["trace"][:3]]])
    chosen = leading(-far, sizes, torch.tensor([limit]))[0].nonzero()[:, 0].tolist()
    assert chosen == case["trace"][3]["context_budget_result"]["kept_context_indices_in_order"]


def test_a_short_text_stays_nearly_whole_in_the_code() -> None:
    """The quirk the paper's way mends."""
    case = cases(LINGUA[0])[0]
    text = case["args"]["context"][0][:150]
    model, tokenizer = language_model(LINGUA[0])
    quirk = Compressor("llmlingua:keep=0.3,fidelity=code", model, tokenizer)(text)
    assert quirk.after >= 147
    assert quirk.notes == (
        f"45 tokens were asked for and {quirk.after} are left: its fidelity is that of the authors' code",
    )
    assert abs(Compressor("llmlingua:keep=0.3", model, tokenizer)(text).after - 45) <= 1


@pytest.mark.parametrize("order", ["best", "ends", "original"])
def test_longllmlingua_as_the_code_has_it_is_its_loop(order: str) -> None:
    """Against plain forwards over what is there, document by document in their new order."""
    case = cases(LINGUA[0])[4]
    model, tokenizer = language_model(LINGUA[0])
    contexts, question = [text[:130] for text in case["args"]["context"]], case["args"]["question"]
    method = f"longllmlingua:tokens=260,segment=60,fidelity=code,order={order}"
    one = Compressor(method, model, tokenizer)(contexts, question=question)
    source = one.source
    asked = [i for i, part in enumerate(source.parts) if part > 9]
    ids = source.ids

    def nats(front: list[int], tokens: list[int]) -> Tensor:
        row = torch.tensor([[*front, *(ids[i] for i in tokens)]])
        with torch.no_grad():
            p = model(input_ids=row).logits[0, :-1].log_softmax(-1)
        return -p.gather(-1, row[0, 1:, None])[:, 0][-(len(tokens) - 1) :]

    promise = tokenizer(" We can get the answer to this question in the given documents.")["input_ids"]
    parts = {part: [i for i, p in enumerate(source.parts) if p == part] for part in range(3)}
    far = {}
    for part, tokens in parts.items():
        row = torch.tensor([[*(ids[i] for i in [*tokens, *asked]), *promise]])
        with torch.no_grad():
            p = model(input_ids=row).logits[0, :-1].log_softmax(-1)
        far[part] = -float(p.gather(-1, row[0, 1:, None])[len(tokens) - 1 :].mean())
    ranked = sorted(far, key=lambda part: far[part])
    left = 260 - len(asked)
    chosen, size = [], 0
    for part in ranked:
        if size < left + 100:
            chosen.append(part)
            size += len(parts[part])
    ramp = {part: 0.3 * (len(chosen) - 1 - 2 * i) / max(1, len(chosen) - 1) for i, part in enumerate(chosen)}
    stood = {"best": chosen, "original": sorted(chosen), "ends": [*chosen[::2], *chosen[1::2][::-1]]}[order]
    inside = [i for part in stood for i in parts[part]]
    long = [len(parts[part]) for part in stood]
    long[-1] += BETWEEN
    share = left / (sum(long) + 1)
    question_ids = [*(ids[i] for i in asked), *tokenizer("\n\n")["input_ids"]]

    def score(tokens: list[int]) -> Tensor:
        return nats([], tokens) - nats(question_ids, tokens)

    stays = cut(
        score(inside), lambda kept, start, stop: score([inside[i] for i in kept[:stop]])[start:],
        runs(long, [min(1.0, max(0.0, share + ramp[part])) for part in stood], 60), 60,
    )  # fmt: skip
    assert one.order == [*(inside[i] for i in stays), *asked]


# -- LLMLingua-2 -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", [c for c in cases("llmlingua2_a") if len(c["trace"]) == 3],
                         ids=lambda case: "-".join(f"{k}={v}" for k, v in case["args"].items()))  # fmt: skip
def test_llmlingua2_keeps_the_authors_words(case: dict[str, Any]) -> None:
    merge, scored, percentile = case["trace"]
    args = case["args"]
    share = args["rate"] if "rate" in args else args["target_token"] / case["result"]["origin_tokens"]
    # the score of a word, from its pieces
    pieces = torch.tensor(merge["token_probs"][1:-1]).split(merge["n_tokens_per_word"])
    mean = [float(p.mean() if scored["mode"] == "mean" else p[0]) for p in pieces]
    assert_close(torch.tensor(mean), torch.tensor(scored["word_probs"]), atol=2e-6, rtol=0)
    # those that stay, each counted as often as the paid-for model's tokens
    times = torch.tensor(merge["target_tokens_per_word"])
    scores = torch.tensor(scored["word_probs"]).repeat_interleave(times)
    assert len(scores) == percentile["n"]
    assert_close(float(scores.double().quantile(percentile["q"] / 100)), percentile["threshold"], atol=1e-6, rtol=0)
    stays = [bool(part[0]) for part in above(scores, share).split(times.tolist())]
    labels = case["result"]["fn_labeled_original_prompt"].split("\t\t|\t\t")
    assert [(word, stay) for word, stay in zip(merge["words"], stays, strict=True)] == [
        (label.rsplit(" ", 1)[0], label.endswith("1")) for label in labels
    ]


def test_llmlingua2_filters_contexts_as_the_authors_do() -> None:
    """Whole contexts leave by the mean of their words, then words of each of the others by a percentile of its own."""
    (case,) = [c for c in cases("llmlingua2_a") if c["args"].get("use_context_level_filter")]
    trace, args = case["trace"], case["args"]
    coarse = next(i for i, step in enumerate(trace) if step["step"] == "percentile")
    merges = [step for step in trace[:coarse] if step["step"] == "merge"]
    worth = [torch.tensor(step["word_probs"]) for step in trace[:coarse] if step["step"] == "word_prob"]
    means = torch.stack([words.mean() for words in worth])
    assert trace[coarse]["n"] == len(means) == 3
    # the share is cut to a whole number, here without the one that the code adds for words
    limit = means.double().quantile(int(100 * (1 - args["context_level_rate"]) + 1e-9) / 100)
    assert_close(float(limit), trace[coarse]["threshold"], atol=2e-6, rtol=0)
    there = [merge for merge, mean in zip(merges, means.double(), strict=True) if mean > limit]
    rest = trace[coarse + 1 :]
    assert [merge["words"] for merge in there] == [step["words"] for step in rest if step["step"] == "merge"]
    chosen = iter(zip(rest[::3], rest[1::3], rest[2::3], strict=True))
    stays: list[tuple[str, bool]] = []
    for own, mean in zip(merges, means.double(), strict=True):
        kept_ = [False] * len(own["words"])
        if mean > limit:
            merge, scored, percentile = next(chosen)
            times = torch.tensor(merge["target_tokens_per_word"])
            scores = torch.tensor(scored["word_probs"]).repeat_interleave(times)
            assert len(scores) == percentile["n"]
            kept_ = [bool(part[0]) for part in above(scores, args["rate"]).split(times.tolist())]
        stays += zip(own["words"], kept_, strict=True)
    labels = case["result"]["fn_labeled_original_prompt"].split("\t\t|\t\t")
    assert stays == [(label.rsplit(" ", 1)[0], label.endswith("1")) for label in labels]


# -- Selective Context -------------------------------------------------------------------------------------------------
class Given:
    """A reader that was told what each unit is worth."""

    def __init__(self, values: list[float]) -> None:
        self.values = torch.tensor([values])

    def apart(self, _group: Tensor) -> Tensor:
        return self.values


def _units(case: dict[str, Any]) -> dict[str, Any]:
    """The case of the same text and level that has the units."""
    return next(c for c in cases("selective_context_a")
                if "units" in c and (c["text"], c["level"]) == (case["text"], case["level"]))  # fmt: skip


@pytest.mark.parametrize("case", cases("selective_context_a"),
                         ids=lambda case: f"{case['level']}-{case['ratio']}")  # fmt: skip
def test_selective_context_masks_the_authors_units(case: dict[str, Any]) -> None:
    told = _units(case)
    values = told["unit_self_info"]
    n = len(values)
    places = torch.arange(n)[None]
    written = Written(Given(values), places, places, places, places, places)  # type: ignore[arg-type]
    signals = Signals(torch.zeros(1, n, 1), Tokens.plain(1, n, 0), Place(start=n), text=written)
    method = fewer.parse(f"selective_context:keep={1 - case['ratio']:.2f},unit=token,fidelity=code")
    stays = {*kept(method.plan(signals, signals.tokens))}
    masked = [told["units"][i] for i in range(n) if i not in stays]
    assert [unit for unit in masked if unit] == [unit for unit in case["masked"] if unit]


@pytest.mark.slow
@pytest.mark.download
def test_selective_context_reads_sentences_as_the_authors_do() -> None:
    model, tokenizer = language_model(LINGUA[1])
    for case in cases("selective_context_a"):
        if case["level"] != "token" or case["ratio"] != 0.35:
            continue
        rows = [
            tokenizer(sentence["sentence"], add_special_tokens=False)["input_ids"] for sentence in case["sentences"]
        ]
        ids = torch.tensor([[i for row in rows for i in row]])
        group = torch.tensor([[number for number, row in enumerate(rows) for _ in row]])
        reader = LanguageReader(model, ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids), start=[0])
        want = [value for sentence in case["sentences"] for value in sentence["self_info"]]
        assert_close(reader.apart(group)[0], torch.tensor(want), atol=5e-3, rtol=1e-3)
