"""Progress on stderr: a live line per stage in a terminal, one line per finished stage elsewhere."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from flows.stage_store import progress_sink


@contextmanager
def live_progress() -> Iterator[None]:
    """Show the progress of the stages that run inside the block, in the place of Prefect's own lines."""
    # Prefect's console writes for the root logger.
    for handler in logging.getLogger().handlers:
        handler.addFilter(_is_no_run_log)
    console = Console(stderr=True)
    if not console.is_terminal:
        token = progress_sink.set(_print_when_finished)
        try:
            yield
        finally:
            progress_sink.reset(token)
        return
    columns = (
        TextColumn("{task.fields[stage]:>15}"),
        BarColumn(24),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console) as display:
        lines: dict[str, TaskID] = {}

        def update(stage: str, message: str, share: float) -> None:
            if stage not in lines:
                lines[stage] = display.add_task(message, total=1.0, stage=stage)
            display.update(lines[stage], description=message, completed=share)

        token = progress_sink.set(update)
        try:
            yield
        finally:
            progress_sink.reset(token)


def _is_no_run_log(record: logging.LogRecord) -> bool:
    # Whoever started the run is told of a failure once, by the command line; Prefect's server keeps the run's log.
    return not record.name.startswith(("prefect.task_runs", "prefect.flow_runs"))


def _print_when_finished(stage: str, message: str, share: float) -> None:
    if message.startswith(("reused", "done", "waits")):
        print(f"{stage:>15}  {message}", file=sys.stderr, flush=True)
