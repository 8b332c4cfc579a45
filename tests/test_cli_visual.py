"""The command line on vision-language models: tiny ones with random weights, of the shape of the packaged one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

import fewer
from fewer.cli import app
from fewer.models.zoo import Processor
from fewer.recipes import vlm
from fewer.testing.models import tiny_vit
from fewer.testing.vision_language import prompts, tiny_vlm

TEMPLATE = (
    "{% for part in messages[0]['content'] %}"
    "{{ '<image> ' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %} ?"
)
"""A chat template that ends every turn with a question mark."""


def fewer_cli(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def said(result: Result) -> str:
    """What a command that went well printed, runs of blanks as one, none at the ends of lines."""
    assert result.exit_code == 0, result.output
    return re.sub(r" +$", "", re.sub(r" +", " ", result.stdout), flags=re.MULTILINE)


def complaint(result: Result) -> str:
    """The one line of a known error: exit code 2, no traceback."""
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error ")
    return line


def small(folder: Path, template: str | None = None) -> Path:
    """llava-scenes with blocks of a few weights: 144 visual rows, three blocks each, 1,024 positions."""
    torch.manual_seed(0)
    recipe = vlm.Recipe(
        width=32, depth=3, heads=2, inner=32, lm_width=32, lm_depth=3, lm_heads=2, lm_inner=32, text_width=24,
        text_depth=1, joint=8,
    )  # fmt: skip
    model, clip, processor = vlm.build(recipe)
    processor.chat_template = template
    vlm.save(folder, model, clip, processor)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small(tmp_path_factory.mktemp("chatty"), TEMPLATE)


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("photos") / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)).save(file)
    return file


QUESTION = "what color is the bag ?"


# -- doctor -----------------------------------------------------------------------------------------------------------
def test_doctor_says_what_it_found(model: Path) -> None:
    shown = said(fewer_cli("doctor", model))
    for line in (
        "vision-language model Llava", "vision tower CLIPVisionModel", "blocks 3 x LlamaDecoderLayer",
        "the bridge verified",
        "image 144 visual rows, 12 x 12", "half removed 72 rows reach the last block",
        "nothing removed output equal to the bit", "session taken off output equal to the bit",
    ):  # fmt: skip
        assert line in shown


# -- generate ---------------------------------------------------------------------------------------------------------
def test_generate_reads_images_and_tells_what_is_left_of_them(model: Path, photo: Path) -> None:
    words = ("generate", "--model", model, "--image", photo, "--image", "scenes:2", QUESTION, "--max-new-tokens", 3)
    whole, fewer_rows = said(fewer_cli(*words)), said(fewer_cli(*words, "--method", "divprune:tokens=36"))
    read = 1 + 2 * 144 + 6  # <s>, two images, six words
    assert f"tokens {read} read" in whole
    assert f"tokens {read} read" in fewer_rows
    assert "visual rows" not in whole
    assert "visual rows 288 -> 72\n" in fewer_rows
    rows = re.search(r"rows per layer (\d+) of (\d+)", fewer_rows)
    assert rows is not None
    assert int(rows[2]) - int(rows[1]) == 288 - 72


def test_generate_writes_what_the_model_writes(model: Path) -> None:
    network: Any
    network, processor = fewer.models.zoo.load_model(model)
    from fewer.studio.seen import example

    picture = Image.fromarray(example(2).scenes[0].pixels)
    given = processor(images=[picture], text=[f"<image> {QUESTION}"], return_tensors="pt")
    with fewer.apply(network, "divprune:tokens=36"):
        ids = network.generate(**given, max_new_tokens=4, do_sample=False)
    written = processor.tokenizer.decode(ids[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
    shown = fewer_cli("generate", "--model", model, "--image", "scenes:2", "--prompt", QUESTION, "--method",
                      "divprune:tokens=36", "--max-new-tokens", 4)  # fmt: skip
    assert said(shown).splitlines()[0].strip() == written.strip()
    own = fewer_cli("generate", "--model", model, "--image", "scenes:2", f"<image> {QUESTION}", "--method",
                    "divprune:tokens=36", "--max-new-tokens", 4)  # fmt: skip
    assert said(own).splitlines()[0].strip() == written.strip()


def test_generate_as_json(model: Path) -> None:
    words = ("generate", "--model", model, "--image", "scenes:0", QUESTION, "--max-new-tokens", 3, "--method",
             "divprune:tokens=36")  # fmt: skip
    made, plain = json.loads(fewer_cli(*words, "--json").stdout), fewer_cli(*words).stdout
    assert plain.startswith(made["text"])
    assert (made["read"], made["written"]) == (1 + 144 + 6, 3)
    assert made["rows"] == [36 + 7 + 2] * 3


def test_generate_stacks_methods_and_reads_texts_alone(model: Path) -> None:
    stacked = said(fewer_cli("generate", "--model", model, "--image", "scenes:0", QUESTION, "--max-new-tokens", 2,
                             "--method", "divprune:tokens=40; fastv:keep=0.5,k=1; ott:group=8,window=8"))  # fmt: skip
    assert "visual rows 144 -> 20\n" in stacked  # behind the first block, where fastv cuts what divprune left
    assert "rows per layer 48, 28 of 152" in stacked
    cached = fewer_cli("generate", "--model", model, "--image", "scenes:0", QUESTION, "--method",
                       "snapkv:keep=0.5,window=8", "--max-new-tokens", 2)  # fmt: skip
    assert "visual rows" not in said(cached)  # all of them were read
    alone = said(fewer_cli("generate", "--model", model, QUESTION, "--method", "divprune", "--max-new-tokens", 2))
    assert "tokens 7 read" in alone
    assert "visual rows" not in alone


def test_generate_takes_a_chat_template(chatty: Path, model: Path) -> None:
    words = ("generate", "--model", chatty, "--image", "scenes:0", "--image", "scenes:1", "which image has the bag",
             "--max-new-tokens", 1)  # fmt: skip
    assert f"tokens {2 * 144 + 5 + 1} read" in said(fewer_cli(*words))  # the template's question mark, no <s>
    assert f"tokens {1 + 2 * 144 + 5} read" in said(fewer_cli(*words, "--raw"))
    none = fewer_cli("generate", "--model", model, "--image", "scenes:0", QUESTION, "--chat")
    assert "no chat template" in complaint(none)


# -- viz --------------------------------------------------------------------------------------------------------------
def test_viz_draws_what_is_left(model: Path, photo: Path, tmp_path: Path) -> None:
    file = tmp_path / "deep" / "x.png"
    shown = said(fewer_cli("viz", photo, "--model", model, "--question", QUESTION, "--method", "fastv:keep=0.5,k=1",
                           "--out", file))  # fmt: skip
    assert "visual rows 144 -> 72" in shown
    assert f"question {QUESTION}" in shown
    with Image.open(file) as drawn:
        assert drawn.format == "PNG"
        assert 2 * 276 < drawn.width < 3 * 276  # the input and one block
    own = said(fewer_cli("viz", "scenes:1", "--model", model, "--method", "visionzip:tokens=30", "--out", file))
    assert "question what is at the" in own  # the packaged scene's own question


def test_viz_asks_the_guide_beside_the_model(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other patches stay where there is none."""

    def drawn() -> np.ndarray:
        file = tmp_path / "x.png"
        said(fewer_cli("viz", "scenes:0", "--model", model, "--method", "trim:tokens=20,negate=false", "--out", file))
        with Image.open(file) as page:
            return np.asarray(page)[-276:]  # below the words

    def missing(*_: object) -> None:
        raise fewer.models.zoo.ModelError("none")

    guided = drawn()
    assert np.array_equal(drawn(), guided)
    monkeypatch.setattr(fewer.models.zoo, "load_clip", missing)
    assert not np.array_equal(drawn(), guided)


