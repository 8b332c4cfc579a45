"""TokenSwift: write a long text in fewer passes, several tokens in each, and the same text. arXiv:2502.18890.

written = swift(model, ids, max_new_tokens=2000)
written.sequences, written.per_pass

model.generate(ids, custom_generate=Swift(heads), max_new_tokens=2000)       # the same, as generate has it

Heads for several tokens and a table of what was written before guess a tree of tokens; the model reads it in one pass;
of each node on the way the next token is chosen as generate chooses it, once, and where a guess is that token the way
goes on. Nothing is written that the model did not choose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewer.compat import CACHE_NAMES, given_cache, pretrained

from .heads import Heads, load, packaged
from .levels import Levels, levels_of
from .ngrams import NGrams
from .penalty import ContextualPenalty
from .tree import Guess, Record, grow
from .verifying import SwiftError, Verifier, tried

SURE = 0.9
"""A chance of the table's best guess from which on heads are not asked about that place."""


@dataclass(frozen=True, eq=False)
class Written:
    """What came of it.

    sequences  (1, N + new) long, as `generate` returns it
    accepted   tokens written by each pass that verified, at least 1: the guesses that came true and the next token. The
               first token of all is the prompt's pass's
    nodes      tokens each of these passes read
    drafts     passes over a partial cache, besides
    sources    of "ngram", "head 1", ...: guesses put to the test, and those that came true
    """

    sequences: Tensor
    accepted: list[int]
    nodes: list[int]
    drafts: int
    sources: dict[str, tuple[int, int]] = field(repr=False)

    @property
    def new(self) -> int:
        return sum(self.accepted) + 1

    @property
    def per_pass(self) -> float:
        """Tokens a verifying pass writes, on average; 1 is plain decoding."""
        return sum(self.accepted) / len(self.accepted) if self.accepted else 1.0


class Swift:
    """For `generate(custom_generate=...)`: greedy or sampled, with any logits processors and stopping criteria that
    look at nothing but the text. `written` holds what the last call came to.

    heads       guess several tokens ahead; None = the table alone
    order       tokens of context the table of n-grams knows; 0 = no table
    candidates  guesses of each source for a place, at most
    nodes       tokens a pass reads, at most. least: chance, by what came true before, that a guess needs to be read
    budget      rows of a partial cache to guess with, in a pass of its own before each that verifies: worth it where
                attention over the whole cache is what takes the time. None = the pass that verifies also guesses on
    streamer    as of generate, which hands it to no custom function

    Raises      SwiftError for more than one text at a time, padding, beams, and models it cannot verify with
    """

    def __init__(
        self, heads: Heads | None = None, *, order: int = 4, candidates: int = 4, nodes: int = 16, least: float = 0.1,
        budget: int | None = None, sinks: int = 16, streamer: Any = None,
    ) -> None:  # fmt: skip
        for name, value, low in (("order", order, 0), ("candidates", candidates, 1), ("nodes", nodes, 1)):
            if value < low:
                raise SwiftError(f"Swift({name}={value}): must be at least {low}")
        if not 0 <= least <= 1:
            raise SwiftError(f"Swift(least={least}): a chance in [0, 1]")
        self.heads, self.order, self.candidates, self.nodes, self.least = heads, order, candidates, nodes, least
        self.budget, self.sinks, self.streamer = budget, sinks, streamer
        self.written: Written | None = None

    @torch.no_grad()
    def __call__(
        self, model: nn.Module, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any,
        generation_config: Any, **model_kwargs: Any,
    ) -> Any:  # fmt: skip
        cache = _allowed(model, input_ids, generation_config, model_kwargs)
        tried(model)
        verifier = Verifier(model, cache)
        choose = _Choice(input_ids, logits_processor, stopping_criteria, generation_config, self.streamer)
        record, table = Record(), NGrams(self.order, self.candidates)
        table.extend(input_ids[0].tolist())
        accepted, nodes = list[int](), list[int]()
        with levels_of(model, self.heads, self.budget, self.sinks, self.candidates) as levels:
            token = choose(verifier.prefill(input_ids))
            levels.after(verifier, None)
            table.extend([token])
            while not choose.done:
                levels.before(token, verifier.rows)
                tree = grow(token, _guesses(table, levels, record), record, self.nodes, self.least)
                with levels.watching(verifier.rows):
                    logits = verifier.read(tree)
                path = [0]
                while True:
                    token = choose(logits[path[-1]])
                    table.extend([token])
                    children = tree.children(path[-1])
                    for other, child in children.items():
                        record.add(tree.kinds[child], other == token)
                    if choose.done or token not in children:
                        break
                    path.append(children[token])
                verifier.keep(path, len(tree))
                levels.after(verifier, path)
                accepted.append(len(path))
                nodes.append(len(tree))
        self.written = Written(choose.ids, accepted, nodes, levels.drafts, record.by_source())
        return choose.finished(verifier.cache)


