"""The commands as they are typed: exit codes, what goes to stdout and what to stderr."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from checkpoints.range_server import Site, serve
from probe_files import as_bf16, config, gqa, latent, wan, write

from mla_study.cli import main, rank_probe_main
from mla_study.probes.activations import save_covariance
from mla_study.probes.spectrum import METRICS
from mla_study.probes.table import COLUMNS
from mla_study.study.runs import read_result

ROOT = Path(__file__).resolve().parents[1]
COMMAND = "import sys; from mla_study.cli import rank_probe_main; sys.exit(rank_probe_main())"


@pytest.fixture
def small(tmp_path: Path, seed: int) -> Path:
    return write(tmp_path / "w.safetensors", wan(np.random.default_rng(seed), layers=2))


class Ran:
    """The command in this process."""

    def __init__(self, capfd: pytest.CaptureFixture[str], *arguments: object) -> None:
        capfd.readouterr()
        try:
            self.code = rank_probe_main(list(map(str, arguments)))
        except SystemExit as end:
            self.code = end.code if isinstance(end.code, int) else 1
        self.out, self.err = capfd.readouterr()

    def refused(self, told: str) -> None:
        """Exit 2, one sentence on stderr and nothing on stdout."""
        assert self.code == 2, self.err
        assert self.out == ""
        assert self.err.startswith("rank-probe: ") and self.err.endswith(".\n")
        assert self.err.count("\n") == 1 and "Traceback" not in self.err
        assert re.search(told, self.err), self.err


def launched(*arguments: object, **more: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", COMMAND, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"},
        capture_output=True,
        text=True,
        check=False,
        **more,  # type: ignore[call-overload]
    )


# Help and options


def test_help_is_instant_and_its_example_names_every_part() -> None:
    before = time.perf_counter()
    done = launched("--help")
    spent = time.perf_counter() - before
    assert done.returncode == 0 and done.stderr == ""
    assert (
        "Example, on weights that come with the demo packages: rank-probe demo:minilm"
        in done.stdout
    )
    for option in (
        "--operators", "--gauge", "--metrics", "--heads", "--kv-heads", "--config", "--layers",
        "--map", "--weights", "--base", "--covariance", "--source", "--compare", "--series",
        "--step-regex", "--out", "--plot", "--json", "--csv", "--workers", "--list", "--seed",
    ):  # fmt: skip
        assert option in done.stdout, option
    assert spent < 3, "about 0.4 s on an idle machine"
    code = "import sys, mla_study.cli; print(*sys.modules)"
    listed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    heavy = {"pandas", "scipy", "matplotlib", "pyarrow", "torch", "numpy"}
    assert not heavy & set(listed.stdout.split()), "help imports nothing heavy"


def test_without_arguments_it_says_what_to_give(capfd: pytest.CaptureFixture[str]) -> None:
    Ran(capfd).refused("nothing to probe: give a checkpoint, for example `rank-probe FILE`")


@pytest.mark.parametrize(
    "arguments",
    [("--nonsense",), ("--gauge", "flat"), ("--workers", "x"), ("--compare", "a"), ("--heads",)],
)
def test_wrong_options_end_with_two(
    arguments: tuple[str, ...], small: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ran = Ran(capfd, small, *arguments)
    assert ran.code == 2 and ran.out == "" and "Traceback" not in ran.err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--operators", "kw"), "no operator 'kw': choose from q, k, v"),
        (("--operators", ""), "no operators are named"),
        (("--metrics", "rank"), "no metric is called 'rank'"),
        (("--heads", "0"), "heads is 0"),
        (("--heads", "5"), "5 heads do not divide|divide"),
        (("--layers", "-2"), "layers is -2"),
        (("--workers", "0"), "--workers is 0"),
        (("--seed", "-1"), "seed is -1"),
        (("--map", "nonsense"), "is not 'REGEX -> role'"),
        (("--plot", "x.jpg"), r"--plot x.jpg: .*give .pdf, .png or .svg"),
        (("--plot", "/no/such/folder/x.pdf"), "/no/such/folder does not exist"),
        (("--json", "--csv"), "both want stdout"),
        (("--series", "x*"), "give either paths"),
        (("--step-regex", "x"), "give both"),
        (("--config", "/no/config.json"), "/no/config.json"),
        (("--covariance", "/no/c.safetensors"), "/no/c.safetensors does not exist"),
        (("--source", "/no/dense"), "/no/dense does not exist"),
        (("--base", "/no/base"), "no LoRA"),
        (("--out", "/dev/null/x"), "cannot be written"),
    ],
)
def test_bad_values_are_told_in_a_sentence(
    arguments: tuple[str, ...], told: str, small: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Ran(capfd, small, *arguments).refused(told)


def test_bad_paths_are_told_in_a_sentence(
    small: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Ran(capfd, tmp_path / "absent").refused("absent does not exist")
    Ran(capfd, "").refused("a path is empty")
    Ran(capfd, small, small).refused("given twice")
    Ran(capfd, small, "--out", small).refused(r"--out .*w\.safetensors is a file")
    Ran(capfd, "--series", f"{tmp_path}/no*").refused("matches no file")
    Ran(capfd, "--compare", small, tmp_path / "absent").refused("absent does not exist")
    arrays = wan(np.random.default_rng(0), layers=1)
    arrays["blocks.0.self_attn.v.weight"][0, 0] = np.nan
    Ran(capfd, write(tmp_path / "nan.safetensors", arrays)).refused(
        r"nan\.safetensors.*'blocks\.0\.self_attn\.v\.weight'.*NaN.*undamaged"
    )
    Ran(capfd, tmp_path / "two\nlines").refused("two lines does not exist|cannot be opened")


# Output


def test_text_goes_to_stdout_and_nothing_else_does(
    small: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ran = Ran(capfd, small)
    assert ran.code == 0 and ran.err == ""
    assert len(re.findall(r"^ +[01] self +kv +raw ", ran.out, re.MULTILINE)) == 2
    assert re.search(r"^class measured, full, run [0-9a-f]{12}$", ran.out, re.MULTILINE)


def test_json_is_one_document(small: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ran = Ran(capfd, small, "--json", "--layers", 3)
    assert ran.code == 0
    told = json.loads(ran.out)
    assert ran.out.count("\n") == 1
    assert {row["metric"] for row in told["table"]} == set(METRICS)
    assert tuple(told["table"][0]) == COLUMNS
    assert told["run"]["validity"] == "partial"
    assert ran.err.count("\n") == 1 and "block 2 missing" in ran.err


def test_csv_is_the_tidy_table(
    small: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ran = Ran(capfd, small, "--csv", "--out", tmp_path / "out")
    rows = list(csv.reader(io.StringIO(ran.out)))
    assert tuple(rows[0]) == COLUMNS
    table = read_result(tmp_path / "out").table
    back = pd.read_csv(io.StringIO(ran.out))
    assert len(back) == len(table)
    np.testing.assert_allclose(back["value"], table["value"], rtol=1e-15)
    assert ran.err == f"wrote {tmp_path / 'out'}\n"


def test_everything_at_once(small: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plot, out = tmp_path / "p.svg", tmp_path / "out"
    ran = Ran(capfd, small, "--json", "--out", out, "--plot", plot, "--gauge", "folded")
    told = json.loads(ran.out)
    assert ran.err == f"wrote {out}\nwrote {plot}\n"
    assert told["gauge"] == "folded" and plot.read_bytes().startswith(b"<?xml")
    assert told["run"] == json.loads((out / "run.json").read_text())


def test_lists_in_text_and_json(small: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = Ran(capfd, small, "--list")
    assert text.code == 0 and "blocks.1.self_attn: q[24,24]" in text.out and text.err == ""
    [told] = json.loads(Ran(capfd, small, "--list", "--json").out)
    assert [b["block"] for b in told["blocks"]] == ["blocks.0.self_attn", "blocks.1.self_attn"]


def test_a_pipe_that_closes_early_is_no_error(tmp_path: Path, seed: int) -> None:
    path = write(tmp_path / "w.safetensors", wan(np.random.default_rng(seed), layers=40, d=16))
    shell = f"{sys.executable} -c '{COMMAND}' {path} --csv --workers 1 | head -1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", shell],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and done.stderr == ""
    assert tuple(done.stdout.strip().split(",")) == COLUMNS


def test_the_progress_bar_is_for_terminals_and_vanishes(tmp_path: Path, seed: int) -> None:
    path = write(tmp_path / "w.safetensors", wan(np.random.default_rng(seed), layers=3, d=200))
    own, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(path), "--json"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"},
        stdout=subprocess.PIPE,
        stderr=theirs,
    )
    os.close(theirs)
    out, _ = process.communicate(timeout=60)
    shown = b""
    try:
        while piece := os.read(own, 65536):
            shown += piece
    except OSError:
        pass
    os.close(own)
    json.loads(out)
    assert b"block" in shown and b"MB read" in shown
    assert shown.rstrip(b" ").endswith(b"\r") and b"\n" not in shown


# Options that reach the library


def test_what_the_options_ask_for_is_done(
    tmp_path: Path, seed: int, capfd: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(seed)
    path = write(tmp_path / "g.safetensors", gqa(rng, layers=2))

    def table(*arguments: object) -> pd.DataFrame:
        ran = Ran(capfd, *arguments, "--json")
        assert ran.code == 0, ran.err
        return pd.DataFrame(json.loads(ran.out)["table"])

    heads = table(path, "--operators", "qk, ov", "--heads", 6, "--kv-heads", 2)
    assert set(heads["operator"]) == {"qk", "ov"} and set(heads["head"]) == set(range(6))
    few = table(path, "--metrics", "r_0.99,condition")
    assert set(few["metric"]) == {"r_0.99", "condition"} and set(few["method"]) == {"svdvals"}
    by_config = table(
        path, "--operators", "qk", "--config",
        config(tmp_path / "c.json", num_attention_heads=6, num_hidden_layers=2),
    )  # fmt: skip
    assert set(by_config["head"]) == set(range(6))
    seeds = [table(path, "--operators", "kv", "--seed", s)["null_value"] for s in (0, 0, 1)]
    assert seeds[0].equals(seeds[1]) and not seeds[0].equals(seeds[2])
    mla = write(tmp_path / "mla.safetensors", latent(rng, layers=2))
    cut = table(mla, "--source", path)
    assert set(cut["null"]) == {"gaussian", "gaussian_product", "truncated_source"}
    save_covariance(tmp_path / "c.safetensors", {str(n): np.eye(24) for n in range(2)})
    weighted = table(path, "--covariance", tmp_path / "c.safetensors")
    assert "weighted-raw" in set(weighted["gauge"])
    assert "functional_error_at_n/8" in set(weighted["metric"])
    odd = {f"mixer.{n}.{w}": rng.standard_normal((8, 8)) for n in (0, 1) for w in ("key", "val")}
    mapped = table(
        write(tmp_path / "odd.safetensors", odd),
        "--map", r"mixer\.(\d+)\.key -> k", "--map", r"mixer\.(\d+)\.val -> v",
    )  # fmt: skip
    assert set(mapped["layer"]) == {0, 1} and set(mapped["operator"]) == {"kv", "k", "v"}
    pair = table("--compare", path, mla)
    assert {"overlap", "principal_angle_max"} <= set(pair["metric"])
    for step in (1, 2):
        write(tmp_path / "run" / f"s{step}.safetensors", gqa(rng, layers=1))
    steps = table("--series", f"a={tmp_path}/run/*", "--step-regex", r"s(\d)\.")
    assert set(steps["step"]) == {1, 2} and "overlap_with_start" in set(steps["metric"])


def test_traffic_and_secrets_through_the_command(
    tmp_path: Path, seed: int, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    arrays, dtypes = as_bf16(wan(np.random.default_rng(seed), layers=4, d=200))
    body = write(tmp_path / "w.safetensors", arrays, dtypes).read_bytes()
    with serve(Site(files={"/w.safetensors": body, "/bad.safetensors": body[:99]})) as site:
        ran = Ran(capfd, f"{site.url}/w.safetensors?token=SECRET", "--json")
        assert ran.code == 0 and "SECRET" not in ran.out + ran.err
        assert site.body_bytes <= 1.1 * 4 * 2 * 200 * 200 * 2
        for name in ("bad", "absent"):
            refused = Ran(capfd, f"{site.url}/{name}.safetensors?token=SECRET")
            refused.refused(rf"{name}\.safetensors")
            assert "SECRET" not in refused.err


def test_the_other_command_holds_the_same(small: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["rank-probe", str(small), "--json"]) == 0
    mine = json.loads(capfd.readouterr().out)
    theirs = json.loads(Ran(capfd, small, "--json").out)
    assert mine["table"] == theirs["table"]
    assert main(["rank-probe"]) == 2
    assert capfd.readouterr().err.startswith("mla-study: nothing to probe")
    assert main(["config", "mini"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out) and err.startswith("sha256 ")
    assert main(["config", "maxi"]) == 2


@pytest.mark.assets
def test_real_files_and_fixtures(assets: Path, capfd: pytest.CaptureFixture[str]) -> None:
    formats = assets.parent / "fixtures" / "formats"
    names = ["minilm_l6", "smollm2", "dinov2s", "gmflow", "terrain", "stories"]
    paths = [next((assets / "weights").glob(f"{name}*.safetensors")) for name in names]
    if formats.is_dir():
        paths += [formats / n for n in ("original_wan", "original_wan_sharded", "diffusers")]
        paths += [formats / "diffusers_sharded"]
        paths += [p for p in (formats / "self_forcing").iterdir() if p.suffix == ".safetensors"]
    ran = Ran(capfd, *paths, "--json", "--operators", "kv", "--metrics", "r_0.99,energy_at_n/8")
    assert ran.code == 0, ran.err
    told = json.loads(ran.out)
    assert [c["checkpoint"] for c in told["checkpoints"]] == [str(p) for p in paths]


@pytest.mark.assets
def test_the_incomplete_ones_missing_block_is_named(
    assets: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    formats = assets.parent / "fixtures" / "formats"
    if not formats.is_dir():
        pytest.skip("no fixtures beside the assets")
    path = formats / "self_forcing" / "incomplete_missing_block1_fp16.pt"
    given = formats / "original_wan" / "config.json"
    ran = Ran(capfd, path, "--config", given, "--out", tmp_path / "out")
    assert ran.code == 0 and "2 layers expected: block 1 missing" in ran.out
    assert read_result(tmp_path / "out").validity == "partial"
