"""PuMer: words and patches never share a row, counts are the paper's, padding decides nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import fewer
from fewer.core import Group, KeepRatio, Place, Remove, Seen, SignalError, Signals, Tokens
from fewer.methods.multimodal.pumer import PuMer
from fewer.runtime.session import Session
from fewer.testing import TinyHost
from fewer.testing.models import run, texts, tiny_vit
from fewer.training.losses import logit_kl

CLOSE: dict[str, Any] = dict(atol=1e-5, rtol=1e-4)
EVERY = "pumer:layers=0+1+2"


def vilt(words: Tensor, patches: Tensor, text: Tensor | None = None, image: Tensor | None = None) -> dict[str, Tensor]:
    """A model's inputs. words: (B, T, C), patches: (B, 1 + P, C); text, image: masks, 1 = real."""
    image = torch.ones(patches.shape[:2]) if image is None else image
    given = {"inputs_embeds": words, "image_embeds": patches, "pixel_mask": image}
    return given if text is None else given | {"attention_mask": text}


def through(model: nn.Module, method: str | list[str], given: dict[str, Tensor], **options: Any) -> tuple[Any, Session]:
    with torch.no_grad(), fewer.apply(model, method, **options) as s:
        return model(**given), s


def by_hand(look: Seen, words: int, p: int, m: int, t: int) -> tuple[list[int], dict[int, int]]:
    """Who is dropped, and who merges into whom, for one sample, in loops."""
    n = look.q.shape[2]
    paid = torch.zeros(n)
    for i in range(words):
        for h in range(look.q.shape[1]):
            paid += (look.q[0, h, i] @ look.k[0, h].T * look.scale).softmax(-1)
    dropped = sorted(range(words + 1, n), key=lambda j: float(paid[j]))[:p]
    key = look.k[0].mean(0)

    def pairs(sequence: list[int], among: list[tuple[int, int]], r: int) -> dict[int, int]:
        cosine = {(a, b): float(torch.cosine_similarity(key[a], key[b], dim=0)) for a, b in among}
        best = {a: max((b for x, b in among if x == a), key=lambda b, a=a: cosine[a, b]) for a, _ in among}  # type: ignore[misc]
        return {a: best[a] for a in sorted(best, key=lambda a: -cosine[a, best[a]])[:r]}

    image = [j for j in range(words, n) if j not in dropped]
    merges = pairs(image, [(a, b) for a in image[2::2] for b in image[1::2]], m)
    inner = list(range(1, words - 1))  # neither [CLS] nor [SEP]
    merges |= pairs(inner, [(a, b) for a in inner[::2] for b in inner[1::2]], t)
    return dropped, merges


@pytest.mark.parametrize(("words", "patches"), [(7, 10), (9, 20), (12, 33)])
def test_the_plan_is_the_papers(words: int, patches: int) -> None:
    g = torch.Generator().manual_seed(words)
    n = words + 1 + patches
    q, k, v = (torch.randn(1, 2, n, 8, generator=g) for _ in range(3))
    modality = (torch.arange(n) >= words).long()[None]
    tokens = Tokens.plain(1, n, 1, modality=modality, images=patches + 1).protect(Group(words, words + 1))
    s = Signals(torch.randn(1, n, 16, generator=g), tokens, Place(start=n - 2), Seen(q, k, v, 8**-0.5))
    plan = PuMer().plan(s, tokens)
    p, stay, t = round(0.1 * patches), round(0.6 * patches), (words - 2) - round(0.8 * (words - 2))
    dropped, merges = by_hand(s.seen, words, p, patches - stay - p, t)  # type: ignore[arg-type]
    row = plan.row[0].tolist()
    assert sorted(i for i in range(n) if row[i] < 0) == sorted(dropped)
    stays = [i for i in range(n) if i not in dropped and i not in merges]
    assert plan.position[0].tolist() == stays  # words in front, in order
    for a, b in merges.items():
        assert row[a] == row[b]
    assert_close(plan.dense().sum(-1), torch.ones(1, plan.m))
    assert_close(plan.sizes(torch.ones(1, n)).sum(), torch.tensor(float(n - p)))


def counted(words: int, patches: int, stages: int) -> list[int]:
    """Rows behind each stage by the formula: prune and merge of the image, merge of the text, class tokens and [SEP]
    on top."""
    inner, rows = words - 2, []
    for _ in range(stages):
        goes = patches - round(0.6 * patches)
        merged = goes - round(0.1 * patches)
        assert merged <= (patches - round(0.1 * patches)) // 2
        patches, inner = patches - goes, round(0.8 * inner)
        rows.append(3 + inner + patches)
    return rows


@pytest.mark.parametrize(("words", "patches"), [(7, 10), (12, 25), (20, 49)])
def test_counts_after_three_stages(words: int, patches: int) -> None:
    model = tiny_vit("vilt", depth=3)
    given = vilt(texts(2, words), texts(2, patches + 1, seed=1))
    _, s = through(model, EVERY, given)
    assert s.counts == counted(words, patches, 3)


