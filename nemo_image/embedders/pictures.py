"""Pictures of a tar as batches for a model, read and decoded ahead of it."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace

from nemo_image.embedders.preprocess import PreprocessedBatch, Preprocessor
from nemo_image.engine.in_order import map_in_order
from nemo_image.shards.index import Member
from nemo_image.shards.read import ShardReader

BATCHES_AT_ONCE = 2
"""Batches under way: while the last pictures of one are decoded, the next one is read and its first are begun."""


def prepared_batches(
    reader: ShardReader, members: Sequence[Member], prepare: Preprocessor, size: int, *, pin: bool = False
) -> Generator[tuple[range, PreprocessedBatch], None, None]:
    """Yield batches of pictures, ready for a model, in order.

    Which pictures make a batch depends on `members` and `size` alone, so that results repeat to the last bit. At most
    three batches are ahead of the one that is worked on.

    Parameters
    ----------
    reader : ShardReader
    members : sequence of Member
        The pictures.
    prepare : Preprocessor
    size : int
        Pictures in a batch.
    pin : bool
        Put pixels that are not on a GPU yet into pinned memory, from which they are copied to it in the background.

    Yields
    ------
    places : range
        Where the batch's pictures stand in `members`.
    batch : PreprocessedBatch
    """

    def one(places: range) -> tuple[range, PreprocessedBatch]:
        batch = prepare(list(reader.read_many(members[places.start : places.stop])))
        if pin and not batch.pixels.is_cuda:
            batch = replace(batch, pixels=batch.pixels.pin_memory())
        return places, batch

    starts = range(0, len(members), size)
    cuts = (range(start, min(start + size, len(members))) for start in starts)
    return map_in_order(one, cuts, BATCHES_AT_ONCE)
