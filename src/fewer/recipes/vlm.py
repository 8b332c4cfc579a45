"""Train the embedded vision-language model: a small LLaVA on questions about scenes.

First the vision tower: a mini CLIP learns, from short texts, what a scene holds (class token) and what each patch
shows; linear heads on the features the language model will get help. Then everything on questions. A scene is read
once for all its questions: each sees the images and itself only, at the positions it would have alone. A few
questions see no image, so that the model knows what to guess without one.

    report = train("out")                     # the shipped weights
    report = train("out", tower=20, steps=20) # the same shape of run, shorter
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from fewer.datasets.scenes import (
    COLOURS,
    GRID,
    KINDS,
    NOUNS,
    PLURALS,
    SIZE,
    Question,
    Scene,
    ask,
    exam,
    examine,
    scene,
    words,
)
from fewer.models.zoo import load_model
from fewer.recipes.loop import At, Folder, Loop, muon_and_adamw

from .classify import FLOAT32_ATTENTION, grid_sincos

__all__ = ["Recipe", "Report", "build", "save", "tokenizer", "train"]

SPECIAL = ("<pad>", "<s>", "<unk>", "</s>", "<image>")
PAD, BEGIN, _, END, IMAGE = range(len(SPECIAL))
PATCHES = GRID * GRID
PACKED_ATTENTION = "fewer_packed_attention"
LENGTH = 11
"""Tokens of a question and its answer in training, at most."""


@dataclass(frozen=True)
class Recipe:
    """Everything a run depends on besides the data; the defaults made the shipped weights.

    tower, steps: updates of the tower alone, then of the model on questions.
    keep, whole: patches kept while the tower learns, things before background, but for a last share of the updates.
    scenes: new ones per update. asked: questions per scene of each kind, in the order of KINDS; the last per pair.
    pairs: one update in so many compares pairs. blind: share of the questions that see no image.
    lr, lr_rest: peak rates of Muon (matrices in the blocks) and AdamW (everything else); tower_lr: share of them the
        tower gets in the second stage, 0 leaves it as it is. aside: weight of the first stage's losses then.
    width, depth, heads, inner: the vision tower. lm_*: the language model. text_*: the mini CLIP's text tower; joint:
        width of the space it shares with the images.
    bfloat16: multiply matrices in bfloat16, as in `classify.Recipe`.
    test: questions of each kind in the final test.
    seed: initial weights and scenes. threads: torch threads; None leaves them. workers: processes that draw scenes.
    """

    tower: int = 1600
    keep: int = 72
    whole: float = 0.15
    steps: int = 1600
    scenes: int = 32
    asked: tuple[int, ...] = (3, 5, 3, 5, 8)
    pairs: int = 4
    blind: float = 0.04
    lr: float = 3e-3
    lr_rest: float = 2e-3
    tower_lr: float = 0.0
    aside: float = 0.3
    weight_decay: float = 0.05
    warmup: float = 0.04
    width: int = 160
    depth: int = 6
    heads: int = 5
    inner: int = 480
    lm_width: int = 160
    lm_depth: int = 6
    lm_heads: int = 5
    lm_inner: int = 448
    text_width: int = 96
    text_depth: int = 2
    joint: int = 64
    bfloat16: bool = True
    test: int = 1000
    seed: int = 0
    threads: int | None = None
    workers: int = 1

    def __post_init__(self) -> None:
        if self.steps < 1 or self.tower < 0 or self.scenes < 2:
            raise ValueError(
                f"Recipe(tower={self.tower}, steps={self.steps}, scenes={self.scenes}): one step of two scenes or more"
            )
        if len(self.asked) != len(KINDS) or min(self.asked) < 1:
            raise ValueError(f"Recipe(asked={self.asked}): give a number above 0 for each of {', '.join(KINDS)}")
        if not 1 <= self.keep <= PATCHES:
            raise ValueError(f"Recipe(keep={self.keep}): a scene has {PATCHES} patches")


@dataclass(frozen=True)
class Report:
    """What a run came to. accuracy, blind: by kind of question, share answered right with the image and without.

    questions: of each kind. seconds: wall time, tests included. parameters: of the model; clip: of what is beside it.
    """

    accuracy: dict[str, float]
    blind: dict[str, float]
    questions: int
    steps: int
    seconds: float
    parameters: int
    clip: int


def tokenizer(*, ends: bool = False) -> PreTrainedTokenizerFast:
    """One token per word of `fewer.scenes.words`, <s> in front, and </s> behind if `ends`; pads on the left."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *words()))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("?", "isolated")]
    )
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if ends else "<s> $A", special_tokens=[("<s>", BEGIN), ("</s>", END)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        unk_token="<unk>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="right" if ends else "left",
        model_max_length=32 if ends else 1024,
    )


