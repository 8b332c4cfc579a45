"""Methods inside the language model of a small LLaVA: what holds for all of them."""

import pytest
import torch
from torch.testing import assert_close

import fewer
from fewer.compat import cache_of, cached
from llava import batched, prompt, tiny_llava

FORMS = {
    "fastv": "fastv:keep=0.5",
    "fastv-unrotated": "fastv:score=unrotated,layers=0+2",
    "fastv-corrected": "fastv:score=corrected,k=2",
    "vtw": "vtw:k=2",
    "pyramiddrop": "pyramiddrop",
    "sparsevlm": "sparsevlm:layers=0+1+2",
    "sparsevlm-second": "sparsevlm:recycle=false,heads=0.5,score=corrected",
    "dynamic_llava": "dynamic_llava:width=16,heads=2,inner=16,keep=0.5",
    "dyvte": "dyvte:hidden=16",
    "fitprune": "fitprune:keep=0.8",
    "framefusion": "framefusion:keep=0.5",
}
ROWS = {  # of one prompt with 16 visual rows and 6 words
    "fastv": [22, 14, 14, 14],
    "fastv-unrotated": [22, 14, 14, 10],
    "fastv-corrected": [22, 22, 14, 14],
    "vtw": [22, 22, 6, 6],
    "pyramiddrop": [22, 14, 10, 8],
    "sparsevlm": [22, 14, 12, 9],
    "sparsevlm-second": [22, 14, 12, 9],
    "dynamic_llava": [22, 14, 14, 14],
    "framefusion": [22, 22, 7, 7],
}


@pytest.fixture(scope="module")
def model():
    return tiny_llava()


@pytest.fixture(scope="module")
def modules(model):
    """One set of weights for each method that has some."""
    torch.manual_seed(0)
    made = {}
    for name in ("dynamic_llava", "dyvte"):
        with fewer.apply(model, FORMS[name], modules="untrained") as session:
            made[name] = session.modules
    for stage in made["dyvte"][0]:  # surer, so that rounding decides nothing
        torch.nn.init.normal_(stage["gate"].second.weight, generator=torch.Generator().manual_seed(2))
    return made


def rows(session):
    return [int(c) for c in session.counts]


@pytest.mark.parametrize("name", ROWS)
def test_counted_rows_of_each_layer(model, modules, name):
    with fewer.apply(model, FORMS[name], modules=modules.get(name)) as session, torch.no_grad():
        model(**prompt())
        assert rows(session) == ROWS[name]


@pytest.mark.parametrize("form", ["fastv:keep=1.0", "vtw:k=4", "sparsevlm:keep=1.0", "pyramiddrop:keep=1.0,of=start"])
def test_keeping_all_is_the_model(model, form):
    given = prompt()
    with torch.no_grad():
        want = model(**given).logits
        with fewer.apply(model, form):
            assert_close(model(**given).logits[:, -4:], want[:, -4:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("left", [True, False])
def test_a_prompt_alone_answers_as_in_a_padded_batch(model, modules, name, left):
    prompts = [prompt((5, 6, 7), seed=0), prompt((8, 9), images=2, seed=1), prompt((11, 12, 13, 14, 15), seed=2)]
    given = batched(prompts, left)
    with fewer.apply(model, FORMS[name], modules=modules.get(name)), torch.no_grad():
        together = model(**given, use_cache=left).logits
        for line, one in enumerate(prompts):
            real = given["attention_mask"][line].nonzero()[-1]
            assert_close(together[line, real], model(**one).logits[:, -1], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [n for n in FORMS if not n.startswith(("vtw", "sparsevlm", "dyvte", "framefusion"))])
def test_dropping_equals_masking(model, modules, name):
    given = prompt()
    found = []
    for execution in ("padded", "masked"):
        with fewer.apply(model, FORMS[name], modules=modules.get(name), execution=execution), torch.no_grad():
            found.append(model(**given, use_cache=False).logits[:, -4:])
    assert_close(*found, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", FORMS)
def test_writing_sees_the_set_chosen_at_the_prompt(model, modules, name):
    given = prompt()
    with fewer.apply(model, FORMS[name], modules=modules.get(name)) as session, torch.no_grad():
        out = model(**given, use_cache=True)
        chosen = rows(session)
        cache, mask = cache_of(out), given["attention_mask"]
        for token in (9, 10):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            out = model(input_ids=torch.tensor([[token]]), attention_mask=mask, **cached(model, cache))
        assert [c + 2 for c in chosen] == [int(layer.keys.shape[2]) for layer in cache.layers]
        if name in ("vtw", "dynamic_llava"):  # what is written does not change their choice: one pass must say the same
            whole = prompt((5, 6, 7, 8, 9, 10))
            assert_close(out.logits[:, -1], model(**whole, use_cache=False).logits[:, -1], atol=2e-5, rtol=1e-4)


def test_withdrawal_forgets_what_visual_rows_held(model):
    """Noise in the visual rows behind the last block that sees them changes nothing."""
    given, blocks = prompt(), model.model.language_model.layers

    def spoil(_module, _args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        hidden[:, 2:18] = 100.0
        return output

    with torch.no_grad(), fewer.apply(model, "vtw:k=2"):
        want = model(**given, use_cache=False).logits[:, -1]
    hook = blocks[1].mlp.register_forward_hook(lambda m, a, o: spoil(m, a, o))
    try:
        with torch.no_grad(), fewer.apply(model, "vtw:k=2"):
            assert_close(model(**given, use_cache=False).logits[:, -1], want, atol=1e-6, rtol=1e-6)
    finally:
        hook.remove()


@pytest.mark.parametrize("gate", [0, 1, 2])
def test_a_forced_gate_is_withdrawal_behind_its_block(model, gate):
    given = prompt()
    with fewer.apply(model, "dyvte:hidden=16", modules="untrained") as session, torch.no_grad():
        for stage, module in enumerate(session.modules[0]):
            module["gate"].forward = lambda x, go=stage == gate: torch.tensor([[0.0, 1.0 if go else -1.0]]).expand(
                len(x), -1
            )
        left = model(**given).logits[:, -1]
        assert rows(session) == [22] * (gate + 1) + [6] * (3 - gate)
    with fewer.apply(model, "vtw", k=gate + 1), torch.no_grad():
        assert_close(left, model(**given).logits[:, -1])


def test_budgets_of_two_images_count_per_prompt(model):
    with fewer.apply(model, "fastv:tokens=10") as session, torch.no_grad():
        model(**prompt(images=2))
        assert rows(session) == [38, 16, 16, 16]
