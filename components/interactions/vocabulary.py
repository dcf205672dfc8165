"""Item ids and features as tensors: dense indices, an unknown bucket, and content features for cold items.

Index 0 is padding, 1 is any item that the vocabulary does not know, items follow from 2 on.
"""

from typing import Self

import numpy as np
import polars as pl
import torch
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from components.interactions.contract import Feature
from components.interactions.log_folder import Log

PADDING = 0
UNKNOWN = 1
FIRST_ITEM = 2
#: Rarer values of a categorical feature share the unknown value (all zeros in the one-hot code).
MAX_CATEGORIES = 256


class FeatureCode(BaseModel):
    """How one named feature becomes numbers: standardised, or one-hot over its values."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    feature: Feature
    mean: float = 0.0
    scale: float = Field(default=1.0, gt=0)

    @property
    def width(self) -> int:
        """Columns of the code."""
        return 1 if self.feature.kind == "numeric" else len(self.feature.values)

    @classmethod
    def fit(cls, feature: Feature, values: pl.Series) -> Self:
        """The code of a feature, from the values that it takes in training."""
        if feature.kind == "numeric":
            finite = values.cast(pl.Float64).drop_nulls().drop_nans()
            spread = finite.std() if finite.len() > 1 else None
            mean = float(np.asarray(finite.mean() or 0.0))
            return cls(feature=feature, mean=mean, scale=float(np.asarray(spread)) if spread else 1.0)
        if not 0 < len(feature.values) <= MAX_CATEGORIES:
            counts = values.alias("value").drop_nulls().value_counts(name="n")
            frequent = counts.sort("n", "value", descending=[True, False]).head(MAX_CATEGORIES)
            feature = feature.model_copy(update={"values": tuple(sorted(frequent["value"]))})
        return cls(feature=feature)

    def encode(self, values: pl.Series) -> Float[np.ndarray, "M width"]:
        """Numbers of M values; unknown categories and missing numbers become zeros."""
        if self.feature.kind == "numeric":
            standardised = (values.cast(pl.Float64) - self.mean) / self.scale
            return standardised.fill_null(0.0).fill_nan(0.0).to_numpy()[:, None].astype(np.float32)
        codes = codes_of(values, self.feature.values)
        one_hot = np.zeros((len(values), self.width), dtype=np.float32)
        known = codes >= 0
        one_hot[np.flatnonzero(known), codes[known]] = 1.0
        return one_hot


def codes_of(values: pl.Series, names: tuple[str, ...]) -> Int[np.ndarray, " M"]:
    """Position of each value among `names`; -1 for values that are not there and for nulls."""
    if not names:
        return np.full(len(values), -1, dtype=np.int64)
    codes = values.cast(pl.String).cast(pl.Enum(names), strict=False).to_physical()
    return codes.cast(pl.Int64).fill_null(-1).to_numpy()


class Vocabulary(BaseModel):
    """Everything that turns a log's names into numbers; saved with each policy, so that serving does the same."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    item_ids: tuple[str, ...] = Field(description="Ids of the items from index 2 on.")
    item_counts: tuple[int, ...] = Field(description="How often training showed or saw each item; 0 marks a cold item.")
    item_codes: tuple[FeatureCode, ...] = ()
    context_codes: tuple[FeatureCode, ...] = ()

    @classmethod
    def fit(cls, log: Log) -> Self:
        """The vocabulary of a training log: all items of its table, counted where they were shown or seen."""
        items = log.items().sort("item_id")
        rows = log.scan()
        seen = pl.concat(
            [
                rows.select(item_id=pl.col("slate").explode()),
                rows.select(item_id=pl.col("events").explode().struct.field("item_id")),
            ]
        )
        counts = seen.drop_nulls().group_by("item_id").len().collect()
        items = items.join(counts, on="item_id", how="left", maintain_order="left")
        context = log.manifest.context
        sample = rows.select("context").collect().unnest("context") if context else pl.DataFrame()
        return cls(
            item_ids=tuple(items["item_id"]),
            item_counts=tuple(items["len"].fill_null(0)),
            item_codes=tuple(FeatureCode.fit(feature, items[feature.name]) for feature in log.manifest.item_features),
            context_codes=tuple(FeatureCode.fit(feature, sample[feature.name]) for feature in context),
        )

    @property
    def size(self) -> int:
        """Number of indices V, padding and unknown included."""
        return len(self.item_ids) + FIRST_ITEM

    @property
    def context_width(self) -> int:
        """Columns of an encoded context."""
        return sum(code.width for code in self.context_codes)

    def indices(self, item_ids: pl.Series) -> Int[np.ndarray, " M"]:
        """Dense index of each id; unknown ids share one index."""
        codes = codes_of(item_ids, self.item_ids)
        return np.where(codes < 0, UNKNOWN, codes + FIRST_ITEM)

    def ids(self, indices: Int[Tensor, "..."]) -> list[str]:
        """Ids of dense indices that name known items."""
        return [self.item_ids[index - FIRST_ITEM] for index in indices.tolist()]

    def item_features(self, items: pl.DataFrame) -> Float[Tensor, "V F"]:
        """Encoded content features of every index; zeros for padding, unknown and items missing from the table."""
        table = pl.DataFrame({"item_id": self.item_ids}, schema={"item_id": pl.String}).join(
            items, on="item_id", how="left", maintain_order="left"
        )
        encoded = [code.encode(table[code.feature.name]) for code in self.item_codes]
        rows = np.concatenate(encoded, axis=1) if encoded else np.zeros((len(self.item_ids), 0), dtype=np.float32)
        return torch.from_numpy(np.concatenate([np.zeros((FIRST_ITEM, rows.shape[1]), dtype=np.float32), rows]))

    def counts(self) -> Float[Tensor, " V"]:
        """Training count of every index."""
        return torch.tensor([0.0] * FIRST_ITEM + [float(count) for count in self.item_counts])

    def encode_context(self, context: pl.DataFrame) -> Float[np.ndarray, "M C"]:
        """Encoded context of M requests, one column a feature; absent features become zeros."""
        encoded = [
            code.encode(context[code.feature.name])
            if code.feature.name in context.columns
            else np.zeros((context.height, code.width), dtype=np.float32)
            for code in self.context_codes
        ]
        return np.concatenate(encoded, axis=1) if encoded else np.zeros((context.height, 0), dtype=np.float32)
