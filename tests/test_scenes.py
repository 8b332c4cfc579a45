"""Scenes: what they hold, whether answers are right, what a batch says; the recipe's packing; the packaged model."""

import re
from collections import Counter
from dataclasses import replace
from importlib import resources

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from fewer.datasets import scenes
from fewer.datasets.images import DataError, embedded
from fewer.datasets.scenes import FORMS, GRID, KINDS, NOUNS, REGIONS, Thing, ask, batch, company, compose, exam, scene
from fewer.models.zoo import ModelError, load_clip, load_model
from fewer.recipes import vlm

TINY = vlm.Recipe(
    tower=2, steps=4, keep=40, scenes=4, pairs=2, width=32, depth=2, heads=2, inner=32, lm_width=32, lm_depth=2,
    lm_heads=2, lm_inner=32, text_width=24, text_depth=1, joint=16, bfloat16=False, test=4, workers=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def asked():
    return exam(60)


@pytest.fixture(scope="module")
def packaged():
    return load_model("llava-scenes")


def drawn(count=40, seed=0):
    rng = np.random.default_rng(seed)
    return [scene(rng) for _ in range(count)]


# scenes


def test_the_same_seed_gives_the_same_scene_and_another_does_not():
    first, again, other = (scene(np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert first.things == again.things
    assert (first.pixels == again.pixels).all()
    assert first.things != other.things


def test_things_stand_alone_each_in_its_own_region():
    for shown in drawn():
        assert 2 <= len(shown.things) <= 5
        assert len({thing.region for thing in shown.things}) == len(shown.things)
        for thing, patches in zip(shown.things, shown.patches, strict=True):
            row, column = divmod(REGIONS.index(thing.region), 3)
            assert row * 32 <= thing.top <= thing.top + 28 <= (row + 1) * 32
            assert column * 32 <= thing.left <= thing.left + 28 <= (column + 1) * 32
            grid = patches.reshape(GRID, GRID)
            assert 1 <= grid.sum() == grid[row * 4 : row * 4 + 4, column * 4 : column * 4 + 4].sum()


def test_a_things_patches_are_those_its_colour_shows_in():
    for shown in drawn(20):
        for thing, patches in zip(shown.things, shown.patches, strict=True):
            if thing.colour == "white":
                continue  # clutter is as grey
            spread = shown.pixels.max(-1).astype(int) - shown.pixels.min(-1)
            vivid = (spread > 70).reshape(GRID, 8, GRID, 8).sum((1, 3)).ravel()
            row, column = divmod(REGIONS.index(thing.region), 3)
            inside = np.zeros((GRID, GRID), bool)
            inside[row * 4 : row * 4 + 4, column * 4 : column * 4 + 4] = True
            assert patches[(vivid >= 30) & inside.ravel()].all()
            assert not patches[vivid == 0].any() or vivid[patches].mean() > 10


def test_a_scene_is_made_of_its_own_splits_pictures():
    pictures, labels = embedded().pictures, embedded().labels.numpy()
    for noun, of in scenes.sprites("test").items():
        assert (of == pictures[labels == NOUNS[noun]]).all()
    with pytest.raises(DataError, match="split train or test, not 'val'"):
        scene(np.random.default_rng(0), "val")


def test_outfits_go_together():
    share, together = company()
    names = list(NOUNS)
    shirt, trouser, dress = (names.index(noun) for noun in ("shirt", "trouser", "dress"))
    assert share[trouser] == share.max()
    assert together[shirt, trouser] > share[trouser] > together[dress, trouser]
    assert (np.diag(together) == 1).all()


@pytest.mark.parametrize("count", [0, 10])
def test_a_scene_holds_one_to_nine_things(count):
    with pytest.raises(DataError, match=f"1 to 9 things, one in each region, not {count}"):
        scene(np.random.default_rng(0), count=count)
    assert len(scene(np.random.default_rng(0), count=9).things) == 9


def test_a_scene_can_be_composed_of_one_thing_many_times():
    bags = [Thing("bag", "red", region, 32 * (i // 3), 32 * (i % 3), 7) for i, region in enumerate(REGIONS)]
    shown = compose(bags, np.random.default_rng(0))
    assert shown.things == tuple(bags)
    assert (shown.patches[8].reshape(GRID, GRID)[8:, 8:] == shown.patches[0].reshape(GRID, GRID)[:4, :4]).all()
    with pytest.raises(DataError, match="top and left must lie in 0 to 68"):
        compose([replace(bags[0], top=69)], np.random.default_rng(0))


# questions


def read(question):
    """The answer, and what it depends on, read off the question's own words and the things in its scenes."""
    text, shown = question.text.removesuffix(" ?"), question.scenes
    singular = {plural: noun for noun, plural in scenes.PLURALS.items()}

    def which(words, of):
        words = [singular.get(word, word) for word in words.split() if word not in ("thing", "things")]
        return [i for i, t in enumerate(of.things) if all(w in (t.noun, t.colour, t.region) for w in words)]

    for pattern, answer in (
        ("is there a (.+)", lambda found: "yes" if found[0] else "no"),
        ("what is at the (.+)", lambda found: shown[0].things[found[0][0]].noun),
        ("where is the (.+)", lambda found: shown[0].things[found[0][0]].region),
        ("how many (.+)", lambda found: ("zero", "one", "two", "three", "four", "five")[len(found[0])]),
        ("what color is the thing at the (.+)", lambda found: shown[0].things[found[0][0]].colour),
        ("what color is the (.+)", lambda found: shown[0].things[found[0][0]].colour),
        ("which image has (?:the|more) (.+)", lambda found: "first" if len(found[0]) > len(found[1]) else "second"),
        ("do both images have a (.+)", lambda found: "yes" if found[0] and found[1] else "no"),
    ):
        if match := re.fullmatch(pattern, text):
            found = [which(match[1], of) for of in shown]
            return answer(found), tuple((image, i) for image, those in enumerate(found) for i in those)
    raise AssertionError(text)


def test_every_answer_follows_from_the_words_and_the_things(asked):
    for question in asked:
        assert (question.answer, question.about) == read(question), question.text


def test_an_exam_asks_the_forms_in_turn_on_scenes_of_its_own(asked):
    assert Counter(question.kind for question in asked) == dict.fromkeys(KINDS, 60)
    forms = Counter((question.kind, question.form) for question in asked)
    assert forms["presence", "present"] == 30
    assert {forms["presence", form] for form in ("random", "popular", "adversarial")} == {10}
    assert all(forms[kind, form] == 60 // len(FORMS[kind]) for kind in KINDS[1:] for form in FORMS[kind])
    again = exam(10, kinds=("count",))
    whole = [question for question in asked if question.kind == "count"]
    assert [q.text for q in again] == [q.text for q in whole[:10]]
    assert (again[3].scenes[0].pixels == whole[3].scenes[0].pixels).all()
    assert [q.text for q in exam(10, seed=1, kinds=("count",))] != [q.text for q in again]


def test_what_is_asked_for_though_absent_is_likely(asked):
    share, together = company()
    names = list(NOUNS)
    for question in asked:
        if question.form in ("popular", "adversarial"):
            present = {thing.noun for thing in question.scenes[0].things}
            absent = [noun for noun in names if noun not in present]
            rank = share if question.form == "popular" else together[[names.index(noun) for noun in present]].mean(0)
            noun = question.text.split()[-2]
            better = sum(rank[names.index(other)] > rank[names.index(noun)] for other in absent)
            assert better <= (1 if question.form == "popular" else 0)


def test_no_answer_is_asked_for_most_of_the_time():
    for kind in KINDS:
        answers = Counter(question.answer for question in exam(120, kinds=(kind,)))
        assert answers.most_common(1)[0][1] <= {"presence": 60, "compare": 72}.get(kind, 55), kind


def test_questions_that_cannot_be_asked_are_refused():
    rng = np.random.default_rng(0)
    (shown,) = drawn(1)
    twins = replace(
        shown, things=(shown.things[0], replace(shown.things[0], region="bottom")), patches=shown.patches[:2]
    )
    assert ask("colour", [twins], rng, "noun") is None
    assert ask("place", [twins], rng, "where") is None
    assert ask("compare", [twins, twins], rng, "more") is None
    with pytest.raises(DataError, match="no question 'taste' of form None"):
        ask("taste", [shown], rng)
    with pytest.raises(DataError, match="no question 'count' of form 'weight'; there are"):
        ask("count", [shown], rng, "weight")
    with pytest.raises(DataError, match="'compare' is not about 1 scenes"):
        ask("compare", [shown], rng)
    with pytest.raises(DataError, match="no kind of question 'taste'"):
        exam(1, kinds=("taste",))


# tensors


def test_a_batch_says_where_everything_is(asked):
    processor = vlm.build(TINY)[2]
    mixed = asked[::30]
    given = batch(mixed, processor)
    words = processor.tokenizer
    assert (words.convert_ids_to_tokens(given.answers.tolist())) == [question.answer for question in mixed]
    assert given.sample.tolist() == [i for i, question in enumerate(mixed) for _ in question.scenes]
    assert given.pixel_values.shape == (len(given.sample), 3, 96, 96)
    assert given.patches.shape == (len(given.sample), 144)
    for row, question in enumerate(mixed):
        ids = given.input_ids[row][given.attention_mask[row].bool()]
        assert given.attention_mask[row, -1] == 1
        said = [token for token in words.convert_ids_to_tokens(ids) if token != "<image>"]
        assert said == ["<s>", *question.text.split()]
        assert len(ids) - len(said) == 144 * len(question.scenes)
        assert (given.patches[given.sample == row].numpy() == question.patches()).all()
    back = (given.pixel_values[0].permute(1, 2, 0) * 0.25 + 0.25) * 255
    assert_close(back.round().to(torch.uint8).numpy(), mixed[0].scenes[0].pixels)


def test_every_word_is_known(asked):
    words = vlm.tokenizer()
    texts = [f"{question.text} {question.answer}" for question in asked] + vlm._Texts().put(torch.Generator())
    assert not any(words.unk_token_id in ids for ids in words(texts)["input_ids"])
    assert words.tokenize("Is there a BAG?") == ["is", "there", "a", "bag", "?"]


def test_empty_batches_and_answers_of_many_tokens_are_refused(asked):
    processor = vlm.build(TINY)[2]
    with pytest.raises(DataError, match="at least one question"):
        batch([], processor)
    with pytest.raises(DataError, match="'two bags' is not one token"):
        batch([replace(asked[0], answer="two bags")], processor)


# the recipe


@pytest.mark.parametrize("kind", ["place", "compare"])
@pytest.mark.parametrize("blind", [0.0, 1.0])
def test_questions_asked_together_are_answered_as_if_alone(kind, blind):
    torch.manual_seed(0)
    model, _, processor = vlm.build(TINY)
    rng = np.random.default_rng(0)
    groups = [[scene(rng) for _ in range(2 if kind == "compare" else 1)] for _ in range(3)]
    together = [question for group in groups for question in (ask(kind, group, rng) for _ in range(9)) if question]
    questions = [q for i in range(3) for q in [q for q in together if list(q.scenes) == groups[i]][:2]]
    vocabulary = processor.tokenizer.get_vocab()
    ids, ends = torch.zeros(6, vlm.LENGTH, dtype=torch.long), torch.zeros(6, dtype=torch.long)
    alone = []
    for row, question in enumerate(questions):
        line = torch.tensor([vocabulary[word] for word in (*question.text.split(), question.answer, "</s>")])
        ids[row, : len(line)], ends[row] = line, len(line) - 2
        given = batch([question], processor)
        inputs = {
            "input_ids": torch.cat([given.input_ids, given.answers[:, None]], 1),
            "pixel_values": given.pixel_values,
        }
        if blind:
            far = 144 * len(question.scenes) + torch.arange(len(line))
            inputs = {"input_ids": torch.cat([torch.tensor([1]), line[:-1]])[None]}
            inputs["position_ids"] = far.where(far > far[0], 0)[None]
        logits = model(**inputs).logits[0, -2:]
        alone.append(F.cross_entropy(logits[:1], given.answers) + 0.1 * F.cross_entropy(logits[1:], line[-1:]))
    pixels = batch([questions[0], questions[2], questions[4]], processor).pixel_values
    features = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    packed = {"ids": ids.reshape(3, 2, -1), "ends": ends.reshape(3, 2)}
    model.model.language_model.set_attn_implementation(vlm.PACKED_ATTENTION)
    loss, right = vlm._questions_loss(model, features, packed, replace(TINY, blind=blind))
    assert right.shape == (3, 2)
    assert_close(loss, torch.stack(alone).mean(), rtol=1e-4, atol=1e-4)


def test_the_tower_learns_on_things_first():
    torch.manual_seed(0)
    watched = vlm._Watched(vlm.build(TINY)[1], TINY)
    given = vlm._labelled(drawn(4), vlm._Texts())
    kept = watched.drop(given)
    assert (kept["noun"] > 0).sum(1).tolist() == (given["noun"] > 0).sum(1).clamp(max=TINY.keep).tolist()
    assert_close(kept["noun"], given["noun"].gather(1, kept["kept"]))
    assert (kept["fits"].sum(-1) == 3 * (kept["noun"] > 0)).all()  # noun, colour, both
    features, last = watched.look(given["pixels"], kept["kept"])
    assert features.shape == (4, TINY.keep, TINY.width)
    assert last.shape == (4, 1 + TINY.keep, TINY.width)


def test_training_goes_through_and_saves_what_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(vlm, "scene", lambda rng, split: scene(rng))  # the training pictures may not be installed
    lines = []
    report = vlm.train(tmp_path, recipe=TINY, log=lines.append)
    assert set(report.accuracy) == set(report.blind) == set(KINDS)
    model, processor = load_model(tmp_path)
    assert report.parameters == sum(p.numel() for p in model.parameters())
    assert processor.tokenizer.padding_side == "left"
    clip, tokenizer = load_clip(tmp_path, model)
    assert clip.vision_model is model.model.vision_tower
    assert tokenizer("a bag")["input_ids"][-1] == tokenizer.eos_token_id


def test_impossible_recipes_are_refused():
    for changes, said in (
        ({"steps": 0}, "one step"),
        ({"asked": (1, 2)}, "give a number above 0 for each of presence"),
        ({"keep": 200}, "144 patches"),
    ):
        with pytest.raises(ValueError, match=said):
            replace(TINY, **changes)


# the packaged model


def test_the_packaged_model_is_small_and_generates_one_word(packaged, asked):
    folder = resources.files("fewer").joinpath("assets/llava-scenes")
    with resources.as_file(folder) as path:
        assert sum(file.stat().st_size for file in path.rglob("*.safetensors")) <= 10_000_000
    model, processor = packaged
    given = batch(asked[::60], processor)
    out = model.generate(**given.inputs, max_new_tokens=4)[:, given.input_ids.shape[1] :]
    assert (out[:, 0] == model(**given.inputs).logits[:, -1].argmax(-1)).all()
    assert (out[:, 1] == processor.tokenizer.eos_token_id).all()


def test_the_packaged_model_sees(packaged):
    questions = exam(24, seed=7)
    right, blind = (scenes.examine(*packaged, questions, blind=blind) for blind in (False, True))
    for kind in KINDS:
        assert right[kind] > blind[kind] + 0.1, kind
    assert right["place"] > 0.6
    assert right["colour"] > 0.6


def test_the_packaged_texts_find_things(packaged):
    model, processor = packaged
    clip, tokenizer = load_clip("llava-scenes", model)
    questions = exam(40, seed=3, kinds=("place",))
    given = batch(questions, processor)
    things = [question.scenes[0].things[question.about[0][1]] for question in questions]
    tokens = tokenizer([f"a {thing.colour} {thing.noun}" for thing in things], padding=True, return_tensors="pt")
    with torch.inference_mode():
        last = clip.vision_model(given.pixel_values).last_hidden_state[:, 1:]
        images = F.normalize(clip.visual_projection(clip.vision_model.post_layernorm(last)), dim=-1)
        texts = F.normalize(clip.text_projection(clip.text_model(**tokens).pooler_output), dim=-1)
    best = (images * texts[:, None]).sum(-1).argmax(1, keepdim=True)
    assert given.patches.gather(1, best).float().mean() > 0.7


def test_texts_need_the_tower_they_belong_to(packaged):
    with pytest.raises(ModelError, match="Linear does not have the vision tower"):
        load_clip("llava-scenes", torch.nn.Linear(2, 2))
    with pytest.raises(ModelError, match="vit-fashion has no image-text model beside it"):
        load_clip("vit-fashion", packaged[0])
