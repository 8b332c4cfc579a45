"""What methods cost and gain in a picture generator: class, distances to real pictures, seconds; against fewer steps.

A trained classifier judges: whether a picture is of the class that was asked, and by its features how far pictures are
from real ones. Every row begins at the same noise, so that it can be held against the unreduced sample picture by
picture. Rows named "7 steps" are the unreduced model with fewer steps: what everything else has to beat at its cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewer.core import Reducer
from fewer.datasets import images as datasets
from fewer.models import zoo
from fewer.models.sampler import Sampler
from fewer.spec import parse, text

from . import stats
from .record import Drawn, Passport, Row
from .runner import Runner, Watch, with_control
from .settings import Settings as Common
from .settings import split_forms
from .subject import twin_of

__all__ = ["Settings", "frechet", "kernel", "load", "run"]

METHODS = (
    "tomesd:ratio=0.25", "tomesd:ratio=0.5", "tomesd:ratio=0.5,proportional=true",
    "tomesd:ratio=0.75,proportional=true", "fora:every=2", "fora:every=3", "toca:every=3", "duca:every=3",
    "teacache:threshold=0.3", "first_block_cache:threshold=0.2",
)  # fmt: skip
TELLING = ("tomesd:ratio=0.5", "tomesd:ratio=0.5,proportional=true", "fora:every=2", "toca:every=3", "duca:every=3",
           "first_block_cache:threshold=0.2")  # fmt: skip
FEWER = (0.75, 0.5, 0.35)
"""Shares of the steps of the rows that only take fewer of them."""


@dataclass(frozen=True)
class Settings(Common):
    """limit: pictures, the same number of each class. steps: of a path. guidance: 1 = none."""

    model: str = "dit-fashion"
    batch: int = 50
    steps: int = 20
    guidance: float = 1.0
    repeats: int = 2
    LEAST: ClassVar = {**Common.LEAST, "batch": 1, "steps": 2, "limit": 20}


@dataclass(eq=False)
class Subject:
    """A generator and its judge. real: (N, 1, S, S) pictures it should be like, in -1..1."""

    sampler: Sampler
    judge: nn.Module
    real: Tensor
    name: str
    device: torch.device
    extent: str = ""

    @cached_property
    def twin(self) -> Sampler:
        """The same on the same weights: methods go on this one."""
        return Sampler(twin_of(self.sampler.model), self.sampler.scheduler, self.sampler.guidance)

    @torch.inference_mode()
    def judged(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Class scores (N, classes), and features (N, C) behind the judge's last norm."""
        mean, std = 0.2860, 0.3530  # what the classifier was trained with
        fast = torch.autocast("cpu", torch.bfloat16, enabled=torch.backends.mkldnn.is_available())
        small = F.interpolate(pictures.float().clamp(-1, 1), size=28, mode="bilinear", antialias=True)
        scores, features = [], []
        judge: Any = self.judge
        for part in ((small + 1) / 2).sub(mean).div(std).split(100):
            with fast:
                rows = judge.vit(pixel_values=part).last_hidden_state[:, 0]
            features.append(rows.float())
            scores.append(judge.classifier(rows.float()))
        return torch.cat(scores), torch.cat(features)

    @cached_property
    def like(self) -> Tensor:
        """Features of the real pictures."""
        return self.judged(self.real)[1]


def load(settings: Settings, loaded: tuple[nn.Module, Any] | None = None) -> Subject:
    """The generator of some settings, judged by vit-fashion against the packaged pictures, enlarged."""
    from fewer.recipes.diffuse import pictures

    if settings.threads:
        torch.set_num_threads(settings.threads)
    _, sampler = zoo.load_model(settings.model) if loaded is None else loaded
    if not isinstance(sampler, Sampler):
        raise zoo.ModelError(f"{settings.model} is no generator of pictures by class, as dit-fashion is")
    device = torch.device(settings.device)
    sampler.model.to(device=device, dtype=settings.torch_dtype)
    sampler.guidance = settings.guidance
    judge, _ = zoo.load_model("vit-fashion")
    real = pictures(datasets.embedded())
    extent = f"{settings.limit:,} pictures, {settings.steps} steps"
    return Subject(sampler, judge, real, settings.model, device, extent)


