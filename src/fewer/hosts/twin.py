"""A twin: a model of somebody's class, built small and random from their config, never from their weights.

What a class does with its tokens is read off its twin. `shrink` makes widths small and keeps what decides behaviour,
`build` makes the model, `example` makes what its forward takes.
"""

from __future__ import annotations

import copy
import inspect
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PretrainedConfig

VOCABULARY = 112
WINDOW = 8  # tokens; an example of 24 goes past it
SELECTED = 16  # keys a sparse attention picks
SIDE = 4  # patches along a side of an image
POSITIONS = 512  # of a learned table; rotary positions cost nothing and are kept
FRAMES = 64  # of a spectrogram, where the model is made for one length
WIDTH = 64  # of a model whose head width does not follow from its width
WIDEST = 512  # of one where it does
TIED = 128  # of one where it need not, but does
HEAD = 512  # the widest head that is kept
BOUND_HEAD = 128  # the same where the width follows from it
EXPERTS = 4


class TwinError(TypeError):
    """No twin of a class can be built or run. Names the class, what was tried and what failed."""


def shrink(config: PretrainedConfig, depth: int | None = None) -> PretrainedConfig:
    """A copy of a config, nested ones included, with small widths and everything that decides behaviour as it was.

    depth: None keeps every layer. A number keeps that many, or more where the model has more kinds of layers.

    Heads become few and keep their width; MHA, GQA and MQA stay what they are. Windows become shorter than 24 tokens.
    Special tokens move below the small vocabulary, each to a place of its own.
    """
    small = copy.deepcopy(config)
    parts = list(_parts(small))
    if depth is not None:
        for part in parts:
            _cut(part, depth)
    known: dict[int, int] = {}  # width -> small width: what is equal stays equal, across nested configs too
    shapes = [_Shape(part, known) for part in parts]
    for shape in sorted(shapes, key=lambda shape: (not shape.tied, -shape.width, not shape.grouped)):
        shape.settle()
    for shape in reversed(shapes):  # a config that only holds others asks them
        shape.apply()
    _retoken(parts)
    return small


