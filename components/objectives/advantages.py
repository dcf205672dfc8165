"""Advantages of the actions that running sessions took: how much better they were than what was to be expected.

Shape letters: T steps, B sessions.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def generalised_advantages(
    rewards: Float[Tensor, "T B"],
    ended: Bool[Tensor, "T B"],
    values: Float[Tensor, "T B"],
    last_values: Float[Tensor, " B"],
    gamma: float,
    trace: float,
) -> Float[Tensor, "T B"]:
    """The generalised advantage estimate (Schulman et al., GAE, 2016, eq. 16), of sessions that may go on after T.

        δ_t = r_t + γ c_t V_{t+1} − V_t,   c_t = 0 where the session ended with step t, else 1
        A_t = δ_t + γ λ c_t A_{t+1},       V_T = `last_values`,  A_T = 0

    λ = 0 gives the one-step TD error δ_t: little noise, and the bias of V. λ = 1 gives Σ_k γ^k r_{t+k} − V_t up to the
    session's end, or up to step T and γ^{T−t} V_T for what follows: no bias within the T steps, and all of the noise.
    At γ = 0 both are r_t − V_t. What is learned of V is the target A_t + V_t.

    Args:
        rewards: r_t.
        ended: whether the session ended with the step; the next row of its column is another session's first step.
        values: V_t of what was seen before the step.
        last_values: V_T of what was seen after the last step; not looked at where the session ended with that.
        gamma: discount γ per step.
        trace: λ, how far rewards are believed before the values are.
    """
    goes_on = gamma * (~ended).to(rewards.dtype)
    errors = rewards + goes_on * torch.cat([values[1:], last_values[None]]) - values
    advantages = torch.empty_like(errors)
    following = torch.zeros_like(last_values)
    for step in reversed(range(len(errors))):
        following = torch.addcmul(errors[step], goes_on[step], following, value=trace)
        advantages[step] = following
    return advantages


def exponential_utilities(advantages: Float[Tensor, " M"], seeking: float) -> Float[Tensor, " M"]:
    """Advantages for whoever seeks risk: (exp(β A) − 1) / β, with β A no more than 20; at β = 0 they stay as they are.

    For one step, A = r − V(s), this is the gain in the exponential utility exp(β r) (Howard and Matheson, 1972) but for
    a positive factor of each observation; the weights exp(β A) are those of reward-weighted and advantage-weighted
    regression (Peters and Schaal, 2007; Peng et al., 2019). A few actions far better than expected then outweigh many
    that are a little better, which leads away from plateaus. What is maximised is no longer the expected return: where
    the best return is a matter of luck, β > 0 prefers the gamble.
    """
    if seeking == 0:
        return advantages
    return torch.expm1((seeking * advantages).clamp(max=20.0)) / seeking


def standardised(advantages: Float[Tensor, " M"]) -> Float[Tensor, " M"]:
    """Less their mean, over their deviation; 0 where all are alike."""
    return (advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-8)
