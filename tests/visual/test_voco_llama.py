"""VoCo-LLaMA: what is trained with a mask is used in two passes, and both are the same model."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import fewer
from decoders import VOCAB, decoder
from fewer.compat import cache_of, cached
from fewer.core import BudgetError
from fewer.methods.multimodal.voco_llama import cut, visible

VOCO = VOCAB - 1


def test_the_mask_by_hand():
    """prefix, image, image, voco, voco, text, text; and a sample without."""
    voco = torch.tensor([[0, 0, 0, 1, 1, 0, 0], [0] * 7]).bool()
    seen = visible(voco)[:, 0].long()
    assert seen[0].tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0],
        [0, 0, 0, 1, 1, 1, 0],
        [0, 0, 0, 1, 1, 1, 1],
    ]
    assert torch.equal(seen[1], torch.ones(7, 7).tril().long())
    real = torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1] * 7]).bool()
    padded = visible(voco, real)[0, 0].long()
    assert padded[:, 0].tolist() == [1, 0, 0, 0, 0, 0, 0]
    assert torch.equal(padded[1:, 1:], seen[0, 1:, 1:])
    with pytest.raises(ValueError, match="stand apart"):
        visible(torch.tensor([[0, 1, 0, 1]]).bool())


def test_prompts_are_cut_behind_the_last_voco_token():
    ids = torch.tensor([[1, 5, 5, VOCO, VOCO, 7, 8]])
    front, question = cut(ids, VOCO)
    assert front.tolist() == [[1, 5, 5, VOCO, VOCO]]
    assert question.tolist() == [[7, 8]]
    with pytest.raises(ValueError, match="nowhere"):
        cut(torch.tensor([[1, 2]]), VOCO)
    with pytest.raises(ValueError, match=r"\[1, 2\]"):
        cut(torch.tensor([[1, VOCO, 3], [1, 2, VOCO]]), VOCO)


def sequence(model: nn.Module, m: int, words: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, int]:
    """Embeddings of a prefix of 2, an image of 8, m voco tokens and words; which are voco; where the words begin."""
    draw = torch.Generator().manual_seed(seed)
    embed = model.get_input_embeddings()
    text = torch.randint(3, VOCO, (2, 2 + words), generator=draw)
    image = torch.randn(2, 8, embed.weight.shape[1], generator=draw)
    voco = embed(torch.full((2, m), VOCO))
    x = torch.cat([embed(text[:, :2]), image, voco, embed(text[:, 2:])], 1).detach()
    at = torch.arange(x.shape[1])
    return x, ((at >= 10) & (at < 10 + m)).expand(2, -1), 10 + m


@pytest.mark.parametrize("m", [1, 2, 3])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@torch.no_grad()
def test_one_masked_pass_equals_two_with_what_is_kept(family: str, m: int):
    model = decoder(family)
    x, voco, start = sequence(model, m)
    whole = model(inputs_embeds=x, attention_mask=visible(voco)).logits[:, start:]
    with fewer.apply(model, f"voco_llama:tokens={m}") as session:
        cache = cache_of(model(inputs_embeds=x[:, :start], use_cache=True))
        assert session.counts == [m] * 3
        again = [model(inputs_embeds=x[:, start:], **cached(model, copy.deepcopy(cache))).logits for _ in range(2)]
        for layer in range(3):
            assert session.kept(layer).unique().tolist() == list(range(10, 10 + m)) + list(range(start, start + 5))
        shorter = model(inputs_embeds=x[:, start : start + 1], **cached(model, copy.deepcopy(cache))).logits
    assert_close(again[0], whole, atol=1e-5, rtol=1e-4)
    assert torch.equal(*again)  # the compressed image is there for every question
    assert_close(shorter, whole[:, :1], atol=1e-5, rtol=1e-4)
    plain = model(inputs_embeds=x).logits[:, start:]
    assert (plain - whole).abs().max() > 1e-2


@torch.no_grad()
def test_behind_the_voco_rows_the_image_may_be_anything():
    """Noise in place of the image, once the voco rows are computed, changes no logit."""
    model = decoder("llama")
    x, voco, start = sequence(model, 2)
    whole = model(inputs_embeds=x, attention_mask=visible(voco), use_cache=True)
    cache = cache_of(whole)
    cache.crop(start - x.shape[1])
    for layer in cache.layers:
        layer.keys[:, :, :10] = torch.randn_like(layer.keys[:, :, :10])
        layer.values[:, :, :10] = torch.randn_like(layer.values[:, :, :10])
    mask = visible(voco)[:, :, start:]
    positions = torch.arange(start, x.shape[1])[None]
    other = model(
        inputs_embeds=x[:, start:], **cached(model, cache), attention_mask=mask, position_ids=positions
    ).logits
    assert_close(other, whole.logits[:, start:], atol=1e-5, rtol=1e-4)


def test_no_gradient_goes_past_the_voco_rows():
    """Cut the graph at the voco rows' inputs and the image has no influence left but through them."""
    model = copy.deepcopy(decoder("llama"))
    model.set_attn_implementation("eager")
    x, voco, start = sequence(model, 2)
    mask = torch.zeros(2, 1, x.shape[1], x.shape[1]).masked_fill(~visible(voco), torch.finfo(torch.float32).min)
    out = model(inputs_embeds=x.requires_grad_(), attention_mask=mask, output_attentions=True)
    assert all((a[:, :, start:, :10] == 0).all() for a in out.attentions)
    out.logits[:, start:].square().sum().backward()
    assert x.grad[:, :10].abs().sum() > 0  # through the voco rows of later layers


