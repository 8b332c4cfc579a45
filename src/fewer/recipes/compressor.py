"""Train the encoder of LLMLingua-2: which words of a text must stay, learned from a larger language model.

report = train(Distilling(), "out")              # a token classifier with its tokenizer, a log, a report
Compressor("llmlingua2", model="out")            # shortens texts with it

The paper's labels are words that GPT-4 left when asked to shorten. A language model of half a billion parameters does
not do that well, but it says well how likely words are; so the label here is a word's worth to a reader who has to
restore the text: how much likelier the word gets when the draft that the reader sees holds it. Half of the words,
drawn at random, make one draft and the other half another, so that two passes weigh all words of a text, each given
what stands on either side of it. Surprisal, which LLMLingua ranks by, sees the left side alone.

Source: LLMLingua-2, arXiv:2403.12968, sec. 3 and 4, for the student; the teacher departs from it as said.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewer.core.settings import Settings
from fewer.datasets.texts import book
from fewer.models.zoo import load_model
from fewer.recipes.loop import At, Folder, Loop, decayed, shuffled

__all__ = ["Distilling", "Report", "Weighed", "passages", "train", "weigh"]

RESTORE = "\n\nThe same text in full:\n"
Span = tuple[int, int]


@dataclass(frozen=True)
class Distilling(Settings):
    """Everything a run depends on.

    teacher, student, text   as in `load_model` and `texts.book`; the student is an encoder
    passages     texts that are weighed, of `words` words each, spread evenly over the book; the last tenth is held out
    layers       of the student, counted from the last, that learn with the head; the others stay as they are
    steps        updates, of `batch` passages each. lr: AdamW's peak rate, of the head ten times as much
    bfloat16     the teacher's weights, and products while training, are bfloat16. seed: of all draws. threads: None
                 leaves them
    """

    teacher: str = "qwen2.5-coder-0.5b"
    student: str = "minilm"
    text: str = "state-of-the-union"
    passages: int = 1000
    words: int = 150
    layers: int = 2
    steps: int = 400
    batch: int = 16
    lr: float = 1e-4
    warmup: float = 0.1
    weight_decay: float = 0.01
    bfloat16: bool = True
    seed: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        least = {"passages": 10, "words": 8, "layers": 0, "steps": 1, "batch": 1}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise ValueError(f"Distilling({name}={getattr(self, name)}): must be at least {number}")


@dataclass(frozen=True)
class Weighed:
    """A text and its words. spans: of characters; worth: (words,) float32, nats per token that a reader loses without
    the word."""

    text: str
    spans: tuple[Span, ...]
    worth: Tensor

    @property
    def rank(self) -> Tensor:
        """(words,) float32, from 0 for the word of the least worth to 1: what the student learns, so that one student
        serves all rates."""
        return self.worth.argsort().argsort().float() / max(1, len(self.worth) - 1)


@dataclass(frozen=True)
class Report:
    """On held-out passages: the share of all worth that stays when half of the words do (`kept`, by the student's
    choice; `surprising`, by the teacher's surprisal without a draft, LLMLingua's measure for words; `drawn`,
    by chance; `best`, by worth itself), and the rank correlation of the student with it. learning: parameters that
    learned. weighed: passages. seconds: training alone."""

    learning: int
    weighed: int
    kept: float
    surprising: float
    drawn: float
    best: float
    correlation: float
    seconds: float


def passages(whole: str, count: int, words: int) -> list[str]:
    """Runs of so many words, from the beginning of a sentence on, spread evenly over a text and never overlapping."""
    starts = [0, *(m.end() for m in re.finditer(r"[.!?]\s+(?=[A-Z])", whole))]
    found: list[str] = []
    end = 0
    for start in starts:
        if start < end:
            continue
        match = re.compile(rf"(?:\S+\s+){{{words - 1}}}\S+").match(whole, start)
        if match is None:
            break
        found.append(" ".join(match[0].split()))
        end = match.end()
    if len(found) < count:
        raise ValueError(f"the text has {len(found)} passages of {words} words, asked for are {count}")
    return [found[i] for i in torch.linspace(0, len(found) - 1, count).long().tolist()]


# -- the teacher -------------------------------------------------------------------------------------------------------
@torch.inference_mode()
def weigh(text: str, model: nn.Module, tokenizer: Any, draw: torch.Generator) -> Weighed:
    """What each word of a text is worth to a causal language model that restores it from half of the words."""
    spans = tuple(m.span() for m in re.finditer(r"\S+", text))
    first = torch.zeros(len(spans), dtype=torch.bool)
    first[torch.randperm(len(spans), generator=draw)[: len(spans) // 2]] = True
    with_, without = (torch.zeros(len(spans)) for _ in range(2))
    for there in (first, ~first):
        draft = " ".join(text[a:b] for (a, b), stays in zip(spans, there.tolist(), strict=True) if stays)
        nats = _by_word(draft + RESTORE, text, spans, model, tokenizer)
        with_, without = torch.where(there, nats, with_), torch.where(there, without, nats)
    return Weighed(text, spans, without - with_)


@torch.inference_mode()
def surprise(text: str, spans: Sequence[Span], model: nn.Module, tokenizer: Any) -> Tensor:
    """(words,) float32: the mean surprisal of each word's tokens, given what stands before it."""
    return _by_word(RESTORE, text, spans, model, tokenizer)


