"""IRecGAN's 10-state MDP. State observed: does REINFORCE, trained in the true environment, find the optimum?

One candidate of a slate is drawn in proportion to its r, so the best slates hold a few good items and fill up with
items that are all but never drawn; ranking by r alone stays a fifth below. The trained policy is judged by a large
rollout (as a distribution) and by its most likely slates (exactly). State hidden: `_hidden_state.py`.
"""

from functools import partial

import torch

from components.agents.reinforce import ReinforceConfig, train_reinforce
from components.environments.irecgan_mdp import START, IRecGanMdp, MdpState, myopic_policy
from components.interactions.vocabulary import FIRST_ITEM
from components.policies.slate_policy import UniformPolicy
from components.policies.tabular_policy import TabularSlatePolicy
from flows.benchmarks import Budget, Context, Figure
from flows.benchmarks._figures import columns, mean_of_seeds
from flows.benchmarks._hidden_state import learn_from_log, true_clicks
from flows.benchmarks._irecgan_comparison import compare
from flows.benchmarks._stages import silent

BUDGET = Budget(full=90, quick=5)
#: The comparison alone has larger sizes: those that were published.
HAS_FULL = True
N_STATES, N_ITEMS, SLATE = 10, 50, 10
TRAINING = ReinforceConfig(
    iterations=1_000,
    sessions=1_000,
    max_steps=20,
    critic="returns",
    gamma=0.5,
    schedule="constant",
    credit="slate",
    learning_rate=0.1,
    baseline_rate=0.01,
    entropy=0.0,
    pull=0.0,
    logged_weight=0.0,
)


def measure(context: Context) -> dict[str, Figure]:
    """Return of REINFORCE and its neighbours as shares of the optimum, over draws of the MDP."""
    n_seeds = context.seeds or (1 if context.quick else 5)
    training = TRAINING.model_copy(update={"iterations": 60}) if context.quick else TRAINING
    methods = {"reinforce": training, "reinforce_gamma_0": training.model_copy(update={"gamma": 0.0})}
    trained = {
        name: [context.keep(f"{name}-{seed}", partial(_trained, seed, config)) for seed in range(n_seeds)]
        for name, config in methods.items()
    }
    values = columns([context.keep(f"known-{seed}", partial(_known, seed)) for seed in range(n_seeds)])
    for name, results in trained.items():
        of_method = columns(results)
        values |= {name: of_method["policy"], f"{name}_slates": of_method["slates"]}
    figures = {"optimum": mean_of_seeds(values["optimum"], "clicks a session")}
    for name in ("random", "myopic", "reinforce_gamma_0", "reinforce_gamma_0_slates", "reinforce_slates", "reinforce"):
        judged = "most likely slates, exact" if name.endswith("_slates") else "as a distribution"
        figures[f"{name}.share_of_optimum"] = mean_of_seeds(values[name] / values["optimum"], f"share, {judged}")
    share = figures["reinforce.share_of_optimum"]
    figures["reinforce.share_of_optimum"] = share.model_copy(
        update={"target": "at least 0.95", "holds": share.value >= 0.95}
    )
    compared = compare(context, n_seeds)
    return (
        figures
        | _hidden_figures(context, n_seeds)
        | {name: mean_of_seeds(values, unit) for name, (values, unit) in compared.items()}
    )


def _hidden_figures(context: Context, n_seeds: int) -> dict[str, Figure]:
    """Clicks without sight of the state, and what the loop learned from a log as shares of the exact Bayes filter's."""
    learn = partial(learn_from_log, quick=context.quick)
    values = columns([context.keep(f"hidden-{seed}", partial(learn, seed)) for seed in range(n_seeds)])
    figures = {
        f"hidden.{name}": mean_of_seeds(values[name], "clicks a session")
        for name in ("random", "bayes_greedy", "bayes_slates", "reinforce")
    }
    share = mean_of_seeds(values["reinforce"] / values["bayes_greedy"], "share, ranked by the expected r")
    figures["hidden.reinforce.share_of_bayes_greedy"] = share.model_copy(
        update={"target": "at least 0.9", "holds": share.value >= 0.9}
    )
    figures["hidden.reinforce.share_of_bayes_slates"] = mean_of_seeds(
        values["reinforce"] / values["bayes_slates"], "share, slates by their expected clicks"
    )
    figures["hidden.user_model_above_bayes"] = mean_of_seeds(
        values["user_model_nats"] - values["bayes_nats"], "nats a request, above the exact filter's"
    )
    return figures


def _known(seed: int) -> dict[str, float]:
    mdp = _mdp(seed)
    return {
        "optimum": float(mdp.optimal_values()[START]),
        "random": true_clicks(mdp, UniformPolicy(SLATE)),
        "myopic": true_clicks(mdp, myopic_policy(mdp)),
    }


def _trained(seed: int, training: ReinforceConfig) -> dict[str, float]:
    mdp = _mdp(seed)
    policy = _train(mdp, training, seed)
    requests = mdp.observe(MdpState(torch.arange(N_STATES)))
    likely = policy.logits(policy.start(requests), requests).topk(SLATE, dim=1).indices
    slates = requests.candidates.gather(1, likely)
    return {"policy": true_clicks(mdp, policy), "slates": float(mdp.values_of(slates)[START])}


def _mdp(seed: int) -> IRecGanMdp:
    return IRecGanMdp(n_states=N_STATES, n_items=N_ITEMS, slate_size=SLATE, seed=seed)


def _train(mdp: IRecGanMdp, training: ReinforceConfig, seed: int) -> TabularSlatePolicy:
    policy = TabularSlatePolicy(N_STATES, N_ITEMS + FIRST_ITEM, SLATE, bound=8.0)
    train_reinforce(policy, mdp, torch.zeros(1, dtype=torch.long), None, training, seed, silent)
    return policy
