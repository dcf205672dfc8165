"""How agents of continuous actions are looked at while they learn."""

from collections.abc import Callable

from components.policies.continuous_policy import ContinuousPolicy

Watch = Callable[[ContinuousPolicy, int], None]
"""Told of the policy as it stands, after each of its improvements, and of the environment steps so far. It may try the
policy out with chance of its own, and must not change it."""


def unwatched(policy: ContinuousPolicy, steps: int) -> None:
    """Looks at nothing."""