def _by_word(front: str, text: str, spans: Sequence[Span], model: nn.Module, tokenizer: Any) -> Tensor:
    """(words,) float32: nats per token of each word of a text, behind a front of one token or more."""
    before = tokenizer(front, add_special_tokens=False)["input_ids"]
    given = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = torch.tensor([[*before, *given["input_ids"]]], device=next(model.parameters()).device)
    logits = model(input_ids=ids, logits_to_keep=ids.shape[1] - len(before) + 1).logits[0, :-1]
    nats = F.cross_entropy(logits.float(), ids[0, len(before) :], reduction="none").cpu()
    word = words_of(given["offset_mapping"], spans)
    inside = word >= 0
    total = torch.zeros(len(spans)).index_add_(0, word[inside], nats[inside])
    return total / torch.bincount(word[inside], minlength=len(spans)).clamp(min=1)


def words_of(offsets: Sequence[Span], spans: Sequence[Span]) -> Tensor:
    """(tokens,) long: the word that each token ends in, -1 for none. Both ascend."""
    found, at = [], 0
    for start, stop in offsets:
        while at < len(spans) and spans[at][1] < stop:
            at += 1
        found.append(at if stop > start and at < len(spans) and spans[at][0] < stop else -1)
    return torch.tensor(found, dtype=torch.long)


