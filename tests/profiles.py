"""A profile of a machine that nobody has, with round numbers."""

from __future__ import annotations

from typing import Any

from fewer.hardware.calibrate import Around, Profile, Table
from fewer.hardware.ops import KINDS


def flat(rate: float, axes: int) -> Table:
    return Table([[1, 10]] * axes, [rate] * 2**axes)


def made(**changes: Any) -> Profile:
    """1 GFLOP a second, 1 byte a nanosecond, a microsecond a call; changes: other fields of the profile."""
    kinds = {k: Table([[1e3, 1e6]], [1e-6, 1e-3]) for k in ("light", *KINDS) if k != "sort"}
    around = {"encoder": Around(1e-6, 3e-6, 1e-4)}
    given: dict[str, Any] = dict(
        machine={"name": "made up", "threads": "1", "dtype": "float32"}, gemm=flat(1e9, 3),
        pairs=flat(5e8, 3), attention=flat(1e9, 3), causal=flat(0.5, 1),
        masked=flat(1.2, 1), kinds=kinds, sort=Table([[16, 1600]], [1e-6, 1e-4]), view=1e-6, around=around,
    )  # fmt: skip
    return Profile(**given | changes)
