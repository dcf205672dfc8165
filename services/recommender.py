"""The endpoint: POST /recommend answers with a slate and the log_prob with which it was chosen."""

import gc
from collections.abc import Mapping
from dataclasses import dataclass
from uuid import uuid4

import bentoml
import torch
from pydantic import BaseModel, ConfigDict, Field

from components.errors import InputError
from components.policies.policy_folder import StoredPolicy
from components.policies.single_request import LiveSession, recommend
from services.policy_store import load_model

#: The arm that answers where a request names none and there are several.
DEFAULT_ARM = "champion"


class RecommendRequest(LiveSession):
    """A session up to now, and the items that may be shown next."""

    loop: str = Field(min_length=1, max_length=64, description="The recommender that is asked.")
    user_id: str = Field(min_length=1, max_length=256, description="Who asks; policies see the session only.")
    arm: str | None = Field(
        default=None, max_length=64, description="Policy to ask, by its arm; the champion, or the only one, without it."
    )


class RecommendResponse(BaseModel):
    """A slate, and what makes it worth learning from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    request_id: str = Field(description="Names this request in logs and feedback.")
    arm: str = Field(description="The arm that answered.")
    policy: str = Field(description="Exact tag of the policy that answered.")
    slate: tuple[str, ...] = Field(description="Items to show, in display order.")
    log_prob: float = Field(description="Of the ordered slate under the policy, in nats.")
    log_probs: tuple[float, ...] = Field(description="Per position, given the positions above; they sum to log_prob.")


class ServiceArguments(BaseModel):
    """What a Bento is built with."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    arms: dict[str, str] = Field(min_length=1, description="Exact tag of each arm's policy.")


@dataclass(frozen=True)
class ServedPolicy:
    """A policy and the tag that names it."""

    tag: str
    stored: StoredPolicy


def load_served_policies() -> dict[str, ServedPolicy]:
    """The policies of the arms that this Bento was built with."""
    arms = bentoml.use_arguments(ServiceArguments).arms
    return {arm: ServedPolicy(tag, load_model(tag)) for arm, tag in arms.items()}


@bentoml.service(name="recommender", workers=1, traffic={"timeout": 10}, logging={"access": {"enabled": False}})
class Recommender:
    """Recommends slates; one policy per arm."""

    def __init__(self, policies: Mapping[str, ServedPolicy] | None = None, seed: int | None = None) -> None:
        self.policies = load_served_policies() if policies is None else policies
        self.generator = torch.Generator()
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)
        torch.set_num_threads(1)
        # Without this the collector walks the whole heap now and then, and requests wait 200 ms for it.
        gc.collect()
        gc.freeze()

    @bentoml.api  # type: ignore[untyped-decorator]
    async def recommend(self, request: RecommendRequest, /) -> RecommendResponse:
        """Choose a slate among the candidates."""
        try:
            arm = self._arm(request)
            served = self.policies[arm]
            _check_loop(request, served)
            chosen = recommend(served.stored, request, self.generator)
        except InputError as error:
            raise bentoml.exceptions.InvalidArgument(str(error)) from None
        return RecommendResponse(
            request_id=uuid4().hex,
            arm=arm,
            policy=served.tag,
            slate=chosen.slate,
            log_prob=chosen.log_prob,
            log_probs=chosen.log_probs,
        )

    def _arm(self, request: RecommendRequest) -> str:
        arms = sorted(self.policies)
        arm = request.arm or (arms[0] if len(arms) == 1 else DEFAULT_ARM)
        if arm not in self.policies:
            raise InputError(f"arm: {arm!r} is not served; the arms are {arms}")
        return arm


def _check_loop(request: RecommendRequest, served: ServedPolicy) -> None:
    if request.loop != served.stored.description.loop:
        raise InputError(f"loop: {request.loop!r} is not served here; expected {served.stored.description.loop!r}")
