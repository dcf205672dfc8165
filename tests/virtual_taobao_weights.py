"""Weights of Virtual Taobao for tests: the published ones where they are, and random ones of the same sizes."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

PUBLISHED = Path(__file__).parents[1] / "../shared/data/virtual_taobao"
SIZES = {
    "generator_model.pt": (128, 128, 88),
    "leave_model.pt": (88, 128, 256, 101),
    "action_model.pt": (116, 128, 256, 21),
}


def published_weights() -> Path:
    if not PUBLISHED.is_dir():
        pytest.skip("the weights are not on this machine: ../shared/data/virtual_taobao is missing")
    return PUBLISHED


def write_random_weights(folder: Path) -> Path:
    """Networks whose soft-maxes are far from uniform, and whose users stay for some pages."""
    generator = torch.Generator().manual_seed(0)
    folder.mkdir(exist_ok=True)
    for name, sizes in SIZES.items():
        tensors = {}
        for layer, (inward, outward) in enumerate(pairwise(sizes)):
            tensors[f"{2 * layer}.weight"] = 2.0 * torch.randn(outward, inward, generator=generator) / inward**0.5
            tensors[f"{2 * layer}.bias"] = 0.1 * torch.randn(outward, generator=generator)
        if name == "leave_model.pt":
            tensors["4.bias"] -= 0.5 * torch.arange(101)
        torch.save(tensors, folder / name)
    return folder


class Reference:
    """The published networks in float64, from their files alone."""

    def __init__(self, folder: Path) -> None:
        self.networks = {
            name: {key: tensor.double().numpy() for key, tensor in torch.load(folder / name, weights_only=True).items()}
            for name in SIZES
        }

    def logits(self, name: str, values: np.ndarray) -> np.ndarray:
        tensors = self.networks[name]
        n_layers = len(tensors) // 2
        for layer in range(n_layers):
            values = values @ tensors[f"{2 * layer}.weight"].T + tensors[f"{2 * layer}.bias"]
            if layer < n_layers - 1:
                values = np.where(values > 0, values, 0.01 * values)
        return values

    def page(self, users: np.ndarray, pages: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Probabilities of 0 to 10 clicks and of the page actions 0 to 9."""
        inputs = np.concatenate([users, pages[:, None], np.clip(actions, -1, 1)], axis=1)
        logits = self.logits("action_model.pt", inputs)
        return softmax(logits[:, :11]), softmax(logits[:, 11:])

    def pages(self, users: np.ndarray) -> np.ndarray:
        """Probabilities of the numbers 0 to 100, of which a session's pages are drawn."""
        return softmax(self.logits("leave_model.pt", users))

    def user_groups(self, seeds: np.ndarray) -> np.ndarray:
        """Probabilities of each of the 88 numbers of a user to be 1."""
        groups = np.split(self.logits("generator_model.pt", seeds), np.cumsum(GROUPS)[:-1], axis=1)
        return np.concatenate([softmax(group) for group in groups], axis=1)


GROUPS = (8, 8, 11, 11, 11, 11, 2, 2, 3, 18, 3)


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)
