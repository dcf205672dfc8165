"""The command line. Imports are lazy: `slateloop --help` must not wait for torch, Prefect or Great Expectations."""

import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, ParamSpec

import typer

from components.errors import InputError, SlateloopError
from flows.settings import PlatformSettings, prepare_environment, require_writable

if TYPE_CHECKING:
    from services.access import TokenFile
    from services.releases import Release

DECIDED, FAILED, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130

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
release_app = typer.Typer(help="Which policies serve a loop, and whom.", no_args_is_help=True)
app.add_typer(release_app, name="release")
token_app = typer.Typer(help="Tokens of those who may ask the endpoint.", no_args_is_help=True)
app.add_typer(token_app, name="token")

P = ParamSpec("P")
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout; messages go to stderr.")]
SourceName = Annotated[
    str | None, typer.Option("--source", help="storefront, log, obd, trivago, sessions, movielens or table.")
]
SourcePath = Annotated[Path | None, typer.Option("--path", help="File or folder that the source reads.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="TOML file; it holds only what differs.")]
LoopName = Annotated[str, typer.Option("--loop", help="Name of the loop.")]
Reason = Annotated[str, typer.Option("--reason", help="Why, in a sentence that stays with the release.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="One setting: reinforce.gamma=0.8", metavar="A.B=C")]


def _say(message: str) -> None:
    print(message, file=sys.stderr)


def _stop(error: SlateloopError) -> NoReturn:
    _say(f"slateloop: {error}")
    raise typer.Exit(WRONG_INPUT if isinstance(error, InputError) else FAILED)


def command(act: Callable[P, None]) -> Callable[P, None]:
    """Prepare the platform's environment, and turn a user's mistake into a sentence and an exit code."""

    @wraps(act)
    def run(*arguments: P.args, **options: P.kwargs) -> None:
        prepare_environment(PlatformSettings())
        try:
            act(*arguments, **options)
        except SlateloopError as error:
            _stop(error)
        except KeyboardInterrupt:
            _say("slateloop: interrupted; the same command goes on where this one stopped")
            raise typer.Exit(INTERRUPTED) from None

    return run


@app.command("run", epilog="Example: slateloop run --source sessions --path my-clicks --set seed=3")
@command
def run_loop(
    source: SourceName = None,
    path: SourcePath = None,
    config: ConfigFile = None,
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder in which the run leaves its own.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Compute every stage anew.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run the loop once: import, validate, learn, judge, decide, package, report."""
    from flows.config import load_config, source_path

    # Without --source a file's own source counts.
    loaded = load_config(config, settings or [], source)
    source_path(loaded, path)
    platform = PlatformSettings()
    require_writable(out or platform.runs, "--out")
    require_writable(platform.home, "SLATELOOP_HOME")
    require_writable(platform.data, "SLATELOOP_DATA")
    # Prefect reads its folder when it is imported, and complains where there is none to make it in.
    from flows.live_progress import live_progress
    from flows.retraining import retraining

    with live_progress():
        summary = retraining(loaded, path, out, fresh)
        _let_prefect_flush()
    _show(Path(summary.folder), as_json)


@app.command("import", epilog="Example: slateloop import --source trivago --path trivago --out data/trivago")
@command
def import_source(
    source: Annotated[
        str, typer.Option("--source", help="log, obd, trivago, sessions, movielens, table or storefront.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder of the log.")],
    path: SourcePath = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Translate a source into the data contract, and nothing else."""
    from flows.config import load_config, source_path
    from flows.stages import write_source_log

    config = load_config(None, settings or [], source)
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
            _say(f"warning: {result.name}: {result.metric} is {result.observed:g}, expected {result.expected}")
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


@app.command("forget", epilog="Example: slateloop forget user-1")
@command
def forget_rows(
    users: Annotated[list[str] | None, typer.Argument(help="User ids, as clients send them.", metavar="USER")] = None,
    hashes: Annotated[
        list[str] | None, typer.Option("--hash", help="A user by the hash in the log, instead of the id.")
    ] = None,
    older_than: Annotated[
        str | None, typer.Option("--older-than", help="All rows older than 180d, or than a date: 2026-05-31.")
    ] = None,
    loop: Annotated[str | None, typer.Option("--loop", help="With --older-than: only this loop's rows.")] = None,
    also: Annotated[list[Path] | None, typer.Option("--also", help="Another folder with logs or runs.")] = None,
    vacuum: Annotated[
        bool, typer.Option("--vacuum", help="Write a large SQLite file anew; the endpoint waits meanwhile.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Delete users' rows from the interaction log and all stored copies, or rows that are too old from the log."""
    from flows import forgetting
    from flows.live_progress import live_progress
    from services.settings import ServiceSettings, user_hash

    named = [*(users or []), *(hashes or [])]
    if bool(named) == (older_than is not None):
        raise InputError("expected users to forget (USER or --hash), or --older-than; one of both")
    if loop is not None and older_than is None:
        raise InputError(f"--loop {loop}: goes with --older-than; a user is forgotten in all loops")
    if also and older_than is not None:
        raise InputError(f"--also {also[0]}: goes with users; --older-than deletes from the interaction log alone")
    if missing := [folder for folder in also or [] if not folder.is_dir()]:
        raise InputError(f"--also {missing[0]}: no such folder")
    if wrong := [value for value in hashes or [] if re.fullmatch("[0-9a-f]{64}", value) is None]:
        raise InputError(f"--hash {wrong[0]}: expected the 64 hexadecimal digits of a hash in the log")
    settings = ServiceSettings()
    with live_progress():
        if older_than is not None:
            before = _moment(older_than)
            result = forgetting.forget_before(settings.database, before, loop, vacuum=vacuum)
        else:
            key = settings.existing_user_hash_key() if users else b""
            wanted = [*(user_hash(key, user) for user in users or []), *(hashes or [])]
            result = forgetting.forget(settings.database, wanted, PlatformSettings(), also or [], vacuum=vacuum)
    if as_json:
        print(result.model_dump_json(indent=2))
    else:
        for line in result.lines():
            print(line)
    if not result.whole:
        _say("slateloop: not everything is gone yet; the same command goes on where this one stopped")
        raise typer.Exit(FAILED)


def _moment(text: str) -> datetime:
    """The time that `--older-than` names."""
    now = datetime.now(UTC)
    if days := re.fullmatch(r"([1-9]\d{0,4})d", text):
        return now - timedelta(days=int(days[1]))
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise InputError(f"--older-than {text}: expected days, such as 180d, or a date, such as 2026-05-31") from None
    moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
    if moment > now:
        raise InputError(f"--older-than {text}: lies in the future; expected a time in the past")
    return moment


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


@app.command("ab-report", epilog="Example: slateloop ab-report --set loop=shop --guard")
@command
def report_ab(
    config: ConfigFile = None,
    settings: Settings = None,
    path: SourcePath = None,
    guard: Annotated[bool, typer.Option("--guard", help="Take the challenger away where harm is proven.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="File for the result, for record-ab.")] = None,
    as_json: AsJson = False,
) -> None:
    """What the canary's A/B in live traffic shows so far, and what the gate says of it."""
    from flows.ab_report import analyze_release, guarded, write_report
    from flows.config import load_config, source_path

    loaded = load_config(config, settings or [], "log")
    file = source_path(loaded, path)
    report = analyze_release(loaded, file)
    if guard:
        report = guarded(report, file)
    if out is not None:
        write_report(report, out)
    if as_json:
        print(report.model_dump_json(indent=2))
        return
    from rich.console import Console

    from flows.terminal import ab_panel

    Console().print(ab_panel(report))


@release_app.command("status", epilog="Example: slateloop release status --loop shop")
@command
def show_release(
    loop: LoopName = "shop",
    history: Annotated[bool, typer.Option("--history", help="All releases of the loop, oldest first.")] = False,
    as_json: AsJson = False,
) -> None:
    """Who serves whom."""
    from flows.releasing import open_releases

    releases = open_releases(writing=False)
    shown = releases.history(loop) if history else [releases.serving(loop)]
    _show_releases(shown, as_json)


@release_app.command("promote", epilog="Example: slateloop release promote --policy shop-cem:1a2b3c")
@command
def promote_policy(
    policy: Annotated[
        str | None, typer.Option("--policy", help="Exact tag of the loop's first champion; no other needs it.")
    ] = None,
    loop: LoopName = "shop",
    config: ConfigFile = None,
    settings: Settings = None,
    reason: Reason = "",
    as_json: AsJson = False,
) -> None:
    """Make the challenger the champion, if its evidence and its live A/B say so; or release a loop's first champion."""
    from flows import releasing

    releases = releasing.open_releases()
    if policy is not None:
        releasing.require_policy(loop, policy)
        release = releases.start(loop, policy, reason or "the first champion")
    else:
        from flows.ab_report import analyze_release
        from flows.config import load_config

        loaded = load_config(config, [*(settings or []), f"loop={loop}"], "log")
        release = releasing.promote(releases, analyze_release(loaded), reason)
    _show_releases([release], as_json)


@release_app.command("canary", epilog="Example: slateloop release canary --policy shop-reinforce:1a2b3c --share 0.05")
@command
def release_canary(
    policy: Annotated[str, typer.Option("--policy", help="Exact tag of the policy that asks to serve.")],
    share: Annotated[float, typer.Option("--share", help="Share of users whom it serves.")] = 0.05,
    planned_sessions: Annotated[
        int, typer.Option("--planned-sessions", min=2, help="Sessions of both arms that plan-ab asks for.")
    ] = 20_000,
    loop: LoopName = "shop",
    reason: Reason = "",
    as_json: AsJson = False,
) -> None:
    """Let a challenger serve a share of users, if the gate allows it a canary."""
    from flows import releasing

    release = releasing.canary(
        releasing.open_releases(), loop, policy, share=share, planned_sessions=planned_sessions, reason=reason
    )
    _show_releases([release], as_json)


@release_app.command("baseline", epilog="Example: slateloop release baseline --policy shop-cem:1a2b3c --share 0.02")
@command
def release_baseline(
    policy: Annotated[str | None, typer.Option("--policy", help="Exact tag; without it there is none.")] = None,
    share: Annotated[float, typer.Option("--share", help="Share of users whom it serves.")] = 0.0,
    loop: LoopName = "shop",
    reason: Reason = "",
    as_json: AsJson = False,
) -> None:
    """Let a policy go on serving a share of users for comparison, or no longer."""
    from flows import releasing

    release = releasing.set_baseline(releasing.open_releases(), loop, policy, share, reason)
    _show_releases([release], as_json)


@release_app.command("shadow", epilog="Example: slateloop release shadow --policy shop-reinforce:1a2b3c")
@command
def release_shadow(
    policy: Annotated[str | None, typer.Option("--policy", help="Exact tag; without it there is none.")] = None,
    loop: LoopName = "shop",
    reason: Reason = "",
    as_json: AsJson = False,
) -> None:
    """Log what a policy would show beside what is shown, or no longer."""
    from flows import releasing

    release = releasing.set_shadow(releasing.open_releases(), loop, policy, reason)
    _show_releases([release], as_json)


@release_app.command("rollback", epilog="Example: slateloop release rollback --reason 'carts are down'")
@command
def roll_back_release(loop: LoopName = "shop", reason: Reason = "", as_json: AsJson = False) -> None:
    """Take the challenger away; without one, bring back the champion before this one."""
    from flows import releasing

    release = releasing.open_releases().roll_back(
        loop, reason or "by hand", require=lambda policy: releasing.require_policy(loop, policy)
    )
    _show_releases([release], as_json)


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


@token_app.command("create", epilog="Example: slateloop token create shop --scope recommend --scope feedback")
@command
def create_token(
    name: Annotated[str, typer.Argument(help="Whose token it is.", metavar="NAME")],
    scopes: Annotated[list[str], typer.Option("--scope", help="recommend, feedback or release; may be repeated.")],
) -> None:
    """Make a token and print it, this once; only a digest of it is kept."""
    tokens = _tokens()
    print(tokens.create(name, scopes))
    _say("slateloop: keep it well: it is not shown again")


@token_app.command("list", epilog="Example: slateloop token list")
@command
def list_tokens(as_json: AsJson = False) -> None:
    """Names, scopes and ages of the tokens."""
    tokens = _tokens().read()
    if as_json:
        print(json.dumps([token.model_dump(mode="json", exclude={"digest"}) for token in tokens], indent=2))
        return
    from rich.console import Console

    from flows.terminal import tokens_table

    Console().print(tokens_table(tokens))


@token_app.command("revoke", epilog="Example: slateloop token revoke shop")
@command
def revoke_token(name: Annotated[str, typer.Argument(help="Whose token it is.", metavar="NAME")]) -> None:
    """Forget a token; a running endpoint refuses it within a second."""
    _tokens().revoke(name)
    print(f"{name}: revoked")


def _tokens() -> "TokenFile":
    from services.access import TokenFile
    from services.settings import ServiceSettings

    return TokenFile(ServiceSettings().tokens)


@app.command("load-test", epilog="Example: slateloop load-test --url http://127.0.0.1:3000 --rate 100 --seconds 30")
@command
def run_load_test(
    url: Annotated[str, typer.Option("--url", help="Address of the endpoint.")],
    rate: Annotated[float, typer.Option("--rate", min=0.01, help="Requests a second.")] = 50.0,
    seconds: Annotated[float, typer.Option("--seconds", min=0.1, help="How long.")] = 10.0,
    loop: Annotated[str, typer.Option("--loop", help="The recommender that is asked.")] = "shop",
    body: Annotated[
        Path | None, typer.Option("--body", help="JSON file of the request; a small one without it.")
    ] = None,
    connections: Annotated[int, typer.Option("--connections", min=1, help="Requests that may wait at once.")] = 64,
    token: Annotated[
        str | None, typer.Option("--token", envvar="SLATELOOP_TOKEN", help="Token with the scope recommend.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Ask for recommendations at a fixed rate, and tell how long they took. They are logged like any others."""
    from flows.load_test import load_test, small_question

    if body is None:
        question = small_question(loop)
    else:
        try:
            question = body.read_bytes()
        except OSError as error:
            raise InputError(f"{body}: cannot be read: {error.strerror}") from None
    found = load_test(url, question, rate=rate, seconds=seconds, connections=connections, token=token)
    if as_json:
        print(found.model_dump_json(indent=2))
        return
    from rich.console import Console

    from flows.terminal import load_table

    Console().print(load_table(found))


@app.command("simulate", epilog="Example: slateloop simulate --source storefront --users 1000")
@command
def simulate_shoppers(
    users: Annotated[int, typer.Option("--users", min=1, help="Different users who visit.")],
    source: Annotated[str | None, typer.Option("--source", help="Whose users they are: storefront.")] = None,
    sessions: Annotated[int, typer.Option("--sessions", min=1, help="Visits of each user, one after the other.")] = 1,
    url: Annotated[str, typer.Option("--url", help="Address of the endpoint.")] = "http://127.0.0.1:3000",
    token: Annotated[
        str | None, typer.Option("--token", envvar="SLATELOOP_TOKEN", help="Token that the endpoint asks for.")
    ] = None,
    loop: Annotated[
        str | None, typer.Option("--loop", help="The recommender that is asked; the configuration's by default.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of who visits and of what they do.")] = 0,
    config: ConfigFile = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Let simulated shoppers visit the running endpoint: they are shown its slates, and tell it what they did."""
    from components.environments import storefront
    from flows.config import load_config
    from flows.endpoint_client import Endpoint
    from flows.live_progress import live_progress
    from flows.simulation import simulate
    from flows.stage_store import progress_sink

    loaded = load_config(config, settings or [], source)
    if not isinstance(loaded.source, storefront.Config):
        raise InputError(f"--source {loaded.source.name}: is no simulator; expected storefront")  # type: ignore[attr-defined]
    endpoint = Endpoint(url=url, loop=loop or loaded.loop, token=token)
    try:
        with live_progress():
            progress = partial(progress_sink.get(), "simulate")
            summary = simulate(
                loaded.source, endpoint, n_users=users, n_sessions=sessions, seed=seed, progress=progress
            )
    except KeyboardInterrupt:
        _say("slateloop: interrupted; what was shown and heard so far is in the endpoint's log")
        raise typer.Exit(INTERRUPTED) from None
    if as_json:
        print(summary.model_dump_json(indent=2))
        return
    from rich.console import Console

    from flows.terminal import simulation_table

    print(
        f"{summary.total.requests:,} requests in {summary.seconds:.1f} s, {summary.requests_per_second:,.0f} a second"
    )
    if summary.not_logged:
        _say(f"warning: {summary.not_logged:,} slates could not be logged: nothing will be learned from them")
    Console().print(simulation_table(summary))


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
    # Earlier versions' runs name no baseline.
    tags = {
        name: lineage[f"{name.lower()}_tag"]
        for name in ("Policy", "Baseline", "Bento")
        if f"{name.lower()}_tag" in lineage
    }
    Console().print(decision_panel(decision, folder / "report.html", tags))
    if mark := read_mark(folder):
        print(mark.text)


def _show_releases(releases: Sequence["Release"], as_json: bool) -> None:
    if as_json:
        documents = [release.model_dump(mode="json") for release in releases]
        print(json.dumps(documents[0] if len(documents) == 1 else documents, indent=2))
        return
    from rich.console import Console

    from flows.terminal import releases_table

    Console().print(releases_table(releases))


def _let_prefect_flush() -> None:
    """A server of the run's own is stopped with the process: what it has not stored by then is lost."""
    if not os.environ.get("PREFECT_API_URL"):
        time.sleep(3)


def main() -> None:
    """Entry point of the `slateloop` command."""
    app()


if __name__ == "__main__":
    main()
