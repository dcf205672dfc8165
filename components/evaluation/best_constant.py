"""The best constant action of Virtual Taobao, found by whoever knows the simulator: what agents are measured against.

    maximise over a   mean over (user, page) of  Σ_k k · softmax(log P(clicks = k | user, page, a) / T)_k

by the exact gradient, from many starts near the middle of the box. The landscape consists of flat steps, so the ascent
begins with clicks made uncertain (T = 30) and ends with those of the simulator (T = 1). Starts ascend on few pages; the
few that are then best on many ascend further on those.

Shape letters: R starts, M pages (a user and the index of a page), A numbers of an action.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from components.environments.virtual_taobao import CLICK_COUNTS, VirtualTaobao, VirtualTaobaoState

#: Starts, and the pages on which they ascend; finalists, and theirs.
STARTS, PAGES = 64, 16
FINALISTS, FINAL_PAGES = 4, 512
#: Ascents and step size, of starts and of finalists.
ASCENTS, RATE = 300, 0.03
FINAL_ASCENTS, FINAL_RATE = 100, 0.01
#: Deviation of the starts before tanh, and the temperature at which they begin.
SPREAD, TEMPERATURE = 0.1, 30.0
#: The smallest probability whose logarithm is taken; float32 has none below.
_SMALLEST = 1e-37


def best_constant(environment: VirtualTaobao, seed: int, starts: int = STARTS) -> Float[Tensor, " A"]:
    """The action with the most expected clicks, inside of the box.

    Args:
        environment: users of its population, each with a page of it.
        seed: of users and starts.
        starts: R.
    """
    generator = torch.Generator(environment.device).manual_seed(seed)
    pages, many = (_pages(environment, n, generator) for n in (PAGES, FINAL_PAGES))
    shape = (starts, environment.action_size)
    latent = SPREAD * torch.randn(shape, generator=generator, device=environment.device)
    temperatures = [TEMPERATURE ** (1 - (ascent + 1) / ASCENTS) for ascent in range(ASCENTS)]
    latent = _ascend(environment, pages, latent, RATE, temperatures)
    finalists = _clicks(environment, many, latent).topk(min(FINALISTS, starts)).indices
    latent = _ascend(environment, many, latent[finalists], FINAL_RATE, [1.0] * FINAL_ASCENTS)
    return latent[_clicks(environment, many, latent).argmax()].tanh()


def _ascend(
    environment: VirtualTaobao,
    pages: VirtualTaobaoState,
    latent: Float[Tensor, "R A"],
    rate: float,
    temperatures: Sequence[float],
) -> Float[Tensor, "R A"]:
    """Actions before tanh, each after one step of Adam a temperature."""
    latent = latent.clone().requires_grad_()
    optimizer = torch.optim.Adam([latent], lr=rate)
    for temperature in temperatures:
        clicks = _expected_clicks(environment, pages, latent.tanh(), temperature)
        optimizer.zero_grad()
        # Of the logarithm, so that starts where nobody clicks find their way too.
        (-clicks.log().sum()).backward()
        optimizer.step()
    return latent.detach()


@torch.no_grad()
def _clicks(environment: VirtualTaobao, pages: VirtualTaobaoState, latent: Float[Tensor, "R A"]) -> Float[Tensor, " R"]:
    """Expected clicks of each action in the simulator, which is that of T = 1."""
    return torch.cat([_expected_clicks(environment, pages, action[None].tanh(), 1.0) for action in latent])


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
