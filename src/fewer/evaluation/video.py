"""Video models on clips of moving pictures: every question about every clip is an item."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fewer.core import Reducer
from fewer.datasets import clips
from fewer.datasets.clips import QUESTIONS, Clips
from fewer.models import zoo
from fewer.models.zoo import Processor

from . import stats
from .bench import EncoderSettings, _Bench
from .record import Row, Score
from .subject import Subject, SubjectError

__all__ = ["DEFAULT", "TASKS", "Settings", "VideoSubject", "answers_questions", "load"]

TASKS = {
    "action": "clips whose kind of motion is recognised",
    "direction": "clips in which the motion starts in the direction that is answered",
    "order": "clips of which it is known what came first",
    "moment": "clips of which it is known when the bag flashed up",
    "motion": "tokens showing what moves that have a row of their own behind the last block",
    "flash": "tokens showing the bag that have one",
}
"""Scores of a row: the questions, and two probes of where the rows that are left come from."""
PROBED = 256  # clips the probes look at
NOTHING = -1e4  # where a question has fewer answers than others

DEFAULT = (
    "random:keep=0.5,layers=0,site=before", "frames:keep=0.5", "grid:keep=0.5,layers=0,site=before",
    "rlt:keep=0.5", "tome:r=33", "testa:r=3,frames=0", "evad:keep=0.6,layers=0+1", "stts:keep=0.5",
    "stts:by=windows,keep=0.6", "ts2_net:keep=0.5,layers=1", "vtm:keep=0.5,layers=1", "storm:keep=0.5,layers=1",
)  # fmt: skip
"""About half of the tokens of `video-actions`, by methods that differ."""


@dataclass(frozen=True)
class Settings(EncoderSettings):
    """The same for videos. data: a level of `fewer.datasets.clips.LEVELS`; limit: clips."""

    model: str = "video-actions"
    data: str = "plain"
    limit: int = 500
    batch: int = 25


@dataclass(frozen=True, eq=False)
class ClipSet:
    """Clips as the data of a subject."""

    name: str
    clips: Clips = field(repr=False)

    def __len__(self) -> int:
        return len(self.clips)


def answers_questions(model: Any) -> bool:
    """Whether a model's head answers the questions asked about clips, as `fewer train video-actions` makes it."""
    told = getattr(getattr(model, "config", None), "questions", None)
    return told is not None and {k: int(v) for k, v in told.items()} == {k: len(v) for k, v in QUESTIONS.items()}


def is_video(model: Any) -> bool:
    """Whether a model classifies videos."""
    return "VideoClassification" in type(model).__name__


