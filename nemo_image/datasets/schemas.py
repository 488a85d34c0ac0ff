"""One schema for shards whose columns differ: join what all footers say, and widen the lazy frame.

Opening reads one schema. Before all shards are read anyway, the others' schemas are read too, so that a column that is
null, absent or narrower in the first shard loses nothing, and what differs is said.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
from dask.typing import no_default

from nemo_image import schema
from nemo_image.datasets.columns import ColumnFunction
from nemo_image.datasets.footers import ColumnKinds, big_integers, column_kinds
from nemo_image.datasets.load import ShardLoader
from nemo_image.datasets.opening import join_types
from nemo_image.datasets.source import DatasetSource
from nemo_image.datasets.state import DatasetState

SHARDS_NAMED = 3


def unify_schemas(
    state: DatasetState, shards: Sequence[str] | None = None, read_tars: bool = False
) -> tuple[DatasetState, list[str]]:
    """Give a dataset the types and columns that hold every shard's values.

    Nulls join anything, integers join floats, narrow types join wide ones. What has no common type stays at the
    dataset's, and so do integers beyond 2^53 that meet floats, which cannot hold them: a shard whose values do not fit
    then fails on its own, with its cause. Unreadable footers are passed over here; they fail their own shard too. An
    id never becomes a float, because floats name no row beyond 2^53: whole ones are read as integers.

    A column that the first shard lacks comes into the frame as if it had been there at opening: through filters,
    assignments and joins, not through a selection of other columns. Where the frame has a column of that name of its
    own, or a step whose columns are fixed (``map_partitions`` with a frame as ``meta``), it stays out, and the notes
    say so.

    Parameters
    ----------
    state : DatasetState
    shards : sequence of str, optional
        The shards to look at; all by default. Shares of one run must look at all of them, to agree.
    read_tars : bool, default False
        Whether to read the tars of shards whose metadata is built from them: each sample's JSON, where a footer would
        be read else.

    Returns
    -------
    state : DatasetState
        The same object if there is nothing to widen; else one with the wider types, whose frame is the user's own steps
        over them, touched or untouched as before.
    notes : list of str
        A line for each column that differs between shards.
    """
    source = state.source
    if not any(_is_loader(part, source) for part in state.frame.expr.walk()):
        # The rows are the user's own, or in memory already: the files' types say nothing of them.
        return state, []
    joined = _Joined(state)
    looked_at = list(state.shards if shards is None else shards)
    own = [one.name for one in source.schema if not any(one.name in some for some in source.sidecars.values())]
    joined.join(None, own, column_kinds(source, source.metadata_root, looked_at, read_tars and source.built_from_tars))
    for folder, names in source.sidecars.items():
        joined.join(folder, names, column_kinds(source, folder, looked_at))
    return _widened(state, joined), joined.notes


def with_source(frame: Any, old: DatasetSource, new: DatasetSource) -> Any:
    """Return a Dask frame with `new` in place of `old`: in our loader, and wherever an operator holds it."""
    from dask._collections import new_collection

    return new_collection(_Rebuild(old, new)(frame.expr))


# Types ----------------------------------------------------------------------------------------------------------------


@dataclass
class _Joined:
    """The dataset's types so far, the new columns with what made them, and what is to be said."""

    state: DatasetState
    notes: list[str] = field(default_factory=list)
    kinds: dict[str, pa.DataType] = field(init=False)
    new: dict[str, Mapping[str, Any] | None] = field(default_factory=dict)
    sidecars: dict[str, tuple[str, ...]] = field(init=False)

    def __post_init__(self) -> None:
        self.kinds = {one.name: one.type for one in self.state.source.schema}
        self.sidecars = {folder: tuple(names) for folder, names in self.state.source.sidecars.items()}

    def source(self, with_new: bool) -> DatasetSource:
        """Return the dataset's source with the joined types, and with the new columns if wanted."""
        names = [name for name in self.kinds if with_new or name not in self.new]
        beside = {folder: tuple(name for name in some if name in names) for folder, some in self.sidecars.items()}
        fields = pa.schema([(name, self.kinds[name]) for name in names])
        return replace(self.state.source, schema=fields, sidecars=beside)

    def join(self, folder: str | None, names: Sequence[str], found: Mapping[str, ColumnKinds]) -> None:
        """Join what the files of a folder (None for the dataset's own) say; `names` are its columns so far."""
        source = self.state.source
        passed_over = {schema.SHARD, *self.state.lineage.pending}
        if folder is not None:
            passed_over |= {source.id_col, schema.IMAGE_ERROR} - set(names)
        columns = {name: one for name, one in found.items() if name not in passed_over}
        big = self._big_integers(folder or source.metadata_root, columns.values())
        for name, column in columns.items():
            where = f" of sidecar {folder}" if folder is not None else ""
            if name not in names and (name in self.kinds or name in self.state.frame.columns):
                there = " and ".join(f"{kind} in {_some(some)}" for kind, some in column.kinds.items())
                self.notes.append(f"column {name!r}{where}: {there}, not read: the frame has another of that name")
                continue
            kind = _joined_type(column, self.kinds.get(name), name == source.id_col, name in big)
            if name not in names:
                self.new[name] = column.made_by[0] if all(one == column.made_by[0] for one in column.made_by) else None
                if folder is not None:
                    self.sidecars[folder] = (*self.sidecars[folder], name)
            self.kinds[name] = kind
            self._say(column, where, kind, big.get(name))

    def _big_integers(self, root: str, columns: Iterable[ColumnKinds]) -> dict[str, str]:
        """Find the columns whose integers must not become floats, each with a shard that shows it."""
        asked = {}
        for column in columns:
            types = [*column.kinds, self.kinds.get(column.name, pa.null())]
            if any(map(pa.types.is_floating, types)) and column.name != self.state.source.id_col:
                asked[column.name] = [shard for kind in filter(_is_wide, column.kinds) for shard in column.kinds[kind]]
        return big_integers(self.state.source, root, {name: shards for name, shards in asked.items() if shards})

    def _say(self, column: ColumnKinds, where: str, kind: pa.DataType, big_in: str | None) -> None:
        odd = {one: shards for one, shards in column.kinds.items() if one != kind}
        parts = [f"{one} in {_some(shards)}" for one, shards in odd.items()]
        if column.absent:
            parts.append(f"absent from {_some(column.absent)}")
        if not parts:
            return
        line = f"column {column.name!r}{where}: {', '.join(parts)}, {kind} in the dataset"
        if big_in is not None or any(join_types(kind, one) != kind for one in odd):
            why = "they have no common type"
            if column.name == self.state.source.id_col:
                why = "ids stay as they are"
            elif big_in is not None:
                why = f"shard {big_in} holds integers that no double equals"
            line += f" ({why}: a shard with values that do not fit fails)"
        self.notes.append(line)


