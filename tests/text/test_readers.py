"""Readers: the surprisal of every token is what a plain forward over exactly the tokens in front of it says."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from decoders import COMMON, VOCAB, decoder
from fewer.core.errors import SignalError
from fewer.core.written import BEFORE, BEHIND
from fewer.runtime import reading
from fewer.runtime.reading import LanguageReader, WordReader

CLOSE: dict[str, Any] = {"atol": 2e-4, "rtol": 2e-4}


def _mamba() -> nn.Module:
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(
        MambaConfig(vocab_size=VOCAB, hidden_size=32, state_size=4, num_hidden_layers=2, initializer_range=0.25)
    )


def _bloom() -> nn.Module:
    from transformers import BloomConfig, BloomForCausalLM

    return BloomForCausalLM(
        BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.25, pad_token_id=0)
    )


def _opt() -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    return OPTForCausalLM(
        OPTConfig(vocab_size=VOCAB, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
                  word_embed_proj_dim=32, max_position_embeddings=256, init_std=0.25, pad_token_id=0)
    )  # fmt: skip


def _jamba() -> nn.Module:
    """Layers of two kinds: some keep a state."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    return Lfm2ForCausalLM(Lfm2Config(**COMMON, layer_types=["conv", "full_attention", "conv"]))


OTHERS = {"mamba": _mamba, "bloom": _bloom, "opt": _opt, "conv": _jamba}
MODELS = ["llama", "qwen3", "gpt2", "mistral-sliding", "gemma3", *OTHERS]


@cache
def model(name: str) -> nn.Module:
    if name not in OTHERS:
        return decoder(name)
    torch.manual_seed(3)
    return OTHERS[name]().eval()


def nats(net: Any, front: Sequence[int], ids: Sequence[int]) -> list[float]:
    """Slow: of each of `ids` behind `front`, from one plain forward; NaN for a token with nothing before it."""
    row = [*front, *ids]
    with torch.no_grad():
        p = net(input_ids=torch.tensor([row])).logits[0].double().log_softmax(-1)
    return [-float(p[i - 1, row[i]]) if i else float("nan") for i in range(len(front), len(row))]


def first(values: list[float]) -> Tensor:
    """A first token without anything in front of it is as surprising as the others are on average."""
    known = torch.tensor(values)
    return torch.where(known.isnan(), known.nanmean(), known)


def texts(*lengths: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (len(lengths), max(lengths)), generator=draw)
    return ids, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def reader(name: str, ids: Tensor, valid: Tensor, **more: Any) -> LanguageReader:
    return LanguageReader(model(name), ids, valid, torch.zeros_like(ids), **more)


# -- whole texts -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("start", [(), (1,), (1, 5)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_surprisal_is_that_of_a_plain_forward(name: str, start: tuple[int, ...], monkeypatch: Any) -> None:
    monkeypatch.setattr(reading, "CHUNK", 8)
    ids, valid = texts(21, 5, 16)
    got = reader(name, ids, valid, start=start).surprisal
    assert got.dtype is torch.float32
    for i, n in enumerate((21, 5, 16)):
        want = torch.tensor(nats(model(name), start, ids[i, :n].tolist()))
        if not start:
            assert_close(got[i, 0], want[1 : min(8, n)].mean(), **CLOSE)  # of those read with it
        assert_close(got[i, 1:n], want[1:], **CLOSE)
        assert got[i, n:].isnan().all()


@pytest.mark.parametrize("name", MODELS)
def test_asked_is_the_same_behind_the_question(name: str) -> None:
    ids, valid = texts(12, 7)
    questions = [[7, 8, 9], [11]]
    got = reader(name, ids, valid, question=questions, joint=[4], start=[1]).asked
    for i, n in enumerate((12, 7)):
        assert_close(got[i, :n], torch.tensor(nats(model(name), [1, *questions[i], 4], ids[i, :n].tolist())), **CLOSE)


