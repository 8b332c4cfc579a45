"""The small reasoner: problems with their chains, and the recipes that train it, shorten its chains, reward it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fewer.datasets import reasoning
from fewer.datasets.reasoning import Problem, ReasoningError, right
from fewer.evaluation.thoughts import Score, Wrote, answers, scored
from fewer.models.zoo import load_model
from fewer.recipes import reasoner, shorten, skipping

HELD = reasoning.load()
TINY = reasoner.Reasoning(steps=3, tokens=600, width=16, heads=2, depth=1, inner=32, test=4)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, reasoner.Report]:
    """A reasoner after three steps, and what its recipe reports."""
    out = tmp_path_factory.mktemp("tiny")
    return out, reasoner.train(TINY, out, data=HELD[:60], log=lambda _: None)


# -- problems ---------------------------------------------------------------------------------------------------------
def test_every_packaged_chain_leads_to_its_answer():
    """The numbers of a step are those of arithmetic, and the last result is the answer."""
    assert len({p.question for p in HELD}) == 1000
    assert {p.kind for p in HELD} == set(reasoning.KINDS)
    for p in HELD:
        steps = [part for part, needed in zip(p.parts, p.needed, strict=True) if needed]
        assert all(re.fullmatch(r"-?\d+ [-+*/] -?\d+ = -?\d+\.", step) for step in steps), p
        for step in steps:
            left, result = step.removesuffix(".").split(" = ")
            a, sign, b = left.split(" ")
            assert {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b),
                    "/": int(a) / int(b) if int(b) else None}[sign] == int(result), p  # fmt: skip
        assert not steps or steps[-1].endswith(f"= {p.answer}."), p
        assert right(p.solution, p.answer)


def test_chains_have_remarks_that_can_go():
    """Between a fifth and a half of the words, digits and marks are steps."""
    sizes = [(len(re.findall(r"[a-zA-Z]+|\d|[^\w\s]", part)), needed)
             for p in HELD for part, needed in zip(p.parts, p.needed, strict=True)]  # fmt: skip
    assert 0.2 < sum(n for n, needed in sizes if needed) / sum(n for n, _ in sizes) < 0.5


@pytest.mark.parametrize(
    ("written", "answer", "judged"),
    [
        (" 3 + 4 = 7.</think> The answer is 7.", "7", True),
        (" 3 + 4 = 7.</think> The answer is 17.", "7", False),
        (" 3 + 4 = 7.", "7", False),
        ("</think> The answer is -7.", "-7", True),
        ("</think> The answer is -7.", "7", False),
        ("</think> The answer is 7 or 8.", "7", False),
    ],
)
def test_only_the_answer_behind_the_chain_counts(written: str, answer: str, judged: bool):
    assert right(written, answer) is judged


def test_draws_for_training_never_hold_a_test_question():
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed: pip install 'fewer[reasoning]'")
    drawn = list(reasoning.problems(300, seed=5))
    assert drawn == list(reasoning.problems(300, seed=5))
    assert not {p.question for p in drawn} & {p.question for p in HELD}
    tests = list(reasoning.problems(30, split="test"))
    assert {p.question for p in tests} <= {p.question for p in HELD}
    with pytest.raises(ReasoningError, match="split='dev'"):
        next(reasoning.problems(1, split="dev"))  # type: ignore[arg-type]


def test_without_the_generators_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym", None)
    with pytest.raises(ReasoningError, match=r"pip install 'fewer\[reasoning\]'"):
        next(reasoning.problems(1))


# -- the model --------------------------------------------------------------------------------------------------------
def test_tokens_are_words_and_single_digits_and_come_back_to_the_letter(tiny: tuple[Path, reasoner.Report]):
    _, tokenizer = load_model(tiny[0])
    for p in HELD[:60]:
        whole = f"{p.prompt}{p.solution}"
        assert tokenizer.decode(tokenizer(whole)["input_ids"]) == whole
    assert tokenizer.tokenize(" 1085") == [" 1", "0", "8", "5"]


def test_a_few_steps_of_the_recipe(tiny: tuple[Path, reasoner.Report]):
    out, report = tiny
    assert report.problems == 4
    assert 0 <= report.accuracy <= 1
    model, tokenizer = load_model(out)
    wrote = answers(model, tokenizer, [HELD[0].prompt], longest=5)
    assert len(tokenizer(wrote[0].text)["input_ids"]) <= 5


def test_prompts_teach_nothing_and_padding_is_not_seen(tiny: tuple[Path, reasoner.Report]):
    _, tokenizer = load_model(tiny[0])
    rows = reasoner.encoded(tokenizer, [(p.prompt, p.solution) for p in HELD[:3]])
    ids, labels = reasoner._batch(rows)
    assert ids.shape[1] % reasoner.STEP == 0
    for i, (row, prompt) in enumerate(rows):
        assert labels[i, prompt : len(row)].tolist() == row[prompt:]
        assert (labels[i, :prompt] == -100).all()
        assert (labels[i, len(row) :] == -100).all()


def test_training_attention_is_causal():
    """The float32 attention of training gives the logits of the model's own: a token never sees the next one."""
    model = reasoner.build(TINY, reasoner.vocabulary(["a b"])).eval()
    ids = torch.randint(0, len(model.get_input_embeddings().weight), (2, 9))
    own = model(ids).logits
    model.set_attn_implementation(reasoner.FLOAT32_ATTENTION)
    torch.testing.assert_close(model(ids).logits, own)


