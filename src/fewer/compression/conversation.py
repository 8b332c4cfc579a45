"""Conversation: the messages of a chat, shorter, by who says them; what was sent once never changes."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from fewer.core import SignalError
from fewer.core.place import Place
from fewer.spec import parse

from .compressed import Compressed, Shelf, counted, digest
from .compressor import CompressionError, Compressor, Prompt
from .forced import KINDS, forced
from .memo import Memo
from .policy import ALIASES, Policy, policies, written
from .source import SourceError, Span
from .structure import STRING, Strings, is_code, is_json, shape

ASKED = 1_000  # characters of a question, its last, that a method is shown
PER_TEXT = 500  # characters that what is remembered of a text counts for, besides its own
RESTORE = "restore"
EXACT = ("code", "json", "digits")
"""Kinds that must be found as what they were: 3 in front of ,5 is 3,5 and no longer 3."""
KNOWN = (CompressionError, SourceError, SignalError)
"""Errors whose texts speak of numbers and settings, never of what a message says."""

Message = Mapping[str, Any]


class ConversationError(ValueError):
    """Messages that are none."""


@dataclass(frozen=True)
class Segment:
    """One text of one message.

    message, role   which message, from 0, and whose. before, after: tokens. text: as it is sent
    dropped   ids of the spans that went, () where it is whole. key: the id of the whole text, "" where nothing went
    notes     what was not done as the policy asks, and why
    """

    message: int
    role: str
    before: int
    after: int
    text: str = field(repr=False)
    key: str = ""
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Conversed:
    """messages: to send instead, in the same order; what is left whole is the caller's own object, not a copy.

    segments   per text of a message, what became of it
    """

    messages: list[Any] = field(repr=False)
    segments: tuple[Segment, ...]

    @property
    def before(self) -> int:
        return sum(one.before for one in self.segments)

    @property
    def after(self) -> int:
        return sum(one.after for one in self.segments)

    @property
    def changed(self) -> bool:
        return any(one.key for one in self.segments)

    @property
    def notes(self) -> list[str]:
        return [f"message {one.message} ({one.role}): {note}" for one in self.segments for note in one.notes]


@dataclass(frozen=True)
class _Short:
    """What became of a text, the same wherever it stands; key "" = it is whole, and not kept here once more."""

    before: int
    after: int
    text: str = field(default="", repr=False)
    key: str = ""
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    source: str = field(default="", repr=False)
    """The text the dropped spans are of, where it is not the message's own."""

    @property
    def weight(self) -> int:
        return PER_TEXT + len(self.text) + len(self.source) + sum(map(len, self.dropped))


class _Unknown(Exception):
    """A text is not remembered."""


