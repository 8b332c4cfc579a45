"""The language bench on a tiny random Llama: what a row holds, against what a session tells; pairing; resuming."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DynamicCache

import fewer
from evaluation.toys import llama, material, tokenizer
from fewer.compat import cached
from fewer.evaluation import stats
from fewer.evaluation.bench import FILE, Watch, against_random
from fewer.evaluation.language.bench import Settings, load, run
from fewer.evaluation.language.subject import LanguageSubject, LeftOutError
from fewer.evaluation.language.tasks import DEFAULT, TaskError
from fewer.evaluation.record import Journal, Row, Score
from fewer.evaluation.settings import UNREDUCED, cache_methods
from fewer.registry import UnknownMethod
from fewer.studio import report, table
from fewer.studio.verdict import verdict

FORMS = ("random_cache:keep=0.5", "snapkv:keep=0.5", "snapkv:keep=1.0", "adakv:keep=0.25")
SETTINGS = Settings(model="tiny", methods=FORMS, context=700, limit=2, horizon=40, steps=20, tasks=(*DEFAULT, "needle"))


def subject(settings: Settings = SETTINGS) -> LanguageSubject:
    return load(settings, (llama(), tokenizer()), material())


class Log(Watch):
    def __init__(self) -> None:
        self.measured: list[str] = []
        self.resumed: list[str] = []

    def done(self, row: Row, resumed: bool) -> None:
        (self.resumed if resumed else self.measured).append(row.method)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("language")


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[Row]:
    return run(SETTINGS, folder, subject=subject())


def score(row: Row, task: str) -> Score:
    return next(s for s in row.scores if s.task == task)


def test_no_row_failed_and_the_unreduced_model_comes_first(rows: list[Row]) -> None:
    assert [row.error for row in rows] == [""] * 5
    assert [row.method for row in rows] == [UNREDUCED, *FORMS]
    first = rows[0]
    assert (first.agreement, first.difference) == (1, None)
    assert first.kl == pytest.approx(0, abs=1e-9)
    assert first.tokens == np.mean(subject_lengths())
    assert first.writing.kv_end == first.writing.kv_peak == first.writing.kv_full > first.writing.kv_read > 0


def subject_lengths() -> list[int]:
    return [len(context.ids) for context in subject().contexts]


def test_keeping_everything_changes_nothing(rows: list[Row]) -> None:
    row, first = rows[3], rows[0]
    assert row.hits == first.hits
    assert row.agreement == 1
    assert row.writing.sample == first.writing.sample
    assert row.writing.kv_full == first.writing.kv_end
    assert row.writing.kv_end == pytest.approx(first.writing.kv_end, rel=0.02)  # a growing cache holds a few free rows
    for task in ("perplexity", "copy", "needles nats", "qa nats"):
        assert score(row, task).value.value == pytest.approx(score(first, task).value.value, rel=1e-5)
    assert score(row, "perplexity").change.value == pytest.approx(1, abs=1e-5)  # type: ignore[union-attr]
    assert score(row, "qa").change.value == 0  # type: ignore[union-attr]


def test_half_the_rows_are_half_the_bytes_and_other_words(rows: list[Row]) -> None:
    row, first = rows[2], rows[0]
    assert row.counts == pytest.approx([row.tokens] * 3, abs=1e-3)
    assert row.tokens == pytest.approx(0.5 * first.tokens, abs=0.5)
    assert row.writing.kv_read == pytest.approx(0.5 * first.writing.kv_read, rel=0.01)
    assert (
        row.writing.kv_read < row.writing.kv_end <= row.writing.kv_peak < row.writing.kv_full == first.writing.kv_full
    )
    assert row.kl is not None
    assert row.kl > 0
    assert row.agreement < 1  # type: ignore[operator]
    assert row.code == 'fewer.apply(model, "snapkv:keep=0.5")'


def test_a_row_tells_what_asking_by_hand_tells(rows: list[Row]) -> None:
    """The perplexity of the book behind a context whose cache was reduced, without any of the bench's machinery."""
    s, nats, seen = subject(), [], []
    with torch.inference_mode(), fewer.apply(s.model, "snapkv:keep=0.5") as session:
        for context in s.contexts:
            probe = next((p for p in context.probes if p.task == "perplexity"), None)
            cache = DynamicCache(config=s.model.config)  # type: ignore[arg-type]
            out = s.model(torch.tensor([context.ids]), **cached(s.model, cache)).logits[0, -1:]
            seen.append(session.ledger.bytes)
            if probe is not None:
                (answer,) = probe.answers
                more = s.model(torch.tensor([answer]), **cached(s.model, cache)).logits[0, :-1]
                lost = torch.nn.functional.cross_entropy(torch.cat([out, more]), torch.tensor(answer))
                nats.append(lost.item())
    assert score(rows[2], "perplexity").value.value == pytest.approx(float(np.exp(np.mean(nats))), rel=1e-4)
    assert rows[2].writing.kv_read == np.mean(seen)


