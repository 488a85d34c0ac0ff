"""Add columns to a dataset, lazily, computing only what was not computed before.

A value computed before is found by (shard, id) in the shard's Parquet file (or in an earlier output of the same
save), and taken if the file's fingerprints say that the same operator made it from the same tar.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from nemo_image import backend, schema
from nemo_image.datasets.load import rows_by_id
from nemo_image.datasets.source import DatasetSource
from nemo_image.shards import files, parquet

Function = Callable[[pd.DataFrame], pd.DataFrame]


class ColumnFunction:
    """Computes an operator's columns for the rows of a partition.

    Parameters
    ----------
    function : callable
        Takes a frame with the operator's inputs and returns one with its outputs, on the same index.
    source : DatasetSource
        Where earlier values lie.
    outputs : dict of str to dtype
        The columns that `function` makes. A row is computed once the first of them, or ``image_error``, is not null.
    fingerprints : dict of str to dict
        What makes each of them.
    joins_errors : bool
        Whether ``image_error`` of the incoming frame was made in this same computation, and so stays where it says
        something; else the operator's own replaces it.
    earlier : sequence of str, optional
        Folders of Parquet files from which values made before are taken; the dataset's own by default.
    retry_failed : bool
        Whether images that could not be decoded before are tried again.
    """

    def __init__(
        self,
        function: Function,
        source: DatasetSource,
        outputs: Mapping[str, Any],
        fingerprints: Mapping[str, Mapping[str, Any]],
        joins_errors: bool,
        earlier: Sequence[str] | None = None,
        retry_failed: bool = False,
    ) -> None:
        self.function = function
        self.source = source
        self.outputs = dict(outputs)
        self.fingerprints = dict(fingerprints)
        self.joins_errors = joins_errors
        self.earlier = (source.metadata_root,) if earlier is None else tuple(earlier)
        self.retry_failed = retry_failed

    @property
    def row_by_row(self) -> bool:
        """Whether `function` computes each row without looking at others, so that it may see them in pieces."""
        return bool(getattr(self.function, "row_by_row", False))

    def settled_as(self, made_by: Mapping[str, Mapping[str, Any]]) -> ColumnFunction | None:
        """Return the operator that made earlier results, if it differs in nothing but what a probe settles."""
        settle = getattr(self.function, "settled_as", None)
        before = made_by.get(next(iter(self.outputs)))
        function = settle(before) if settle is not None and before is not None else None
        if function is None:
            return None
        settled = before or {}
        changed = self.with_fingerprints(
            # Columns may say more of what made them than the first does; what it says, they all share.
            {name: {**made, **settled} for name, made in self.fingerprints.items()}
        )
        changed.function = function
        return changed

    def with_fingerprints(self, fingerprints: Mapping[str, Mapping[str, Any]]) -> ColumnFunction:
        """Return the same operator under other fingerprints."""
        changed = copy.copy(self)
        changed.fingerprints = dict(fingerprints)
        return changed

    def taking_from(self, earlier: Sequence[str], retry_failed: bool = False) -> ColumnFunction:
        """Return the same function with other folders to take earlier values from; none means to compute all."""
        return ColumnFunction(
            self.function,
            self.source,
            self.outputs,
            self.fingerprints,
            self.joins_errors,
            tuple(dict.fromkeys(earlier)),
            retry_failed,
        )

    def __call__(self, frame: Any) -> Any:
        """Return the operator's columns for a partition, aligned with its index, in its kind of frame."""
        return backend.like(self._of(backend.to_pandas(frame)), frame)

    def _of(self, frame: pd.DataFrame) -> pd.DataFrame:
        if not len(frame):
            return schema.empty_frame(self.outputs.items()).set_index(frame.index)
        # Labels repeat once partitions are joined: work by position.
        rows = frame.set_axis(pd.RangeIndex(len(frame)), axis=0)
        known = self._known_rows(rows)
        have = known.index.to_numpy() if known is not None else np.array([], np.int64)
        todo = np.setdiff1d(np.arange(len(rows)), have)
        parts = [] if known is None else [known]
        if len(todo):
            made = self.function(rows.iloc[todo].reset_index(drop=True))
            parts.append(made.set_axis(pd.Index(todo), axis=0))
        result = pd.concat([self._typed(part) for part in parts]) if len(parts) > 1 else self._typed(parts[0])
        result = result.sort_index().set_axis(frame.index, axis=0)
        return self._with_errors(frame, result)

    def _typed(self, part: pd.DataFrame) -> pd.DataFrame:
        return pd.DataFrame({name: part[name].astype(dtype) for name, dtype in self.outputs.items()}, index=part.index)

    def _with_errors(self, frame: pd.DataFrame, result: pd.DataFrame) -> pd.DataFrame:
        if self.joins_errors and schema.IMAGE_ERROR in self.outputs:
            before = frame[schema.IMAGE_ERROR]
            result[schema.IMAGE_ERROR] = before.where(before.notna(), result[schema.IMAGE_ERROR])
        return result

    def _known_rows(self, rows: pd.DataFrame) -> pd.DataFrame | None:
        """Return earlier values, labelled by position, for the rows that have them."""
        parts = []
        for shard, positions in rows_by_shard(rows).items():
            ids = rows[self.source.id_col].iloc[positions]
            for root in self.earlier:
                part = self._known_in(root, shard, ids)
                if part is not None:
                    parts.append(part)
                    break
        return pd.concat(parts) if parts else None

    def _known_in(self, root: str, shard: str, ids: pd.Series) -> pd.DataFrame | None:
        url = files.join(root, shard + ".parquet")
        if not reusable_columns(url, self.source, shard, self.fingerprints):
            return None
        names = list(dict.fromkeys([*self.outputs, schema.IMAGE_ERROR]))
        present = parquet.read_summary(url, self.source.storage_options).schema.names
        names = [name for name in names if name in present]
        found, table = rows_by_id(self.source, shard, url, backend.arrow_values(ids), names)
        part = pd.DataFrame({name: backend.series_of(table[name], ids.index[found]) for name in names})
        finished = part[next(iter(self.outputs))].notna()
        if schema.IMAGE_ERROR in part:
            finished |= part[schema.IMAGE_ERROR].notna() & ~self._to_retry(part[schema.IMAGE_ERROR])
        part = part.loc[finished.to_numpy(dtype=bool)]
        return part[list(self.outputs)] if len(part) else None

    def _to_retry(self, reasons: pd.Series) -> Any:
        return schema.is_bad_image(reasons) if self.retry_failed else pd.Series(False, reasons.index)

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        from dask.base import normalize_token

        names = [(name, str(dtype)) for name, dtype in self.outputs.items()]
        tokens = [normalize_token(self.function), repr(sorted(self.fingerprints.items()))]
        settings = (self.joins_errors, self.earlier, self.retry_failed)
        return ("ColumnFunction", self.source.__dask_tokenize__(), names, *tokens, *settings)


