"""A constant action of Virtual Taobao of middling quality, around which a log is written. No agent may use it.

It is found by climbing the simulator's own gradient: of E[clicks] under a truncated Gaussian of the log's deviation,
from the action 0 until a level is reached. Gradients are of float64 and steps lead to numbers of three decimals: the
landscape is so rough that climbs diverge where two processors' sums differ in their last bits.
"""

from dataclasses import replace

import torch
from jaxtyping import Float64
from torch import Tensor

from components.environments.virtual_taobao import (
    ACTION_SIZE,
    ITEMS_OF_A_PAGE,
    VirtualTaobao,
    VirtualTaobaoState,
)
from components.errors import InputError
from components.policies import truncated_gaussian

#: Users whose pages a climb looks at, and how far a step moves the number that it moves most.
USERS, RATE = 200, 0.02
#: Steps after which a climb ends.
MOST_STEPS = 150
#: Actions stay this far inside the box, so that a density around them is not all cut off.
EDGE = 0.95
#: Slope, in click-through rate, below which all is flat.
FLAT = 1e-12
#: Decimals of an action on the way.
DECIMALS = 3


def _visited_pages(environment: VirtualTaobao, n_users: int, generator: torch.Generator) -> VirtualTaobaoState:
    """Every page that new users will look at, a row each; what they did on the page before is left at 0.

    Clicks do not depend on what was done before, so these are all the states that a constant action is asked in.
    """
    users = environment.open(environment.draw_users(n_users, generator), generator)
    row = torch.repeat_interleave(torch.arange(n_users, device=environment.device), users.pages)
    first = users.pages.cumsum(0) - users.pages
    pages = users.select(row)
    index = torch.arange(len(row), device=environment.device) - first[row]
    return replace(pages, observations=torch.cat([pages.observations[:, :-1], index[:, None].float()], dim=1))


def middling_constant(environment: VirtualTaobao, deviation: float, level: float, seed: int) -> Float64[Tensor, " 27"]:
    """The first action of the climb around which Gaussian actions have the click-through rate `level`.

    Args:
        environment: the simulator.
        deviation: σ of the Gaussian, which is truncated to the box.
        level: click-through rate to reach.
        seed: of users and noise.

    Raises:
        InputError: the climb ends below the level.
    """
    generator = torch.Generator(environment.device).manual_seed(seed)
    pages = _visited_pages(environment, USERS, generator)
    action = torch.zeros(ACTION_SIZE, dtype=torch.float64, device=environment.device)
    reached = 0.0
    for _ in range(MOST_STEPS):
        middle = action.expand(len(pages.pages), -1)
        drawn = truncated_gaussian.draw(middle, torch.full_like(action, deviation), generator)
        # Draws move with their middle; how the cut moves is left out.
        moving = action.clone().requires_grad_()
        value = environment.expected_clicks(pages, moving + (drawn - middle)).mean() / ITEMS_OF_A_PAGE
        if float(value.detach()) >= level:
            return action
        reached = max(reached, float(value.detach()))
        (gradient,) = torch.autograd.grad(value, moving)
        steepest = gradient.abs().max()
        # On a plateau nothing but rounding errors leads on, until other draws do.
        if float(steepest) > FLAT:
            action = (action + RATE * gradient / steepest).clamp(-EDGE, EDGE).round(decimals=DECIMALS)
    raise InputError(
        f"level: {level:g} is not reached by a constant action with deviation {deviation:g}; the climb ended at "
        f"{reached:.3f}"
    )
