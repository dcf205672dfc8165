"""What Prefect does by itself for a loop: retrain it after drift, end runs that died or never began, tell of failures.

Each automation is found again by its name, and left alone where nothing about it has changed: an update would make
Prefect forget which events it has seen.
"""

from collections.abc import Iterator, Mapping
from datetime import timedelta
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState, RunDeployment, SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.exceptions import ObjectNotFound

from components.errors import InputError
from flows.events import LoopEvent, loop_resource
from flows.settings import PlatformSettings

#: Time without a heartbeat, of which a run sends one every 30 seconds, after which it counts as crashed.
SILENCE = timedelta(minutes=5)
#: Time after which a late run is given up: the next one of its schedule does the same work.
TOO_LATE = timedelta(hours=1)
ENDED = frozenset(f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "TimedOut", "Cancelled", "Crashed"))
#: States of a run that a worker has looked at; one that waits for its turn waits as long as it takes.
TAKEN = frozenset(f"prefect.flow-run.{state}" for state in ("Pending", "Running", "AwaitingConcurrencySlot"))
HEARTBEAT = "prefect.flow-run.heartbeat"
#: What somebody is told of, beside the loop's own events.
FAILURES = frozenset(f"prefect.flow-run.{state}" for state in ("Failed", "TimedOut", "Crashed", "Late"))


def automations_of(
    loop: str,
    deployments: Mapping[str, UUID],
    cooldown: timedelta,
    *,
    silence: timedelta = SILENCE,
    too_late: timedelta = TOO_LATE,
    notify: UUID | None = None,
) -> Iterator[AutomationCore]:
    """What is wanted for a loop.

    Args:
        loop: whose automations they are.
        deployments: all deployments of the loop by full name, `retraining/LOOP` among them.
        cooldown: least time between two runs that events wake. Prefect holds it while the automation is unchanged,
            the flow itself holds it always.
        silence: time without a heartbeat after which a run counts as crashed.
        too_late: time after which a late run is given up.
        notify: the block that is told of failures and of the loop's events.
    """
    own: dict[str, str | list[str]] = {
        "prefect.resource.role": "deployment",
        "prefect.resource.id": [_resource(id) for id in deployments.values()],
    }
    yield AutomationCore(
        name=f"{loop}: drift wakes retraining",
        description="The first event of drift wakes the loop; those of the following hours do not.",
        trigger=EventTrigger(
            expect={LoopEvent.DRIFTED},
            match={"prefect.resource.id": loop_resource(loop)},
            for_each={"prefect.resource.id"},
            posture=Posture.Reactive,
            threshold=1,
            within=cooldown,
        ),
        actions=[
            RunDeployment(
                deployment_id=deployments[f"retraining/{loop}"],
                parameters={"woken_by": "{{ event.payload.reason }} (event {{ event.id }})"},
            )
        ],
    )
    yield AutomationCore(
        name=f"{loop}: silent runs have crashed",
        description="A run whose process was killed cannot say so itself.",
        trigger=_missing({HEARTBEAT, *ENDED}, after={HEARTBEAT}, within=silence, own=own),
        actions=[ChangeFlowRunState(state=StateType.CRASHED, message="No heartbeat: the run's process has ended.")],
    )
    yield AutomationCore(
        name=f"{loop}: late runs are given up",
        description="Runs that no worker took in time would all begin at once when one comes back.",
        trigger=_missing({*TAKEN, *ENDED}, after={"prefect.flow-run.Late"}, within=too_late, own=own),
        actions=[ChangeFlowRunState(state=StateType.CANCELLED, message="No worker took the run in time.")],
    )
    if notify is not None:
        yield AutomationCore(
            name=_telling_of_runs(loop),
            description="Failed, timed-out, crashed and late runs.",
            trigger=EventTrigger(
                expect=set(FAILURES),
                match={"prefect.resource.id": "prefect.flow-run.*"},
                match_related=own,
                posture=Posture.Reactive,
                threshold=1,
            ),
            actions=[
                SendNotification(
                    block_document_id=notify,
                    subject=f"{loop}: {{{{ flow.name }}}} {{{{ flow_run.state.name }}}}",
                    body="{{ flow_run.name }}: {{ flow_run.state.message }}\n{{ flow_run|ui_url }}",
                )
            ],
        )
        yield AutomationCore(
            name=_telling_of_events(loop),
            description="Drift, a hold, a failed check, a canary and a promotion by the gate, a rollback by the guard.",
            trigger=EventTrigger(
                expect={event.value for event in LoopEvent},
                match={"prefect.resource.id": loop_resource(loop)},
                posture=Posture.Reactive,
                threshold=1,
            ),
            actions=[
                SendNotification(
                    block_document_id=notify,
                    subject=f"{loop}: {{{{ event.event }}}}",
                    body="{{ event.payload.reason }}",
                )
            ],
        )


def _missing(
    expect: set[str], *, after: set[str], within: timedelta, own: Mapping[str, str | list[str]]
) -> EventTrigger:
    """Fires for each run of our own deployments of which nothing that is expected comes in time."""
    return EventTrigger(
        after=after,
        expect=expect,
        match={"prefect.resource.id": "prefect.flow-run.*"},
        match_related=own,
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        threshold=1,
        within=within,
    )


def put_automations(
    client: SyncPrefectClient,
    loop: str,
    deployments: Mapping[str, UUID],
    settings: PlatformSettings,
    *,
    silence: timedelta = SILENCE,
    too_late: timedelta = TOO_LATE,
) -> tuple[str, ...]:
    """Put a loop's automations on the server; returns their names.

    Raises:
        InputError: the block that is to be told of failures does not exist.
    """
    notify = _block(client, settings.notify) if settings.notify else None
    cooldown = timedelta(hours=settings.cooldown_hours)
    wanted = list(automations_of(loop, deployments, cooldown, silence=silence, too_late=too_late, notify=notify))
    for automation in wanted:
        there = client.read_automations_by_name(automation.name)
        if not there:
            client.create_automation(automation)
        elif content_of(there[0]) != content_of(automation):
            client.update_automation(there[0].id, _whole(automation.model_copy(update={"enabled": there[0].enabled})))
    if notify is None:
        for name in (_telling_of_runs(loop), _telling_of_events(loop)):
            for left in client.read_automations_by_name(name):
                client.delete_automation(left.id)
    return tuple(automation.name for automation in wanted)


def _whole(automation: AutomationCore) -> AutomationCore:
    """The automation with every field set: updates leave out the others, and an action without a type does nothing."""
    return AutomationCore.model_validate(automation.model_dump(exclude={"owner_resource"}))


def content_of(automation: AutomationCore) -> object:
    """What must be equal for an automation to be left alone; whether somebody switched it off is theirs to say."""
    # As JSON, sets that are equal may differ in their order.
    return _whole(automation).model_dump(mode="python", exclude={"enabled"})


def _block(client: SyncPrefectClient, name: str) -> UUID:
    kind, _, block = name.partition("/")
    try:
        return client.read_block_document_by_name(block, kind).id
    except ObjectNotFound:
        raise InputError(
            f"SLATELOOP_NOTIFY = {name!r}: the server has no such block; expected TYPE/NAME, as in slack-webhook/team"
        ) from None


def _resource(deployment: UUID) -> str:
    return f"prefect.deployment.{deployment}"


def _telling_of_runs(loop: str) -> str:
    return f"{loop}: failures are told"


def _telling_of_events(loop: str) -> str:
    return f"{loop}: events are told"
