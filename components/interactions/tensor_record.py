"""Frozen dataclasses of tensors that share their first dimension."""

from dataclasses import dataclass, fields
from typing import Self

from torch import Tensor


@dataclass(frozen=True)
class TensorRecord:
    """Base of records whose every field is a tensor with one row a user, session or request (or None)."""

    def select(self, index: Tensor | slice) -> Self:
        """The rows that an index or a mask names; those of a slice share its memory."""
        return type(self)(**{name: None if value is None else value[index] for name, value in self._tensors().items()})

    def replaced(self, index: Tensor, rows: Self) -> Self:
        """A copy in which the rows at an index are others."""
        return type(self)(
            **{
                name: None if value is None else value.index_copy(0, index, getattr(rows, name))
                for name, value in self._tensors().items()
            }
        )

    def _tensors(self) -> dict[str, Tensor | None]:
        return {field.name: getattr(self, field.name) for field in fields(self)}