def test_answers_do_not_depend_on_their_batch(tiny: tuple[Path, reasoner.Report]):
    model, tokenizer = load_model(tiny[0])
    prompts = [p.prompt for p in HELD[:6]]
    together = answers(model, tokenizer, prompts, longest=12)
    alone = [answers(model, tokenizer, [prompt], longest=12)[0] for prompt in prompts]
    assert together == alone


def test_a_chain_that_is_cut_short_is_asked_for_its_answer(tiny: tuple[Path, reasoner.Report]):
    model, tokenizer = load_model(tiny[0])
    for wrote in answers(model, tokenizer, [p.prompt for p in HELD[:6]], most=3):
        assert wrote.thought <= 3
        assert "</think> The answer is" in wrote.text


def test_scores():
    score = Score((True, False, True, True), (10, 20, 30, 40))
    assert (score.accuracy, score.tokens) == (0.75, 25)
    assert score.per_right == pytest.approx(100 / 3)
    assert Score((False,), (5,)).per_right == float("inf")


def test_the_packaged_reasoner_answers():
    model, tokenizer = load_model("reasoner")
    score = scored(answers(model, tokenizer, [p.prompt for p in HELD[-200:]]), HELD[-200:])
    assert score.accuracy >= 0.85  # 91 % of the first 300
    assert 60 <= score.tokens <= 120


# -- TokenSkip --------------------------------------------------------------------------------------------------------
def right_chains(problems: list[Problem]) -> list[Wrote]:
    """In place of a model's own: what the problems have."""
    return [Wrote(p.solution, 1) for p in problems]