# -- the student -------------------------------------------------------------------------------------------------------
def train(
    recipe: Distilling, out: str | Path, *, teacher: tuple[nn.Module, Any] | None = None,
    student: tuple[nn.Module, Any] | None = None, texts: Sequence[str] | None = None,
    log: Callable[[str], None] = print,
) -> Report:  # fmt: skip
    """Weigh passages, train the student on them, and save it as a token classifier of two labels.

    teacher, student   instead of loading those named, each with its tokenizer. texts: instead of passages of the book
    """
    folder = Folder(out, recipe, log, every=4)
    texts = passages(book(recipe.text), recipe.passages, recipe.words) if texts is None else texts
    if len(texts) < 2:
        raise ValueError(f"{len(texts)} texts: give one to learn from and one to hold out, or more")
    dtype = torch.bfloat16 if recipe.bfloat16 else None
    judge, read = load_model(recipe.teacher, dtype=dtype) if teacher is None else teacher
    draw = torch.Generator().manual_seed(recipe.seed)
    weighed = []
    for number, text in enumerate(texts, 1):
        weighed.append(weigh(text, judge, read, draw))
        if number % 100 == 0:
            log(f"{number} of {len(texts)} passages are weighed")
    held = weighed[-max(1, len(weighed) // 10) :]
    surprising = [surprise(one.text, one.spans, judge, read) for one in held]
    body, tokenizer = load_model(recipe.student) if student is None else student
    tagger = _tagger(body, recipe.layers)
    examples = [_example(one, tokenizer) for one in weighed[: -len(held)]]
    learning = [p for p in tagger.parameters() if p.requires_grad]

    def batches() -> Iterator[list[tuple[Tensor, Tensor]]]:
        for some in shuffled(len(examples), recipe.batch):
            yield [examples[i] for i in some.tolist()]

    def loss(batch: list[tuple[Tensor, Tensor]], at: At) -> dict[str, Any]:
        ids, mask, wanted = _padded(batch, next(tagger.parameters()).device)
        with at.autocast():
            logits = tagger(input_ids=ids, attention_mask=mask).logits
        p = logits.float().log_softmax(-1)
        target = torch.stack([1 - wanted, wanted], -1)
        return {"loss": -(target * p).sum(-1)[wanted >= 0].mean()}

    head = {id(p) for p in tagger.classifier.parameters()}
    groups = decayed([p for p in learning if id(p) not in head], recipe.weight_decay)
    groups.append({"params": [p for p in learning if id(p) in head], "lr": 10 * recipe.lr})
    optimiser = torch.optim.AdamW(groups, lr=recipe.lr)
    tagger.train()
    rows = Loop(recipe.steps, recipe.warmup, bfloat16=recipe.bfloat16).run(tagger, [optimiser], batches(), loss, folder)
    tagger.eval()
    tagger.save_pretrained(folder.path)
    tokenizer.save_pretrained(folder.path)
    chosen = [_wanted(one, tagger, tokenizer) for one in held]
    worth = [one.worth for one in held]
    report = Report(
        sum(p.numel() for p in learning), len(weighed), _mean(map(captured, chosen, worth)),
        _mean(map(captured, surprising, worth)),
        _mean(captured(torch.rand(len(one), generator=draw), one) for one in worth),
        _mean(map(captured, worth, worth)), _mean(map(correlation, chosen, worth)), rows[-1]["seconds"],
    )  # fmt: skip
    folder.finish(report)
    return report


def captured(score: Tensor, worth: Tensor) -> float:
    """The share of all worth, counted where it is positive, that words of the higher half of the scores have."""
    top = score.topk(len(score) // 2).indices
    positive = worth.clamp(min=0)
    return float(positive[top].sum() / positive.sum().clamp(min=1e-9))


def correlation(score: Tensor, worth: Tensor) -> float:
    """Spearman's, without regard to ties."""
    a, b = (x.argsort().argsort().float() for x in (score, worth))
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def _tagger(body: nn.Module, layers: int) -> Any:
    """A classifier of two labels on an encoder, whose last layers learn. Raises ValueError if it lacks such."""
    from transformers import AutoModelForTokenClassification

    config: Any = body.config
    config = type(config).from_dict({**config.to_dict(), "num_labels": 2})
    tagger: Any = AutoModelForTokenClassification.from_config(config)
    inner = tagger.base_model
    inner.load_state_dict(body.state_dict(), strict=False)  # a pooler is not needed
    stack = getattr(getattr(inner, "encoder", inner), "layer", None)
    if stack is None or layers > len(stack):
        raise ValueError(
            f"layers={layers}: {type(inner).__name__} has {0 if stack is None else len(stack)} that can learn"
        )
    inner.requires_grad_(False)
    for block in stack[len(stack) - layers :]:
        block.requires_grad_(True)
    return tagger


def _example(one: Weighed, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """(n,) long, the ids; (n,) float32, what each token shall be given for staying, -1 for what stands around."""
    ids, word = _read(one, tokenizer)
    return ids, torch.where(word >= 0, one.rank[word.clamp(min=0)], -1.0)


def _read(one: Weighed, tokenizer: Any) -> tuple[Tensor, Tensor]:
    given = tokenizer(one.text, return_offsets_mapping=True, truncation=True, max_length=512)
    return torch.tensor(given["input_ids"]), words_of(given["offset_mapping"], one.spans)


def _padded(batch: Sequence[tuple[Tensor, Tensor]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    ids, wanted = zip(*batch, strict=True)
    rows = nn.utils.rnn.pad_sequence(list(ids), batch_first=True).to(device)
    lengths = torch.tensor([len(one) for one in ids], device=device)
    mask = (torch.arange(rows.shape[1], device=device) < lengths[:, None]).long()
    return rows, mask, nn.utils.rnn.pad_sequence(list(wanted), batch_first=True, padding_value=-1.0).to(device)


@torch.inference_mode()
def _wanted(one: Weighed, tagger: Any, tokenizer: Any) -> Tensor:
    """(words,) float32: the student's score of each word, the mean over its tokens; 0 for one that was cut off."""
    ids, word = _read(one, tokenizer)
    device = next(tagger.parameters()).device
    stays = tagger(input_ids=ids[None].to(device)).logits[0].float().softmax(-1)[:, 1].cpu()
    inside = word >= 0
    total = torch.zeros(len(one.spans)).index_add_(0, word[inside], stays[inside])
    return total / torch.bincount(word[inside], minlength=len(one.spans)).clamp(min=1)


def _mean(values: Any) -> float:
    found = list(values)
    return sum(found) / len(found)
