"""A loop's deployments, as prefect.yaml describes them, on the Prefect server of PREFECT_API_URL."""

import importlib
import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import yaml
from prefect import Flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate, WorkPoolCreate
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyOptions
from prefect.client.schemas.schedules import CronSchedule
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.utilities.callables import parameter_schema
from pydantic import BaseModel, ConfigDict, Field

from components.errors import InputError
from flows.automations import SILENCE, TOO_LATE, put_automations
from flows.config import LoopConfig, load_config, require_slates, source_path
from flows.lineage import git_commit
from flows.settings import REPOSITORY, PlatformSettings

PREFECT_FILE = REPOSITORY / "prefect.yaml"


class PlannedSchedule(BaseModel):
    """When a deployment runs by itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cron: str
    timezone: str
    active: bool = Field(description="Whether the schedule begins switched on.")


class PlannedPool(BaseModel):
    """Where a deployment's runs wait for a worker."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    job_variables: dict[str, Any] = {}


class PlannedDeployment(BaseModel):
    """One entry of prefect.yaml."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    entrypoint: str
    description: str
    tags: tuple[str, ...]
    work_pool: PlannedPool
    schedules: tuple[PlannedSchedule, ...] = ()
    concurrency_limit: ConcurrencyLimitConfig
    parameters: dict[str, Any]

    def flow(self) -> Flow[..., Any]:
        """The flow that the entrypoint names."""
        file, _, name = self.entrypoint.partition(":")
        module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
        found: Flow[..., Any] = getattr(module, name)
        return found


@dataclass(frozen=True)
class Deployed:
    """What `deploy` left on the server."""

    deployments: dict[str, UUID]
    """By full name, as FLOW/NAME."""
    automations: tuple[str, ...]
    """Their names."""


def planned() -> list[PlannedDeployment]:
    """What prefect.yaml describes."""
    document = yaml.safe_load(PREFECT_FILE.read_text())
    return [PlannedDeployment.model_validate(entry) for entry in document["deployments"]]


def deploy(
    file: Path | None,
    settings: list[str],
    path: Path | None = None,
    *,
    schedules: bool | None = None,
    silence: timedelta = SILENCE,
    too_late: timedelta = TOO_LATE,
) -> Deployed:
    """Put a loop's deployments and automations on the server; what is there already is brought up to date.

    Args:
        file: the loop's configuration, as TOML.
        settings: over the file, as `a.b=c`.
        path: file or folder that the loop's source reads.
        schedules: switch the schedules on or off; None leaves each as it is, and new ones as prefect.yaml says.
        silence: time without a heartbeat after which a run counts as crashed.
        too_late: time after which a late run is given up.

    Raises:
        InputError: the configuration is wrong, PREFECT_API_URL is not set, or nothing answers there.
    """
    loop = load_config(file, settings)
    require_slates(loop)
    source_path(loop, path)
    url = os.environ.get("PREFECT_API_URL")
    if not url:
        raise InputError("PREFECT_API_URL is not set; expected the server's, such as http://127.0.0.1:4200/api")
    try:
        with get_client(sync_client=True) as client:
            ids: dict[str, UUID] = {}
            for plan in planned():
                full_name, identity = _deploy(client, of_loop(plan, file, settings, path), schedules)
                ids[full_name] = identity
            automations = put_automations(
                client, loop.loop, ids, PlatformSettings(), silence=silence, too_late=too_late
            )
    except httpx.TransportError as error:
        raise InputError(f"PREFECT_API_URL = {url}: no Prefect server answers there: {error}") from None
    return Deployed(ids, automations)


def of_loop(plan: PlannedDeployment, file: Path | None, settings: list[str], path: Path | None) -> PlannedDeployment:
    """An entry of prefect.yaml with a loop's name and parameters; one that belongs to no loop stays as it is.

    An entry that names a source, as those around the endpoint do, reads that one, whatever the loop itself reads.

    Raises:
        InputError: the configuration is wrong.
    """
    if "config" not in plan.parameters:
        return plan
    config = load_config(file, settings)
    source = plan.parameters["config"].get("source", {}).get("name", _name(config))
    if source != _name(config):
        config = load_config(file, [one for one in settings if not one.startswith("source.")], source)
        path = None
    parameters = plan.parameters | {"config": config.model_dump(mode="json", exclude_unset=True)}
    return plan.model_copy(
        update={
            "name": config.loop,
            "tags": (*plan.tags, f"loop:{config.loop}"),
            "parameters": parameters if path is None else parameters | {"path": str(path.resolve())},
        }
    )


def _name(config: LoopConfig) -> str:
    return str(config.source.name)  # type: ignore[attr-defined]


def _deploy(client: SyncPrefectClient, plan: PlannedDeployment, schedules: bool | None) -> tuple[str, UUID]:
    flow = plan.flow()
    full_name = f"{flow.name}/{plan.name}"
    try:
        client.create_work_pool(WorkPoolCreate(name=plan.work_pool.name, type="process"))
    except ObjectAlreadyExists:
        pass
    try:
        switched = {
            entry.schedule.cron: entry.active
            for entry in client.read_deployment_by_name(full_name).schedules
            if isinstance(entry.schedule, CronSchedule)
        }
    except ObjectNotFound:
        switched = {}
    identity = client.create_deployment(
        flow_id=client.create_flow(flow),
        name=plan.name,
        version=git_commit(),
        description=plan.description,
        tags=[*plan.tags],
        entrypoint=plan.entrypoint,
        # As `prefect deploy` fills it in: the folder that the flows were deployed from.
        pull_steps=[{"prefect.deployments.steps.set_working_directory": {"directory": str(REPOSITORY)}}],
        parameters=plan.parameters,
        parameter_openapi_schema=parameter_schema(flow).model_dump_for_openapi(),
        enforce_parameter_schema=True,
        work_pool_name=plan.work_pool.name,
        job_variables=plan.work_pool.job_variables,
        schedules=[
            DeploymentScheduleCreate(
                schedule=CronSchedule(cron=entry.cron, timezone=entry.timezone),
                active=switched.get(entry.cron, entry.active) if schedules is None else schedules,
            )
            for entry in plan.schedules
        ],
        concurrency_limit=plan.concurrency_limit.limit,
        concurrency_options=ConcurrencyOptions(collision_strategy=plan.concurrency_limit.collision_strategy),
    )
    return full_name, identity
