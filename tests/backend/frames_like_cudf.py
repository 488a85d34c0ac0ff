"""Stands for cuDF where there is none: frames of pandas that give their values away only where cuDF's do.

It shows where our code converts, and that it converts there: not that cuDF does what we think it does. The calls that
our code makes are compared with the real library's signatures by ``scripts/check_rapids.py``, and the tests marked
``gpu`` run on it.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

_MESSAGE = "implicit conversion to a host array: cuDF has none"


class Series(pd.Series):
    """A column."""

    @property
    def _constructor(self) -> Any:
        return Series

    @property
    def _constructor_expanddim(self) -> Any:
        return DataFrame

    def to_arrow(self) -> pa.Array:
        """Return the values."""
        made = pa.array(pd.Series(self), from_pandas=True)
        return made.combine_chunks() if isinstance(made, pa.ChunkedArray) else made

    def __arrow_array__(self, type: Any = None) -> pa.Array:
        """Refuse: what takes a column of pandas for its Arrow values must ask for them here."""
        raise TypeError(_MESSAGE)


class DataFrame(pd.DataFrame):
    """A frame."""

    @property
    def _constructor(self) -> Any:
        return DataFrame

    @property
    def _constructor_sliced(self) -> Any:
        return Series

    @classmethod
    def from_arrow(cls, table: pa.Table) -> DataFrame:
        """Return a frame; refuse types that cuDF has not."""
        for field in table.schema:
            assert not pa.types.is_dictionary(field.type) or pa.types.is_string(field.type.value_type), field
            assert "halffloat" not in str(field.type), field
        return cls({name: table[name].to_pandas(types_mapper=pd.ArrowDtype) for name in table.column_names})

    def to_arrow(self, preserve_index: bool | None = None) -> pa.Table:
        """Return a table."""
        assert preserve_index is False
        return pa.table({name: self[name].to_arrow() for name in self.columns})


for _kind, _module in ((Series, "series"), (DataFrame, "dataframe")):
    _kind.__module__ = f"cudf.core.{_module}"


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have ``import cudf`` find this, and datasets opened from now on hold their metadata in it."""
    module: Any = ModuleType("cudf")
    module.DataFrame, module.Series, module.from_pandas = DataFrame, Series, lambda index: index
    monkeypatch.setitem(sys.modules, "cudf", module)
    # Dask imports it to learn what a frame of cuDF is. These are frames of pandas to it.
    monkeypatch.setitem(sys.modules, "dask_cudf", ModuleType("dask_cudf"))
    monkeypatch.setattr(pd.Index, "to_pandas", lambda index: index, raising=False)
    monkeypatch.setattr("nemo_image.datasets.image_text_pair.new_frames", lambda: "cudf")
