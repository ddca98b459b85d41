"""Which code a result depends on: a static walk over imports, and one hash of what it finds.

Nothing is imported and nothing outside ``mla_study`` and ``analysis`` is looked at; the versions of
other libraries are recorded beside a result, not hashed into it.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path

PACKAGES = ("mla_study", "analysis")


def package_roots() -> dict[str, Path]:
    """Folders of ``mla_study`` and, where it can be imported, ``analysis``."""
    roots: dict[str, Path] = {}
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            roots[package] = Path(next(iter(spec.submodule_search_locations)))
    return roots


def code_closure(
    *module_names: str, roots: Mapping[str, Path] | None = None
) -> dict[str, list[Path]]:
    """Files of these modules and of everything that they import from the same packages.

    Function-level imports count, imports under ``TYPE_CHECKING`` do not. The ``__init__`` of a
    package on the way counts with what it imports when it is loaded; its lazy imports count only
    where something is taken from the package itself. Files beside a module that its source
    mentions by name (a style sheet) belong to it.

    :param module_names: dotted names, such as ``"analysis.fig1_spectra"``.
    :param roots: package name -> folder; by default :func:`package_roots`.
    :return: module name -> its files, sorted by name.
    :raises ModuleNotFoundError: a name in ``module_names`` has no source file.
    """
    walk = _Walk(dict(package_roots() if roots is None else roots))
    for name in module_names:
        if walk.source(name) is None:
            raise ModuleNotFoundError(f"no source of module {name} under {list(walk.roots)}")
        walk.visit(name, lazily=True)
    return {name: walk.files(name) for name in sorted(walk.seen)}


def code_hash(*module_names: str, roots: Mapping[str, Path] | None = None) -> str:
    """SHA-256 (hex) over :func:`code_closure`: names and contents, line ends normalised.

    :raises ModuleNotFoundError: a name has no source file.
    """
    digest = hashlib.sha256()
    for name, files in code_closure(*module_names, roots=roots).items():
        for file in files:
            content = file.read_bytes().replace(b"\r\n", b"\n")
            digest.update(f"{name}\0{file.name}\0{len(content)}\0".encode())
            digest.update(content)
    return digest.hexdigest()


class _Walk:
    def __init__(self, roots: dict[str, Path]) -> None:
        self.roots = roots
        self.seen: dict[str, bool] = {}  # name -> were its lazy imports followed too

    def source(self, name: str) -> Path | None:
        package, *rest = name.split(".")
        if package not in self.roots:
            return None
        base = self.roots[package].joinpath(*rest)
        for candidate in (base / "__init__.py", base.with_name(base.name + ".py")):
            if candidate.is_file():
                return candidate
        return None

    def files(self, name: str) -> list[Path]:
        source = self.source(name)
        assert source is not None
        text = source.read_text(encoding="utf-8")
        beside = (
            file
            for file in sorted(source.parent.iterdir())
            if file.is_file() and file.suffix not in (".py", ".pyc") and file.name in text
        )
        return [source, *beside]

    def visit(self, name: str, *, lazily: bool) -> None:
        """Record ``name`` and its parents, and follow what they import."""
        parent = name.rpartition(".")[0]
        if parent and parent not in self.seen:
            self.visit(parent, lazily=False)
        source = self.source(name)
        if source is None or self.seen.get(name, False) or (name in self.seen and not lazily):
            return
        self.seen[name] = lazily
        package = name if source.name == "__init__.py" else parent
        for statement in _imports_of(source.read_bytes(), lazily):
            for wanted in self._targets(statement, package):
                self.visit(wanted, lazily=True)

    def _targets(self, statement: ast.Import | ast.ImportFrom, package: str) -> Iterator[str]:
        if isinstance(statement, ast.Import):
            yield from (alias.name for alias in statement.names)
            return
        base = statement.module or ""
        if statement.level:
            anchor = package.split(".")
            anchor = anchor[: len(anchor) - statement.level + 1]
            base = ".".join([*anchor, base] if base else anchor)
        for alias in statement.names:
            inner = f"{base}.{alias.name}"
            yield inner if self.source(inner) is not None else base


@functools.lru_cache(maxsize=1024)
def _imports_of(source: bytes, lazily: bool) -> tuple[ast.Import | ast.ImportFrom, ...]:
    """Import statements of a module's source; parsed once, because a run asks several times."""
    return tuple(_imports(ast.parse(source).body, lazily))


def _imports(body: list[ast.stmt], lazily: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and _is_type_checking(node.test):
            yield from _imports(node.orelse, lazily)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not lazily:
            continue
        else:
            for field in ("body", "orelse", "finalbody"):
                yield from _imports(getattr(node, field, []), lazily)
            for handler in [*getattr(node, "handlers", []), *getattr(node, "cases", [])]:
                yield from _imports(handler.body, lazily)


def _is_type_checking(test: ast.expr) -> bool:
    name = test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", "")
    return name == "TYPE_CHECKING"