def load(settings: Settings, loaded: tuple[nn.Module, Any] | None = None) -> VideoSubject:
    """The model and the clips of some settings. loaded: instead of loading what they name.

    Raises   SubjectError for a model whose head does not know the questions; DataError for an unknown level.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    model, processor = zoo.load_model(settings.model) if loaded is None else loaded
    if not answers_questions(model):
        raise SubjectError(
            f"{settings.model} does not answer the questions asked about clips ({', '.join(QUESTIONS)}): measure "
            "video-actions, or a model of `fewer train video-actions`"
        )
    level = "plain" if settings.data == "embedded" else settings.data
    asked = clips.exam(settings.limit or 2000, level, seed=settings.seed)
    device = torch.device(settings.device)
    model = model.to(device=device, dtype=settings.torch_dtype)
    return VideoSubject(
        model, processor, ClipSet(f"clips ({level})", asked), settings.model, settings.batch, device=device,  # type: ignore[arg-type]
        dtype=settings.torch_dtype,
    )  # fmt: skip


@dataclass(eq=False)
class VideoSubject(Subject):
    """A model that answers questions, on clips. Answers are log-probabilities, one row per question."""

    unit: ClassVar[str] = "clips"
    call: ClassVar[str] = "model(pixel_values)"

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise SubjectError(f"batch={self.batch}: a batch holds at least one clip")

    @property
    def known(self) -> Clips:
        return self.data.clips  # type: ignore[attr-defined]

    @property
    def classes(self) -> int:
        return sum(len(answers) for answers in QUESTIONS.values())

    @property
    def classifies(self) -> bool:
        return True

    @property
    def score(self) -> str:
        return "accuracy"

    @cached_property
    def grid(self) -> tuple[int, ...]:  # type: ignore[override]
        """Patches along time, height and width."""
        return clips.GRID

    def length(self, index: int) -> int:
        return self.host.prefix + math.prod(self.grid)

    def default_methods(self, *, all: bool = True) -> list[str]:
        return list(DEFAULT)

    def pixels(self, index: int) -> Tensor:
        """Batch `index`, (B, T, C, H, W)."""
        processor: Processor = self.processor  # type: ignore[assignment]
        part = self.known.pixels[index * self.batch : (index + 1) * self.batch]
        return processor.normalise(part[:, :, None]).to(self.device, self.dtype)

    def answer(self, model: nn.Module, pixels: Tensor) -> Tensor:
        """(B * Q, most answers) float32 log-probabilities."""
        logits = model(pixels).logits.float()
        sizes = [len(answers) for answers in QUESTIONS.values()]
        out = logits.new_full((len(logits), len(sizes), max(sizes)), NOTHING)
        for q, part in enumerate(logits.split(sizes, -1)):
            out[:, q, : part.shape[-1]] = part.log_softmax(-1)
        return out.flatten(0, 1)

    def hits(self, answers: Tensor) -> np.ndarray:
        """(N * Q,) bool: which questions are answered rightly, clip by clip."""
        right = answers.argmax(-1) == self.known.answers.flatten()
        return (right & answers.isfinite().all(-1)).numpy()


class VideoBench(_Bench):
    """The questions by themselves, and the probes, in a row's scores."""

    SPREAD = _Bench.SPREAD + "; items: the questions about each clip"
    subject: VideoSubject

    def measured(self, row: Row, form: str, method: Reducer | None) -> Row:
        row = super().measured(row, form, method)
        subject = self.subject
        hits = stats.unpack_hits(row.hits, row.n).reshape(len(subject.known), len(QUESTIONS))
        plain = subject.hits(self.reference()).reshape(hits.shape)
        for q, question in enumerate(QUESTIONS):
            change = None if method is None else stats.paired_difference(hits[:, q], plain[:, q])
            row.scores.append(Score(question, stats.share(hits[:, q]), change, len(hits)))
        if method is not None:
            self._probe(row, method)
        return row

    def _probe(self, row: Row, method: Reducer) -> None:
        """Which tokens of what moves, and of the bag, have a row of their own at the end."""
        subject, shares = self.subject, {"motion": list[Tensor](), "flash": list[Tensor]()}
        known = {"motion": subject.known.moving().flatten(1), "flash": subject.known.flashed().flatten(1)}
        count = min(subject.batches, -(-PROBED // subject.batch))
        with self.applied(row, subject.twin, method, execution=self.execution) as session:
            for index in range(count):
                self._answer(subject.twin, subject.pixels(index))
                kept = session.last.kept(len(subject.host.blocks) - 1).cpu() - subject.host.prefix
                own = torch.zeros(len(kept), math.prod(subject.grid) + 1, dtype=torch.bool)
                own.scatter_(1, kept.masked_fill(kept < 0, own.shape[1] - 1), True)
                for name, whole in known.items():
                    there = whole[index * subject.batch :][: len(kept)]
                    share = (own[:, :-1] & there).sum(1) / there.sum(1).clamp(min=1)
                    shares[name].append(share[there.any(1)])
        for name, parts in shares.items():
            values = torch.cat(parts).numpy()
            row.scores.append(Score(name, stats.mean(values), None, len(values)))


def run(
    settings: Settings, out: Any, *, watch: Any = None, picture: Any = None, subject: VideoSubject | None = None
) -> list[Row]:
    """Measure everything, the unreduced model first; see `Runner.run`. picture: as in `bench.run`."""
    from .bench import _methods
    from .runner import with_control

    subject = subject or load(settings)
    return VideoBench(settings, subject, watch, picture).run(with_control(_methods(settings, subject)), out)
