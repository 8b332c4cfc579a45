"""What a method's docstring says about its parameters, and what else it says."""

from __future__ import annotations

import re
from dataclasses import fields
from inspect import cleandoc

from fewer.core import Reducer

INHERITED = {
    "budget": "how many stay",
    "layers": "0-based blocks where it acts; None = every block",
    "proportional": "later blocks add log(size) to their attention logits",
    "fidelity": "paper, or code where the authors' code differs",
}


def explained(cls: type[Reducer]) -> tuple[list[str], dict[str, str]]:
    """A docstring's paragraphs of prose, its first line left out, and the meaning of each parameter it names.

    A meaning begins with `name: `, `name, other: ` or `name  `, at the beginning of a line, or with a colon behind a
    full stop or a semicolon. It ends where the next one begins, else at the next empty line.
    """
    known = {f.name for f in fields(cls)}
    prose, meanings = [], {}
    paragraphs = re.split(r"\n{2,}", "\n".join(cleandoc(cls.__doc__ or "").splitlines()[1:]).strip("\n"))
    for paragraph in paragraphs:
        starts = [found for found in START.finditer(paragraph) if set(found["names"].split(", ")) <= known]
        before = paragraph[: starts[0].start()] if starts else paragraph
        if before.strip():
            prose.append(before.rstrip())
        for found, end in zip(starts, [*(later.start() for later in starts[1:]), len(paragraph)], strict=False):
            said = " ".join(paragraph[found.end() : end].split())
            meanings.update(dict.fromkeys(found["names"].split(", "), said))
    return prose, {name: said for name, said in INHERITED.items() if name in known} | meanings


START = re.compile(
    r"(?:^(?P<line>)|(?<=[.;][ \n]))(?P<names>[a-z_]\w*(?:, [a-z_]\w*)*)(?::(?=\s)|(?(line) {2,}|(?!)))", re.MULTILINE
)
