"""What a save writes: planned on the client, carried by each shard's task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa


@dataclass(frozen=True)
class SavedColumns:
    """What a save writes.

    Attributes
    ----------
    fields : list of pyarrow.Field
        The frame's columns to write, without ``shard`` and the id.
    fingerprints : dict of str to dict
        What made those that nemo_image added.
    computed : list of str
        Those that this save computes.
    in_place : bool
        Whether the shard's own file is enriched.
    plan : str or None
        Token of the user's frame; None where it is as loaded.
    reads_images : bool
        Whether the tars are read.
    """

    fields: Sequence[pa.Field]
    id_field: pa.Field
    fingerprints: Mapping[str, Mapping[str, Any]]
    computed: Sequence[str]
    in_place: bool
    plan: str | None
    reads_images: bool