def build(recipe: Recipe) -> tuple[LlavaForConditionalGeneration, CLIPModel, LlavaProcessor]:
    """A fresh model, the mini CLIP that shares its vision tower, and the processor."""
    words_ = tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=recipe.width,
        intermediate_size=recipe.inner,
        num_hidden_layers=recipe.depth,
        num_attention_heads=recipe.heads,
        image_size=SIZE,
        patch_size=SIZE // GRID,
        projection_dim=recipe.joint,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=len(words_),
        hidden_size=recipe.lm_width,
        intermediate_size=recipe.lm_inner,
        num_hidden_layers=recipe.lm_depth,
        num_attention_heads=recipe.lm_heads,
        num_key_value_heads=recipe.lm_heads,
        max_position_embeddings=1024,
        pad_token_id=PAD,
        bos_token_id=BEGIN,
        eos_token_id=END,
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=IMAGE,
            image_seq_length=PATCHES,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
        )
    )
    model.generation_config.pad_token_id = PAD
    model.generation_config.bos_token_id = BEGIN
    model.generation_config.eos_token_id = END
    captions = CLIPTextConfig(
        vocab_size=len(words_),
        hidden_size=recipe.text_width,
        intermediate_size=2 * recipe.text_width,
        num_hidden_layers=recipe.text_depth,
        num_attention_heads=3,
        max_position_embeddings=32,
        projection_dim=recipe.joint,
        pad_token_id=PAD,
        bos_token_id=BEGIN,
        eos_token_id=END,
    )
    clip = CLIPModel(
        CLIPConfig(text_config=captions.to_dict(), vision_config=vision.to_dict(), projection_dim=recipe.joint)
    )
    with torch.no_grad():
        for part in (model, clip.text_model):
            for module in part.modules():
                if isinstance(module, nn.Linear):
                    nn.init.xavier_uniform_(module.weight)
        seen: Any = model.model.vision_tower.embeddings
        nn.init.normal_(seen.patch_embedding.weight, std=seen.patch_embedding.weight[0].numel() ** -0.5)
        seen.position_embedding.weight[1:] = grid_sincos(GRID, recipe.width)
        nn.init.normal_(model.model.language_model.embed_tokens.weight, std=0.3)
    clip.vision_model = model.model.vision_tower
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            do_resize=True,
            size={"height": SIZE, "width": SIZE},
            do_center_crop=False,
            image_mean=[0.25, 0.25, 0.25],
            image_std=[0.25, 0.25, 0.25],
        ),
        tokenizer=words_,
        patch_size=SIZE // GRID,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return model, clip, processor


# -- what is learnt from ----------------------------------------------------------------------------------------------
class _Texts:
    """Short texts of a mini CLIP: a noun, a colour or both, put in one of several ways."""

    def __init__(self) -> None:
        self.features = [{"noun": noun} for noun in NOUNS] + [{"colour": colour} for colour in COLOURS]
        self.features += [{"noun": noun, "colour": colour} for noun in NOUNS for colour in COLOURS]

    def put(self, generator: torch.Generator) -> list[str]:
        """One wording of each."""
        texts = []
        for features, draw in zip(self.features, torch.rand(len(self.features), generator=generator), strict=True):
            ways = _ways(features)
            texts.append(ways[int(draw * len(ways))])
        return texts

    def fit(self, shown: Scene) -> np.ndarray:
        """(things, texts) bool: which text fits which thing."""
        nouns, colours = list(NOUNS), list(COLOURS)
        fits = np.zeros((len(shown.things), len(self.features)), bool)
        for row, thing in zip(fits, shown.things, strict=True):
            noun, colour = nouns.index(thing.noun), colours.index(thing.colour)
            both = len(nouns) + len(colours) + noun * len(colours) + colour
            row[[noun, len(nouns) + colour, both]] = True
        return fits


