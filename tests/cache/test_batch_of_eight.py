"""Eight prompts of different lengths give the same tokens as one by one, for every method that runs in a decoder."""

from __future__ import annotations

import pytest
import torch

import fewer
from decoders import decoder, prompt
from fewer.core import Site
from fewer.core.cache import CacheReducer

LENGTHS = (23, 19, 31, 17, 26, 40, 21, 37)
GREEDY = dict(max_new_tokens=5, do_sample=False)
SETTINGS = {  # what small prompts need; every other method runs at its defaults
    "snapkv": "keep=0.5,window=4", "adakv": "keep=0.5,window=4", "pyramidkv": "keep=0.5,window=4",
    "chunkkv": "keep=0.5,window=4", "streamingllm": "tokens=12,sinks=2", "random_cache": "keep=0.5,recent=4",
    "ott": "group=8,window=8", "quest": "tokens=8,page=2", "lazyllm": "keep=0.6,layers=0+1", "sdtp": "layers=1+2",
    "agile_quant": "layers=1", "d2o": "tokens=14", "kvzip": "keep=0.5", "tokenbutler": "keep=0.5",
}  # fmt: skip


def forms() -> list[str]:
    """Every method of decoders, by its text form."""
    found = []
    for name, cls in sorted(fewer.registered().items()):
        if issubclass(cls, CacheReducer) or name in ("lazyllm", "sdtp", "agile_quant"):
            found.append(f"{name}:{SETTINGS[name]}" if name in SETTINGS else name)
    return found


def test_methods_of_decoders_are_found():
    assert len(forms()) >= 18
    assert SETTINGS.keys() <= {form.partition(":")[0] for form in forms()}
    assert Site.KV_CACHE in {fewer.parse(form).site for form in forms()}


@pytest.mark.parametrize("form", forms())
def test_eight_at_once(form):
    model = decoder("llama")
    ids, mask = prompt(*LENGTHS)
    torch.manual_seed(0)
    options = {"modules": "untrained"} if fewer.parse(form).card.training == "required" else {}
    with torch.no_grad(), fewer.apply(model, form, **options):
        together = model.generate(ids, attention_mask=mask, **GREEDY)[:, -5:]
        for row, words, own in zip(together, ids, mask, strict=True):
            alone = model.generate(words[None, own.bool()], **GREEDY)[0, -5:]
            assert alone.tolist() == row.tolist()
