"""CoT-Influx: whole examples leave, then tokens, by a policy that learns from rewards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from fewer.compression import CompressionError, Compressor
from fewer.compression.compressed import counted
from fewer.core import SignalError
from fewer.models.influx import ExemplarPruner
from fewer.models.zoo import ModelError
from fewer.recipes.influx import Example, Influencing, Judge, Task, train
from fewer.training.influx import draw, reward
from fewer.training.losses import reinforce
from wording import PROSE, tokenizer

WORDS = PROSE.split()
EXAMPLES = tuple(f"Text: {' '.join(WORDS[i * 9 : i * 9 + 12])}\nTopic: {'sea' if i % 2 else 'oil'}" for i in range(5))


def encoder() -> Any:
    torch.manual_seed(5)
    return BertModel(
        BertConfig(vocab_size=len(tokenizer("wordpiece")), hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
                   intermediate_size=48, max_position_embeddings=64, initializer_range=0.3)
    ).eval()  # fmt: skip


def pruner(**more: Any) -> ExemplarPruner:
    net = encoder()
    torch.manual_seed(3)
    made = ExemplarPruner(net, tokenizer("wordpiece"), "tiny", inner=16, **more)
    with torch.no_grad():  # opinions that differ, as a trained one has them
        made.example[-1].weight.mul_(40)
        made.token[-1].weight.mul_(40)
    return made.eval()


# -- in use ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("tokens", [20, 35, 60, 90])
def test_the_likeliest_examples_stay_with_their_first_tokens_and_their_answers(tokens: int) -> None:
    policy, own = pruner(bias=(0.0, 0.0)), tokenizer("wordpiece")
    one = Compressor("influx", policy, own, gate=False)(EXAMPLES, question="Text: boats\nTopic:", tokens=tokens)
    assert abs(one.after - tokens) <= 1
    assert one.text.endswith("Text: boats\nTopic:")
    source = one.source
    examples, judged = policy(policy.features([own(text, add_special_tokens=False)["input_ids"] for text in EXAMPLES]))
    order = (examples[:, 1] - examples[:, 0]).argsort(descending=True).tolist()
    there = {source.parts[i] for i in one.order} & set(range(len(EXAMPLES)))
    assert there == set(order[: len(there)])
    starts = [source.parts.index(part) for part in range(len(EXAMPLES))]
    kept = set(one.order)
    for part in order[: len(there) - 1]:  # the last one that fits may be cut further
        mine = [i for i in range(len(source)) if source.parts[i] == part]
        assert {*mine[:3]} <= kept
        assert {i for i in mine if source.sentences[i] == source.sentences[mine[-1]]} <= kept
        inner = [i for i in mine[3:] if source.sentences[i] != source.sentences[mine[-1]]]
        wanted = judged[part][:, 1].detach()
        stay = [float(wanted[i - starts[part]]) for i in inner if i in kept]
        go = [float(wanted[i - starts[part]]) for i in inner if i not in kept]
        assert not stay or not go or min(stay) > max(go)


def test_a_prompt_comes_out_the_same_alone_and_among_others() -> None:
    cut = Compressor("influx", pruner(), tokenizer("wordpiece"), gate=False)
    alone = cut(EXAMPLES, tokens=40).text
    assert cut(EXAMPLES, tokens=40).text == alone
    assert cut.batch([EXAMPLES[:2], EXAMPLES, EXAMPLES[1:4]], tokens=40)[1].text == alone


def test_tokens_are_those_of_the_model_that_reads_the_prompt() -> None:
    other = tokenizer("bpe")
    one = Compressor("influx", pruner(), tokenizer("wordpiece"), counter=other, gate=False)(EXAMPLES, tokens=50)
    assert abs(counted(one.text, other) - 50) <= 1


def test_an_example_beyond_the_window_is_read_in_pieces() -> None:
    policy = pruner()
    ids = list(range(5, 195))
    (features,) = policy.features([ids])
    assert features.shape == (190, 32)
    assert_close(features[:62], policy.features([ids[:62]])[0])  # 64 positions, two of them for marks


def test_it_is_saved_and_found_by_its_folder(tmp_path: Path) -> None:
    policy = pruner()
    policy.save_pretrained(tmp_path)
    assert not [k for k in (tmp_path / "influx.safetensors").read_bytes()[:2000].split() if b"encoder." in k]
    again = ExemplarPruner.load(tmp_path, encoder=(encoder(), tokenizer("wordpiece")))
    cut = [Compressor("influx", one, one.tokenizer, gate=False)(EXAMPLES, tokens=40).text for one in (policy, again)]
    assert cut[0] == cut[1]
    with pytest.raises(ModelError, match="fewer train influx"):
        ExemplarPruner.load(tmp_path / "nothing")
    wide = BertModel(BertConfig(vocab_size=60, hidden_size=48, num_hidden_layers=1, num_attention_heads=4))
    with pytest.raises(ModelError, match="width 32; the encoder given has 48"):
        ExemplarPruner.load(tmp_path, encoder=(wide, tokenizer("wordpiece")))


def test_it_foretells_no_words() -> None:
    with pytest.raises(SignalError, match="causal language model"):
        Compressor("selective_context", pruner(), tokenizer("wordpiece"))(EXAMPLES, tokens=40)


def test_a_reader_that_knows_no_examples_is_refused() -> None:
    with pytest.raises(CompressionError, match="LlamaForCausalLM is none: fewer train influx"):
        Compressor("influx", *small())


# -- learning ----------------------------------------------------------------------------------------------------------
def test_the_reward_is_highest_at_the_limit_and_has_no_step_there() -> None:
    n = torch.tensor([1, 50, 99, 100, 101, 200, 400])
    got = reward(torch.full((7,), 1.0), torch.tensor([True] * 7), n, 100)
    assert_close(got, 1.5 * torch.tensor([0.01, 0.5, 0.99, 1, 100 / 101, 0.5, 0.25]))
    squared = reward(torch.zeros(2), torch.tensor([False, False]), torch.tensor([50, 200]), 100, weight=2.0)
    assert_close(squared, torch.tensor([0.25, 0.25]))
    with pytest.raises(ValueError, match="limit=0"):
        reward(torch.zeros(1), torch.zeros(1), n[:1], 0)


def test_what_was_drawn_is_as_likely_as_is_said() -> None:
    torch.manual_seed(0)
    example = torch.randn(4, 2).log_softmax(-1).requires_grad_(True)
    tokens = [torch.randn(n, 2).log_softmax(-1) for n in (3, 5, 1, 4)]
    framed = [torch.arange(len(t)) < 1 for t in tokens]
    drawn = draw(example, tokens, framed, 200)
    assert bool(drawn.examples.any(-1).all())
    for g in range(200):
        total, at = 0.0, 0
        for m, (logp, frame) in enumerate(zip(tokens, framed, strict=True)):
            stays, mine = bool(drawn.examples[g, m]), drawn.tokens[g, at : at + len(logp)]
            total += float(example[m, int(stays)])
            assert stays or not bool(mine.any())
            if stays:
                assert bool(mine[frame].all())
                total += sum(float(logp[i, int(mine[i])]) for i in range(len(logp)) if not frame[i])
            at += len(logp)
        assert float(drawn.nll[g]) == pytest.approx(-total, abs=1e-4)
    share = drawn.examples.float().mean(0)
    assert_close(share, example[:, 1].exp().detach(), atol=0.12, rtol=0)
    drawn.nll.sum().backward()
    assert example.grad is not None
    assert bool(example.grad.abs().sum() > 0)


def test_one_example_stays_even_where_none_is_wanted() -> None:
    never = torch.tensor([[0.0, -60.0], [0.0, -50.0], [0.0, -70.0]])
    drawn = draw(never, [torch.zeros(2, 2)] * 3, [torch.ones(2, dtype=torch.bool)] * 3, 5)
    assert drawn.examples.tolist() == [[False, True, False]] * 5


def test_the_marked_example_and_word_are_found() -> None:
    """Rewards tell which of six examples, and which of its words, matter: their probabilities tend to 1."""
    policy, own = pruner(bias=(0.0, 0.0)), tokenizer("wordpiece")
    texts = [f"{' '.join(WORDS[i * 5 : i * 5 + 6])}" for i in range(6)]
    features = policy.features([own(text, add_special_tokens=False)["input_ids"] for text in texts])
    sizes = [len(f) for f in features]
    spot = sum(sizes[:2]) + 3
    optimiser = torch.optim.AdamW([*policy.example.parameters(), *policy.token.parameters()], lr=5e-3)
    torch.manual_seed(0)
    for _ in range(150):
        drawn = draw(*policy(features), [torch.zeros(n, dtype=torch.bool) for n in sizes], 8)
        n = drawn.tokens.sum(-1)
        right = drawn.tokens[:, spot]
        reinforce(drawn.nll, reward(torch.where(right, 0.1, 4.0), right, n.clamp(min=1), 8), 8).backward()
        optimiser.step()
        optimiser.zero_grad()
    examples, tokens = policy(features)
    assert float(examples[2, 1].exp()) > 0.9
    assert float(tokens[2][3, 1].exp()) > 0.9
    assert float(drawn.tokens.sum(-1).float().mean()) < sum(sizes) / 2


def small() -> tuple[Any, Any]:
    torch.manual_seed(0)
    own = tokenizer("bpe")
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=len(own), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                    num_attention_heads=4, initializer_range=0.2)
    ).eval(), own  # fmt: skip


def test_answers_are_judged_as_when_they_are_asked_one_by_one() -> None:
    model, own = small()
    prompts, answers = [" ".join(WORDS[: 5 + 7 * i]) for i in range(5)], ["boats", "sea wind", "keeper", "oil", "dog"]
    nats, right = Judge(model, own, side=3)(prompts, answers)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        p, a = own(prompt)["input_ids"], own(f" {answer}", add_special_tokens=False)["input_ids"]
        logits = model(torch.tensor([p + a])).logits[0, len(p) - 1 : -1]
        assert float(nats[i]) == pytest.approx(
            float(torch.nn.functional.cross_entropy(logits, torch.tensor(a))), rel=1e-4
        )
        assert bool(right[i]) == (logits.argmax(-1).tolist() == a)
    with pytest.raises(ValueError, match="begin with the same token"):
        Judge(model, own, ("oil", "oil well"))


def test_a_run_from_the_recipe_to_the_compressor(tmp_path: Path) -> None:
    model, own = small()
    made = [Example(" ".join(WORDS[i : i + 14]), ("sea", "oil")[i % 2]) for i in range(30)]
    task = Task(tuple(made[:12]), tuple(made[12:20]), tuple(made[20:]), ("sea", "oil"))
    recipe = Influencing(
        steps=3, batch=2, group=3, shots=5, tokens=70, words=14, pool=12, questions=8, test=10, inner=8, bfloat16=False
    )
    report = train(
        recipe, tmp_path, model=(model, own), encoder=(encoder(), tokenizer("wordpiece")), task=task, log=lambda _: None
    )
    assert report.scores["no examples"].tokens == 0
    assert all(score.tokens <= 71 for name, score in report.scores.items() if name != "all, whole")
    assert report.scores["all, whole"].tokens > 100
    assert report.scores["whole, random"].ahead[0] == 0
    policy = ExemplarPruner.load(tmp_path, encoder=(encoder(), tokenizer("wordpiece")))
    fresh = ExemplarPruner(encoder(), tokenizer("wordpiece"), "tiny", inner=8)
    assert not torch.equal(policy.example[1].weight, fresh.example[1].weight)
    short = Compressor("influx:tokens=60", policy, policy.tokenizer)([task.example(one) for one in made[:5]])
    assert abs(short.after - 60) <= 1
    assert "Topic:" in short.text