def reusable_columns(
    url: str, source: DatasetSource, shard: str, fingerprints: Mapping[str, Mapping[str, Any]]
) -> bool:
    """Tell whether a shard's file holds columns made by `fingerprints` from the tar as it is now."""
    summary = parquet.summary_or_none(url, source.storage_options)
    if summary is None or summary.footer is None:
        return False
    made_by = summary.footer.columns
    if any(made_by.get(name) != fingerprint for name, fingerprint in fingerprints.items()):
        return False
    return same_file(summary.footer.source, tar_identity(source, shard))


def same_file(recorded: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> bool:
    """Tell whether a file is the one recorded: of its size, and of its time and etag where both say one.

    An export records no time of the tars that it writes, so that equal inputs give equal bytes.
    """
    if recorded is None or now is None:
        return recorded is now
    both = [name for name in recorded if recorded[name] is not None and now.get(name) is not None]
    return "size" in both and all(recorded[name] == now[name] for name in both)


def tar_identity(source: DatasetSource, shard: str) -> dict[str, Any] | None:
    """Return size and time (or etag) of a shard's tar; None where it is missing."""
    try:
        return files.identify(source.tar_url(shard), source.storage_options).to_dict()
    except FileNotFoundError:
        return None


def metadata_identity(url: str, storage_options: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what tells a Parquet file from its later versions; None where it is missing.

    For our own files that is a hash of their data: a run that had to write one anew wrote the same one.
    """
    summary = parquet.summary_or_none(url, storage_options)
    if summary is not None and summary.footer is not None and summary.footer.digest is not None:
        return {"digest": summary.footer.digest}
    try:
        return files.identify(url, storage_options).to_dict()
    except FileNotFoundError:
        return None


def rows_by_shard(frame: pd.DataFrame) -> dict[str, np.ndarray[Any, np.dtype[np.int64]]]:
    """Return the positions of each shard's rows, in their order."""
    codes, names = pd.factorize(frame[schema.SHARD].astype(object))
    if (codes < 0).any():
        raise ValueError("a row says no shard: column 'shard' must not be null")
    if len(names) == 1:
        return {str(names[0]): np.arange(len(frame))}
    return {str(name): np.flatnonzero(codes == code) for code, name in enumerate(names)}


def required_inputs(source: DatasetSource, inputs: Sequence[str]) -> list[str]:
    """Return the columns that an operator's rows need: the row's identity and the operator's inputs."""
    return list(dict.fromkeys([schema.SHARD, source.id_col, *inputs]))


def column_functions(frame: Any) -> list[ColumnFunction]:
    """Return the operators in a Dask frame."""
    found = {
        id(operand): operand
        for part in frame.expr.walk()
        for operand in part.operands
        if isinstance(operand, ColumnFunction)
    }
    return list(found.values())


def with_earlier(frame: Any, earlier: Sequence[str], retry_failed: bool = False) -> Any:
    """Return a Dask frame whose operators take earlier values from the folders given."""
    from dask._collections import new_collection

    functions = column_functions(frame)
    expression = frame.expr
    for function in functions:
        expression = expression.substitute(function, function.taking_from(earlier, retry_failed))
    return new_collection(expression) if functions else frame
