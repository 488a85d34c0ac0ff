"""The named points at which runs are killed.

In the tests, a chain of points is one output that is killed again and again before it may finish, on one core, so that
the shards come in their order. The evidence (``benchmarks/faults``) takes each point alone.
"""

from __future__ import annotations

from tests.faults.points import Fault

STAGES = ("opening", "opened", "half", "complete", "synced", "moved")
WITH_GROUPS = ("opening", "opened", "half", "group", "complete", "synced", "moved")

CHAINS: dict[str, list[Fault]] = {
    "enriching": [
        Fault("forward", nth=1),  # on the client, which asks the model for its size
        *(Fault(stage, "enrich manifest") for stage in STAGES),
        Fault("decode", nth=1),
        Fault("decode", nth=4),
        Fault("forward", nth=2),
        *(Fault(stage, "enriched") for stage in WITH_GROUPS[:4]),
        Fault("group", "enriched", 2),  # between two row groups
        *(Fault(stage, "enriched") for stage in WITH_GROUPS[4:]),
        Fault("half", "enriched", 2),
        Fault("forward", nth=2),
        Fault("moved", "enriched", 2),  # the last shard: the ledger is next
    ],
    "between enriching and exporting": [
        *(Fault(stage, "enrich ledger") for stage in STAGES),
        *(Fault(stage, "count ledger") for stage in STAGES),  # "opening" comes right after the counting
        *(Fault(stage, "export manifest") for stage in STAGES),
    ],
    "exporting": [
        *(Fault(stage, "tar") for stage in STAGES),
        *(Fault(stage, "idx") for stage in STAGES),
        *(Fault(stage, "parquet") for stage in WITH_GROUPS),
        Fault("half", "tar", 2),
        Fault("moved", "parquet", 2),  # the last shard: the ledger is next
    ],
    "the export's ledgers": [
        *(Fault(stage, "output ledger") for stage in STAGES),
        *(Fault(stage, "export ledger") for stage in STAGES),
    ],
}
"""For ``nemo-image curate`` of four shards into four."""

IN_PLACE: list[Fault] = [
    Fault("decode", nth=3),
    Fault("forward", nth=2),
    *(Fault(stage, "parquet") for stage in WITH_GROUPS[:4]),
    Fault("group", "parquet", 2),
    *(Fault(stage, "parquet") for stage in WITH_GROUPS[4:]),
    Fault("half", "parquet", 2),
    Fault("moved", "parquet", 2),
    *(Fault(stage, "ledger") for stage in STAGES),
]
"""For enriching the same four shards in place."""

ALONE: list[Fault] = [
    Fault("half", "enriched", 3),
    Fault("half", "tar", 2),
    Fault("moved", "parquet", 3),
]
"""Killed once, with as many threads as there are cores."""
