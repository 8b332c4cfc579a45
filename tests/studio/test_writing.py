"""`fewer generate`: the text is generate()'s own, printed as it comes; the ledger beside it tells the cache's state."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import fewer
from evaluation.toys import llama, tokenizer
from fewer.cli import app
from fewer.studio.writing import Pen, prompt_ids

TEXT = "one two three four five six seven eight nine ten " * 3


def pen(terminal: bool = False) -> tuple[Pen, io.StringIO]:
    made = io.StringIO()
    return Pen(llama(), tokenizer(), Console(file=made, force_terminal=terminal, width=60)), made


def ledger(printed: str) -> dict[str, str]:
    return dict(re.findall(r"^(tokens|rows per layer|keys, values|first token|decoding) +(.+?) *$", printed, re.M))


def plain(ids: torch.Tensor, method: str | None) -> str:
    model = llama()
    if method:
        fewer.apply(model, method)
    out = model.generate(ids, max_new_tokens=24, do_sample=False)  # type: ignore[operator]
    return tokenizer().decode(out[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("method", [None, "snapkv:keep=0.5,window=8"])
def test_what_is_written_is_what_generate_writes(method: str | None) -> None:
    writer, made = pen()
    ids = prompt_ids(writer.model, tokenizer(), TEXT, None)
    if method:
        fewer.apply(writer.model, method)
    text = writer.write(ids, 24)
    assert text == plain(ids, method)
    found = ledger(made.getvalue())
    n = ids.shape[1]
    assert found["tokens"] == f"{n} read, 24 written"
    rows = (n // 2 if method else n) + 23  # the last token is never read
    assert found["rows per layer"] == f"{rows} of {n + 23}"
    share = re.search(r"\((\d+) %\)", found["keys, values"])
    assert share is not None
    assert int(share[1]) == pytest.approx(100 * rows / (n + 23), abs=3)  # a growing cache holds a few free rows
    assert float(found["first token"].removesuffix(" s")) >= 0
    assert float(found["decoding"].removesuffix(" tokens/s")) > 0


def test_a_terminal_sees_the_ledger_live_and_all_of_the_text() -> None:
    writer, made = pen(terminal=True)
    ids = prompt_ids(writer.model, tokenizer(), TEXT, None)
    text = writer.write(ids, 40)
    seen = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", made.getvalue())
    for word in text.split():
        assert word[:20] in seen
    assert "rows per layer" in seen
    assert "\x1b[" in made.getvalue()


def test_sampling_repeats_with_its_seed() -> None:
    writer, _ = pen()
    ids = prompt_ids(writer.model, tokenizer(), TEXT, None)
    assert writer.write(ids, 20, seed=1) == writer.write(ids, 20, seed=1) != writer.write(ids, 20, seed=2)


def test_a_chat_needs_a_template() -> None:
    with pytest.raises(ValueError, match="no chat template"):
        prompt_ids(llama(), tokenizer(), "hello", True)
    import copy

    taught = copy.deepcopy(tokenizer())
    taught.chat_template = (
        "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    assert taught.decode(prompt_ids(llama(), taught, "hello", None)[0]) == "[hello]>"
    assert taught.decode(prompt_ids(llama(), taught, "hello", False)[0]) == "hello"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("llama")
    llama().save_pretrained(where)  # type: ignore[operator]
    tokenizer().save_pretrained(where)
    return where


def cli(*words: object) -> tuple[int, str, str]:
    run = CliRunner().invoke(app, [str(word) for word in words])
    return run.exit_code, run.stdout, run.stderr


def test_generate_from_the_command_line(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    code, shown, _ = cli("generate", "--model", folder, "--file", text, "--prompt", "And then", "--method",
                         "snapkv:tokens=40,window=8", "--max-new-tokens", 8)  # fmt: skip
    assert code == 0
    assert ledger(shown)["rows per layer"].startswith("47 of ")
    code, shown, _ = cli("generate", "--model", folder, "--prompt", "And then", "--max-new-tokens", 3)
    assert code == 0
    assert "(100 %)" in shown


def test_generate_complains(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.txt"
    broken.write_bytes(b"\xff\xfe\xff")
    for words, said in (
        (("--prompt", ""), "nothing to go on from"),
        (("--file", broken), "not a text in UTF-8"),
        (("--prompt", "a", "--method", "snapkvv"), "did you mean snapkv"),
    ):
        code, _, complaint = cli("generate", "--model", folder, *words)
        assert code == 2
        assert said in complaint
    code, _, complaint = cli("generate", "--model", "vit-fashion", "--prompt", "a")
    assert code == 2
    assert "vit-fashion writes no text" in complaint


def test_bench_knows_a_language_model_and_whose_options_are_whose(folder: Path, tmp_path: Path) -> None:
    code, _, said = cli("bench", "--model", folder, "--batch", 4, "--out", tmp_path)
    assert code == 2
    assert "--batch does not apply" in said
    code, _, said = cli("bench", "--task", "qa", "--out", tmp_path)
    assert code == 2
    assert "--task does not apply: vit-fashion is no causal language model" in said
    code, _, said = cli("bench", "--model", folder, "--task", "needel", "--out", tmp_path)
    assert code == 2
    assert "needel" in said