class Conversation:
    """Messages as OpenAI's chat completions have them, in; the same, with shorter texts, out.

    policies    per role, see `fewer.compression.policies`: "tool=llmlingua:keep=0.4,user=whole"
    compressor  who reads; its own method is the one of policies that name a rate alone
    shelf       where whole texts are kept so that dropped spans come back by their ids
    mark        whether a shortened message ends in the id to ask for it with, for those who call `tool`
    memory      characters of texts, about, that are remembered, so that nothing is read twice

    *Stable*: what a message becomes depends on it and on messages before it, never on what comes later. So a
    conversation that grows begins as it began, byte for byte, and a provider's cache of the prefix holds. Another
    process with the same settings, on the same machine with as many threads, says the same.
    *Gated*: a text stays whole where it would get longer, its structure would break, or something that must stay would
    be lost; a note says so. *Reversible*: `restore`. Safe to use from several threads.

    >>> conversation = Conversation("tool=0.4", Compressor(model="smollm2-135m"))        # doctest: +SKIP
    >>> conversation(messages).messages                                                 # doctest: +SKIP
    """

    def __init__(
        self, given: str | Mapping[str, Policy | str], compressor: Compressor, *, shelf: Shelf | None = None,
        mark: bool = False, memory: int = 200_000_000,
    ) -> None:  # fmt: skip
        self.policies = policies(given)
        self.compressor, self.mark = compressor, mark
        self.shelf = shelf if shelf is not None else Shelf()
        self.memo: Memo[_Short] = Memo(memory)
        self._reading = threading.Lock()  # one forward at a time: torch uses all threads for one already
        self._methods = {
            role: (self._made(policy, wordwise=False), self._made(policy, wordwise=True))
            for role, policy in self.policies.items() if policy.acts
        }  # fmt: skip
        self._count(" ")  # a tokenizer's first call may set it up, and must not do so in two threads

    def __str__(self) -> str:
        return written(self.policies) or "everything whole"

    def __call__(self, messages: Sequence[Message]) -> Conversed:
        """Raises ConversationError for what is no list of messages."""
        return self._conversed(messages, self._short)

    def remembered(self, messages: Sequence[Message]) -> Conversed | None:
        """The same, where no text has to be read for it; else None."""
        try:
            return self._conversed(messages, self._known)
        except _Unknown:
            return None

    def leave(self, messages: Sequence[Message], why: str) -> Conversed:
        """Texts that are not remembered are left whole, now and from now on, so that what is sent stays as it is."""
        return self._conversed(messages, lambda *given: self._left(*given, why=why))

    # -- what was dropped ----------------------------------------------------------------------------------------------
    def restore(self, name: str) -> str:
        """A dropped span by its id, or a whole text by its key. Raises KeyError, saying what is wrong."""
        return self.shelf.restore(name.strip())

    @property
    def tool(self) -> dict[str, Any]:
        """The definition of a tool that an agent can give its model, so that it asks for what it misses."""
        return {
            "type": "function",
            "function": {
                "name": RESTORE,
                "description": "Some texts of this conversation were shortened and end in an id. Returns the whole "
                "text by its id.",
                "parameters": {
                    "type": "object",
                    "properties": {"id": {"type": "string", "description": "such as 0123456789ab"}},
                    "required": ["id"],
                    "additionalProperties": False,
                },
            },
        }

    def answer(self, arguments: str | Mapping[str, Any]) -> str:
        """What to answer a call of `tool`, in words where nothing can be restored. Sent as that call's result, it is
        not shortened again."""
        try:
            given = json.loads(arguments) if isinstance(arguments, str) else dict(arguments)
            name = given["id"]
            if not isinstance(name, str):
                raise TypeError
        except (ValueError, TypeError, KeyError):
            return 'Call this with the id of a shortened text, such as {"id": "0123456789ab"}.'
        try:
            return self.restore(name)
        except KeyError as error:
            return f"Nothing can be restored: {error.args[0]}"

    # -- messages ------------------------------------------------------------------------------------------------------
    def _conversed(self, messages: Sequence[Message], short: Callable[[str, str, str], _Short]) -> Conversed:
        if not isinstance(messages, (list, tuple)):
            raise ConversationError(f"messages are a list, not {type(messages).__name__}")
        sent: list[Any] = []
        segments: list[Segment] = []
        question, whole = "", set()
        for i, message in enumerate(messages):
            if not isinstance(message, Mapping):
                sent.append(message)  # whoever gets it says what is wrong with it
                continue
            whole |= _restoring(message)
            role = ALIASES.get(str(message.get("role")), str(message.get("role")))
            if _hashable(message.get("tool_call_id")) in whole:
                role = "restored"

            def shortened(text: str, role: str = role, question: str = question, i: int = i) -> str:
                one = short(text, role, question)
                self._put(text, one)
                sent = one.text if one.key else text
                segments.append(Segment(i, role, one.before, one.after, sent, one.key, one.dropped, one.notes))
                return sent

            sent.append(_with_texts(message, shortened))
            if role == "user":
                question = "\n".join(_texts(message)).strip()[-ASKED:]
        return Conversed(sent, tuple(segments))

    def _put(self, text: str, one: _Short) -> None:
        if one.key:
            self.shelf.put_text(text)
            if one.source:
                self.shelf.put_text(one.source)

    # -- one text ------------------------------------------------------------------------------------------------------
    def _short(self, text: str, role: str, question: str) -> _Short:
        key = self._key(text, role, question)
        return self.memo.made(key, lambda: self._fresh(text, role, question), lambda one: one.weight)

    def _known(self, text: str, role: str, question: str) -> _Short:
        found = self.memo.get(self._key(text, role, question))
        if found is None:
            raise _Unknown
        return found

    def _left(self, text: str, role: str, question: str, *, why: str) -> _Short:
        key, policy = self._key(text, role, question), self.policies.get(role)
        if (found := self.memo.get(key)) is None:
            count = self._count(text)
            notes = (f"left as it was: {why}",) if policy and policy.acts and count >= policy.least else ()
            one = _Short(count, count, notes=notes)
            found = self.memo.put(key, one, one.weight)
        return found

    def _key(self, text: str, role: str, question: str) -> tuple[str, str, str]:
        policy = self.policies.get(role)
        if policy is None or not policy.acts:
            return "", "", _hash(text)
        return role, _hash(question) if policy.asked else "", _hash(text)

    def _fresh(self, text: str, role: str, question: str) -> _Short:
        count = self._count(text)
        whole = _Short(count, count)
        policy = self.policies.get(role)
        if policy is None or not policy.acts or count < policy.least:
            return whole
        try:
            made = self._by_policy(text, count, role, question if policy.asked else "")
        except _Left as why:
            return _noted(whole, str(why))
        except KNOWN as error:
            return _noted(whole, " ".join(str(error).split()))
        except Exception as error:  # a text is never lost to whatever happens here; what it says is not for notes
            return _noted(whole, f"it could not be shortened ({type(error).__name__})")
        return whole if made is None else made

    def _by_policy(self, text: str, count: int, role: str, asked: str) -> _Short | None:
        """Shortened; None where there is nothing to say about that it is not. Raises _Left with the reason."""
        plain, wordwise = self._methods[role]
        source = ""
        if is_json(text):
            short, gone, source, notes = self._json(text, wordwise, asked)
        elif "code" in plain.protect and is_code(text):
            raise _Left("it reads as code")
        else:
            short, gone, notes = self._plain(text, plain, asked)
        if not gone:
            if notes:
                raise _Left("; ".join(notes))
            return None
        key = digest(text)
        if self.mark:
            short = _marked(short, text, key, bool(source))
        if source and shape(short) != shape(text):
            raise _Left("its JSON would not hold the same any more")
        if (after := self._count(short)) >= count:
            raise _Left(f"shortened, it has {after} tokens, and had {count}")
        name = digest(source or text)
        return _Short(count, after, short, key, tuple(f"{name}:{a}-{b}" for a, b in gone), notes, source)

    def _plain(self, text: str, method: Compressor, asked: str) -> tuple[str, list[Span], tuple[str, ...]]:
        one = self._read(method, text, asked)
        short = one.text
        if asked:
            if not short.endswith(asked):
                raise _Left("its question was lost on the way")
            short = short[: len(short) - len(asked)].rstrip()
        if lost := _lost(text, short, method):
            raise _Left(lost)
        gone = _between(one.spans, len(text))
        return short, gone, _reasons(one)

    def _json(self, text: str, method: Compressor, asked: str) -> tuple[str, list[Span], str, tuple[str, ...]]:
        strings = Strings.of(text)
        if not strings.values:
            return text, [], "", ()
        one = self._read(method, strings.text, asked)
        stays = forced(strings.text, method.protect, method.force)
        short, gone = strings.shortened(_within(one.spans, len(strings.text)), stays)
        return short, gone, strings.text, _reasons(one) if not gone else ()

    def _read(self, method: Compressor, text: str, asked: str) -> Compressed:
        if not asked:
            with self._reading:
                return method(text)
        whole = self._count(text)
        tokens = method.method.budget.keep(whole, Place(start=whole))
        with self._reading:  # the share is one of the text, and the question is not part of it
            return method(Prompt((text,), question=asked), tokens=min(tokens, whole) + self._count(asked))

    def _count(self, text: str) -> int:
        try:
            return counted(text, self.compressor.counter)
        except Exception:  # halves of surrogate pairs are no text to a tokenizer
            return counted(text.encode("utf-8", "replace").decode(), self.compressor.counter)

    def _made(self, policy: Policy, *, wordwise: bool) -> Compressor:
        base = self.compressor
        method = parse(policy.method) if policy.method else base.method
        if policy.rate is not None:
            method = parse(method, keep=policy.rate)
        if wordwise and "unit" in {f.name for f in fields(method)}:
            method = parse(method, unit="word")
        protect = tuple(dict.fromkeys((*base.protect, *policy.protect)))
        return Compressor(
            method, base.model, base.tokenizer, counter=base.counter, force=base.force, protect=protect,
            window=base.window,
        )  # fmt: skip


