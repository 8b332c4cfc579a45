r"""Whether a text gives the right answer: in a box, as its last number, or word for word.

>>> correct(r"Seven and five: \boxed{12}", 12)
True
>>> correct("So the total is 1,250.00 dollars.", "1250", by="number")
True

Only plain numbers are calculated with: integers, decimals, thousands commas, fractions, and LaTeX fractions of these.
Anything else is compared as text without white space. For algebra, hand a callable of your own to a reward:
`ThinkPrune(4000, correct=lambda text, answer: ...)`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

DIGITS = 200  # more are no answer, and very long ones take long to calculate with
NUMBER = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+"
SIGNED = re.compile(rf"(?<![\w.])[-+]?(?:{NUMBER})(?:\s?/\s?(?:{NUMBER}))?(?!\d)")
LATEX_FRACTION = re.compile(r"([-+]?)\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
BRACE = re.compile(r"[{}]")


def boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{...}` that is closed; None without one.

    >>> boxed(r"first \boxed{1}, then \boxed{\frac{1}{2}}")
    '\\frac{1}{2}'
    """
    boxes = {found.end() - 1 for found in BOX.finditer(text)}  # where their braces open
    best: tuple[int, int] | None = None
    opened: list[int] = []
    for brace in BRACE.finditer(text):
        if brace[0] == "{":
            opened.append(brace.start())
        elif opened:
            start = opened.pop()
            if start in boxes and (best is None or start > best[0]):
                best = start, brace.start()
    return None if best is None else text[best[0] + 1 : best[1]].strip()


def last_number(text: str) -> str | None:
    """The last number of a text, as it is written; None without one.

    >>> last_number("3 + 4 = 7, and minus 10 that is -3.")
    '-3'
    """
    found = None
    for found in SIGNED.finditer(text.replace("\N{MINUS SIGN}", "-")):  # noqa: B007
        pass
    return None if found is None else found[0]


def number(text: str) -> Fraction | None:
    """The value of a text that is a number and nothing else; None for any other text. Exact.

    >>> number("-1,250.5"), number(r"$\\frac{1}{3}$"), number("x + 1")
    (Fraction(-2501, 2), Fraction(1, 3), None)
    """
    text = _bare(text).replace("\N{MINUS SIGN}", "-")
    fraction = LATEX_FRACTION.fullmatch(text)
    if fraction is not None:
        text = f"{fraction[1]}{fraction[2]}/{fraction[3]}"
    if len(text) > DIGITS or SIGNED.fullmatch(text) is None:
        return None
    above, _, below = text.replace(",", "").partition("/")
    value, divisor = Fraction(above), Fraction(below.strip() or 1)
    return value / divisor if divisor else None


def same(found: str, answer: Any) -> bool:
    """Whether two answers are equal: as numbers where both are, otherwise as texts without white space."""
    a, b = number(found), number(str(answer))
    if a is not None and b is not None:
        return a == b
    return _squeezed(found) == _squeezed(str(answer))


def correct(text: str, answer: Any, by: str = "boxed") -> bool:
    r"""Whether a completion gives the answer.

    by       "boxed": what stands in its last `\boxed{}`. "number": its last number. "exact": the whole text.
    answer   the right one. May be a worked solution: its own last box or last number is taken, as `by` says.
    Raises   ValueError for another `by`, or an answer without a number where numbers are compared.
    """
    return grader(by)(text, answer) is True


def grader(by: str | Callable[[str, Any], bool | None]) -> Callable[[str, Any], bool | None]:
    """The check of this name, or the callable itself. Raises ValueError for anything else."""
    if callable(by):
        return by
    if by not in _GRADERS:
        raise ValueError(f"correct={by!r}: needs {', '.join(map(repr, _GRADERS))} or a callable (text, answer) -> bool")
    return _GRADERS[by]


def _by_box(text: str, answer: Any) -> bool:
    found, wanted = boxed(text), str(answer)
    within = boxed(wanted)
    return found is not None and same(found, wanted if within is None else within)


def _by_number(text: str, answer: Any) -> bool:
    found, wanted = last_number(text), last_number(str(answer))
    if wanted is None:
        raise ValueError(f"answer {answer!r} has no number in it: compare by 'boxed' or 'exact'")
    return found is not None and same(found, wanted)


def _by_text(text: str, answer: Any) -> bool:
    return text.strip() == str(answer).strip()


_GRADERS: dict[str, Callable[[str, Any], bool | None]] = {"boxed": _by_box, "number": _by_number, "exact": _by_text}


def _bare(text: str) -> str:
    """Without dollar signs, a final full stop and white space around it."""
    return text.strip().removesuffix(".").strip().strip("$").strip()


def _squeezed(text: str) -> str:
    return re.sub(r"\s+", "", _bare(text))
