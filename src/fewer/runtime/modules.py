"""A method's own trained modules: built for a host, loaded from a file or the package, saved with a card.

One safetensors file holds one method's modules: `<folder>/<method>.safetensors`, or `<method>-<anything>.safetensors`
for further settings. The package ships some, in the folder of the packaged model they were trained on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from ..core import Reducer, VisualReducer
from ..core.cache import CacheReducer
from ..core.learned import ModuleListOf, Modules
from ..hosts import DecoderHost, Host, VisionLanguageHost
from ..spec import text

ASSETS = Path(__file__).parents[1] / "assets"
UNTRAINED = "untrained"
SUFFIX = ".safetensors"

ALSO = {"smollm2-135m": ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m-q4")}
"""Folders of the package whose models are not in it: their hub names, and those of the folders `load_model` keeps."""


class ModulesError(ValueError):
    """A method's trained modules are missing, or do not fit the method or the model."""


def build(method: Reducer, host: Host, stages: int) -> ModuleListOf[nn.ModuleDict]:
    """Fresh modules of a method: one nn.ModuleDict per stage, or one for all of them or for a whole cache; empty where
    it has none."""
    if isinstance(method, CacheReducer):
        assert isinstance(host, DecoderHost)
        whole = nn.ModuleDict(method.predictors(host.channels, host.heads, host.kv_heads, len(host.blocks)))
        return ModuleListOf([whole] if len(whole) else [])
    sets = min(stages, 1) if method.one_for_all else stages
    if isinstance(method, VisualReducer):
        assert isinstance(host, VisionLanguageHost)
        own = [method.parts(host.shape()) for _ in range(stages)] if _has_parts(method) else []
        return ModuleListOf(map(nn.ModuleDict, own) if any(own) else [])
    made = [nn.ModuleDict(method.modules(host.channels, host.heads, stages, host.patches)) for _ in range(sets)]
    return ModuleListOf(made if any(map(len, made)) else [])


def _has_parts(method: VisualReducer) -> bool:
    """Whether it has modules of its own, in this form: those that can do without have a field `trained`."""
    return type(method).parts is not VisualReducer.parts and getattr(method, "trained", True)


def prepare(
    model: nn.Module, host: Host, methods: Sequence[Reducer], stages: Sequence[int],
    source: nn.Module | str | Path | None,
) -> Modules:  # fmt: skip
    """The modules of all methods, one nn.ModuleList per method, on the model's device and in its dtype.

    source: see `fewer.apply`. Raises ModulesError where a method's modules are missing or do not fit.
    """
    fresh = ModuleListOf(build(method, host, count) for method, count in zip(methods, stages, strict=True))
    if isinstance(source, nn.Module):
        fresh = _given(source, fresh, methods)
    elif source != UNTRAINED:
        taken: list[Path] = []
        for method, own in zip(methods, fresh, strict=True):
            if len(own):
                files = _find(method, packaged(model, method.card.name) if source is None else source)
                taken.append(_load(own, method, files, taken))
    parameter = next(host.root.parameters())
    return fresh.to(parameter.device, parameter.dtype)


def _given(source: nn.Module, fresh: Modules, methods: Sequence[Reducer]) -> Modules:
    """Modules handed over as they are: what `session.modules` of an earlier session was, or one method's stages."""
    modules = source if isinstance(source, nn.ModuleList) else nn.ModuleList([source])
    if modules and isinstance(modules[0], nn.ModuleDict):
        modules = nn.ModuleList([modules])
    wanted = [[sorted(stage) for stage in own] for own in fresh]
    found = [
        [sorted(stage) if isinstance(stage, nn.ModuleDict) else type(stage).__name__ for stage in own]
        for own in modules if isinstance(own, nn.ModuleList)
    ]  # fmt: skip
    if wanted != found:
        raise ModulesError(
            f"modules= holds {found}, but {' and '.join(map(text, methods))} needs {wanted} "
            "(methods, stages, module names); give session.modules of a session with the same methods"
        )
    return cast(Modules, modules)


def packaged(model: nn.Module, modules: str) -> str | None:
    """The packaged model this one was loaded from, by its name or its folder inside the package; None where it is
    another, or where the package has no modules of that name (a method's, say) for it."""
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or ""
    path = Path(name)
    inside = ASSETS / name if "/" not in name else path
    known = next((folder for folder, names in ALSO.items() if name in names or path.name in names), None)
    inside = inside if known is None else ASSETS / known
    if not name or not inside.is_dir() or inside.resolve().parent != ASSETS.resolve():
        return None
    return inside.name if any(inside.glob(f"{modules}{SUFFIX}")) else None


def _find(method: Reducer, source: str | Path | None) -> list[Path]:
    """The files that may hold a method's modules: the file itself, those in a folder, or in the package."""
    name = method.card.name
    way_out = (
        f"train them with `fewer train {name} --model MODEL --out DIR` and pass modules=DIR, "
        f"or pass modules={UNTRAINED!r} for random ones"
    )
    if source is None:
        raise ModulesError(f"{text(method)} needs trained modules, and the package has none for this model: {way_out}")
    if Path(source).is_file():
        return [Path(source)]
    for folder in (Path(source), ASSETS / source):
        files = [folder / f"{name}{SUFFIX}", *sorted(folder.glob(f"{name}-*{SUFFIX}"))]
        if files := [f for f in files if f.is_file()]:
            return files
    shipped = sorted({p.parent.name for p in ASSETS.glob(f"*/{name}{SUFFIX}")})
    known = f" (the package has them for {', '.join(shipped)})" if shipped else ""
    raise ModulesError(
        f"modules={str(source)!r}: no file, folder or packaged model with {name}{SUFFIX}{known}; {way_out}"
    )


