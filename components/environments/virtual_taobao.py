"""Virtual Taobao (Shi et al., AAAI 2019): a simulator learned from a shop's logs, with its published weights.

A user is 88 numbers, one-hot in 11 groups; an action is 27 weights of a ranking, in [-1, 1]. Per page c = 0, 1, ...:

    user    z ~ U(0, 1)^128;  for each group g:  x_g ~ softmax(generator(z)_g)
    pages   n ~ softmax(leave(x));  the session has max(1, n) pages, whatever is done
    page    clicks ~ softmax(response(x, c, action)_{0..10}),   page action ~ softmax(response(x, c, action)_{11..20})

The reward is the clicks of the page, 0 to 10; an observation is [x, clicks, page action, c], of the last page. The
click-through rate (CTR) is clicks / pages / 10. Neither clicks nor pages depend on earlier actions: as published this
is a contextual bandit, and discounting does nothing.

With `repetition` the horizon depends on the actions instead (Gao et al., CIRS, ACM TOIS 2023): a session ends at an
action that is closer (Euclidean) than a threshold to one of the session's last actions, or after its longest length.

The published environment hands out the next user's observation as the terminal one, takes actions outside of the
box as they are, and seeds a global generator; here none of this is so.

Shape letters: B users, H hidden units, R recent actions.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float, Float64, Int
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import functional

from components.environments.continuous import Outcome
from components.errors import InputError
from components.interactions.tensor_record import TensorRecord

GROUPS = (8, 8, 11, 11, 11, 11, 2, 2, 3, 18, 3)
USER_SIZE, ACTION_SIZE = sum(GROUPS), 27
SEED_SIZE = 128
#: Click counts 0 to 10, and page actions 0 to 9.
CLICK_COUNTS, PAGE_ACTIONS = 11, 10
HEADS = (CLICK_COUNTS, PAGE_ACTIONS)
MAX_PAGES = 100
#: Logits of the response reach 10⁵, of which float32 holds hundredths: only where one outcome is as probable as this
#: in each head does that not show. Elsewhere, about one page in a hundred, they are computed in float64.
SURE = 1.0 - 1e-6
#: Items of a page, by which clicks are divided in a click-through rate.
ITEMS_OF_A_PAGE = 10
#: Files of the published weights, with the sizes of their layers.
_LAYERS = {
    "generator_model.pt": (SEED_SIZE, 128, USER_SIZE),
    "leave_model.pt": (USER_SIZE, 128, 256, MAX_PAGES + 1),
    "action_model.pt": (USER_SIZE + 1 + ACTION_SIZE, 128, 256, CLICK_COUNTS + PAGE_ACTIONS),
}

Layers = tuple[tuple[Tensor, Tensor], ...]
"""Weights (out, in) and biases of a network's layers; LeakyReLU between them."""


class Repetition(BaseModel):
    """Sessions that end when actions repeat too closely."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    recent: int = Field(default=4, ge=1, le=MAX_PAGES, description="Earlier actions to which a new one is compared.")
    threshold: float = Field(default=4.5, ge=0, description="Distance at which an action repeats an earlier one.")
    max_pages: int = Field(default=MAX_PAGES, ge=1, le=MAX_PAGES, description="Pages after which every session ends.")


@dataclass(frozen=True)
class VirtualTaobaoState(TensorRecord):
    """Sessions of B users."""

    observations: Float[Tensor, "B 91"]
    user_part: Float[Tensor, "B H"]
    """What the user adds to the first layer of the response: the same on all of a session's pages."""
    pages: Int[Tensor, " B"]
    """Pages of the whole session; the longest length where actions decide."""
    recent: Float[Tensor, "B R 27"]
    """Last actions, newest first; infinite where there was none, and R = 0 where they do not matter."""


@dataclass(frozen=True)
class Page:
    """Distributions of what users do on a page."""

    clicks: Float[Tensor, "B 11"]
    page_action: Float[Tensor, "B 10"]