def _ways(features: dict[str, str]) -> tuple[str, ...]:
    if "noun" not in features:
        colour = features["colour"]
        return f"{colour} thing", f"a {colour} thing", f"{colour} things", f"how many {colour} things ?"
    noun = features["noun"]
    if "colour" in features:
        name = f"{features['colour']} {noun}"
        return name, f"a {name}", f"the {name}", f"where is the {name} ?"
    many = PLURALS[noun]
    return (
        noun,
        f"a {noun}",
        many,
        f"is there a {noun} ?",
        f"how many {many} ?",
        f"where is the {noun} ?",
        f"what color is the {noun} ?",
        f"which image has the {noun} ?",
        f"which image has more {many} ?",
        f"do both images have a {noun} ?",
    )


class _Draw(IterableDataset[dict[str, Tensor]]):
    """Batches of new training scenes without end; see `_drawn`."""

    def __init__(self, recipe: Recipe, stage: int) -> None:
        self.recipe, self.stage = recipe, stage

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = torch.utils.data.get_worker_info()
        rng = np.random.default_rng([self.recipe.seed, self.stage, worker.id if worker else 0])
        vocabulary = tokenizer().get_vocab()
        texts, turn = _Texts(), 0
        while True:
            turn += 1
            shown = [scene(rng, "train") for _ in range(self.recipe.scenes)]
            given = _labelled(shown, texts)
            if self.stage == 2:
                pairs = turn % self.recipe.pairs == 0
                given |= _asked(shown, self.recipe, rng, vocabulary, pairs)
            yield given


def _labelled(shown: Sequence[Scene], texts: _Texts) -> dict[str, Tensor]:
    """pixels (B, 96, 96, 3) uint8; noun, colour (B, 144) long, 0 = nothing; fits (B, 144, texts), holds (B, texts)."""
    nouns, colours = list(NOUNS), list(COLOURS)
    noun = np.zeros((len(shown), PATCHES), np.int64)
    colour = np.zeros_like(noun)
    fits = np.zeros((len(shown), PATCHES, len(texts.features)), bool)
    holds = np.zeros((len(shown), len(texts.features)), bool)
    for row, this in enumerate(shown):
        fit = texts.fit(this)
        holds[row] = fit.any(0)
        for thing, patches, ways in zip(this.things, this.patches, fit, strict=True):
            noun[row, patches] = nouns.index(thing.noun) + 1
            colour[row, patches] = colours.index(thing.colour) + 1
            fits[row, patches] = ways
    pixels = np.stack([this.pixels for this in shown])
    arrays = {"pixels": pixels, "noun": noun, "colour": colour, "fits": fits, "holds": holds}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _asked(
    shown: Sequence[Scene], recipe: Recipe, rng: np.random.Generator, vocabulary: dict[str, int], pairs: bool
) -> dict[str, Tensor]:
    """ids (B, K, LENGTH): K questions of each scene or pair, with answer and </s>; ends (B, K): where the answer is."""
    groups = [tuple(shown[i : i + 2]) for i in range(0, len(shown) - 1, 2)] if pairs else [(one,) for one in shown]
    kinds = [kind for kind, count in _counts(recipe, pairs).items() for _ in range(count)]
    ids = np.full((len(groups), len(kinds), LENGTH), PAD, np.int64)
    ends = np.zeros((len(groups), len(kinds)), np.int64)
    for row, group in enumerate(groups):
        for column, kind in enumerate(kinds):
            question: Question | None = None
            while question is None:
                question = ask(kind, group, rng)
            line = [vocabulary[word] for word in (*question.text.split(), question.answer)]
            ids[row, column, : len(line) + 1] = [*line, END]
            ends[row, column] = len(line) - 1
    return {"ids": torch.from_numpy(ids), "ends": torch.from_numpy(ends)}