def test_pictures_of_cut_images_are_drawn_whole() -> None:
    from fewer.studio.seen import cells

    for name, grid in (("llava", (4, 4)), ("llava_next", (8, 4)), ("qwen2_vl", (2, 3))):
        network = tiny_vlm(name)
        with torch.no_grad(), fewer.apply(network, "divprune:tokens=3") as session:
            network(**prompts(network, [1]), use_cache=False)
            _, row, column = cells(session.layout)  # type: ignore[attr-defined]
        places = sorted(zip(row.tolist(), column.tolist(), strict=True))
        assert places == [(i, j) for i in range(grid[0]) for j in range(grid[1])]


def test_a_dropped_patch_fades_and_a_kept_one_does_not(model: Path) -> None:
    from fewer.studio.seen import as_seen, left, prompted

    network, processor = fewer.models.zoo.load_model(model)
    picture = Image.new("RGB", (96, 96), (0, 0, 255))
    given = prompted(network, processor, QUESTION, [picture], None)
    assert as_seen(processor, given, picture).getpixel((5, 5)) == (0, 0, 255)
    with torch.no_grad(), fewer.apply(network, "grid:site=bridge,tokens=36") as session:
        network(**given, use_cache=False)
        captions, (_, tile) = left(session, picture, size=12 * 8)  # type: ignore[arg-type]
        kept = session.seen()[0][session.layout.visual[0]].view(12, 12)  # type: ignore[attr-defined]
    assert captions == ["input", "block 1: 36 of 144"]
    same = [[tile.getpixel((8 * j + 4, 8 * i + 4)) == (0, 0, 255) for j in range(12)] for i in range(12)]
    assert same == kept.tolist()