class _Left(Exception):
    """A text is left whole; why."""


def _noted(whole: _Short, why: str) -> _Short:
    why = why.removeprefix("left as it was: ")
    return _Short(whole.before, whole.after, notes=(f"left as it was: {why}",))


def _reasons(one: Compressed) -> tuple[str, ...]:
    return tuple(" ".join(note.split()) for note in one.notes)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _between(spans: Sequence[Span], n: int) -> list[Span]:
    """What lies between spans, of n characters."""
    at, gone = 0, []
    for start, stop in [*spans, (n, n)]:
        if min(start, n) > at:
            gone.append((at, min(start, n)))
        at = max(at, stop)
    return gone


def _within(spans: Sequence[Span], n: int) -> list[Span]:
    return [(start, min(stop, n)) for start, stop in spans if start < n]


def _lost(before: str, after: str, method: Compressor) -> str:
    """What of the kinds that stay is not there any more, in words; "" where all is, in its order."""
    for kind in method.protect:
        wanted = [before[start:stop] for start, stop in KINDS[kind](before)]
        if kind in EXACT:
            left = iter([after[start:stop] for start, stop in KINDS[kind](after)])
            if not all(piece in left for piece in wanted):
                return f"some of its {kind} would be lost"
            continue
        at = 0
        for piece in wanted:
            found = after.find(piece, at)
            if found < 0:
                return f"some of its {kind} would be lost"
            at = found + len(piece)
    return ""


