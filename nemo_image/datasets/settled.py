"""What an operator settles by trying (the number type of its embeddings) stays as an earlier run settled it.

A probe measures time, so it may decide otherwise another day. A run that is taken up again must go on as it began.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nemo_image.datasets.columns import column_functions
from nemo_image.datasets.state import DatasetState
from nemo_image.shards import files, parquet

LOOKED_AT = 32
"""Shards that are looked at for an earlier run's results."""

Fingerprints = Mapping[str, Mapping[str, Any]]


def settled_as_before(state: DatasetState, root: str) -> DatasetState:
    """Return the state with its pending operators as those that made what lies in `root`, if only a probe differs."""
    made_by = _made_by(state, root) if state.lineage.pending else {}
    renamed: list[tuple[Any, Any]] = []
    again = {}
    for function in column_functions(state.frame):
        settled = function.settled_as(made_by)
        if settled is not None:
            again[id(function)] = settled
            renamed += [(old, settled.fingerprints[name]) for name, old in function.fingerprints.items()]
    if not renamed:
        return state
    from dask._collections import new_collection

    expression = state.frame.expr
    for function in column_functions(state.frame):
        changed = again.get(id(function), function)
        changed = changed.with_fingerprints(_renamed(changed.fingerprints, renamed))
        expression = expression.substitute(function, changed)
    lineage = replace(state.lineage, provenance=_renamed(state.lineage.provenance, renamed))
    return replace(state, frame=new_collection(expression), lineage=lineage)


def _made_by(state: DatasetState, root: str) -> Fingerprints:
    for shard in state.shards[:LOOKED_AT]:
        summary = parquet.summary_or_none(files.join(root, shard + ".parquet"), state.source.storage_options)
        if summary is not None and summary.footer is not None and summary.footer.columns:
            return summary.footer.columns
    return {}


def _renamed(value: Any, renamed: list[tuple[Any, Any]]) -> Any:
    """Return a fingerprint with others in it (its parents') replaced."""
    for old, new in renamed:
        if value == old:
            return new
    return {name: _renamed(one, renamed) for name, one in value.items()} if isinstance(value, Mapping) else value
