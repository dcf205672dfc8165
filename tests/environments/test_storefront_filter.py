"""The Bayes filter of the shop: its likelihood by enumeration, its worth beside policies that know less and more."""

from itertools import product

import pytest
import torch
from torch import Tensor

from components.environments.storefront import (
    EXAMINED_NEXT,
    EXAMINED_NEXT_AFTER_CLICK,
    LATENT,
    BehaviorPolicy,
    Config,
    Storefront,
)
from components.environments.storefront_filter import FilterPolicy
from components.environments.true_value import true_session_value
from components.policies.slate_policy import SHARP, OraclePolicy


def _enumerated(p: Tensor, q: Tensor, clicks: list[int], purchases: list[int]) -> float:
    """Probability of a response, summed over every pattern of examined positions."""
    total = 0.0
    for depth in range(1, len(clicks) + 1):
        # Positions are examined from the top, down to `depth`.
        chance = 1.0
        for k, (clicked, bought) in enumerate(zip(clicks, purchases, strict=True)):
            goes_on = EXAMINED_NEXT_AFTER_CLICK if clicked else EXAMINED_NEXT
            if k < depth:
                chance *= float(p[k]) if clicked else 1.0 - float(p[k])
                if clicked:
                    chance *= float(q[k]) if bought else 1.0 - float(q[k])
                if k + 1 < len(clicks):
                    chance *= goes_on if k + 1 < depth else 1.0 - goes_on
            elif clicked:
                chance = 0.0
        total += chance
    return total


def test_the_likelihood_of_a_response_sums_over_what_was_examined() -> None:
    shop = Storefront(Config(slate_size=3))
    policy = FilterPolicy(shop, weight=0.0, n_particles=4)
    generator = torch.Generator().manual_seed(1)
    opened = shop.reset(torch.tensor([5]), generator)
    requests = shop.observe(opened)
    state = policy.start(requests)
    slates = requests.candidates[:, :3]
    # Particles are interests of the one user, side by side.
    interests = state.hidden.unflatten(1, (4, LATENT))[0]
    p, q = shop.click_and_purchase(interests, opened.sensitivity.expand(4), slates.expand(4, -1))
    chances = []
    for clicks in product((0, 1), repeat=3):
        for purchases in product(*((0, 1) if clicked else (0,) for clicked in clicks)):
            got = policy.log_likelihood(
                state, slates, torch.tensor([clicks]).float(), torch.tensor([purchases]).float(), requests
            ).exp()
            for particle in range(4):
                expected = _enumerated(p[particle], q[particle], list(clicks), list(purchases))
                assert float(got[0, particle]) == pytest.approx(expected, rel=1e-4)
            chances.append(got)

    torch.testing.assert_close(torch.stack(chances).sum(0), torch.ones(1, 4))


def test_the_filter_earns_more_than_the_logging_policy_and_less_than_the_oracle() -> None:
    config = Config()
    shop, revealing = Storefront(config), Storefront(config, reveal_truth=True)
    users = torch.randint(shop.n_users, (2_000,), generator=torch.Generator().manual_seed(0))

    logging, filtered, oracle = (
        true_session_value(environment, policy, users, torch.Generator().manual_seed(1), max_steps=20)
        for environment, policy in (
            (shop, BehaviorPolicy(shop)),
            (shop, FilterPolicy(shop, weight=SHARP, n_particles=64)),
            (revealing, OraclePolicy(shop.slate_size)),
        )
    )

    assert filtered.value - logging.value > 3 * (filtered.standard_error + logging.standard_error)
    assert oracle.value - filtered.value > 2 * (oracle.standard_error + filtered.standard_error)
