"""Train a text classifier: a small BERT from nothing, or a pretrained encoder with a new head.

    report = train("out")                                           # the packaged bert-eras
    report = train("out", recipe=MINILM)                            # all-MiniLM-L6 on Reuters R8

Long texts are cut into windows, from another place in every epoch; a part of the steps can be spent on short windows,
which cost less. A small model gets its own WordPiece vocabulary. Matrices inside the blocks of a new model are stepped
by Muon, as in `classify`; a pretrained one is fine-tuned with AdamW, the head at a higher rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    PreTrainedTokenizerBase,
)

from fewer.datasets.texts import Encoded, TextSet, load
from fewer.models.zoo import load_model
from fewer.recipes.loop import At, Folder, Loop, buckets, muon_and_adamw

from .classify import FLOAT32_ATTENTION

__all__ = ["MINILM", "Recipe", "Report", "accuracy", "build", "train", "vocabulary"]


@dataclass(frozen=True)
class Recipe:
    """Everything a run depends on besides the data; the defaults made the packaged bert-eras.

    base: a model for `load_model`, whose encoder and tokenizer are kept; "" = a new BERT with its own vocabulary.
    data, test: names for `texts.load`: what is trained on, and what is tested on.
    phases: (share of the steps, tokens in a window, [CLS] and [SEP] included), in order; the shares add up to 1.
    steps: updates. tokens: in a batch, at most; a batch holds tokens // window windows.
    windows: whether a text longer than the window is used in all its parts; else its beginning.
    lr: peak rate of Muon (new models: matrices in the blocks). lr_rest: AdamW, new models: everything else;
        pretrained: the head. lr_base: AdamW, the pretrained weights.
    mask: share of the words shown as [MASK] in training. dropout: of hidden states and attention.
    vocabulary, width, depth, heads, length: the new model; length: positions it knows.
    bfloat16: multiply in bfloat16 outside attention, as in `classify.Recipe`.
    half: store the weights in float16, and test them so rounded.
    seed: initial weights, order, windows, masks. threads: torch threads; None leaves them.
    """

    base: str = ""
    data: str = "addresses"
    test: str = "eras"
    phases: tuple[tuple[float, int], ...] = ((0.6, 64), (0.4, 256))
    steps: int = 1800
    tokens: int = 4096
    windows: bool = True
    lr: float = 3e-3
    lr_rest: float = 2e-3
    lr_base: float = 1e-4
    weight_decay: float = 0.05
    warmup: float = 0.05
    smoothing: float = 0.1
    mask: float = 0.15
    dropout: float = 0.1
    vocabulary: int = 6144
    width: int = 128
    depth: int = 6
    heads: int = 4
    length: int = 256
    bfloat16: bool = True
    half: bool = True
    seed: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        if not math.isclose(sum(share for share, _ in self.phases), 1.0):
            raise ValueError(f"Recipe(phases={self.phases}): the shares of the steps must add up to 1")
        if not all(2 < window <= self.length for _, window in self.phases):
            raise ValueError(f"Recipe(phases={self.phases}): windows have 3 to length={self.length} tokens")
        if self.steps < 1 or self.tokens < max(window for _, window in self.phases):
            raise ValueError(
                f"Recipe(steps={self.steps}, tokens={self.tokens}): at least one step, of at least one whole window"
            )


MINILM = Recipe(
    base="minilm",
    data="reuters-r8",
    test="reuters-r8",
    phases=((1.0, 256),),
    steps=300,
    windows=False,
    lr_rest=1e-3,
    mask=0.0,
    smoothing=0.0,
    half=False,
)
"""all-MiniLM-L6 (6 layers of width 384) fine-tuned on eight kinds of newswire."""


@dataclass(frozen=True)
class Report:
    """What a run came to. accuracy: share of all test texts, all tokens. seconds: training alone."""

    accuracy: float
    test_texts: int
    steps: int
    seconds: float
    parameters: int


def vocabulary(texts: Sequence[str], size: int, *, length: int = 256) -> BertTokenizer:
    """A lower-cased WordPiece tokenizer of at most `size` entries, learnt from `texts`; [PAD] is 0."""
    from tokenizers import BertWordPieceTokenizer

    learner = BertWordPieceTokenizer(lowercase=True)
    learner.train_from_iterator(texts, vocab_size=size, min_frequency=3, show_progress=False)
    return BertTokenizer(vocab=learner.get_vocab(), do_lower_case=True, model_max_length=length)


def build(
    recipe: Recipe, classes: tuple[str, ...], tokenizer: PreTrainedTokenizerBase
) -> BertForSequenceClassification:
    """A fresh BERT whose matrices start at a scale that suits its width; the head starts at zero."""
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        num_hidden_layers=recipe.depth,
        num_attention_heads=recipe.heads,
        intermediate_size=4 * recipe.width,
        max_position_embeddings=recipe.length,
        type_vocab_size=1,
        hidden_dropout_prob=recipe.dropout,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
        id2label=dict(enumerate(classes)),
        label2id={name: label for label, name in enumerate(classes)},
    )
    model = BertForSequenceClassification(config)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(model.classifier.weight)
    return model


def train(
    out: str | Path,
    *,
    steps: int | None = None,
    seed: int | None = None,
    threads: int | None = None,
    recipe: Recipe | None = None,
    data: tuple[TextSet, TextSet] | None = None,
    log: Callable[[str], None] = print,
) -> Report:
    """Train a classifier and save it where `fewer.models.zoo.load_model(out)` reads it.

    out: folder for the weights, the tokenizer, log.jsonl and report.json.
    steps, seed, threads: change these fields of `recipe` (default `Recipe()`).
    data: (train, test) sets instead of the recipe's. log: receives a line every 25 steps and the result.
    Nothing is chosen by the test set: it is tried once, at the end.
    """
    changes: dict[str, Any] = {"steps": steps, "seed": seed, "threads": threads}
    recipe = replace(recipe or Recipe(), **{name: value for name, value in changes.items() if value is not None})
    folder = Folder(out, recipe, log)
    out = folder.path
    train_set, test_set = data or (load(recipe.data, split="train"), load(recipe.test))
    model, tokenizer = _start(recipe, train_set, folder)
    tokenizer.model_max_length = recipe.phases[-1][1]
    tokenizer.save_pretrained(out)  # now, for it remembers how it was last asked to cut
    model.set_attn_implementation(FLOAT32_ATTENTION)
    model.train()
    ids = tokenizer(list(train_set.texts), add_special_tokens=False, verbose=False)["input_ids"]
    ends = [round(share * recipe.steps) for share in accumulate(share for share, _ in recipe.phases)]

    def batches() -> Iterator[dict[str, Tensor]]:
        for first, end, (_, window) in zip([0, *ends], ends, recipe.phases, strict=False):
            yield from islice(_batches(ids, train_set.labels, tokenizer, window, recipe), end - first)

    def loss(batch: dict[str, Tensor], at: At) -> dict[str, Any]:
        labels = batch["labels"]
        with at.autocast():
            logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        wrong = F.cross_entropy(logits.float(), labels, label_smoothing=recipe.smoothing)
        window = next(w for end, (_, w) in zip(ends, recipe.phases, strict=True) if at.step < end)
        return {"loss": wrong, "right": (logits.argmax(-1) == labels).float().mean(), "window": window}

    loop = Loop(recipe.steps, recipe.warmup, bfloat16=recipe.bfloat16)
    lines = loop.run(model, _optimizers(model, recipe), batches(), loss, folder)
    model.set_attn_implementation("sdpa")
    if recipe.half:
        model.half().float()
    report = Report(
        accuracy=round(accuracy(model, Encoded.of(test_set, tokenizer, length=recipe.phases[-1][1])), 4),
        test_texts=len(test_set),
        steps=recipe.steps,
        seconds=lines[-1]["seconds"],
        parameters=sum(p.numel() for p in model.parameters()),
    )
    log(f"accuracy {report.accuracy:.4f} of {report.test_texts:,} texts")
    (model.half() if recipe.half else model).save_pretrained(out)
    folder.finish(report)
    return report


@torch.inference_mode()
def accuracy(model: nn.Module, data: Encoded, *, batch: int = 32) -> float:
    """Share of the texts whose highest logit is their label, with the model in evaluation mode."""
    model.eval()
    right = 0
    for indices in data.batches(batch):
        given = data.batch(indices)
        labels = given.pop("labels")
        right += int((model(**given).logits.argmax(dim=-1) == labels).sum())
    return right / len(data)


def _start(recipe: Recipe, data: TextSet, folder: Folder) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model to train and its tokenizer: learning one again would number its entries otherwise."""
    if not recipe.base:
        kept = BertTokenizer.from_pretrained(folder.out) if folder.goes_on else None
        tokenizer = kept or vocabulary(data.texts, recipe.vocabulary, length=recipe.length)
        return build(recipe, data.classes, tokenizer), tokenizer
    base: Any
    base, tokenizer = load_model(recipe.base)
    config = base.config
    config.id2label = dict(enumerate(data.classes))
    config.label2id = {name: label for label, name in enumerate(data.classes)}
    config.hidden_dropout_prob, config.attention_probs_dropout_prob = recipe.dropout, 0.0
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    encoder = getattr(base, base.base_model_prefix, base)
    getattr(model, model.base_model_prefix).load_state_dict(encoder.state_dict())
    return model, tokenizer


