"""The driver as a user meets it: in a process of its own, on a throwaway checkout."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable

import pytest

from .conftest import MODULE, PARAMETERS, Checkout

Maker = Callable[[str], Checkout]


def drawn(checkout: Checkout) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(checkout.figures.glob("fig*"))
    }


def alive(pid: int) -> bool:
    listed = subprocess.run(["ps", "-o", "state=", "-p", str(pid)], capture_output=True, text=True)
    return listed.stdout.strip()[:1] not in ("", "Z")


def test_same_bytes_in_two_checkouts_and_nothing_the_second_time(make_checkout: Maker) -> None:
    first, second = make_checkout("first"), make_checkout("a second one")
    for checkout, environment in (
        (first, {"PYTHONHASHSEED": "1"}),
        (second, {"MPLBACKEND": "svg"}),
    ):
        checkout.add("fig1_line")
        code, _, err = checkout.run(**environment)
        assert code == 0, err
    assert drawn(first) == drawn(second)
    assert set(drawn(first)) == {f"fig1_line.{suffix}" for suffix in ("pdf", "png", "svg")}
    kept = json.loads((first.figures / "notebooks" / "fig1_line.ipynb").read_text())
    injected = "".join(kept["cells"][1]["source"])
    assert f'out_dir = "{first.figures}"' in injected

    started = time.monotonic()
    code, _, err = first.run()
    assert code == 0
    assert "up to date" in err
    assert time.monotonic() - started < 8

    # Staleness is of content: new times alone do nothing, an edited output is drawn again.
    before = drawn(first)
    for file in first.root.rglob("*"):
        os.utime(file, (1, 1))
    assert "up to date" in first.run()[2]
    (first.figures / "fig1_line.svg").write_text("scribble")
    code, _, err = first.run()
    assert code == 0
    assert "fig1_line.svg was edited" in err
    assert drawn(first) == before


def test_failures_keep_the_notebook_and_tell_bad_input_from_bugs(checkout: Checkout) -> None:
    user_error = "from mla_study.errors import UserError\nraise UserError('No weights at x.')"
    checkout.add("fig1_input", body=user_error)
    checkout.add("fig2_bug", body="1 / 0")
    code, _, err = checkout.run()
    assert code == 1
    assert "fig1_input failed: No weights at x." in err
    assert "ZeroDivisionError" in err
    assert "Traceback" not in err
    for name in ("fig1_input", "fig2_bug"):
        assert (checkout.figures / "notebooks" / f"{name}.failed.ipynb").is_file()
        assert not (checkout.figures / "notebooks" / f"{name}.ipynb").exists()
    assert drawn(checkout) == {}
    assert checkout.run("run_figures(['fig1'])")[0] == 2


def test_what_a_cell_says_aloud_is_passed_on_and_no_output_is_a_failure(
    checkout: Checkout,
) -> None:
    said = "import sys\nprint('differs from the table', file=sys.stderr)\n"
    write = "open(f'{out_dir}/fig1_said.txt', 'w').write(f'{slope} {count} {marks} {loud}')"
    checkout.add("fig1_said", body=said + write)
    checkout.add("fig2_silent", body="pass")
    params = {"slope": "2", "count": "7", "marks": "[4]", "loud": "true"}
    code, _, err = checkout.run(f"run_figures(params={params!r})")
    assert code == 1
    assert "fig1_said: differs from the table" in err
    assert "fig2_silent failed: it wrote no file" in err
    assert (checkout.figures / "fig1_said.txt").read_text() == "2.0 7 [4] True"


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_runs_leave_no_kernel_and_no_half_figure(
    checkout: Checkout, how: signal.Signals
) -> None:
    flag = checkout.root / "running"
    body = (
        f"import os\nopen({str(flag)!r}, 'w').write(f'{{os.getpid()}}\\n')\n"
        "open(f'{out_dir}/fig1_slow.png', 'w').write('half')\nimport time\ntime.sleep(600)"
    )
    checkout.add("fig1_slow", body=body)
    process = checkout.start("run_figures()")
    deadline = time.monotonic() + 90
    while not (flag.exists() and flag.read_text().endswith("\n")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    kernel = int(flag.read_text())
    assert alive(kernel)
    process.send_signal(how)
    err = process.communicate(timeout=30)[1]
    if how != signal.SIGKILL:
        assert process.returncode == 130
        assert "Interrupted" in err
        assert "Traceback" not in err
    assert drawn(checkout) == {}
    deadline = time.monotonic() + 20
    while alive(kernel):
        assert time.monotonic() < deadline, "a kernel outlived the driver"
        time.sleep(0.2)


def test_bad_names_end_before_any_kernel_starts(checkout: Checkout) -> None:
    checkout.add("fig1_line")
    started = time.monotonic()
    for call, told in {
        "run_figures(['fig1'], params={'lable': 'x'})": "did you mean label?",
        "run_figures(['fig1_lime'])": "did you mean fig1_line?",
        "run_figures(['fig1'], params={'count': '1.5'})": "count = '1.5' is no int",
        "run_data(['fig1'])": "no table of its own",
    }.items():
        code, out, err = checkout.run(call)
        assert (code, out) == (2, "")
        assert told in err
        assert len(err.splitlines()) == 1
    assert time.monotonic() - started < 10
    assert not list(checkout.figures.rglob("*.ipynb"))


def test_list_tells_class_state_and_reason(checkout: Checkout) -> None:
    checkout.add("fig10_line")
    checkout.add("fig2_line", module=MODULE.replace("data/line", "data/absent"))
    code, out, _ = checkout.run("run_figures(list_only=True)")
    assert code == 0
    head, second, tenth = out.splitlines()
    assert head.split() == ["figure", "state", "class", "title"]
    assert second.startswith("fig2_line")
    assert "make data FIG=fig2_line" in second
    assert "never drawn" in tenth
    assert "null-model" in tenth
    assert "A line" in tenth


def test_missing_data_stop_a_named_figure_and_are_skipped_among_all(checkout: Checkout) -> None:
    checkout.add("fig1_line")
    checkout.add("fig2_line", module=MODULE.replace("data/line", "data/absent"))
    checkout.add("fig3_line", module=MODULE.replace("data/line", "data/study_scores"))
    code, _, err = checkout.run()
    assert code == 0, err
    told = [line for line in err.splitlines() if "skipped" in line]
    assert len(told) == 2
    assert "fig2_line" in told[0] and "`make data FIG=fig2_line`" in told[0]
    assert "fig3_line" in told[1] and "`make study-full`" in told[1]
    assert set(drawn(checkout)) == {f"fig1_line.{suffix}" for suffix in ("pdf", "png", "svg")}
    code, _, err = checkout.run("run_figures(['fig3'])")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "`make study-full`" in err


def test_data_of_any_name(checkout: Checkout) -> None:
    module = MODULE.replace("data/line", "data/vbench_*/drift.parquet")
    checkout.add("fig1_line", module=module)
    code, _, err = checkout.run("run_figures(['fig1'])")
    assert code == 2 and "`mla-study vbench run`" in err
    file = checkout.root / "results/data/vbench_mine/drift.parquet"
    file.parent.mkdir()
    file.write_bytes(b"one")
    code, _, err = checkout.run()
    assert code == 0, err
    assert "up to date" in checkout.run("run_figures(list_only=True)")[1]
    file.write_bytes(b"two")
    assert "changed: data" in checkout.run("run_figures(list_only=True)")[1]
    file.write_bytes(b"one")
    (checkout.root / "results/data/vbench_other").mkdir()
    (checkout.root / "results/data/vbench_other/drift.parquet").write_bytes(b"three")
    assert "changed: data" in checkout.run("run_figures(list_only=True)")[1]


def test_files_that_are_no_longer_drawn_are_removed(checkout: Checkout) -> None:
    body = (
        "from pathlib import Path\n"
        "drawn = ['NAME', *('NAME_' + f.stem for f in Path('results/data/line').glob('m*'))]\n"
        "for name in drawn:\n"
        "    for kind in ('svg', 'csv'):\n"
        "        (Path(out_dir) / f'{name}.{kind}').write_text(name)"
    )
    checkout.add("fig1_line", body=body)
    measured = checkout.root / "results/data/line/measured.csv"
    measured.write_text("1")
    assert checkout.run()[0] == 0
    mine = checkout.figures / "fig1_line_notes.txt"
    mine.write_text("not drawn by anybody")
    (checkout.figures / "fig1_line_measured.csv").write_text("edited by hand")
    measured.unlink()
    code, _, err = checkout.run()
    assert code == 0, err
    assert "removed fig1_line_measured.svg, which it no longer draws" in err
    assert "no longer draws fig1_line_measured.csv" in err
    assert set(drawn(checkout)) == {
        "fig1_line.csv", "fig1_line.svg", "fig1_line_measured.csv", mine.name
    }  # fmt: skip
    assert "up to date" in checkout.run()[2]
    # without its data nothing of it stands; asked for by name it is an error that changes nothing
    measured.parent.rename(measured.parent.with_name("aside"))
    assert checkout.run("run_figures(['fig1'])")[0] == 2
    assert len(drawn(checkout)) == 4
    code, _, err = checkout.run()
    assert code == 0 and "fig1_line: removed fig1_line.csv, fig1_line.svg, which" in err
    assert set(drawn(checkout)) == {"fig1_line_measured.csv", mine.name}


def test_data_measures_and_makes_the_figure_stale(checkout: Checkout) -> None:
    measure = "\n\ndef measure(data):\n    (data / 'line' / 'table.csv').write_text('x\\n2\\n')\n"
    checkout.add("fig1_line", module=MODULE + measure)
    assert checkout.run()[0] == 0
    code, _, err = checkout.run("run_data(['fig1'])")
    assert code == 0, err
    assert (checkout.root / "results/data/line/table.csv").read_text() == "x\n2\n"
    assert "changed: data" in checkout.run("run_figures(list_only=True)")[1]
    # Parameters are part of what a figure was drawn from.
    assert (
        "changed: parameters, data"
        in (checkout.run("run_figures(list_only=True, params={'slope': '3'})")[1])
    )


def test_a_notebook_without_out_dir_is_refused(checkout: Checkout) -> None:
    checkout.add("fig1_line")
    file = checkout.root / "notebooks" / "fig1_line.ipynb"
    lines = json.dumps(PARAMETERS.splitlines()[-1] + "\n")[1:-1]
    file.write_text(file.read_text().replace(lines, ""))
    code, _, err = checkout.run()
    assert code == 2
    assert "out_dir" in err
