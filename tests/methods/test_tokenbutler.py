"""TokenButler: step by step as in one go, its rows and no others, on every way a cache is used."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import fewer
from decoders import decoder, prompt
from fewer.compat import cache_of, cached
from fewer.core.attention import grouped_product
from fewer.methods.language.tokenbutler import Butler
from fewer.runtime import modules as trained
from fewer.runtime.modules import ModulesError

FAMILIES = ("llama", "qwen3", "gemma3", "gpt2")


def applied(family: str, method: str = "tokenbutler:keep=0.5", modules: object = "untrained"):
    torch.manual_seed(3)
    return fewer.apply(decoder(family), method, modules=modules)


def butler(width: int = 32) -> Butler:
    torch.manual_seed(0)
    return Butler(width, heads=4, groups=2, layers=3, hidden=24, channels=8)


def test_step_by_step_equals_one_shot():
    """Keys are rotated once, when they come; a single query sees all keys before it."""
    net, x = butler(), torch.randn(2, 17, 32)
    asked, kept = net(x)
    past, queries = None, []
    for part in x.split([6, 1, 1, 5, 1, 3], dim=1):
        q, past = net(part, past)
        queries.append(q)
    assert_close(torch.cat(queries, -2), asked)
    assert_close(past.important, kept.important)
    assert asked.shape == (2, 3, 4, 17, 8)
    assert kept.important.shape == (2, 3, 2, 17, 8)


def test_predictions_are_causal_and_know_distances():
    net, x = butler(), torch.randn(1, 12, 32)
    asked, kept = net(x)
    changed = x.clone()
    changed[:, 8:] = 0
    other, others = net(changed)
    assert torch.equal(asked[..., :8, :], other[..., :8, :])
    assert torch.equal(kept.important[..., :8, :], others.important[..., :8, :])
    same = net(torch.ones(1, 12, 32).normal_(generator=torch.Generator().manual_seed(0))[:, :1].expand(1, 12, 32))
    z = net.logits(same[0][:, 0], same[1].important[:, 0])[0, 0]
    assert_close(z[5, 3], z[9, 7], atol=1e-5, rtol=1e-5)  # equal tokens: only the distance counts
    assert (z[9, 7] - z[9, 1]).abs() > 1e-4


def test_padding_changes_no_prediction():
    net, x = butler(), torch.randn(1, 9, 32)
    padded = torch.cat([torch.full((1, 3, 32), 7.0), x], 1)
    real = torch.tensor([[False] * 3 + [True] * 9])
    asked, kept = net(x)
    other, others = net(padded, real=real)
    assert other.isfinite().all()
    z = net.logits(asked[:, 1], kept.important[:, 1])
    assert_close(net.logits(other[:, 1, :, 3:], others.important[:, 1, :, 3:]), z, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_all_is_the_model_to_the_bit(family: str):
    model, (ids, mask) = decoder(family), prompt(14)
    plain = model.generate(ids, attention_mask=mask, max_new_tokens=5, output_logits=True, return_dict_in_generate=True)
    with applied(family, "tokenbutler:keep=1"):
        ours = model.generate(ids, attention_mask=mask, max_new_tokens=5, output_logits=True,
                              return_dict_in_generate=True)  # fmt: skip
    assert torch.equal(ours.sequences, plain.sequences)
    assert all(map(torch.equal, ours.logits, plain.logits))


def expected_rows(net: Butler, entry: torch.Tensor, layer: int, keep: float, sinks: int) -> list[set[int]]:
    """The slow twin for the last of N tokens (1, N, C): everything anew, head by head."""
    asked, kept = net(entry)
    n = entry.shape[1]
    count = max(math.ceil(n * keep), sinks)
    found = []
    for g in range(net.groups):
        size = net.heads // net.groups
        share = torch.zeros(n)
        for h in range(g * size, (g + 1) * size):
            z = torch.stack([asked[0, layer, h, -1] @ kept.important[0, layer, g, j] for j in range(n)])
            share += (z / net.channels**0.5).softmax(0)
        share[:sinks] = math.inf
        found.append(set(share.argsort(descending=True, stable=True)[:count].tolist()))
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_step_reads_the_rows_the_predictor_names(family: str, monkeypatch: pytest.MonkeyPatch):
    """The plans of a step, against the predictor run once over all tokens by a loop; layer 0 reads everything."""
    model, (ids, _) = decoder(family), prompt(15)
    seen: dict[int, list[set[int]]] = {}
    session = applied(family, "tokenbutler:keep=0.4,sinks=2")
    method = type(session.methods[0])
    read = method.read

    def noted(self, signals, rows):
        plan = read(self, signals, rows)
        if plan is not None:
            seen[signals.at.layer] = [set(p.tolist()) for p in plan.position[0]]
        return plan

    monkeypatch.setattr(method, "read", noted)
    with session, torch.no_grad():
        past = cache_of(model(ids[:, :8]))
        for part in (ids[:, 8:11], ids[:, 11:14], ids[:, 14:]):
            past = cache_of(model(part, **cached(model, past)))
        net = session.modules[0][0]["predictor"]
        table = model.get_input_embeddings()(ids)
        if family == "gpt2":
            table = table + model.transformer.wpe(torch.arange(15))
        assert set(seen) == {1, 2}
        for layer, heads in seen.items():
            assert heads == expected_rows(net, table, layer, 0.4, 2)
        assert session.ledger.read == [15, 6, 6]
        assert session.ledger.stored == [15, 15, 15]  # nothing is evicted
        assert session.ledger.flops > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_is_its_samples_alone(family: str):
    model, (ids, mask) = decoder(family), prompt(14, 9, seed=5)
    with applied(family) as session:
        modules = session.modules
        both = model.generate(ids, attention_mask=mask, max_new_tokens=6, output_logits=True, do_sample=False,
                              return_dict_in_generate=True)  # fmt: skip
    for row, length in enumerate((14, 9)):
        with applied(family, modules=modules):
            alone = model.generate(ids[row : row + 1, -length:], max_new_tokens=6, output_logits=True, do_sample=False,
                                   return_dict_in_generate=True)  # fmt: skip
        assert alone.sequences[0, length:].tolist() == both.sequences[row, 14:].tolist()
        for a, b in zip(alone.logits, both.logits, strict=True):
            assert_close(a[0], b[row], atol=1e-4, rtol=1e-4)


def test_beams_and_cropped_tokens_take_the_memory_along():
    model, (ids, mask) = decoder("llama"), prompt(10, 7, seed=2)
    with applied("llama") as session, torch.no_grad():
        cache = cache_of(model(ids, attention_mask=mask))
        memory = cache.layers[0].memory[0]
        assert memory["keys"].shape[-2] == 10
        first = memory["keys"].clone()
        cache.reorder_cache(torch.tensor([1, 0]))
        assert torch.equal(cache.layers[0].memory[0]["keys"], first.flip(0))
        cache.reorder_cache(torch.tensor([1, 0]))
        longer = torch.nn.functional.pad(mask, (0, 3), value=1)
        model(ids[:, :3] + 1, attention_mask=longer, **cached(model, cache))
        cache.crop(-3)
        assert torch.equal(cache.layers[0].memory[0]["keys"], first)
        again = model(ids[:, 4:5], attention_mask=longer[:, :11], **cached(model, cache)).logits
        fresh = cache_of(model(ids, attention_mask=mask))
        straight = model(ids[:, 4:5], attention_mask=longer[:, :11], **cached(model, fresh)).logits
        assert_close(again, straight)
        assert model.generate(ids, attention_mask=mask, num_beams=3, max_new_tokens=4).shape == (2, 14)
        assert session.ledger.logical[0] == 13


def test_beside_a_method_that_evicts_it_chooses_among_what_is_left():
    model, (ids, _) = decoder("llama"), prompt(20)
    with fewer.apply(model, ["knorm:tokens=12", "tokenbutler:tokens=6"], modules="untrained") as session:
        with torch.no_grad():
            cache = cache_of(model(ids))
            model(ids[:, :1], **cached(model, cache))
        assert session.ledger.stored == [13, 13, 13]
        assert session.ledger.read == [13, 6, 6]


def test_the_logits_of_a_group_share_keys():
    net, x = butler(), torch.randn(1, 5, 32)
    asked, kept = net(x)
    expected = grouped_product(asked[:, 2], kept.important[:, 2]) / 8**0.5
    assert_close(net.logits(asked[:, 2], kept.important[:, 2]), expected)


def test_without_modules_it_says_how_to_get_them():
    with pytest.raises(ModulesError, match="needs trained modules"):
        fewer.apply(decoder("llama"), "tokenbutler")
    with pytest.raises(ValueError, match="negative"):
        fewer.parse("tokenbutler:sinks=-1")


def test_modules_are_saved_and_found_again(tmp_path):
    model, (ids, _) = decoder("llama"), prompt(12)
    with applied("llama") as session, torch.no_grad():
        ours = model.generate(ids, max_new_tokens=4)
        session.save_modules(tmp_path, {"note": "random"})
    with applied("llama", modules=tmp_path):
        assert torch.equal(model.generate(ids, max_new_tokens=4), ours)
    with pytest.raises(ModulesError, match="no trained modules fit"):
        applied("gpt2", modules=tmp_path)  # as wide, but every query head has a KV head of its own


def test_the_package_has_a_predictor_for_smollm2():
    """Found by the hub's name and by that of the converted copy; small; better than chance by its own card."""
    method = fewer.parse("tokenbutler")
    for name in ("HuggingFaceTB/SmolLM2-135M-Instruct", "/home/me/.cache/fewer/smollm2-135m-q4"):
        model = nn.Module()
        model.config = SimpleNamespace(_name_or_path=name)
        assert trained.packaged(model, method.card.name) == "smollm2-135m"
    model.config._name_or_path = "somebody/SmolLM2-1.7B"
    assert trained.packaged(model, method.card.name) is None
    path = trained.ASSETS / "smollm2-135m" / "tokenbutler.safetensors"
    assert path.stat().st_size < 4_000_000
    net = nn.ModuleList([nn.ModuleDict({"predictor": Butler(576, heads=9, groups=3, layers=30)})])
    trained._load(net, method, [path])
    assert all(p.isfinite().all() for p in net.parameters())
    results = json.loads(trained.read_card(path)["results"])
    for keep in ("0.5", "0.25", "0.125"):
        recall, mass = results[f"recall@{keep}"], results[f"mass@{keep}"]
        assert recall["predictor"] > max(recall["pages"], recall["newest"], recall["random"])
        assert mass["random"] < mass["pages"] < mass["predictor"] < mass["last step"] < mass["oracle"]


@pytest.mark.download
@pytest.mark.slow
def test_the_packaged_predictor_finds_what_smollm2_attends_to():
    """On a text of another kind, through the measure the recipe uses; the default door finds the predictor."""
    from fewer.datasets.texts import book
    from fewer.models.zoo import load_model
    from fewer.recipes.predict import measure, read

    model, tokenizer = load_model("smollm2-135m")
    ids = torch.tensor(tokenizer(book("moby-dick")[300_000:302_000])["input_ids"])[:256]
    with fewer.apply(model, "tokenbutler:keep=0.25") as session:
        net, host = session.modules[0][0]["predictor"], session.host
    found = measure(net, [read(host, ids)], keeps=(0.25,), rows=8)
    recall = {name: values[0] for name, values in found["recall@0.25"].items()}
    assert recall["predictor"] > max(recall["pages"], recall["newest"]) > recall["random"]
