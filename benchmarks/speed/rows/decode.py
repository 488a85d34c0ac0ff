"""Tars to batches of a model's input, on the CPU."""

from benchmarks.speed.material import Material
from benchmarks.speed.race import Contender, Rival, Row


def row(material: Material) -> Row:
    """Return the row."""
    given = {"tars": str(material.tars(736, 4)), "cores": material.cores}
    return Row(
        name="decode",
        what="tars to decoded, preprocessed 224 × 224 batches, CPU",
        unit="images",
        contenders=[
            Contender("ours", "pictures.py:ours", given),
            Contender("webdataset and Pillow transforms", "pictures.py:webdataset", given, environment="webdataset"),
            Contender("decoding alone", "pictures.py:decoding_alone", given),
            Contender("our decoder alone", "pictures.py:steps", {**given, "resized": False}),
            Contender("our decoder and resize", "pictures.py:steps", {**given, "resized": True}),
            Contender("ours, DALI's CPU operators", "pictures.py:ours", {**given, "decoder": "dali"}),
            Contender("ours, Pillow alone", "pictures.py:ours", {**given, "decoder": "pillow"}),
        ],
        targets=[Rival("webdataset and Pillow transforms", at_least=2.0), Rival("decoding alone", at_least=0.85)],
        rounds=15,  # a round of ours takes less than a second, and neighbours on the machine are felt
        floor="decoding alone",
        floor_text="The floor is libjpeg on bytes in memory. Our decoder alone adds the checks of the header; the "
        "resize is an antialiased bicubic one on uint8, which must give Pillow's pixels (torch's, or the compiled one "
        "that equals it); reading, batches and threads are what is left between that and ours.",
    )
