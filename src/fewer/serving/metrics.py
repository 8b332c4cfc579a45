"""Counts of a gateway, as Prometheus reads them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
Labels = tuple[tuple[str, str], ...]

HELP = {
    "requests_total": "Requests answered, by route and status.",
    "tokens_before_total": "Tokens of messages as clients sent them.",
    "tokens_after_total": "Tokens of messages as they went up.",
    "tokens_saved_total": "Tokens that did not go up.",
    "texts_shortened_total": "Texts of messages that went up shorter, each time they did.",
    "texts_left_total": "Texts that a policy would have shortened and that went up whole, with a note.",
    "went_whole_total": "Requests that went up whole because they could not be shortened, by reason.",
    "upstream_errors_total": "Requests the upstream did not answer, or not to the end, by kind.",
    "disconnects_total": "Clients that left before their answer was whole.",
    "spans_total": "Spans asked for, by whether they were there.",
    "in_flight": "Requests on their way.",
    "texts_read_total": "Texts counted or read because they were new.",
    "memory_characters": "Characters, about, that are remembered so that nothing is read twice.",
    "shorten_seconds": "From a body's last byte to its shortened form.",
    "upstream_seconds": "From a request's last byte to the first of the upstream's answer.",
}


@dataclass(eq=False)
class Metrics:
    """gauges: name to what it is now. To be used in one thread, the one of the event loop."""

    gauges: Mapping[str, Callable[[], float]] = field(default_factory=dict)
    _counts: Counter[tuple[str, Labels]] = field(default_factory=Counter)
    _times: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, amount: float = 1, **labels: str) -> None:
        self._counts[name, tuple(sorted(labels.items()))] += amount  # type: ignore[assignment]

    def value(self, name: str, **labels: str) -> float:
        return self._counts[name, tuple(sorted(labels.items()))]

    def time(self, name: str, seconds: float) -> None:
        buckets = self._times.setdefault(name, [0.0] * (len(SECONDS) + 2))
        for i, most in enumerate(SECONDS):
            buckets[i] += seconds <= most
        buckets[-2] += 1
        buckets[-1] += seconds

    def text(self) -> str:
        """All of them, in Prometheus' text format 0.0.4."""
        lines = []
        for name, said in HELP.items():
            lines += [f"# HELP fewer_{name} {said}", f"# TYPE fewer_{name} {self._kind(name)}"]
            if name in self.gauges:
                lines.append(f"fewer_{name} {self.gauges[name]():g}")
            elif name.endswith("_seconds"):
                lines += self._histogram(name)
            else:
                counts = {labels: n for (key, labels), n in self._counts.items() if key == name} or {(): 0}
                lines += [f"fewer_{name}{_written(labels)} {n:.15g}" for labels, n in sorted(counts.items())]
        return "\n".join(lines) + "\n"

    def _kind(self, name: str) -> str:
        return "histogram" if name.endswith("_seconds") else "counter" if name.endswith("_total") else "gauge"

    def _histogram(self, name: str) -> list[str]:
        buckets = self._times.get(name, [0.0] * (len(SECONDS) + 2))
        bounds = [*(f"{most:g}" for most in SECONDS), "+Inf"]
        found = [f'fewer_{name}_bucket{{le="{b}"}} {n:g}' for b, n in zip(bounds, buckets[:-1], strict=True)]
        return [*found, f"fewer_{name}_sum {buckets[-1]:.9g}", f"fewer_{name}_count {buckets[-2]:g}"]


def _written(labels: Labels) -> str:
    return "{" + ",".join(f'{name}="{value}"' for name, value in labels) + "}" if labels else ""
