"""Which methods act where, and what may stand beside what."""

from __future__ import annotations

from typing import Literal

from .. import hosts

Execution = Literal["padded", "packed", "masked"]


class SessionError(RuntimeError):
    """A session cannot be started, or has nothing to show yet."""


def check_free(host: hosts.Host) -> None:
    """Raises SessionError where a session is on."""
    if host.occupied:
        raise SessionError(
            "this model already has a session on it: call remove() first, or give apply a list of methods"
        )
