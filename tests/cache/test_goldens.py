"""Every cache method against the numbers of the official implementations, through the public API."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import fewer
from fewer.core import Place, Seen
from fewer.core.cached import CacheSignals, Rows
from fewer.spec import parse

GOLDENS = Path(__file__).parents[1] / "goldens"
FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "vocab_size", "rms_norm_eps", "tie_word_embeddings", "hidden_act",
)  # fmt: skip


@cache
def golden(seed: int) -> tuple[dict[str, Tensor], dict, nn.Module]:
    """The arrays, the settings and the model of one seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with np.load(GOLDENS / f"kv_s{seed}.npz") as file:
        arrays = {k: file[k] for k in file.files}
    config = json.loads(str(arrays.pop("config")))
    tensors = {k: torch.from_numpy(v) for k, v in arrays.items()}
    rope = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    model = LlamaForCausalLM(LlamaConfig(**{k: config[k] for k in FIELDS}, rope_parameters=rope)).eval()
    model.load_state_dict({k[2:]: v.float() for k, v in tensors.items() if k.startswith("w.")})
    return tensors, config, model


def specs(config: dict, keep: float) -> dict[str, str]:
    """The official settings of each method in our text form: once, after the prompt, kvpress' counting."""
    b, w, k, sink = f"keep={keep!r},rounding=trunc", config["w"], config["k"], config["sink"]
    cov, nf = str(config["cov"]).lower(), config["nf"]
    return {
        "knorm": f"knorm:{b}",
        "keydiff": f"keydiff:{b}",
        "snapkv": f"snapkv:{b},window={w},kernel={k}",
        "streaming": f"streamingllm:{b},sinks={sink},positions=original,decodes=false",
        "keyrot_streaming": f"streamingllm:{b},sinks={sink},decodes=false",
        "tova": f"tova:{b},recent=1,decodes=false",
        "observed": f"h2o:{b},recent=0.0,average=true,decodes=false",
        "pyramidkv": f"pyramidkv:keep={keep!r},window={w},kernel={k},beta={config['beta']},fidelity=kvpress",
        "adakv_snapkv": f"adakv:{b},window={w},kernel={k},pool=mean,alpha={config['alpha']}",
        "expected": f"expected_attention:{b},sinks={sink},future={nf},epsilon={config['eps']},covariance={cov}",
    }


NAMES = tuple(specs({"w": 1, "k": 1, "sink": 1, "beta": 1, "alpha": 1, "nf": 1, "eps": 0, "cov": True}, 0.5))


def stays(kept: Tensor, total: int) -> Tensor:
    """(B, G, total) bool from (B, G, M) positions, -1 = none."""
    slot = torch.where(kept < 0, total, kept.long())
    return torch.zeros(*kept.shape[:-1], total + 1, dtype=torch.bool).scatter(-1, slot, True)[..., :-1]


@pytest.mark.parametrize("ratio", [3, 5, 7])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_kept_sets_and_logits_are_the_official_ones(name, seed, ratio):
    arrays, config, model = golden(seed)
    ids, question = arrays["input_ids"].long(), arrays["question_ids"].long()
    with fewer.apply(model, specs(config, 1 - ratio / 10)[name]) as session, torch.no_grad():
        out = model(ids)
        assert_close(out.logits[:, -1], arrays["prefill_logits_last"], atol=2e-4, rtol=2e-4)
        for layer in range(4):
            mine = stays(session.kept(layer), config["T"])
            if f"{name}.r{ratio}.L{layer}.kept" in arrays:
                wanted = stays(arrays[f"{name}.r{ratio}.L{layer}.kept"], config["T"])
            else:
                wanted = arrays[f"{name}.r{ratio}.L{layer}.keep_mask"]
            differs = mine != wanted
            if (name, seed, ratio, layer) in {("snapkv", 1, 5, 2), ("knorm", 0, 7, 2)}:  # near-ties at the cut
                assert differs.sum() <= 2
            else:
                assert not differs.any()
        decoded = [model(question[:, i : i + 1], past_key_values=out.past_key_values).logits[:, 0] for i in range(4)]
    assert_close(torch.stack(decoded, 1), arrays[f"{name}.r{ratio}.decode_logits"], atol=2e-4, rtol=2e-4)


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
