"""How fast Virtual Taobao and the agents of continuous actions are, in turns with others in one process.

environment   1,024 users at once; one user at a time, as the original steps; and the floor, the matrix products of
              the response alone
ppo           from the first step to the last update, beside Stable-Baselines3 with 8 copies of the environment, both
              at their defaults: ours does 2 passes over minibatches of 1,024, theirs 10 over minibatches of 64
updates       of DDPG, TD3 and SAC, networks 2 x 256, batches of 256, their sampling included
"""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from components.agents.ddpg import Ddpg, DdpgConfig
from components.agents.off_policy import Learner
from components.agents.ppo import PpoConfig, train_ppo
from components.agents.replay import Replay
from components.agents.sac import Sac, SacConfig
from components.agents.td3 import Td3, Td3Config
from components.environments.continuous import RunningSessions
from components.environments.gymnasium_adapter import GymnasiumEnvironment
from components.environments.virtual_taobao import (
    ACTION_SIZE,
    CLICK_COUNTS,
    GROUPS,
    SEED_SIZE,
    VirtualTaobao,
    read_layers,
)
from components.policies.continuous_policy import UniformActions
from flows.benchmarks import Context, Figure
from flows.benchmarks._timing import in_turns, rate_figures
from flows.settings import REPOSITORY

DEFAULT_PATH = REPOSITORY.parent / "shared" / "data" / "virtual_taobao"
N_USERS = 1024
#: Copies that Stable-Baselines3 steps one after the other.
N_COPIES = 8
#: Units of each hidden layer, and steps of an update.
HIDDEN, BATCH = 256, 256
NO_PEER = "stable-baselines3 is not installed; `pip install -e '.[peers]'` adds it"


def measure(context: Context) -> dict[str, Figure]:
    """Every figure; skipped are those whose peer is not installed, and all without the published weights."""
    weights = context.path or DEFAULT_PATH
    targets = {"ppo": 15.0} | {f"updates.{name}": 1.1 for name in _AGENTS}
    if not weights.is_dir():
        no_weights = f"{weights}: no such folder; give Virtual Taobao's weights with --path DIR"
        return _skipped({"environment.original": 130.0, "environment.floor": 0.4} | targets, no_weights)
    parts = {name: context.keep(name, partial(compare, weights, context.quick)) for name, compare in _FORMS.items()}
    unit = "environment steps per CPU-second"
    figures = rate_figures("environment.original", parts["original"], unit, "one user at a time", 130.0)
    figures |= rate_figures("environment.floor", parts["floor"], unit, "its matrix products alone", 0.4)
    peer = _stable_baselines3()
    if peer is None:
        return figures | _skipped(targets, NO_PEER)
    rates = context.keep("ppo", partial(_ppo, peer, weights, context.quick))
    figures |= rate_figures("ppo", rates, unit, "Stable-Baselines3", targets["ppo"])
    for name in _AGENTS:
        rates = context.keep(f"updates-{name}", partial(_updates, peer, name, weights, context.quick))
        figures |= rate_figures(f"updates.{name}", rates, "updates per CPU-second", "Stable-Baselines3", 1.1)
    return figures


def _skipped(targets: dict[str, float], reason: str) -> dict[str, Figure]:
    return {
        f"{name}.ratio": Figure(value=np.nan, unit="times", target=f"at least {target:g}", skipped=reason)
        for name, target in targets.items()
    }


def _stable_baselines3() -> Any:
    """The peer; None where the extra `peers` is not installed."""
    try:
        import stable_baselines3
    except ImportError:
        return None
    return stable_baselines3


# --- environment


class OneUser:
    """The simulator as the original steps it: one user, a call of each network, a draw of each head, numpy arrays.

    So is what it computes and throws away: graphs for gradients, the entropies of a user's groups, copies.
    """

    def __init__(self, weights: Path) -> None:
        self._generator, self._leave, self._response = (
            _network(weights / name) for name in ("generator_model.pt", "leave_model.pt", "action_model.pt")
        )
        self._open()

    def step(self, action: Float[np.ndarray, " 27"]) -> tuple[Float[np.ndarray, " 91"], int, bool]:
        """Show a page; observation, reward, and whether the user left. The next one follows at once."""
        user, page = torch.FloatTensor(self._user)[None], torch.FloatTensor([[self._page]])
        logits = self._response(torch.cat([user, page, torch.FloatTensor(action)[None]], dim=1))
        heads = logits[:, :CLICK_COUNTS], logits[:, CLICK_COUNTS:]
        drawn = torch.cat([torch.multinomial(head.softmax(1), 1) for head in heads], dim=1).detach().numpy()[0]
        self._page += 1
        self._seen, left = deepcopy(drawn), self._page >= self._n_pages
        if left:
            self._open()
        return np.concatenate([self._user, drawn, [self._page]], axis=-1), int(drawn[0]), left

    def _open(self) -> None:
        logits = self._generator(torch.rand(1, SEED_SIZE)).split(GROUPS, dim=1)
        shares, entropy = torch.empty(0), torch.zeros(())
        for group in logits:
            shares = torch.cat([shares, group.softmax(1)], dim=-1)
            entropy = entropy - (group.log_softmax(1) * group.softmax(1)).sum(1).mean()
        user = torch.empty(0)
        for share in shares.split(GROUPS, dim=1):
            one_hot = torch.zeros_like(share).scatter_(1, torch.multinomial(share, 1), 1.0)
            user = torch.cat([user, one_hot], dim=-1)
        self._n_pages = int(torch.multinomial(self._leave(user).softmax(1), 1))
        self._user, self._page = user.squeeze().detach().numpy(), 0


