"""Small scenes of real pictures, and questions about them whose answers and whereabouts are known exactly.

    asked = exam(500)                            # 500 questions of each kind, on pictures held out from training
    asked[0].text, asked[0].answer               # 'is there a bag ?', 'no'
    given = batch(asked[:32], processor)         # of load_model("llava-scenes")
    model(**given.inputs).logits[:, -1].argmax(-1) == given.answers

A scene is 96 x 96 pixels: two to five pictures of Fashion-MNIST, tinted, each somewhere in its own ninth of a noisy
background among grey clutter. Things come in outfits, so that some go together more often than others. Every answer
is one word. Scenes of the split "train" are made of training pictures only, those of "test" of the test pictures in
the package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from fewer.datasets.images import DataError, embedded, fashion_mnist

__all__ = [
    "COLOURS",
    "FORMS",
    "GRID",
    "KINDS",
    "NOUNS",
    "REGIONS",
    "SIZE",
    "Batch",
    "Question",
    "Scene",
    "Split",
    "Thing",
    "answered",
    "ask",
    "batch",
    "company",
    "compose",
    "exam",
    "examine",
    "scene",
    "words",
]

Split = Literal["train", "test"]
T = TypeVar("T")

SIZE, PATCH = 96, 8
"""Pixels of a scene's side, and of the side of a patch."""
GRID = SIZE // PATCH
"""Patches along a side: 12, so 144 in a scene."""
CELL, SPRITE = 32, 28
"""Pixels of the side of a region, and of a picture in it."""

NOUNS: Mapping[str, int] = {
    "shirt": 0, "trouser": 1, "pullover": 2, "dress": 3, "sandal": 5, "sneaker": 7, "bag": 8, "boot": 9,
}  # fmt: skip
"""What things are called, and their label in Fashion-MNIST; its Coat and Shirt look too much like others."""
PLURALS = {"dress": "dresses"} | {noun: noun + "s" for noun in NOUNS if noun != "dress"}
COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (230, 45, 40),
    "green": (45, 190, 60),
    "blue": (60, 90, 245),
    "yellow": (235, 215, 45),
    "purple": (180, 65, 215),
    "white": (240, 240, 240),
}
REGIONS = (
    "top-left", "top", "top-right", "left", "center", "right", "bottom-left", "bottom", "bottom-right",
)  # fmt: skip
"""The ninths of a scene, row by row."""
NUMBERS = ("zero", "one", "two", "three", "four", "five")
OUTFITS = (("shirt", "trouser", "sneaker"), ("dress", "sandal", "bag"), ("pullover", "trouser", "boot"))
OUTFIT_WEIGHTS = (0.4, 0.3, 0.3)
STRAY, REPEAT = 0.25, 0.3
"""Chance that a thing is of any kind instead of the outfit's, and that it repeats the noun of an earlier one."""

KINDS = ("presence", "place", "count", "colour", "compare")
FORMS: Mapping[str, tuple[str, ...]] = {
    "presence": ("present", "random", "popular", "adversarial"),
    "place": ("what", "where"),
    "count": ("noun", "colour"),
    "colour": ("noun", "region"),
    "compare": ("which", "both", "more"),
}
"""Of each kind of question. presence: what is asked for is there, or absent: drawn evenly, or among the most frequent
nouns, or the one that most often comes with what is there (POPE, arXiv:2305.10355)."""


@dataclass(frozen=True)
class Thing:
    """One picture in a scene. top, left: of its box, in pixels; the box is SPRITE pixels wide and high.

    picture: its number among the split's pictures of that noun.
    """

    noun: str
    colour: str
    region: str
    top: int
    left: int
    picture: int


@dataclass(frozen=True, eq=False)
class Scene:
    """pixels: (96, 96, 3) uint8. patches: (things, 144) bool, the patches a thing shows in, row by row."""

    things: tuple[Thing, ...]
    pixels: np.ndarray
    patches: np.ndarray

    def having(self, noun: str, colour: str | None = None) -> list[int]:
        """Numbers of the things with these features: having(noun="bag", colour="red")."""
        return [i for i, t in enumerate(self.things) if noun == t.noun and colour in (None, t.colour)]