def run(
    settings: Settings, out: Path, *, watch: Watch | None = None, subject: Subject | None = None
) -> list[Row]:  # fmt: skip
    """A row for the unreduced model, for fewer steps, and for each method; each is in `out/results.jsonl` by then."""
    subject = subject or load(settings)
    forms = split_forms(list(settings.methods)) or (METHODS if settings.all else TELLING)
    methods = {parse(form): text(parse(form)) for form in forms}
    counts = sorted({max(1, round(share * settings.steps)) for share in FEWER} - {settings.steps}, reverse=True)
    return _Bench(settings, subject, watch).run(with_control(methods, *(f"{n} steps" for n in counts)), out)


def frechet(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of two sets of features, as if each were normally distributed. (N, C), (M, C)."""
    x, y = a.double().numpy(), b.double().numpy()
    gap = x.mean(0) - y.mean(0)
    first, second = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    shared = np.sqrt(np.linalg.eigvalsh(root @ second @ root).clip(0)).sum()
    return float(gap @ gap + np.trace(first) + np.trace(second) - 2 * shared)


def kernel(a: Tensor, b: Tensor) -> float:
    """Kernel distance: the unbiased squared maximum mean discrepancy under (x y / C + 1)^3, arXiv:1801.01401."""
    x, y = a.double(), b.double()

    def k(u: Tensor, v: Tensor) -> Tensor:
        return (u @ v.T / u.shape[1] + 1) ** 3

    def within(u: Tensor) -> Tensor:
        s = k(u, u)
        return (s.sum() - s.diagonal().sum()) / (len(u) * (len(u) - 1))

    return float(within(x) + within(y) - 2 * k(x, y).mean())


class _Bench(Runner):
    WHAT = "n pictures from noise, in batches, every step of them"
    AGAINST = "the same weights and noise, all tokens at every step, fused attention"
    SPREAD = (
        "quartiles of the ratios of interleaved runs (A B A); 95 % intervals for shares: Wilson; paired: Bonett, Price"
    )
    settings: Settings
    subject: Subject
    score = "class accuracy"

    def __init__(self, settings: Settings, subject: Subject, watch: Watch | None) -> None:
        super().__init__(settings, subject, watch)
        self.labels = torch.arange(settings.limit) % subject.sampler.classes
        self.batches = len(self.labels.split(settings.batch))
        self.noise = subject.sampler.noise(settings.limit, settings.seed)
        self._full: Tensor | None = None
        self._real: np.ndarray | None = None

    @property
    def passport(self) -> Passport:
        s = self.settings
        return self.stamped("embedded", s.limit, s.batch, "padded", "pictures", self._notes)

    @cached_property
    def _notes(self) -> list[str]:
        s = self.settings
        real = self.subject.real
        halves = self.subject.like[torch.randperm(len(real), generator=torch.Generator().manual_seed(0))].chunk(2)
        scores, _ = self.subject.judged(real[:500])
        right = (scores.argmax(-1) == datasets.embedded().labels[: len(scores)]).float().mean()
        few = [half[: min(s.limit, len(half))] for half in halves]
        return [
            f"{s.steps} steps of {type(self.subject.sampler.scheduler).__name__}, guidance {s.guidance:g}; judged by "
            f"vit-fashion, which is right on {100 * right:.1f} % of {len(scores)} real pictures of this size",
            f"two halves of {len(few[0])} real pictures each lie {frechet(*few):.2f} (Fréchet) and "
            f"{kernel(*few):.4f} (kernel) apart: nothing can be told below that",
        ]

    def measured(self, row: Row, form: str, method: Reducer | None) -> Row:
        s, subject = self.settings, self.subject
        steps = int(form.split()[0]) if form.endswith(" steps") else s.steps
        row.code = f"sampler(labels, steps={steps})"
        with ExitStack() as stack:
            session = None
            if method is not None:
                session = stack.enter_context(self.applied(row, subject.twin, method))  # type: ignore[arg-type]
                row.code = row.code + f" under fewer.apply(sampler, {text(method)!r})"
            pictures = self._sampled(subject.twin, steps)
            gflops, own, ceiling, rows, share = self._cost(session, steps)
            row.speedup, row.milliseconds = self._timed(steps)
        row.cost.gflops, row.cost.gflops_own, row.cost.ceiling = gflops, own, ceiling
        row.tokens, row.tokens_full, row.own_time = rows, self._tokens, share
        scores, features = subject.judged(pictures)
        hits = (scores.argmax(-1) == self.labels).numpy()
        row.n, row.hits, row.accuracy = len(hits), stats.pack_hits(hits), stats.share(hits)
        if form == "unreduced":
            self._full, self._real = pictures, hits
        elif self._full is None:
            self._full = self._sampled(subject.sampler, s.steps)
            self._real = (subject.judged(self._full)[0].argmax(-1) == self.labels).numpy()
        assert self._full is not None and self._real is not None
        if form != "unreduced":
            row.difference = stats.paired_difference(hits, self._real)
        moved = float((pictures - self._full).square().mean())
        row.drawn = Drawn(frechet(features, subject.like), kernel(features, subject.like), moved, steps)
        if not pictures.isfinite().all():
            row.notes.append("some pictures are not finite")
        return row

    @property
    def _tokens(self) -> int:
        config: Any = self.subject.sampler.model.config
        return int((config.sample_size // config.patch_size) ** 2)

    def _sampled(self, sampler: Sampler, steps: int) -> Tensor:
        out = []
        for labels, noise in zip(
            self.labels.split(self.settings.batch), self.noise.split(self.settings.batch), strict=True
        ):
            out.append(sampler(labels, steps, noise=noise).float().cpu())
            self.watch.batch()
        return torch.cat(out)

    def _cost(self, session: Any, steps: int) -> tuple[float, float, float, float, float | None]:
        """GFLOPs of a picture and the method's own, the ceiling, mean rows of an operation, own share of time."""
        branches = 2 if self.subject.twin.do_classifier_free_guidance else 1
        order = int(getattr(self.subject.twin.scheduler, "order", 1))
        evaluations = order * steps - (order - 1)
        if session is None:
            whole = order * self.settings.steps - (order - 1)
            return self._evaluation * evaluations * branches, 0.0, whole / evaluations, self._tokens, None
        ledger = session.ledger
        over = ledger.computed[1] > 0
        times = branches if over else branches * evaluations
        gflops, own, full = ledger.gflops * times, ledger.gflops_own * times, ledger.gflops_full * times
        rows = self._tokens * ledger.gflops / ledger.gflops_full if over else float(np.mean(session.counts))
        share = ledger.own_seconds / ledger.seconds if ledger.seconds and not over else None
        return gflops + own, own, full / gflops, rows, share

    @cached_property
    def _evaluation(self) -> float:
        """GFLOPs of the blocks' operations in one evaluation for one sample."""
        from fewer.hosts.diffusion import DiffusionHost

        host = DiffusionHost(self.subject.sampler.model)
        n, total = self._tokens, 0
        for operation in host.operations:
            macs, width = host.macs(operation)
            total += n * macs + (2 * n * n * width if operation.kind == "attention" else 0)
        return total / 1e9

    def _timed(self, steps: int) -> tuple[stats.Interval, float]:
        """Ratios of the unreduced sampler's seconds to these, on one batch, and milliseconds of a picture."""
        labels, noise = self.labels[: self.settings.batch], self.noise[: self.settings.batch]
        plain, mine = [], []
        for _ in range(self.settings.repeats):
            times = []
            for sampler, count in ((self.subject.sampler, self.settings.steps), (self.subject.twin, steps),
                                   (self.subject.sampler, self.settings.steps)):  # fmt: skip
                began = self.now()
                sampler(labels, count, noise=noise)
                times.append(self.now() - began)
            plain.append((times[0] + times[2]) / 2)
            mine.append(times[1])
        return stats.ratios(plain, mine), 1000 * float(np.median(mine)) / len(labels)


def best_at_cost(rows: Sequence[Row]) -> list[str]:
    """Of each method, whether it beats the unreduced model with fewer steps at no lower cost: in Fréchet distance, the
    measure that steps move most."""
    steps = [r for r in rows if not r.error and r.drawn and r.method.endswith(" steps")]
    said = []
    for row in rows:
        if row.error or row.drawn is None or row.method in ("unreduced", *(r.method for r in steps)):
            continue
        cheaper = [r for r in steps if r.cost.gflops <= row.cost.gflops * 1.001]
        if not cheaper:
            continue
        rival = max(cheaper, key=lambda r: r.cost.gflops)
        assert rival.drawn is not None
        word = "is nearer to real pictures than" if row.drawn.frechet < rival.drawn.frechet else "does not beat"
        said.append(
            f"{row.method} ({row.cost.gflops:.2f} GFLOPs, Fréchet {row.drawn.frechet:.2f}) {word} {rival.method} "
            f"({rival.cost.gflops:.2f} GFLOPs, {rival.drawn.frechet:.2f})."
        )
    return said