@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_relevance_is_minus_the_mean_surprisal_of_the_question(name: str) -> None:
    ids, valid = texts(14, 9)
    part = torch.tensor([[BEFORE] * 2 + [0] * 5 + [1] * 3 + [2] * 2 + [BEHIND] * 2, [0] * 4 + [1] * 5 + [BEHIND] * 5])
    questions = [[7, 8, 9], [11, 12]]
    got = LanguageReader(model(name), ids, valid, part, questions, promise=[30, 31], start=[1]).relevance
    assert got.shape == (2, 3)
    assert bool(got[1, 2].isnan())  # the second text has two parts
    for row, document in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]:
        mine = ids[row, (part[row] == document) & valid[row]].tolist()
        want = -torch.tensor(nats(model(name), [1, *mine], [*questions[row], 30, 31])).mean()
        assert_close(got[row, document], want, **CLOSE)


@pytest.mark.parametrize("name", ["llama", "bloom", "mamba"])
def test_apart_every_group_begins_anew(name: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(reading, "ROWS", 12)  # in several passes
    ids, valid = texts(15, 6)
    group = torch.tensor([[0] * 4 + [3] + [4] * 7 + [9] * 3, [0] * 2 + [1] * 13])
    for start in ((), (2,)):
        got = reader(name, ids, valid, start=start).apart(group)
        for row, a, b in [(0, 0, 4), (0, 4, 5), (0, 5, 12), (0, 12, 15), (1, 0, 2), (1, 2, 6)]:
            want = first(nats(model(name), start, ids[row, a:b].tolist())).nan_to_num(0.0)
            assert_close(got[row, a:b], want, **CLOSE)
        assert got[1, 6:].isnan().all()


# -- walks -------------------------------------------------------------------------------------------------------------
def walked(name: str, ids: Tensor, valid: Tensor, cuts: Tensor, stays: Tensor, **more: Any) -> Tensor:
    """(B, N): what a walk says that reads the runs of `cuts` in turn and keeps `stays` of each."""
    asked = "question" in more
    place = more.pop("place", None)
    walk = reader(name, ids, valid, **more).walk(place, asked=asked)
    found = torch.full(ids.shape, float("nan"))
    for turn in range(int(cuts.max()) + 1):
        these = (cuts == turn) & valid
        got = walk.read(these)
        assert bool((got.isnan() == ~these).all())
        found = torch.where(these, got, found)
        walk.keep(stays & these)
    return found


def slow(name: str, ids: Tensor, valid: Tensor, cuts: Tensor, stays: Tensor, fronts: Sequence[Sequence[int]],
         place: Tensor | None = None) -> Tensor:  # fmt: skip
    """The same by plain forwards: of each run, over what stayed before and all of it."""
    found = torch.full(ids.shape, float("nan"))
    for row in range(len(ids)):
        kept = list(fronts[row])
        for turn in range(int(cuts.max()) + 1):
            mine = [i for i in range(ids.shape[1]) if valid[row, i] and cuts[row, i] == turn]
            if place is not None:
                mine.sort(key=lambda i: int(place[row, i]))
            if mine:
                found[row, mine] = first(nats(model(name), kept, ids[row, mine].tolist()))
            kept += [int(ids[row, i]) for i in mine if stays[row, i]]
    return found


@pytest.mark.parametrize("name", MODELS)
def test_a_walk_reads_behind_what_stays_alone(name: str) -> None:
    ids, valid = texts(33, 20, 29, seed=1)
    cuts = torch.stack([torch.arange(33) // 9, torch.arange(33) // 7, torch.arange(33) // 12])
    stays = torch.rand(3, 33, generator=torch.Generator().manual_seed(5)) < 0.5
    fronts = [[1]] * 3
    got = walked(name, ids, valid, cuts, stays, start=[1])
    assert_close(got, slow(name, ids, valid, cuts, stays, fronts), equal_nan=True, **CLOSE)


@pytest.mark.parametrize("name", ["llama", "mamba", "gemma3"])
def test_a_walk_behind_a_question_in_another_order(name: str) -> None:
    ids, valid = texts(24, 18, seed=2)
    place = torch.tensor([[1] * 8 + [2] * 8 + [0] * 8, [0] * 5 + [-1] * 19])
    order = place.argsort(dim=-1, stable=True)
    rank = order.argsort(-1)
    cuts, stays = rank // 6, torch.rand(2, 24, generator=torch.Generator().manual_seed(6)) < 0.6
    questions = [[7, 8, 9], [11]]
    got = walked(name, ids, valid, cuts, stays, question=questions, joint=[4], place=place)
    want = slow(name, ids, valid, cuts, stays, [[*q, 4] for q in questions], rank)
    assert_close(got, want, equal_nan=True, **CLOSE)


@given(data=st.data())
def test_any_walk_is_right(data: st.DataObject) -> None:
    """Empty runs, all gone, all there, texts that end early, tokens that are never read: drawn at random."""
    b, n = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 18))
    lengths = [n, *(data.draw(st.integers(1, n)) for _ in range(b - 1))]
    ids, valid = texts(*lengths, seed=data.draw(st.integers(0, 99)))
    cuts = torch.tensor([sorted(data.draw(st.lists(st.integers(0, 4), min_size=n, max_size=n))) for _ in range(b)])
    cuts[torch.tensor([[data.draw(st.integers(0, 9)) == 0 for _ in range(n)] for _ in range(b)])] = -1
    share = data.draw(st.sampled_from([0.0, 0.3, 0.8, 1.0]))
    stays = torch.rand(b, n, generator=torch.Generator().manual_seed(n)) < share
    got = walked("llama", ids, valid & (cuts >= 0), cuts, stays, start=[1])
    want = slow("llama", ids, valid, cuts, stays, [[1]] * b)
    assert_close(got, want, equal_nan=True, **CLOSE)


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_changes_nobody(name: str) -> None:
    ids, valid = texts(26, 9, 17, seed=4)
    cuts = torch.arange(26).expand(3, -1) // 8
    stays = torch.rand(3, 26, generator=torch.Generator().manual_seed(8)) < 0.5
    together = walked(name, ids, valid, cuts, stays)
    for i in range(3):
        alone = walked(name, ids[i : i + 1], valid[i : i + 1], cuts[i : i + 1], stays[i : i + 1])
        assert_close(together[i : i + 1], alone, equal_nan=True, atol=2e-5, rtol=1e-4)


class Counted:
    """How many rows a model was given, and how many of them with logits."""

    def __init__(self, net: nn.Module) -> None:
        self.rows: list[int] = []
        self.handle = net.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, _net: nn.Module, _args: Any, given: dict[str, Any]) -> None:
        self.rows.append(given["input_ids"].shape[1])


