"""Agents behind a real endpoint: `transformers serve` with the packaged SmolLM2-135M; left out where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from fewer.agents import Debate, Densify, Endpoint
from serving.test_real import endpoint, folder  # noqa: F401

pytestmark = [pytest.mark.slow, pytest.mark.download]


def test_a_debate_costs_less_when_nothing_new_is_sent(endpoint: str, folder: Path) -> None:  # noqa: F811
    with Endpoint(endpoint, str(folder), tokens=48, temperature=0.0) as agent:
        question = "Tom has 3 boxes with 4 apples each. How many apples has he?"
        pruned = Debate(rounds=1, group=0).run(question, [agent] * 3)
        full = Debate.full(rounds=1).run(question, [agent] * 3)
    assert pruned.ended == "agreed"  # at temperature 0 all three say the same
    assert len(pruned.ledger.calls) == 3
    assert len(full.ledger.calls) == 6
    assert pruned.ledger.tokens < full.ledger.tokens / 2
    assert all(call.prompt > 15 and 0 < call.completion <= 48 for call in full.ledger.calls)


def test_a_chain_says_why_it_ends(endpoint: str, folder: Path) -> None:  # noqa: F811
    text = "In 1863 the harbour of Port Erin was built by John Quayle. The sea broke it on 14 October 1881."
    with Endpoint(endpoint, str(folder), tokens=96) as model:
        chain = Densify(steps=2, words=30, retries=0).run(text, model)
    assert chain.steps[0].text
    assert len(chain.ledger.calls) == 2
    assert (len(chain.steps) == 2) == (chain.ended == "steps")
