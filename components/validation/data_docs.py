"""Great Expectations: asserts on a log's metrics, and renders its Data Docs. The only file that imports it.

It is handed one row of numbers, never the log: the metrics are counted by polars, part by part.
"""

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Expectation:
    """What one metric of a log should be: between two bounds, one of which may be open."""

    name: str
    """What is expected, as a sentence for a person."""
    metric: str
    minimum: float | None = None
    maximum: float | None = None
    strict: bool = False
    """Whether the bounds themselves are outside."""
    severity: Severity = "error"

    @property
    def bounds(self) -> str:
        """The bounds in words."""
        low, high = ("above", "below") if self.strict else ("at least", "at most")
        words = [f"{low} {self.minimum:g}"] if self.minimum is not None else []
        words += [f"{high} {self.maximum:g}"] if self.maximum is not None else []
        return " and ".join(words)


class ExpectationResult(BaseModel):
    """What became of one expectation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="What was expected, as a sentence for a person.")
    metric: str = Field(description="The number that was looked at.")
    success: bool
    observed: float
    expected: str = Field(description="The bounds in words.")
    severity: Severity = Field(description="An error stops the run; a warning is reported.")


def assert_and_render(
    expectations: Sequence[Expectation], metrics: Mapping[str, float], out: Path
) -> tuple[ExpectationResult, ...]:
    """The results of the expectations, in order; the Data Docs site is written into the new folder `out`.

    Args:
        expectations: each names one of the metrics.
        metrics: name -> value; those that no expectation names appear nowhere.
        out: folder of the site, whose first page is `index.html`; must not exist.

    Raises:
        RuntimeError: Great Expectations could not evaluate an expectation; a defect, not a failed expectation.
    """
    # Read when the library is imported, which takes seconds: so both happen here and not when this module is.
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
    import great_expectations as gx
    import great_expectations.expectations as gxe
    from great_expectations.checkpoint import UpdateDataDocsAction
    from great_expectations.data_context.types.base import ProgressBarsConfig

    with tempfile.TemporaryDirectory() as project:
        context = gx.get_context(mode="file", project_root_dir=project)
        context.variables.progress_bars = ProgressBarsConfig(globally=False, metric_calculations=False)
        suite = context.suites.add(
            gx.ExpectationSuite(
                name="log",
                expectations=[
                    # The frame has one row, so its maximum is the metric, and the Data Docs show it as observed.
                    gxe.ExpectColumnMaxToBeBetween(
                        column=expectation.metric,
                        min_value=expectation.minimum,
                        max_value=expectation.maximum,
                        strict_min=expectation.strict,
                        strict_max=expectation.strict,
                        severity="critical" if expectation.severity == "error" else "warning",
                        description=f"{expectation.name}: {expectation.bounds} ({expectation.severity})",
                        meta={"position": position},
                    )
                    for position, expectation in enumerate(expectations)
                ],
            )
        )
        metrics_asset = context.data_sources.add_pandas("log").add_dataframe_asset("metrics")
        data = metrics_asset.add_batch_definition_whole_dataframe("whole")
        definition = context.validation_definitions.add(gx.ValidationDefinition(name="log", data=data, suite=suite))
        checkpoint = context.checkpoints.add(
            gx.Checkpoint(
                name="log", validation_definitions=[definition], actions=[UpdateDataDocsAction(name="data_docs")]
            )
        )
        frame = pd.DataFrame({expectation.metric: [metrics[expectation.metric]] for expectation in expectations})
        run = checkpoint.run(batch_parameters={"dataframe": frame}, run_id=gx.RunIdentifier(run_name="validation"))
        (result,) = run.run_results.values()
        by_position = {entry.expectation_config.meta["position"]: entry for entry in result.results}
        for entry in by_position.values():
            if entry.exception_info.get("raised_exception"):
                raise RuntimeError(f"{entry.expectation_config}: {entry.exception_info['exception_message']}")
        shutil.copytree(Path(project) / "gx" / "uncommitted" / "data_docs" / "local_site", out)
    return tuple(
        ExpectationResult(
            name=expectation.name,
            metric=expectation.metric,
            success=by_position[position].success,
            observed=float(by_position[position].result["observed_value"]),
            expected=expectation.bounds,
            severity=expectation.severity,
        )
        for position, expectation in enumerate(expectations)
    )