def test_no_row_spans_modalities_and_class_tokens_stay() -> None:
    words, patches = 12, 25
    given = vilt(texts(2, words), texts(2, patches + 1, seed=1))
    _, s = through(tiny_vit("vilt", depth=3), EVERY, given)
    origin = s.origin
    for b in range(2):
        of = {int(r): set() for r in origin[b] if r >= 0}  # type: dict[int, set[bool]]
        for i, r in enumerate(origin[b].tolist()):
            if r >= 0:
                of[r].add(i >= words)
        assert all(len(kinds) == 1 for kinds in of.values())
        assert sum(k == {True} for k in of.values()) == int(s.last.tokens.modality[b].sum())  # type: ignore[index]
        alone = [0, words - 1, words]  # [CLS], [SEP], the image's class token
        for i in alone:
            assert origin[b].tolist().count(int(origin[b, i])) == 1


@pytest.mark.parametrize("execution", ["padded", "packed", "masked"])
def test_padding_of_words_and_of_patches_decides_nothing(execution: str) -> None:
    """Three prompts of different lengths with images of different sizes: each as it is alone."""
    model = tiny_vit("vilt", depth=3)
    words, patches = texts(3, 12), texts(3, 26, seed=1)
    lengths = [(12, 26), (8, 15), (5, 20)]
    text = torch.stack([(torch.arange(12) < t).long() for t, _ in lengths])
    image = torch.stack([(torch.arange(26) < p).long() for _, p in lengths])
    out, s = through(model, EVERY, vilt(words, patches, text, image), execution=execution)
    counts = s.counts
    assert isinstance(counts, Tensor)
    for b, (t, p) in enumerate(lengths):
        one, own = through(model, EVERY, vilt(words[b : b + 1, :t], patches[b : b + 1, :p]))
        assert counts[:, b].tolist() == own.counts == counted(t, p - 1, 3)
        assert_close(out.pooler_output[b], one.pooler_output[0], **CLOSE)
        if execution != "masked":  # there, rows that are hidden go through the blocks on their own
            assert_close(out.last_hidden_state[b, :t], one.last_hidden_state[0, :t], **CLOSE)


def test_behind_another_method_it_counts_for_itself() -> None:
    """Where the number of image rows is not known beforehand, each sample is still as it is alone."""
    model = tiny_vit("vilt", depth=3)
    given = vilt(texts(3, 9), texts(3, 21, seed=1))
    both = ["random:keep=0.8,layers=0", "pumer:layers=1+2"]
    out, s = through(model, both, given)
    for b in range(3):
        one, own = through(model, both, {k: v[b : b + 1] for k, v in given.items()})
        assert_close(out.pooler_output[b], one.pooler_output[0], **CLOSE)
        kinds = own.last.tokens.modality
        assert kinds is not None
        assert bool((kinds[own.last.tokens.valid] == 1).any())
    assert isinstance(s.counts, Tensor)
    assert bool((s.counts[2] < s.counts[0]).all())


def test_budgets_count_image_tokens() -> None:
    given = vilt(texts(2, 9), texts(2, 21, seed=1))
    model = tiny_vit("vilt", depth=3)
    for form, images in (("r=4", [16, 12, 8]), ("tokens=15+9+9", [15, 9, 9]), ("keep=0.5,of=start", [10, 5, 2])):
        _, s = through(model, f"pumer:layers=0+1+2,text=0,{form}", given)
        assert s.counts == [9 + 1 + i for i in images], form
    plain = run(TinyHost("vilt").model(), TinyHost("vilt").batch)
    kept = TinyHost("vilt").run(PuMer(KeepRatio(1.0), layers=(0, 1)), TinyHost("vilt").batch)
    assert torch.equal(kept, plain)


def test_distillation_from_the_unreduced_model() -> None:
    """The loss is zero for the teacher itself, and fine-tuning the reduced model brings it down."""
    torch.manual_seed(0)
    model = tiny_vit("vilt", depth=3)
    head = nn.Linear(32, 5)
    given = vilt(texts(8, 7), texts(8, 11, seed=1))
    with torch.no_grad():
        teacher = head(model(**given).pooler_output)
    assert float(logit_kl(teacher, teacher).detach()) == 0
    model.train()
    step = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    with fewer.apply(model, EVERY):
        for _ in range(8):
            loss = logit_kl(head(model(**given).pooler_output), teacher)
            step.zero_grad()
            loss.backward()
            step.step()
            losses.append(float(loss.detach()))
    assert losses[0] > 1e-4, losses
    assert losses[-1] < 0.5 * losses[0], losses


def test_what_it_refuses() -> None:
    with pytest.raises(SignalError, match="words and patches"):
        TinyHost("vit").run(PuMer(layers=(1,)), TinyHost("vit").batch)
    for bad in ("prune=1.0", "text=-0.1"):
        with pytest.raises(ValueError, match="outside"):
            fewer.parse(f"pumer:{bad}")
    with pytest.raises(ValueError, match="names no count"):
        fewer.parse("pumer:mass=0.5")
    assert PuMer(Remove(3)).budget == fewer.parse("pumer:r=3").budget
