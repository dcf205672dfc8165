"""The commands around a running endpoint: who serves, who may ask, what it shows to whom, and whom it forgets."""

import json
import re
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from components.errors import InputError
from flows.command import FAILED, INTERRUPTED, AsJson, ConfigFile, Settings, SourcePath, command, say
from flows.settings import PlatformSettings

if TYPE_CHECKING:
    from services.access import TokenFile
    from services.releases import Release

serving_app = typer.Typer()
release_app = typer.Typer(help="Which policies serve a loop, and whom.", no_args_is_help=True)
serving_app.add_typer(release_app, name="release")
token_app = typer.Typer(help="Tokens of those who may ask the endpoint.", no_args_is_help=True)
serving_app.add_typer(token_app, name="token")

LoopName = Annotated[str, typer.Option("--loop", help="Name of the loop.")]
Reason = Annotated[str, typer.Option("--reason", help="Why, in a sentence that stays with the release.")]


@serving_app.command("ab-report", epilog="Example: slateloop ab-report --set loop=shop --guard")
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
    from flows.config import load_config, source_path
    from flows.live_report import analyze_release, guarded, write_report

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


@serving_app.command("drift", epilog="Example: slateloop drift --set loop=shop")
@command
def look_for_drift(
    config: ConfigFile = None,
    settings: Settings = None,
    path: SourcePath = None,
    window_hours: Annotated[float, typer.Option("--window-hours", help="Hours of traffic that are judged.")] = 24.0,
    baseline_days: Annotated[
        float, typer.Option("--baseline-days", help="First days of a champion, which later ones are compared with.")
    ] = 7.0,
    weekly_false_alarms: Annotated[
        float, typer.Option("--weekly-false-alarms", help="Share of stable weeks that may have one.")
    ] = 0.05,
    min_users: Annotated[int, typer.Option("--min-users", help="Users whom a side needs to be compared.")] = 200,
    settle_minutes: Annotated[
        float, typer.Option("--settle-minutes", help="Sessions that began so recently wait for the next look.")
    ] = 60.0,
    as_json: AsJson = False,
) -> None:
    """Look once whether a loop's traffic has moved; what is found stays in the home's history."""
    from flows.config import load_config, source_path
    from flows.drift_monitoring import look_and_keep, watch_config

    watch = watch_config(
        window_hours=window_hours,
        baseline_days=baseline_days,
        weekly_false_alarms=weekly_false_alarms,
        min_users=min_users,
        settle_minutes=settle_minutes,
    )
    loaded = load_config(config, settings or [], "log")
    seen = look_and_keep(loaded, source_path(loaded, path), watch, datetime.now(UTC))
    if as_json:
        print(seen.model_dump_json(indent=2))
        return
    from rich.console import Console

    from flows.terminal import drift_panel

    Console().print(drift_panel(seen))


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
    _show_releases(releases.history(loop) if history else releases.serving(loop), as_json)


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
        from flows.config import load_config
        from flows.live_report import analyze_release

        loaded = load_config(config, [*(settings or []), f"loop={loop}"], "log")
        release = releasing.promote(releases, analyze_release(loaded), reason)
    _show_releases(release, as_json)


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
    _show_releases(release, as_json)


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
    _show_releases(release, as_json)


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
    _show_releases(release, as_json)


@release_app.command("rollback", epilog="Example: slateloop release rollback --reason 'carts are down'")
@command
def roll_back_release(loop: LoopName = "shop", reason: Reason = "", as_json: AsJson = False) -> None:
    """Take the challenger away; without one, bring back the champion before this one."""
    from flows import releasing

    release = releasing.open_releases().roll_back(
        loop, reason or "by hand", require=lambda policy: releasing.require_policy(loop, policy)
    )
    _show_releases(release, as_json)


@token_app.command("create", epilog="Example: slateloop token create shop --scope recommend --scope feedback")
@command
def create_token(
    name: Annotated[str, typer.Argument(help="Whose token it is.", metavar="NAME")],
    scopes: Annotated[list[str], typer.Option("--scope", help="recommend, feedback or release; may be repeated.")],
) -> None:
    """Make a token and print it, this once; only a digest of it is kept."""
    tokens = _tokens()
    print(tokens.create(name, scopes))
    say("slateloop: keep it well: it is not shown again")


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


@serving_app.command(
    "load-test", epilog="Example: slateloop load-test --url http://127.0.0.1:3000 --rate 100 --seconds 30"
)
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


@serving_app.command("simulate", epilog="Example: slateloop simulate --source storefront --users 1000")
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
        raise InputError(f"--source {loaded.source.name}: has no shoppers who answer slates; expected storefront")  # type: ignore[attr-defined]
    endpoint = Endpoint(url=url, loop=loop or loaded.loop, token=token)
    try:
        with live_progress():
            progress = partial(progress_sink.get(), "simulate")
            summary = simulate(
                loaded.source, endpoint, n_users=users, n_sessions=sessions, seed=seed, progress=progress
            )
    except KeyboardInterrupt:
        say("slateloop: interrupted; what was shown and heard so far is in the endpoint's log")
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
        say(f"warning: {summary.not_logged:,} slates could not be logged: nothing will be learned from them")
    Console().print(simulation_table(summary))


@serving_app.command("forget", epilog="Example: slateloop forget user-1")
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
        say("slateloop: not everything is gone yet; the same command goes on where this one stopped")
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


def _show_releases(shown: "Release | list[Release]", as_json: bool) -> None:
    """One release, or a history: a list in JSON too, however short."""
    releases = shown if isinstance(shown, list) else [shown]
    if as_json:
        documents = [release.model_dump(mode="json") for release in releases]
        print(json.dumps(documents if isinstance(shown, list) else documents[0], indent=2))
        return
    from rich.console import Console

    from flows.terminal import releases_table

    Console().print(releases_table(releases))
