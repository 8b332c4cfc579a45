"""The command line: a file for each command. `output` has what they print with, `inputs` what they are given.

Importing this package costs no torch: everything heavy is imported by the command that needs it.
"""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from . import bench, compress, cost, distance, doctor, generate, listing, serve, show, train, viz
from .output import complain

__all__ = ["app", "main"]

TRACEBACK = "FEWER_TRACEBACK"


class Commands(TyperGroup):
    """Turns errors that tell the user what to do into one red line and exit code 2; others keep their traceback."""

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **extra: Any) -> Any:
        typed = list(args)
        context = super().make_context(info_name, args, *rest, **extra)
        context.meta["typed"] = typed  # for who wants to say how to go on
        return context

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            if os.environ.get(TRACEBACK) or not _known(error):
                raise
            complain(str(error))
            raise typer.Exit(2) from error


def _known(error: Exception) -> bool:
    """Whether an error was raised to be read by a user."""
    if isinstance(error, (ValueError, OSError, ImportError)):
        return True
    from fewer.core import SignalError
    from fewer.hosts import HostError
    from fewer.runtime.program import SessionError

    return isinstance(error, (HostError, SessionError, SignalError))


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Fewer tokens, better models: token reduction for transformers, measured. "
    f"[dim]{TRACEBACK}=1 shows where an error comes from.[/]",
)
for _name, _file in {
    "compress": compress, "bench": bench, "generate": generate, "list": listing, "show": show, "viz": viz,
    "doctor": doctor, "cost": cost, "train": train, "serve": serve,
}.items():  # fmt: skip
    app.command(_name)(_file.command)
_probes = typer.Typer(no_args_is_help=True, help="Look into a model: what do its heads follow, and who needs them?")
_probes.command("distance")(distance.command)
app.add_typer(_probes, name="probe")


def _version(asked: bool) -> None:
    if asked:
        import fewer

        print(f"fewer {fewer.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None: ...


def main() -> None:
    """The `fewer` command."""
    app()
