"""``nemo-image classify``: score images from the embeddings that are there."""

from __future__ import annotations

import time
from typing import Any

import click

from nemo_image import schema
from nemo_image.cli.options import (
    cluster,
    cluster_options,
    id_option,
    json_option,
    parse_part,
    print_json,
    print_table,
)
from nemo_image.datasets import ImageTextPairDataset
from nemo_image.errors import ArgumentError

EXAMPLE = """
Examples:

\b
  nemo-image classify /data/pairs
  nemo-image classify /data/pairs /data/scores --no-nsfw --aesthetic-weights sac+logos+ava1-l14-linearMSE.pth
  nemo-image classify /data/pairs --sidecar /data/embeddings --embedding-column clip_l14
"""


@click.command(epilog=EXAMPLE)
@click.argument("input_path", metavar="INPUT")
@click.argument("output_path", metavar="[OUTPUT]", required=False)
@click.option("--aesthetic/--no-aesthetic", default=True, show_default=True, help="Add aesthetic_score.")
@click.option("--aesthetic-weights", type=click.Path(), help="Local file of the aesthetic head's weights.")
@click.option("--nsfw/--no-nsfw", default=True, show_default=True, help="Add nsfw_score.")
@click.option("--nsfw-weights", type=click.Path(), help="Local file of the NSFW head's weights.")
@click.option("--embedding-column", default=schema.IMAGE_EMBEDDING, show_default=True)
@click.option("--batch-size", type=click.IntRange(1), help="Embeddings at once. [all of a shard's]")
@click.option("--sidecar", "sidecars", multiple=True, help="Folder of Parquet files with further columns.")
@click.option("--max-failure-ratio", type=click.FloatRange(0, 1), default=0.05, show_default=True)
@click.option("--resume/--no-resume", default=True, show_default=True, help="Take over what an earlier run finished.")
@click.option("--part", callback=parse_part, help="Do one share of the shards: 3/16 is the third of sixteen.")
@id_option
@cluster_options
@json_option
def classify(input_path: str, output_path: str | None, as_json: bool, **options: Any) -> None:
    """Score the images of INPUT from their embeddings, with LAION's heads for CLIP ViT-L/14.

    The scores go to INPUT's own metadata or, if it is given, to metadata files in OUTPUT. No image is read.
    """
    started = time.monotonic()
    classifiers = _classifiers(options)
    with cluster(options["workers"], options["scheduler_address"], options["scheduler_file"]):
        dataset = ImageTextPairDataset.from_webdataset(
            input_path, id_col=options["id_col"], sidecars=options["sidecars"]
        )
        for classifier in classifiers:
            dataset = classifier(dataset)
        names = ("max_failure_ratio", "resume", "part")
        saved = dataset.save_metadata(output_path, **{name: options[name] for name in names})
    made = saved.run_totals or {}
    result = {
        "input": input_path,
        "output": output_path or input_path,
        "shards": sum(made["shards"].values()),
        "rows": made["rows_in"],
        **{classifier.pred_column: made["results"].get(classifier.pred_column, 0) for classifier in classifiers},
        "ledger": made["ledger"],
        "seconds": round(time.monotonic() - started, 2),
    }
    print_json(result) if as_json else print_table("classify", list(result.items()))


def _classifiers(options: dict[str, Any]) -> list[Any]:
    from nemo_image.classifiers import AestheticClassifier, NsfwClassifier

    made: list[Any] = []
    for name, make in (("aesthetic", AestheticClassifier), ("nsfw", NsfwClassifier)):
        weights = options[f"{name}_weights"]
        if options[name]:
            size = options["batch_size"] or -1
            made.append(make(embedding_column=options["embedding_column"], batch_size=size, model_path=weights))
        elif weights is not None:
            raise ArgumentError(f"--no-{name} and --{name}-weights contradict each other")
    if not made:
        raise ArgumentError("--no-aesthetic and --no-nsfw leave nothing to do")
    return made
