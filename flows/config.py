"""What a run computes: one frozen model, composed from the parts' own configurations.

It is the flow's parameter, the TOML file's schema and the lineage's record. Defaults < TOML file < `--set a.b=c`.
"""

import json
import tomllib
from datetime import datetime
from functools import reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from components.agents.behavior import BehaviorConfig
from components.agents.cem import CemConfig
from components.agents.reinforce import ReinforceConfig
from components.environments import storefront
from components.errors import InputError
from components.evaluation.world_model_trust import TrustConfig
from components.experiment.gate import GateConfig
from components.interactions.importers import importers
from components.interactions.splits import SplitConfig
from components.policies.session_encoder import EncoderConfig
from components.validation.checks import ValidationConfig
from components.world_model.adversarial import AdversarialConfig
from components.world_model.training import LikelihoodConfig

#: Configuration of every source by its name: the simulator, and one for each importer's file.
SOURCES: dict[str, type[BaseModel]] = {"storefront": storefront.Config} | {
    name: importer.Config for name, importer in sorted(importers().items())
}
if TYPE_CHECKING:
    SourceConfig = BaseModel
else:
    SourceConfig = Annotated[reduce(or_, SOURCES.values()), Field(discriminator="name")]


class EvaluationConfig(BaseModel):
    """Off-policy evaluation, and the pull that makes it possible."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ess_margin: float = Field(
        default=1.5,
        ge=1,
        le=10,
        description="The released policy's ESS on validation must exceed the gate's floor by this factor.",
    )


class AbConfig(BaseModel):
    """The A/B of policy against baseline."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sessions: int = Field(default=24_000, ge=100, description="Sessions of the A/B, of users drawn at random.")
    treatment_share: float = Field(default=0.5, gt=0, lt=1, description="Share of users who see the challenger.")
    max_steps: int = Field(default=30, ge=1, le=1_000, description="Requests after which a session is cut.")
    salt: str = Field(default="ab", description="Salt of the hash that assigns users to arms.")


class LoopConfig(BaseModel):
    """Everything that decides a run's result."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    loop: str = Field(default="shop", pattern=r"^[a-z0-9][a-z0-9-]*$", max_length=40, description="Name of the loop.")
    seed: int = Field(default=0, ge=0, lt=2**31, description="Seed of everything that learns.")
    threads: int = Field(
        default=1, ge=1, le=256, description="Torch threads: part of the lineage, since they can change sums."
    )
    as_of: datetime | None = Field(
        default=None, description="Only feedback known by this time counts; null takes all there is."
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
    evaluation: EvaluationConfig = EvaluationConfig()
    ab: AbConfig = AbConfig()
    gate: GateConfig = GateConfig()


def load_config(file: Path | None, settings: list[str], source: str | None = None) -> LoopConfig:
    """The configuration from a TOML file, `a.b=c` settings and a source's name, each over the one before.

    Raises:
        InputError: an unknown key, a value of the wrong type or out of bounds, an unknown source.
    """
    document: dict[str, Any] = {}
    if file is not None:
        try:
            document = tomllib.loads(file.read_text())
        except OSError as error:
            raise InputError(f"{file}: cannot be read: {error.strerror}") from None
        except tomllib.TOMLDecodeError as error:
            raise InputError(f"{file}: is no TOML: {error}") from None
    if source is not None:
        if source not in SOURCES:
            raise InputError(f"unknown source {source!r}; the sources are: {', '.join(SOURCES)}")
        same = document.get("source", {}).get("name") == source
        document["source"] = (document["source"] if same else {}) | {"name": source}
    for setting in settings:
        name, separator, text = setting.partition("=")
        if not separator:
            raise InputError(f"--set {setting}: expected a.b=c, as in --set reinforce.gamma=0.8")
        *path, last = name.split(".")
        place = document
        for part in path:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise InputError(f"--set {setting}: {part!r} is no group of settings")
        place[last] = _value(text)
    document.setdefault("source", {}).setdefault("name", "storefront")
    try:
        return LoopConfig.model_validate(document)
    except ValidationError as error:
        raise InputError(_explain(error)) from None


def _value(text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _explain(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    path = [str(part) for part in first["loc"] if part not in SOURCES]
    name = ".".join(path)
    if first["type"] == "extra_forbidden":
        return f"configuration: unknown key {name!r}; {_group(path[:-1])} has: {', '.join(_keys(path[:-1]))}"
    if first["type"] == "union_tag_invalid":
        return f"configuration: unknown source {first['input']!r}; the sources are: {', '.join(SOURCES)}"
    return f"configuration: {name} = {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"


def _group(path: list[str]) -> str:
    return ".".join(path) or "the top level"


def _keys(path: list[str]) -> list[str]:
    model: type[BaseModel] = LoopConfig
    for part in path:
        if part == "source":
            return sorted({key for config in SOURCES.values() for key in config.model_fields})
        annotation = model.model_fields[part].annotation
        if not isinstance(annotation, type) or not issubclass(annotation, BaseModel):
            return []
        model = annotation
    return list(model.model_fields)