class VirtualTaobao:
    """The simulator as an environment of continuous actions.

    Args:
        folder: with the published files `generator_model.pt`, `leave_model.pt` and `action_model.pt`.
        repetition: how sessions end by repeated actions; without it, as published, each user's pages are drawn.
        device: where users step; generators must be of the same.

    Raises:
        InputError: a file is missing, cannot be read, or holds another network.
    """

    observation_size = USER_SIZE + 3
    action_size = ACTION_SIZE

    def __init__(self, folder: Path, repetition: Repetition | None = None, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.repetition = repetition
        generator, self._leave, response = (read_layers(folder / name, self.device) for name in _LAYERS)
        self._generator = _evened(generator, GROUPS)
        response = _evened(response, HEADS)
        self._exact_response = tuple((weight.double(), bias.double()) for weight, bias in response)
        (first, self._first_bias), self._response = response[0], response[1:]
        # Transposed once, the user's part from that of page and action.
        self._of_user, self._of_page_and_action = (
            part.T.contiguous() for part in first.split((USER_SIZE, 1 + ACTION_SIZE), dim=1)
        )
        sizes = torch.tensor(GROUPS, device=self.device)
        self._group_starts = sizes.cumsum(0) - sizes
        largest = [1.0] * USER_SIZE + [CLICK_COUNTS - 1.0, PAGE_ACTIONS - 1.0, float(MAX_PAGES)]
        self.observation_scale: Float[Tensor, " 91"] = torch.tensor(largest, device=self.device)
        self.observation_bounds = (torch.zeros_like(self.observation_scale), self.observation_scale)

    def reset(self, n_users: int, generator: torch.Generator) -> VirtualTaobaoState:
        """New users on their first page."""
        return self.open(self.draw_users(n_users, generator), generator)

    def draw_users(self, n_users: int, generator: torch.Generator) -> Float[Tensor, "B 88"]:
        """Users of the simulator's population."""
        seeds = torch.rand(n_users, SEED_SIZE, generator=generator, device=self.device)
        groups = _forward(self._generator, seeds).view(n_users, len(GROUPS), max(GROUPS))
        chosen = _draw(groups.softmax(2), generator)
        return torch.zeros(n_users, USER_SIZE, device=self.device).scatter(1, chosen + self._group_starts, 1.0)

    def open(self, users: Float[Tensor, "B 88"], generator: torch.Generator) -> VirtualTaobaoState:
        """Given users on their first page; how many pages they look at is drawn."""
        n = len(users)
        if self.repetition is None:
            pages, n_recent = _draw(self.page_count_probabilities(users), generator).clamp(min=1), 0
        else:
            pages, n_recent = torch.full((n,), self.repetition.max_pages), self.repetition.recent
        return VirtualTaobaoState(
            observations=torch.cat([users, users.new_zeros(n, 3)], dim=1),
            user_part=torch.addmm(self._first_bias, users, self._of_user),
            pages=pages.to(self.device),
            recent=users.new_full((n, n_recent, ACTION_SIZE), torch.inf),
        )

    def page_count_probabilities(self, users: Float[Tensor, "B 88"]) -> Float[Tensor, "B 101"]:
        """P(n | user) of the number that is drawn; a session has at least one page."""
        return _forward(self._leave, users).softmax(1)

    def observe(self, state: VirtualTaobaoState) -> Float[Tensor, "B 91"]:
        """User, last clicks, last page action, index of the page."""
        return state.observations

    def page(self, state: VirtualTaobaoState, actions: Float[Tensor, "B 27"]) -> Page:
        """What users do on their next page, as probabilities; actions are clipped to [-1, 1]."""
        clicks, page_action = self._heads(state, actions.clamp(-1, 1)).unbind(1)
        return Page(clicks, page_action[:, :PAGE_ACTIONS])

    def expected_clicks(self, state: VirtualTaobaoState, actions: Float64[Tensor, "B 27"]) -> Float64[Tensor, " B"]:
        """E[clicks] of each user's next page, computed in float64; actions lie in the box."""
        inputs = torch.cat([state.observations[:, :USER_SIZE], state.observations[:, -1:], actions], dim=1)
        counts = torch.arange(CLICK_COUNTS, device=self.device, dtype=torch.float64)
        return counts @ _head_shares(self._exact_response, inputs)[0]

    def _heads(self, state: VirtualTaobaoState, shown: Float[Tensor, "B 27"]) -> Float[Tensor, "B 2 11"]:
        """Probabilities of clicks and of page actions, the latter with an eleventh that never happens."""
        page_and_action = torch.cat([state.observations[:, -1:], shown], dim=1)
        first = torch.addmm(state.user_part, page_and_action, self._of_page_and_action)
        heads = _head_shares(self._response, functional.leaky_relu(first, inplace=True))
        unsure = torch.nonzero(heads.amax(1).amin(0) < SURE)[:, 0]
        if len(unsure):
            inputs = torch.cat([state.observations[unsure, :USER_SIZE], page_and_action[unsure]], dim=1)
            exact = _head_shares(self._exact_response, inputs.double())
            heads = heads.index_copy(2, unsure, exact.float())
        return heads.permute(2, 0, 1).contiguous()

    def step(
        self, state: VirtualTaobaoState, actions: Float[Tensor, "B 27"], generator: torch.Generator
    ) -> tuple[Outcome, VirtualTaobaoState]:
        """Show a page to each user."""
        shown = actions.clamp(-1, 1)
        drawn = _draw(self._heads(state, shown), generator).float()
        index = state.observations[:, -1:] + 1
        ended = index[:, 0] >= state.pages
        recent = state.recent
        if self.repetition is not None:
            nearest = (shown[:, None] - recent).square().sum(2).amin(1).sqrt()
            ended = ended | (nearest <= self.repetition.threshold)
            recent = torch.cat([shown[:, None], recent[:, :-1]], dim=1)
        seen = torch.cat([state.observations[:, :USER_SIZE], drawn, index], dim=1)
        return Outcome(drawn[:, 0], ended), replace(state, observations=seen, recent=recent)


def read_layers(file: Path, device: torch.device | str = "cpu") -> Layers:
    """One of the published networks.

    Raises:
        InputError: the file is missing, cannot be read, or holds other tensors, sizes or numbers than a network's.
    """
    sizes = _LAYERS[file.name]
    names = [f"{2 * number}.{part}" for number in range(len(sizes) - 1) for part in ("weight", "bias")]
    try:
        tensors = torch.load(file, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise InputError(
            f"{file}: no such file; expected the published weights of Virtual Taobao: {', '.join(_LAYERS)}"
        ) from None
    except Exception as error:
        # Damaged bytes lead the reader anywhere: index, struct, Unicode and assertion errors were all seen.
        raise InputError(f"{file}: cannot be read as weights: {f'{error!r}'.splitlines()[0]:.200}") from None
    if not isinstance(tensors, dict) or {*tensors} != {*names} or not all(map(torch.is_tensor, tensors.values())):
        seen = [*map(str, tensors)] if isinstance(tensors, dict) else type(tensors).__name__
        raise InputError(f"{file}: holds {seen!s:.200}; expected the tensors {names}")
    layers = tuple(
        (tensors[weight].float(), tensors[bias].float()) for weight, bias in zip(names[::2], names[1::2], strict=True)
    )
    for number, (weight, bias) in enumerate(layers):
        inward, outward = sizes[number], sizes[number + 1]
        if weight.shape != (outward, inward) or bias.shape != (outward,):
            raise InputError(
                f"{file}: layer {number} has weights {tuple(weight.shape)} and biases {tuple(bias.shape)}; "
                f"expected {(outward, inward)} and {(outward,)}"
            )
        if not (weight.isfinite().all() and bias.isfinite().all()):
            raise InputError(f"{file}: layer {number} holds NaN or infinity; expected finite weights and biases")
    return layers


def _evened(layers: Layers, sizes: tuple[int, ...]) -> Layers:
    """A network whose last layer names options of several soft-maxes, each filled up to the largest one's size.

    What is filled in has the logit -inf: it is never drawn, and one tensor (B, soft-maxes, options) holds them all.
    """
    *hidden, (weight, bias) = layers
    width = max(sizes)
    rows = [functional.pad(part, (0, 0, 0, width - len(part))) for part in weight.split(sizes)]
    shifts = [functional.pad(part, (0, width - len(part)), value=-torch.inf) for part in bias.split(sizes)]
    return *hidden, (torch.cat(rows), torch.cat(shifts))


def _hidden(layers: Layers, values: Float[Tensor, "B I"]) -> Float[Tensor, "B H"]:
    for weight, bias in layers[:-1]:
        values = functional.leaky_relu(functional.linear(values, weight, bias), inplace=True)
    return values


def _forward(layers: Layers, values: Float[Tensor, "B I"]) -> Float[Tensor, "B O"]:
    return functional.linear(_hidden(layers, values), *layers[-1])


def _head_shares(layers: Layers, values: Float[Tensor, "B I"]) -> Float[Tensor, "2 11 B"]:
    """The response's two soft-maxes: with the users last, so few outputs and options cost least.

    One soft-max each: a maximum that both shared would make the other's probabilities vanish.
    """
    weight, bias = layers[-1]
    logits = torch.addmm(bias[:, None], weight, _hidden(layers, values).T)
    return logits.view(len(HEADS), max(HEADS), len(values)).softmax(1)


def _draw(probabilities: Float[Tensor, "*B N"], generator: torch.Generator) -> Int[Tensor, "*B"]:
    """One index of each row, by the inverse of its distribution function, which takes the probabilities' place."""
    upto = probabilities.cumsum_(-1)
    point = torch.rand((*upto.shape[:-1], 1), generator=generator, device=upto.device)
    # Of the sum as it is: less than that even after rounding, so that nothing beyond the last is drawn.
    return torch.searchsorted(upto, point * upto[..., -1:], right=True).squeeze(-1)
