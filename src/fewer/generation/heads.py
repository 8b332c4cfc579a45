"""Heads that guess several tokens ahead, on a causal language model that has one for the next token.

heads = Chained.of(model, count=3)      # small, on the last hidden state: TokenSwift, arXiv:2502.18890
heads = Layers.of(model, count=3)       # a block each, on what enters the last block: Gloeckle, arXiv:2404.19737
heads.save("out"); heads = load("out", model)

Head k, of 1 to n, guesses token t + 1 + k where the model itself, having read token t, foretells t + 1. All guess by
the model's own unembedding, which is no part of them.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewer.compat import without_cache
from fewer.hosts.steps import bound
from fewer.runtime import modules as trained

FILE = "multitoken.safetensors"
NAME = "multitoken"
"""Of that file, and of the recipe that makes it."""


class HeadsError(ValueError):
    """Heads that do not fit their model, cannot be read, or cannot be had."""


class Read:
    """What heads see of the model's latest pass. x: (B, N, C); given: the other arguments of the module it entered."""

    def __init__(self) -> None:
        self.x: Tensor | None = None
        self.given: dict[str, Any] = {}

    def take(self) -> tuple[Tensor, dict[str, Any]]:
        """Both, once. Raises HeadsError where the model was not called."""
        x, given = self.x, self.given
        self.x, self.given = None, {}
        if x is None:
            raise HeadsError("the model's pass did not go through the module that its heads look at")
        return x, given


class Heads(nn.Module):
    """What both kinds share.

    count   heads. width: C, of the model
    words   (W,) long: the tokens the heads choose among, for an unembedding of W rows; None = all. Which tokens there
            are changes what is guessed, never what is written (FR-Spec, arXiv:2502.14856)
    """

    kind: ClassVar[str]
    words: Tensor | None

    def __init__(self, count: int, width: int, words: Tensor | None = None) -> None:
        super().__init__()
        if count < 1:
            raise HeadsError(f"count={count}: one head or more")
        self.count, self.width = count, width
        self.register_buffer("words", None if words is None else words.long())

    # -- where they look ---------------------------------------------------------------------------------------------
    def tap(self, model: nn.Module) -> nn.Module:
        """The module of a model whose input they see."""
        raise NotImplementedError

    @contextmanager
    def reading(self, model: nn.Module) -> Iterator[Read]:
        """Until the block ends, every pass of the model leaves there what the heads see of it."""
        read = Read()

        def seen(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            features, given = bound(module, args, kwargs)
            read.x = given.pop(features)
            read.given = without_cache(given)

        hook = self.tap(model).register_forward_pre_hook(seen, with_kwargs=True)
        try:
            yield read
        finally:
            hook.remove()

    # -- what they say -----------------------------------------------------------------------------------------------
    def groups(self, x: Tensor, given: Mapping[str, Any]) -> Iterator[list[Tensor]]:
        """What the unembedding reads, (B, N, C) of each head in order; heads that share a graph come together."""
        raise NotImplementedError

    def forward(self, x: Tensor, given: Mapping[str, Any] | None = None) -> list[Tensor]:
        """All of these, in order."""
        return [state for group in self.groups(x, given or {}) for state in group]

    def unembedding(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        """(..., C) -> (..., W) logits. What a model does to its logits besides, such as scaling, is left out."""
        layer: Any = unembedding_of(model)
        weight, bias = layer.weight, getattr(layer, "bias", None)
        if self.words is not None:
            weight, bias = weight[self.words], None if bias is None else bias[self.words]
        return lambda x: F.linear(x.to(weight.dtype), weight, bias)

    # -- kept --------------------------------------------------------------------------------------------------------
    def about(self) -> dict[str, Any]:
        """What `load` builds them by."""
        return {"kind": self.kind, "count": self.count, "width": self.width}

    def save(self, path: str | Path, card: Mapping[str, str] | None = None, state: Mapping[str, Tensor] | None = None,
             dtype: torch.dtype | None = None) -> Path:  # fmt: skip
        """Write them into a folder, as multitoken.safetensors, or to a file of that suffix. Returns the file.

        card: kept in the file's metadata. state: the weights, where the heads' own are scattered. dtype: to write.
        """
        from safetensors.torch import save_file

        path = Path(path)
        path = path if path.suffix == trained.SUFFIX else path / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = {k: v.detach().cpu().contiguous() for k, v in (state or self.state_dict()).items()}
        kept = {k: v.to(dtype) if dtype is not None and v.is_floating_point() else v for k, v in kept.items()}
        if "words" in kept:
            kept["words"] = kept["words"].to(torch.int32)
        save_file(kept, path, {"heads": json.dumps(self.about())} | dict(card or {}))
        return path


class Chained(Heads):
    """Heads on the model's last hidden state, each on what the one before made of it.

    h_k = h_(k-1) + Linear(RMSNorm(h_(k-1))), and the unembedding reads RMSNorm(h_k); h_0 is what the model's own
    unembedding reads. Untrained, all guess what the model foretells for the next token, half as surely.
    """

    kind = "chained"

    def __init__(self, count: int, width: int, words: Tensor | None = None, eps: float = 1e-6) -> None:
        super().__init__(count, width, words)
        self.inward = nn.ModuleList(nn.RMSNorm(width, eps) for _ in range(count))
        self.linear = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(count))
        self.outward = nn.ModuleList(nn.RMSNorm(width, eps) for _ in range(count))
        for p in self.linear.parameters():
            nn.init.zeros_(p)

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, count: int = 3, words: Tensor | None = None) -> Chained:
        """Untrained ones for a model, on its device, in float32."""
        layer: Any = unembedding_of(model)
        heads = cls(count, layer.weight.shape[1], words).to(layer.weight.device)
        with heads.reading(model) as read:
            model(torch.arange(layer.weight.shape[0], device=layer.weight.device)[None, :64])
        size = read.take()[0].float().square().mean().sqrt()  # of what the unembedding is used to
        for p in heads.outward.parameters():
            p.fill_(size / 2)
        return heads

    def tap(self, model: nn.Module) -> nn.Module:
        return unembedding_of(model)

    def groups(self, x: Tensor, given: Mapping[str, Any]) -> Iterator[list[Tensor]]:
        h = x.to(next(self.linear.parameters()).dtype)
        states = []
        for inward, linear, outward in zip(self.inward, self.linear, self.outward, strict=True):
            h = h + linear(inward(h))
            states.append(outward(h))
        yield states


