"""A network that says the same of every observation: the constant action that others are compared with.

Shape letters: B observations, S numbers of an observation, A of an action.
"""

from jaxtyping import Float
from torch import Tensor, nn


class ConstantAction(nn.Module):
    """The network of a policy with one action for everybody.

    Args:
        outputs: what it says, before tanh.
    """

    def __init__(self, outputs: Float[Tensor, " A"]) -> None:
        super().__init__()
        self.outputs = nn.Parameter(outputs)

    def forward(self, observations: Float[Tensor, "B S"]) -> Float[Tensor, "B A"]:
        """The outputs, once for each observation."""
        return self.outputs.expand(len(observations), -1)