def _joined_type(column: ColumnKinds, current: pa.DataType | None, is_id: bool, is_big: bool) -> pa.DataType:
    types = [pa.null() if current is None else current, *column.kinds]
    if is_id and any(map(pa.types.is_integer, types)):
        types = [kind for kind in types if not pa.types.is_floating(kind)]
    joined = types[0]
    for kind in types[1:]:
        wider = join_types(joined, kind)
        rounds = is_big and wider is not None and pa.types.is_floating(wider) and _is_wide(joined) != _is_wide(kind)
        joined = joined if wider is None or rounds else wider
    return joined


def _is_wide(kind: pa.DataType) -> bool:
    return bool(pa.types.is_int64(kind) or pa.types.is_uint64(kind))


def _some(shards: Sequence[str]) -> str:
    names = ", ".join(shards[:SHARDS_NAMED]) + (", …" if len(shards) > SHARDS_NAMED else "")
    return f"{len(shards)} shard{'s' if len(shards) > 1 else ''} ({names})"


# The frame ------------------------------------------------------------------------------------------------------------


def _widened(state: DatasetState, joined: _Joined) -> DatasetState:
    source = joined.source(with_new=True)
    if source == state.source:
        return state
    widened = _over(state, source, joined.new)
    if widened is None and joined.new:
        names = ", ".join(map(repr, joined.new))
        joined.notes.append(
            f"left out of the frame, which has steps of fixed columns (such as map_partitions with meta=): {names}; "
            "unify the schemas right after opening, then repeat the steps"
        )
        source = joined.source(with_new=False)
        if source == state.source:
            return state
        widened = _over(state, source, {})
    if widened is None:
        joined.notes.append("the frame has steps that do not work on the wider types: it stays as it was")
        return state
    return widened


