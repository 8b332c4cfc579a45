"""Random: fair, seeded, and the same for every image."""

import torch

import fewer
from fewer.core import Capacity, Place
from fewer.core.noise import noise
from vit import images, run, signals, tiny_vit


def kept(seed, layer, n=41, count=20):
    seen = signals(torch.zeros(2, n, 1), place=Place(layer, 12, start=n - 1))
    anchor = fewer.Random(Capacity(count), seed=seed).plan(seen, seen.tokens).anchor
    assert torch.equal(anchor[0], anchor[1])
    assert anchor[0, 0] == 0
    return set(anchor[0, 1:].tolist())


def test_the_seed_and_the_layer_decide():
    assert kept(0, 3) == kept(0, 3)
    assert len({frozenset(kept(seed, 3)) for seed in range(20)}) == 20
    assert len({frozenset(kept(0, layer)) for layer in range(12)}) == 12


def test_every_token_has_the_same_chance():
    times, together = torch.zeros(40), torch.zeros(39)
    for seed in range(400):
        draw = kept(seed, seed % 12)
        for i in draw:
            times[i - 1] += 1
            if i + 1 in draw:
                together[i - 1] += 1
    assert times.sum() == 400 * 20
    assert ((times - 200).abs() < 5 * 10).all()  # five standard deviations of a fair coin
    assert ((together - 400 * 20 * 19 / (40 * 39)).abs() < 5 * 9).all()  # neighbours know nothing of each other


def test_the_noise_is_uniform_and_uncorrelated():
    u = torch.stack([noise(torch.arange(4096), seed, 3) for seed in range(4)]) / 2**24
    assert 0 <= u.min() < 0.01
    assert 0.99 < u.max() < 1
    share = torch.histc(u, 16, 0, 1) / u.numel()
    assert (share - 1 / 16).abs().max() < 0.01
    assert (torch.corrcoef(u) - torch.eye(4)).abs().max() < 0.08  # five times 1 / sqrt(4096)
    assert torch.corrcoef(torch.stack([u[0, 1:], u[0, :-1]]))[0, 1].abs() < 0.08


def test_in_a_model():
    model, x = tiny_vit("vit"), images(3)
    with fewer.apply(model, "random:keep=0.5,layers=1+2,seed=7") as session:
        first = run(model, x)
        kept = session.kept(2)
        assert session.counts == [17, 9, 5, 5]
        assert torch.equal(kept, kept[:1].expand(3, -1))
        assert torch.equal(run(model, x), first)
