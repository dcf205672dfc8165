"""Benchmarks in one form: each is one file of this folder, gives one JSON document and one table of docs/results.md.

A benchmark's module has `BUDGET` (CPU-minutes, full and quick) and `measure(context) -> dict[str, Figure]`. Results of
each (method, seed) are kept as they finish, so an interrupted benchmark goes on where it stopped. It may have
`SOURCES`, folders beside the library whose code its results depend on; and `tables(figures) -> str`, Markdown for
figures that the common table would make hard to read.
"""

import importlib
import json
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from pydantic import BaseModel, ConfigDict, Field

from components.errors import InputError
from flows.config import LoopConfig
from flows.interruption import heed_interrupt
from flows.lineage import LIBRARY, code_digest, digest_of, git_commit, lock_digest
from flows.settings import REPOSITORY, PlatformSettings

RESULTS = REPOSITORY / "docs" / "results.md"


class Figure(BaseModel):
    """One measured number, with the target that it was to meet."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float
    interval: tuple[float, float] | None = Field(default=None, description="95 % interval, where there is one.")
    unit: str
    target: str | None = Field(default=None, description="What it was to be, in words; None for mere information.")
    holds: bool | None = Field(default=None, description="Whether the target is met; a missed one stays in the table.")
    skipped: str | None = Field(default=None, description="Why it was not measured; its value is NaN then.")


class Document(BaseModel):
    """What a benchmark gives."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    figures: dict[str, Figure]
    budget: str = Field(description="CPU-minutes that it may take, and whether it ran quick.")
    lineage: dict[str, str | None]


@dataclass(frozen=True)
class Context:
    """What a benchmark is run with."""

    quick: bool
    full: bool
    """Whether to take the sizes of the literature, whatever they cost."""
    seeds: int | None
    """Number of seeds asked for; None leaves it to the benchmark."""
    path: Path | None
    """Folder of the benchmark's data, for those that read real logs."""
    kept: Path
    """Folder in which results of finished parts are kept."""
    shared: Path
    """Folder of what several benchmarks train once."""

    def keep(self, part: str, compute: Callable[[], dict[str, float]]) -> dict[str, float]:
        """The result of one part, computed only where no earlier run has."""
        heed_interrupt()
        file = self.kept / f"{part}.json"
        if file.is_file():
            return dict(json.loads(file.read_text()))
        result = compute()
        staging = file.with_suffix(".tmp")
        staging.write_text(json.dumps(result))
        staging.rename(file)
        return result


def names() -> list[str]:
    """Every benchmark of this folder; words are parted by dashes here, and by underscores in the names of modules."""
    modules = [module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")]
    return [module.replace("_", "-") for module in modules]


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")


def run(name: str, *, quick: bool, seeds: int | None, path: Path | None, full: bool = False) -> Document:
    """Run one benchmark and put its table into docs/results.md, unless it ran quick, full or with fewer seeds.

    Raises:
        InputError: there is no such benchmark, it has no full form, or the data that it reads are missing.
    """
    if quick and full:
        raise InputError("--quick and --full exclude each other; give one of them")
    if name not in names():
        raise InputError(f"unknown benchmark {name!r}; the benchmarks are: {', '.join(names())}")
    module = _module(name)
    if full and not getattr(module, "HAS_FULL", False):
        raise InputError(f"--full: the benchmark {name!r} has no larger sizes; leave --full out")
    # As the loop's own runs: what stands in the results is what a run computes.
    torch.set_num_threads(LoopConfig().threads)
    lineage = {"code": code_digest(), "lock": lock_digest(), "commit": git_commit()}
    home = PlatformSettings().home / "benchmarks"
    sources = (*LIBRARY, "flows/benchmarks", *getattr(module, "SOURCES", ()))
    kept = home / name / digest_of(code_digest(sources), str(quick), str(full), str(path))[:16]
    pool_code = code_digest((*LIBRARY, "flows/benchmarks/_pool.py", "flows/benchmarks/_stages.py"))
    shared = home / "shared" / digest_of(pool_code, str(quick))[:16]
    for folder in (kept, shared):
        folder.mkdir(parents=True, exist_ok=True)
    figures = module.measure(Context(quick, full, seeds, path, kept, shared))
    minutes = module.BUDGET.quick if quick else module.BUDGET.full
    document = Document(
        name=name,
        figures=figures,
        budget="no limit, full" if full else f"{minutes} CPU-minutes" + (", quick" if quick else ""),
        lineage=lineage,
    )
    if not (quick or full) and seeds is None:
        _write_section(document)
    return document


@dataclass(frozen=True)
class Budget:
    """CPU-minutes that a benchmark may take."""

    full: int = 90
    quick: int = 5


def figures_table(figures: Mapping[str, Figure]) -> str:
    """A Markdown table with a row for each figure."""
    rows = [
        f"| {key} | {_number(figure)} | {figure.unit} | {figure.target or ''} | {_verdict(figure)} |"
        for key, figure in figures.items()
    ]
    return "\n".join(["| figure | value | unit | target | holds |", "| --- | --- | --- | --- | --- |", *rows])


def section(document: Document) -> str:
    """The document as a section of the results page."""
    tables = getattr(_module(document.name), "tables", figures_table)
    command = f"`slateloop benchmark {document.name}`"
    head = f"{command}; at most {document.budget}; code {str(document.lineage['code'])[:12]}."
    return f"## {document.name}\n\n{head}\n\n{tables(document.figures)}\n"


def _write_section(document: Document) -> None:
    """Replace the benchmark's section in the results page, or add it."""
    text = RESULTS.read_text() if RESULTS.is_file() else "# Results\n"
    head, *sections = text.split("\n## ")
    others = [written for written in sections if written.partition("\n")[0].strip() != document.name]
    sections = sorted([*others, section(document).removeprefix("## ")])
    staging = RESULTS.with_suffix(".tmp")
    staging.write_text("\n## ".join([head.rstrip() + "\n", *(written.rstrip() + "\n" for written in sections)]))
    staging.rename(RESULTS)


def _number(figure: Figure) -> str:
    if figure.skipped is not None:
        return f"skipped: {figure.skipped}"
    if figure.interval is None:
        return f"{figure.value:.4g}"
    return f"{figure.value:.4g} ({figure.interval[0]:.4g} to {figure.interval[1]:.4g})"


def _verdict(figure: Figure) -> str:
    return "" if figure.holds is None else "yes" if figure.holds else "**missed**"
