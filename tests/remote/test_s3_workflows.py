"""Tables, workflows and removal lists on an S3 server: the result is that of a local disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from nemo_image.pipeline.workflows import SemanticDeduplicationWorkflow
from nemo_image.stages.base import RunContext
from nemo_image.stages.documents import ConvertImageBatchToDocumentBatchStage, ParquetWriter
from nemo_image.stages.image_object import ImageObject
from nemo_image.stages.removal import ImageDuplicatesRemovalStage
from nemo_image.stages.tasks import FileGroup, ImageBatch
from tests.dedup.makers import clustered_vectors

ROWS = 40


@pytest.fixture
def store(bucket: str) -> Any:
    import s3fs

    return s3fs.S3FileSystem(use_listings_cache=False)


def objects(shard: str, vectors: Any) -> list[ImageObject]:
    made = [ImageObject("", f"{number:04d}", shard=shard) for number in range(len(vectors))]
    for one, vector in zip(made, vectors, strict=True):
        one.embedding = vector
    return made


def write(root: str, vectors: Any, shards: list[str]) -> dict[str, Any]:
    """Write the vectors by stages, half of them in each shard."""
    groups = [FileGroup([f"in/{shard}.tar"], name=shard.replace("/", "-"), root="in") for shard in shards]
    context = RunContext("p", groups, token="t")
    writer = ParquetWriter(root).prepare(context)
    writer.connect([], [])
    convert = ConvertImageBatchToDocumentBatchStage(["image_id", "embedding"])
    for number, group in enumerate(groups):
        batch = ImageBatch(objects(shards[number], vectors[number * ROWS // 2 : (number + 1) * ROWS // 2]))
        (output,) = writer.stream(convert.stream(iter([batch]), group), group)
        assert writer.outputs_intact([output])
    return writer.finish(context, [])


def kept(root: str, vectors: Any, shards: list[str]) -> list[tuple[str, str]]:
    groups = [FileGroup([f"in/{shard}.tar"], name=shard, root="in") for shard in shards]
    stage = ImageDuplicatesRemovalStage(root).prepare(RunContext("p", groups))
    images = [*objects(shards[0], vectors[: ROWS // 2]), *objects(shards[1], vectors[ROWS // 2 :])]
    return [(one.shard, one.image_id) for one in stage.process(ImageBatch(images)).data]


def test_from_embeddings_to_removal(bucket: str, store: Any, tmp_path: Path) -> None:
    vectors = clustered_vectors(ROWS, 8, 4, 0.5)
    found: dict[str, Any] = {}
    for root in (str(tmp_path), bucket):
        shards = ["00000", "sub/00001"]
        assert write(f"{root}/emb", vectors, shards) == {}
        settings: dict[str, Any] = {"id_field": "image_id", "embedding_field": "embedding", "n_clusters": 1}
        result = SemanticDeduplicationWorkflow(f"{root}/emb", f"{root}/out", **settings, eps=0.05).run()
        again = SemanticDeduplicationWorkflow(f"{root}/emb", f"{root}/out", **settings, eps=0.05).run()
        assert again == result
        table = pq.read_table(f"{root}/out/duplicates/part-00000.parquet", filesystem=None if root != bucket else store)
        found[root] = table.to_pylist(), kept(f"{root}/out/duplicates", vectors, shards)
        other = SemanticDeduplicationWorkflow(f"{root}/emb", f"{root}/out", **settings, eps=0.0).run()
        assert other.num_duplicates != result.num_duplicates
    assert found[bucket] == found[str(tmp_path)]
    assert 0 < len(found[bucket][1]) < ROWS
    names = [
        name for name in store.find(f"{bucket}/out") if "_nemo_image/dedup-" in name and name.endswith("result.json")
    ]
    assert len(names) == 1, "the result of the other threshold is gone"
    shrunk = ParquetWriter(f"{bucket}/emb").prepare(RunContext("p", [FileGroup([], name="00000")], token="t"))
    assert shrunk.finish(RunContext("p", [FileGroup([], name="00000")], token="t"), []) == {"leftovers removed": 1}
