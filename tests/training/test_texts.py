"""The recipe that trains text classifiers, on words small enough for a test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fewer.datasets.texts import Encoded, TextSet, load
from fewer.models.zoo import load_model
from fewer.recipes import texts as recipe
from fewer.recipes.texts import Recipe, train, vocabulary

WORDS = ["the", "of", "and", "a", "to", "in", "that", "is", "it", "was", "with", "for", "on", "as", "by", "at", "from"]
TINY = Recipe(
    phases=((0.5, 8), (0.5, 16)), steps=30, tokens=256, width=32, depth=2, heads=2, length=16, vocabulary=60,
    bfloat16=False, half=False, dropout=0.0, mask=0.0, threads=1, lr=1e-2, lr_rest=1e-2,
)  # fmt: skip


def words(count: int, seed: int, length: int = 40) -> TextSet:
    """Stop words, every third one "north" or "south", which is the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    drawn = torch.randint(len(WORDS), (count, length), generator=generator).tolist()
    lines = []
    for row, label in zip(drawn, labels.tolist(), strict=True):
        said = [("north", "south")[label] if i % 3 == 1 else WORDS[j] for i, j in enumerate(row)]
        lines.append(" ".join(said))
    return TextSet("words", tuple(lines), labels, ("north", "south"))


def test_new_model_learns_and_comes_back(tmp_path: Path) -> None:
    lines: list[str] = []
    report = train(tmp_path, recipe=TINY, data=(words(64, 0), words(20, 1, 10)), log=lines.append)
    assert report.accuracy == 1.0
    assert report.test_texts == 20
    assert "window 11.2" in lines[0]  # the mean: 8, and 16 in the second half of the steps
    kept = json.loads((tmp_path / "report.json").read_text())
    assert kept["recipe"]["width"] == 32
    model, tokenizer = load_model(tmp_path)
    assert type(model).__name__ == "BertForSequenceClassification"
    assert model.config.id2label == {0: "north", 1: "south"}
    assert tokenizer.model_max_length == 16
    assert len(tokenizer("north " * 40)["input_ids"]) == 42  # the folder does not remember how the tests cut
    data = Encoded.of(words(20, 1, 10), tokenizer, length=16)
    assert recipe.accuracy(model, data) == report.accuracy


def test_pretrained_encoder_is_kept_and_fine_tuned(tmp_path: Path) -> None:
    train(tmp_path / "base", recipe=TINY, steps=4, data=(words(32, 0), words(8, 1, 10)), log=lambda _: None)
    base, _ = load_model(tmp_path / "base")
    tuning = Recipe(
        base=str(tmp_path / "base"), phases=((1.0, 16),), steps=1, tokens=64, length=16, lr_base=1e-9, lr_rest=1e-2,
        weight_decay=0.0, bfloat16=False, half=False, threads=1,
    )  # fmt: skip
    train(tmp_path / "tuned", recipe=tuning, data=(words(32, 2), words(8, 3, 10)), log=lambda _: None)
    tuned, _ = load_model(tmp_path / "tuned")
    for name, before in base.bert.state_dict().items():
        torch.testing.assert_close(tuned.bert.state_dict()[name], before, rtol=0, atol=1e-6)
    assert not torch.equal(tuned.classifier.weight, base.classifier.weight)


def test_windows_cover_a_text_from_anywhere_and_short_ones_come_whole() -> None:
    torch.manual_seed(0)
    starts = {tuple(recipe._cuts(10, 4, True)) for _ in range(60)}
    assert starts == {(0, 4), (1, 5), (2, 6), (3,)}  # ten tokens: two whole windows, or one
    assert list(recipe._cuts(4, 4, True)) == list(recipe._cuts(3, 4, True)) == [0]
    assert list(recipe._cuts(10, 4, False)) == [0]


def test_masking_spares_the_class_token_and_the_padding() -> None:
    torch.manual_seed(0)
    data = words(8, 0, 6)
    tokenizer = vocabulary(data.texts, 60)
    ids = tokenizer(list(data.texts), add_special_tokens=False)["input_ids"]
    ids[0] = ids[0][:2]
    whole = Recipe(phases=((1.0, 16),), tokens=128, length=16, mask=1.0)
    batch = next(recipe._batches(ids, data.labels, tokenizer, 16, whole))
    real = batch["attention_mask"].bool()
    assert (batch["input_ids"][:, 0] == tokenizer.cls_token_id).all()
    assert (batch["input_ids"][:, 1:][real[:, 1:]] == tokenizer.mask_token_id).all()
    assert (batch["input_ids"][~real] == tokenizer.pad_token_id).all()
    assert real.sum(1).min() == 4


def test_padding_does_not_change_answers_while_training() -> None:
    data = words(4, 0, 6)
    tokenizer = vocabulary(data.texts, 60)
    model = recipe.build(TINY, data.classes, tokenizer).eval()
    torch.nn.init.normal_(model.classifier.weight)
    model.set_attn_implementation(recipe.FLOAT32_ATTENTION)
    encoded = Encoded.of(data, tokenizer, length=16)
    short = Encoded([encoded.rows[0][:4], encoded.rows[1]], encoded.labels[:2], encoded.pad)
    with torch.no_grad():
        both, alone = (model(**{k: v for k, v in short.batch(which).items() if k != "labels"}).logits
                       for which in ([0, 1], [0]))  # fmt: skip
    torch.testing.assert_close(both[:1], alone)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"phases": ((0.5, 8), (0.4, 16))}, "add up to 1"),
        ({"phases": ((1.0, 512),)}, "3 to length=256"),
        ({"tokens": 100}, "one whole window"),
        ({"steps": 0}, "at least one step"),
    ],
)
def test_recipe_says_what_it_cannot_do(changes: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Recipe(**changes)


def test_encoded_batches() -> None:
    data = Encoded([torch.tensor([2, 5, 3]), torch.tensor([2, 3]), torch.tensor([2, 7, 8, 3])], torch.tensor([0, 1, 1]))
    batch = data.batch([1, 2])
    assert batch["input_ids"].tolist() == [[2, 3, 0, 0], [2, 7, 8, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [1, 1]
    assert data.batches(2) == [[2, 0], [1]]
    ordered = data.by_length()
    assert [len(row) for row in ordered.rows] == [4, 3, 2]
    assert ordered.labels.tolist() == [1, 0, 1]
    assert len(data.batch()["labels"]) == 3


def test_packaged_encoder_knows_its_passages() -> None:
    model, tokenizer = load_model("bert-eras")
    passages = load("embedded")
    assert (len(passages), passages.classes[0], passages.classes[-1]) == (1000, "1790-1819", "2000-2029")
    assert passages.classes == tuple(model.config.id2label.values())
    assert next(model.parameters()).dtype == torch.float32
    data = Encoded.of(passages.sample(100), tokenizer)
    assert 0.6 < recipe.accuracy(model, data) < 0.9  # 75.4 % of all
