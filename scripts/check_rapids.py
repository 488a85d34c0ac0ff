"""Compare every call into RAPIDS with the signature that the installed release has; prints a table. Needs no GPU.

RAPIDS imports where there is none, so that names and arguments can be checked; what the calls do cannot. Run it with a
Python that has cudf, dask-cudf, cuml[dask] and dask-cuda: ``make check-rapids`` makes one.

The calls are listed here by hand, because most of them are methods of what another call gave. So that none is
forgotten, each name of RAPIDS that the package's source uses must be among those listed.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1] / "nemo_image"
LIBRARIES = ("cudf", "dask_cudf", "cuml", "dask_cuda", "cupy", "rmm")


@dataclass(frozen=True)
class Call:
    """A call: the module, the name inside it, and stand-ins for its arguments."""

    where: str
    module: str
    name: str
    args: int = 0
    kwargs: tuple[str, ...] = field(default=())


_CUDA_CLUSTER = (
    "n_workers", "threads_per_worker", "protocol", "enable_cudf_spill", "enable_nvlink", "enable_tcp_over_ucx",
    "enable_infiniband", "rmm_pool_size", "rmm_maximum_pool_size", "rmm_managed_memory", "rmm_release_threshold",
    "rmm_async", "rmm_allocator_external_lib_list", "dashboard_address", "security",
)  # fmt: skip
_KMEANS = ("n_clusters", "max_iter", "tol", "random_state", "n_init")

CALLS = (
    Call("backend/frames.py", "cudf", "DataFrame.from_arrow", 1),
    Call("backend/frames.py", "cudf", "DataFrame.to_arrow", 1, ("preserve_index",)),
    Call("backend/frames.py", "cudf", "DataFrame.index"),
    Call("backend/frames.py", "cudf", "Index.to_pandas", 1),
    Call("backend/frames.py", "cudf", "from_pandas", 1),
    Call("backend/columns.py", "cudf", "Series.to_arrow", 1),
    Call("backend/columns.py", "cudf", "ListDtype.to_arrow", 1),
    Call("backend/kmeans.py", "cupy", "asarray", 1),
    Call("backend/kmeans.py", "cupy", "empty", 2),
    Call("backend/kmeans.py", "cupy", "asnumpy", 1),
    Call("backend/kmeans.py", "cuml.cluster", "KMeans", 0, _KMEANS),
    Call("backend/kmeans.py", "cuml.cluster", "KMeans.fit", 2),
    Call("backend/kmeans.py", "cuml.dask.cluster", "KMeans", 0, ("client", *_KMEANS)),
    Call("backend/kmeans.py", "cuml.dask.cluster", "KMeans.fit", 2),
    Call("engine/client.py", "dask_cuda", "LocalCUDACluster", 0, _CUDA_CLUSTER),
    Call("engine/client.py", "dask_cuda.plugins", "_setup_rmm_for_torch"),
)


def names_in_source() -> set[tuple[str, str]]:
    """Return the module and the name of everything that the source takes from RAPIDS."""
    found = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        modules: dict[str, str] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                modules |= {one.asname or one.name: one.name for one in node.names if _of_rapids(one.name)}
            elif isinstance(node, ast.ImportFrom) and _of_rapids(node.module or ""):
                found |= {(str(node.module), one.name) for one in node.names}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                dotted = ast.unparse(node)
                first, _, rest = dotted.partition(".")
                if first in modules and rest:
                    found.add((modules[first], rest))
    # Of a.b.c, a.b was found too.
    return {
        (module, name) for module, name in found if not any(o != name and o.startswith(f"{name}.") for _, o in found)
    }


def _of_rapids(module: str) -> bool:
    return module.partition(".")[0] in LIBRARIES


def check(call: Call) -> str:
    """Return the signature that takes a call.

    Raises
    ------
    AttributeError, TypeError
        If there is no such name, or it does not take the arguments.
    """
    found: Any = importlib.import_module(call.module)
    for part in call.name.split("."):
        found = getattr(found, part)
    if not callable(found):
        return type(found).__name__
    try:
        signature = inspect.signature(found)
    except ValueError:
        return "no signature: it is there"  # built in
    signature.bind(*[None] * call.args, **dict.fromkeys(call.kwargs))
    return str(signature)


def main() -> int:
    """Check all calls."""
    forgotten = names_in_source() - {(call.module, call.name) for call in CALLS}
    wrong = [f"{module}.{name}: used, but not listed here" for module, name in sorted(forgotten)]
    for library in ("cudf", "dask_cudf", "cuml", "dask_cuda", "cupy"):
        print(f"{library} {importlib.import_module(library).__version__}")
    print("\n| called in | what | taken by |\n|---|---|---|")
    for call in CALLS:
        try:
            shown = check(call)
        except (AttributeError, ImportError, TypeError) as error:
            wrong.append(f"{call.module}.{call.name}: {error}")
            shown = f"**no**: {error}"
        arguments = ", ".join([*["…"] * call.args, *(f"{name}=" for name in call.kwargs)])
        print(f"| {call.where} | `{call.module}.{call.name}({arguments})` | `{shown}` |")
    print(f"\n{len(CALLS) - len(wrong)} of {len(CALLS)} calls fit")
    for line in wrong:
        print(f"WRONG: {line}", file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
