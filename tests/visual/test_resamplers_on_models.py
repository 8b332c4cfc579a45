"""Resamplers for clips, SeTok and VoCo-LLaMA inside vision-language models."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.testing import assert_close

import fewer
from fewer.compat import cache_of, cached
from fewer.core import SignalError
from fewer.core.visual.layout import Item
from fewer.hosts import HostError
from fewer.recipes.projector import Projecting, train
from fewer.testing.vision_language import prompts, tiny_vlm

ROWS = {  # of a picture of 4 x 4
    "llama_vid:hidden=16": 2, "llama_vid:hidden=16,content=2,queries=3": 5, "hicom:group=1+2+2,queries=3": 7,
    "hicom:group=1+3+3,queries=0,local=fine": 4, "video_xl_pro:share=0.8": 3, "video_xl_pro:tokens=2": 2,
    "setok:tokens=5": 5, "setok:tokens=5,trained=true": 5,
}  # fmt: skip


def opened(model, spec, **changes):
    torch.manual_seed(0)
    method = fewer.parse(spec, **changes)
    free = method.card.name == "setok" and not method.trained
    return fewer.apply(model, method, modules=None if free else "untrained")


@pytest.mark.parametrize("spec", ROWS)
def test_as_many_rows_as_it_says_and_the_same_alone_as_beside_others(spec: str):
    model = tiny_vlm("llava")
    both = prompts(model, [1, 2])
    with opened(model, spec) as session, torch.no_grad():
        logits = model(**both).logits
        assert session.visual_counts == [1.5 * ROWS[spec]] * 4
        real = both["attention_mask"][0] > 0
        single = {k: v[:1, real] if k != "pixel_values" else v[:1] for k, v in both.items()}
        assert_close(model(**single).logits[0, -1], logits[0, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", ["llama_vid:hidden=16", "hicom:group=1+2+2,queries=2", "setok:threshold=0.2"])
def test_writing_with_a_cache_is_as_without(spec: str):
    model = tiny_vlm("llava")
    given = prompts(model, [1])
    with opened(model, spec) as session:
        cached = model.generate(**given, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        written = given["input_ids"]
        for i in range(3):
            session.answers = (torch.arange(written.shape[1]) >= written.shape[1] - i)[None]
            whole = {"input_ids": written, "attention_mask": torch.ones_like(written)}
            logits = model(**whole, pixel_values=given["pixel_values"], use_cache=False).logits
            written = torch.cat([written, logits[:, -1:].argmax(-1)], 1)
        assert cached.tolist()[0][-3:] == written.tolist()[0][-3:]


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm", "llava_next", "llava"])
def test_clusters_on_every_family(kind: str):
    model = tiny_vlm(kind)
    given = prompts(model, [1, 1])
    with fewer.apply(model, "setok:tokens=3") as session, torch.no_grad():
        assert model(**given).logits.isfinite().all()
        assert session.visual_counts[-1] == 3


def test_modules_at_the_bridge_are_refused_where_pictures_have_any_size():
    with pytest.raises(HostError, match="takes pictures of any size"):
        fewer.apply(tiny_vlm("qwen2_5_vl"), "llama_vid", modules="untrained")


@pytest.mark.parametrize(("spec", "rows"), [("llama_vid:hidden=16", 6), ("hicom:group=1+2+2,queries=1", 13)])
def test_full_crops_are_frames(spec: str, rows: int):
    """LLaVA-NeXT: a view of the whole and two full crops, each of 4 x 4."""
    model = tiny_vlm("llava_next")
    with opened(model, spec) as session, torch.no_grad():
        assert model(**prompts(model, [1])).logits.isfinite().all()
        assert session.visual_counts[-1] == rows


def test_a_layout_knows_the_cells_of_full_tiles_and_frames_only():
    assert Item.raster(3, 2, 4).cells == (2, 4)
    assert Item.raster(2, 2, 2, tiles=3).cells == (2, 2)
    full = Item.raster(1, 2, 2)
    ended = [torch.cat([x, x[-1:]]) for x in (full.tile, full.time, full.row, full.column)]
    assert Item(*ended, None, torch.tensor([False] * 4 + [True])).cells == (2, 2)
    cut = torch.tensor([0, 1, 4, 5, 8, 9])  # a crop of 3 x 4 without the padding on its right
    wide = Item.raster(1, 3, 4)
    both = [torch.cat([x, x[cut]]) for x in (wide.tile, wide.time, wide.row, wide.column)]
    assert Item(*both).cells is None


@pytest.mark.parametrize(
    ("spec", "rows"),
    [("llama_vid:hidden=16", 4), ("hicom:group=2+2+2,queries=1", 2), ("video_xl_pro", 1), ("setok:tokens=3", 3)],
)
def test_videos_whose_frames_are_pooled_behind_the_projector(spec: str, rows: int):
    """LLaVA-OneVision: two frames of 2 x 2; the rows themselves are all there is to see."""
    model = tiny_vlm("llava_onevision")
    given = prompts(model, [1], video=True)
    with opened(model, spec), pytest.raises(SignalError, match="not known here"):
        model(**given)
    with opened(model, spec, sees="projected") as session, torch.no_grad():
        assert model(**given).logits.isfinite().all()
        assert session.visual_counts[-1] == rows
    with pytest.raises(ValueError, match="sees='pixels'"):
        fewer.parse(spec, sees="pixels")


def test_a_model_reads_many_questions_from_what_voco_tokens_kept():
    model = tiny_vlm("llava")
    given = prompts(model, [1])
    voco = torch.full((1, 2), 49)
    front = {**given, "input_ids": torch.cat([given["input_ids"], voco], 1)}
    front["attention_mask"] = torch.ones_like(front["input_ids"])
    with fewer.apply(model, "voco_llama:tokens=2") as session, torch.no_grad():
        cache = cache_of(model(**front, use_cache=True))
        assert session.counts == [2] * len(session.counts)
        answers = []
        for word in (5, 6, 5):
            question = torch.cat([front["input_ids"], torch.tensor([[word, 7]])], 1)
            mine = copy.deepcopy(cache)
            found = model.generate(
                input_ids=question, attention_mask=torch.ones_like(question), **cached(model, mine), max_new_tokens=3,
                min_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
            answers.append(torch.stack(found.logits))
        first, second, third = answers
        assert torch.equal(first, third)
        assert not torch.equal(first, second)


@pytest.mark.parametrize("spec", ["llama_vid:hidden=16,tokens=2", "hicom:group=1+2+2,queries=1,tokens=5"])
def test_the_recipe_trains_them(spec: str, tmp_path):
    model = copy.deepcopy(tiny_vlm("llava"))
    given = prompts(model, [1, 1])
    labels = torch.full_like(given["input_ids"], -100)
    labels[:, -1] = given["input_ids"][:, -1]
    report = train(Projecting(spec, steps=3), model, [{**given, "labels": labels}], tmp_path, log=lambda line: None)
    assert report.lines[-1] != report.lines[0]
    with fewer.apply(model, spec, modules=tmp_path), torch.no_grad():
        assert model(**given).logits.isfinite().all()
