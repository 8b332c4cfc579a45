"""Settings: frozen dataclasses of numbers, each of which is one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import Field, fields
from typing import Any, ClassVar


class Settings:
    """Base of frozen dataclasses that people fill in. A number that is NaN or infinite is refused behind the class's
    own `__post_init__`: comparisons with NaN are false, so that checks of a range may let it pass.

    endless   fields that may be infinite, which the class checks itself
    refusal   the ValueError that is raised
    """

    endless: ClassVar[frozenset[str]] = frozenset()
    refusal: ClassVar[type[ValueError]] = ValueError
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = cls.__dict__.get("__post_init__")
        if own is not None:

            def checked(self: Settings) -> None:
                own(self)  # first: it may say more
                Settings.__post_init__(self)

            cls.__post_init__ = checked  # type: ignore[method-assign]

    def __post_init__(self) -> None:
        for field in fields(self):
            for number in _numbers(getattr(self, field.name)):
                if field.name not in self.endless and not math.isfinite(number):
                    raise self.refusal(f"{field.name}={number}: {type(self).__name__} takes a finite number here")


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, float):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _numbers(item)
