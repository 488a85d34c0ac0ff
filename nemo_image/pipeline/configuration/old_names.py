"""NeMo Curator's names of stages and arguments, and ours: the one table, shown in ``docs/porting.md``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nemo_image.errors import ArgumentError

OLD = "nemo_curator"


@dataclass(frozen=True)
class Dropped:
    """An argument that has no place here.

    Attributes
    ----------
    why : str
        What happens instead, or what to write instead.
    only : tuple, optional
        The values that may be dropped: others ask for something that is not done here. Any by default.
    """

    why: str
    only: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class OldName:
    """A class of NeMo Curator that is one of ours.

    Attributes
    ----------
    ours : str
        Our class.
    targets : tuple of str
        Dotted names under which NeMo Curator's releases have it.
    arguments : mapping of str to str or Dropped
        Arguments of any of these releases, or of its documents, that ours does not have: our name of the same.
    defaults : mapping of str to str
        Arguments whose default differs in what comes out, and how.
    """

    ours: str
    targets: tuple[str, ...]
    arguments: Mapping[str, str | Dropped] = field(default_factory=dict)
    defaults: Mapping[str, str] = field(default_factory=dict)


_FILTER: Mapping[str, str | Dropped] = {
    "threshold": "score_threshold",
    "batch_size": "model_inference_batch_size",
}

TABLE = (
    OldName("nemo_image.stages.FilePartitioningStage", (f"{OLD}.stages.file_partitioning.FilePartitioningStage",)),
    OldName(
        "nemo_image.stages.ImageReaderStage",
        (f"{OLD}.stages.image.io.image_reader.ImageReaderStage",),
        {"task_batch_size": "batch_size"},
    ),
    OldName(
        "nemo_image.stages.ImageEmbeddingStage",
        (f"{OLD}.stages.image.embedders.clip_embedder.ImageEmbeddingStage",),
        {"batch_size": "model_inference_batch_size"},
    ),
    OldName(
        "nemo_image.stages.ImageAestheticFilterStage",
        (f"{OLD}.stages.image.filters.aesthetic_filter.ImageAestheticFilterStage",),
        {"min_aesthetic_score": "score_threshold", **_FILTER},
        {"score_threshold": "5.0 here, 0.5 there, which keeps nearly all on a scale of about 1 to 10"},
    ),
    OldName(
        "nemo_image.stages.ImageNSFWFilterStage",
        (f"{OLD}.stages.image.filters.nsfw_filter.ImageNSFWFilterStage",),
        {**_FILTER, "weights_path": Dropped("the head's file is looked for in model_dir", only=(None,))},
    ),
    OldName(
        "nemo_image.stages.ImageDuplicatesRemovalStage",
        (f"{OLD}.stages.image.deduplication.removal.ImageDuplicatesRemovalStage",),
    ),
    OldName(
        "nemo_image.stages.ConvertImageBatchToDocumentBatchStage",
        (f"{OLD}.stages.image.io.convert.ConvertImageBatchToDocumentBatchStage",),
    ),
    OldName(
        "nemo_image.stages.ImageWriterStage",
        (f"{OLD}.stages.image.io.image_writer.ImageWriterStage",),
    ),
    OldName(
        "nemo_image.stages.ParquetWriter",
        (f"{OLD}.stages.text.io.writer.ParquetWriter", f"{OLD}.stages.text.io.writer.parquet.ParquetWriter"),
        {
            "write_kwargs": Dropped("give storage_options", only=({}, None)),
            "fields": Dropped("the stage before says them", only=(None,)),
            "mode": Dropped(
                "a folder that holds something else is refused, but for replace: true", only=("ignore", "error")
            ),
            "file_extension": Dropped("files end in .parquet", only=("parquet", ".parquet")),
            "append_mode_implemented": Dropped("nothing is appended", only=(False,)),
        },
    ),
    OldName(
        "nemo_image.pipeline.SemanticDeduplicationWorkflow",
        (
            f"{OLD}.stages.deduplication.semantic.SemanticDeduplicationWorkflow",
            f"{OLD}.stages.deduplication.semantic.workflow.SemanticDeduplicationWorkflow",
        ),
        {
            "pairwise_compute_dtype": Dropped("cosines are float32, those that decide are refined in float64"),
            "kmeans_embedding_output_dtype": Dropped("embeddings are not written again"),
        },
    ),
    OldName(
        "nemo_image.pipeline.workflows.RankingStrategy",
        (
            f"{OLD}.stages.deduplication.semantic.RankingStrategy",
            f"{OLD}.stages.deduplication.semantic.ranking.RankingStrategy",
        ),
        {
            "strategy": Dropped("give which_to_keep: random", only=("sort",)),
            "random_seed": Dropped("random_state of the workflow is the seed"),
        },
    ),
    OldName(
        "nemo_image.stages.Resources",
        (f"{OLD}.stages.resources.Resources",),
        {
            "gpu_memory_gb": Dropped("give gpus, the share of a GPU", only=(0, None)),
            "entire_gpu": Dropped("give gpus: 1", only=(False, None)),
            "nvdecs": Dropped("there is no video here", only=(0, None)),
            "nvencs": Dropped("there is no video here", only=(0, None)),
        },
    ),
)

REPLACED = {
    f"{OLD}.backends.xenna.XennaExecutor": "nemo_image.pipeline.DaskExecutor, the default: leave it out",
    f"{OLD}.backends.xenna.executor.XennaExecutor": "nemo_image.pipeline.DaskExecutor, the default: leave it out",
    f"{OLD}.backends.ray_data.RayDataExecutor": "nemo_image.pipeline.DaskExecutor, the default: leave it out",
    f"{OLD}.core.client.RayClient": "nemo_image.get_client, or the options --workers and --scheduler-address",
}
"""Classes that are no stages here, and what takes their place."""

EVERYWHERE: Mapping[str, str | Dropped] = {"_name": "name"}
"""Arguments of every stage, as `OldName.arguments`."""

_BY_TARGET = {target: one for one in TABLE for target in one.targets}
_BY_CLASS = {one.ours.rpartition(".")[2]: one for one in TABLE}


def our_target(target: Any, notes: list[str]) -> Any:
    """Return our name of a class of NeMo Curator; any other target as it is.

    Parameters
    ----------
    target : object
        As it stands in a configuration.
    notes : list of str
        Gets a line for what was mapped.

    Raises
    ------
    ArgumentError
        If it is a class of NeMo Curator that is none of ours: says which are.
    """
    if not isinstance(target, str) or not target.startswith(OLD + "."):
        return target
    if target in REPLACED:
        raise ArgumentError(f"{target} is replaced by {REPLACED[target]}")
    if target not in _BY_TARGET:
        raise ArgumentError(f"{target} has no equal here. There are, of {OLD}: {', '.join(sorted(_BY_TARGET))}")
    ours = _BY_TARGET[target].ours
    notes.append(f"{target} is {ours}")
    return ours


def our_arguments(
    cls: type, parameters: Sequence[str], given: Mapping[str, Any], is_old: bool, notes: list[str]
) -> dict[str, Any]:
    """Return the arguments of one of our classes by our names.

    Parameters
    ----------
    cls : type
    parameters : sequence of str
        Of its constructor; an argument that is one of them is never mapped.
    given : mapping
        As they stand in a configuration.
    is_old : bool
        Whether the class was named by NeMo Curator's name.
    notes : list of str
        Gets a line for each that was mapped.

    Raises
    ------
    ArgumentError
        If an argument asks for what is not done here, or is given by both names.
    """
    name = cls.__name__
    known = _BY_CLASS.get(name) if cls.__module__.partition(".")[0] == __name__.partition(".")[0] else None
    mapped = {**EVERYWHERE, **(known.arguments if known else {})}
    result: dict[str, Any] = {}
    for argument, value in given.items():
        ours = argument if argument in parameters else mapped.get(argument, argument)
        if isinstance(ours, Dropped):
            if ours.only is not None and value not in ours.only:
                raise ArgumentError(f"{name} has no argument {argument!r}, given as {value!r}: {ours.why}")
            notes.append(f"{name}: {argument} is left out: {ours.why}")
            continue
        if ours != argument:
            if ours in given:
                raise ArgumentError(f"{name}: {argument!r} is an older name of {ours!r}, which is given too")
            notes.append(f"{name}: {argument} is {ours}")
        result[ours] = value
    if known and is_old:
        notes += [f"{name}: {one} is not given: {said}" for one, said in known.defaults.items() if one not in result]
    return result
