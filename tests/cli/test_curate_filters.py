"""`nemo-image curate` with cheap filters, quantiles, blocklists and deduplication; `export` and `classify`."""

from __future__ import annotations

import hashlib
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from nemo_image.cli import main
from nemo_image.datasets import ImageTextPairDataset
from tests.makers import TINY_MODEL, encoded, make_dataset, picture, tar_members, write_rows, write_tar


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(one) for one in arguments])


def result_of(*arguments: object) -> dict[str, Any]:
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def frame_of(folder: Path) -> Any:
    return ImageTextPairDataset.from_webdataset(folder).metadata.compute()


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Pictures of several sizes and captions, some of them copies; `score` grows with the row."""
    rows = [
        # (seed, size, caption)
        (0, (64, 48), "a dog runs on the beach"),
        (0, (64, 48), "a dog runs on the beach again"),
        (1, (64, 48), "a cat on a mat"),
        (2, (20, 48), "too narrow a picture"),
        (3, (64, 48), "short"),
        (4, (64, 48), "a house by the sea"),
        (4, (64, 48), "a house by the lake"),
        (5, (64, 48), "a cat on a mat"),
        (6, (64, 48), "trees in the fog"),
        (7, (64, 48), None),
    ]
    folder = tmp_path / "in"
    for name, some in (("a", range(6)), ("b", range(6, 10))):
        samples = []
        for row in some:
            seed, size, caption = rows[row]
            members = {"jpg": encoded(picture(seed, *size), quality=90)}
            samples.append((f"{row:04d}", members | ({} if caption is None else {"txt": caption.encode()})))
        write_tar(folder / f"{name}.tar", samples)
        table = {
            "key": [key for key, _ in samples],
            "caption": pa.array([rows[row][2] for row in some], pa.string()),
            "score": pa.array([row / 10 for row in some], pa.float32()),
        }
        write_rows(folder / f"{name}.parquet", pa.table(table))
    return folder


def test_sizes_captions_quantiles_lists_and_copies_at_once(mixed: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in mixed.iterdir()}
    (tmp_path / "bad.txt").write_text("0008\n")
    found = result_of(
        "curate", mixed, tmp_path / "out",
        "--keep", "width >= 60 and caption_words >= 3", "--keep", "score in top 90%",
        "--blocklist", tmp_path / "bad.txt", "--dedup", "exact", "--keep-ids",
    )  # fmt: skip
    # Of the ten: 0 has the smallest score, 3 is narrow, 4 and 9 have short captions, 8 is listed, 6 is a copy of 5.
    # 1 is a copy of 0, which is not kept, so 1 stays.
    kept = frame_of(tmp_path / "out")
    assert kept["key"].tolist() == ["0001", "0002", "0005", "0007"]
    assert found["rows_in"] == 10
    assert found["rows_out"] == 4
    assert found["rows_filtered"] == 6
    assert found["thresholds"] == {"score in top 90%": pytest.approx(0.1)}
    assert [one["removed"] for one in found["duplicates"]] == [1]
    assert found["results"]["width"] == found["results"]["caption_words"] == found["results"]["blocked"] == 10
    assert len(found["ledgers"]) == 3
    for url in found["ledgers"]:
        assert Path(url).exists()
    accounts = run("inspect", tmp_path / "out", "--ledger", "--json")
    assert accounts.exit_code == 0, accounts.output
    verdicts = pq.read_table(tmp_path / "out" / "_nemo_image" / "duplicates" / "b.parquet").to_pydict()
    assert dict(zip(verdicts["key"], verdicts["duplicate_of"], strict=True))["0006"] == "0005"
    assert {path.name: path.read_bytes() for path in mixed.iterdir()} == before


def test_curate_again_computes_nothing(mixed: Path, tmp_path: Path) -> None:
    arguments = ("curate", mixed, tmp_path / "out", "--keep", "blur in top 50%", "--dedup", "exact")
    first = result_of(*arguments)

    def stamps() -> dict[Path, int]:
        made = [*(tmp_path / "out").rglob("*.parquet"), *(tmp_path / "out").rglob("*.tar")]
        return {path: path.stat().st_mtime_ns for path in made if path.parent.name != "duplicates"}

    before = stamps()
    again = result_of(*arguments)
    assert stamps() == before
    assert again["rows_out"] == first["rows_out"] > 0


def test_embeddings_and_semantic_copies(mixed: Path, tmp_path: Path) -> None:
    found = result_of(
        "curate", mixed, tmp_path / "out", "--model", TINY_MODEL, "--no-autocast", "--keep", "aspect_ratio < 2",
        "--keep", "max_similarity < 2", "--dedup", "exact", "--dedup", "semantic", "--eps", 0.0, "--n-clusters", 1,
    )  # fmt: skip
    assert [(one["tier"], one["removed"]) for one in found["duplicates"]] == [("exact", 2), ("semantic", 0)]
    assert found["rows_out"] == 7  # nine are wide enough; two of these are copies
    frame = frame_of(tmp_path / "out")
    assert frame["image_embedding"].notna().all()
    assert frame["width"].notna().all()


def test_captions_that_stand_twice(mixed: Path, tmp_path: Path) -> None:
    keep = "not caption_is_duplicate and caption_count > 0"
    found = result_of("curate", mixed, tmp_path / "out", "--keep", keep, "--keep-ids")
    assert frame_of(tmp_path / "out")["key"].tolist() == [f"{row:04d}" for row in range(9) if row != 7]
    assert found["rows_out"] == 8


def test_parts_together_equal_one_run(mixed: Path, tmp_path: Path) -> None:
    arguments = ["--keep", "blur in top 40%", "--keep", "caption_count > 0", "--dedup", "exact"]
    result_of("curate", mixed, tmp_path / "whole", *arguments)
    first = result_of("curate", mixed, tmp_path / "parts", *arguments, "--part", "1/2")
    assert first["shards_left"] == 1
    result_of("curate", mixed, tmp_path / "parts", *arguments, "--part", "2/2")
    assert frame_of(tmp_path / "parts")["score"].tolist() == frame_of(tmp_path / "whole")["score"].tolist()
    tars = [sorted(path.name for path in (tmp_path / name).glob("*.tar")) for name in ("parts", "whole")]
    assert tars[0] == tars[1]
    assert (tmp_path / "parts" / tars[0][0]).read_bytes() == (tmp_path / "whole" / tars[0][0]).read_bytes()


def test_blocklists_of_columns_and_bytes(mixed: Path, tmp_path: Path) -> None:
    digest = hashlib.sha256(tar_members(mixed / "b.tar")["0008.jpg"]).hexdigest()
    pq.write_table(pa.table({"sha256": [digest]}), tmp_path / "bad.parquet")
    (tmp_path / "texts.csv").write_text("caption,why\nshort,empty\n")
    found = result_of(
        "curate", mixed, tmp_path / "out", "--blocklist", f"content-sha256={tmp_path / 'bad.parquet'}",
        "--blocklist", f"caption={tmp_path / 'texts.csv'}", "--keep-ids",
    )  # fmt: skip
    assert found["rows_out"] == 8
    assert sorted({f"{row:04d}" for row in range(10)} - set(frame_of(tmp_path / "out")["key"])) == ["0004", "0008"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--keep", "is_duplicate"], "--dedup"),
        (["--eps", 0.1], "--dedup semantic"),
        (["--dedup", "exact", "--max-distance", 3], "--dedup perceptual"),
        (["--dedup", "semantic"], "--model"),
        (["--keep", "aesthetic_score > 5"], "--model"),
        (["--pretrained"], "--model"),
        (["--dedup", "exact", "--keep", "caption_words > 50"], "nothing to export"),
        (["--keep", "nosuch in top 30%"], "nosuch"),
        (["--keep", "score in top 0%"], "above 0%"),
        (["--keep", "caption in top 3%"], "compare"),
        (["--blocklist", "/nowhere.txt"], "/nowhere.txt"),
        (["--keep", "width > 1", "--caption-column", "nosuch", "--keep", "caption_words > 1"], "nosuch"),
    ],
)
def test_errors_are_one_line_before_any_work(mixed: Path, tmp_path: Path, arguments: list[Any], said: str) -> None:
    done = run("curate", mixed, tmp_path / "out", *arguments)
    assert done.exit_code == 1, done.output
    lines = [line for line in done.stderr.splitlines() if line.startswith("Error:")]
    assert len(lines) == 1
    assert said in lines[0]
    assert not list((tmp_path / "out").rglob("*.tar"))


def test_a_deduplication_that_came_with_the_data_is_not_done_again(mixed: Path, tmp_path: Path) -> None:
    for path in mixed.glob("*.parquet"):
        table = pq.read_table(path)
        copies = [key == "0001" for key in table["key"].to_pylist()]
        pq.write_table(table.append_column("is_duplicate", pa.array(copies)), path)
    done = run("curate", mixed, tmp_path / "out", "--dedup", "exact")
    assert done.exit_code == 1
    assert "earlier deduplication" in done.stderr
    assert result_of("curate", mixed, tmp_path / "out", "--keep", "not is_duplicate")["rows_out"] == 9


def test_export_writes_what_passes(mixed: Path, tmp_path: Path) -> None:
    found = result_of(
        "export", mixed, tmp_path / "out", "--keep", "score in top 4", "--keep", "caption_words > 0",
        "--samples-per-shard", 2, "--max-shards", 3, "--old-id-col", "was",
    )  # fmt: skip
    frame = frame_of(tmp_path / "out")
    assert frame["was"].tolist() == ["0006", "0007", "0008"]
    assert (found["rows_in"], found["rows_out"], found["shards_out"]) == (10, 3, 2)
    assert found["thresholds"] == {"score in top 4": pytest.approx(0.6)}
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == ["000.tar", "001.tar"]
    assert tar_members(tmp_path / "out" / "000.tar")["0000.txt"] == b"a house by the lake"
    assert "8" in run("export", mixed, tmp_path / "all", "--keep", "caption is not None and score > 0").output
    assert result_of("export", mixed, tmp_path / "every")["rows_out"] == 10


def test_export_refuses(mixed: Path, tmp_path: Path) -> None:
    result_of("export", mixed, tmp_path / "out")
    other = run("export", mixed, tmp_path / "out", "--keep", "score > 0.5")
    assert other.exit_code == 1
    assert "Error:" in other.stderr
    assert run("export", mixed, tmp_path / "out", "--keep", "score > 0.5", "--replace").exit_code == 0
    for keep, said in (("nosuch > 1", "nosuch"), ("score >", "not an expression"), ("score > 9", "nothing to export")):
        done = run("export", mixed, tmp_path / "no", "--keep", keep)
        assert done.exit_code == 1
        assert said in done.stderr


def embedded(folder: Path, vectors: np.ndarray) -> Path:
    keys = [str(row) for row in range(len(vectors))]
    write_tar(folder / "a.tar", [(key, {"jpg": encoded(Image.new("RGB", (4, 4)))}) for key in keys])
    column = pa.array(list(vectors), pa.list_(pa.float32()))
    write_rows(folder / "a.parquet", pa.table({"key": keys, "image_embedding": column}))
    return folder


def head_files(folder: Path) -> dict[str, Any]:
    """Seeded heads of the published shapes, and their files."""
    import torch

    folder.mkdir()
    rng = torch.Generator().manual_seed(3)
    sizes = (768, 1024, 128, 64, 16, 1)
    aesthetic = {}
    for number, (wide, narrow) in zip((0, 2, 4, 6, 7), pairwise(sizes), strict=True):
        aesthetic[f"layers.{number}.weight"] = torch.randn(narrow, wide, generator=rng) / wide**0.5
        aesthetic[f"layers.{number}.bias"] = torch.randn(narrow, generator=rng)
    torch.save(aesthetic, folder / "aesthetic.pth")
    return aesthetic


def test_classify_scores_what_is_embedded(tmp_path: Path) -> None:
    vectors = np.random.default_rng(1).normal(size=(5, 768)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    folder = embedded(tmp_path / "in", vectors)
    weights = head_files(tmp_path / "heads")
    arguments = ("--no-nsfw", "--aesthetic-weights", tmp_path / "heads" / "aesthetic.pth")
    found = result_of("classify", folder, tmp_path / "scores", *arguments)
    expected = vectors.astype(np.float64)
    for number in (0, 2, 4, 6, 7):
        expected = expected @ weights[f"layers.{number}.weight"].double().numpy().T
        expected = expected + weights[f"layers.{number}.bias"].double().numpy()
    table = pq.read_table(tmp_path / "scores" / "a.parquet")
    assert np.allclose(table["aesthetic_score"].to_numpy(), expected[:, 0], atol=1e-4)
    assert (found["rows"], found["aesthetic_score"], found["shards"]) == (5, 5, 1)
    assert "aesthetic_score" not in pq.read_schema(folder / "a.parquet").names
    result_of("classify", folder, *arguments)
    assert np.allclose(pq.read_table(folder / "a.parquet")["aesthetic_score"].to_numpy(), expected[:, 0], atol=1e-4)


def test_classify_refuses(tmp_path: Path) -> None:
    make_dataset(tmp_path / "plain", {"a": 2})
    wrong = embedded(tmp_path / "in", np.ones((2, 8), np.float32))
    head_files(tmp_path / "heads")
    weights = ("--no-nsfw", "--aesthetic-weights", tmp_path / "heads" / "aesthetic.pth")
    for folder, arguments, said in (
        (tmp_path / "plain", weights, "image_embedding"),
        (wrong, weights, "8 numbers"),
        (wrong, ("--no-nsfw", "--no-aesthetic"), "nothing to do"),
        (wrong, ("--no-aesthetic", "--aesthetic-weights", "x.pth"), "contradict"),
        (wrong, ("--no-nsfw", "--aesthetic-weights", "nosuch.pth"), "nosuch.pth"),
    ):
        done = run("classify", folder, *arguments)
        assert done.exit_code == 1, done.output
        assert said in done.stderr


@pytest.mark.parametrize("command", ["classify", "export", "curate"])
def test_help_has_an_example(command: str) -> None:
    done = run(command, "--help")
    assert done.exit_code == 0
    assert f"nemo-image {command}" in done.output


def test_clip_scores_sizes_captions_and_copies_at_once(mixed: Path, tmp_path: Path) -> None:
    pytest.importorskip("open_clip", reason="open_clip is not installed")
    from tests.embedders.open_clip_models import TINY, write_model

    name = write_model(tmp_path / "model", TINY)
    found = result_of(
        "curate", mixed, tmp_path / "out", "--model", f"open_clip:{name}", "--no-autocast", "--keep-ids",
        "--keep", "clip_score in top 75% and aspect_ratio < 2 and caption_length > 6", "--dedup", "exact",
        "--which-to-keep", "clip_score:descending",
    )  # fmt: skip
    enriched = frame_of(tmp_path / "out" / "_nemo_image" / "enriched").set_index("key")
    scores = enriched["clip_score"].dropna().astype(float)
    assert len(scores) == 9  # one row has no caption
    edge = scores.sort_values(ascending=False).iloc[6]  # ceil(0.75 * 9) = 7 rows
    assert found["thresholds"]["clip_score in top 75%"] == pytest.approx(edge)
    passing = [key for key in scores.index[scores >= edge] if key not in ("0003", "0004")]  # narrow; short
    for pair in (("0000", "0001"), ("0005", "0006")):  # the same pictures
        if set(pair) <= set(passing):
            passing.remove(min(pair, key=lambda key: scores[key]))
    kept = frame_of(tmp_path / "out")
    assert sorted(kept["key"]) == sorted(passing)
    assert found["rows_in"] == found["rows_out"] + found["rows_filtered"] == 10
    assert run("inspect", tmp_path / "out", "--ledger").exit_code == 0


def test_copies_are_ordered_by_what_is_made_on_the_way(mixed: Path, tmp_path: Path) -> None:
    arguments = ("--dedup", "exact", "--which-to-keep", "caption_length:ascending", "--keep-ids")
    result_of("curate", mixed, tmp_path / "out", *arguments)
    kept = set(frame_of(tmp_path / "out")["key"])
    assert {"0000", "0001"} & kept == {"0000"}  # the shorter of two captions
    assert {"0005", "0006"} & kept == {"0005"}


def test_a_misspelt_column_is_said_before_a_model_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemo_image.cli.curate.make_embedder", lambda *given: pytest.fail("a model was built"))
    source = make_dataset(tmp_path / "in", {"a": 2})
    ran = CliRunner().invoke(
        main, ["curate", str(source), str(tmp_path / "out"), "--model", "test_vit", "--keep", "hight > 3 and width > 1"]
    )
    assert ran.exit_code != 0
    assert "'hight'" in str(ran.exception) + ran.output
