"""What was made once, by the digest of what it was made of."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass(eq=False)
class Memo(Generic[T]):
    """Results by their key; what was used longest ago goes first. Safe to use from several threads.

    most, held   of what is kept, the sum of its weights. misses: how often something had to be made
    What is there first stays: a result that comes later under the same key is dropped for the one that others had.
    """

    most: int
    held: int = 0
    misses: int = 0
    _kept: OrderedDict[Hashable, tuple[int, T]] = field(default_factory=OrderedDict, repr=False)
    _busy: dict[Hashable, Future[T]] = field(default_factory=dict, repr=False)
    _lock: Any = field(default_factory=threading.Lock, repr=False)

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable) -> T | None:
        with self._lock:
            return self._get(key)

    def put(self, key: Hashable, value: T, weight: int) -> T:
        """What is kept under the key from now on."""
        with self._lock:
            there = self._get(key)
            if there is not None:
                return there
            self._kept[key] = (weight, value)
            self.held += weight
            while self.held > self.most and len(self._kept) > 1:
                self.held -= self._kept.popitem(last=False)[1][0]
            return value

    def made(self, key: Hashable, make: Callable[[], T], weigh: Callable[[T], int]) -> T:
        """What is kept, else what `make` gives. Threads that ask for one key at the same time wait for the first."""
        with self._lock:
            if (there := self._get(key)) is not None:
                return there
            self.misses += 1
            mine = key not in self._busy
            waiting = self._busy.setdefault(key, Future())
        if not mine:
            return waiting.result()
        try:
            value = make()
            value = self.put(key, value, weigh(value))
            waiting.set_result(value)
            return value
        except BaseException as error:
            waiting.set_exception(error)
            raise
        finally:
            with self._lock:
                self._busy.pop(key, None)

    def _get(self, key: Hashable) -> T | None:
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key][1]