@dataclass(frozen=True, eq=False)
class Question:
    """One question about one scene, or two, and its answer, one word.

    kind, form: as in FORMS. about: (scene, thing) of every thing the answer depends on; none where nothing is there.
    """

    kind: str
    form: str
    text: str
    answer: str
    scenes: tuple[Scene, ...]
    about: tuple[tuple[int, int], ...]

    @property
    def prompt(self) -> str:
        """What the model reads: one <image> per scene, then the question."""
        return "<image> " * len(self.scenes) + self.text

    def patches(self) -> np.ndarray:
        """(scenes, 144) bool: the patches of the things it is about."""
        marked = np.zeros((len(self.scenes), GRID * GRID), bool)
        for image, thing in self.about:
            marked[image] |= self.scenes[image].patches[thing]
        return marked


# -- scenes -------------------------------------------------------------------------------------------------------
@cache
def sprites(split: Split) -> dict[str, np.ndarray]:
    """The split's pictures of each noun: (N, 28, 28) uint8, 0 is blank."""
    if split not in ("train", "test"):
        raise DataError(f"scenes are of the split train or test, not {split!r}")
    data = embedded() if split == "test" else fashion_mnist("train")
    pictures, labels = np.asarray(data.pictures), data.labels.numpy()
    return {noun: pictures[labels == label] for noun, label in NOUNS.items()}


def outfit(rng: np.random.Generator, count: int) -> list[str]:
    """Nouns of `count` things that could be seen together."""
    usual = OUTFITS[rng.choice(len(OUTFITS), p=OUTFIT_WEIGHTS)]
    nouns: list[str] = []
    for _ in range(count):
        if nouns and rng.random() < REPEAT:
            nouns.append(nouns[rng.integers(len(nouns))])
        else:
            among = tuple(NOUNS) if rng.random() < STRAY else usual
            nouns.append(among[rng.integers(len(among))])
    return nouns


@cache
def company() -> tuple[np.ndarray, np.ndarray]:
    """How often nouns are seen: (8,), share of the scenes with each; (8, 8), [a, b] = share with b among those with a.

    Counted over 20,000 fixed draws."""
    rng, names = np.random.default_rng(0), list(NOUNS)
    seen = np.zeros((20_000, len(names)))
    for row in seen:
        row[[names.index(noun) for noun in outfit(rng, int(rng.integers(2, 6)))]] = 1
    return seen.mean(0), (seen.T @ seen) / seen.sum(0)[:, None]


def scene(rng: np.random.Generator, split: Split = "test", count: int | None = None) -> Scene:
    """A new scene of `count` things; None draws 2 to 5. The same generator state gives the same scene."""
    count = int(rng.integers(2, 6)) if count is None else count
    if not 1 <= count <= len(REGIONS):
        raise DataError(f"a scene holds 1 to {len(REGIONS)} things, one in each region, not {count}")
    pictures = sprites(split)
    things = []
    for noun, cell in zip(outfit(rng, count), rng.permutation(len(REGIONS))[:count], strict=True):
        top, left = np.array(divmod(int(cell), 3)) * CELL + rng.integers(0, CELL - SPRITE + 1, 2)
        colour = tuple(COLOURS)[rng.integers(len(COLOURS))]
        things.append(Thing(noun, colour, REGIONS[cell], int(top), int(left), int(rng.integers(len(pictures[noun])))))
    return compose(things, rng, split)


def compose(things: Sequence[Thing], rng: np.random.Generator, split: Split = "test") -> Scene:
    """A scene of these things, later ones in front; background, clutter and shades are drawn.

    For scenes of one's own making, such as one bag many times. Raises DataError where a box leaves the scene."""
    pictures = sprites(split)
    for thing in things:
        if not (0 <= thing.top <= SIZE - SPRITE and 0 <= thing.left <= SIZE - SPRITE):
            raise DataError(f"{thing}: top and left must lie in 0 to {SIZE - SPRITE}, or it sticks out of the scene")
    canvas = _background(rng)
    _clutter(canvas, rng, pictures)
    patches = np.zeros((len(things), GRID * GRID), bool)
    for number, thing in enumerate(things):
        grey = pictures[thing.noun][thing.picture].astype(np.float32) / 255
        cover = np.minimum(grey * 6, 1)[..., None]  # blank pixels let the background through
        tint = np.asarray(COLOURS[thing.colour], np.float32) + rng.uniform(-12, 12, 3).astype(np.float32)
        place = canvas[thing.top : thing.top + SPRITE, thing.left : thing.left + SPRITE]
        place += cover * (tint * (0.35 + 0.65 * grey[..., None]) - place)
        whole = np.zeros((SIZE, SIZE), bool)
        whole[thing.top : thing.top + SPRITE, thing.left : thing.left + SPRITE] = cover[..., 0] > 0.5
        shown = whole.reshape(GRID, PATCH, GRID, PATCH).sum(axis=(1, 3))
        patches[number] = (shown >= PATCH).ravel()  # an eighth of a patch's pixels
    return Scene(tuple(things), canvas.clip(0, 255).astype(np.uint8), patches)


