"""Start of a worker: the folder becomes a package of a name that no library can have."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

PACKAGE = "mla_study_vbench_worker"


def start() -> int:
    """Import this folder as a package, off the path, and serve."""
    folder = Path(__file__).resolve().parent
    if sys.path and Path(sys.path[0] or ".").resolve() == folder:
        del sys.path[0]
    spec = importlib.util.spec_from_file_location(
        PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = package
    spec.loader.exec_module(package)
    importlib.import_module(f"{PACKAGE}.channel").die_with_driver()
    return importlib.import_module(f"{PACKAGE}.serve").main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(start())
