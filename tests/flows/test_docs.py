"""What can be called and set is described: in the README or in docs/."""

import json
from pathlib import Path

import pytest
from gate_evidence import ab, evidence

from components.experiment.gate import GateConfig, decide
from flows.command_line import app, data_app
from flows.config import SOURCES, LoopConfig
from flows.platform_commands import platform_app
from flows.serving_commands import release_app, serving_app, token_app
from flows.settings import PlatformSettings
from services.settings import ServiceSettings

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pages() -> str:
    files = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
    return "\n".join(file.read_text() for file in files)


COMMANDS = [
    f"{prefix} {command.name}"
    for prefix, commands in (
        ("slateloop", app),
        ("slateloop", serving_app),
        ("slateloop", platform_app),
        ("slateloop data", data_app),
        ("slateloop release", release_app),
        ("slateloop token", token_app),
    )
    for command in commands.registered_commands
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_described(command: str, pages: str) -> None:
    assert command in pages


@pytest.mark.parametrize("name", LoopConfig.model_fields)
def test_every_group_of_settings_is_described(name: str, pages: str) -> None:
    assert f"`{name}`" in pages


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_is_described(name: str, pages: str) -> None:
    assert f"`{name}`" in pages


@pytest.mark.parametrize("name", PlatformSettings.model_fields | ServiceSettings.model_fields)
def test_every_variable_is_described(name: str, pages: str) -> None:
    assert f"SLATELOOP_{name.upper()}" in pages


def test_every_check_of_the_gate_has_a_line_that_says_what_helps() -> None:
    lines = (REPOSITORY / "docs" / "holds.md").read_text().splitlines()
    described = {line.split("|")[1].strip() for line in lines if line.startswith("| ")}
    guardrails = next(line for line in described if line.startswith("guardrail "))
    reasons = decide(evidence(ab=ab()), GateConfig()).reasons
    checks = {reason.check.removesuffix(" of the challenger").removesuffix(" of the champion") for reason in reasons}
    assert len(checks) >= 15
    for check in checks:
        if check.startswith("guardrail "):
            assert check.removeprefix("guardrail ") in guardrails
        else:
            assert check in described


def test_the_published_schema_is_the_configurations() -> None:
    file = REPOSITORY / "docs" / "configuration.schema.json"
    if not file.exists():
        pytest.skip("docs/configuration.schema.json is not written yet: `make docs`")
    assert json.loads(file.read_text()) == json.loads(json.dumps(LoopConfig.model_json_schema()))
