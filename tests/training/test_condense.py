"""The recipe that trains an AutoCompressor, on a model small enough for a test."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from condensing import causal_lm, words
from fewer.cli import train as command
from fewer.recipes.condense import Condensing, measured, train
from fewer.summaries import AutoCompressor


def carrying(n: int, seed: int) -> torch.Tensor:
    """A stream of n stretches of 64 tokens in which every fourth one is the stretch's word: once it was seen, it is
    known; nothing else tells it."""
    draws = torch.Generator().manual_seed(seed)
    word = torch.randint(3, 8, (n, 1), generator=draws)
    filler = torch.full_like(word, 50)
    return torch.cat([filler, word, filler, filler], 1).repeat(1, 16).flatten()


def run(out: Path, **changes: object):
    recipe = Condensing(**{"count": 2, "length": 4, "segments": 2, "steps": 3, "batch": 4, "test": 9} | changes)
    lines: list[str] = []
    model = copy.deepcopy(causal_lm("llama"))
    report = train(recipe, out, model=(model, None), ids=carrying(40, 0), held=carrying(9, 1), log=lines.append)
    return report, lines


def test_a_run_leaves_a_compressor_and_its_numbers(tmp_path: Path) -> None:
    report, lines = run(tmp_path)
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["recipe"]["count"] == 2
    assert set(report.after) == {"alone", "full", "summary", "other"}
    assert set(report.before) == {"alone", "full"}
    assert {len(x) for part in report.texts.values() for x in part.values()} == {9}
    worth = report.after["alone"] - report.after["full"]
    if worth > 0:
        assert report.recovered == pytest.approx((report.after["alone"] - report.after["summary"]) / worth)
    assert "recovered" in lines[-1]
    again = AutoCompressor.load(tmp_path, AutoModelForCausalLM.from_pretrained(tmp_path))
    two = carrying(9, 1).view(-1, 8)
    found = measured(again, two[torch.linspace(0, 71, 9).long()])
    assert_close(math.fsum(found["summary"]) / 9, report.after["summary"], rtol=1e-4, atol=0)


@torch.no_grad()
def test_the_measure_by_hand() -> None:
    """All readers are asked for the same tokens: the second half but for its first."""
    made = AutoCompressor(causal_lm("llama"), 2)
    texts = words(3, 8)
    found = measured(made, texts, batch=3)
    full = causal_lm("llama")(texts).logits[1, 4:7]
    assert_close(found["full"][1], float(F.cross_entropy(full, texts[1, 5:])), rtol=1e-4, atol=0)
    alone = causal_lm("llama")(texts[:, 4:]).logits[1, :3]
    assert_close(found["alone"][1], float(F.cross_entropy(alone, texts[1, 5:])), rtol=1e-4, atol=0)
    summary = made.summary(texts[:1, :4], lengths=[4])
    other = summary.logits(texts[1:2, 4:])[0, :3]  # of three texts, the one before: half of them away
    assert_close(found["other"][1], float(F.cross_entropy(other, texts[1, 5:])), rtol=1e-4, atol=0)


def test_summaries_learn_to_say_what_was_there(tmp_path: Path) -> None:
    report, _ = run(tmp_path, steps=160, batch=16, lr=5e-3, test=36)
    assert report.after["summary"] < 0.3
    assert report.after["summary"] < report.after["alone"] - 0.3  # at best, one word in three is a guess among five
    assert report.after["summary"] < report.after["other"] - 0.3


def test_no_summaries_is_a_language_model(tmp_path: Path) -> None:
    report, _ = run(tmp_path, count=0, segments=1, length=8, steps=20, lr=3e-3)
    assert set(report.after) == {"alone", "full"}
    assert report.recovered is None
    assert report.after["full"] < report.before["full"] - 1


def test_wrong_recipes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Condensing\(length=1\): must be at least 2"):
        Condensing(length=1)
    with pytest.raises(ValueError, match="too short for 800 at a time"):
        run(tmp_path, length=400)


def test_the_command_knows_the_recipe() -> None:
    recipe, _ = command._recipe("autocompressor", "gpt2")
    assert recipe == Condensing(model="gpt2")
