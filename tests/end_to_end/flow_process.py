"""A process that runs one flow after another: its start, with all that flows import, is what takes long."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

#: Runs code that it is told, each time under some more variables.
RUN_WHAT_IS_TOLD = """
import json, os, sys
for line in sys.stdin:
    code, variables = json.loads(line)
    os.environ.update(variables)
    exec(code, {})
    print("done", flush=True)
"""
RunFlow = Callable[[str, Mapping[str, str]], None]


@contextmanager
def flow_process(folder: Path, environment: Mapping[str, str]) -> Iterator[RunFlow]:
    """Start the process; yields what runs code in it, and ends it."""
    with (
        (folder / "errors.txt").open("w") as errors,
        subprocess.Popen(
            [sys.executable, "-c", RUN_WHAT_IS_TOLD],
            cwd=Path(__file__).parents[2],
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        assert process.stdin is not None and process.stdout is not None
        tell, answers = process.stdin, process.stdout

        def run(code: str, variables: Mapping[str, str]) -> None:
            print(json.dumps([code, dict(variables)]), file=tell, flush=True)
            assert answers.readline() == "done\n", (folder / "errors.txt").read_text()

        yield run