def test_items_are_paired_with_the_unreduced_models(rows: list[Row]) -> None:
    row, first = rows[1], rows[0]
    hits, base = (stats.unpack_hits(r.hits, r.n) for r in (row, first))
    assert row.n == first.n == sum(p.kind in ("exact", "choice") for c in subject().contexts for p in c.probes)
    assert row.difference == stats.paired_difference(hits, base)
    assert row.accuracy == stats.share(hits)
    assert [depth for depth, _, _ in row.writing.sweep] == sorted({depth for depth, _, _ in row.writing.sweep})
    assert sum(n for _, _, n in row.writing.sweep) == 16 + 2
    rival = against_random(rows[2], rows)
    assert rival == stats.paired_difference(stats.unpack_hits(rows[2].hits, row.n), hits)
    assert against_random(row, rows) is None


def test_clocks_and_passports(rows: list[Row]) -> None:
    for row in rows:
        assert row.writing.first > 0
        assert row.writing.decoding > 0
        assert row.speedup.low <= row.speedup.value <= row.speedup.high  # type: ignore[union-attr]
        assert row.writing.first_ratio.low <= row.writing.first_ratio.value  # type: ignore[union-attr]
        p = row.passport
        assert "question and answer are one pass" in p.what
        assert (p.model, p.unit, p.batch) == ("tiny", "questions", 1)
        assert p.n == sum(len(c.probes) for c in subject().contexts)
        assert row.method == UNREDUCED or 0 <= row.own_time < 1  # type: ignore[operator]


def test_rows_survive_their_file_and_are_not_measured_again(rows: list[Row], folder: Path) -> None:
    assert list(Journal(folder / FILE).rows.values()) == rows
    log = Log()
    again = run(replace(SETTINGS, methods=(*FORMS, "knorm:keep=0.5")), folder, watch=log, subject=subject())
    assert log.resumed == [UNREDUCED, *FORMS]
    assert log.measured == ["knorm:keep=0.5"]
    assert again[-1].difference is not None  # paired although the unreduced row came from the file
    assert len((folder / FILE).read_text().splitlines()) == 6


def test_a_method_that_fails_is_a_row_with_an_error(tmp_path: Path) -> None:
    settings = replace(SETTINGS, methods=("snapkv:tokens=8", "knorm:keep=0.5"), tasks=("perplexity",))
    _, bad, good = run(settings, tmp_path, subject=subject(settings))
    assert "tokens=8 is less than the 32 rows" in bad.error
    assert not good.error
    assert good.accuracy is None
    assert json.loads((tmp_path / FILE).read_text().splitlines()[2])["n"] == 0
    assert verdict([_, good]) == ["Nothing to compare yet."]
    report.write([_, good], tmp_path)


def test_the_model_is_as_it_was(rows: list[Row]) -> None:
    s = subject()
    ids = torch.tensor([s.contexts[0].ids[:50]])
    before = s.model(ids).logits
    with torch.inference_mode(), fewer.apply(s.twin, FORMS[0]):
        s.read(s.twin, s.contexts[0].ids)
    assert torch.equal(s.model(ids).logits, before)
    assert all(a is b for a, b in zip(s.model.parameters(), s.twin.parameters(), strict=True))


def test_the_table_and_the_page_have_the_columns_of_language(rows: list[Row], tmp_path: Path) -> None:
    heads = [c.head for c in table.columns(rows)]
    for head in ("perplexity", "needles", "needle", "qa", "copy", "repetition", "KV peak", "KV end", "first token",
                 "decoding", "agree", "KL", "vs random"):  # fmt: skip
        assert head in heads
    assert not {"GFLOPs", "ceiling", "of it", "peak", "moved"} & set(heads)
    cells = {(c.head or c.unit): c.cell(rows[2]) for c in table.columns(rows)}
    assert cells["KV end"] == f"{rows[2].writing.kv_end / 1e6:.1f}"
    assert cells["rows"] == f"{rows[2].tokens:.0f}"
    page = report.write(rows, tmp_path).read_text()
    for said in ("Where in the context it was found", "What was written", "keys and values once the context is read"):
        assert said in page
    assert "Patches" not in page
    assert page.count("<section") == 4


