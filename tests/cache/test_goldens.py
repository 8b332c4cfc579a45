"""Every cache method against the numbers of the official implementations, through the public API."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import fewer
from fewer.compat import cache_of, cached
from fewer.core import Place, Seen
from fewer.core.cache import CacheSignals, Rows
from fewer.spec import parse
from kvgoldens import GOLDENS, NAMES, golden, specs, stays


@pytest.mark.parametrize("ratio", [3, 5, 7])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_kept_sets_and_logits_are_the_official_ones(name, seed, ratio):
    arrays, config, model = golden(seed)
    ids, question = arrays["input_ids"].long(), arrays["question_ids"].long()
    rows = slice(1 if name == "chunkkv_snapkv" else None)  # the official chunks are the first sample's for the batch
    with fewer.apply(model, specs(config, 1 - ratio / 10)[name]) as session, torch.no_grad():
        out = model(ids)
        assert_close(out.logits[:, -1], arrays["prefill_logits_last"], atol=2e-4, rtol=2e-4)
        for layer in range(4):
            mine = stays(session.kept(layer), config["T"])
            if f"{name}.r{ratio}.L{layer}.kept" in arrays:
                wanted = stays(arrays[f"{name}.r{ratio}.L{layer}.kept"], config["T"])
            else:
                wanted = arrays[f"{name}.r{ratio}.L{layer}.keep_mask"]
            differs = (mine != wanted)[rows]
            near = {("snapkv", 1, 5, 2), ("knorm", 0, 7, 2), ("keyrot_knorm", 0, 7, 2)}  # near-ties at the cut
            if (name, seed, ratio, layer) in near:
                assert differs.sum() <= 2
            else:
                assert not differs.any()
        decoded = [model(question[:, i : i + 1], **cached(model, cache_of(out))).logits[:, 0] for i in range(4)]
    wanted = arrays[f"{name}.r{ratio}.decode_logits"]
    assert_close(torch.stack(decoded, 1)[rows], wanted[rows], atol=2e-4, rtol=2e-4)


@cache
def clusters() -> dict[str, Tensor]:
    with np.load(GOLDENS / "kv_clusters_s0.npz") as file:
        return {k: torch.from_numpy(np.asarray(file[k])) for k in file.files}


def chosen(spec: str, stage: int = 0, stages: int = 1) -> list[list[int]]:
    """Positions each head keeps of the stored q and k, straight from the method."""
    arrays = clusters()
    q, k = arrays["q"], arrays["k"]
    b, h, n, d = q.shape
    seen = Seen(q, k, k, d**-0.5, causal=True)
    at = Place(stage, stages, stage, stages, n)
    rows = Rows(b, n, totals=(n,), age=torch.arange(n, 0, -1)[None, None])
    signals = CacheSignals(k, rows, at, seen)
    if spec.startswith("h2o"):
        signals.received = signals.attention_mass_of_all()
    return parse(spec).plan(signals, rows).position[0].expand(h, -1).tolist()


@pytest.mark.parametrize(
    ("name", "spec", "stage", "stages"),
    [
        ("snapkv_avgpool", "snapkv:tokens={c},window={w},kernel={k}", 0, 1),
        ("snapkv_maxpool", "snapkv:tokens={c},window={w},kernel={k},pool=max", 0, 1),
        *(
            (f"pyramid_{theirs}_L{layer}of8",
             f"pyramidkv:tokens={{c}},window={{w}},kernel={{k}},pool={ours},fidelity=code", layer, 8)
            for theirs, ours in (("avgpool", "mean"), ("maxpool", "max")) for layer in (0, 3, 7)
        ),
        ("h2o", "h2o:tokens={c},recent={share}", 0, 1),
        ("l2norm", "knorm:tokens={c}", 0, 1),
        ("streaming", "streamingllm:tokens={c},sinks=4", 0, 1),
        ("streaming_evict6", "streamingllm:tokens={less},sinks=4", 0, 1),
        ("streaming_factory", "streamingllm:tokens={c},sinks={old}", 0, 1),
    ],
)  # fmt: skip
def test_the_original_authors_choose_the_same_rows(name, spec, stage, stages):
    arrays = clusters()
    w, c, k = (int(arrays[x]) for x in ("window", "capacity", "kernel"))
    spec = spec.format(w=w, c=c, k=k, share=w / c, less=c - 6, old=c - w)
    mine = torch.tensor(chosen(spec, stage, stages))
    wanted = arrays[f"{name}.kept"][0].sort(dim=-1).values
    if (
        "maxpool" in name
    ):  # a peak is as high as its neighbours then: which of the equals stays is no matter of the method
        votes = pooled_by_hand(arrays["q"][0], arrays["k"][0], w, k)
        mine, wanted = (votes.gather(-1, rows).sort(dim=-1).values for rows in (mine, wanted))
    assert torch.equal(mine, wanted)


def pooled_by_hand(q: Tensor, k: Tensor, window: int, kernel: int) -> Tensor:
    """(H, N): max-pooled votes of the last queries, written in the order of the paper; the window itself at 9."""
    h, n, d = q.shape
    votes = torch.full((h, n), 9.0)
    for head in range(h):
        total = torch.zeros(n)
        for row in range(n - window, n):
            total[: row + 1] += (q[head, row] @ k[head, : row + 1].T / d**0.5).softmax(-1)
        for j in range(n - window):
            votes[head, j] = total[max(j - kernel // 2, 0) : min(j + kernel // 2 + 1, n - window)].max()
    return votes


def test_kvpress_truncates_where_a_decimal_floor_would_not():
    at = Place()
    assert fewer.KeepRatio(1 - 0.3, rounding="trunc").keep(90, at) == 62
    assert fewer.KeepRatio(1 - 0.3).keep(90, at) == 63
