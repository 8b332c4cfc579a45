"""`fewer generate --swift` and `fewer train multitoken`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from fewer.cli import app
from fewer.cli.train import _recipe
from fewer.generation import Chained
from fewer.generation.heads import FILE
from fewer.recipes.multitoken import MultiTokens
from fewer.runtime.modules import ALSO, ASSETS
from tinytext import saved


def fewer_cli(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("model"))


def test_the_text_is_the_same(model: Path, tmp_path: Path) -> None:
    network = AutoModelForCausalLM.from_pretrained(model)
    Chained.of(network, 2).save(tmp_path)
    words = ("generate", "--model", model, "The captain said", "--raw", "--max-new-tokens", 30)

    def told(*more: object) -> dict[str, Any]:
        done = fewer_cli(*words, *more, "--json")
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    plain, ahead, headed = told(), told("--swift"), told("--swift", "--heads", tmp_path)
    assert plain["text"] == ahead["text"] == headed["text"]
    assert plain["written"] == ahead["written"]
    assert plain["rows"] == ahead["rows"]
    assert "tokens a pass" not in plain
    assert ahead["tokens a pass"] >= 1
    assert told("--seed", 3)["text"] == told("--seed", 3, "--swift")["text"]
    shown = fewer_cli(*words, "--swift")
    assert "tokens on average" in shown.stdout
    assert ahead["text"].strip()[:20] in shown.stdout


def test_what_does_not_go_together(model: Path) -> None:
    words = ("generate", "--model", model, "The captain said")
    for more, say in (
        (("--swift", "--method", "knorm"), "give one of them"),
        (("--heads", "out"), "give both"),
        (("--swift", "--heads", "nowhere"), "fewer train multitoken"),
    ):
        done = fewer_cli(*words, *more)
        assert done.exit_code != 0
        assert say in " ".join(done.output.split()), done.output


def test_the_recipe_is_found_by_its_name() -> None:
    recipe, _ = _recipe("multitoken", "elsewhere")
    assert recipe == MultiTokens(model="elsewhere")


def test_the_packaged_heads_are_small_and_say_what_they_are_worth() -> None:
    """Their numbers, and that what they guess is better than what untrained ones do. (Speed: benchmarks/swift.py.)"""
    from fewer.generation import load
    from fewer.runtime.modules import read_card

    file = ASSETS / next(iter(ALSO)) / FILE
    assert file.stat().st_size < 4e6
    card = {k: json.loads(v) for k, v in read_card(file).items()}
    assert card["heads"] == {"kind": "chained", "count": 3, "width": 576}
    for head in range(3):
        assert card["first"]["trained"][head] > card["first"]["untrained"][head]
        assert card["first"]["trained"][head] > card["first"]["frequent"][head]
    assert card["per_pass"]["trained"] > card["per_pass"]["untrained"] >= 1

    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        shape = LlamaForCausalLM(LlamaConfig(hidden_size=576, num_hidden_layers=1, vocab_size=49152))
    heads = load(file, shape.to_empty(device="cpu"))
    assert (heads.count, len(heads.words)) == (3, 8192)
    assert all(p.isfinite().all() for p in heads.parameters())