def test_settings_and_contexts_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="steps=1"):
        Settings(steps=1)
    with pytest.raises(ValueError, match="float13"):
        Settings(dtype="float13")
    with pytest.raises(TaskError, match="was made for 2048 tokens"):
        subject(replace(SETTINGS, context=2000))
    with pytest.raises(UnknownMethod, match="snapkv"):
        run(replace(SETTINGS, methods=("snapkvv",)), tmp_path, subject=subject())


def test_the_default_list_has_every_level_and_its_random_row() -> None:
    forms = cache_methods()
    assert len(forms) == 20
    assert forms[0] == "random_cache:keep=0.5"
    assert "h2o:keep=0.25" in forms
    assert all(fewer.parse(form) for form in forms)


# -- rows that a method leaves out inside a pass ----------------------------------------------------------------------
LAZY = ("lazyllm:keep=0.4", "random:keep=0.4,layers=1", "lazyllm:keep=1.0")


@pytest.fixture(scope="module")
def lazy(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    settings = replace(SETTINGS, methods=LAZY, tasks=("perplexity", "qa"))
    return run(settings, tmp_path_factory.mktemp("lazy"), subject=subject(settings))


def test_scores_are_read_where_the_method_left_rows(lazy: list[Row]) -> None:
    """Against the same stretch of the book, read token by token without any of the bench's machinery."""
    s, nats = subject(replace(SETTINGS, tasks=("perplexity", "qa"))), []
    with torch.inference_mode(), fewer.apply(s.model, LAZY[0]):
        for context in s.contexts:
            for probe in (p for p in context.probes if p.task == "perplexity"):
                cache = DynamicCache(config=s.model.config)  # type: ignore[arg-type]
                behind = s.model(torch.tensor([context.ids]), **cached(s.model, cache)).logits[0, -1]
                for token in probe.answers[0]:
                    nats.append(-behind.log_softmax(-1)[token].item())
                    behind = s.model(torch.tensor([[token]]), **cached(s.model, cache)).logits[0, -1]
    row = lazy[1]
    assert not row.error
    found = score(row, "perplexity").value.value
    assert found == pytest.approx(float(np.exp(np.mean(nats))), rel=0.02)  # spans of words weigh alike there
    assert found < 1.3 * score(lazy[0], "perplexity").value.value
    assert any("token by token" in note for note in row.notes)
    assert not any("token by token" in note for note in [*lazy[0].notes, *lazy[3].notes])
    assert score(lazy[3], "perplexity").value.value == pytest.approx(score(lazy[0], "perplexity").value.value, rel=1e-5)


def test_a_score_at_a_row_that_was_left_out_is_an_error() -> None:
    s = subject()
    ids = s.contexts[0].ids
    with torch.inference_mode(), fewer.apply(s.twin, LAZY[0]) as session:
        cache, _ = s.read(s.twin, ids[:60])
        with pytest.raises(LeftOutError, match="of the last 30 rows were left out"):
            s.go_on(s.twin, cache, ids[60:100], 30, session)
        assert s.go_on(s.twin, cache, ids[100:140], 1, session).shape == (1, 260)  # the last one always stays
    with torch.inference_mode(), fewer.apply(s.twin, "snapkv:keep=0.5") as session:
        cache, _ = s.read(s.twin, ids[:60])
        assert s.go_on(s.twin, cache, ids[60:100], 30, session).shape == (30, 260)  # rows leave behind the pass


def test_a_perplexity_worse_than_an_even_guess_is_called_a_fault(tmp_path: Path, rows: list[Row]) -> None:
    settings = replace(SETTINGS, methods=(), tasks=("perplexity",))
    s = subject(settings)
    with torch.no_grad():
        s.model.lm_head.weight.mul_(40)  # sure of itself, and wrong
    (row,) = run(replace(settings, methods=("knorm:keep=0.9",)), tmp_path, subject=s)[:1]
    assert row.notes[0].startswith("fault: perplexity ")
    assert "above the 260 of an even guess" in row.notes[0]
    assert "!" in table.marks(row, [row])
    assert not any(table.FAULTY in table.marks(r, rows) for r in rows if not r.notes)
