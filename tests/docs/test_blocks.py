"""Every code block of the pages is run, or opted out by name; see tests/docs/blocks.py."""

from __future__ import annotations

import copy
import logging
import os
import random
from collections.abc import Iterator
from pathlib import Path

import dask
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from distributed import Client

from nemo_image.engine.model_cache import clear_models
from tests.docs import stand_ins
from tests.docs.blocks import PAGES, Block, blocks, blocks_of, run_page
from tests.embedders.open_clip_models import write_model
from tests.makers import encoded, make_dataset, picture

NUMBERS = 16
"""Length of the embeddings that come with the data."""


SMALLER = {
    "docs/deduplication.md": {"n_clusters=1000": "n_clusters=2"},
    "docs/porting.md": {
        "/path/to/input/tar_archives": "data/pairs",
        "/path/to/dataset": "data/pairs",
        "/path/to": "data",
        'get_client(cluster_type="cpu")': 'get_client(cluster_type="cpu", processes=False)',
    },
    "README.md": {'get_client("cpu")': 'get_client("cpu", processes=False)'},
}
"""What is smaller here than on a page: clusters, but for those of docs/cluster.md, are threads of this process."""


TAG = "laion2b_s34b_b79k"
SMALL_CLIP = {
    f'"ViT-B-32", pretrained="{TAG}"': '"local-dir:data/models/clip"',
    f'"ViT-B-32",\n    pretrained="{TAG}",': '"local-dir:data/models/clip",',
    f"--model open_clip:ViT-B-32 --pretrained {TAG}": "--model open_clip:local-dir:data/models/clip",
}
"""The open_clip model of the pages, and the small one with seeded weights that is here in its place."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What the pages find in /data, below the current folder, and small models in place of those on the internet."""
    data = tmp_path / "data"
    make_dataset(data / "pairs", {"00000": 6, "00001": 5})
    embed(make_dataset(data / "embedded", {"00000": 12, "00001": 11}))
    embed(make_dataset(data / "embedded-later", {"00002": 7}, first_seed=20))
    stand_ins.write_heads(data / "models")
    write_model(data / "models" / "clip")
    (data / "models" / "vit_large_patch14_clip_quickgelu_224.openai.safetensors").touch()
    (tmp_path / "clip.safetensors").touch()
    photographs = data / "photos"
    photographs.mkdir()
    for seed in range(5):
        (photographs / f"a_photograph_{seed}.jpg").write_bytes(encoded(picture(seed)))
    (workflow,) = (block for block in blocks("docs/pipeline.md") if block.how == "file")
    (tmp_path / "workflow.yaml").write_text(workflow.text.replace("/data/", f"{data}/"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NEMO_IMAGE_HOME", str(data / "models"))
    # Settings that the command line changes for its own process.
    monkeypatch.setenv("DASK_LOGGING__DISTRIBUTED", "warning")
    levels = {
        name: logging.getLogger(name).level for name in ("distributed", "timm", "fsspec", "httpx", "huggingface_hub")
    }
    clear_models()
    stand_ins.install()
    settings = copy.deepcopy(dask.config.config)
    with dask.config.set(stand_ins.PRELOAD):
        yield tmp_path
    # What a page says of its process is not said of the next test's.
    dask.config.config.clear()
    dask.config.config.update(settings)
    stand_ins.remove()
    clear_models()
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def embed(folder: Path) -> None:
    """Add embeddings to a dataset's Parquet files: those of neighbours are nearly the same."""
    for path in folder.glob("*.parquet"):
        table = pq.read_table(path)
        seeds = table["seed"].to_pylist()
        vectors = [np.random.default_rng(seed // 2).standard_normal(NUMBERS) + seed * 1e-4 for seed in seeds]
        column = pa.array([vector.tolist() for vector in vectors], pa.list_(pa.float32()))
        pq.write_table(table.append_column("image_embedding", column), path)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_the_blocks_of_a_page_run(page: str, folder: Path) -> None:
    # The current client: a pipeline that finds none would start processes.
    with Client(processes=False, dashboard_address=":0", n_workers=1, threads_per_worker=2):
        run_page(blocks(page), paths_of(page, folder))


def paths_of(page: str, folder: Path) -> dict[str, str]:
    """Return what a page's paths are in a folder."""
    here = f"{folder}{os.sep}data{os.sep}"
    return {"/data/": here, **SMALL_CLIP, **SMALLER.get(page, {})}


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_run_or_opted_out_by_name(page: str) -> None:
    found = blocks(page)
    assert [str(block) for block in found if block.how == "unknown"] == [], "see tests/docs/blocks.py"
    names = [block.opted_out[0] for block in found if block.opted_out]
    assert len(set(names)) == len(names)


# That these checks can fail -------------------------------------------------------------------------------------------

PAGE = """
```python
x = 1
```
<!-- not run: sums: it is
 long -->
```python
x = 5
```
Text.

```python
import pathlib

assert x == 1, x
pathlib.Path("out.txt").write_text("/data/" + str(x))
```

<!-- file: a.yaml -->
```yaml
one: /data/
```
<!-- not run: too early: two lines before -->

Words.
```bash
rm x
```

    indented

```text
shown
```
"""


def test_blocks_are_told_apart() -> None:
    found = blocks_of(PAGE, "p.md")
    assert [(one.language, one.how) for one in found] == [
        ("python", "python"),
        ("python", "opted out"),
        ("python", "python"),
        ("yaml", "file"),
        ("bash", "unknown"),
        ("", "unknown"),
        ("text", "output"),
    ]
    assert found[1].opted_out == ("sums", "it is long")
    assert found[2].line == 12


def test_blocks_run_in_order_with_their_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    place = str(random.Random(0).random())
    assert run_page(blocks_of(PAGE, "p.md"), {"/data/": place}) == 3
    assert (tmp_path / "out.txt").read_text() == place + "1"
    assert (tmp_path / "a.yaml").read_text() == f"one: {place}\n"


@pytest.mark.parametrize("text", ["nemo-image inspect nowhere", "nemo-image nosuch", "nemo-image --nosuch"])
def test_a_command_that_fails_fails(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match="nemo-image"):
        run_page([Block("p.md", 1, "bash", text)], {})


def test_python_that_fails_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ZeroDivisionError) as raised:
        run_page([Block("p.md", 7, "python", "1 / 0")], {})
    assert raised.value.__notes__ == ["in the block at p.md:7 (python)"]