def _parts(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """The config and those inside it, outermost first."""
    from transformers import PretrainedConfig

    yield config
    for value in vars(config).values():
        if isinstance(value, PretrainedConfig):
            yield from _parts(value)


def _standard(config: PretrainedConfig) -> dict[str, str]:
    """The standard name of each attribute that a config calls by another."""
    return {own: standard for standard, own in type(config).attribute_map.items()}


def _number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _numbers(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and all(_number(v) for v in value)


# --- depth ----------------------------------------------------------------------------------------------------------

COUNT = re.compile(
    r"^(num_hidden_layers|num_blocks|\w*(encoder|decoder)_layers|\w+_num_hidden_layers|n(um)?_layers?|[lrx]_layers|layers"
    r"|(\w+_)?depth|num_(encoder|decoder|spatial|temporal)_layers|n_\w+_layers)$"
)
STAGES = ("depths", "num_block_repeats", "blocks_per_stage", "block_sizes", "layers", "stage_numb_of_layers")
FIRST = re.compile(
    r"^(first_k_dense_replace|n(um)?_dense_layers|moe_layer_start_index|num_first_\w+_layers|max_window_layers)$"
)
LAST = re.compile(r"^(num_kv_shared_layers|num_last_\w+_layers)$")
NO_COUNT = re.compile(r"dense|shared|(max|min|iou|color)_|sparse")
INDICES = re.compile(r"(indices|indexes|idxs?|layer_ids|_layers)$")
PERIOD = re.compile(
    r"(period|interval|every_n_layers|pattern|sparse_step|layer_step|attention_frequency|layer_freq|layer_group_size)$"
)
WRITTEN = re.compile(
    r"attn_layer_period|sliding_window_pattern|attention_interval|rope_layer_interval|moe_layer_step|every_n_layers"
)


def _cut(config: PretrainedConfig, depth: int) -> None:
    """Keep `depth` layers, or as many as there are kinds of layers; what has an entry per layer is cut alike."""
    standard = _standard(config)
    values = vars(config)
    counts = {
        name: value
        for name, value in values.items()
        if _number(value)
        and value > 0
        and COUNT.match(standard.get(name, name))
        and not any(kind.search(name) for kind in (NO_COUNT, FIRST, LAST))
    }
    for name in STAGES:
        if _numbers(values.get(name)):
            value = values[name]
            setattr(config, name, type(value)(min(v, max(depth, 2)) for v in value))
    if not counts:
        return
    named = {standard.get(name, name): value for name, value in counts.items()}
    main = named.get("num_hidden_layers", max(counts.values()))
    sections = [value for name, value in counts.items() if named.get("num_hidden_layers") != value and name != "depth"]
    chosen = {layers: _chosen(values, range(layers), layers, depth, layers == main) for layers in counts.values()}
    chosen.setdefault(main, _chosen(values, range(main), main, depth, True))
    if len(sections) > 1 and sum(sections) == main:  # the stack is run in sections: each keeps its layers
        starts = [sum(sections[:i]) for i in range(len(sections))]
        cuts = [_chosen(values, range(a, a + n), main, depth, True) for a, n in zip(starts, sections, strict=True)]
        chosen[main] = [layer for cut in cuts for layer in cut]
        chosen.update({n: list(range(len(cut))) for n, cut in zip(sections, cuts, strict=True)})
    new: dict[str, Any] = {name: len(chosen[value]) for name, value in counts.items()}
    for name, value in values.items():
        if name in counts:
            continue
        if isinstance(value, list | tuple) and INDICES.search(name) and "out_" not in name and _indices(value, main):
            new[name] = type(value)(i for i, layer in enumerate(chosen[main]) if layer in value)
        elif isinstance(value, list | tuple) and len(value) in chosen and len(value) > 1:
            new[name] = type(value)(value[i] for i in chosen[len(value)])
        elif name == "stage_names" and len(value) == main + 1:
            new[name] = value[: len(chosen[main]) + 1]
        elif name == "_out_indices" and value and len(values.get("stage_names") or ()) == main + 1:
            new[name] = type(value)(sorted({max(1, sum(layer < i for layer in chosen[main])) for i in value}))
        elif _number(value) and FIRST.match(name):
            new[name] = sum(layer < value for layer in chosen[main])
        elif _number(value) and LAST.match(name):
            new[name] = sum(layer >= main - value for layer in chosen[main])
        elif name == "moe_layer_end_index" and _number(value):
            new[name] = sum(layer <= value for layer in chosen[main]) - 1 if value >= 0 else value
    if "_out_indices" in new and "stage_names" in new:
        new["_out_features"] = [new["stage_names"][i] for i in new["_out_indices"]]
    if (spec := values.get("_heterogeneity_spec")) is not None:
        old = spec.per_layer_overrides
        spec.per_layer_overrides = {i: old[layer] for i, layer in enumerate(chosen[main]) if layer in old}
    if (stack := values.get("num_layers_per_stack")) and main % stack == 0:  # the stacks are run several times over
        new["num_layers_per_stack"] = min(stack, depth)
        new["num_hidden_layers"] = main // stack * min(stack, depth)
    for name, value in new.items():
        setattr(config, name, value)


def _indices(value: Sequence[Any], layers: int) -> bool:
    """Whether a list names layers instead of having an entry for each."""
    return _numbers(value) and len(set(value)) == len(value) and 0 <= min(value) <= max(value) <= layers


def _chosen(values: dict[str, Any], among: range, layers: int, depth: int, main: bool) -> list[int]:
    """Which of some layers stay: the first of each kind, then others from the front, as many as make up `depth`.

    layers: how many the whole stack has. main: whether it is the one that indices and periods are about.
    """
    lists = {
        name: value
        for name, value in values.items()
        if isinstance(value, list | tuple) and len(value) == layers and len({str(v) for v in value}) <= 4
    }
    if main:
        periods = [
            value
            for name, value in values.items()
            if _number(value) and 1 < value <= layers and PERIOD.search(name) and not (lists and WRITTEN.search(name))
        ]
        if "block_types" in values and isinstance(values["block_types"], list | tuple):
            periods.append(len(values["block_types"]))
        if periods:  # the class counts layers itself: only a beginning has the same kinds at the same places
            first = [v + 1 for name, v in values.items() if FIRST.match(name) and _number(v) and 0 < v < layers]
            return list(range(min(layers, max(depth, math.lcm(*periods), *first))))

    def kind(layer: int) -> tuple[str, ...]:
        marks = [str(value[layer]) for value in lists.values()]
        if not main:
            return tuple(marks)
        for name, value in values.items():
            if isinstance(value, list | tuple) and name not in lists and INDICES.search(name):
                marks += [str(layer in value)] if _indices(value, layers) and "out_" not in name else []
            elif _number(value) and (FIRST.match(name) or LAST.match(name)):
                marks.append(str(layer < value if FIRST.match(name) else layer >= layers - value))
        if (spec := values.get("_heterogeneity_spec")) is not None:
            marks.append(str(spec.per_layer_overrides.get(layer)))
        return tuple(marks)

    seen: dict[tuple[str, ...], int] = {}
    for layer in among:
        seen.setdefault(kind(layer), layer)
    kept = set(seen.values())
    shared = [i for i in among if "hybrid" in (v[i] for v in lists.values())]
    kept.update(shared[:2])  # these share weights: one alone shares nothing
    for layer in among:
        if len(kept) >= depth:
            break
        kept.add(layer)
    return sorted(kept)


# --- widths ---------------------------------------------------------------------------------------------------------

WIDE = ("hidden_size", "d_model", "embed_dim", "n_embd", "dim", "emb_dim", "hidden_dim", "encoder_hidden_size")
MANY = ("num_attention_heads", "encoder_attention_heads", "attention_heads", "num_heads", "n_heads", "n_head", "heads")
SHARED = ("num_key_value_heads", "num_kv_heads", "kv_n_heads", "num_key_value_attention_heads", "num_query_groups")
STATE = (
    ("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"),
    ("mamba_d_head", "mamba_head_dim", "mamba_headdim"),
    ("mamba_d_ssm",),
)
EACH = ("head_dim", "d_kv", "dim_head", "attention_head_size", "d_head", "kv_channels", "attention_head_dim")
WIDTHS = re.compile(
    r"(^|_)((hidden|intermediate|ffn|mlp|embed|embedding|emb|embd|inner|proj|project|projection|feedforward|model|pooler"
    r"|adapter|output|out|ff|bottleneck)_(size|dim|channels|width)|dim|width|d_model|d_latents|d_ff|d_inner|n_inner|n_embd|ffn_dim"
    r"|dff|mlp_dim|dim_feedforward|dim_ff|feed_forward_size|feedforward_dim|(lora_)?rank|lru_width|intermediate_size_mlp"
    r"|hidden_size_\w+|conv_channels|attention_channels|embed_dim|fpn_channels|share_expert_dim)$"
)
NO_WIDTH = re.compile(
    r"head|rope|rotary|pos_emb_(height|width)|patch_dim|mel|(?<!projector_)input_dim|time_step|codebook|state_dim|spatial|temporal|per_axis"
)
HEADS = re.compile(r"(^|_)(n|num|\w*attention|\w*attn|query|kv|mamba|mem)?_?(\w+_)?heads(_per_layer)?$")
VOCABULARIES = re.compile(r"(^|_)(vocab_size|vocab_size_per_layer_input|group_vocab)$")
N_EXPERTS = re.compile(r"^(moe_)?(num|n)(_local|_routed)?_experts$|^(num|n)_routed_experts$|^zero_expert_num$")
TOP_K = re.compile(r"^(num_experts_per_tok|num_experts_per_token|moe_(router_)?top_?k|moe_k|top_k|router_topk)$")
GROUPS = re.compile(r"^(n_group|num_expert_group|n_groups_of_experts)$")
WINDOWS = re.compile(
    r"^(sliding_window|sliding_window_size|local_attention|attention_window|attention_window_size|attention_chunk_size"
    r"|chunk_size|mamba_chunk_size|local_attention_window_len|window_size|keep_window_size|local_radius|block_size)$"
)
PLACES = re.compile(
    r"(^|_)(max_position_embeddings|n_positions|max_(source|target)_positions|n_ctx|max_(?!2d)\w*position\w*)$"
)


class _Shape:
    """How one config among the nested is made narrow.

    config: changed by `apply`. known: small widths settled so far.
    """

    def __init__(self, config: PretrainedConfig, known: dict[int, int]) -> None:
        self.config, self.known = config, known
        self.standard = _standard(config)
        self.values = {self.standard.get(name, name): value for name, value in vars(config).items()}
        self.wide, self.many = self.first(WIDE, lists=False), self.first(MANY)
        self.width: int = self.values[self.wide] if self.wide else 0
        heads = self.values[self.many] if self.many else 1
        self.heads: int = math.gcd(*heads) if isinstance(heads, list | tuple) else heads
        self.staged = isinstance(heads, list | tuple) or any(_numbers(self.values.get(name)) for name in STAGES)
        shared = self.first(SHARED, lists=False)
        self.shared: int = self.values[shared] if shared else self.heads
        self.grouped = 1 < self.shared < self.heads
        each = self.first(EACH, lists=False)
        derived = self.width // self.heads if self.heads and self.width % self.heads == 0 else 0
        self.each: int = self.values[each] if each else derived
        self.free = each is not None and config.model_type not in BOUND  # the head width need not follow from the width
        ratio = self.heads * self.each / self.width if self.width and not self.staged else 0
        self.ratio = int(ratio) if ratio in (1, 2) else 0  # all heads together are so many times the width
        self.tied = self.ratio > 0 and self.many is not None
        self.small = self.small_heads = self.small_shared = 0

    def first(self, names: Sequence[str], lists: bool = True) -> str | None:
        """The first of some names that is there and a number, or a list of numbers."""
        for name in names:
            value: Any = self.values.get(name)
            if (_number(value) and value > 0) or (lists and _numbers(value)):
                return name
        return None

    def settle(self) -> None:
        """Decide the heads and the width, and note the width for the others."""
        if self.staged:
            self.small_heads = 1
            self.small = self.width // self.heads if self.width and self.width % self.heads == 0 else self.width
        else:
            self.small_heads = 4 if self.grouped else min(self.heads, MULTIPLES.get(self.config.model_type, 2))
            self.small_shared = 2 if self.grouped else 1 if self.shared == 1 else self.small_heads
            each = min(self.each, HEAD if self.free else BOUND_HEAD)
            self.small = self.small_heads * each // self.ratio if self.tied else WIDTH
            if self.small > (TIED if self.free else WIDEST):
                self.small = WIDTH if self.free else WIDEST
                self.tied = not self.free
            known = self.known.get(self.width)
            if known and known % self.small_heads == 0 and not (self.tied and self.free):
                self.small = known
        if self.width:
            self.known.setdefault(self.width, self.small)

    def apply(self) -> None:
        self.settle_state()
        for name, value in list(vars(self.config).items()):
            standard = self.standard.get(name, name)
            if name.startswith("_") or name in ("id2label", "label2id", "stage_names"):
                continue
            new = self.narrow(standard, value)
            if new is not value and new != value:
                setattr(self.config, name, new)
        if (spec := vars(self.config).get("_heterogeneity_spec")) is not None:
            for override in spec.per_layer_overrides.values():
                override.update({name: self.narrow(self.standard.get(name, name), v) for name, v in override.items()})

    def settle_state(self) -> None:
        """The heads of a state-space mixer: together they are as wide as they were, counted in widths of the model."""
        heads, each, inner = (self.first(names, lists=False) for names in STATE)
        self.state: dict[str, int] = {}
        if heads is None or each is None or self.many == heads:
            return
        whole = self.values[heads] * self.values[each]
        dim = min(self.values[each], WIDTH)
        if inner is not None and self.values[inner] == whole:
            self.state = {heads: 2, each: dim, inner: 2 * dim}
        elif self.width and whole % self.width == 0:
            small = whole // self.width * self.small
            dim = math.gcd(small // 2, dim) if small // 2 % dim else dim
            self.state = {heads: small // dim, each: dim}

    def narrow(self, name: str, value: Any) -> Any:
        """The small value of one attribute. name: the standard one."""
        if isinstance(value, list | tuple):
            return self.narrow_list(name, value)
        if not _number(value) or value <= 0:
            return value
        if name in self.state:
            return self.state[name]
        if name in FIXED:
            return min(value, FIXED[name])
        if name == self.wide:
            return self.small
        if name in ("coordinate_size", "shape_size"):  # four of the one and two of the other make the width
            return self.small // (8 if name == "coordinate_size" else 4)
        if name.endswith("groups") and value in self.known:
            return self.known[value]
        if name in EACH or re.search(r"head_?dim|dim_head", name):
            return min(value, HEAD)
        if HEADS.search(name):
            return self.count(name, value)
        if VOCABULARIES.search(name):
            return min(value, VOCABULARY)
        if N_EXPERTS.match(name):
            return min(value, EXPERTS)
        if TOP_K.match(name):
            return min(value, 2)
        if GROUPS.match(name):
            return min(value, 2)
        if WINDOWS.match(name):
            seeing = "patch_size" in self.values or "image_size" in self.values
            return value if seeing and value > 64 else min(value, 2 if seeing else WINDOW)
        if PLACES.search(name):
            return value if self.turns() else min(value, POSITIONS)
        if name in ("image_size", "img_size"):
            return min(value, self.pixels(0))
        if WIDTHS.search(name) and not NO_WIDTH.search(name):
            return self.scaled(value)
        return value

    def narrow_list(self, name: str, value: Sequence[Any]) -> Any:
        if not _numbers(value):
            return value
        kind: Any = type(value)
        if name in ("image_size", "img_size"):
            return kind(min(v, self.pixels(i)) for i, v in enumerate(value))
        if name in ("attention_window",):
            return kind(min(v, WINDOW) for v in value)
        if name in ("conv_dim", "tdnn_dim"):
            return kind(min(v, 32) for v in value)
        if name == self.many:
            return kind(v // self.heads for v in value)
        if re.search(r"(hidden_sizes|embed_dims|dims|dim_embed|embed_dim\w*|hidden_size)$", name) and self.staged:
            return kind(v // self.heads for v in value) if all(v % self.heads == 0 for v in value) else value
        if HEADS.search(name):
            return kind(self.count(name, v) for v in value)
        if WIDTHS.search(name) and not NO_WIDTH.search(name) and not self.staged:
            return kind(self.scaled(v) for v in value)
        return value

    def turns(self) -> bool:
        """Whether positions are rotary or relative: then no table grows with them."""
        return any(re.search(r"rope|rotary|alibi", name) and value for name, value in self.values.items())

    def pixels(self, axis: int) -> int:
        patch = self.values.get("patch_size")
        if isinstance(patch, list | tuple):
            patch = patch[min(axis, len(patch) - 1)]
        if self.staged or not patch or not _number(patch):
            return 64
        return patch * SIDE

    def count(self, name: str, value: int) -> int:
        """How many heads are left of some."""
        if value == 1:
            return 1
        if re.search(r"key_value|kv|query_groups", name):
            return self.small_heads if value == self.heads else min(value, self.small_shared or 2)
        if name == "linear_num_value_heads":
            return 2 * min(4, max(1, value // self.values["linear_num_key_heads"]))
        if self.many and value == self.heads:
            return self.small_heads
        return min(value, 2)

    def scaled(self, value: int) -> int:
        """A width as far below the small one as it was below the large one."""
        if value in self.known:
            return self.known[value]
        if value <= 32:
            return value
        if not self.width:
            small = min(value, WIDTH)
        elif value % self.width == 0 and value // self.width <= 16:
            return value // self.width * self.small
        elif self.width % value == 0 and self.small % (self.width // value) == 0:
            small = self.small // (self.width // value)
        else:
            small = max(16, math.ceil(value * self.small / self.width / 16) * 16)
            small = min(small, 2 * self.small if self.small <= TIED else self.small // 2)
        self.known[value] = small
        return small


BOUND = ("helium",)  # a head width is said, and the width must be that of all heads nevertheless
MULTIPLES = {"lilt": 3, "codegen": 4}  # the width is cut into six; the heads into four
FIXED: dict[str, int] = {
    "index_topk": SELECTED, "topk_group": 1, "max_source_positions": FRAMES // 2, "max_length": FRAMES,
    "global_block_size": 4, "type_vocab_size": 16, "n_shared_experts": 1, "moe_num_shared_experts": 1,
    "state_size": 8, "mamba_d_state": 8, "ssm_state_size": 8, "codebook_size": 64, "n_groups": 2, "mamba_n_groups": 2,
    "num_filters": 8,
    "num_frames": 4, "frames_per_clip": 4,
}  # fmt: skip


# --- tokens ---------------------------------------------------------------------------------------------------------

TOKEN = re.compile(r"(^|_)(token_ids?|token_index|id|ids)$")
NO_TOKEN = re.compile(r"layer|speaker|lang|doc")


def _retoken(parts: Sequence[PretrainedConfig]) -> None:
    """Move special tokens below the small vocabulary: equal ones stay equal, different ones different."""
    places = [
        (part, name, value)
        for part in parts
        for name, value in vars(part).items()
        if TOKEN.search(name) and not NO_TOKEN.search(name) and (_number(value) or _numbers(value))
    ]
    tokens = sorted({t for _, _, value in places for t in (value if isinstance(value, list | tuple) else [value])})
    room = min([v for part in parts if _number(v := getattr_plain(part, "vocab_size")) and v > 0], default=VOCABULARY)
    taken = {t for t in tokens if t < room // 2}
    fresh = iter(range(room - 1, 0, -1))
    new = {t: t if t in taken else next(i for i in fresh if i not in taken) for t in tokens}
    for part, name, value in places:
        moved = type(value)(new[t] for t in value) if isinstance(value, list | tuple) else new[value]
        if moved != value:
            setattr(part, name, moved)


def getattr_plain(config: PretrainedConfig, name: str) -> Any:
    """An attribute under its standard name, also where it may differ by layer; None if there is none."""
    return vars(config).get(type(config).attribute_map.get(name, name))


def special_tokens(config: PretrainedConfig) -> set[int]:
    """All token ids that a config, or one inside it, gives a meaning to."""
    found: set[int] = set()
    for part in _parts(config):
        for name, value in vars(part).items():
            if TOKEN.search(name) and (_number(value) or _numbers(value)):
                found.update(value if isinstance(value, list | tuple) else [value])
    return found


# --- the model ------------------------------------------------------------------------------------------------------


def build(cls: type[nn.Module], config: PretrainedConfig, seed: int = 0) -> nn.Module:
    """A random model of a class, in float32 on the CPU, set to evaluate. config: as `shrink` made it; not changed.

    Every parameter is random, also those that start at zero or one. Activations neither die out nor grow with depth.
    The global random state is as before.
    """
    config = copy.deepcopy(config)
    cls = _buildable(cls)
    tried: list[str] = []
    with _quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for attention in ("sdpa", "eager", None):
            try:
                model = _construct(cls, copy.deepcopy(config), attention)
                break
            except Exception as error:
                tried.append(f"{type(error).__name__}: {_line(error)}")
                failed = error
        else:
            said = "; ".join(dict.fromkeys(tried))
            raise TwinError(
                f"no twin of {cls.__name__} could be built from a small {type(config).__name__}: {said}"
            ) from failed
        _enliven(model, seed)
    return model.eval()


def _buildable(cls: type[nn.Module]) -> type[nn.Module]:
    """A class, or, where its constructor wants more than a config, the one that it has its forward from."""
    wanted: list[str] = []
    for parent in cls.__mro__:
        if parent is nn.Module:
            break
        kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        own = list(inspect.signature(parent).parameters.values())[1:]
        more = [p.name for p in own if p.default is p.empty and p.kind not in kinds]
        if not more:
            return parent
        wanted = wanted or more
        if "forward" in vars(parent):
            break
    raise TwinError(
        f"no twin of {cls.__name__} can be built: its constructor wants {', '.join(wanted)} besides the config; give "
        "them defaults or read them from the config"
    )


def cut(twin: nn.Module, model: nn.Module) -> nn.Module:
    """A twin with no more blocks than the model has: somebody may have taken some out, whatever the config says."""
    for path, module in list(twin.named_modules()):
        try:
            real = model.get_submodule(path)
        except AttributeError:
            continue
        if isinstance(module, nn.ModuleList) and isinstance(real, nn.ModuleList):
            del module[len(real) :]
    return twin


@contextmanager
def one_thread() -> Iterator[None]:
    """A twin's products are too small to be shared out: threads would wait for each other longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _construct(cls: type[nn.Module], config: PretrainedConfig, attention: str | None) -> nn.Module:
    from transformers import PreTrainedModel

    if not issubclass(cls, PreTrainedModel):
        return cls(config)
    given = {} if attention is None else {"attn_implementation": attention}
    return cls._from_config(config, dtype=torch.float32, **given)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings, and torch's defaults as they come; all as before afterwards."""
    from transformers.utils import logging

    level, dtype = logging.get_verbosity(), torch.get_default_dtype()
    try:
        logging.set_verbosity(logging.CRITICAL)
        torch.set_default_dtype(torch.float32)
        with warnings.catch_warnings(), torch.device("cpu"):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_default_dtype(dtype)
        logging.set_verbosity(level)


SCALES = re.compile(r"scale|gamma|lambda|ls\d|gate|alpha|beta")
SEEKS = re.compile(r"(^|[._])(q|k|wq|wk|[qk]_\w+|query|key|\w+_[qk]|(to|lin)_[qk])$|query_proj|key_proj")
UNSCALED = re.compile(r"\w(Self|EncDec)?Attention\.q$|\battn\.attention\.q_proj$")  # no 1 / sqrt(d) follows
SHARP, CALM, CONVOLVED = 2.0, 0.6, 1.4
EMBEDS = re.compile(r"embed|token|pos|query|queries|table|latent|memory|mask|prompt|relative|special")


@torch.no_grad()
def _enliven(model: nn.Module, seed: int) -> None:
    """Make every parameter random: around the value it starts from if that is a constant, by its fan-in otherwise."""
    source = torch.Generator().manual_seed(seed)
    done: set[int] = set()
    first = sorted(model.named_modules(), key=lambda named: not isinstance(named[1], nn.Embedding))
    for path, module in first:  # an embedding that is also the weight of a head is an embedding
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in done or not parameter.is_floating_point():
                continue
            done.add(id(parameter))
            noise = torch.randn(parameter.shape, generator=source)
            parameter.copy_(_lively(module, f"{path}.{name}", parameter, noise))
        for name, buffer in module.named_buffers(recurse=False):
            trained = name not in module._non_persistent_buffers_set and buffer.is_floating_point()
            if trained and buffer.numel() > 1 and _constant(buffer):  # statistics of a norm, biases of a router
                buffer += 0.1 * torch.rand(buffer.shape, generator=source)


def _constant(value: Tensor) -> bool:
    return value.numel() > 0 and bool((value == value.flatten()[0]).all())


def _lively(module: nn.Module, path: str, start: Tensor, noise: Tensor) -> Tensor:
    """A random value of a parameter. start: what the class made it; noise: standard normal, of its shape.

    Queries and keys are large and the rest is small: else attention is flat, and all tokens become the same with depth.
    """
    place, name = path.rsplit(".", 1)
    if start.numel() == 0:
        return start
    if start.dim() > 1 and not (name == "weight" and "Norm" in type(module).__name__):
        if isinstance(module, nn.Embedding) or (name not in ("weight", "original1") and EMBEDS.search(name)):
            return 0.5 * noise
        if not (_constant(start) and (start.shape[:-1].numel() == 1 or SCALES.search(name))):
            convolved = isinstance(module, nn.modules.conv._ConvNd)
            gain = CONVOLVED if convolved else SHARP if SEEKS.search(place) else CALM
            if UNSCALED.search(place):
                gain /= 8
            return gain * noise / math.sqrt(_fan_in(module, start))
    if not start.isfinite().all() or start.abs().max() > 100:
        start = torch.zeros_like(start)
    if not _constant(start):
        return start * (1 + 0.1 * noise)
    centre = float(start.flatten()[0])
    if abs(centre) < 0.1:
        return 0.5 + 0.1 * noise if SCALES.search(name) and "bias" not in name else centre + 0.1 * noise
    return centre + 0.15 * min(abs(centre), 1.0) * noise


def _fan_in(module: nn.Module, weight: Tensor) -> int:
    if isinstance(module, nn.Linear):
        return weight.shape[1]
    if type(module).__name__ == "Conv1D":  # of GPT-2: a linear layer with its weight transposed
        return weight.shape[0]
    if isinstance(module, nn.modules.conv._ConvNd):
        return weight.shape[1:].numel()
    return max(weight.shape[-2:])


# --- what it takes --------------------------------------------------------------------------------------------------


CODES = ("musicgen", "musicgen_melody", "musicgen_decoder", "musicgen_melody_decoder")  # a row for each code book


def example(model: nn.Module, batch: int = 2, length: int = 12, seed: int = 0) -> dict[str, Tensor]:
    """Keyword arguments of one forward of a twin, every row different.

    length: tokens of text, or frames that speech is reduced to; images have the size the config names.
    """
    config: Any = model.config
    source = torch.Generator().manual_seed(seed)
    taken = set(inspect.signature(model.forward).parameters)
    main = getattr(model, "main_input_name", "input_ids")
    given: dict[str, Tensor] = {}
    if main in ("input_ids", "decoder_input_ids") and "input_ids" in taken:
        books = _find(config, "num_codebooks") if config.model_type in CODES else None
        given["input_ids"] = _words(config, batch * (books or 1), length, source)
        if "attention_mask" in taken:
            given["attention_mask"] = torch.ones(batch, length, dtype=torch.long)
    seen = "Image" in type(model).__name__
    if main == "inputs" and "input_values" in taken:
        given["input_values"] = _sound(config, batch, length, source)
    elif main == "inputs" and not seen:
        given["inputs"] = _words(config, batch, length, source)
    elif _sees(config, main, taken) and "spatial_shapes" in taken:
        given |= _patches(config, batch, source)
    elif _sees(config, main, taken):
        name = "pixel_values" if "pixel_values" in taken else "pixel_values_videos"
        given[name] = _pixels(config, batch, source, moving=not seen)
    if main == "input_values":
        given["input_values"] = _sound(config, batch, length, source)
    if main in ("input_features", "audio_values"):
        given[main] = _spectrogram(model, batch, length, source)
    if config.is_encoder_decoder and "decoder_input_ids" in taken:
        books = _find(config, "num_channels") if config.model_type == "dia" else None
        words = _words(config, batch, length * (books or 1), source)
        given["decoder_input_ids"] = words.view(batch, length, books) if books else words
    if not given and "input_ids" in taken:
        given["input_ids"] = _words(config, batch, length, source)
    if "bbox" in taken and "input_ids" in given:
        given["bbox"] = _boxes(batch, length, source)
    return given


def _sees(config: PretrainedConfig, main: str, taken: set[str]) -> bool:
    """Whether a model is to be given images: as its main input, or beside its text without a place in it."""
    if not taken & {"pixel_values", "pixel_values_videos"}:
        return False
    placed = _find(config, "image_token_id", "image_token_index", "boi_token_id") is not None
    return main not in ("input_ids", "decoder_input_ids") or not placed


def _find(config: PretrainedConfig, *names: str) -> Any:
    """The first of some attributes that the config or one inside it has."""
    for name in names:
        for part in _parts(config):
            if (value := getattr_plain(part, name)) is not None:
                return value
    return None


def _words(config: PretrainedConfig, batch: int, length: int, source: torch.Generator) -> Tensor:
    """(batch, length): ids without a special meaning."""
    vocabulary = getattr_plain(config.get_text_config(), "vocab_size") or _find(
        config, "vocab_size", "decoder_vocab_size"
    )
    special = special_tokens(config)
    plain = torch.tensor([i for i in range(vocabulary or VOCABULARY) if i not in special])
    return plain[torch.randint(len(plain), (batch, length), generator=source)]


def _pixels(config: PretrainedConfig, batch: int, source: torch.Generator, moving: bool) -> Tensor:
    """(batch, channels, height, width), or with frames before the channels for what is `moving` and counts them."""
    size = _find(config, "image_size", "img_size", "crop_size") or 64
    height, width = size if isinstance(size, list | tuple) else (size, size)
    channels = _find(config, "num_channels", "in_channels", "in_chans", "num_input_channels") or 3
    channels = channels if _number(channels) else 3
    frames = _find(config, "num_frames", "frames_per_clip") if moving else None
    shape = (batch, frames, channels, height, width) if frames else (batch, channels, height, width)
    return torch.randn(shape, generator=source)


def _patches(config: PretrainedConfig, batch: int, source: torch.Generator) -> dict[str, Tensor]:
    """Images cut into flat patches (batch, patches, channels * patch * patch), with the shapes of their grids."""
    flat = (_find(config, "num_channels") or 3) * _find(config, "patch_size") ** 2
    return {
        "pixel_values": torch.randn(batch, SIDE * SIDE, flat, generator=source),
        "spatial_shapes": torch.full((batch, 2), SIDE),
        "pixel_attention_mask": torch.ones(batch, SIDE * SIDE, dtype=torch.long),
    }


def _sound(config: PretrainedConfig, batch: int, length: int, source: torch.Generator) -> Tensor:
    """A waveform (batch, samples) that the convolutions reduce to `length` frames, or a spectrogram of fixed size."""
    if (mels := _find(config, "num_mel_bins")) is not None and _find(config, "conv_stride") is None:
        return torch.randn(batch, _find(config, "max_length") or FRAMES, mels, generator=source)
    frames = length
    strides, kernels = _find(config, "conv_stride") or (320,), _find(config, "conv_kernel") or (400,)
    for stride, kernel in zip(reversed(strides), reversed(kernels), strict=True):
        frames = (frames - 1) * stride + kernel
    shape = (batch, 1, frames) if config.model_type.startswith("omniasr") else (batch, frames)
    return torch.randn(shape, generator=source)


def _spectrogram(model: nn.Module, batch: int, length: int, source: torch.Generator) -> Tensor:
    """(batch, mels, frames) where the model is made for one length, (batch, frames, mels) otherwise."""
    config: Any = model.config
    leaves = (m for m in model.modules() if isinstance(m, nn.Linear | nn.LayerNorm | nn.modules.conv._ConvNd))
    first = next(leaves, None)
    mels = _find(config, "feature_projection_input_dim")
    if mels is None and isinstance(first, nn.Linear | nn.LayerNorm):  # it is applied to each frame
        mels = first.in_features if isinstance(first, nn.Linear) else first.normalized_shape[-1]
    if mels is not None:
        return torch.randn(batch, 4 * length, mels, generator=source)
    mels = _find(config, "num_mel_bins", "input_feat_per_channel", "input_dim") or 80
    if (positions := _find(config, "max_source_positions")) and _find(config, "input_feat_per_channel") is None:
        return torch.randn(batch, mels, 2 * positions, generator=source)
    return torch.randn(batch, 4 * length, mels, generator=source)


def _boxes(batch: int, length: int, source: torch.Generator) -> Tensor:
    """(batch, length, 4): left, top, right, bottom in thousandths."""
    corner = torch.randint(0, 400, (batch, length, 2), generator=source)
    return torch.cat([corner, corner + torch.randint(1, 400, (batch, length, 2), generator=source)], dim=-1)