def _background(rng: np.random.Generator) -> np.ndarray:
    """A dark gradient with coarse and fine noise: (96, 96, 3) float32."""
    one, other = rng.uniform(15, 80) + rng.uniform(-12, 12, (2, 3))
    angle, line = rng.uniform(0, 2 * np.pi), np.linspace(-0.5, 0.5, SIZE)
    share = (0.5 + 0.7 * (np.cos(angle) * line[:, None] + np.sin(angle) * line)).clip(0, 1)[..., None]
    coarse = np.kron(rng.normal(0, 6, (GRID * 2, GRID * 2)), np.ones((PATCH // 2, PATCH // 2)))
    fine = rng.standard_normal((SIZE, SIZE), np.float32) * 6
    return (one + (other - one) * share + (coarse + fine)[..., None]).astype(np.float32)


def _clutter(canvas: np.ndarray, rng: np.random.Generator, pictures: dict[str, np.ndarray]) -> None:
    """Grey scraps of pictures, 6 to 11 pixels wide, anywhere."""
    names = list(pictures)
    for _ in range(int(rng.integers(5, 13))):
        of = pictures[names[rng.integers(len(names))]]
        side = int(rng.integers(6, 12))
        y, x, top, left = rng.integers(0, [SPRITE - side, SPRITE - side, SIZE - side, SIZE - side])
        scrap = of[rng.integers(len(of)), y : y + side, x : x + side].astype(np.float32)
        canvas[top : top + side, left : left + side] += (scrap * rng.uniform(0.2, 0.45))[..., None]


# -- questions ----------------------------------------------------------------------------------------------------
def ask(kind: str, scenes: Sequence[Scene], rng: np.random.Generator, form: str | None = None) -> Question | None:
    """A question of this kind about the scenes (two for "compare", else one); None where they allow none.

    form: one of FORMS[kind]; None draws one, "presence" as often there as not. Training takes absent nouns evenly, so
    leave "popular" and "adversarial" to tests. Raises DataError for an unknown kind or form, or another number of
    scenes.
    """
    if kind not in FORMS or (form is not None and form not in FORMS[kind]):
        raise DataError(f"no question {kind!r} of form {form!r}; there are {FORMS.get(kind, KINDS)}")
    if len(scenes) != (2 if kind == "compare" else 1):
        raise DataError(f"a question {kind!r} is not about {len(scenes)} scenes")
    if form is None:
        among = ("present", "random") if kind == "presence" else FORMS[kind]
        form = among[rng.integers(len(among))]
    made = _ASKED[kind](form, scenes, rng)
    if made is None:
        return None
    text, answer, about = made
    return Question(kind, form, text, answer, tuple(scenes), tuple(about))


Made = tuple[str, str, list[tuple[int, int]]] | None


def _presence(form: str, scenes: Sequence[Scene], rng: np.random.Generator) -> Made:
    (shown,) = scenes
    present = {thing.noun for thing in shown.things}
    absent = [noun for noun in NOUNS if noun not in present]
    if form == "present":
        noun = _one(sorted(present), rng)
        return f"is there a {noun} ?", "yes", [(0, i) for i in shown.having(noun=noun)]
    if not absent:
        return None
    names = list(NOUNS)
    frequent, together = company()
    if form == "popular":
        absent = sorted(absent, key=lambda noun: -frequent[names.index(noun)])[:2]
    elif form == "adversarial":
        likely = together[[names.index(noun) for noun in present]].mean(0)
        absent = sorted(absent, key=lambda noun: -likely[names.index(noun)])[:1]
    return f"is there a {_one(absent, rng)} ?", "no", []


def _place(form: str, scenes: Sequence[Scene], rng: np.random.Generator) -> Made:
    (shown,) = scenes
    chosen = int(rng.integers(len(shown.things)))
    thing = shown.things[chosen]
    if form == "what":
        return f"what is at the {thing.region} ?", thing.noun, [(0, chosen)]
    name = _name(shown, thing, rng)
    return None if name is None else (f"where is the {name} ?", thing.region, [(0, chosen)])


def _count(form: str, scenes: Sequence[Scene], rng: np.random.Generator) -> Made:
    """Every number that can be asked for in this scene is equally likely."""
    (shown,) = scenes
    listed = [thing.noun if form == "noun" else thing.colour for thing in shown.things]
    by_number: dict[int, list[str]] = {}
    for value in NOUNS if form == "noun" else COLOURS:
        by_number.setdefault(listed.count(value), []).append(value)
    number = _one(sorted(by_number), rng)
    value = _one(by_number[number], rng)
    many = PLURALS[value] if form == "noun" else f"{value} things"
    return f"how many {many} ?", NUMBERS[number], [(0, i) for i, has in enumerate(listed) if has == value]


def _colour(form: str, scenes: Sequence[Scene], rng: np.random.Generator) -> Made:
    (shown,) = scenes
    chosen = int(rng.integers(len(shown.things)))
    thing = shown.things[chosen]
    if form == "region":
        return f"what color is the thing at the {thing.region} ?", thing.colour, [(0, chosen)]
    if len(shown.having(noun=thing.noun)) > 1:
        return None
    return f"what color is the {thing.noun} ?", thing.colour, [(0, chosen)]


def _compare(form: str, scenes: Sequence[Scene], rng: np.random.Generator) -> Made:
    listed = [[thing.noun for thing in shown.things] for shown in scenes]
    counts = {noun: [nouns.count(noun) for nouns in listed] for noun in NOUNS}
    one = [noun for noun, (a, b) in counts.items() if (a > 0) != (b > 0)]
    both = [noun for noun, (a, b) in counts.items() if a and b]
    more = [noun for noun, (a, b) in counts.items() if a != b]
    yes = form == "both" and rng.random() < 0.5
    among = {"which": one, "both": both if yes else one, "more": more}[form]
    if not among:
        return None
    noun = _one(among, rng)
    about = [(image, i) for image, shown in enumerate(scenes) for i in shown.having(noun=noun)]
    if form == "both":
        return f"do both images have a {noun} ?", "yes" if yes else "no", about
    larger = ("first", "second")[int(counts[noun][1] > counts[noun][0])]
    asked = f"which image has the {noun} ?" if form == "which" else f"which image has more {PLURALS[noun]} ?"
    return asked, larger, about


_ASKED: Mapping[str, Callable[[str, Sequence[Scene], np.random.Generator], Made]] = {
    "presence": _presence,
    "place": _place,
    "count": _count,
    "colour": _colour,
    "compare": _compare,
}


def _one(among: Sequence[T], rng: np.random.Generator) -> T:
    return among[int(rng.integers(len(among)))]


def _name(shown: Scene, thing: Thing, rng: np.random.Generator) -> str | None:
    """Words that mean this thing and no other in the scene; None where two are alike."""
    names = []
    if len(shown.having(noun=thing.noun)) == 1:
        names.append(thing.noun)
    if len(shown.having(noun=thing.noun, colour=thing.colour)) == 1:
        names.append(f"{thing.colour} {thing.noun}")
    return _one(names, rng) if names else None


def exam(count: int = 500, *, seed: int = 0, split: Split = "test", kinds: Iterable[str] = KINDS) -> list[Question]:
    """`count` questions of each kind, kind by kind, each about scenes of its own; a seed gives the same ones always.

    The forms of a kind come in turn; half of "presence" is there, the rest a third each of the absent forms.
    Prefixes agree: exam(100) asks the first 100 of each kind of exam(500).
    """
    asked = []
    for kind in kinds:
        if kind not in FORMS:
            raise DataError(f"no kind of question {kind!r}; there are {', '.join(KINDS)}")
        rng = np.random.default_rng([seed, KINDS.index(kind), split == "train"])
        forms = FORMS[kind]
        if kind == "presence":
            forms = tuple(form for absent in forms[1:] for form in ("present", absent))
        for number in range(count):
            question = None
            while question is None:
                shown = [scene(rng, split) for _ in range(2 if kind == "compare" else 1)]
                question = ask(kind, shown, rng, forms[number % len(forms)])
            asked.append(question)
    return asked


def words() -> list[str]:
    """Every word a question or an answer can have."""
    spoken = "is there a what at the where how many things color thing image has which more do both images have of"
    said = "yes no first second ? and"
    listed = [*spoken.split(), *said.split(), *NOUNS, *PLURALS.values(), *COLOURS, *REGIONS, *NUMBERS]
    return list(dict.fromkeys(listed))


# -- tensors ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Batch:
    """Questions as a model takes them. B questions of I scenes in all, S tokens, padded on the left.

    input_ids, attention_mask: (B, S). pixel_values: (I, 3, 96, 96). answers: (B,) token ids; the first token to come.
    patches: (I, 144) bool, those of the things asked about. sample: (I,) the question a scene belongs to.
    """

    input_ids: Tensor
    attention_mask: Tensor
    pixel_values: Tensor
    answers: Tensor
    patches: Tensor
    sample: Tensor

    @property
    def inputs(self) -> dict[str, Tensor]:
        """For `model(**...)` and `model.generate(**...)`."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "pixel_values": self.pixel_values,
        }


def batch(questions: Sequence[Question], processor: Any) -> Batch:
    """processor: of `load_model("llava-scenes")`, or of any model that takes <image> in its text and knows the words.

    Raises DataError where there is no question, or an answer is more than one token.
    """
    if not questions:
        raise DataError("a batch needs at least one question")
    given = processor(
        images=[shown.pixels for question in questions for shown in question.scenes],
        text=[question.prompt for question in questions],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    answers = processor.tokenizer([question.answer for question in questions], add_special_tokens=False)["input_ids"]
    long = [question.answer for question, ids in zip(questions, answers, strict=True) if len(ids) != 1]
    if long:
        raise DataError(f"the answer {long[0]!r} is not one token of this tokenizer; use generate() and compare words")
    return Batch(
        given["input_ids"],
        given["attention_mask"],
        given["pixel_values"],
        torch.tensor(answers)[:, 0],
        torch.from_numpy(np.concatenate([question.patches() for question in questions])),
        torch.tensor([i for i, question in enumerate(questions) for _ in question.scenes]),
    )


@torch.inference_mode()
def answered(
    model: nn.Module, processor: Any, questions: Sequence[Question], *, blind: bool = False, size: int = 50
) -> Tensor:
    """(questions,) bool on the CPU: whether the likeliest next token is the answer. blind: the images' tokens are
    hidden, the words stay at their positions."""
    model.eval()
    right, device = [], next(model.parameters()).device
    for first in range(0, len(questions), size):
        part = questions[first : first + size]
        given = batch(part, processor)
        inputs = given.inputs if not blind else _blinded(given, processor)
        said = model(**{name: x.to(device) for name, x in inputs.items()}, logits_to_keep=1).logits[:, -1].argmax(-1)
        right.append(said.cpu() == given.answers)
    return torch.cat(right)


def _blinded(given: Batch, processor: Any) -> dict[str, Tensor]:
    image = given.input_ids == processor.image_token_id
    return {
        "input_ids": given.input_ids.masked_fill(image, processor.tokenizer.pad_token_id),
        "attention_mask": given.attention_mask.masked_fill(image, 0),
        "position_ids": (given.attention_mask.cumsum(-1) - 1).clamp(min=0),
    }


def examine(
    model: nn.Module, processor: Any, questions: Sequence[Question], *, blind: bool = False
) -> dict[str, float]:
    """Share of right answers by kind of question."""
    right = answered(model, processor, questions, blind=blind).tolist()
    kinds = [question.kind for question in questions]
    return {
        kind: round(sum(r for r, k in zip(right, kinds, strict=True) if k == kind) / kinds.count(kind), 4)
        for kind in KINDS
        if kind in kinds
    }
