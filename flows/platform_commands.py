"""The commands that run the loop by itself: deployments, a worker, and the whole platform on this machine."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from components.errors import InputError
from flows.command import FAILED, AsJson, ConfigFile, Settings, SourcePath, command, say
from flows.settings import PlatformSettings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flows.platform import Part

platform_app = typer.Typer()

Schedules = Annotated[
    bool | None,
    typer.Option(
        "--schedules/--no-schedules", help="Switch the schedules on or off; without either they stay as they are."
    ),
]
Limit = Annotated[int, typer.Option("--limit", min=1, help="Runs that the worker may be at at once.")]


@platform_app.command("deploy", epilog="Example: slateloop deploy --config loop.toml --schedules")
@command
def deploy_loop(
    config: ConfigFile = None,
    settings: Settings = None,
    path: SourcePath = None,
    schedules: Schedules = None,
    as_json: AsJson = False,
) -> None:
    """Put a loop's deployments and automations on the Prefect server of PREFECT_API_URL."""
    from flows.deploying import deploy

    deployed = deploy(config, settings or [], path, schedules=schedules)
    if as_json:
        ids = {name: str(identity) for name, identity in deployed.deployments.items()}
        print(json.dumps({"deployments": ids, "automations": deployed.automations}, indent=2))
        return
    for name in deployed.deployments:
        print(f"deployment {name}")
    for name in deployed.automations:
        print(f"automation {name}")


@platform_app.command("worker", epilog="Example: PREFECT_API_URL=http://127.0.0.1:4200/api slateloop worker")
@command
def start_worker(limit: Limit = 2) -> None:
    """Run what the deployments ask for, with this machine's folders, until it is interrupted."""
    from flows.platform import whole_paths, worker_command

    if not os.environ.get("PREFECT_API_URL"):
        raise InputError("PREFECT_API_URL is not set; expected the server's, such as http://127.0.0.1:4200/api")
    # A run's page in Prefect shows what the run says.
    os.environ.update(whole_paths(PlatformSettings()) | {"PREFECT_LOGGING_LEVEL": "INFO"})
    os.execv(sys.executable, worker_command(limit))


@platform_app.command("up", epilog="Example: slateloop up --config loop.toml --schedules")
@command
def start_platform(
    config: ConfigFile = None,
    settings: Settings = None,
    path: SourcePath = None,
    schedules: Schedules = None,
    prefect_port: Annotated[int, typer.Option("--prefect-port", help="Port of Prefect's server.")] = 4200,
    worker_port: Annotated[int, typer.Option("--worker-port", help="Port of the worker's health.")] = 4201,
    endpoint_port: Annotated[int, typer.Option("--endpoint-port", help="Port of the endpoint.")] = 3000,
    evidently_port: Annotated[int, typer.Option("--evidently-port", help="Port of Evidently's pages.")] = 8000,
    limit: Limit = 2,
) -> None:
    """Start Prefect, a worker, the endpoint and Evidently on this machine, and deploy a loop; Ctrl-C ends them."""
    from flows import platform
    from flows.config import load_config, require_slates, source_path

    loaded = load_config(config, settings or [])
    require_slates(loaded)
    source_path(loaded, path)
    home = PlatformSettings().home.resolve()
    server = platform.server_part(prefect_port)
    worker = platform.worker_part(worker_port, limit)
    evidently = platform.evidently_part(home / "evidently", evidently_port)
    bento = _bento_to_serve(loaded.loop)
    endpoint = [] if bento is None else [platform.endpoint_part(bento, endpoint_port)]
    parts = [server, worker, *endpoint, evidently]
    platform.require_free_ports(parts)
    environment = os.environ | platform.whole_paths(PlatformSettings()) | {"PREFECT_API_URL": f"{server.address}/api"}
    running = platform.Platform(home / "platform", environment, say)
    deploy = platform.Part("deploy", _deploy_command(config, settings or [], path, schedules))
    with platform.interrupted_by_sigterm():
        try:
            for part in (server, *endpoint, evidently):
                running.start(part)
            running.wait_for(server)
            running.start(deploy)
            running.finish(deploy)
            running.start(worker)
            for part in parts:
                running.wait_for(part)
            _show_addresses(parts, server, home / "platform")
            running.watch()
        except KeyboardInterrupt:
            return
        finally:
            running.stop()
    say("slateloop: every part has ended")
    raise typer.Exit(FAILED)


def _bento_to_serve(loop: str) -> str | None:
    """The newest Bento where the loop has a release; says what is missing otherwise."""
    from flows.releasing import open_releases
    from services.packaging import newest_bento

    try:
        released = loop in open_releases(writing=False).current()
    except InputError:  # There is no interaction log yet.
        released = False
    bento = newest_bento()
    if bento is None:
        say(f"no endpoint: nothing is packaged yet. `slateloop run --set loop={loop}` packages a policy")
    elif not released:
        say(f"no endpoint: loop {loop!r} has no release; `slateloop release promote --policy TAG` makes the first one")
        return None
    return bento


def _deploy_command(config: Path | None, settings: list[str], path: Path | None, schedules: bool | None) -> list[str]:
    options = [f"--set={setting}" for setting in settings]
    options += [] if config is None else [f"--config={config}"]
    options += [] if path is None else [f"--path={path}"]
    options += [] if schedules is None else ["--schedules" if schedules else "--no-schedules"]
    return [sys.executable, "-m", "flows.command_line", "deploy", *options]


def _show_addresses(parts: "Sequence[Part]", server: "Part", logs: Path) -> None:
    from rich.console import Console

    from flows.terminal import addresses_table

    Console().print(addresses_table({part.name: part.address for part in parts}))
    print(f"Runs of another shell show up here with PREFECT_API_URL={server.address}/api")
    print(f"Each part's output is in {logs}. Ctrl-C ends them all.", flush=True)
