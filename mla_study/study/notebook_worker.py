"""Run one notebook through papermill, in a process of its own that the figure driver can end.

Reads a JSON object on standard input (``notebook``, ``executed``, ``parameters``, ``root``), tells
its progress as JSON lines on standard output, and exits with one of the codes below. The kernel is
always this interpreter's, in a scratch profile, whatever kernels and start-up files the user has.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

DONE, FAILED, BAD_INPUT, NO_START = 0, 1, 2, 3
KERNEL = "python3"
START_TIMEOUT = 120  # seconds


def main() -> int:
    """Read the request, run it, and return the exit code."""
    request = json.load(sys.stdin)
    with tempfile.TemporaryDirectory(prefix="mla-study-kernel-") as scratch:
        watched = (os.getppid(), scratch)
        threading.Thread(target=_end_with_parent, args=watched, daemon=True).start()
        _prepare(Path(scratch), request["root"])
        return execute(request)


def execute(request: dict[str, Any]) -> int:
    """Run the notebook; :data:`NO_START` where the kernel died before the first cell ran."""
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.engines import NBClientEngine, papermill_engines
    from papermill.exceptions import PapermillExecutionError

    started: list[int] = []

    class ReportingEngine(NBClientEngine):
        """Papermill's own engine, which also says which cell it is at."""

        @classmethod
        def execute_managed_notebook(cls, nb_man: Any, *arguments: Any, **options: Any) -> Any:
            start = nb_man.cell_start
            count = sum(cell.cell_type == "code" for cell in nb_man.nb.cells)

            def cell_start(cell: Any, *index: Any, **more: Any) -> Any:
                if cell.cell_type == "code":
                    started.append(len(started) + 1)
                    _tell(cell=started[-1], of=count)
                return start(cell, *index, **more)

            nb_man.cell_start = cell_start
            return super().execute_managed_notebook(nb_man, *arguments, **options)

    papermill_engines.register("reporting", ReportingEngine)
    executed = Path(request["executed"])
    try:
        notebook = papermill.execute_notebook(
            request["notebook"],
            str(executed),
            parameters=request["parameters"],
            kernel_name=KERNEL,
            language="python",
            engine_name="reporting",
            progress_bar=False,
            request_save_on_cell_execute=False,
            start_timeout=START_TIMEOUT,
            cwd=request["root"],
        )
    except PapermillExecutionError as error:
        _tell(error=f"{error.ename}: {error.evalue}", cell=len(started), kind=error.ename)
        return BAD_INPUT if error.ename == "UserError" else FAILED
    except (DeadKernelError, CellTimeoutError) as error:
        _tell(error=f"the kernel died: {error}")
        return FAILED if started else NO_START
    except Exception as error:
        _tell(error=f"{type(error).__name__}: {error}")
        return FAILED if started else NO_START
    for text in _said(notebook):
        _tell(said=text)
    _forget_times(executed)
    return DONE


def _prepare(scratch: Path, root: str) -> None:
    folder = scratch / "kernels" / KERNEL
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": command, "display_name": "mla_study", "language": "python"}
    (folder / "kernel.json").write_text(json.dumps(spec))
    paths = {"JUPYTER_PATH": str(scratch), "PYTHONPATH": root}
    for name, first in paths.items():
        os.environ[name] = os.pathsep.join(filter(None, [first, os.environ.get(name)]))
    os.environ.update(
        JUPYTER_RUNTIME_DIR=str(scratch / "runtime"),
        IPYTHONDIR=str(scratch / "ipython"),
        # Agg underneath, and the executed notebook shows the figure.
        MPLBACKEND="module://matplotlib_inline.backend_inline",
        PYTHONHASHSEED="0",
        SOURCE_DATE_EPOCH="0",
    )
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")


def _said(notebook: Any) -> list[str]:
    """What cells wrote to their standard error: meant for the one who draws, so passed on."""
    return [
        output["text"].rstrip()
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output["output_type"] == "stream" and output["name"] == "stderr"
    ]


def _forget_times(executed: Path) -> None:
    content = json.loads(executed.read_text(encoding="utf-8"))
    content["metadata"].pop("papermill", None)
    for cell in content["cells"]:
        cell["metadata"].pop("papermill", None)
        cell["metadata"].pop("execution", None)
    executed.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _tell(**message: object) -> None:
    print(json.dumps(message), flush=True)


def _end_with_parent(parent: int, scratch: str) -> None:
    # A driver that was killed outright cannot end us; the kernel in turn ends with us.
    while os.getppid() == parent:
        time.sleep(1)
    shutil.rmtree(scratch, ignore_errors=True)
    os._exit(FAILED)


if __name__ == "__main__":
    sys.exit(main())
