"""The command line: `fastdiff generate`, `batch`, `models` ... Heavy imports are lazy."""

import signal
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from fastdiff.cli import batch, bench, calibrate, demo, doctor, errors, generate, methods, models


class Commands(TyperGroup):
    """Every error leaves as one line and an exit code, in tests as in a terminal."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        extra.update(standalone_mode=False, obj={"command_line": words})
        try:
            code = super().main(words, *rest, **extra)
        except (Exception, KeyboardInterrupt, errors.Terminated) as error:
            if "--traceback" in words:
                raise
            sys.exit(errors.report(error))
        if code == errors.STOPPED:
            errors.report(KeyboardInterrupt())
        sys.exit(code if isinstance(code, int) else 0)


app = typer.Typer(
    cls=Commands, no_args_is_help=True, add_completion=False, rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Pictures and clips from text with diffusers, made faster by sparse attention.",
)
app.command("generate")(generate.generate)
app.command("batch")(batch.batch)
app.add_typer(bench.app, name="bench")
app.command("calibrate")(calibrate.calibrate)
app.command("demo")(demo.demo)
app.command("models")(models.models)
app.command("methods")(methods.methods)
app.command("doctor")(doctor.doctor)


def _version(asked: bool) -> None:
    if asked:
        from fastdiff import __version__

        print(f"fastdiff {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option(
        "--version", help="Print the version.", is_eager=True, callback=_version)] = False,
) -> None:
    pass


def main() -> None:
    """The `fastdiff` command."""
    signal.signal(signal.SIGTERM, errors.terminate)
    app(prog_name="fastdiff")
