"""`fewer cost`: what a method is worth on some hardware, before anything is run there."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .inputs import NAMES, load, picture, use_threads
from .output import Json, Threads, as_json, facts, grid, note, out

if TYPE_CHECKING:
    from fewer.hardware.pricing import Report


def command(
    model: Annotated[str, typer.Argument(help=NAMES)] = "vit-fashion",
    method: Annotated[str, typer.Option(help="Text form such as tome:r=13.")] = "tome:r=8",
    hardware: Annotated[
        str,
        typer.Option(
            help="cpu or cuda (this machine), spatten, heatvit, systolic:128x128 (:os, :ws, :is), primate:512."
        ),
    ] = "cpu",
    tokens: Annotated[int, typer.Option(min=1, help="Of a text; in --phase decode, of the prompt.")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Samples.")] = 1,
    phase: Annotated[str, typer.Option(help="Of a decoder: prefill or decode. Default: prefill.")] = "",
    input: Annotated[
        str | None,
        typer.Option(
            help="A picture (a file, embedded:17) or a text: computed, for methods whose counts depend on it."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure this machine again.")] = False,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """What a method is worth in a model on some hardware: tokens and cost block by block, the speed-up, its error.

    Nothing is run but, the first time, a measurement of this machine (less than a minute), where it is asked about.
    """
    import torch

    from fewer.hardware import machines, pricing

    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype {dtype}: float32, bfloat16 or float16")
    use_threads(threads, 1)
    machine = machines.machine(hardware, dtype, fresh=fresh, log=note)
    network, processor = load(model)
    network = network.to(dtype=getattr(torch, dtype))
    given = None if input is None else _read(input, network, processor)
    way = pricing.passes(network, phase, tokens=tokens, batch=batch, given=given, size=_size(processor))
    report = pricing.price(network, method, machine, way)
    if json:
        as_json({"model": model, "batch": batch, **asdict(report), "speed_up": report.speed_up})
    else:
        _show(model, report)


def _read(name: str, network: Any, processor: Any) -> Any:
    """What a model is given of a picture or a text."""
    from fewer import hosts

    if not hosts.find(network).text:
        return processor([picture(name)]).to(next(network.parameters()).dtype)
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"no text {name}; --input takes a file in UTF-8")
    ids = processor([path.read_text(encoding="utf-8")], return_tensors="pt")["input_ids"]
    if not ids.numel():
        raise ValueError(f"{name} holds no text")
    return ids


def _size(processor: Any) -> tuple[int, int] | None:
    """Height and width of the pictures a processor gives."""
    size = getattr(processor, "size", None)
    if isinstance(size, int):
        return size, size
    return tuple(size) if isinstance(size, (tuple, list)) and len(size) == 2 else None


def _show(model: str, report: Report) -> None:
    spoken = "milliseconds" if report.unit == "seconds" else report.unit
    facts([
        ("model", model), ("method", report.method), ("hardware", report.machine), ("numbers", report.basis),
        ("counted", report.counts),
    ])  # fmt: skip
    out.print()
    heads = ("block", "tokens, attention", "tokens, MLP", f"{spoken} before", "with the method", "speed-up")
    rows: list[tuple[object, ...]] = [
        (r.layer, _number(r.attention), _number(r.mlp), _cost(r.before, report.unit), _cost(r.after, report.unit),
         f"{r.before / r.after:.2f}" if r.after else "-")
        for r in report.rows
    ]  # fmt: skip
    rows.append(
        (
            "whole pass",
            "",
            "",
            _cost(report.before, report.unit),
            _cost(report.after, report.unit),
            f"{report.speed_up:.2f}",
        )
    )
    grid(heads, rows)
    told = "" if report.low is None else f", between {report.low:.2f} and {report.high:.2f} as far as is known"
    out.print(f"\n[bold]{report.speed_up:.2f}x[/]{told}. By FLOPs alone it would be {report.flops:.2f}x, "
              f"by tokens {report.tokens:.2f}x.", soft_wrap=True)  # fmt: skip
    for line in report.notes:
        note(line)


def _number(x: float) -> str:
    return f"{x:.0f}" if abs(x - round(x)) < 1e-6 else f"{x:.1f}"


def _cost(x: float, unit: str) -> str:
    return f"{1e3 * x:.3f}" if unit == "seconds" else f"{x:,.0f}"
