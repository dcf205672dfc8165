"""What a run computes: one frozen model, composed from the parts' own configurations.

It is the flow's parameter, the TOML file's schema and the lineage's record. Defaults < TOML file < `--set a.b=c`.
"""

import json
import math
import tomllib
from collections.abc import Iterator
from functools import reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema

from components.agents.behavior import BehaviorConfig
from components.agents.cem import CemConfig
from components.agents.constant_cem import ConstantCemConfig
from components.agents.ppo import PpoConfig
from components.agents.reinforce import ReinforceConfig
from components.environments import storefront, virtual_taobao_log
from components.errors import InputError
from components.evaluation.world_model_trust import TrustConfig
from components.experiment.gate import GateConfig
from components.interactions.importers import importers, interaction_log
from components.interactions.splits import SplitConfig
from components.policies.session_encoder import EncoderConfig
from components.validation.checks import ValidationConfig
from components.world_model.action_model import ActionModelConfig
from components.world_model.adversarial import AdversarialConfig
from components.world_model.training import LikelihoodConfig
from services.releases import MOST_CHALLENGED
from services.settings import ServiceSettings

#: Configuration of every source by its name: the simulators, and one for each importer's file.
SOURCES: dict[str, type[BaseModel]] = {
    "storefront": storefront.Config,
    **{name: importer.Config for name, importer in sorted(importers().items())},
    "virtual-taobao": virtual_taobao_log.Config,
}
if TYPE_CHECKING:
    SourceConfig = BaseModel
else:
    SourceConfig = Annotated[reduce(or_, SOURCES.values()), Field(discriminator="name")]


#: As text: Prefect's form would offer a calendar, which cuts off what is less than a second.
Moment = Annotated[AwareDatetime, WithJsonSchema({"type": "string"})]


class EvaluationConfig(BaseModel):
    """Off-policy evaluation, and the pull that makes it possible."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pull: bool = Field(
        default=True,
        description="Whether a release is pulled back towards the logging policy until the log can judge it; a policy "
        "as trained is mostly held.",
    )

    ess_margin: float = Field(
        default=1.5,
        ge=1,
        le=10,
        description="The released policy's ESS on validation must exceed the gate's floor by this factor; requests "
        "whose reward is known count.",
    )


class AbConfig(BaseModel):
    """The A/B of policy against baseline."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sessions: int = Field(default=40_000, ge=100, description="Sessions of the A/B, of users drawn at random.")
    treatment_share: float = Field(default=0.5, gt=0, lt=1, description="Share of users who see the challenger.")
    days: int = Field(
        default=10,
        ge=1,
        le=366,
        description="Days over which the simulated sessions are spread; the difference is looked at after each.",
    )
    max_steps: int = Field(default=30, ge=1, le=1_000, description="Requests after which a session is cut.")
    salt: str = Field(default="ab", description="Salt of the hash that assigns users to arms.")


class ReleaseConfig(BaseModel):
    """What the gate's word does by itself; without it somebody releases by hand."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    canary_share: float | None = Field(
        default=None,
        gt=0,
        le=MOST_CHALLENGED,
        description="Share of users to whom a run shows its policy when the gate lets it out; null shows it to nobody.",
    )
    planned_sessions: int = Field(
        default=20_000, ge=2, description="Sessions of both arms that such a canary's A/B is planned for (plan-ab)."
    )
    promote: bool = Field(
        default=False, description="Whether ab-report makes a challenger the champion when the gate says so."
    )


class LoopConfig(BaseModel):
    """Everything that decides a run's result."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    loop: str = Field(default="shop", pattern=r"^[a-z0-9][a-z0-9-]*$", max_length=40, description="Name of the loop.")
    seed: int = Field(default=0, ge=0, lt=2**31, description="Seed of everything that learns.")
    threads: int = Field(
        default=1, ge=1, le=256, description="Torch threads: part of the lineage, since they can change sums."
    )
    device: Literal["cpu", "cuda", "mps"] = Field(
        default="cpu",
        description="Torch's device on which policies of actions learn; those of slates learn on the CPU. Another "
        "device, or another card, may come to another policy.",
    )
    as_of: Moment | None = Field(
        default=None,
        description="Only feedback known by this time, with its zone, counts; null takes all there is. As in "
        "2026-05-01T23:59:59.999999Z.",
    )
    source: SourceConfig = Field(default=storefront.Config(), description="Where the log comes from.")
    validation: ValidationConfig = ValidationConfig()
    split: SplitConfig = SplitConfig()
    encoder: EncoderConfig = EncoderConfig()
    user_model: LikelihoodConfig = LikelihoodConfig()
    adversarial: AdversarialConfig = AdversarialConfig()
    trust: TrustConfig = TrustConfig()
    candidates: int = Field(
        default=50, ge=2, le=500, description="Candidates that the retrieval stage yields where a log has no slates."
    )
    slate_size: int = Field(default=10, ge=1, le=100, description="Slate of the policy where a log has no slates.")
    behavior: BehaviorConfig = BehaviorConfig()
    reinforce: ReinforceConfig = ReinforceConfig()
    cem: CemConfig = CemConfig()
    action_model: ActionModelConfig = ActionModelConfig()
    ppo: PpoConfig = PpoConfig()
    constant_cem: ConstantCemConfig = ConstantCemConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    ab: AbConfig = AbConfig()
    gate: GateConfig = GateConfig()
    release: ReleaseConfig = ReleaseConfig()


