"""Frozen dataclasses of tensors that share their first dimension."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorRecord:
    """Base of records whose every field is a tensor with one row a user, session or request (or None)."""

    def select(self, index: Tensor) -> Self:
        """The rows that an index or a mask names."""
        return type(self)(**{name: None if value is None else value[index] for name, value in self._tensors().items()})

    def to(self, device: torch.device | str) -> Self:
        """The record on another device."""
        return type(self)(
            **{name: None if value is None else value.to(device) for name, value in self._tensors().items()}
        )

    def reshape(self, *leading: int) -> Self:
        """The record with its first dimension cut into `leading` dimensions."""
        return type(self)(
            **{
                name: None if value is None else value.reshape(*leading, *value.shape[1:])
                for name, value in self._tensors().items()
            }
        )

    def flatten(self) -> Self:
        """The record with its first two dimensions joined: (B, T, ...) becomes (B·T, ...)."""
        return type(self)(
            **{name: None if value is None else value.flatten(0, 1) for name, value in self._tensors().items()}
        )

    @classmethod
    def cat(cls, records: Sequence[Self]) -> Self:
        """The rows of several records of equal widths, in order."""
        columns = [record._tensors() for record in records]
        return cls(
            **{
                name: None if first is None else torch.cat([column[name] for column in columns])  # type: ignore[misc]
                for name, first in columns[0].items()
            }
        )

    def _tensors(self) -> dict[str, Tensor | None]:
        return {field.name: getattr(self, field.name) for field in fields(self)}