def _network(file: Path) -> nn.Sequential:
    modules: list[nn.Module] = []
    for weight, bias in read_layers(file):
        linear = nn.Linear(weight.shape[1], weight.shape[0])
        linear.load_state_dict({"weight": weight, "bias": bias})
        modules += [linear, nn.LeakyReLU()]
    return nn.Sequential(*modules[:-1])


def _uniform_actions(n_users: int) -> Float[Tensor, "B 27"]:
    observations = torch.empty(n_users, 0)
    return UniformActions(ACTION_SIZE).act(observations, torch.Generator().manual_seed(1)).actions


def _our_steps(weights: Path, n_steps: int) -> Callable[[], int]:
    sessions = RunningSessions(VirtualTaobao(weights), N_USERS, torch.Generator().manual_seed(0))
    actions = _uniform_actions(N_USERS)

    def steps() -> int:
        for _ in range(n_steps):
            sessions.step(actions)
        return n_steps * N_USERS

    steps()
    return steps


def _beside_the_original(weights: Path, quick: bool) -> dict[str, float]:
    actions = _uniform_actions(N_USERS).numpy()
    # The original draws of the generator that all share; here it is put back.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        user = OneUser(weights)

        def steps() -> int:
            for action in actions:
                user.step(action)
            return len(actions)

        steps()
        return in_turns(_our_steps(weights, 50), steps, repeats=5 if quick else 15)


def _beside_the_floor(weights: Path, quick: bool) -> dict[str, float]:
    sizes = [len(network[0]) for network in read_layers(weights / "action_model.pt")]
    inputs = torch.rand(N_USERS, read_layers(weights / "action_model.pt")[0][0].shape[1])
    matrices = [torch.rand(inward, outward) for inward, outward in zip([inputs.shape[1], *sizes], sizes, strict=False)]

    def products() -> int:
        for _ in range(100):
            values = inputs
            for matrix in matrices:
                values = values @ matrix
        return 100 * N_USERS

    products()
    return in_turns(_our_steps(weights, 50), products, repeats=5 if quick else 15)


_FORMS = {"original": _beside_the_original, "floor": _beside_the_floor}


# --- agents


def _ppo(peer: Any, weights: Path, quick: bool) -> dict[str, float]:
    environment = VirtualTaobao(weights)
    config = PpoConfig(steps=32_768 if quick else 131_072)
    n_theirs = 4_096 if quick else 8_192

    def ours() -> int:
        train_ppo(environment, config, seed=0)
        return config.steps

    from stable_baselines3.common.vec_env import DummyVecEnv

    copies = DummyVecEnv([partial(GymnasiumEnvironment, environment)] * N_COPIES)
    agent = peer.PPO("MlpPolicy", copies, n_steps=n_theirs // 2 // N_COPIES, seed=0, device="cpu")

    def theirs() -> int:
        agent.learn(n_theirs, reset_num_timesteps=False)
        return n_theirs

    return in_turns(ours, theirs, repeats=2 if quick else 5)


_AGENTS: dict[str, Callable[[VirtualTaobao], Learner]] = {
    "ddpg": lambda environment: Ddpg(
        environment.observation_scale, ACTION_SIZE, DdpgConfig(hidden=HIDDEN, batch=BATCH, layer_norm=False), seed=0
    ),
    "td3": lambda environment: Td3(
        environment.observation_scale, ACTION_SIZE, Td3Config(hidden=HIDDEN, batch=BATCH), seed=0
    ),
    "sac": lambda environment: Sac(
        environment.observation_scale, ACTION_SIZE, SacConfig(hidden=HIDDEN, batch=BATCH), seed=0
    ),
}


def _updates(peer: Any, name: str, weights: Path, quick: bool) -> dict[str, float]:
    environment, n_updates, n_remembered = VirtualTaobao(weights), 100 if quick else 200, 1_000
    learner = _AGENTS[name](environment)
    replay = Replay(10 * N_USERS, environment.observation_size, ACTION_SIZE)
    sessions = RunningSessions(environment, N_USERS, learner.chance)
    for _ in range(10):
        replay.add(sessions.step(_uniform_actions(N_USERS)))

    def ours() -> int:
        for _ in range(n_updates):
            learner.update(replay.sample(BATCH, learner.chance))
        return n_updates

    agent = getattr(peer, name.upper())(
        "MlpPolicy",
        GymnasiumEnvironment(environment),
        policy_kwargs={"net_arch": [HIDDEN, HIDDEN]},
        batch_size=BATCH,
        buffer_size=n_remembered,
        # Steps are only remembered: what is timed are updates alone.
        learning_starts=n_remembered,
        seed=0,
        device="cpu",
    )
    agent.learn(n_remembered)

    def theirs() -> int:
        agent.train(gradient_steps=n_updates, batch_size=BATCH)
        return n_updates

    return in_turns(ours, theirs, repeats=3 if quick else 7)