def test_a_padded_prompt_keeps_its_own_voco_rows():
    model = decoder("llama")
    ids = torch.tensor([[0, 0, 5, 6, VOCO, VOCO], [1, 4, 5, 6, VOCO, VOCO]])
    mask = (ids != 0).long()
    with fewer.apply(model, "voco_llama:tokens=2") as session, torch.no_grad():
        model(ids, attention_mask=mask, use_cache=True)
        assert (session.kept(0)[:, 0] == torch.tensor([4, 5])).all()


@pytest.mark.parametrize("form", ["keep=0.1", "r=3", "tokens=2+3"])
def test_only_a_number_of_tokens_makes_sense(form: str):
    with pytest.raises(BudgetError, match="how many there are"):
        fewer.apply(decoder("llama"), f"voco_llama:{form}")


def pictures(model: nn.Module, n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """[bos, image of 6, voco, question]: embeddings with gradient to the voco token, which tokens are voco, answers.

    Four kinds of image, noise around a fixed vector. The question is one of two tokens, each with its four answers."""
    draw = torch.Generator().manual_seed(seed)
    embed = model.get_input_embeddings()
    width = embed.weight.shape[1]
    kinds = torch.randn(4, width, generator=torch.Generator().manual_seed(77))
    kind, asked = torch.randint(4, (n,), generator=draw), torch.randint(2, (n,), generator=draw)
    image = kinds[kind][:, None] + 0.5 * torch.randn(n, 6, width, generator=draw)
    words = embed(torch.stack([torch.full((n,), VOCO), 10 + asked], 1))
    x = torch.cat([embed(torch.ones(n, 1, dtype=torch.long)), image, words], 1)
    return x, (torch.arange(9) == 7).expand(n, -1), 20 + kind + 4 * asked


def two_steps(model: nn.Module, x: Tensor) -> Tensor:
    """Answers of a model that reads the question with what one voco token kept of the image. (n,) token ids."""
    with fewer.apply(model, "voco_llama:tokens=1"), torch.no_grad():
        cache = cache_of(model(inputs_embeds=x[:, :8], use_cache=True))
        return model(inputs_embeds=x[:, 8:], **cached(model, cache)).logits[:, -1].argmax(-1)


def test_tuned_with_the_mask_one_token_holds_the_image():
    model = copy.deepcopy(decoder("llama")).train()
    x, _, answer = pictures(model, 200, seed=1)
    assert (two_steps(model.eval(), x) == answer).float().mean() < 0.3
    optimiser = torch.optim.AdamW(model.train().parameters(), lr=3e-3, weight_decay=0.0)
    for step in range(60):
        batch, voco, wanted = pictures(model, 32, seed=100 + step)
        loss = F.cross_entropy(model(inputs_embeds=batch, attention_mask=visible(voco)).logits[:, -1], wanted)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    x, _, answer = pictures(model.eval(), 200, seed=2)
    assert (two_steps(model, x) == answer).float().mean() > 0.9
    noise = torch.cat([x[:, :1], torch.randn(200, 6, x.shape[2]), x[:, 7:]], 1)
    assert (two_steps(model, noise) == answer).float().mean() < 0.6
