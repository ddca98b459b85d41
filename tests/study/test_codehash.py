from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mla_study.study.codehash import code_closure, code_hash


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Path]:
    files = {
        "pack/__init__.py": "def __getattr__(name):\n    from pack.lazy import thing\n",
        "pack/lazy.py": "import pack.deep.leaf\n",
        "pack/a.py": (
            "from __future__ import annotations\n"
            "from typing import TYPE_CHECKING\n"
            "if TYPE_CHECKING:\n    from pack import never\n"
            "else:\n    from . import other\n"
            "def f():\n    try:\n        from .deep import leaf\n"
            "    except ImportError:\n        import numpy\n"
        ),
        "pack/never.py": "",
        "pack/other.py": "STYLE = 'look.style'\n",
        "pack/look.style": "width: 1\n",
        "pack/unnamed.style": "width: 1\n",
        "pack/deep/__init__.py": "from . import sibling as s\n",
        "pack/deep/sibling.py": "match 1:\n    case 1:\n        import pack.matched\n",
        "pack/deep/leaf.py": "import os\n",
        "pack/matched.py": "from ana import fig\n",
        "pack/takes_attribute.py": "from pack import thing\n",
        "ana/fig.py": "",
    }
    for name, text in files.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return {"pack": tmp_path / "pack", "ana": tmp_path / "ana"}


def test_closure_follows_what_runs_and_no_more(tree: dict[str, Path]) -> None:
    closure = code_closure("pack.a", roots=tree)
    assert set(closure) == {
        "pack",
        "pack.a",
        "pack.other",
        "pack.deep",
        "pack.deep.leaf",
        "pack.deep.sibling",
        "pack.matched",
        "ana.fig",
    }
    assert [file.name for file in closure["pack.other"]] == ["other.py", "look.style"]
    # An attribute of the package may be lazy: then its lazy imports count as well.
    assert "pack.lazy" in code_closure("pack.takes_attribute", roots=tree)


def test_hash_changes_with_the_closure_only(tree: dict[str, Path]) -> None:
    before = code_hash("pack.a", roots=tree)
    for name in ("pack/never.py", "pack/lazy.py", "pack/unnamed.style"):
        (tree["pack"].parent / name).write_text("# changed\n")
    assert code_hash("pack.a", roots=tree) == before
    leaf = tree["pack"] / "deep" / "leaf.py"
    leaf.write_bytes(leaf.read_bytes().replace(b"\n", b"\r\n"))
    assert code_hash("pack.a", roots=tree) == before
    for name in ("deep/leaf.py", "look.style", "__init__.py"):
        file = tree["pack"] / name
        text = file.read_text()
        file.write_text(text + "# changed\n")
        assert code_hash("pack.a", roots=tree) != before
        file.write_text(text)
    assert code_hash("pack.a", roots=tree) == before
    with pytest.raises(ModuleNotFoundError, match=r"pack\.absent"):
        code_hash("pack.absent", roots=tree)


def test_the_package_itself_without_importing_it() -> None:
    closure = code_closure("mla_study.study.plots")
    assert "mla_study.study.mla_study.mplstyle" not in closure
    names = {file.name for file in closure["mla_study.study.plots"]}
    assert names == {"plots.py", "mla_study.mplstyle"}
    assert "mla_study.errors" in closure
    assert not any(name.startswith("mla_study.probes") for name in closure)
    code = (
        "import sys; from mla_study.study.codehash import code_hash; "
        "code_hash('mla_study.study.plots'); print('matplotlib' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
