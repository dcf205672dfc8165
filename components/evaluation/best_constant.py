"""The best constant action of Virtual Taobao, found by whoever knows the simulator: what agents are measured against.

    maximise over a   mean over (user, page) of  Σ_k k · softmax(log P(clicks = k | user, page, a) / T)_k

by the exact gradient, from many starts near the middle of the box. The landscape consists of flat steps, so the ascent
begins with clicks made uncertain (T = 30) and ends with those of the simulator (T = 1), by which the best is chosen.

Shape letters: R starts, M pages (a user and the index of a page), A numbers of an action.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from components.environments.virtual_taobao import CLICK_COUNTS, VirtualTaobao, VirtualTaobaoState

#: Starts, pages on which all of them are judged, ascents of each, and step size.
STARTS, PAGES, ASCENTS, RATE = 64, 16, 300, 0.03
#: Deviation of the starts before tanh, and the temperature at which they begin.
SPREAD, TEMPERATURE = 0.1, 30.0
#: The smallest probability whose logarithm is taken; float32 has none below.
_SMALLEST = 1e-37


def best_constant(environment: VirtualTaobao, seed: int, starts: int = STARTS) -> Float[Tensor, " A"]:
    """The action with the most expected clicks, inside of the box.

    Args:
        environment: users of its population, each with a page of it.
        seed: of users and starts.
        starts: R, of which the best is taken.
    """
    generator = torch.Generator(environment.device).manual_seed(seed)
    pages = _pages(environment, PAGES, generator)
    shape = (starts, environment.action_size)
    latent = (SPREAD * torch.randn(shape, generator=generator, device=environment.device)).requires_grad_()
    optimizer = torch.optim.Adam([latent], lr=RATE)
    for ascent in range(ASCENTS):
        temperature = TEMPERATURE ** (1 - (ascent + 1) / ASCENTS)
        clicks = _expected_clicks(environment, pages, latent.tanh(), temperature)
        optimizer.zero_grad()
        # Of the logarithm, so that starts where nobody clicks find their way too.
        (-clicks.log().sum()).backward()
        optimizer.step()
    with torch.no_grad():
        actions = latent.tanh()
        return actions[_expected_clicks(environment, pages, actions, 1.0).argmax()]


def _pages(environment: VirtualTaobao, n: int, generator: torch.Generator) -> VirtualTaobaoState:
    """Pages as often as they occur: one of all the pages of many sessions, with its user, each as likely."""
    users = environment.draw_users(100 * n, generator)
    sessions = environment.open(users, generator)
    number = torch.multinomial(sessions.pages.float(), n, replacement=True, generator=generator)
    chosen = sessions.select(number)
    share = torch.rand(n, generator=generator, device=environment.device)
    index = (share * chosen.pages).floor()
    return replace(chosen, observations=torch.cat([chosen.observations[:, :-1], index[:, None]], dim=1))


def _expected_clicks(
    environment: VirtualTaobao, pages: VirtualTaobaoState, actions: Float[Tensor, "R A"], temperature: float
) -> Float[Tensor, " R"]:
    """Mean over pages of each action."""
    n = len(pages.pages)
    rows = torch.arange(n, device=actions.device).repeat(len(actions))
    clicks = environment.page(pages.select(rows), actions.repeat_interleave(n, dim=0)).clicks
    counts = torch.arange(CLICK_COUNTS, dtype=clicks.dtype, device=clicks.device)
    softened = (clicks.clamp(min=_SMALLEST).log() / temperature).softmax(1)
    return (softened @ counts).view(-1, n).mean(1)