def load_config(file: Path | None, settings: list[str], source: str | None = None) -> LoopConfig:
    """The configuration from a TOML file, `a.b=c` settings and a source's name, each over the one before.

    Paths become whole: a run may take place in another folder, and what it is made from must not depend on that.

    Raises:
        InputError: an unknown key, a value of the wrong type or out of bounds, an unknown source.
    """
    document = {} if file is None else _read(file)
    if source is not None:
        group = document.get("source")
        if not isinstance(group, dict) or group.get("name") != source:
            document["source"] = {"name": source}
    for setting in settings:
        _put(document, setting)
    chosen = document.setdefault("source", {})
    if isinstance(chosen, dict):
        chosen.setdefault("name", "storefront")
    for name, value in _numbers(document):
        if not math.isfinite(value):
            raise InputError(f"configuration: {name} = {value}: input should be a finite number")
    try:
        config = LoopConfig.model_validate(document)
    except ValidationError as error:
        raise InputError(_explain(error)) from None
    whole = {name: value.resolve() for name, value in config.source if isinstance(value, Path)}
    return config.model_copy(update={"source": config.source.model_copy(update=whole)})


def source_path(config: LoopConfig, path: Path | None) -> Path | None:
    """The file or folder that the source reads; None for a simulator, and for the endpoint's own interaction log.

    Raises:
        InputError: the source needs a path and got none, or there is nothing at the path.
    """
    if isinstance(config.source, storefront.Config):
        if path is not None:
            raise InputError(f"--path {path}: source 'storefront' is simulated and reads nothing; leave --path out")
        return None
    name = config.source.name  # type: ignore[attr-defined]
    if path is None and isinstance(config.source, interaction_log.Config):
        return None
    if path is None:
        raise InputError(f"source {name!r} reads a file or folder: give it with --path")
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; source {name!r} reads it")
    return path.resolve()


def require_slates(config: LoopConfig) -> None:
    """Refuse what needs the endpoint on a source whose log has actions in the place of slates.

    Raises:
        InputError: the source's log has actions.
    """
    if logs_actions(config):
        raise InputError(
            "source 'virtual-taobao' logs actions of continuous numbers, and the endpoint serves slates of items; "
            "`slateloop run` learns and judges a policy of actions, and nothing serves it"
        )


def require_device(config: LoopConfig) -> None:
    """Refuse a device that is not here, or on which nothing of this loop learns.

    Raises:
        InputError: it is such a one.
    """
    if config.device == "cpu":
        return
    if not logs_actions(config):
        raise InputError(f"device = {config.device!r}: a loop of slates learns on the CPU; expected 'cpu'")
    if not getattr(torch, "cuda" if config.device == "cuda" else "mps").is_available():
        raise InputError(f"device = {config.device!r}: torch finds no such device on this machine; expected 'cpu'")


def logs_actions(config: LoopConfig) -> bool:
    """Whether the source's log has actions of continuous numbers in the place of slates of items."""
    return isinstance(config.source, virtual_taobao_log.Config)


def interaction_database(path: Path | None) -> str:
    """URL of the interaction log that the source `log` reads: an SQLite file, or without one the endpoint's own."""
    return ServiceSettings().database if path is None else f"sqlite:///{path}"


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text())
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: is no TOML: {error}") from None


def _put(document: dict[str, Any], setting: str) -> None:
    name, separator, text = setting.partition("=")
    *path, last = name.split(".")
    if not separator or not all((*path, last)):
        raise InputError(f"--set {setting}: expected a.b=c, as in --set reinforce.gamma=0.8")
    place = document
    for part in path:
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            raise InputError(f"--set {setting}: {part!r} is no group of settings")
    try:
        place[last] = json.loads(text)
    except json.JSONDecodeError:
        place[last] = text


def _numbers(value: object, name: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _numbers(part, f"{name}.{key}" if name else str(key))
    elif isinstance(value, float):
        yield name, value


def _explain(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    # Errors below `source` name the branch of the union as well: source.storefront.n_users.
    branch, path = _branch([str(part) for part in first["loc"]])
    name = ".".join(path)
    if first["type"] == "missing":
        what = branch.model_fields[path[-1]].description
        return f"configuration: {name}: missing; {what} Say it with --set {name}=VALUE"
    if first["type"] == "extra_forbidden":
        keys = list(branch.model_fields)
        return f"configuration: unknown key {name!r}; {'.'.join(path[:-1]) or 'the top level'} has: {', '.join(keys)}"
    if first["type"] == "union_tag_invalid":
        seen = first["input"]["name"]
        return f"configuration: source.name = {seen!r}: unknown source; the sources are: {', '.join(SOURCES)}"
    if first["type"] == "value_error":  # Our own validators name keys and values themselves.
        return f"configuration: {name}: {first['msg'].removeprefix('Value error, ')}"
    return f"configuration: {name} = {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"


def _branch(loc: list[str]) -> tuple[type[BaseModel], list[str]]:
    """The model that holds an error's key, and the key's path as a user writes it."""
    if loc[0] == "source" and len(loc) > 1 and loc[1] in SOURCES:
        return SOURCES[loc[1]], [loc[0], *loc[2:]]
    model: type[BaseModel] = LoopConfig
    for part in loc[:-1]:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        if not isinstance(annotation, type) or not issubclass(annotation, BaseModel):
            break
        model = annotation
    return model, loc