# -- training -----------------------------------------------------------------------------------------------------
class _Watched:
    """The tower, the mini CLIP's texts and the helping heads, for the losses of the first stage."""

    def __init__(self, clip: CLIPModel, recipe: Recipe) -> None:
        self.clip, self.recipe, self.texts = clip, recipe, _Texts()
        self.words = tokenizer(ends=True)
        width = recipe.width
        self.heads = nn.ModuleDict(
            {"noun": nn.Linear(width, len(NOUNS) + 1), "colour": nn.Linear(width, len(COLOURS) + 1)}
        )
        self.bias = nn.Parameter(torch.full((2,), -4.0))
        self.kept: Tensor | None = None
        clip.vision_model.embeddings.register_forward_hook(self._cut)

    def _cut(self, module: nn.Module, args: Any, embedded: Tensor) -> Tensor:
        if self.kept is None:
            return embedded
        chosen = torch.cat([self.kept.new_zeros(len(embedded), 1), self.kept + 1], dim=1)
        return embedded.gather(1, chosen[..., None].expand(-1, -1, embedded.shape[2]))

    def drop(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """Half of the patches for the tower to learn on: those of things first, in a random order.

        In `given` "kept" (B, keep) are their places, and what is to be learnt about patches is about these."""
        score = torch.rand(given["noun"].shape) + (given["noun"] > 0)
        kept = score.topk(self.recipe.keep).indices.sort().values
        fits = given["fits"].gather(1, kept[..., None].expand(-1, -1, given["fits"].shape[-1]))
        return given | {"kept": kept, "fits": fits} | {n: given[n].gather(1, kept) for n in ("noun", "colour")}

    def look(self, pixels: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, 96, 96, 3) uint8 -> features for the language model (B, P, width), last layer (B, 1 + P, width).

        kept: (B, P), the patches the tower sees; None = all 144."""
        self.kept = kept
        x = (pixels.permute(0, 3, 1, 2).float() / 255 - 0.25) / 0.25
        with _cast(self.recipe, x):
            seen = self.clip.vision_model(x, output_hidden_states=True)
        return seen.hidden_states[-2][:, 1:].float(), seen.last_hidden_state.float()

    def losses(self, given: dict[str, Tensor], features: Tensor, last: Tensor) -> Tensor:
        """What each patch shows, by the helping heads and by texts; what the scene holds, by texts.

        Texts and images are compared by sigmoids, each pair for itself (SigLIP, arXiv:2303.15343)."""
        clip = self.clip
        dense = sum(
            F.cross_entropy(self.heads[name](features).flatten(0, 1), given[name].flatten())
            for name in ("noun", "colour")
        )
        tokens = self.words(self.texts.put(torch.default_generator), padding=True, return_tensors="pt")
        texts = clip.text_projection(clip.text_model(**tokens).pooler_output)
        images = clip.visual_projection(clip.vision_model.post_layernorm(last))
        near = F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T * clip.logit_scale.exp()
        whole = _sigmoid(near[:, 0] + self.bias[0], given["holds"])
        parts = _sigmoid(near[:, 1:] + self.bias[1], given["fits"])
        return dense + whole + parts

    def learned(self, model: nn.Module) -> nn.Module:
        """All that learns, and the model."""
        return nn.ModuleList([model, self.clip, self.heads, nn.ParameterList([self.bias])])

    def parameters(self) -> list[nn.Parameter]:
        """Of what is not in the model."""
        clip = self.clip
        kept = [*clip.text_model.parameters(), *clip.text_projection.parameters(), *clip.visual_projection.parameters()]
        return [*kept, clip.logit_scale, *self.heads.parameters(), self.bias]


def _sigmoid(logits: Tensor, target: Tensor) -> Tensor:
    """Binary cross entropy, summed over the texts and scaled so that it is of the size of the other losses."""
    return F.binary_cross_entropy_with_logits(logits, target.float(), reduction="none").sum(-1).mean() / 4


def _cast(recipe: Recipe, x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=recipe.bfloat16)


def _questions_loss(
    model: LlavaForConditionalGeneration, features: Tensor, given: dict[str, Tensor], recipe: Recipe
) -> tuple[Tensor, Tensor]:
    """Cross entropy of answer and </s>, and whether each answer is the likeliest word (B, K).

    features: (images, 144, width), those of a row one after the other."""
    ids, ends = given["ids"], given["ends"]
    rows, asked, _ = ids.shape
    with _cast(recipe, features):
        images = model.model.multi_modal_projector(features).float()
        images = images.reshape(rows, -1, images.shape[-1])
        embed = model.get_input_embeddings()
        begin = embed(ids.new_full((rows, 1), BEGIN))
        embedded = torch.cat([begin, images, embed(ids[:, :, :-1].flatten(1))], dim=1)
        prefix, each = 1 + images.shape[1], LENGTH - 1
        hidden = model.model.language_model(
            inputs_embeds=embedded,
            packed=_Packed(prefix, asked, each, torch.rand(rows, asked) < recipe.blind),
            position_ids=torch.cat([torch.arange(prefix), prefix + torch.arange(each).repeat(asked)])[None].expand(
                rows, -1
            ),
            use_cache=False,
        ).last_hidden_state
        hidden = hidden[:, prefix:].reshape(rows, asked, each, -1)
        place = torch.stack([ends - 1, ends], dim=-1)
        picked = hidden.gather(2, place[..., None].expand(-1, -1, -1, hidden.shape[-1]))
        logits = model.lm_head(picked).float()
    answers = ids.gather(2, ends[..., None])[..., 0]
    loss = F.cross_entropy(logits[:, :, 0].flatten(0, 1), answers.flatten())
    stop = F.cross_entropy(logits[:, :, 1].flatten(0, 1), torch.full_like(answers, END).flatten())
    return loss + 0.1 * stop, logits[:, :, 0].argmax(-1) == answers


@dataclass(frozen=True, eq=False)
class _Packed:
    """Questions behind the images they share: `prefix` tokens, then `asked` questions of `each` tokens.

    blind: (rows, asked) bool, those that see nothing of the prefix but <s>."""

    prefix: int
    asked: int
    each: int
    blind: Tensor


def _packed_attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: None, packed: _Packed, scaling: float, **unused: Any
) -> tuple[Tensor, None]:
    """Causal attention in which a question sees the prefix and itself; what it must not see is not computed."""
    prefix, shape = packed.prefix, (packed.asked, packed.each)
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = q.float(), k.float(), v.float()
        front = F.scaled_dot_product_attention(
            q[:, :, :prefix], k[:, :, :prefix], v[:, :, :prefix], is_causal=True, scale=scaling
        )
        asks = q[:, :, prefix:] * scaling
        far = asks @ k[:, :, :prefix].transpose(-1, -2)
        image = torch.arange(prefix) > 0
        hidden = packed.blind.repeat_interleave(packed.each, dim=1)[:, None, :, None] & image
        own, keys, values = (x.unflatten(2, shape) for x in (asks, k[:, :, prefix:], v[:, :, prefix:]))
        later = torch.ones(packed.each, packed.each, dtype=torch.bool).triu(1)
        near = (own @ keys.transpose(-1, -2)).masked_fill(later, -torch.inf).flatten(2, 3)
        paid = torch.cat([far.masked_fill(hidden, -torch.inf), near], dim=-1).softmax(-1)
        behind = paid[..., :prefix] @ v[:, :, :prefix]
        behind = behind + (paid[..., prefix:].unflatten(2, shape) @ values).flatten(2, 3)
        mixed = torch.cat([front, behind], dim=2)
    return mixed.transpose(1, 2).contiguous(), None


AttentionInterface.register(PACKED_ATTENTION, _packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, lambda *args, **kwargs: None)


def train(
    out: str | Path,
    *,
    tower: int | None = None,
    steps: int | None = None,
    seed: int | None = None,
    threads: int | None = None,
    recipe: Recipe | None = None,
    log: Callable[[str], None] = print,
) -> Report:
    """Train the model and save it, and what belongs to it, where `fewer.models.zoo.load_model(out)` reads it.

    out: folder for weights (float16), processor, clip/, log.jsonl and report.json; and, until it is done, for the state
        a run that was killed goes on from.
    tower, steps, seed, threads: change these fields of `recipe` (default `Recipe()`).
    log: receives a line every 25 updates and the result.
    Nothing is chosen by the test: it is taken once, at the end, on scenes of held-out pictures.
    """
    changes: dict[str, Any] = {"tower": tower, "steps": steps, "seed": seed, "threads": threads}
    recipe = replace(recipe or Recipe(), **{name: value for name, value in changes.items() if value is not None})
    folder = Folder(out, recipe, log)
    out = folder.path
    model, clip, processor = build(recipe)
    model.model.vision_tower.set_attn_implementation(FLOAT32_ATTENTION)
    model.model.language_model.set_attn_implementation(PACKED_ATTENTION)
    watched = _Watched(clip, recipe)
    started = time.perf_counter()
    for stage, updates in ((1, recipe.tower), (2, recipe.steps)):
        _stage(stage, updates, model, watched, recipe, folder)
    save(out, model, clip, processor)
    saved, processor = load_model(out)
    questions = exam(recipe.test)
    report = Report(
        accuracy=examine(saved, processor, questions),
        blind=examine(saved, processor, questions, blind=True),
        questions=recipe.test,
        steps=recipe.tower + recipe.steps,
        seconds=round(time.perf_counter() - started, 1),
        parameters=sum(p.numel() for p in model.parameters()),
        clip=sum(p.numel() for name, p in clip.named_parameters() if not name.startswith("vision_model.")),
    )
    log(f"right: {report.accuracy}; without the image: {report.blind}")
    folder.finish(report)
    return report


def _stage(
    stage: int, steps: int, model: LlavaForConditionalGeneration, watched: _Watched, recipe: Recipe,
    folder: Folder,
) -> None:  # fmt: skip
    learns = stage == 1 or recipe.tower_lr > 0

    def loss(given: dict[str, Tensor], at: At) -> dict[str, Any]:
        total, found = torch.zeros(()), {"stage": torch.tensor(stage)}
        if stage == 1 and at.progress < 1 - recipe.whole:
            given = watched.drop(given)
        with torch.set_grad_enabled(learns):
            features, last = watched.look(given["pixels"], given.get("kept"))
        if learns:
            total = found["tower"] = watched.losses(given, features, last)
        if stage == 2:
            answers, right = _questions_loss(model, features, given, recipe)
            total, found["answers"] = answers + recipe.aside * total, answers
            found |= _by_kind(right, recipe, len(right) < len(given["pixels"]))
        return found | {"loss": total}

    model.train()
    if steps:
        batches = DataLoader(_Draw(recipe, stage), batch_size=None, num_workers=recipe.workers)
        optimizers = _optimizers(model, watched, recipe, stage)
        Loop(steps, recipe.warmup).run(watched.learned(model), optimizers, batches, loss, folder)


def _by_kind(right: Tensor, recipe: Recipe, pairs: bool) -> dict[str, Tensor]:
    """Share of right answers by kind, of a batch of either pairs or single scenes."""
    counts = _counts(recipe, pairs)
    parts = right.float().mean(0).split(list(counts.values()))
    return {kind: part.mean() for kind, part in zip(counts, parts, strict=True)}


def _counts(recipe: Recipe, pairs: bool) -> dict[str, int]:
    """Questions of each kind about a pair of scenes, or about a single one."""
    return {kind: count for kind, count in zip(KINDS, recipe.asked, strict=True) if (kind == "compare") == pairs}


def _optimizers(
    model: LlavaForConditionalGeneration, watched: _Watched, recipe: Recipe, stage: int
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside blocks, AdamW for the rest; in the second stage the tower goes slower."""
    tower, aside = model.model.vision_tower, watched.parameters()
    slow = recipe.tower_lr if stage == 2 else 1.0
    named = {id(p) for p in tower.parameters()} | {id(p) for p in aside}
    parts: list[tuple[float, list[nn.Parameter]]] = [(slow, [*tower.parameters(), *aside])] if slow else []
    if stage == 2:
        parts.append((1.0, [p for p in model.parameters() if id(p) not in named]))
    blocks = [tower.encoder, model.model.language_model.layers, watched.clip.text_model.encoder]
    return muon_and_adamw(recipe, blocks, parts)


def save(out: Path, model: LlavaForConditionalGeneration, clip: CLIPModel, processor: LlavaProcessor) -> None:
    """Model and processor in `out`, the mini CLIP without the tower it shares in `out`/clip, all in float16."""
    from safetensors.torch import save_file

    halves = {name: value.half() for name, value in model.state_dict().items()}
    model.save_pretrained(out, state_dict=halves)
    processor.save_pretrained(out)
    (out / "clip").mkdir(exist_ok=True)
    clip.config.save_pretrained(out / "clip")
    tokenizer(ends=True).save_pretrained(out / "clip")
    own = {name: x for name, x in clip.state_dict().items() if not name.startswith("vision_model.")}
    save_file({name: x.half().contiguous() for name, x in own.items()}, out / "clip" / "model.safetensors")