def _load(modules: nn.ModuleList, method: Reducer, files: Sequence[Path], taken: Sequence[Path] = ()) -> Path:
    """Fill the modules from a file trained for these shapes and layers: at the same setting if there is one, and one
    that no method before has taken. Returns it."""
    files = sorted(files, key=lambda path: (read_card(path).get("method") != text(method), path in taken))  # stable
    misfits = [misfit for path in files if (misfit := _misfit(modules, method, path))]
    if len(misfits) == len(files):
        raise ModulesError(f"{text(method)}: no trained modules fit. " + ". ".join(misfits))
    path = next(path for path in files if not _misfit(modules, method, path))
    state = read(path)
    if bad := next((k for k, v in state.items() if not v.isfinite().all()), None):
        raise ModulesError(f"{path}: {bad} holds numbers that are not finite; train the modules anew")
    modules.load_state_dict(state)
    return path


def _misfit(modules: nn.ModuleList, method: Reducer, path: Path) -> str:
    """What speaks against a file, in words; "" where it fits."""
    card = read_card(path)
    said = f"{path.name} was trained as {card.get('method', 'an unknown method')}"
    if (layers := card.get("layers")) is not None and layers != _layers(method):
        return f"{said}, at layers {layers}, not {_layers(method)}"
    with _opened(path) as file:
        found = {k: tuple(file.get_slice(k).get_shape()) for k in file.keys()}  # noqa: SIM118 (not a mapping)
    wanted = {k: tuple(v.shape) for k, v in modules.state_dict().items()}
    wrong = sorted(k for k in found.keys() | wanted.keys() if found.get(k) != wanted.get(k))
    if not wrong:
        return ""
    key, width = wrong[0], card.get("width", "unknown")
    depth = f" and {card['blocks']} blocks" if "blocks" in card else ""
    return f"{said}, for width {width}{depth}: {key} is {found.get(key)}, not {wanted.get(key)}"


def _layers(method: Reducer) -> str:
    return "all" if method.layers is None else "+".join(map(str, method.layers))


def read_card(path: str | Path) -> dict[str, str]:
    """What a file of trained modules says about itself: method, model shape, recipe, data, results."""
    with _opened(path) as file:
        return dict(file.metadata() or {})


def read(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file."""
    with _opened(path) as file:
        return {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a mapping)


@contextmanager
def _opened(path: str | Path) -> Iterator[Any]:
    """A safetensors file, open. Raises ModulesError, naming it, where it is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ModulesError(
            f"{path} cannot be read as safetensors ({error}); write it again with save_modules"
        ) from error


def save(
    path: str | Path, methods: Sequence[Reducer], modules: Modules, host: Host, card: Mapping[str, str],
    state: Mapping[str, Tensor] | None = None,
) -> list[Path]:  # fmt: skip
    """Write every method's modules as safetensors. Returns the files.

    path: a folder, which gets one `<method>.safetensors` each; or a .safetensors file, for a single trained method.
    state: of `modules`, where their own parameters are scattered over devices.
    """
    from safetensors.torch import save_file

    path, files = Path(path), list[Path]()
    trained = [(i, method) for i, method in enumerate(methods) if len(modules[i])]
    if not trained:
        raise ModulesError(f"{', '.join(map(text, methods))}: no trained modules to save")
    single = path.suffix == SUFFIX
    if single and len(trained) > 1:
        raise ModulesError(f"{path}: {len(trained)} methods have trained modules; give a folder, each gets its file")
    (path.parent if single else path).mkdir(parents=True, exist_ok=True)
    state = state or modules.state_dict()
    for index, method in trained:
        same = sum(method.card.name == other.card.name for other in methods[:index])
        file = path if single else path / f"{method.card.name}{f'-{same + 1}' if same else ''}{SUFFIX}"
        about = {
            "method": text(method), "layers": _layers(method), "width": str(host.width), "heads": str(host.heads),
            "blocks": str(len(host.blocks)),
        }  # fmt: skip
        own = {k.removeprefix(f"{index}."): v for k, v in state.items() if k.startswith(f"{index}.")}
        save_file({k: v.detach().cpu().contiguous() for k, v in own.items()}, file, about | dict(card))
        files.append(file)
    return files


def divided(source: Any, of: Sequence[bool]) -> tuple[Any, Any]:
    """What `modules=` holds for the methods that are meant and for the others: as it is, if not one part for each."""
    if not isinstance(source, nn.ModuleList) or len(source) != len(of):
        return source, source
    mine, others = ([m for m, yes in zip(source, of, strict=True) if yes is want] for want in (True, False))
    return nn.ModuleList(mine), nn.ModuleList(others)