def _marked(short: str, text: str, key: str, within: bool) -> str:
    """With the id at its end; in JSON, at the end of the last string that got shorter."""
    mark = f" [shortened; {RESTORE} {key}]"
    if not within:
        return short + mark
    strings, last = _literals(short), ""
    for (start, stop), was in zip(strings, _literals(text), strict=True):
        if short[start:stop] != text[was[0] : was[1]]:
            last = short[: stop - 1] + mark + short[stop - 1 :]
    return last or short


def _literals(text: str) -> list[Span]:
    return [match.span() for match in STRING.finditer(text) if match[1] is None]


def _with_texts(message: Message, change: Callable[[str], str]) -> Any:
    """The message with its texts changed; itself where none is."""
    content = message.get("content")
    new: Any
    if isinstance(content, str):
        new = change(content) if content else content
    elif isinstance(content, list):
        new = [_with_text(part, change) for part in content]
        if all(a is b for a, b in zip(new, content, strict=True)):
            new = content
    else:
        return message
    return message if new is content or new == content else {**message, "content": new}


def _with_text(part: Any, change: Callable[[str], str]) -> Any:
    text = _text_of(part)
    if not text:
        return part
    new = change(text)
    return part if new == text else {**part, "text": new}


def _texts(message: Message) -> Iterator[str]:
    content = message.get("content")
    if isinstance(content, str):
        yield content
    elif isinstance(content, list):
        yield from filter(None, map(_text_of, content))


def _text_of(part: Any) -> str:
    """The text of a part that is one; "" for pictures, sounds, files, and whatever else there will be."""
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    return ""


def _restoring(message: Message) -> set[str]:
    """Ids of the calls in a message that ask for something whole."""
    calls = message.get("tool_calls")
    found = set()
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function") if isinstance(call, Mapping) else None
        if isinstance(function, Mapping) and function.get("name") == RESTORE and isinstance(call.get("id"), str):
            found.add(call["id"])
    return found


def _hashable(value: Any) -> str:
    return value if isinstance(value, str) else ""