def _over(
    state: DatasetState, source: DatasetSource, new: Mapping[str, Mapping[str, Any] | None]
) -> DatasetState | None:
    """Return the state with its frame's steps over another source; None where they do not work on it."""
    from dask._collections import new_collection

    rebuild = _Rebuild(state.source, source)
    try:
        expression = rebuild(state.frame.expr)
        columns = list(expression.columns)
    except Exception:
        # Dask tries the user's functions on empty frames, and theirs may raise anything.
        return None
    if rebuild.has_fixed or [name for name in columns if name not in new] != list(state.frame.columns):
        return None
    made_by = {name: made for name, made in new.items() if made is not None and name in columns}
    lineage = replace(
        state.lineage,
        known=rebuild.name_of(state.lineage.known),
        provenance={**state.lineage.provenance, **made_by},
    )
    return replace(state, source=source, frame=new_collection(expression), lineage=lineage)


class _Rebuild:
    """Rebuilds a Dask expression over another source; `has_fixed` tells of steps that cannot pass new columns on."""

    def __init__(self, old: DatasetSource, new: DatasetSource) -> None:
        self.old = old
        self.new = new
        self.has_fixed = False
        self._made: dict[str, Any] = {}

    def name_of(self, name: str) -> str:
        """Return Dask's name of what the expression called `name` has become; itself if it was not met."""
        made = self._made.get(name)
        return name if made is None else str(made._name)

    def __call__(self, expression: Any) -> Any:
        """Return the expression over the new source."""
        if expression._name not in self._made:
            self._made[expression._name] = self._rebuilt(expression)
        return self._made[expression._name]

    def _rebuilt(self, expression: Any) -> Any:
        from dask._expr import Expr

        if _is_loader(expression, self.old):
            loader = ShardLoader(self.new)
            return expression.substitute_parameters({"func": loader, "user_meta": loader.meta()})
        operands = [self(one) if isinstance(one, Expr) else self._operand(one) for one in expression.operands]
        if all(new is old for new, old in zip(operands, expression.operands, strict=True)):
            return expression
        made = type(expression)(*operands)
        self.has_fixed |= _has_fixed_columns(expression, made)
        return made

    def _operand(self, value: Any) -> Any:
        """Return an operator with the new source, where it holds the old one."""
        if not callable(value) or getattr(value, "source", None) != self.old:
            return value
        changed = copy.copy(value)
        changed.source = self.new
        if isinstance(value, ColumnFunction):
            changed.function = self._operand(value.function)
        return changed


def _is_loader(expression: Any, source: DatasetSource) -> bool:
    function = expression.operand("func") if "func" in expression._parameters else None
    return isinstance(function, ShardLoader) and function.source == source


def _has_fixed_columns(before: Any, after: Any) -> bool:
    """Tell whether a step was given its result's columns by the user, and now gets others to work on."""
    from dask.dataframe.dask_expr._expr import MapPartitions

    if not isinstance(after, MapPartitions) or after.operand("meta") is no_default or after.ndim < 2:
        return False
    return list(after.frame.columns) != list(before.frame.columns)
