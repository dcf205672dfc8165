"""The command line. Imports are lazy: `slateloop --help` must not wait for torch, Prefect or Great Expectations."""

import json
import os
import time
from pathlib import Path
from typing import Annotated

import typer

from components.errors import InputError
from flows.command import AsJson, ConfigFile, Settings, SourcePath, command, in_time, say
from flows.platform_commands import platform_app
from flows.serving_commands import serving_app
from flows.settings import PlatformSettings, require_writable

#: Options of `plan-ab` by what they set.
PLAN_OPTIONS = {
    "mean": "--mean",
    "standard_deviation": "--sd",
    "relative_effect": "--effect",
    "level": "--level",
    "power": "--power",
    "treatment_share": "--share",
    "users_per_day": "--users-per-day",
}

app = typer.Typer(
    help="The open retraining loop for reinforcement-learning recommenders.",
    epilog="Begin with: slateloop run",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Versions of the data folder.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(serving_app)
app.add_typer(platform_app)

SourceName = Annotated[
    str | None,
    typer.Option("--source", help="storefront, log, obd, trivago, sessions, movielens, table or virtual-taobao."),
]


@app.command("run", epilog="Example: slateloop run --source sessions --path my-clicks --set seed=3")
@command
def run_loop(
    source: SourceName = None,
    path: SourcePath = None,
    config: ConfigFile = None,
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder in which the run leaves its own.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Compute every stage anew.")] = False,
    as_of: Annotated[
        str | None, typer.Option("--as-of", help="Only what was known then counts: a date (its end in UTC) or a time.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run the loop once: import, validate, learn, judge, decide, package, report."""
    from flows.as_of import read_as_of, require_past
    from flows.config import load_config, require_device, source_path

    known_by = [] if as_of is None else [f"as_of={read_as_of(as_of).isoformat()}"]
    # Without --source a file's own source counts.
    loaded = load_config(config, [*(settings or []), *known_by], source)
    require_past(loaded.as_of)
    require_device(loaded)
    source_path(loaded, path)
    platform = PlatformSettings()
    require_writable(out or platform.runs, "--out")
    require_writable(platform.home, "SLATELOOP_HOME")
    require_writable(platform.data, "SLATELOOP_DATA")
    # Prefect reads its folder when it is imported, and complains where there is none to make it in.
    from flows.live_progress import live_progress
    from flows.retraining import retraining

    with live_progress(), in_time(platform):
        summary = retraining(loaded, path, out, fresh)
        _let_prefect_flush()
    _show(Path(summary.folder), as_json)


@app.command("replay", epilog="Example: slateloop replay shop-20261122")
@command
def replay_run(
    run: Annotated[str, typer.Argument(help="Folder of a run, its name, or the beginning of that.", metavar="RUN")],
    path: SourcePath = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the runs.")] = None,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Go on although code, lock or data have changed since.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compute a past run's decision anew from its lineage, and compare."""
    from flows.live_progress import live_progress
    from flows.replay import ReplayDiffersError, read_recorded, replay

    platform = PlatformSettings()
    for sentence in read_recorded(run, out or platform.runs, path, anyway=anyway).changed:
        say(f"warning: {sentence}")
    with live_progress():
        found = replay(run, out, path, anyway)
        _let_prefect_flush()
    if as_json:
        print(json.dumps(found.model_dump(mode="json") | {"equal": found.equal}, indent=2))
    else:
        from rich.console import Console

        from flows.terminal import replay_table

        Console().print(replay_table(found))
    if not found.equal:
        differing = ", ".join(part.what for part in found.compared if not part.equal)
        raise ReplayDiffersError(f"run {found.run}: its replay differs in: {differing}")


@app.command("import", epilog="Example: slateloop import --source trivago --path trivago --out data/trivago")
@command
def import_source(
    source: Annotated[
        str,
        typer.Option("--source", help="log, obd, trivago, sessions, movielens, table, storefront or virtual-taobao."),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder of the log.")],
    path: SourcePath = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Translate a source into the data contract, and nothing else."""
    from flows.as_of import require_past
    from flows.config import load_config, source_path
    from flows.stages import write_source_log

    config = load_config(None, settings or [], source)
    require_past(config.as_of)
    manifest = write_source_log(config, source_path(config, path), out).manifest
    if as_json:
        print(manifest.model_dump_json(indent=2))
    else:
        print(f"{out}: {manifest.n_requests:,} requests, evidence: {manifest.evidence.value}")
        for limit in manifest.limits:
            print(f"  - {limit}")


@data_app.command("pin", epilog="Example: slateloop data pin && git add data.dvc")
@command
def pin_data() -> None:
    """Write the current version of the data folder into data.dvc."""
    from flows.data_versions import pin

    print(f"data.dvc: {pin(PlatformSettings().data)}")


@app.command("validate", epilog="Example: slateloop validate data/storefront")
@command
def validate_log(
    log: Annotated[Path, typer.Argument(help="Folder of a log.", metavar="DIR")],
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the results; beside the log by default.")] = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Check a log: the row rules, the quarantine and the Data Docs page."""
    from components.interactions.log_folder import open_log
    from components.validation.checks import validate
    from flows.config import load_config

    config = load_config(None, settings or [])
    opened = open_log(log)
    folder = out or log.parent / f"{log.resolve().name}-checks"
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder}: is not empty; choose another --out")
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {error.strerror}; choose another --out") from None
    try:
        checks = validate(opened, config.validation, folder, config.as_of)
    except InputError as error:
        if not any(folder.iterdir()):
            if made:
                folder.rmdir()
            raise
        raise type(error)(f"{error}\nWhat was found is in {folder}") from None
    for result in checks.expectations:
        if not result.success:
            say(f"warning: {result.name}: {result.metric} is {result.observed:g}, expected {result.expected}")
    if as_json:
        print(checks.model_dump_json(indent=2))
    else:
        print(f"{log}: {checks.n_requests:,} requests, {checks.n_quarantined:,} put aside")
        print(f"Data Docs: {folder / 'data_docs' / 'index.html'}")


@app.command("evaluate", epilog="Example: slateloop evaluate --policy shop-reinforce:1a2b3c --log data/storefront")
@command
def evaluate_policy(
    policy: Annotated[str, typer.Option("--policy", help="Exact tag of a packaged policy, or a policy's folder.")],
    log: Annotated[Path, typer.Option("--log", help="Folder of a log.")],
    as_json: AsJson = False,
) -> None:
    """Off-policy estimates of a packaged policy on a log."""
    from components.evaluation.estimates import estimate
    from components.evaluation.logged_policy import judged_parts
    from components.evaluation.policy_value import Estimand, Estimate, NotIdentified
    from components.interactions.log_folder import open_log
    from components.policies.policy_folder import load_policy
    from flows.config import LoopConfig
    from flows.stages import (
        about_log,
        not_identified,
        read_to_judge,
        rewards_to_judge,
        sessions_not_identified,
    )

    opened = open_log(log)
    if opened.manifest.action_size:
        raise InputError(f"{log}: is a log of actions, and packaged policies show slates; expected a log of slates")
    if Path(policy).is_dir():
        stored = load_policy(Path(policy))
    else:
        from services.policy_store import load_model

        stored = load_model(policy)
    name = stored.description.name
    reader = read_to_judge(opened, stored, LoopConfig(), lambda message, share: None)
    rewards = rewards_to_judge(reader)
    estimates: tuple[Estimate, ...]
    if reason := not_identified(reader, rewards):
        estimates = (NotIdentified(policy=name, estimand=Estimand.ONE_REQUEST, reason=reason),)
    else:
        about = about_log(reader, name)
        made = estimate(judged_parts(reader, stored.policy, about["ratio"]), rewards, about)
        estimates = (*made.values, *sessions_not_identified(rewards, name))
    if as_json:
        print(json.dumps([part.model_dump(mode="json") for part in estimates], indent=2))
    else:
        from flows.run_folder import estimate_line

        for part in estimates:
            print(estimate_line(part))


@app.command("plan-ab", epilog="Example: slateloop plan-ab --log data/storefront --effect 0.05")
@command
def plan_comparison(
    effect: Annotated[float, typer.Option("--effect", help="Gain to find, as a share of the mean: 0.05 is 5 %.")],
    log: Annotated[Path | None, typer.Option("--log", help="Log to take mean, deviation and users a day from.")] = None,
    mean: Annotated[float | None, typer.Option("--mean", help="Mean reward of a session.")] = None,
    deviation: Annotated[
        float | None, typer.Option("--sd", help="Standard deviation per user: the mean of U users has it over √U.")
    ] = None,
    users_per_day: Annotated[float | None, typer.Option("--users-per-day", help="Users who come each day.")] = None,
    level: Annotated[float, typer.Option("--level", help="How often equal policies may pass.")] = 0.03,
    power: Annotated[float, typer.Option("--power", help="How often such a gain is to be found.")] = 0.8,
    share: Annotated[float, typer.Option("--share", help="Share of users who see the challenger.")] = 0.5,
    as_json: AsJson = False,
) -> None:
    """Users and days that an A/B needs, looked at once or every day."""
    from pydantic import ValidationError

    from components.experiment.plan import AbDesign, Baseline, logged_baseline, plan_ab
    from components.interactions.log_folder import open_log

    logged = None if log is None else logged_baseline(open_log(log))
    if logged is not None:
        mean = logged.reward.mean if mean is None else mean
        deviation = logged.reward.standard_deviation if deviation is None else deviation
        users_per_day = logged.users_per_day if users_per_day is None else users_per_day
    given = {"--mean": mean, "--sd": deviation, "--users-per-day": users_per_day}
    if missing := [option for option, value in given.items() if value is None]:
        known = "--log gives --mean and --sd" if log is None else f"{log} has no times"
        raise InputError(f"{', '.join(missing)}: expected a value; {known}")
    try:
        baseline = Baseline.model_validate({"mean": mean, "standard_deviation": deviation})
        design = AbDesign.model_validate(
            {
                "relative_effect": effect,
                "level": level,
                "power": power,
                "treatment_share": share,
                "users_per_day": users_per_day,
            }
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        option = PLAN_OPTIONS[str(first["loc"][0])]
        raise InputError(f"{option} {first['input']}: {first['msg'][0].lower()}{first['msg'][1:]}") from None
    plan = plan_ab(baseline, design, None if logged is None else logged.guardrails)
    if as_json:
        print(plan.model_dump_json(indent=2))
        return
    from rich.console import Console

    from flows.terminal import plan_tables

    Console().print(plan_tables(plan))


@app.command("runs", epilog="Example: slateloop runs")
@command
def list_runs(
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the runs.")] = None, as_json: AsJson = False
) -> None:
    """Past runs and their decisions, from disk."""
    from flows.run_folder import past_runs, read_mark

    folder = out or PlatformSettings().runs
    runs = past_runs(folder)
    marks = [read_mark(folder / run.run) for run in runs]
    if as_json:
        documents = [
            run.model_dump(mode="json") | {"forgotten": mark and mark.model_dump(mode="json")}
            for run, mark in zip(runs, marks, strict=True)
        ]
        print(json.dumps(documents, indent=2))
        return
    from rich.console import Console

    from flows.terminal import runs_table

    Console().print(runs_table(runs, marks))


@app.command("show", epilog="Example: slateloop show shop-20261122")
@command
def show_run(
    run: Annotated[str, typer.Argument(help="Name of a run, or its beginning.", metavar="RUN")],
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the runs.")] = None,
    as_json: AsJson = False,
) -> None:
    """The decision of a past run, with its reasons."""
    from flows.run_folder import find_run

    _show(find_run(out or PlatformSettings().runs, run), as_json)


@app.command("ledger", epilog="Example: slateloop ledger")
@command
def show_ledger(as_json: AsJson = False) -> None:
    """How right the gate and the offline estimates were, by the A/Bs that followed."""
    from components.experiment.ledger import summarize
    from flows.ledger_store import read_ledger

    entries = read_ledger(PlatformSettings().home)
    summaries = summarize(entries)
    if as_json:
        document = {"entries": entries, "summaries": summaries}
        print(json.dumps({name: [part.model_dump(mode="json") for part in parts] for name, parts in document.items()}))
        return
    from rich.console import Console

    from flows.terminal import ledger_table

    if not summaries:
        print("The ledger is empty: each run makes an entry.")
    for summary in summaries:
        print(f"{summary.loop}, {summary.source}, {summary.reward}")
        for label in summary.labels:
            Console().print(ledger_table(label))
        if summary.n_waiting:
            print(f"No A/B has followed {summary.n_waiting} of the predictions yet.")


@app.command("record-ab", epilog="Example: slateloop record-ab shop-20261122 live-ab.json")
@command
def record_ab(
    run: Annotated[str, typer.Argument(help="Name of a run, or its beginning.", metavar="RUN")],
    file: Annotated[Path, typer.Argument(help="Result of the A/B, as JSON.", metavar="FILE")],
) -> None:
    """Put the result of a later A/B beside what was predicted of a past run's challenger."""
    from flows import ledger_store

    entry = ledger_store.record_ab(PlatformSettings().home, run, file)
    assert entry.ab is not None
    print(f"{entry.run}: {entry.ab.label} A/B recorded, {entry.ab.verdict}")


@app.command("schema", epilog="Example: slateloop schema > loop.schema.json")
@command
def print_schema() -> None:
    """JSON schema of the configuration."""
    from flows.config import LoopConfig

    print(json.dumps(LoopConfig.model_json_schema(), indent=2))


@app.command("benchmark", epilog="Example: slateloop benchmark storefront --quick")
@command
def run_benchmark(
    name: Annotated[str, typer.Argument(help="Name of the benchmark.", metavar="NAME")],
    quick: Annotated[
        bool, typer.Option("--quick", help="At most five CPU-minutes; figures are marked as quick.")
    ] = False,
    full: Annotated[
        bool, typer.Option("--full", help="Sizes of the literature, where a benchmark has them; no limit of time.")
    ] = False,
    seeds: Annotated[int | None, typer.Option("--seeds", min=1, help="Number of seeds.")] = None,
    path: SourcePath = None,
    as_json: AsJson = False,
) -> None:
    """Run one benchmark; its figures and the table in docs/results.md come from here."""
    from rich.console import Console

    from flows.benchmarks import run
    from flows.terminal import figures_table

    document = run(name, quick=quick, full=full, seeds=seeds, path=path)
    if as_json:
        print(document.model_dump_json(indent=2))
    else:
        Console().print(figures_table(document))


def _show(folder: Path, as_json: bool) -> None:
    from components.experiment.gate import Decision

    decision = Decision.model_validate_json((folder / "decision.json").read_bytes())
    if as_json:
        documents = {
            name: json.loads((folder / f"{name}.json").read_text())
            for name in ("run", "decision", "evidence", "lineage")
        }
        print(json.dumps(documents, indent=2))
        return
    from rich.console import Console

    from flows.run_folder import read_mark
    from flows.terminal import decision_panel

    lineage = json.loads((folder / "lineage.json").read_text())
    # Earlier versions' runs name no baseline, and those of actions package nothing.
    named = {name: lineage.get(f"{name.lower()}_tag") for name in ("Policy", "Baseline", "Bento")}
    tags = {name: tag for name, tag in named.items() if tag is not None}
    Console().print(decision_panel(decision, folder / "report.html", tags))
    if mark := read_mark(folder):
        print(mark.text)


def _let_prefect_flush() -> None:
    """A server of the run's own is stopped with the process: what it has not stored by then is lost."""
    if not os.environ.get("PREFECT_API_URL"):
        time.sleep(3)


def main() -> None:
    """Entry point of the `slateloop` command."""
    app()


if __name__ == "__main__":
    main()
