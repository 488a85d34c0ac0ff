"""What a run remembers of the groups that it finished, for a rerun to take over.

.. code-block:: text

    <checkpoint_path>/plan.json             which pipeline, and what its stages found out by trying
    <checkpoint_path>/groups/<group>.json   a finished group: its files as they were, and its record

Workers write and read the groups' files themselves: the client need not know what is finished, however many there are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nemo_image.errors import DatasetError
from nemo_image.shards import files
from nemo_image.stages.base import ProcessingStage
from nemo_image.stages.record import GroupRecord
from nemo_image.stages.tasks import FileGroup

PLAN = "plan.json"
VERSION = 1


@dataclass(frozen=True)
class Checkpoint:
    """The notes of a run.

    Attributes
    ----------
    root : str
        The folder: a local path or any fsspec URL.
    storage_options : dict
        For fsspec.
    """

    root: str
    storage_options: Mapping[str, Any] = field(default_factory=dict)

    def settled(self) -> dict[str, dict[str, Any]]:
        """Return what the stages of the run that began it found out."""
        return dict((self._plan() or {}).get("settled", {}))

    def begin(self, token: str, settled: Mapping[str, Mapping[str, Any]]) -> None:
        """Make the folder that of a pipeline, or find it to be so.

        Raises
        ------
        DatasetError
            If it is another pipeline's.
        """
        plan = self._plan()
        if plan is None:
            self._write(PLAN, {"version": VERSION, "token": token, "settled": settled})
        elif plan.get("token") != token:
            raise DatasetError(
                f"checkpoint_path={self.root!r} is that of another pipeline (other stages, arguments or weights): give "
                "another folder, or remove it"
            )

    def finished(self, group: FileGroup, last: ProcessingStage[Any, Any]) -> GroupRecord | None:
        """Return the record of a group that was finished, if its files are what they were and its output is there."""
        noted = self._read(f"groups/{group.name}.json")
        if noted is None or noted.get("files") != _identities(group):
            return None
        record = GroupRecord.from_dict(noted["record"])
        if not last.outputs_intact(record.outputs):
            return None
        record.status, record.index = "skipped", group.index
        return record

    def note(self, group: FileGroup, record: GroupRecord) -> None:
        """Keep the record of a finished group."""
        self._write(f"groups/{group.name}.json", {"files": _identities(group), "record": record.to_dict()})

    def _plan(self) -> dict[str, Any] | None:
        return self._read(PLAN)

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            return dict(json.loads(files.read_bytes(files.join(self.root, name), self.storage_options)))
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None

    def _write(self, name: str, values: Any) -> None:
        with files.atomic_writer(files.join(self.root, name), self.storage_options) as out:
            out.write(json.dumps(values, indent=1, sort_keys=True).encode() + b"\n")


def _identities(group: FileGroup) -> dict[str, Any]:
    return {url: files.identify(url, group.storage_options).to_dict() for url in group.data}
