"""The writer's output folder: whose it is, what is replaced, what goes when groups fail or runs are repeated."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from nemo_image.datasets import ImageTextPairDataset
from nemo_image.errors import ArgumentError, DatasetError, RunError
from nemo_image.shards import atomic, files
from nemo_image.stages.base import RunContext
from nemo_image.stages.record import GroupRecord
from nemo_image.stages.tasks import FileGroup, ImageBatch
from nemo_image.stages.writer import ImageWriterStage
from nemo_image.stages.writing import packing
from tests.makers import make_dataset, tar_members
from tests.stages.writing import Run, contents, in_batches, plain_tar, rows, tars

MANIFEST = "_nemo_image/pipeline.json"


@pytest.fixture
def groups(tmp_path: Path) -> dict[str, list[ImageBatch]]:
    """Two groups of 5 images."""
    made = {}
    for number, name in enumerate(("a-0123abcd", "b-0123abcd")):
        images = plain_tar(tmp_path / "in" / f"{name}.tar", [f"{name[0]}{place}" for place in range(5)], 10 * number)
        made[name] = in_batches(images, 2)
    return made


def stage_of(folder: Path, **arguments: Any) -> ImageWriterStage:
    return ImageWriterStage(str(folder), images_per_tar=3, **arguments)


# Whose folder it is ---------------------------------------------------------------------------------------------------


def test_another_dataset_is_never_touched(groups: dict[str, list[ImageBatch]], tmp_path: Path) -> None:
    out = make_dataset(tmp_path / "out", {"00000": 2})
    before = contents(out)
    for replace in (False, True):
        with pytest.raises(DatasetError, match=r"another dataset \(00000"):
            Run(stage_of(out, replace=replace), groups)
    assert contents(out) == before
    # Nor is one that nemo_image has enriched: its footers are ours, its tars are not.
    dataset = ImageTextPairDataset.from_webdataset(out)
    dataset.metadata["more"] = 1
    dataset.save_metadata()
    before = contents(out)
    with pytest.raises(DatasetError, match=r"another dataset \(00000"):
        Run(stage_of(out, replace=True), groups)
    assert contents(out) == before


def test_a_foreign_file_among_ours_is_never_touched(groups: dict[str, list[ImageBatch]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    Run(stage_of(out), groups)
    (out / "precious.tar").write_bytes(b"x")
    before = contents(out)
    with pytest.raises(DatasetError, match=r"another dataset \(precious.tar"):
        Run(stage_of(out, replace=True), groups, token="other")
    assert contents(out) == before
    Run(stage_of(out), groups)
    assert contents(out) == before


def test_another_pipeline_s_output_is_replaced_only_on_demand(
    groups: dict[str, list[ImageBatch]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    Run(stage_of(out), {**groups, "c-0123abcd": groups["a-0123abcd"]})
    before = contents(out)
    with pytest.raises(DatasetError, match=r"another pipeline.*replace=True"):
        Run(stage_of(out), groups, token="other")
    assert contents(out) == before
    # What a run that was killed between tar and Parquet has left is ours too.
    (out / "c-0123abcd-00009.tar").write_bytes(b"x")
    (out / "notes.txt").write_bytes(b"the user's")
    Run(stage_of(out, replace=True), groups, token="other")
    Run(stage_of(tmp_path / "clean"), groups, token="other")
    found = contents(out)
    assert found.pop("notes.txt") == b"the user's"
    assert found == contents(tmp_path / "clean")


def test_the_output_of_other_input_is_replaced_only_on_demand(
    groups: dict[str, list[ImageBatch]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    one, two = ({name: batches} for name, batches in groups.items())
    Run(stage_of(out), one, root="monday")
    before = contents(out)
    with pytest.raises(DatasetError, match=r"this pipeline for other input \(monday; .*replace=True"):
        Run(stage_of(out), two, root="tuesday")
    assert contents(out) == before
    Run(stage_of(out, replace=True), two, root="tuesday")
    Run(stage_of(tmp_path / "clean"), two, root="tuesday")
    assert contents(out) == contents(tmp_path / "clean")
    Run(stage_of(tmp_path / "empty"), {"none": []}, root="monday")
    Run(stage_of(tmp_path / "empty"), two, root="tuesday")


def test_nothing_is_removed_for_a_pipeline_that_is_refused(groups: dict[str, list[ImageBatch]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    Run(stage_of(out), groups)
    before = contents(out)
    stage_of(out, replace=True).prepare(RunContext("test", token="other"))
    assert contents(out) == before


@pytest.mark.parametrize("manifest", [None, b"garbled", b"[1]"])
def test_a_lost_manifest(manifest: bytes | None, groups: dict[str, list[ImageBatch]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    Run(stage_of(out), groups)
    before = contents(out)
    if manifest is None:
        (out / MANIFEST).unlink()
    else:
        (out / MANIFEST).write_bytes(manifest)
    with pytest.raises(DatasetError, match="another pipeline"):
        Run(stage_of(out), groups, token="other")
    Run(stage_of(out), groups)
    assert contents(out) == before


def test_a_killed_replacement_is_nobody_s(groups: dict[str, list[ImageBatch]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    Run(stage_of(out), groups)
    (out / MANIFEST).write_text(json.dumps({"token": ""}))
    with pytest.raises(DatasetError, match="another pipeline"):
        Run(stage_of(out), groups, token="other")


def test_a_file_is_no_folder(groups: dict[str, list[ImageBatch]], tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"")
    with pytest.raises(DatasetError, match="is a file"):
        Run(stage_of(tmp_path / "out"), groups)


def test_inputs_in_the_output_folder_are_refused(groups: dict[str, list[ImageBatch]], tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "in")
    for out, name in (("in", "in/a.tar"), ("in", "in/deep/a.tar"), ("link", "in/a.tar"), (".", "in/a.tar")):
        for url in (str(tmp_path / name), f"file://{tmp_path}/{name}", os.path.relpath(tmp_path / name)):
            with pytest.raises(ArgumentError, match="holds the input"):
                Run(stage_of(tmp_path / out), groups, inputs=[url])
    with pytest.raises(ArgumentError, match="holds the input"):
        Run(ImageWriterStage("memory://data/out"), groups, inputs=["memory://data/out/x.tar"])
    for number, fine in enumerate((str(tmp_path / "out-not" / "a.tar"), f"memory://{tmp_path}/out/a.tar")):
        Run(stage_of(tmp_path / "out" / str(number)), groups, inputs=[fine])


# Failures and repetition ----------------------------------------------------------------------------------------------


def test_a_failed_group_leaves_nothing(groups: dict[str, list[ImageBatch]], tmp_path: Path) -> None:
    first, second = groups.values()
    out = tmp_path / "out"
    # It fails when one tar is finished and the next one begun; another has a tar without its Parquet file.
    run = Run(stage_of(out), {"a-0123abcd": first, "b": [*second[:2], ZeroDivisionError("no")]})
    assert run.records["b"].status == "failed"
    alone = Run(stage_of(tmp_path / "alone"), {"a-0123abcd": first})
    assert contents(out) == contents(tmp_path / "alone")
    assert run.said["rows"] == alone.said["rows"] == 5


class _Leaves(ImageBatch):
    """A batch without images; a worker dies as it comes to it."""

    def __init__(self, unfinished: Path) -> None:
        super().__init__([])
        self.unfinished = unfinished

    def __getattribute__(self, name: str) -> Any:
        if name == "data":
            super().__getattribute__("unfinished").write_bytes(b"half")
        return super().__getattribute__(name)


def test_what_a_killed_worker_left_is_swept(groups: dict[str, list[ImageBatch]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    Run(stage_of(out), groups)
    before = contents(out)
    unfinished = f"{atomic.TEMPORARY_PREFIX}{'0' * 16}{'0' * 16}-a.tar"
    for folder in (out, out / "_nemo_image"):
        (folder / unfinished).write_bytes(b"half")
    # At the start, to make room; and those of this run's killed workers at the end.
    stage_of(out).prepare(RunContext("test", [FileGroup(name="a")], token="token")).connect([], [])
    assert contents(out) == before
    groups["a-0123abcd"].append(_Leaves(out / unfinished))
    # Killed between tar and Parquet, of a group whose input is gone, of one that hand-made names know, and of nobody.
    (out / "gone-89abcdef-00000.tar").write_bytes(b"whole")
    (out / "a-0123abcd-00007.idx").write_bytes(b"whole")
    (out / "somebody-00000.tar").write_bytes(b"theirs")
    Run(stage_of(out), groups)
    found = contents(out)
    assert found.pop("somebody-00000.tar") == b"theirs"
    assert found == before


def test_input_that_is_gone_leaves_nothing(groups: dict[str, list[ImageBatch]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    Run(stage_of(out), groups)
    fewer = {"b-0123abcd": groups["b-0123abcd"]}
    Run(stage_of(out), fewer)
    Run(stage_of(tmp_path / "alone"), fewer)
    assert contents(out) == contents(tmp_path / "alone")


@pytest.mark.in_process("watches or changes this process")
def test_a_tar_that_cannot_be_packed_is_named(
    groups: dict[str, list[ImageBatch]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    packed = packing.PackTar._copy

    def copy(self: Any, left: Any, *rest: Any) -> Any:
        if left.name == "b-0123abcd":
            Path(self.settings.url(f"_nemo_image/remainders/{left.name}.tar")).write_bytes(b"damaged")
        return packed(self, left, *rest)

    monkeypatch.setattr(packing.PackTar, "_copy", copy)
    with pytest.raises(RunError, match=r"2 of the 2 tars.*packed-00000: .*b-0123abcd.tar") as caught:
        Run(stage_of(out), groups)
    assert caught.value.failures.keys() == {"packed-00000", "packed-00001"}
    monkeypatch.undo()
    Run(stage_of(out), groups)
    Run(stage_of(tmp_path / "clean"), groups)
    assert contents(out) == contents(tmp_path / "clean")


@pytest.mark.parametrize(("suffix", "match"), [(".parquet", "has 1 rows"), (".tar", "no sample 'b4'")])
def test_remainders_that_do_not_fit_their_record(
    suffix: str, match: str, groups: dict[str, list[ImageBatch]], tmp_path: Path
) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    for folder, batches in ((out, groups["b-0123abcd"]), (other, groups["b-0123abcd"][:2])):
        Run(stage_of(folder), {"b": batches}, checkpoint="x")
    stage = stage_of(out)
    group = FileGroup(name="b")
    record = GroupRecord("b", outputs=list(stage.stream(iter(groups["b-0123abcd"]), group)))
    left = Path("_nemo_image") / "remainders" / f"b{suffix}"
    (out / left).write_bytes((other / left).read_bytes())
    with pytest.raises(RunError, match=match):
        stage.finish(RunContext("test", [group]), [record])


def test_a_record_that_says_nothing(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="'g' does not say"):
        stage_of(tmp_path / "out").finish(RunContext("test"), [GroupRecord("g", outputs=[FileGroup(name="g")])])


# Checkpoints ----------------------------------------------------------------------------------------------------------


def test_with_a_checkpoint_more_groups_are_packed_with_the_old_ones(
    groups: dict[str, list[ImageBatch]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (one, first), (two, second) = groups.items()
    before = Run(stage_of(out), {one: first}, checkpoint="somewhere")
    left = sorted(path.name for path in (out / "_nemo_image" / "remainders").iterdir())
    assert left == [f"{one}.parquet", f"{one}.tar"]
    assert before.stage.outputs_intact(before.records[one].outputs)

    context = RunContext("test", [FileGroup(name=one), FileGroup(name=two)], checkpoint_path="somewhere", token="token")
    stage = stage_of(out).prepare(context)
    stage.connect([], [])
    record = GroupRecord(two, outputs=list(stage.stream(iter(second), FileGroup(name=two))))
    said = stage.finish(context, [before.records[one], record])
    assert said["rows"] == 10
    Run(stage_of(tmp_path / "clean"), groups, checkpoint="somewhere")
    assert contents(out) == contents(tmp_path / "clean")
    assert [len(rows(out / f"{name}.parquet")) for name in tars(out)] == [3, 3, 3, 1]
    # A group whose input is gone leaves nothing, not even for later.
    stage.finish(context, [record])
    Run(stage_of(tmp_path / "alone"), {two: second}, checkpoint="somewhere")
    assert contents(out) == contents(tmp_path / "alone")


def test_what_was_packed_is_not_packed_again(groups: dict[str, list[ImageBatch]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = Run(stage_of(out), groups, checkpoint="somewhere")
    written = {path.name: path.stat().st_mtime_ns for path in out.glob("packed-*")}
    context = RunContext("test", [FileGroup(name=name) for name in groups], checkpoint_path="somewhere", token="token")
    done = list(run.records.values())
    assert run.stage.finish(context, done) == run.said
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("packed-*")} == written
    before = contents(out)
    # Unless something is missing, or the groups come in another order.
    (out / "packed-00000.idx").unlink()
    (out / "packed-00001.tar").write_bytes(b"cut off")
    assert run.stage.finish(context, done) == run.said
    assert contents(out) == before
    run.stage.finish(context, done[::-1])
    assert rows(out / "packed-00000.parquet")[0]["key"] == "b3"


def test_what_was_packed_of_other_pictures_is_packed_anew(groups: dict[str, list[ImageBatch]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    Run(stage_of(out), groups, checkpoint="somewhere")
    before = contents(out)
    # Of the same size, so that neither rows nor sizes tell.
    image = groups["a-0123abcd"][-1].data[-1]
    assert image.image_bytes is not None
    image.image_bytes = image.image_bytes[:-2] + b"!!"
    Run(stage_of(out), groups, checkpoint="somewhere")
    found = contents(out)
    assert len(found["packed-00000.tar"]) == len(before["packed-00000.tar"])
    assert tar_members(out / "packed-00000.tar")[f"{image.image_id}.jpg"] == image.image_bytes


@pytest.mark.parametrize(
    "name",
    [
        "a-0123abcd-00000.tar",
        "a-0123abcd-00000.parquet",
        "a-0123abcd-00000.idx",
        "_nemo_image/remainders/a-0123abcd.tar",
    ],
)
def test_outputs_that_are_missing_or_cut_off(name: str, groups: dict[str, list[ImageBatch]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = Run(stage_of(out), groups, checkpoint="somewhere")
    outputs = run.records["a-0123abcd"].outputs
    assert run.stage.outputs_intact(outputs)
    whole = (out / name).read_bytes()
    (out / name).write_bytes(whole[:-1])
    assert not run.stage.outputs_intact(outputs)
    (out / name).unlink()
    assert not run.stage.outputs_intact(outputs)
    assert not run.stage.outputs_intact([])


# Elsewhere ------------------------------------------------------------------------------------------------------------


@pytest.mark.in_process("watches or changes this process")
def test_another_file_system(groups: dict[str, list[ImageBatch]], tmp_path: Path) -> None:
    root = f"memory://{tmp_path.name}/out"
    run = Run(ImageWriterStage(root + "/", images_per_tar=3), groups, checkpoint="somewhere")
    assert run.stage.outputs_intact(run.records["b-0123abcd"].outputs)
    here = Run(stage_of(tmp_path / "out"), groups, checkpoint="somewhere")
    fs = fsspec.filesystem("memory")
    inside = f"/{tmp_path.name}/out/"
    assert {path.removeprefix(inside): fs.cat_file(path) for path in fs.find(inside)} == contents(tmp_path / "out")
    assert run.said == {**here.said, "output_dir": root}
    assert len(ImageTextPairDataset.from_webdataset(root)) == 10
    with pytest.raises(DatasetError, match="another pipeline"):
        Run(ImageWriterStage(root), groups, token="other")
    only = {"a-0123abcd": groups["a-0123abcd"]}
    Run(ImageWriterStage(root, images_per_tar=3, replace=True), only, token="other")
    assert files.list_files(root, ".tar") == ["a-0123abcd-00000.tar", "packed-00000.tar"]
    assert not files.exists(f"{root}/_nemo_image/remainders")


class Guarded(MemoryFileSystem):
    """A file system that wants a password."""

    protocol = "guarded"
    cachable = False

    def __init__(self, password: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        if password != "open sesame":
            raise PermissionError("no password")

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return MemoryFileSystem._strip_protocol(path.replace("guarded://", "memory://"))


@pytest.mark.in_process("watches or changes this process")
def test_storage_options_are_used_for_every_file(groups: dict[str, list[ImageBatch]], tmp_path: Path) -> None:
    fsspec.register_implementation("guarded", Guarded, clobber=True)
    options = {"password": "open sesame"}
    root = f"guarded://{tmp_path.name}"
    with pytest.raises(PermissionError):
        Run(ImageWriterStage(root, images_per_tar=3), groups)
    for token in ("one", "other"):
        stage = ImageWriterStage(root, images_per_tar=3, storage_options=options, replace=True)
        run = Run(stage, groups, token=token)
        assert run.said["rows"] == 10
    results = ImageWriterStage(f"{root}/results", storage_options=options, write_images=False)
    assert Run(results, {"g": groups["a-0123abcd"]}).said["shards"] == 1
    found = fsspec.filesystem("memory").find(f"/{tmp_path.name}")
    assert sum(path.endswith(".tar") for path in found) == 4
