"""The recipe of the pooled character model: what it holds out, what it teaches, and that a short run learns."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from typer.testing import CliRunner

from fewer.methods.language.dynamic_pooling import SOURCES
from fewer.models.hourglass import UNKNOWN, Hourglass, Settings
from fewer.recipes import pooling
from fewer.recipes.pooling import BLOCK, EVERY, Recipe, alphabet, bits, losses, split, unigram_ends
from fewer.runtime.modules import ASSETS

SMALL = {
    "steps": 16,
    "batch": 4,
    "length": 32,
    "width": 16,
    "depth": 3,
    "tested": 1000,
    "bfloat16": False,
    "pieces": 40,
}
WORDS = [
    "the",
    "whale",
    "and",
    "the",
    "sea",
    "the",
    "ship",
    "sailed",
    "over",
    "a",
    "long",
    "swell",
    "while",
    "men",
    "slept",
]
PACKAGED = sorted(path.name for path in ASSETS.glob("hourglass-*"))


def story(seed: int = 0, words: int = 88_000) -> str:
    draws = torch.randint(len(WORDS), (words,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[int(i)] for i in draws)


TEXT = story()


def test_split_holds_out_one_block_in_twenty() -> None:
    text = "".join(chr(0x100 + i // BLOCK) for i in range(2 * EVERY * BLOCK + 5))
    seen, held = split(text)
    assert [part[0] for part in held] == [chr(0x100 + i) for i in (EVERY - 1, 2 * EVERY - 1)]
    assert not set("".join(seen)) & set("".join(held))
    assert sum(map(len, seen)) + sum(map(len, held)) == len(text)
    with pytest.raises(ValueError, match=r"text of 100 characters leaves nothing to hold out; give 400000 or more"):
        split("x" * 100)


def test_alphabet_leaves_out_what_is_rare() -> None:
    assert alphabet("aabbbc" + UNKNOWN * 5, 2) == UNKNOWN + "ab"


def test_unigram_pieces_end_with_words_and_inside_them() -> None:
    parts = [TEXT[:4000], TEXT[4000:8000]]
    ends = unigram_ends(parts, 60)
    assert ends.shape == (8000,)
    blanks = torch.tensor([c == " " for c in "".join(parts)])
    assert ends[blanks].all()  # no piece crosses a blank
    assert ends[~blanks].any()
    assert not ends.all()
    assert ends[3999]  # and none crosses from one part to the next


def test_windows_score_each_character_once() -> None:
    recipe = Recipe(length=8, tested=0)
    windows = pooling._windows(torch.arange(41), recipe)
    assert windows.shape[1] == 9
    assert windows[:, 5:].flatten().tolist() == list(range(5, 41))


def test_bits_of_a_model_that_knows_nothing() -> None:
    model = Hourglass(Settings("?abc", 16, 2, 2)).eval()
    torch.nn.init.zeros_(model.head.weight)
    scores, share = bits(model, torch.randint(4, (5, 9)), 2)
    assert_close(scores, torch.full((5,), 2.0))
    assert share == 1.0


def test_starts_cover_the_text_and_do_not_depend_on_other_draws() -> None:
    recipe = Recipe(length=8, batch=3)
    torch.manual_seed(1)
    first = next(pooling._starts(100, recipe))
    torch.manual_seed(2)
    again = pooling._starts(100, recipe)
    assert torch.equal(next(again), first)
    starts = torch.cat([first, next(again), next(again), next(again)])[:11]
    assert starts.max() + recipe.length < 100
    assert len(set((starts // 8).tolist())) == 11


@pytest.mark.parametrize("kind", [None, *SOURCES])
def test_losses_name_what_is_learned(kind: str | None) -> None:
    torch.manual_seed(0)
    method = None if kind is None else f"dynamic_pooling:keep=0.3,layers=1,boundaries={kind}"
    model = Hourglass(Settings("? abc", 16, 3, 2, method)).train()
    ids = torch.randint(5, (2, 21))
    reading = model(ids[:, :-1])
    parts = losses(model, reading, ids[:, 1:], ids[:, :-1] == 1)
    assert set(parts) == ({"next", "boundaries"} if model.predictor else {"next"})
    assert abs(float(parts["next"].detach()) - math.log(5)) < 0.3
    if model.predictor:
        parts["boundaries"].backward()
        grads = [p.grad for p in model.predictor.parameters()]
        assert all(g is not None and g.abs().max() > 0 for g in grads)


@pytest.mark.parametrize("kind", [None, *SOURCES])
def test_a_short_run_learns_and_can_be_loaded(kind: str | None, tmp_path: Path) -> None:
    method = None if kind is None else f"dynamic_pooling:keep=0.25,layers=1,boundaries={kind}"
    lines: list[str] = []
    report = pooling.train(tmp_path, Recipe(method=method, **SMALL), text=TEXT, log=lines.append)  # type: ignore[arg-type]
    model = Hourglass.from_folder(tmp_path)
    assert report.low < report.bits < report.high
    assert report.bits < math.log2(len(model.settings.alphabet)) - 0.1  # better than all characters alike
    assert (report.shortening == 1) == (kind is None)
    assert report.parameters == sum(p.numel() for p in model.parameters())
    assert json.loads((tmp_path / "report.json").read_text())["report"]["bits"] == report.bits
    assert "step 16" in lines[0]


def test_models_are_compared_on_the_same_windows(tmp_path: Path) -> None:
    recipe = Recipe(length=32, tested=1000)
    for name, seed in (("one", 0), ("two", 1)):
        torch.manual_seed(seed)
        Hourglass(Settings("? adeghilmnoprstvw", 16, 2, 2)).save(tmp_path / name)
    one, two = (tmp_path / name for name in ("one", "two"))
    found = pooling.compare([one, two], recipe, text=TEXT)
    again = pooling.compare([two, one], recipe, text=TEXT)
    assert found[str(one)][1].value == 0
    assert found[str(one)] != again[str(one)]
    assert found[str(two)][0] == again[str(two)][0]
    assert_close(found[str(two)][1].value, found[str(two)][0].value - found[str(one)][0].value, atol=1e-5, rtol=0)
    assert_close(found[str(two)][1].value, -again[str(one)][1].value, atol=1e-5, rtol=0)


def test_the_command_line_trains_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fewer.cli import app
    from fewer.datasets import texts

    monkeypatch.setattr(texts, "book", {"moby-dick": TEXT}.__getitem__)
    changes = [f"--set={key}={value}" for key, value in (SMALL | {"book": "moby-dick", "steps": 2}).items()]
    for form, wanted in (("dynamic_pooling:layers=1,boundaries=whitespace", "whitespace"), ("dynamic_pooling", None)):
        plain = [] if wanted else ["--set=method=none"]
        result = CliRunner().invoke(app, ["train", form, "--out", str(tmp_path), *changes, *plain])
        assert result.exit_code == 0, result.output
        method = Hourglass.from_folder(tmp_path).method
        assert (method and method.boundaries) == wanted


def test_a_recipe_that_cannot_run() -> None:
    with pytest.raises(ValueError, match=r"length=7\): at least one step and one window, of an even length"):
        Recipe(length=7)


@pytest.mark.parametrize("name", PACKAGED)
@torch.no_grad()
def test_packaged_models_are_what_their_cards_say(name: str) -> None:
    """On a little text of the same kind: words are told from letters, and segments are about as long as stated."""
    model = Hourglass.from_folder(name)
    report = json.loads((ASSETS / name / "report.json").read_text())["report"]
    text = (
        "The Congress has before it measures which affect the welfare of the people of the United States. I recommend "
        "that they be considered without delay, and that provision be made for the support of the Government, for "
        "the payment of the public debt, and for the defense of our commerce."
    )
    ids = model.encode(text)[None, :257]
    assert 0 not in ids
    reading = model(ids[:, :-1])
    nats = torch.nn.functional.cross_entropy(reading.logits[0], ids[0, 1:])
    assert float(nats) / math.log(2) < report["bits"] + 0.5
    if reading.boundaries is not None:
        found = 1 / float(reading.boundaries.float().mean())
        assert 0.7 < found / report["shortening"] < 1.4
    assert report["parameters"] == sum(p.numel() for p in model.parameters())
