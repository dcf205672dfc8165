"""What every command of the command line shares: options, exit codes, and sentences in the place of tracebacks."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Annotated, NoReturn, ParamSpec

import typer

from components.errors import InputError, SlateloopError
from flows.disk_space import disk_full_told
from flows.interruption import remembered_interrupts
from flows.settings import PlatformSettings, prepare_environment

DECIDED, FAILED, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130

P = ParamSpec("P")
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout; messages go to stderr.")]
SourcePath = Annotated[Path | None, typer.Option("--path", help="File or folder that the source reads.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="TOML file; it holds only what differs.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="One setting: reinforce.gamma=0.8", metavar="A.B=C")]


def say(message: str) -> None:
    """Print a message where it is not taken for a result."""
    print(message, file=sys.stderr)


class RunTimedOutError(SlateloopError):
    """A run took longer than it may; the command line exits with 1."""


@contextmanager
def in_time(settings: PlatformSettings) -> Iterator[None]:
    """Say in a sentence that the run inside the block was ended by its limit of time.

    Raises:
        RunTimedOutError: it was.
    """
    from prefect.flow_engine import FlowRunTimeoutError

    try:
        yield
    except FlowRunTimeoutError:
        raise RunTimedOutError(
            f"the run was ended after SLATELOOP_RUN_HOURS = {settings.run_hours:g}, its waiting included; what it had "
            "finished is kept: the same command goes on where this one stopped"
        ) from None


def _stop(error: SlateloopError) -> NoReturn:
    say(f"slateloop: {error}")
    raise typer.Exit(WRONG_INPUT if isinstance(error, InputError) else FAILED)


def command(act: Callable[P, None]) -> Callable[P, None]:
    """Prepare the platform's environment, and turn a user's mistake into a sentence and an exit code."""

    @wraps(act)
    def run(*arguments: P.args, **options: P.kwargs) -> None:
        try:
            settings = PlatformSettings()
            with remembered_interrupts(), disk_full_told(settings.home, "SLATELOOP_HOME"):
                prepare_environment(settings)
                act(*arguments, **options)
        except SlateloopError as error:
            _stop(error)
        except KeyboardInterrupt:
            say("slateloop: interrupted; the same command goes on where this one stopped")
            raise typer.Exit(INTERRUPTED) from None

    return run