@pytest.mark.parametrize("by", ["words", "random"])
def test_skipping_learns_from_shorter_chains(
    by: str, tiny: tuple[Path, reasoner.Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[list[reasoner.Row]] = []
    learnt = skipping.learnt

    def watched(model: Any, rows: Any, *given: Any, **more: Any) -> float:
        seen.append(rows)
        return learnt(model, rows, *given, **more)

    real = skipping.answers
    own = iter([right_chains(HELD[:40])])
    monkeypatch.setattr(skipping, "answers", lambda *a, **k: next(own, None) or real(*a, **{**k, "longest": 6}))
    monkeypatch.setattr(skipping, "learnt", watched)
    recipe = skipping.Skipping(by=by, steps=2, tokens=500, word_steps=30, word_width=16, test=2)  # type: ignore[arg-type]
    report = skipping.train(recipe, tmp_path, model=load_model(tiny[0]), data=HELD[:40], log=lambda _: None)
    assert report.learned == 40
    assert set(report.accuracy) == {"1", "0.9", "0.8", "0.7", "0.6", "0.5"}
    for ratio, share in report.achieved.items():
        assert share == 0 or share == pytest.approx(float(ratio), abs=0.06)
    tokenizer = load_model(tmp_path)[1]
    for (ids, prompt), p in zip(seen[0], HELD[:40], strict=True):
        text = tokenizer.decode(ids[prompt:])
        assert text.endswith(f"{reasoning.said(p.answer)}<eos>")  # the answer is never shortened
        assert "<unk>" not in text


def test_the_encoder_learns_which_words_are_steps(tiny: tuple[Path, reasoner.Report], tmp_path: Path):
    from fewer.recipes.loop import Folder

    tokenizer = load_model(tiny[0])[1]
    recipe = skipping.Skipping(word_steps=60, word_width=32, tokens=2000)
    model = skipping.words(recipe, HELD[:200], tokenizer, Folder(tmp_path, recipe, lambda _: None))
    hits, steps, total = 0, 0, 0
    for p in HELD[200:240]:
        ids, labels = skipping.labelled(tokenizer, p)
        found = model(input_ids=torch.tensor([ids])).logits.argmax(-1)[0]
        hits += int((found == torch.tensor(labels)).sum())
        steps += sum(labels)
        total += len(ids)
    assert hits / total > 1 - steps / total + 0.08  # to call everything a remark would be right for the rest


# -- rewards ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", shorten.REWARDS)
def test_every_reward_prefers_right_and_short(name: str):
    recipe = shorten.Shortening(reward=name, group=4, longest=64, limits=(30,), asked=30)
    rounds = shorten.rewards.Rounds(recipe.limits)
    said = reasoning.said
    given = {
        "prompts": ["a"] * 4,
        "completions": [f" short{said('7')}", f" long{said('7')}", f" short{said('8')}", " never ends"],
        "completion_ids": [[1] * 20, [1] * 40, [1] * 20, [1] * 64],
        "answer": ["7"] * 4,
        "num_tokens": [30] * 4,
    }
    parts = [each(**given) for each in shorten.rewarding(recipe, rounds)]
    total = [sum(row) for row in zip(*parts, strict=True)]
    assert total[0] > total[2]
    assert total[1] > total[3] or name == "thinkprune"
    assert total[0] == total[1] if name == "correct" else total[0] > total[1]


def test_a_reward_that_there_is_not():
    with pytest.raises(ValueError, match=r"reward='speed'.*thinkprune"):
        shorten.Shortening(reward="speed")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_shortening_in_trl(tiny: tuple[Path, reasoner.Report], tmp_path: Path):
    """Two rounds of ThinkPrune, each of one step: the limit falls, and what is saved loads."""
    pytest.importorskip("trl", reason="trl is not installed: pip install trl, to see the rewards in its trainer")
    recipe = shorten.Shortening(
        steps=2, prompts=2, group=2, longest=24, limits=(16, 8), check=1, patience=1, validation=4, test=4, lr=1e-2
    )
    model = load_model(tiny[0])
    report = shorten.train(recipe, tmp_path, model=model, data=HELD[:8], log=lambda _: None)
    assert report.limits == (16, 16)
    assert report.score is not None
    assert len(report.score.rights) == 4
    load_model(tmp_path)


@pytest.mark.parametrize(
    ("recipe", "change", "says"),
    [
        (reasoner.Reasoning(), {"heads": 5}, "share the width evenly"),
        (reasoner.Reasoning(), {"steps": 0}, "at least 1"),
        (skipping.Skipping(), {"by": "taste"}, "choose words or random"),
        (shorten.Shortening(), {"group": 1}, "at least 2"),
    ],
)
def test_settings_out_of_range_are_refused(recipe: Any, change: dict[str, Any], says: str):
    with pytest.raises(ValueError, match=says):
        replace(recipe, **change)
