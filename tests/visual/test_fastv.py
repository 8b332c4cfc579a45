"""FastV against its authors' numbers, and cases computed by hand."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import fewer
from fewer.core import Capacity, KeepRatio, Place, Seen, SignalError, Signals, Tokens, View, Visual
from fewer.core import rope as rotary
from fewer.core.visual.attention import LEAST, attended
from fewer.core.visual.layout import Item, Layout, Standing, lifted, view
from fewer.methods.multimodal.fastv import FastV
from fewer.spec import parse
from insides import alone, inside, kept, with_visual

GOLDENS = Path(__file__).parent.parent / "goldens"


@pytest.mark.parametrize("case", [0, 1])
def test_the_authors_rank(case):
    z = np.load(GOLDENS / "fastv_rank.npz")
    facts = json.loads(str(z["config"]))["cases"][case]
    paid = torch.from_numpy(z[f"c{case}.attn_last_query"]).double()  # (1, H, L)
    first, n, length = facts["sys_length"], facts["image_length"], paid.shape[-1]
    # Queries and keys whose attention is the one given: one channel per key holds its logarithm.
    q = torch.ones(1, paid.shape[1], length, 1)
    k = paid.log()[..., None].float()
    index = torch.arange(first, first + n)[None]
    zero = torch.zeros_like(index)
    text = torch.ones(1, length, dtype=torch.bool)
    text[:, first : first + n] = False
    looked = View(torch.arange(1), index, zero, zero, zero, zero, zero)
    visual = Visual(looked, torch.zeros(1, length, 4), text, seen=Seen(q, k, k, 1.0, causal=True))
    signals = Signals(torch.zeros(1, n, 4), Tokens.plain(1, n), Place(start=n), beside=visual)
    plan = FastV(KeepRatio(facts["rank"] / n)).plan(signals, signals.tokens)
    image = [i for i in z[f"c{case}.kept_index"].tolist() if first <= i < first + n]
    assert [i + first for i in kept(plan)] == sorted(image)
    assert len(image) == facts["rank"]


@pytest.mark.parametrize("name", ["fastv_llama_s0", "fastv_llama_s2"])
def test_the_authors_model(name):
    """Their five-layer Llama: rank, rows that stay, and logits, rows dropped with position ids kept."""
    z = np.load(GOLDENS / f"{name}.npz")
    facts = json.loads(str(z["config"]))
    k, first, n = facts["fastv_k"], facts["image_token_start_index"], facts["image_token_length"]
    own = {key: v for key, v in facts.items() if not key.startswith(("fastv", "image"))}
    model = LlamaForCausalLM(LlamaConfig(**own, tie_word_embeddings=False)).eval()
    weights = {key[2:]: torch.from_numpy(z[key]) for key in z.files if key.startswith("w.")}
    model.load_state_dict(weights)
    x = torch.from_numpy(z["inputs_embeds"])
    length = x.shape[1]
    layout = Layout.of((1, length), [Item.raster(1, 1, n)], [torch.arange(first, first + n)], None, x.device)
    method = FastV(KeepRatio(1 - facts["fastv_r"], rounding="round"), k=k)
    (layer,) = method.acts_at(facts["num_hidden_layers"])
    tokens, position = Tokens.plain(1, length), torch.arange(length)[None]
    with torch.no_grad():
        for i, block in enumerate(model.model.layers):
            tables = model.model.rotary_emb(x, position)
            if i == layer:
                y = block.input_layernorm(x)
                heads = (1, length, -1, block.self_attn.head_dim)
                q, key = (p(y).view(heads).transpose(1, 2) for p in (block.self_attn.q_proj, block.self_attn.k_proj))
                seen = Seen(*apply_rotary_pos_emb(q, key, *tables), key, block.self_attn.scaling, causal=True)
            x = block(x, position_embeddings=tables)
            if i == layer:
                shown = view(layout, Standing.of(layout), tokens, "prompt")
                visual = Visual(shown, x, layout.text, seen=seen)
                signals = Signals(shown.of(x), Tokens.plain(1, n), Place(start=n), beside=visual)
                scores = attended(visual, visual.last()).mean((1, 2))
                assert_close(scores[0], torch.from_numpy(z["image_scores"]), atol=1e-5, rtol=1e-5)
                plan, _ = lifted(
                    method.plan(signals, signals.tokens), shown, tokens, "prompt", Standing.of(layout), layout
                )
                assert plan.anchor[0].tolist() == z["kept"].tolist()
                x, position = plan.reduce(x), plan.gather(position)
        x = model.model.norm(x)
        assert_close(x, torch.from_numpy(z["last_hidden"]), atol=1e-4, rtol=1e-4)
        assert_close(model.lm_head(x), torch.from_numpy(z["logits"]), atol=1e-4, rtol=1e-4)


class Fixed(torch.nn.Module):
    """A projector that gives the golden's image rows, whatever the picture."""

    def __init__(self, rows):
        super().__init__()
        self.rows = rows

    def forward(self, _features):
        return self.rows