def _optimizers(model: Any, recipe: Recipe) -> list[torch.optim.Optimizer]:
    encoder = getattr(model, model.base_model_prefix)
    if recipe.base:
        inside = {id(p) for p in encoder.parameters()}
        groups = [
            {"params": list(encoder.parameters()), "lr": recipe.lr_base},
            {"params": [p for p in model.parameters() if id(p) not in inside], "lr": recipe.lr_rest},
        ]
        return [torch.optim.AdamW(groups, lr=recipe.lr_base, weight_decay=0.01, fused=True)]
    return muon_and_adamw(recipe, [encoder.encoder], [(1.0, model.parameters())])


def _batches(
    ids: Sequence[Sequence[int]], labels: Tensor, tokenizer: PreTrainedTokenizerBase, window: int, recipe: Recipe
) -> Iterator[dict[str, Tensor]]:
    """Batches without end, of windows of about equal lengths, in a new order and cut anew in every epoch."""
    size = recipe.tokens // window
    classes = labels.tolist()
    while True:
        pieces = []
        for text, label in zip(ids, classes, strict=True):
            for first in _cuts(len(text), window - 2, recipe.windows):
                pieces.append((text[first : first + window - 2], label))
        for group in buckets([len(piece) for piece, _ in pieces], size, 16):
            chosen = [pieces[j] for j in group]
            rows = [torch.tensor([tokenizer.cls_token_id, *piece, tokenizer.sep_token_id]) for piece, _ in chosen]
            batch = Encoded(rows, torch.tensor([label for _, label in chosen]), tokenizer.pad_token_id).batch()
            if recipe.mask:
                hidden = (torch.rand(batch["input_ids"].shape) < recipe.mask) & batch["attention_mask"].bool()
                hidden[:, 0] = False
                batch["input_ids"][hidden] = tokenizer.mask_token_id
            yield batch


def _cuts(n: int, window: int, everywhere: bool) -> range:
    """Where windows of a text of n tokens begin; those cut short at either end are left out."""
    if n <= window or not everywhere:
        return range(0, 1)
    return range(int(torch.randint(min(window, n - window + 1), ())), n - window + 1, window)