# -- list, show, train ------------------------------------------------------------------------------------------------
def test_list_and_show_say_where_a_method_acts() -> None:
    lines = {line.split()[0]: line for line in fewer_cli("list").stdout.splitlines() if line.strip()}
    assert "between vision tower and language model" in lines["divprune"]
    assert "after a block" in lines["fastv"]
    shown = said(fewer_cli("show", "vscan"))
    assert "where between vision tower and language model" in shown
    assert "budget of each image or video" in shown
    assert "looks at attention of the vision tower's blocks: 5, the one whose output is used" in shown
    assert "\nblocks " not in shown
    inside = said(fewer_cli("show", "fastv"))
    assert "budget of each prompt" in inside
    assert "\nblocks by depth" in inside


def test_train_finds_the_settings_of_methods_that_have_such(model: Path, tmp_path: Path) -> None:
    shown = said(
        fewer_cli("train", "vtw", "--model", model, "--set", "prompts=2", "--set", "eta=100", "--out", tmp_path)
    )
    assert "vtw:k=1" in shown  # any answer will do, so the first layer does
    assert "vtw:k=1" in (tmp_path / "vtw.json").read_text()


@pytest.mark.parametrize(
    ("name", "recipe"),
    [("tokenpacker:tokens=16", "Projecting"), ("m3", "Projecting"), ("llama_vid", "Projecting"), ("dyvte", "Gates"),
     ("dynamic_llava:keep=0.3", "Predicting"), ("fitprune", "Search"), ("llava-scenes", "Recipe")],
)  # fmt: skip
def test_train_knows_the_recipe(name: str, recipe: str) -> None:
    """The error for an unknown field names the recipe that would run."""
    assert f"{recipe} has no field 'stepz'" in complaint(fewer_cli("train", name, "--set", "stepz=3"))


def test_train_says_what_scenes_cannot_teach() -> None:
    for name, why in (
        ("dynamic_llava_decode", "answers of 50 tokens"), ("voco_llama", "the model itself is tuned"),
        ("video_xl_pro", "videos of several frames"),
    ):  # fmt: skip
        assert why in complaint(fewer_cli("train", name))


# -- errors -----------------------------------------------------------------------------------------------------------
def test_complaints(model: Path, photo: Path, tmp_path: Path) -> None:
    vit = tmp_path / "vit"
    tiny_vit().save_pretrained(vit)  # type: ignore[operator]
    Processor((32, 32), (0.5,) * 3, (0.5,) * 3).save(vit)
    asks = ("generate", "--model", model, QUESTION, "--image")
    assert "no image" in complaint(fewer_cli(*asks, tmp_path / "none.png"))
    assert "scenes:0 to scenes:399" in complaint(fewer_cli(*asks, "scenes:400"))
    assert "give a number" in complaint(fewer_cli(*asks, "scenes:x"))
    many = complaint(fewer_cli(*asks, photo, *["--image", "scenes:0"] * 7))
    assert "8 images and the words make 1,159 tokens" in many
    assert "reads 1,024" in many
    named = fewer_cli("generate", "--model", model, "--image", photo, "<image> <image> is there a bag ?")
    assert "says <image> 2 times; images given: 1" in complaint(named)
    assert "two prompts" in complaint(fewer_cli("generate", "--model", model, "a", "--prompt", "b"))
    draws = ("viz", photo, "--out", tmp_path / "x.png")
    assert "acts on the visual tokens" in complaint(fewer_cli(*draws, "--model", vit, "--method", "divprune"))
    question = fewer_cli(*draws, "--model", vit, "--method", "tome:r=1", "--question", "why ?")
    assert "--question does not apply" in complaint(question)
    state = complaint(fewer_cli(*draws, "--model", model, "--method", "utrc:keep=0.5,layers=1"))
    assert "state-space" in state
    assert "writes no text" in complaint(fewer_cli("generate", "--model", vit, "--image", photo, "why ?"))


def test_a_text_model_sees_no_images(photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    llm = LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
    ))  # fmt: skip
    monkeypatch.setattr(fewer.models.zoo, "load_model", lambda name: (llm, vlm.tokenizer()))
    assert "sees no images" in complaint(fewer_cli("generate", "--model", "x", "--image", photo, "why ?"))