class Layers(Heads):
    """A block of the model's own kind for each head, with the norm behind it, on what enters the model's last block.

    The model's last block is, with its own unembedding, the head for the next token. `of` begins with copies of it.
    """

    kind = "layers"

    def __init__(self, blocks: Sequence[nn.Module], norms: Sequence[nn.Module], width: int,
                 words: Tensor | None = None) -> None:  # fmt: skip
        super().__init__(len(blocks), width, words)
        self.block, self.norm = nn.ModuleList(blocks), nn.ModuleList(norms)
        for module in self.block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = 0  # type: ignore[assignment]  # of the cache of one layer that a head has

    @classmethod
    def of(cls, model: nn.Module, count: int = 3, words: Tensor | None = None) -> Layers:
        """Copies of the model's last block and of the norm behind it, one pair for each head.

        Raises   HostError where the model's blocks cannot be found.
        """
        last, norm = _end(model)
        made = [(copy.deepcopy(last), copy.deepcopy(norm)) for _ in range(count)]
        width = unembedding_of(model).weight.shape[1]
        return cls([block for block, _ in made], [norm for _, norm in made], width, words).requires_grad_()

    def tap(self, model: nn.Module) -> nn.Module:
        return _blocks(model)[-1]

    def groups(self, x: Tensor, given: Mapping[str, Any]) -> Iterator[list[Tensor]]:
        for head in range(self.count):
            yield [self.state(head, x, given)]

    def state(self, head: int, x: Tensor, given: Mapping[str, Any]) -> Tensor:
        """One head's state, (B, N, C). head: from 0; given: the other arguments of the block, its cache among them."""
        out = self.block[head](x, **given)
        return self.norm[head](out if isinstance(out, Tensor) else out[0])


def load(source: str | Path, model: nn.Module) -> Heads:
    """Heads that were saved, on the model's device and in its dtype.

    source: a file, a folder with multitoken.safetensors, or the name of a packaged model. Raises HeadsError.
    """
    file = Path(source)
    file = file if file.is_file() else file / FILE
    if not file.is_file() and not (file := trained.ASSETS / source / FILE).is_file():
        raise HeadsError(
            f"heads={str(source)!r}: no file, folder or packaged model with {FILE}; train them with "
            f"`fewer train {NAME} --model MODEL --out DIR` and give heads=DIR, or heads=None for none"
        )
    try:
        about: dict[str, Any] = json.loads(trained.read_card(file)["heads"])
        state, kind, count, width = trained.read(file), about["kind"], about["count"], about["width"]
    except (KeyError, ValueError) as error:
        raise HeadsError(f"{file} does not hold heads that fewer wrote: {error}") from error
    words = state.get("words")
    parameter = next(model.parameters())
    if width != (own := unembedding_of(model).weight.shape[1]):
        raise HeadsError(f"{file}: heads for a model of width {width}, and this one's is {own}")
    heads = Chained(count, width, words) if kind == Chained.kind else Layers.of(model, count, words)
    heads.to(parameter.device, parameter.dtype)
    try:
        heads.load_state_dict(state)
    except RuntimeError as error:
        raise HeadsError(f"{file}: its heads do not fit this model: {error}") from error
    return heads.eval()


def packaged(model: nn.Module) -> Heads | None:
    """The heads that the package has for a model; None where it has none."""
    folder = trained.packaged(model, NAME)
    return None if folder is None else load(folder, model)


def unembedding_of(model: nn.Module) -> Any:
    """The layer that makes logits. Raises HeadsError where there is none."""
    layer = getattr(model, "get_output_embeddings", lambda: None)()
    if layer is None:
        raise HeadsError(
            f"{type(model).__name__} has no output embeddings: heads guess tokens of a causal language model "
            "(AutoModelForCausalLM)"
        )
    return layer


def _blocks(model: nn.Module) -> Sequence[nn.Module]:
    from fewer import hosts

    return hosts.find(model).blocks


@torch.no_grad()
def _end(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The last block, and what reads its output before the unembedding does: a norm, or nothing."""
    last, found, out = _blocks(model)[-1], list[nn.Module](), list[Tensor]()
    hooks = [last.register_forward_hook(lambda _m, _a, y: out.append(y if isinstance(y, Tensor) else y[0]))]
    top = unembedding_of(model)

    def reads(module: nn.Module, args: tuple) -> None:
        if out and args and args[0] is out[-1] and module is not top:
            found.append(module)

    hooks += [module.register_forward_pre_hook(reads) for module in model.modules()]
    try:
        model(torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device))
    finally:
        for hook in hooks:
            hook.remove()
    return last, found[-1] if found else nn.Identity()
