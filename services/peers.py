"""What the endpoint's speed is compared with: its policy behind a minimal Bento service, and behind a bare ASGI app.

Neither logs, assigns or checks more than its own input. Both read the policy from the folder that SLATELOOP_PEER names.
"""

import gc
import os
from functools import cache
from pathlib import Path
from typing import Any

import bentoml
import torch
from pydantic import BaseModel

from components.policies.live_policy import LivePolicy, LiveSession
from components.policies.policy_folder import load_policy


class Answer(BaseModel):
    """A slate with its log_probs."""

    slate: tuple[str, ...]
    log_probs: tuple[float, ...]


class Peer:
    """The policy, asked for one slate at a time."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.live = LivePolicy(load_policy(Path(os.environ["SLATELOOP_PEER"])))
        self.generator = torch.Generator()
        gc.collect()
        gc.freeze()

    def answer(self, session: LiveSession) -> Answer:
        """A slate for the session."""
        (chosen,) = self.live.recommend([session], self.generator)
        return Answer(slate=chosen.slate, log_probs=chosen.log_probs)


@bentoml.service(name="minimal", workers=1, logging={"access": {"enabled": False}})
class Minimal(Peer):
    """BentoML's own API layer."""

    @bentoml.api  # type: ignore[untyped-decorator]
    async def recommend(self, session: LiveSession, /) -> Answer:
        """A slate for the session."""
        return self.answer(session)


@cache
def _peer() -> Peer:
    return Peer()


async def bare(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """The policy as an ASGI app, and nothing else: whatever is sent is a session."""
    if scope["type"] != "http":
        return
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    answer = _peer().answer(LiveSession.model_validate_json(body)) if body else Answer(slate=(), log_probs=())
    content = answer.model_dump_json().encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": content})
