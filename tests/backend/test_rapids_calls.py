"""The calls into RAPIDS: all of them are known, and fit where it is installed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "check_rapids.py"


def load() -> Any:
    spec = importlib.util.spec_from_file_location("check_rapids", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_rapids"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


checker = load()


def test_every_name_is_listed() -> None:
    used = checker.names_in_source()
    assert {("cudf", "from_pandas"), ("cuml.cluster", "KMeans"), ("dask_cuda", "LocalCUDACluster")} <= used
    assert used <= {(call.module, call.name) for call in checker.CALLS}


def test_a_call_that_does_not_fit() -> None:
    assert checker.check(checker.Call("", "json", "JSONDecoder.decode", 2)).startswith("(self, s")
    with pytest.raises(TypeError, match="unexpected keyword argument 'nosuch'"):
        checker.check(checker.Call("", "json", "JSONDecoder.decode", 2, ("nosuch",)))
    with pytest.raises(AttributeError):
        checker.check(checker.Call("", "json", "nosuch"))


@pytest.mark.parametrize("call", checker.CALLS, ids=lambda call: f"{call.module}.{call.name}")
def test_the_call_fits(call: Any) -> None:
    if call.module.partition(".")[0] == "cuml":
        pytest.importorskip("cuml.dask", reason="needs cuML, of the extra 'image_cuda13' (or image_cuda12)")
    pytest.importorskip(call.module, reason="needs RAPIDS, of the extra 'image_cuda13' (or image_cuda12)")
    assert checker.check(call)
