"""Signals: what a method may look at. Lazy, computed at most once, never more than asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import attention
from .attention import Seen
from .errors import SignalError
from .place import Place
from .tokens import Group, Tokens

if TYPE_CHECKING:
    from .denoising import Moment
    from .visual.view import Visual
    from .written import Written


class lazy:
    """A property computed once. cached_property takes a lock on Python 3.11, which torch.compile cannot trace."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function, self.__doc__ = function, function.__doc__

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        value = self.function(instance)
        instance.__dict__[self.function.__name__] = value
        return value


@dataclass(eq=False)
class Signals:
    """hidden: (B, N, C), the features the plan will act on. q, k, v: this block's, (B, H or G, N, d).

    grid       (height, width) of the input patches, row-major; of a video those of each frame
    frames     how many frames of patches the input has, one after the other; several frames cut as one count as one
    at         the place; pass it on to selectors and matchers
    branch     (B, N, C), what a mixer without attention (Mamba) added to the features; None elsewhere
    modules    the method's own trained modules, empty for training-free methods
    training   whether the training form is wanted
    prefix     tokens in front of the patches in the model's input
    beside     what surrounds visual tokens in a vision-language model; read it as `visual`
    text       tokens as words and sentences, and who reads them; read it as `written`
    pixels     (B, C, frames, height, width), the video that was cut into patches; read it as `clip`
    shared     what all methods of a pass know of the rows that are left
    against    asks the model that losses are held against; read it as `reference`
    at_step    where a denoiser's run is; read it as `moment`
    """

    hidden: Tensor
    tokens: Tokens
    at: Place
    seen: Seen | None = None
    grid: tuple[int, int] | None = None
    modules: nn.ModuleDict = field(default_factory=nn.ModuleDict)
    training: bool = False
    memory: dict[str, Any] = field(default_factory=dict)
    prefix: int = 0
    branch: Tensor | None = None
    beside: Visual | None = None
    text: Written | None = None
    against: Callable[[], Tensor] | None = None
    at_step: Moment | None = None
    frames: int = 1
    pixels: Tensor | None = None
    shared: dict[str, Any] = field(default_factory=dict)

    @property
    def clip(self) -> Tensor:
        """(B, C, frames, height, width): the video that was cut into patches."""
        if self.pixels is None or self.pixels.dim() != 5:
            raise SignalError(
                "the frames themselves are not known here: this method looks at the pixels of a video, in a model that "
                "cuts patches out of a whole clip (VideoMAE, ViViT, V-JEPA 2)"
            )
        return self.pixels

    @property
    def space(self) -> tuple[int, int, int]:
        """(frames, height, width) of the input patches. Raises SignalError where they form no known grid."""
        if self.grid is None:
            raise SignalError(
                "where each token stands in time and space is not known here; methods for videos need a model that "
                "cuts a clip into a grid of patches (VideoMAE, ViViT, V-JEPA 2)"
            )
        return self.frames, *self.grid

    @property
    def moment(self) -> Moment:
        """Where the run over denoising steps is."""
        if self.at_step is None:
            raise SignalError("this method acts in a denoiser (a UNet or transformer of diffusers), step by step")
        return self.at_step

    @lazy
    def reference(self) -> Tensor:
        """(B, N) float32: where a loss is chosen from, what these tokens cost the reference model."""
        if self.against is None:
            raise SignalError(
                "losses are held against those of a reference model: give fewer.apply(model, ..., guide=reference), a "
                "model with the same tokens that was trained on text of the wanted kind"
            )
        return self.against()

    @property
    def written(self) -> Written:
        """The tokens as a text, and who reads it."""
        if self.text is None:
            raise SignalError(
                "a text is read before a model is given it: fewer.Compressor does that, or fewer.apply with the method "
                "alone on the model"
            )
        return self.text

    @property
    def visual(self) -> Visual:
        """What surrounds the visual tokens of a vision-language model."""
        if self.beside is None:
            raise SignalError(
                "visual tokens and the text around them are known in vision-language models only; `fewer list` says "
                "what each method is for"
            )
        return self.beside

    def _attention(self, what: str) -> Seen:
        if self.seen is None:
            raise SignalError(
                f"{what} is not known here: the site comes before this block's attention, or the block has none"
            )
        return self.seen

    @property
    def q(self) -> Tensor:
        return self._attention("q").q

    @property
    def k(self) -> Tensor:
        return self._attention("k").k

    @property
    def v(self) -> Tensor:
        return self._attention("v").v

    @lazy
    def cell(self) -> tuple[Tensor, Tensor]:
        """Row and column in the patch grid of the input token each row stands for, (B, N) long each.

        Tokens in front of the patches count as the first cell; patches that form no known grid are one row. Visual
        tokens of a vision-language model know their cell themselves, in the tile or frame that `plane` numbers."""
        if self.beside is not None:
            return self.beside.view.row, self.beside.view.column
        place = (self.tokens.ordinal() - self.prefix).clamp(min=0)
        if self.grid is None:
            return torch.zeros_like(place), place
        place = place % (self.grid[0] * self.grid[1])
        return place // self.grid[1], place % self.grid[1]

    @property
    def extent(self) -> tuple[int, int | Tensor]:
        """Height and width of the patch grid of the input; what forms no known grid is one row, whose width may differ
        from sample to sample, (B, 1)."""
        if self.grid is not None:
            return self.grid
        return 1, self.at.start if self.at.starts is None else self.at.starts[:, None]

    @lazy
    def plane(self) -> Tensor:
        """(B, N) long: the image, tile or frame each row shows a cell of, numbered from 0 in the order of the input."""
        if self.beside is None and (self.grid is None or self.frames == 1):
            return torch.zeros_like(self.tokens.place())
        if self.beside is None:
            assert self.grid is not None
            return (self.tokens.ordinal() - self.prefix).clamp(min=0) // (self.grid[0] * self.grid[1])
        view, real = self.beside.view, self.beside.view.valid
        key = (view.item << 42) + (view.tile << 21) + view.time
        if real is not None:
            key = key.masked_fill(~real, torch.iinfo(key.dtype).max)  # padding is a plane behind all others
        ranked, order = key.sort(dim=-1, stable=True)
        number = (ranked.diff(dim=-1, prepend=ranked[:, :1]) != 0).cumsum(-1)
        return torch.empty_like(number).scatter_(-1, order, number)

    @lazy
    def key(self) -> Tensor:
        """(B, N, d) float32: keys averaged over heads, what a token offers."""
        return self.k.float().mean(dim=1)

    @lazy
    def value_norm(self) -> Tensor:
        """(B, N), float32: lengths of the values, heads side by side: how much a token can say."""
        return self.v.float().square().sum(dim=(1, 3)).sqrt()

    def attention_rows(self, queries: Group) -> Tensor:
        """(B, H, Q, N), float32: probabilities of some queries, all masks and biases applied."""
        seen = self._attention("attention")
        _, h, n, d = seen.q.shape
        self.at.spend(2 * h * len(queries) * n * d)
        return attention.rows(seen, queries)

    @lazy
    def cls_attention(self) -> Tensor:
        """(B, N), float32: the class token's attention averaged over heads; its own entry included."""
        return self.attention_rows(self.tokens.cls).mean(dim=(1, 2))

    def attention_mass(self, queries: Group | None = None, own: bool = True) -> Tensor:
        """(B, H, N), float32: attention received, summed over the queries; memory linear in N.

        own: whether what a token gives itself counts."""
        seen = self._attention("attention")
        _, h, n, d = seen.q.shape
        self.at.spend(2 * h * (n if queries is None else len(queries)) * n * d)
        weight = None if self.tokens.valid is None or queries is not None else self.tokens.valid.float()
        return attention.mass(seen, queries, weight, own)

    def attention_paid(self, keys: Group) -> Tensor:
        """(B, H, N), float32: attention each token pays to some keys, summed over them; memory linear in N."""
        seen = self._attention("attention")
        _, h, n, d = seen.q.shape
        self.at.spend(2 * h * n * seen.k.shape[-2] * d)
        return attention.paid(seen, keys)

    @lazy
    def saliency(self) -> Tensor:
        """(B, N), float32: importance every host can give: class attention where there is a class token, else the
        attention received from all queries, averaged over heads."""
        if self.tokens.has_cls:
            return self.cls_attention
        return self.attention_mass().mean(dim=1)

    def module(self, name: str) -> Any:
        """One of the method's trained modules: an nn.Module of a class the method knows."""
        if name not in self.modules:
            raise SignalError(f"this method has no module {name!r}; it has {sorted(self.modules)}")
        return self.modules[name]

    @property
    def device(self) -> torch.device:
        return self.hidden.device
