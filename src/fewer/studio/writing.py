"""Text as it is written, with what the cache holds beside it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.rule import Rule
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from transformers import DynamicCache, TextStreamer

from fewer.compat import cached, pretrained
from fewer.evaluation.language.subject import Held
from fewer.generation import Swift

from .style import count

REFRESH = 8  # times a second


def prompt_ids(model: nn.Module, tokenizer: Any, text: str, chat: bool | None) -> Tensor:
    """(1, N) tokens of a prompt, on the model's device. chat: as a turn of a chat; None = where there is a template.

    Raises   ValueError for a chat with a tokenizer that knows none.
    """
    template = bool(getattr(tokenizer, "chat_template", None))
    if chat and not template:
        raise ValueError("this model's tokenizer has no chat template; leave --chat out or give --raw")
    if template and chat is not False:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(text)["input_ids"]
    return torch.tensor([ids], device=next(model.parameters()).device)


class Pen:
    """Writes greedily, or samples, and tells what it costs: live in a terminal, else plainly at the end."""

    def __init__(
        self, model: nn.Module, tokenizer: Any, console: Console, session: Any = None, swift: Swift | None = None
    ) -> None:
        """swift: writes several tokens a pass."""
        self.model, self.tokenizer, self.console, self.session = model, tokenizer, console, session
        self.swift = swift
        self.text, self.seen = "", ""  # seen: the visual rows of the prompt and what is left of them
        self._line = ""  # what is not printed yet
        self._live: Live | None = None

    def write(self, prompt: Tensor | Mapping[str, Tensor], most: int, seed: int | None = None) -> str:
        """Go on by at most `most` tokens. prompt: its ids, (1, N), or all that the model is called with.
        seed: sample with it; None = greedily."""
        given = dict(prompt) if isinstance(prompt, Mapping) else {"input_ids": prompt}
        ids = given["input_ids"]
        self.text = self.seen = self._line = ""
        # What slid out of a window cannot come back behind rejected guesses: for them, layers keep all rows.
        self.cache = DynamicCache() if self.swift is not None else DynamicCache(config=pretrained(self.model).config)
        stream: dict[str, Any] = {"streamer": _Stream(self)}
        if self.swift is not None:
            self.swift.streamer = stream["streamer"]
            stream = {"custom_generate": self.swift}
        self.prompt, self.written, self.first, self.last = ids.shape[1], 0, 0.0, 0.0
        with ExitStack() as stack:
            if self.console.is_terminal:
                self._live = stack.enter_context(
                    Live(get_renderable=self._view, console=self.console, refresh_per_second=REFRESH, transient=True)
                )
            if seed is not None:
                torch.manual_seed(seed)
            self.began = time.perf_counter()
            self.model.generate(  # type: ignore[operator]
                **{"attention_mask": torch.ones_like(ids)} | given | cached(self.model, self.cache),
                max_new_tokens=most, do_sample=seed is not None, **stream,
                pad_token_id=self.tokenizer.pad_token_id or 0,
            )  # fmt: skip
            self._flush(end=True)
        self._live = None
        self.console.print(self.ledger())
        return self.text

    # -- called by the stream --------------------------------------------------------------------------------------
    def token(self) -> None:
        """A token is chosen."""
        self.last = time.perf_counter() - self.began
        if not self.first:
            self.first, self.seen = self.last, visual_rows(self.session)
        self.written += 1

    def words(self, text: str) -> None:
        """Text is final. Whole lines leave the live view; what is left of the last one stays in it."""
        self.text += text
        self._line += text
        self._flush()

    def _flush(self, end: bool = False) -> None:
        if self._live is None:
            self.console.print(self._line + ("\n" if end else ""), end="", markup=False, soft_wrap=True)
            self._line = ""
            return
        lines = self._line.split("\n")
        while len(lines[-1]) > self.console.width:
            cut = lines[-1].rfind(" ", 0, self.console.width)
            cut = self.console.width if cut <= 0 else cut
            lines[-1:] = [lines[-1][:cut], lines[-1][cut:].lstrip(" ")]
        whole = lines if end else lines[:-1]
        for line in whole:
            self.console.print(line, markup=False)
        self._line = "" if end else lines[-1]

    # -- what is shown ---------------------------------------------------------------------------------------------
    def _view(self) -> RenderableType:
        return Group(Text(self._line), Rule(style="dim"), self.ledger())

    def ledger(self) -> Table:
        """Tokens read and written, rows and bytes held, seconds to the first token, tokens per second behind it."""
        held = Held.of(self.cache)
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column(style="dim")
        table.add_column()
        table.add_row("tokens", f"{self.prompt:,} read, {self.written:,} written")
        if self.seen:
            table.add_row("visual rows", self.seen)
        if any(held.rows):
            full = self._full(held)
            table.add_row("rows per layer", f"{_runs(held.rows)} of {held.seen:,}")
            share = f" ({100 * held.bytes / full:.0f} %)" if full else ""
            table.add_row("keys, values", f"{held.bytes / 1e6:.2f} MB of {full / 1e6:.2f} MB{share}")
        if self.first:
            table.add_row("first token", f"{self.first:.2f} s")
        if self.written > 1 and self.last > self.first:
            table.add_row("decoding", f"{(self.written - 1) / (self.last - self.first):.1f} tokens/s")
        if self.swift is not None and (done := self.swift.written) is not None and self._live is None:
            table.add_row("passes", f"{len(done.accepted):,} of {done.per_pass:.2f} tokens on average")
        return table

    def _full(self, held: Held) -> float:
        """Bytes an unreduced cache would hold: what the session counted, else by the rows there are."""
        full = sum(layer.record.full for layer in self.cache.layers if hasattr(layer, "record"))
        rows = sum(held.rows)
        return full or held.bytes * held.seen * len(held.rows) / rows


class _Stream(TextStreamer):
    """Tells a pen of every token, and of text as soon as it is final."""

    def __init__(self, pen: Pen) -> None:
        super().__init__(pen.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.pen = pen

    def put(self, value: Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.pen.token()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.pen.words(text)


def visual_rows(session: Any) -> str:
    """Of the last prompt of a session on a vision-language model: how many there were, and behind each block; "" where
    there were none, or no method acts before or inside the language model."""
    if session is None or not session.inside or session.last.beside is None:
        return ""
    return f"{sum(session.layout.counts):,} -> {_runs(session.visual_counts)}"


def _runs(rows: list[float]) -> str:
    """Rows of each layer, runs of the same number written once.

    >>> _runs([5.0, 5.0, 2.5])
    '5, 2.5'
    """
    said = [count(x) for x in rows]
    return ", ".join(x for i, x in enumerate(said) if i == 0 or x != said[i - 1])
