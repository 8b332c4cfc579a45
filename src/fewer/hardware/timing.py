"""Timing many small things on a machine that others use too."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import torch

K = TypeVar("K", bound=Hashable)


class Clock:
    """Times things often enough. least: seconds a sample lasts at least. On one CPU thread in that thread's seconds."""

    def __init__(self, device: str, least: float = 4e-4) -> None:
        self.device, self.least = device, least
        own = device == "cpu" and torch.get_num_threads() == 1
        self.now = time.thread_time if own else time.perf_counter

    def sweep(self, runs: Mapping[K, Callable[[], Any]], samples: dict[K, list[float]], sweeps: int) -> None:
        """A sample of each, again and again, seconds added to `samples`: what else the machine does then slows down all
        of them alike, and not those whose turn it is."""
        times: dict[K, int] = {}
        for _ in range(sweeps):
            for key, run in runs.items():
                if key not in times:
                    run()
                    times[key] = self._often(run)
                else:
                    run()  # what was timed in between has taken its place in the nearest cache
                samples.setdefault(key, []).append(self._sample(run, times[key]) / times[key])

    def rounds(self, runs: list[Callable[[], Any]], between: Callable[[], Any], rounds: int) -> list[list[float]]:
        """Seconds of each run, round by round; something else, which is not timed, comes before each."""
        found: list[list[float]] = [[] for _ in runs]
        for _ in range(rounds):
            for run, seconds in zip(runs, found, strict=True):
                between()
                seconds.append(self._sample(run, 1))
        return found

    def once(self, run: Callable[[], Any], between: Callable[[], Any], samples: int = 15) -> float:
        """Median seconds of a run behind something else, which is not timed."""
        run()
        found = []
        for _ in range(samples):
            between()
            found.append(self._sample(run, 1))
        return statistics.median(found)

    def _often(self, run: Callable[[], Any]) -> int:
        times = 1
        while (took := self._sample(run, times)) < self.least and times < 4096:
            times *= max(2, min(16, math.ceil(self.least / max(took, 1e-7))))
        return times

    def _sample(self, run: Callable[[], Any], times: int) -> float:
        self._wait()
        began = self.now()
        for _ in range(times):
            run()
        self._wait()
        return self.now() - began

    def _wait(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)


def spread(samples: list[float]) -> float:
    """Half the distance between quartiles, relative to the median."""
    low, middle, high = statistics.quantiles(samples, n=4)
    return (high - low) / 2 / middle
