"""DyVTE: gates look at text only, and a prompt's visual rows leave all at once or not at all."""

from dataclasses import replace

import torch
from torch import nn
from torch.testing import assert_close

from fewer.core import Shape
from fewer.methods.multimodal.dyvte import DyVTE, Gate, feature
from insides import alone, inside, with_visual

SHAPE = Shape(width=8, heads=2, channels=4, depth=2, grid=(3, 4))


def gated(signals, answer=None, seed=0):
    """Signals with a gate: random, or one that always answers the same."""
    torch.manual_seed(seed)
    gate = DyVTE(hidden=16).parts(SHAPE)["gate"]
    if answer is not None:
        gate = Always(gate, answer)
    return replace(signals, modules=nn.ModuleDict({"gate": gate}))


class Always(nn.Module):
    def __init__(self, gate, answer):
        super().__init__()
        self.first, self.flops, self.answer = gate.first, gate.flops, torch.tensor(answer)

    def forward(self, x):
        return torch.stack([-self.answer.float(), self.answer.float()], -1)


def test_feature_is_mean_of_the_words_behind_and_the_last():
    lengths = (12, 7)
    signals, _ = inside(lengths)
    found = feature(signals.visual)
    for line, length in enumerate(lengths):
        words = signals.visual.hidden[line, 3 + length : 3 + length + 5]
        assert_close(found[line], torch.cat([words[:-1].mean(0), words[-1]]))


def test_a_single_word_behind_leaves_no_mean():
    signals, _ = inside((6,), words=1)
    found = feature(signals.visual)[0]
    assert_close(found, torch.cat([torch.zeros(8), signals.visual.hidden[0, -1]]))


def test_gates_never_look_at_visual_rows():
    signals, _ = inside((6, 4))
    other = signals.visual.hidden.clone()
    for line, length in enumerate((6, 4)):
        other[line, : 3 + length] = 100.0
    assert_close(feature(with_visual(signals, hidden=other).visual), feature(signals.visual))


def test_gate_by_hand():
    gate = Gate(8, 16)
    x = torch.randn(3, 16)
    want = nn.functional.gelu(x @ gate.first.weight.T) @ gate.second.weight.T
    assert_close(gate(x), want)
    assert gate.first.bias is None
    assert gate.second.bias is None
    assert gate.flops() == 2 * (16 * 16 + 16 * 2)
    bound = (6 / (16 + 16)) ** 0.5  # Xavier
    assert 0.8 * bound < gate.first.weight.abs().max() <= bound


def test_each_prompt_leaves_by_itself():
    signals, tokens = inside((6, 4, 6))
    plan = DyVTE().plan(gated(signals, [1, 0, 0]), tokens)
    assert plan.lengths.tolist() == [0, 4, 6]
    assert plan.reduce(signals.hidden)[1, :4].equal(signals.hidden[1, :4])


def test_who_is_even_stays():
    signals, tokens = inside((6,))
    plan = DyVTE().plan(gated(signals, [0]), tokens)
    assert plan.lengths.tolist() == [6]
    assert plan.trimmed().lengths is None


def test_an_empty_line_stays_empty():
    signals, tokens = inside((6, 4))
    gone = torch.zeros_like(tokens.valid)
    tokens = replace(tokens, valid=gone)
    signals = with_visual(signals, view=replace(signals.visual.view, valid=gone))
    plan = DyVTE().plan(gated(signals, [0, 0]), tokens)
    assert plan.lengths.tolist() == [0, 0]
    assert plan.trimmed().m == 0


def test_rows_are_gone_once_everybody_has_left():
    signals, tokens = inside((6, 4))
    plan = DyVTE().plan(gated(signals, [1, 1]), tokens)
    assert (plan.m, plan.trimmed().m) == (6, 0)


def test_a_prompt_alone_answers_as_in_a_batch():
    lengths = (6, 4, 5)
    signals, tokens = inside(lengths)
    gone = DyVTE(hidden=16).plan(gated(signals), tokens).lengths.tolist()
    for line, length in enumerate(lengths):
        one, free = alone(lengths, line)
        assert DyVTE(hidden=16).plan(gated(one), free).lengths.tolist() == [gone[line]]
        assert gone[line] in (0, length)


def test_training_keeps_all_and_the_logits_learn():
    signals, tokens = inside((6, 4), stage=2, stages=5)
    signals = replace(gated(signals), training=True)
    plan = DyVTE(hidden=16).plan(signals, tokens)
    assert plan.m == 6
    assert plan.lengths is None
    logits = signals.memory["leave"][2]
    nn.functional.cross_entropy(logits, torch.tensor([1, 0])).backward()
    assert all(p.grad.abs().sum() > 0 for p in signals.modules.parameters())


def test_gates_stand_behind_all_blocks_but_the_last():
    assert DyVTE().acts_at(6) == (0, 1, 2, 3, 4)
    assert DyVTE(layers=(3,)).acts_at(6) == (3,)