def test_what_nothing_has_left_in_front_of_is_read_once() -> None:
    ids, valid = texts(40)
    watch = Counted(model("llama"))
    try:
        walk = reader("llama", ids, valid).walk()
        cuts = (torch.arange(40) // 10)[None]
        stays = torch.ones_like(valid)
        for turn in range(4):
            walk.read(cuts == turn)
            stays[0, 25] = False
            walk.keep(stays & (cuts == turn))
        # of a run of which all stay its last token is read again, for its logits; behind a token that left, all are
        assert watch.rows == [10, 11, 11, 14]
    finally:
        watch.handle.remove()


def test_reading_leaves_no_trace_in_the_model() -> None:
    net = model("llama")
    net.train()
    try:
        ids, valid = texts(9)
        value = reader("llama", ids, valid).surprisal
        assert not value.requires_grad
        assert all(p.grad is None for p in net.parameters())
    finally:
        net.eval()


# -- windows -----------------------------------------------------------------------------------------------------------
def test_a_window_that_slides_holds_the_first_and_the_latest(monkeypatch: Any) -> None:
    """The reference keeps the list of tokens in sight by hand and reads them anew for every run."""
    monkeypatch.setattr(reading, "FIRST", 3)
    window, segment = 20, 6
    ids, valid = texts(64, 31, seed=9)
    cuts = torch.arange(64).expand(2, -1) // segment
    stays = torch.rand(2, 64, generator=torch.Generator().manual_seed(1)) < 0.7
    got = walked("llama", ids, valid, cuts, stays, start=[1], window=window)
    alone = walked("llama", ids[:1], valid[:1], cuts[:1], stays[:1], start=[1], window=window)
    assert_close(got[:1], alone, equal_nan=True, **CLOSE)
    kept = [1]
    for turn in range(11):
        mine = [i for i in range(64) if cuts[0, i] == turn]
        if len(kept) + len(mine) > window:
            room = (window - len(mine)) // 2
            kept = kept[:4] + kept[len(kept) - (room - 4) :]  # the start and FIRST of the text
        assert_close(alone[0, mine], torch.tensor(nats(model("llama"), kept, ids[0, mine].tolist())), **CLOSE)
        kept += [int(ids[0, i]) for i in mine if stays[0, i]]
    assert len(kept) > 10


def test_no_pass_is_longer_than_the_window() -> None:
    ids, valid = texts(90)
    lengths = []
    handle = model("llama").model.register_forward_hook(
        lambda _m, _a, out: lengths.append(out.past_key_values.get_seq_length())
    )
    try:
        walked("llama", ids, valid, (torch.arange(90) // 10)[None], torch.ones_like(valid), window=32)
    finally:
        handle.remove()
    assert max(lengths) <= 32
    assert lengths[-1] > 10


def test_a_segment_as_long_as_the_window_is_refused() -> None:
    ids, valid = texts(30)
    walk = reader("llama", ids, valid, start=[1], window=16).walk()
    with pytest.raises(SignalError, match="a segment of 20 tokens fills the window of 16"):
        walk.read(torch.arange(30)[None] < 20)


def test_a_question_as_long_as_the_window_is_refused() -> None:
    ids, valid = texts(10)
    with pytest.raises(SignalError, match="a question of 9 tokens leaves no room in the window of 8"):
        _ = reader("llama", ids, valid, question=[[5] * 9], window=8).relevance


# -- what a reader cannot know -----------------------------------------------------------------------------------------
def test_without_a_question_nothing_can_be_asked() -> None:
    ids, valid = texts(6, 6)
    for question in ((), ([], []), ([4], [])):
        one = reader("llama", ids, valid, question=question)
        for value in ("asked", "relevance"):
            with pytest.raises(SignalError, match="give question="):
                getattr(one, value)
        with pytest.raises(SignalError, match="give question="):
            one.walk(asked=True)


def test_each_reader_says_what_it_is_not() -> None:
    ids, valid = texts(6)
    with pytest.raises(SignalError, match="LlamaForCausalLM is a language model; this method takes an encoder"):
        _ = reader("llama", ids, valid).wanted
    words = WordReader(encoder(), ids, valid, torch.zeros_like(ids))
    for ask in (lambda: words.surprisal, lambda: words.asked, lambda: words.relevance, words.walk,
                lambda: words.apart(torch.zeros_like(ids))):  # fmt: skip
        with pytest.raises(SignalError, match="BertForTokenClassification says which words stay"):
            ask()


# -- encoders ----------------------------------------------------------------------------------------------------------
@cache
def encoder() -> Any:
    from transformers import BertConfig, BertForTokenClassification

    torch.manual_seed(2)
    return BertForTokenClassification(
        BertConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
                   max_position_embeddings=64, initializer_range=0.3, num_labels=2)
    ).eval()  # fmt: skip


def test_pieces_of_an_encoder_end_with_sentences() -> None:
    ids, valid = texts(40, 11)
    sentence = torch.zeros_like(ids)
    sentence[0, 7:], sentence[0, 13:] = 1, 2  # then none ends until the text does
    got = WordReader(encoder(), ids, valid, sentence, [1], [2], window=18).wanted
    for row, pieces in [(0, [(0, 13), (13, 29), (29, 40)]), (1, [(0, 11)])]:
        for a, b in pieces:
            with torch.no_grad():
                logits = encoder()(input_ids=torch.tensor([[1, *ids[row, a:b].tolist(), 2]])).logits
            assert_close(got[row, a:b], logits.softmax(-1)[0, 1:-1, 1], atol=1e-5, rtol=1e-5)
    assert got[1, 11:].isnan().all()
    assert bool(((got >= 0) & (got <= 1) | got.isnan()).all())