def test_the_authors_model_inside_a_llava():
    """The same numbers through `fewer.apply` on a vision-language model whose language model is theirs."""
    z = np.load(GOLDENS / "fastv_llama_s2.npz")
    facts = json.loads(str(z["config"]))
    k, first, n = facts["fastv_k"], facts["image_token_start_index"], facts["image_token_length"]
    own = {key: v for key, v in facts.items() if not key.startswith(("fastv", "image"))}
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                              image_size=24, patch_size=4, projection_dim=16)  # fmt: skip
    image = facts["vocab_size"] - 1
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**own), image_token_index=image,
                         vision_feature_layer=-1)  # fmt: skip
    model = LlavaForConditionalGeneration(config).eval()
    x = torch.from_numpy(z["inputs_embeds"])
    weights = {key[2:]: torch.from_numpy(z[key]) for key in z.files if key.startswith("w.")}
    theirs = {key.removeprefix("model."): v for key, v in weights.items() if key.startswith("model.")}
    model.model.language_model.load_state_dict(theirs)
    model.lm_head.weight.data = weights["lm_head.weight"]
    ids = torch.arange(x.shape[1])  # each word its own id, so that the table can hold what stands in the prompt
    ids[first : first + n] = image
    words = ids != image
    table = torch.zeros(facts["vocab_size"], x.shape[2])
    table[ids[words]] = x[0, words]
    model.model.language_model.embed_tokens.weight.data = table
    model.model.multi_modal_projector = Fixed(x[:, first : first + n])
    given = {
        "input_ids": ids[None],
        "attention_mask": torch.ones_like(ids)[None],
        "pixel_values": torch.randn(1, 3, 24, 24),
    }
    kept = torch.from_numpy(z["kept"]).long()
    with torch.no_grad():
        full = model(**given, use_cache=False).logits[:, -1]
        assert_close(full, torch.from_numpy(z["full_logits_last"]), atol=1e-4, rtol=1e-4)
        with fewer.apply(model, "fastv", k=k, keep=1 - facts["fastv_r"]) as session:
            logits = model(**given).logits
            assert session.counts == [x.shape[1]] * k + [len(kept)] * (facts["num_hidden_layers"] - k)
    assert_close(logits[:, kept], torch.from_numpy(z["logits"]), atol=1e-4, rtol=1e-4)


def test_last_token_of_each_line_ranks_and_padding_does_not_matter():
    lengths = (12, 7, 10)
    signals, tokens = inside(lengths, heads=4)
    plan = FastV().plan(signals, tokens)
    for line in range(3):
        one, free = alone(lengths, line, heads=4)
        seen = one.visual.seen
        logits = seen.q[0, :, -1:] @ seen.k[0].transpose(-1, -2) * seen.scale
        score = logits.softmax(-1).mean((0, 1))[3 : 3 + lengths[line]]
        best = score.topk(round(lengths[line] / 2)).indices.sort().values.tolist()
        assert kept(plan, line) == best == kept(FastV().plan(one, free))


def test_half_of_an_odd_number_goes_to_the_even_neighbour():
    for n, left in ((5, 2), (7, 4), (9, 4)):
        signals, tokens = inside((n,))
        assert FastV().plan(signals, tokens).m == left


def test_all_stay_when_all_may():
    signals, tokens = inside((6,))
    assert kept(FastV(Capacity(6)).plan(signals, tokens)) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(("depth", "layer"), [(1, 0), (6, 0), (24, 1), (30, 1), (32, 1), (48, 2)])
