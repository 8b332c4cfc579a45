"""Hourglass: a small character language model whose middle blocks see segments instead of characters.

    model = Hourglass.from_folder(DIR)  # made by `fewer train dynamic_pooling --out DIR`
    model.generate("The state of the union is ", 200)

Blocks before the middle read characters; `DynamicPooling` says which characters become one row; the middle blocks
read those rows; each character gets the last row it has seen the end of, added to what it was; the last blocks read
characters again. Without a method all blocks read characters: the plain model it is compared with.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from fewer.core import Place, Plan, Signals, Tokens
from fewer.core.learned import ModuleListOf
from fewer.methods.language.dynamic_pooling import BoundaryPredictor, DynamicPooling, restored
from fewer.spec import parse

__all__ = ["Hourglass", "HourglassError", "Reading", "Settings", "State"]

ASSETS = Path(__file__).parents[1] / "assets"
UNKNOWN = "\ufffd"


class HourglassError(ValueError):
    """A model's settings, its files or its input do not fit."""


@dataclass(frozen=True)
class Settings:
    """What a model is built from.

    alphabet   its characters; the first stands for all others
    width, depth, heads   channels, blocks, attention heads; the MLPs have 4 * width inner channels
    method     text form of a `DynamicPooling`, whose layers are the blocks that see segments; None = plain model
    """

    alphabet: str
    width: int = 128
    depth: int = 6
    heads: int = 2
    method: str | None = None

    def __post_init__(self) -> None:
        if self.width % self.heads or self.width // self.heads % 2:
            raise HourglassError(f"width={self.width}, heads={self.heads}: rotary heads need an even, whole width")
        method = self.pooling
        if method is not None and method.layers is not None and method.layers[-1] >= self.depth:
            raise HourglassError(f"{self.method} acts in block {method.layers[-1]}, but depth={self.depth}")

    @property
    def pooling(self) -> DynamicPooling | None:
        """The method, None for a plain model."""
        if self.method is None:
            return None
        method = parse(self.method)
        if not isinstance(method, DynamicPooling):
            raise HourglassError(f"{self.method}: this model pools with dynamic_pooling, or not at all")
        return method


@dataclass(frozen=True, eq=False)
class Reading:
    """What one pass over N characters gives.

    logits            (B, N, V), of the next character
    boundaries        (B, N), 1 where a segment ends; None for a plain model
    boundary_logits   (B, N), where a predictor decides
    plan              characters to segments
    """

    logits: Tensor
    boundaries: Tensor | None = None
    boundary_logits: Tensor | None = None
    plan: Plan | None = None


class Memory:
    """Keys and values of some blocks, with a length of its own for each sample. k, v: (blocks, B, H, capacity, d)."""

    def __init__(self, like: Tensor, blocks: int, batch: int, heads: int, capacity: int, d: int) -> None:
        self.k = like.new_zeros(blocks, batch, heads, capacity, d)
        self.v = torch.zeros_like(self.k)
        self.length = torch.zeros(batch, dtype=torch.long, device=like.device)


@dataclass(eq=False)
class State:
    """Where a model stands that reads one character at a time.

    outer, inner   keys and values of the blocks that see characters and of those that see segments
    total, count   (B, C), (B, 1): sum and number of the characters of the unfinished segment
    latest         (B, C): the middle's answer to the last finished segment, at first to the null group
    read           characters read so far
    """

    outer: Memory
    inner: Memory
    total: Tensor
    count: Tensor
    latest: Tensor
    read: int = 0


def rotate(x: Tensor, position: Tensor) -> Tensor:
    """Rotary embedding in half-split layout, frequencies from 1 to 1e-4. x: (..., N, d); position: (..., N)."""
    half = x.shape[-1] // 2
    frequency = 1e-4 ** (torch.arange(half, device=x.device) / half)
    angle = position[..., None] * frequency
    cos, sin = angle.cos(), angle.sin()
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Block(nn.Module):
    """A pre-norm transformer block with causal rotary attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def _heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """q, k, v of x (B, N, C), each (B, H, N, d) in float32: bfloat16 attention is slow to train on CPUs."""
        qkv = self.qkv(self.norm1(x)).float().unflatten(-1, (3, self.heads, -1))
        return tuple(t.transpose(1, 2) for t in qkv.unbind(-3))

    def _rest(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, C) -> the same shape. Rows see themselves and the rows before them."""
        q, k, v = self._heads(x)
        with torch.autocast(x.device.type, enabled=False):
            place = torch.arange(x.shape[1], device=x.device)
            attended = F.scaled_dot_product_attention(rotate(q, place), rotate(k, place), v, is_causal=True)
        return self._rest(x, attended)

    def step(self, x: Tensor, memory: Memory, block: int, who: Tensor) -> Tensor:
        """One more row for the samples `who`. x: (w, C) -> (w, C); memory.length says where it stands."""
        q, k, v = self._heads(x[:, None])
        at = memory.length[who]
        memory.k[block, who, :, at] = rotate(k, at[:, None, None])[:, :, 0]
        memory.v[block, who, :, at] = v[:, :, 0]
        width = int(at.max()) + 1
        keys, values = memory.k[block, who, :, :width], memory.v[block, who, :, :width]
        seen = torch.arange(width, device=x.device) <= at[:, None]
        attended = F.scaled_dot_product_attention(
            rotate(q, at[:, None, None]), keys, values, attn_mask=seen[:, None, None]
        )
        return self._rest(x[:, None], attended)[:, 0]


