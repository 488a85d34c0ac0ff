"""What is known of a frame's columns: which of them operators made, and which the user has changed since."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

Fingerprints = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Lineage:
    """What operators did to a frame.

    Attributes
    ----------
    known : str
        Dask's name of the frame as nemo_image left it.
    provenance : dict of str to dict
        The fingerprint of each column that nemo_image added.
    pending : dict of str to dtype
        The columns that are still to compute.
    touched : bool
        Whether the user has changed the frame.
    reads_images : bool
        Whether pending columns read the tars.
    """

    known: str
    provenance: Fingerprints = field(default_factory=dict)
    pending: Mapping[str, Any] = field(default_factory=dict)
    touched: bool = False
    reads_images: bool = False

    def seen(self, frame: Any) -> Lineage:
        """Return the lineage of the frame as it is now; users also assign columns to it in place.

        A column that the user assigned is no longer what an operator made.
        """
        if frame.expr._name == self.known:
            return self
        assigned = _assigned_since(frame.expr, self.known)
        stays = [name for name in frame.columns if name not in assigned]
        return replace(
            self,
            provenance={name: made for name, made in self.provenance.items() if name in stays},
            pending={name: dtype for name, dtype in self.pending.items() if name in stays},
            touched=True,
        )

    def extended(
        self, frame: Any, outputs: Mapping[str, Any], fingerprints: Fingerprints, reads_images: bool
    ) -> Lineage:
        """Return the lineage of `frame`, to which an operator has added `outputs`."""
        return replace(
            self,
            known=frame.expr._name,
            provenance={**self.provenance, **fingerprints},
            pending={**self.pending, **outputs},
            reads_images=self.reads_images or reads_images,
        )


def _assigned_since(expression: Any, known: str) -> set[str]:
    """Return the columns assigned between the frame called `known` and `expression`."""
    from dask.dataframe.dask_expr._expr import Assign

    names: set[str] = set()
    while expression._name != known:
        if isinstance(expression, Assign):
            names |= set(expression.keys)
        dependencies = expression.dependencies()
        if not dependencies:
            break
        # The first one brings the rows.
        expression = dependencies[0]
    return names


def assigned_columns(frame: Any) -> set[str]:
    """Return the columns of a Dask frame that were assigned to it, by operators or by the user."""
    return _assigned_since(frame.expr, "")
