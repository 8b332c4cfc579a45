"""The main job on a tiny model and 24 images: what a row holds, what is resumed, what goes wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fewer
from fewer import hosts
from fewer.datasets.images import DataError, ImageSet
from fewer.evaluation import bench, stats
from fewer.evaluation.bench import Settings, Watch, against_random, run
from fewer.evaluation.record import Journal, JournalError, Row
from fewer.evaluation.settings import UNREDUCED, default_methods, split_forms
from fewer.evaluation.subject import Subject, SubjectError
from fewer.models.zoo import Processor
from fewer.registry import UnknownMethod
from fewer.testing.models import tiny_vit

SETTINGS = Settings(batch=8, repeats=3)
FORMS = ("random:keep=0.5,layers=1", "tome:r=2", "tome:r=0", "evit:layers=1+2")


def pictures(count: int = 24, classes: int = 7) -> ImageSet:
    rng = np.random.default_rng(0)
    labels = torch.arange(count) % classes
    return ImageSet(
        "noise", labels, tuple(map(str, range(classes))), rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
    )


def subject(kind: str = "vit", **changes: object) -> Subject:
    processor = Processor((32, 32), (0.5,) * 3, (0.5,) * 3)
    return Subject(tiny_vit(kind), processor, pictures(), "tiny", batch=8, **changes)  # type: ignore[arg-type]


class Log(Watch):
    def __init__(self) -> None:
        self.measured: list[str] = []
        self.resumed: list[str] = []
        self.batches = 0

    def batch(self) -> None:
        self.batches += 1

    def done(self, row: Row, resumed: bool) -> None:
        (self.resumed if resumed else self.measured).append(row.method)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    return run(replace(SETTINGS, methods=FORMS), tmp_path_factory.mktemp("bench"), subject=subject())


def by_method(rows: list[Row]) -> dict[str, Row]:
    return {row.method: row for row in rows}


def test_the_unreduced_model_comes_first_and_differs_in_nothing(rows: list[Row]) -> None:
    first = rows[0]
    assert first.method == UNREDUCED
    assert [row.method for row in rows[1:]] == list(FORMS)
    assert (first.agreement, first.kl, first.cost.ceiling, first.tokens, first.final) == (1, 0, 1, 17, 17)
    assert first.difference is None
    assert first.speedup is not None


def test_removing_nothing_changes_nothing(rows: list[Row]) -> None:
    row, first = by_method(rows)["tome:r=0"], rows[0]
    assert (row.agreement, row.hits, row.cost.gflops) == (1, first.hits, first.cost.gflops)
    assert row.kl == pytest.approx(0, abs=1e-12)
    assert row.difference is not None
    assert row.difference.value == 0
    assert row.difference.low < 0 < row.difference.high


def test_a_row_tells_what_a_session_tells(rows: list[Row]) -> None:
    row, s = by_method(rows)["tome:r=2"], subject()
    answers = []
    with fewer.apply(s.model, "tome:r=2") as session, torch.inference_mode():
        for _, pixels in s:
            answers.append(s.model(pixels).logits)
        ledger, counts = session.ledger, session.counts
    assert row.counts == counts
    assert (row.tokens, row.cost.gflops, row.cost.ceiling) == pytest.approx(
        (ledger.mean_tokens, ledger.gflops, ledger.ceiling)
    )
    hits = (torch.cat(answers).argmax(-1) == s.data.labels).numpy()
    assert stats.unpack_hits(row.hits, 24).tolist() == hits.tolist()
    assert row.accuracy == stats.share(hits)
    assert row.code == 'fewer.apply(model, "tome:r=2")'


def test_every_number_has_its_passport(rows: list[Row]) -> None:
    for row in rows:
        p = row.passport
        assert (p.model, p.data, p.n, p.repeats, p.batch, p.device) == ("tiny", "noise", 24, 3, 8, "cpu")
        assert set(p.versions) == {"fewer", "torch", "transformers", "python"}
        assert p.commit
        assert p.hardware
        assert row.cost.peak > 0
        assert row.milliseconds > 0
        assert row.achieved == pytest.approx(row.speedup.value / row.cost.ceiling)  # type: ignore[union-attr]
        assert row.speedup.low <= row.speedup.value <= row.speedup.high  # type: ignore[union-attr]
        assert row.method == UNREDUCED or 0 <= row.own_time < 1  # type: ignore[operator]


def test_rows_survive_their_file(rows: list[Row], tmp_path: Path) -> None:
    journal = Journal(tmp_path / "results.jsonl")
    for row in rows:
        journal.add(row)
    assert list(Journal(journal.path).rows.values()) == rows


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    s, settings = subject(), replace(SETTINGS, methods=FORMS[:1])
    run(settings, tmp_path, subject=s)
    file = tmp_path / bench.FILE
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"key": "torn')
    log = Log()
    rows = run(replace(settings, methods=FORMS[:2]), tmp_path, watch=log, subject=s)
    assert (log.resumed, log.measured) == ([UNREDUCED, FORMS[0]], [FORMS[1]])
    assert log.batches == s.batches
    assert file.read_bytes().startswith(whole)
    assert [json.loads(line)["method"] for line in file.read_text().splitlines()] == [row.method for row in rows]


@pytest.mark.parametrize("change", [{"repeats": 4}, {"seed": 1}, {"execution": "padded"}])
def test_other_settings_are_measured_again(tmp_path: Path, change: dict[str, object]) -> None:
    s, log = subject(), Log()
    run(replace(SETTINGS, methods=FORMS[:1]), tmp_path, subject=s)
    run(replace(SETTINGS, methods=FORMS[:1], **change), tmp_path, watch=log, subject=s)  # type: ignore[arg-type]
    assert log.resumed == []


def test_a_file_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / bench.FILE
    file.write_text('{"some": "thing"}\n')
    with pytest.raises(JournalError, match=r"line 1 is not a result.*another --out"):
        run(replace(SETTINGS, methods=FORMS[:1]), tmp_path, subject=subject())
    assert file.read_text() == '{"some": "thing"}\n'


def test_a_method_that_fails_does_not_stop_the_others_and_is_tried_again(tmp_path: Path) -> None:
    settings, log = replace(SETTINGS, methods=("evit:layers=9", "tome:r=1")), Log()
    s = subject()
    _, bad, good = run(settings, tmp_path, subject=s)
    assert "the model has 4 blocks" in bad.error
    assert not good.error
    run(settings, tmp_path, watch=log, subject=s)
    assert log.measured == ["evit:layers=9"]


def test_the_model_is_as_it_was(tmp_path: Path) -> None:
    s = subject()
    before = s.model(s.pixels(0)).logits
    run(replace(SETTINGS, methods=FORMS), tmp_path, subject=s)
    assert torch.equal(s.model(s.pixels(0)).logits, before)
    assert all("forward" not in block.__dict__ for block in (*s.host.blocks, *s.twin_host.blocks))
    assert all(a is b for a, b in zip(s.model.parameters(), s.twin.parameters(), strict=True))


def test_unknown_methods_are_told_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(UnknownMethod, match="did you mean tome"):
        run(replace(SETTINGS, methods=("tome:r=1", "tomee")), tmp_path, subject=subject())
    assert not (tmp_path / bench.FILE).exists()


def test_untrained_modules_are_marked(tmp_path: Path) -> None:
    row = run(replace(SETTINGS, methods=("dynamicvit:layers=1",)), tmp_path, subject=subject())[1]
    assert row.trained == "untrained"
    assert row.code == 'fewer.apply(model, "dynamicvit:layers=1", modules="untrained")'


def test_answers_that_are_not_finite_are_wrong(tmp_path: Path) -> None:
    s = subject()
    with torch.no_grad():
        s.model.classifier.bias[2] = float("nan")  # type: ignore[union-attr, index, operator]
    row = run(replace(SETTINGS, methods=FORMS[:1]), tmp_path, subject=s)[0]
    assert row.accuracy is not None
    assert row.accuracy.value == 0
    assert row.kl is None
    assert any("not finite" in note for note in row.notes)


def test_models_without_a_head_are_scored_by_neighbours(tmp_path: Path) -> None:
    s = subject("dinov2", layer=2)
    first, reduced = run(replace(SETTINGS, methods=("tome:r=2",), layer=2), tmp_path, subject=s)
    assert first.score == "3-NN accuracy"
    assert first.movement == pytest.approx(0, abs=1e-7)
    assert reduced.movement is not None
    assert reduced.movement > 1e-4
    assert (first.kl, first.agreement) == (None, None)


def test_samples_with_different_counts_report_their_means(tmp_path: Path) -> None:
    row = run(replace(SETTINGS, methods=("evit:mass=0.7,fuse=false,layers=1",)), tmp_path, subject=subject())[1]
    assert row.counts[0] == 17
    assert 1 < row.counts[1] < 17
    assert row.counts[1] == row.final
    assert row.cost.ceiling > 1


def test_methods_are_set_to_a_number_of_tokens(tmp_path: Path) -> None:
    forms = ("tome:r=1", "evit:layers=1,keep=0.9")
    rows = run(replace(SETTINGS, methods=forms, tokens=12.0), tmp_path, subject=subject())
    assert [row.tokens for row in rows[1:]] == pytest.approx([12, 12], abs=1)


def test_against_random_pairs_rows_with_the_same_tokens(rows: list[Row]) -> None:
    base = by_method(rows)[FORMS[0]]
    rival = replace(base, method="tome:r=2", hits=stats.pack_hits(np.zeros(24, bool)))
    found = against_random(rival, [*rows, rival])
    assert found is not None
    assert found.value == -stats.unpack_hits(base.hits, 24).mean()
    assert against_random(replace(rival, tokens=base.tokens * 1.2), rows) is None
    assert against_random(base, rows) is None
    assert against_random(rows[0], rows) is None


def test_the_draw_is_balanced_and_repeats() -> None:
    data = pictures(70)
    one, two = bench.draw(data, 14, seed=3), bench.draw(data, 14, seed=3)
    assert torch.equal(one.labels, two.labels)
    assert one.labels.bincount().tolist() == [2] * 7
    assert len(bench.draw(data, 15, seed=0)) == 15
    assert bench.draw(data, 0, seed=0) is data


def test_the_default_list_fits_other_models() -> None:
    host = hosts.find(tiny_vit(depth=6, image=56, patch=8))  # 49 patches, half the blocks
    forms = default_methods(host)
    assert "tome:r=6" in forms  # 11 * 12 / 6 * 49 / 196 = 5.5, to even
    assert forms[0] == "random:keep=0.7"
    assert all(fewer.parse(form) for form in forms)


def test_forms_are_split_at_semicolons() -> None:
    assert split_forms(["a:x=1,y=2;b", " c "]) == ["a:x=1,y=2", "b", "c"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 0}, "batch=0"), ({"repeats": 0}, "repeats=0"), ({"dtype": "float13"}, "float13"),
        ({"limit": -1}, "limit=-1"), ({"dtype": "int64"}, "dtype='int64': give float32, bfloat16 or float16"),
        ({"device": "blah"}, "device='blah': give cpu, cuda"), ({"device": "meta"}, "device='meta'"),
        ({"threads": -1}, "threads=-1"), ({"execution": "loose"}, "execution='loose'"),
    ],
)  # fmt: skip
def test_settings_are_checked(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**change)  # type: ignore[arg-type]


def test_subjects_are_checked() -> None:
    with pytest.raises(SubjectError, match="layer=9: the model has blocks 0 to 3"):
        subject(layer=9)
    with pytest.raises(SubjectError, match="no images"):
        Subject(tiny_vit(), lambda x: x, pictures(0))


# -- labels and pictures ----------------------------------------------------------------------------------------------
NAMED = ("tench, Tinca tinca", "Sea_Lion", "crane", "maple leaf, crane", "e", "f", "g")
KEEP = tuple(range(7))


def named(*names: str) -> tuple[Any, ImageSet]:
    """A model whose classes are `NAMED`, and a picture of each of some others."""
    model: Any = tiny_vit()
    model.config.id2label = dict(enumerate(NAMED))
    data = ImageSet("photos", torch.arange(len(names)), names, np.zeros((len(names), 32, 32, 3), np.uint8))
    return model, data


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (NAMED, KEEP), (tuple(reversed(NAMED)), tuple(reversed(KEEP))), (("g", "sea-lion", "Tinca tinca"), (6, 1, 0)),
        (("crane", "maple leaf"), (2, 3)), (("0", "1", "5"), (0, 1, 5)), (("10", "2"), None),
    ],
)  # fmt: skip
def test_labels_are_matched_by_name(names: tuple[str, ...], labels: tuple[int, ...] | None) -> None:
    data, told = bench.labelled(*reversed(named(*names)))
    if labels is None:
        assert "the model's 7 classes are not the 2 of photos" in told[0]
        assert data.classes == names
        return
    assert tuple(data.labels.tolist()) == labels
    assert data.classes == NAMED
    assert told == []


def test_labels_by_order_are_said_and_halves_are_refused() -> None:
    data, told = bench.labelled(*reversed(named(*"tuvwxyz")))
    assert data.labels.tolist() == list(KEEP)
    assert told[0].startswith("labels by order: class k of photos is taken for the model's class k")
    with pytest.raises(DataError, match=r"of its 7 classes, h, i are none of the model's .*id2label"):
        bench.labelled(*reversed(named("crane", "e", "f", "g", "h", "i", "tench")))


def test_heads_that_do_not_say_what_their_classes_are() -> None:
    """timm's, and those of models without a head."""

    class Head(torch.nn.Module):
        num_classes = 7

    _, data = named(*"tuvwxyz")
    found, told = bench.labelled(data, Head())
    assert found is data
    assert "labels by order" in told[0]
    Head.pretrained_cfg = {"label_names": tuple("zyxwvut")}  # type: ignore[attr-defined]
    assert bench.labelled(data, Head())[0].labels.tolist() == list(reversed(KEEP))
    assert bench.labelled(data, torch.nn.Linear(1, 1)) == (data, [])


