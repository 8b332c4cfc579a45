"""Policies: what becomes of the messages of a conversation, by who says them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fewer.spec import parse, text

from .forced import KINDS

WHOLE = "whole"
ROLES = ("system", "user", "assistant", "tool")
ALIASES = {"developer": "system", "function": "tool"}
"""Names of roles that other versions of the protocol use."""
LEAST = 64
PROTECT = ("code", "json")


class PolicyError(ValueError):
    """A policy that cannot be read or followed."""


@dataclass(frozen=True)
class Policy:
    """How the messages of one role are shortened.

    method    "whole" = not at all; a method's text form, such as "llmlingua:keep=0.4"; or "" = the compressor's own
    rate      with method "": the share of a message's tokens that is left, in (0, 1]; None = as the method says
    protect   kinds of things that stay: see `Compressor`
    least     tokens; a shorter message is left alone
    asked     whether the latest question of the user before a message is shown to the method, for those that ask for it
    """

    method: str = WHOLE
    rate: float | None = None
    protect: tuple[str, ...] = PROTECT
    least: int = LEAST
    asked: bool = False

    def __post_init__(self) -> None:
        if self.rate is not None and (self.method or not 0 < self.rate <= 1):
            raise PolicyError(
                f"a rate of {self.rate:g} with the method {self.method!r}: write the share in the method"
                if self.method
                else f"a rate of {self.rate:g} is outside (0, 1]; 0.5 leaves half of the tokens"
            )
        if unknown := [kind for kind in self.protect if kind not in KINDS]:
            raise PolicyError(f"protect={'+'.join(unknown)}: choose of {', '.join(KINDS)}, or none")
        if self.least < 0:
            raise PolicyError(f"least={self.least} is negative; 0 leaves no message alone")

    @property
    def acts(self) -> bool:
        return self.method != WHOLE

    def __str__(self) -> str:
        """The shortest form that `policy` reads back."""
        own = self.method or ("" if self.rate is None else repr(self.rate))
        rest = []
        if self.protect != PROTECT:
            rest.append(f"protect={'+'.join(self.protect) or 'none'}")
        if self.least != LEAST:
            rest.append(f"least={self.least}")
        if self.asked:
            rest.append("asked=true")
        return ",".join([own, *rest])


def policies(form: str | Mapping[str, Policy | str]) -> dict[str, Policy]:
    """Role to policy, from what people type.

    A role is followed by "whole", by a share in (0, 1], or by a method's text form; then, as one likes, by
    protect=KIND+KIND (or none), least=TOKENS and asked=true. A role that is not named is left whole.
    Raises PolicyError, and SpecError for a method's parameters.

    >>> {role: str(each) for role, each in policies("tool=llmlingua:keep=0.4,segment=100,user=0.7,least=200").items()}
    {'tool': 'llmlingua:keep=0.4,segment=100', 'user': '0.7,least=200'}
    """
    given: dict[str, Any] = dict(form) if isinstance(form, Mapping) else _divided(form)
    found = {}
    for role, one in given.items():
        if role not in ROLES:
            raise PolicyError(f"no role {role!r}; messages are of {', '.join(ROLES)}")
        found[role] = one if isinstance(one, Policy) else policy(one)
    return found


def written(given: Mapping[str, Policy]) -> str:
    """The text form of several policies; `policies` reads it back."""
    return ",".join(f"{role}={one}" for role, one in given.items())


def policy(form: str) -> Policy:
    """One policy from its text form, without the role."""
    method: list[str] = []
    own: dict[str, Any] = {}
    for part in form.split(","):
        key, eq, value = (piece.strip() for piece in part.partition("="))
        if eq and key in ("protect", "least", "asked"):
            if key in own:
                raise PolicyError(f"{key} is given twice in {form!r}")
            own[key] = _value(key, value)
        else:
            method.append(part.strip())
    name = ",".join(method)
    if name in ("", WHOLE):
        return Policy(name, **own)
    if (rate := _number(name)) is not None:
        return Policy("", rate, **own)
    return Policy(text(parse(name)), **own)


def _divided(form: str) -> dict[str, str]:
    """Role to the rest up to the next role; commas stand in methods too, but no parameter has a role's name."""
    found: dict[str, str] = {}
    role = ""
    for part in form.replace(";", ",").split(","):
        head, eq, rest = part.partition("=")
        if not part.strip():
            continue
        if eq and head.strip() in ROLES:
            role = head.strip()
            if role in found:
                raise PolicyError(f"{role} is given twice in {form!r}")
            found[role] = rest
        elif not role:
            raise PolicyError(
                f"{part.strip()!r} in {form!r} is of no role: write for example tool=0.5,user=whole; "
                f"roles are {', '.join(ROLES)}"
            )
        else:
            found[role] += "," + part
    return found


def _value(key: str, value: str) -> Any:
    if key == "protect":
        return () if value == "none" else tuple(filter(None, (kind.strip() for kind in value.split("+"))))
    if key == "asked":
        if value not in ("true", "false"):
            raise PolicyError(f"asked={value}: true or false")
        return value == "true"
    if not value.isdecimal():
        raise PolicyError(f"least={value}: a whole number of tokens")
    return int(value)


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None