class Hourglass(nn.Module):
    """A causal character model with dynamic token pooling inside. See the module's text, and `Settings`."""

    blanks: Tensor
    codes: Tensor
    slots: Tensor

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        self.method = settings.pooling
        width, depth = settings.width, settings.depth
        self.embed = nn.Embedding(len(settings.alphabet), width)
        self.blocks = ModuleListOf(Block(width, settings.heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(settings.alphabet), bias=False)
        self.predictor = nn.ModuleDict()
        self.middle = range(depth, depth)
        if self.method is not None:
            assert self.method.layers is not None
            self.middle = range(self.method.layers[0], self.method.layers[-1] + 1)
            self.null = nn.Parameter(torch.zeros(width))
            self.segment_norm = nn.LayerNorm(width)
            if self.method.learned:
                self.predictor["boundaries"] = BoundaryPredictor(width, self.method.share)
        nn.init.normal_(self.head.weight, std=0.02)
        blanks = torch.tensor([c.isspace() for c in settings.alphabet])
        self.register_buffer("blanks", blanks, persistent=False)
        codes, slots = torch.tensor([ord(c) for c in settings.alphabet], dtype=torch.int32).sort()
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("slots", slots, persistent=False)

    # -- reading ------------------------------------------------------------------------------------------------------
    def forward(self, ids: Tensor) -> Reading:
        """ids: (B, N) long. Logits at n depend on the characters up to n alone. See `Reading`."""
        x = self._run(self.embed(ids), range(self.middle.start))
        if self.method is None:
            return Reading(self.head(self.norm(x)))
        signals = self._signals(x, ids, Tokens.plain(*ids.shape, device=ids.device))
        plan = self.method.plan(signals, signals.tokens)
        rows = torch.cat([self.null.expand(len(x), 1, -1), plan.reduce(x)], 1)
        rows = self._run(self.segment_norm(rows), self.middle)
        x = self._run(x + restored(plan, rows), range(self.middle.stop, len(self.blocks)))
        memory = signals.memory
        return Reading(self.head(self.norm(x)), memory["boundaries"], memory.get("logits"), plan)

    def _run(self, x: Tensor, blocks: Iterable[int]) -> Tensor:
        for i in blocks:
            x = self.blocks[i](x)
        return x

    def _signals(self, x: Tensor, ids: Tensor, tokens: Tokens) -> Signals:
        at = Place(layer=self.middle.start, layers=len(self.blocks), start=ids.shape[1])
        memory = {"whitespace": self.blanks[ids]}
        return Signals(x, tokens, at, modules=self.predictor, training=self.training, memory=memory)

    # -- one character at a time ---------------------------------------------------------------------------------------
    @torch.no_grad()
    def start(self, batch: int, capacity: int) -> State:
        """An empty state for `batch` texts of at most `capacity` characters."""
        like, s = self.embed.weight, self.settings
        shape = (batch, s.heads, capacity + 1, s.width // s.heads)
        outer = Memory(like, len(self.blocks) - len(self.middle), *shape)
        zeros = like.new_zeros(batch, s.width)
        state = State(outer, Memory(like, len(self.middle), *shape), zeros, zeros[:, :1], zeros)
        if self.method is not None:
            everyone = torch.arange(batch, device=like.device)
            state.latest = self._middle_step(self.null.expand(batch, -1), state, everyone)
        return state

    @torch.no_grad()
    def step(self, ids: Tensor, state: State) -> Tensor:
        """The next character's logits (B, V) after one more character. ids: (B,). Equal to `forward` on all of them.

        The middle runs only for the texts in which a segment ends here.
        """
        if state.read >= state.outer.k.shape[-2] - 1:
            raise HourglassError(f"this state has room for {state.read} characters; start one with a larger capacity")
        everyone = torch.arange(len(ids), device=ids.device)
        outer = [i for i in range(len(self.blocks)) if i not in self.middle]
        x = self.embed(ids)
        for slot, i in enumerate(outer):
            if self.method is not None and i == self.middle.stop:
                x = self._pool_step(x, ids, state)
            x = self.blocks[i].step(x, state.outer, slot, everyone)
        if self.method is not None and self.middle.stop == len(self.blocks):
            x = self._pool_step(x, ids, state)
        state.outer.length += 1
        state.read += 1
        return self.head(self.norm(x))

    def _pool_step(self, x: Tensor, ids: Tensor, state: State) -> Tensor:
        assert self.method is not None
        place = torch.full_like(ids, state.read)[:, None]
        signals = self._signals(x[:, None], ids[:, None], Tokens.plain(len(ids), 1, position=place, device=ids.device))
        ends = self.method.decide(signals, signals.tokens)[:, 0].bool()
        total, count = state.total + x, state.count + 1
        who = ends.nonzero()[:, 0]
        if len(who):
            rows = self._middle_step(total[who] / count[who], state, who)
            state.latest = state.latest.index_copy(0, who, rows)
        state.total, state.count = (t.masked_fill(ends[:, None], 0) for t in (total, count))
        return x + state.latest

    def _middle_step(self, row: Tensor, state: State, who: Tensor) -> Tensor:
        row = self.segment_norm(row)
        for slot, i in enumerate(self.middle):
            row = self.blocks[i].step(row, state.inner, slot, who)
        state.inner.length[who] += 1
        return row

    @torch.no_grad()
    def generate(
        self, prompt: str, length: int, *, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> str:
        """Continue a text by `length` characters; temperature 0 takes the likeliest one each time.

        Raises   HourglassError for an empty prompt: there is nothing to continue.
        """
        if not prompt:
            raise HourglassError("the prompt is empty; give at least one character to continue")
        training = self.training
        self.eval()
        state = self.start(1, len(prompt) + length)
        ids = self.encode(prompt)
        for i in ids:
            logits = self.step(i[None], state)
        chosen: list[Tensor] = []
        for _ in range(length):
            logits[:, 0] = -torch.inf  # the stand-in for unknown characters is never written
            if temperature == 0:
                chosen.append(logits.argmax(-1))
            else:
                chosen.append(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0])
            logits = self.step(chosen[-1], state)
        self.train(training)
        return self.decode(torch.cat(chosen)) if chosen else ""

    # -- text ---------------------------------------------------------------------------------------------------------
    def encode(self, text: str) -> Tensor:
        """(N,) long; characters outside the alphabet become 0."""
        if not text:
            return torch.empty(0, dtype=torch.long, device=self.codes.device)
        points = torch.frombuffer(bytearray(text, "utf-32-le"), dtype=torch.int32).to(self.codes.device)
        at = torch.searchsorted(self.codes, points).clamp(max=len(self.codes) - 1)
        return torch.where(self.codes[at] == points, self.slots[at], 0)

    def decode(self, ids: Tensor | Sequence[int]) -> str:
        return "".join(self.settings.alphabet[int(i)] for i in ids)

    # -- cost ---------------------------------------------------------------------------------------------------------
    def flops(self, n: int, rows: float) -> float:
        """Floating-point operations of a pass over n characters with `rows` segments (the null group not counted).

        2 per weight and row, and 4 C for each of the causal N (N + 1) / 2 pairs of an attention. Left out: norms,
        softmax, GELU and the pooling itself, 2 N C.
        """
        c, own = self.settings.width, 0
        inner = rows + 1
        for module in self.predictor.modules():
            own += 2 * n * module.weight.numel() if isinstance(module, nn.Linear) else 0
        total = float(own + 2 * n * self.head.weight.numel())
        for i in range(len(self.blocks)):
            m = inner if i in self.middle else n
            total += 24 * c * c * m + 4 * c * m * (m + 1) / 2
        return total

    # -- files --------------------------------------------------------------------------------------------------------
    def save(
        self, folder: str | Path, *, dtype: torch.dtype = torch.float32, card: dict[str, str] | None = None
    ) -> None:
        """Write config.json and model.safetensors. dtype: of the stored weights. card: notes for the file's header."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(self.settings), indent=1, ensure_ascii=False)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
        weights = {name: t.detach().to(dtype).contiguous() for name, t in self.state_dict().items()}
        save_file(weights, folder / "model.safetensors", metadata=card)

    @classmethod
    def from_folder(cls, folder: str | Path) -> Hourglass:
        """A saved model, in evaluation mode and float32. folder: its folder, or a packaged model's name.

        Raises   HourglassError where there is no such model, naming the packaged ones.
        """
        path = Path(folder) if Path(folder).is_dir() else ASSETS / str(folder)
        if not (path / "config.json").is_file():
            known = ", ".join(sorted(p.name for p in ASSETS.glob("hourglass-*"))) or "none"
            raise HourglassError(f"{folder} is no folder with an Hourglass; packaged: {known}")
        try:
            settings: dict[str, Any] = json.loads((path / "config.json").read_text(encoding="utf-8"))
            model = cls(Settings(**settings))
        except TypeError as error:
            raise HourglassError(f"{path / 'config.json'} does not describe an Hourglass: {error}") from error
        model.load_state_dict({name: t.float() for name, t in load_file(path / "model.safetensors").items()})
        return model.eval()