def swift(
    model: nn.Module, ids: Tensor, *, heads: Heads | str | Path | None = "packaged", max_new_tokens: int = 1024,
    penalty: float = 1.0, window: int = 1024, order: int = 4, candidates: int = 4, nodes: int = 16, least: float = 0.1,
    budget: int | None = None, sinks: int = 16, streamer: Any = None, **generation: Any,
) -> Written:  # fmt: skip
    """Write on from a text, in fewer passes: token for token what `model.generate(ids, **generation)` writes, greedily
    unless do_sample=True; sampled with the same random numbers, too.

    ids         (1, N) long
    heads       Heads, or where `heads.load` finds some; "packaged" = those that the package has for this model, if any;
                None = n-grams alone
    penalty     above 1: tokens of the last `window` are less likely to come again, see `ContextualPenalty`
    generation  what `generate` takes: do_sample, temperature, min_p, eos_token_id, stopping_criteria, ...

    The others are those of `Swift`. Equal up to rounding: a pass over many tokens rounds otherwise than one over one,
    so where two tokens are as good as tied, texts may part, as they may between two machines. In bfloat16 they do.
    """
    found = packaged(model) if heads == "packaged" else heads
    if isinstance(found, str | Path):
        found = load(found, model)
    writer = Swift(
        found, order=order, candidates=candidates, nodes=nodes, least=least, budget=budget, sinks=sinks,
        streamer=streamer,
    )  # fmt: skip
    processors = [*(generation.pop("logits_processor", None) or ())]
    if penalty != 1:
        processors.append(ContextualPenalty(penalty, window))
    given = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": max_new_tokens} | generation
    pretrained(model).generate(ids, custom_generate=writer, logits_processor=processors, **given)  # type: ignore[operator]
    assert writer.written is not None
    return writer.written


def _guesses(table: NGrams, levels: Levels, record: Record) -> Callable[[list[int]], Sequence[Guess]]:
    def guesses(path: list[int]) -> Sequence[Guess]:
        known = table.guesses(path[1:])  # the root stands in the table's text
        if known and record.chance(known[0]) >= SURE:
            return known
        return [*known, *levels.guesses(len(path) - 1)]

    return guesses


class _Choice:
    """Chooses each next token as generate does, and says when the text ends."""

    def __init__(self, ids: Tensor, processor: Any, criteria: Any, config: Any, streamer: Any) -> None:
        self.ids, self.processor, self.criteria, self.config, self.streamer = ids, processor, criteria, config, streamer
        self.done = False
        self.scores: tuple[Tensor, ...] = ()
        self.logits: tuple[Tensor, ...] = ()
        if streamer is not None:
            streamer.put(ids.cpu())

    def __call__(self, logits: Tensor) -> int:
        """logits: (V,) of what follows the text. The token is put to it."""
        raw = logits[None].to(copy=True, dtype=torch.float32, device=self.ids.device)
        scores = self.processor(self.ids, raw)
        if self.config.do_sample:
            new = torch.multinomial(scores.softmax(-1), num_samples=1)
        else:
            new = scores.argmax(-1, keepdim=True)
        if self.config.return_dict_in_generate:
            self.scores += (scores,) if self.config.output_scores else ()
            self.logits += (raw,) if self.config.output_logits else ()
        self.ids = torch.cat([self.ids, new], 1)
        if self.streamer is not None:
            self.streamer.put(new[0].cpu())
        self.done = bool(self.criteria(self.ids, self.scores or None).all())
        return int(new)

    def finished(self, cache: Any) -> Any:
        """What generate returns."""
        from dataclasses import fields

        from transformers.generation import GenerateDecoderOnlyOutput

        if self.streamer is not None:
            self.streamer.end()
        if not self.config.return_dict_in_generate:
            return self.ids
        slot = next(f.name for f in fields(GenerateDecoderOnlyOutput) if f.name in CACHE_NAMES)
        found: dict[str, Any] = {"sequences": self.ids, "scores": self.scores or None, "logits": self.logits or None}
        return GenerateDecoderOnlyOutput(**found, **{slot: cache})


PLAIN = ("attention_mask", "position_ids", "logits_to_keep", "use_cache", *CACHE_NAMES)


def _allowed(model: nn.Module, ids: Tensor, config: Any, given: dict[str, Any]) -> Any:
    """The cache to go on from, or None. Raises SwiftError for what cannot be done."""
    if (config.num_beams or 1) != 1:
        raise SwiftError(f"num_beams={config.num_beams}: beams choose among whole texts; leave it at 1")
    if ids.shape[0] != 1 or config.num_return_sequences != 1:
        raise SwiftError(
            f"{max(ids.shape[0], config.num_return_sequences)} texts at once: their guesses come true at different "
            "places, so give one at a time"
        )
    if (config.guidance_scale or 1) != 1:
        raise SwiftError(f"guidance_scale={config.guidance_scale}: guidance keeps a cache of its own; leave it at 1")
    if config.output_attentions or config.output_hidden_states:
        raise SwiftError(
            "attentions and hidden states of rejected guesses are among those of a pass: do not ask for them"
        )
    if given.get("use_cache") is False:
        raise SwiftError("use_cache=False: guesses are verified over a cache; leave it at True")
    mask = given.get("attention_mask")
    if mask is not None and not bool((mask != 0).all()):
        raise SwiftError("the text is padded: give it without padding and without a mask")
    if strange := sorted(k for k, v in given.items() if v is not None and k not in PLAIN):
        raise SwiftError(f"{', '.join(strange)}: only texts are read here, by their ids")
    cache = given_cache(given)
    if cache is None or (not getattr(cache, "_is_user_defined", False) and not cache.get_seq_length()):
        return None
    return cache