def test_default_layer_scales_with_depth(depth, layer):
    assert FastV().acts_at(depth) == (layer,)
    assert FastV(k=3).acts_at(depth) == (2,)


def test_text_form():
    assert parse("fastv:k=3,keep=0.25").acts_at(32) == (2,)
    assert parse("fastv:layers=1+4").acts_at(32) == (1, 4)
    for wrong in ("fastv:k=0", "fastv:k=1,layers=0", "fastv:score=other"):
        with pytest.raises(ValueError, match=r"k=|score="):
            parse(wrong)


def tables(positions, d=8, base=100.0):
    angle = positions.float()[..., None] * base ** (-torch.arange(0, d, 2) / d)
    return torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)


def turned(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-b, a], -1) * sin[:, None]


def test_unrotated_scores_are_those_of_queries_and_keys_before_rotation():
    lengths = (9, 6)
    signals, tokens = inside(lengths)
    plain = signals.visual.seen
    cos, sin = tables(torch.arange(plain.q.shape[2])[None] * 3)
    cos, sin = cos * 1.7, sin * 1.7  # as YaRN scales them
    seen = replace(plain, q=turned(plain.q, cos, sin), k=turned(plain.k, cos, sin))
    rotated = with_visual(signals, seen=seen, tables=lambda: (cos, sin))
    last = signals.visual.last()
    assert_close(attended(rotated.visual, last, "unrotated"), attended(signals.visual, last))
    assert not torch.allclose(attended(rotated.visual, last), attended(signals.visual, last), atol=1e-3)
    assert kept(FastV(score="unrotated").plan(rotated, tokens), 1) == kept(FastV().plan(signals, tokens), 1)


def test_rotations_gain():
    d, base = 8, 100.0
    frequencies = base ** (-torch.arange(0, d, 2) / d)
    far = torch.arange(0, 40)
    closed = rotary.gain(far, frequencies)
    assert_close(closed[0], torch.tensor(d**0.5))
    ones = torch.ones(1, 1, 40, d)
    cos, sin = tables(far[None])
    keys = turned(ones, cos, sin)[0, 0]
    assert_close(closed, keys @ keys[0] / d**0.5, atol=1e-5, rtol=1e-5)
    shifted = tables(far[None] + 11)
    own = rotary.gain_between(tuple(2 * t for t in shifted), tuple(2 * t for t in shifted))  # a factor cancels out
    assert_close(own[0], rotary.gain((far[:, None] - far).abs(), frequencies), atol=1e-5, rtol=1e-5)


def test_corrected_scores_are_over_the_gain_but_not_below_its_floor():
    signals, _ = inside((9,))
    cos, sin = tables(torch.arange(17)[None])
    visual = with_visual(signals, tables=lambda: (cos, sin)).visual
    raw, corrected = (attended(visual, visual.last(), score) for score in ("rotated", "corrected"))
    gain = rotary.gain(16 - torch.arange(3, 12), 100.0 ** (-torch.arange(0, 8, 2) / 8)).clamp(min=LEAST * 8**0.5)
    assert_close(corrected, raw / gain, atol=1e-5, rtol=1e-4)


def test_equal_content_everywhere_loses_its_bias_to_late_rows():
    """The probe: the same vector in every visual row, slow rotation. Corrected and unrotated scores are flatter."""
    signals, _ = inside((12,), d=8)
    q = k = torch.ones(1, 2, 20, 8)
    cos, sin = tables(torch.arange(20)[None] * 0.05)
    seen = replace(signals.visual.seen, q=turned(q, cos, sin), k=turned(k, cos, sin))
    visual = with_visual(signals, seen=seen, tables=lambda: (cos, sin)).visual

    def uneven(score):
        p = attended(visual, visual.last(), score).mean((0, 1, 2))
        p = p / p.sum()
        return float((p * (p * len(p)).log()).sum())

    assert uneven("unrotated") < 1e-6 < uneven("corrected") < uneven("rotated")


def test_what_is_missing_is_said():
    signals, tokens = inside((6,))
    with pytest.raises(SignalError, match="score=rotated"):
        FastV(score="unrotated").plan(signals, tokens)
    with pytest.raises(SignalError, match="bridge"):
        FastV().plan(with_visual(signals, seen=None), tokens)