def test_a_model_that_is_right_by_name_scores_so(tmp_path: Path) -> None:
    """Folders in another order than the model's classes, pictures of which one cannot be read."""
    model: Any = tiny_vit()
    model.config.id2label = {k: "gfedcba"[k] for k in range(7)}
    rng, processor = np.random.default_rng(0), Processor((32, 32), (0.5,) * 3, (0.5,) * 3)
    with torch.no_grad():
        for i in range(21):
            image = Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8))
            folder = tmp_path / "gfedcba"[int(model(processor([image])).logits.argmax())]
            folder.mkdir(exist_ok=True)
            image.save(folder / f"{i}.png")
    (folder / "._a.jpg").write_bytes(b"Mac OS X")
    settings = replace(SETTINGS, model="tiny", data=str(tmp_path), methods=FORMS[1:2])
    s = bench.load(settings, (model, processor))
    rows = run(settings, tmp_path / "out", subject=s)
    assert rows[0].score == "accuracy"
    assert rows[0].accuracy.value == 1  # type: ignore[union-attr]
    assert rows[0].n == 21
    assert rows[0].passport.notes == [
        f"1 of 22 pictures could not be read and were left out: {folder.name}/._a.jpg"
    ]  # fmt: skip
    assert rows[1].passport.notes == rows[0].passport.notes


def test_rows_of_other_settings_are_said(tmp_path: Path) -> None:
    s, said = subject(), []

    class Listening(Log):
        def note(self, line: str) -> None:
            said.append(line)

    run(replace(SETTINGS, methods=FORMS[:1]), tmp_path, subject=s, watch=Listening())
    assert said == []
    run(replace(SETTINGS, methods=FORMS[:1], seed=3), tmp_path, subject=s, watch=Listening())
    assert "2 rows of these methods" in said[0]
    assert "measured anew" in said[0]


def test_the_telling_list_is_a_short_one_with_its_random_rows() -> None:
    host = hosts.find(tiny_vit(depth=6, image=56, patch=8))
    short, whole = default_methods(host, all=False), default_methods(host)
    assert 8 <= len(short) <= 11
    assert set(short) < set(whole)
    assert sum(form.startswith("random") for form in short) == 2
