"""Trained projectors inside vision-language models: counts, identity, neighbours, writing, files."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import fewer
from fewer.testing.vision_language import prompts, tiny_vlm

SPECS = (
    "m3:tokens=4", "tokenpacker:tokens=4", "honeybee_c:tokens=4", "honeybee_d:tokens=4,depth=1",
    "brave:tokens=4,depth=1,fine_depth=1,fine_width=8",
)  # fmt: skip


def opened(model, spec, modules="untrained"):
    torch.manual_seed(0)
    return fewer.apply(model, spec, modules=None if spec.startswith("m3") else modules)


@pytest.mark.parametrize("spec", SPECS)
def test_as_many_rows_as_asked_and_the_same_alone_as_beside_others(spec):
    model = tiny_vlm("llava")
    both = prompts(model, [1, 2])
    with opened(model, spec) as session, torch.no_grad():
        logits = model(**both).logits
        assert session.visual_counts == [6.0] * 4  # 4 of the one image, 8 of the two
        real = both["attention_mask"][0] > 0
        alone = {k: v[:1, real] if k != "pixel_values" else v[:1] for k, v in both.items()}
        assert_close(model(**alone).logits[0, -1], logits[0, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", [*SPECS[:-1], f"{SPECS[-1]},text=false", "mini_gemini:depth=1"])
def test_writing_with_a_cache_is_as_without(spec):
    model = tiny_vlm("llava")
    given = prompts(model, [1])
    with opened(model, spec):
        cached = model.generate(**given, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        written = given["input_ids"]
        for _ in range(4):
            mask = torch.ones_like(written)
            whole = {"input_ids": written, "attention_mask": mask, "pixel_values": given["pixel_values"]}
            logits = model(**whole, use_cache=False).logits
            written = torch.cat([written, logits[:, -1:].argmax(-1)], 1)
        assert cached.tolist()[0][-4:] == written.tolist()[0][-4:]


def test_mini_gemini_starts_as_the_model_and_moves_from_there():
    model = tiny_vlm("llava")
    given = prompts(model, [2, 1])
    with torch.no_grad():
        plain = model(**given).logits
        with opened(model, "mini_gemini:width=8,depth=1") as session:
            real = given["attention_mask"] > 0
            assert_close(model(**given).logits[real], plain[real], rtol=1e-4, atol=1e-4)
            assert session.visual_counts == [24.0] * 4
            nn.init.normal_(session.modules[0][0]["mining"].value[1].weight)
            assert not torch.allclose(model(**given).logits, plain, atol=1e-2)


def test_everything_kept_by_m3_is_the_model():
    model = tiny_vlm("llava")
    given = prompts(model, [1, 2])
    with torch.no_grad():
        plain = model(**given).logits
        with fewer.apply(model, "m3:tokens=16"):
            assert_close(model(**given).logits, plain)


@pytest.mark.parametrize("spec", ["m3:tokens=9", "tokenpacker:tokens=9", "honeybee_c:tokens=9"])
def test_cut_up_pictures(spec):
    """LLaVA-NeXT: a view of the whole and two full crops, separators between."""
    model = tiny_vlm("llava_next")
    with opened(model, spec) as session, torch.no_grad():
        assert model(**prompts(model, [1, 1], seed=1)).logits.isfinite().all()
        assert session.visual_counts == [9.0] * 4


@pytest.mark.parametrize("spec", SPECS[1:])
def test_modules_survive_their_file(spec, tmp_path):
    model = tiny_vlm("llava")
    given = prompts(model, [1])
    with torch.no_grad():
        with opened(model, spec) as session:
            want = model(**given).logits
            session.save_modules(tmp_path)
        with opened(model, spec, modules=tmp_path):
            assert_close(model(**given).logits, want)


def test_nobody_reads_the_answers_that_are_to_be_learned():
    model = tiny_vlm("llava")
    given = prompts(model, [1])
    other = {**given, "input_ids": given["input_ids"].clone()}
    other["input_ids"][0, -1] = 7
    with opened(model, SPECS[-1]) as session, torch.no_grad():
        assert not torch.allclose(model(**given).logits[:, -2], model(**other).logits[:, -2], atol=1e-4)
        session.answers = torch.arange(given["input_ids"].shape[1])[None] == given["input_ids"].shape[1] - 1
        assert_close(model(**given).logits[:, -2], model(**other).logits[:, -2])
