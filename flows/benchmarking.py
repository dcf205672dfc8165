"""Benchmarks that somebody asks for in Prefect, or in `slateloop benchmark`."""

from pathlib import Path

from prefect import flow

from flows.benchmarks import Document, run, section
from flows.tasks import publish


@flow(name="benchmark")
def benchmark(name: str, quick: bool = True, seeds: int | None = None, path: Path | None = None) -> Document:
    """Run one benchmark; a whole one puts its table into docs/results.md.

    Args:
        name: of the benchmark, as `slateloop benchmark` knows it.
        quick: take at most five CPU-minutes; the figures are marked as quick.
        seeds: number of seeds; the benchmark's own by default.
        path: folder of the data that the benchmark reads, where it reads a real log.
    """
    document = run(name, quick=quick, seeds=seeds, path=path)
    publish("benchmark", section(document))
    return document
