"""Shapes checked at run time, real weights found by one variable, fresh seeds that are told."""

from __future__ import annotations

import os

for _name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("MPLBACKEND", "Agg")

from jaxtyping import install_import_hook

# Before anything imports the package: modules imported earlier would stay unchecked.
install_import_hook("mla_study", "runtime_check.check")

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "mla_study",
    deadline=None,
    max_examples=25,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "mla_study"))

ASSETS = "MLA_STUDY_ASSETS"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--recordings",
        metavar="DIR",
        help="recordings that tests/parity replays (default: tests/fixtures); "
        "'tests/parity --fixtures DIR' says the same",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """``PATH --fixtures DIR`` names a folder of recordings; otherwise it is pytest's own flag."""
    words = [str(word) for word in config.invocation_params.args]
    folder = words[words.index("--fixtures") + 1 :][:1] if "--fixtures" in words else []
    if not folder or folder[0] not in config.args or len(config.args) < 2:
        return
    if not any(Path(folder[0]).glob("*.json")):
        raise pytest.UsageError(f"{folder[0]} holds no recordings (*.json)")
    config.option.showfixtures = False
    config.option.recordings = folder[0]
    config.args.remove(folder[0])


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is None:
        return
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU, and PyTorch sees none")


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """Small files that are committed with the tests."""
    return Path(__file__).resolve().parent / "fixtures"


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real weights and clips; the test is skipped where it is not told."""
    folder = os.environ.get(ASSETS)
    if not folder:
        pytest.skip(f"{ASSETS} is unset: it names the folder of real weights")
    path = Path(folder)
    if not path.is_dir():
        pytest.skip(f"{ASSETS}={folder} is no folder")
    return path


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A fresh seed a run; a failure prints it, and MLA_STUDY_SEED repeats it."""
    value = int(os.environ.get("MLA_STUDY_SEED", int.from_bytes(os.urandom(4), "little")))
    request.node.user_properties.append(("seed", value))
    request.node.add_report_section("setup", "seed", f"MLA_STUDY_SEED={value}")
    return value
