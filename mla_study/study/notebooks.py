"""What a figure is made of: a notebook, its parameters, and the module of ``analysis`` behind it.

``notebooks/<id>.ipynb`` has one cell tagged ``parameters``, a parameter a line
(``name = default  # type: meaning``), ``out_dir`` among them. ``analysis/<id>.py`` has ``TITLE``,
``PROVENANCE``, ``DATA`` (folders or files it draws from, relative to the project; ``*`` stands for
any part of a name, of which one must be there), and may have
``INSTEAD`` (parameters that, where they are given, name what it draws from in their place),
``INPUTS()`` (further input files: name -> path; its arguments are parameters of those names) and
``measure(data_dir)``. Nothing is imported here.
"""

from __future__ import annotations

import ast
import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mla_study.errors import UserError

OUT_DIR = "out_dir"


@dataclass(frozen=True)
class Project:
    """Where the notebooks, their modules, the data and the figures of one checkout are."""

    root: Path
    output: Path | None = None

    @property
    def notebooks(self) -> Path:
        return self.root / "notebooks"

    @property
    def analysis(self) -> Path:
        return self.root / "analysis"

    @property
    def data(self) -> Path:
        return self.root / "results" / "data"

    @property
    def figures(self) -> Path:
        return self.output or self.root / "results" / "figures"

    @classmethod
    def find(cls, output: Path | None = None) -> Project:
        """The checkout that the current folder lies in, else the one that the package lies in.

        :raises UserError: there is none (the package was installed from a wheel).
        """
        here = Path.cwd()
        for root in (here, *here.parents, Path(__file__).resolve().parents[2]):
            if (root / "notebooks").is_dir() and (root / "analysis").is_dir():
                return cls(root, output)
        raise UserError(
            f"No folder above {here} has notebooks/ and analysis/: figures are drawn in a checkout "
            "of the repository, so change into one."
        )


@dataclass(frozen=True)
class Parameter:
    """One line of the parameters cell; ``default`` also says the type."""

    name: str
    default: Any

    def parse(self, given: object) -> Any:
        """A value from the command line as the default's type; other values only if they fit.

        :raises UserError: it does not read as that type.
        """
        kind = type(self.default)
        try:
            return _convert(given, kind)
        except (ValueError, TypeError, KeyError):
            raise UserError(
                f"Parameter {self.name} = {given!r} is no {kind.__name__}: "
                f"give a value like its default, {self.default!r}."
            ) from None


@dataclass(frozen=True)
class Figure:
    """A notebook with its module, as far as can be told without running either."""

    id: str
    notebook: Path
    module: Path
    parameters: Mapping[str, Parameter]
    title: str = ""
    provenance: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    functions: frozenset[str] = field(default_factory=lambda: frozenset[str]())
    instead: tuple[str, ...] = ()

    def values(self, given: Mapping[str, object]) -> dict[str, Any]:
        """All parameters but ``out_dir``, those of ``given`` put in where this figure has them."""
        return {
            name: parameter.parse(given[name]) if name in given else parameter.default
            for name, parameter in self.parameters.items()
            if name != OUT_DIR
        }


def discover(project: Project) -> list[Figure]:
    """All figures in natural order (fig2 before fig10); notebooks without a module are none.

    :raises UserError: a notebook or module that does not follow the convention.
    """
    figures = [
        _figure(notebook, module)
        for notebook in project.notebooks.glob("*.ipynb")
        if (module := project.analysis / f"{notebook.stem}.py").is_file()
    ]
    return sorted(figures, key=lambda figure: _natural(figure.id))


def select(figures: Sequence[Figure], names: Iterable[str]) -> list[Figure]:
    """The named figures; ``fig1`` stands for ``fig1_spectra``. No names: all.

    :raises UserError: a name fits none; the nearest one and the list are told.
    """
    chosen: dict[str, Figure] = {}
    wanted = list(names)
    for name in wanted:
        fits = [f for f in figures if f.id == name or f.id.startswith(f"{name}_")]
        fits = fits or [f for f in figures if f.id.startswith(name)]
        if not fits:
            ids = [figure.id for figure in figures]
            short = [figure.id.partition("_")[0] for figure in figures]
            raise UserError(
                f"There is no figure {name!r}{_nearest(name, [*ids, *short])}: "
                f"choose from {', '.join(ids) or 'none, as notebooks/ holds none'}."
            )
        chosen.update((figure.id, figure) for figure in fits)
    return list(chosen.values()) if wanted else list(figures)


def check_parameters(figures: Sequence[Figure], given: Iterable[str]) -> None:
    """:raises UserError: a parameter that none of these figures has; the nearest name is told."""
    known = {name for figure in figures for name in figure.parameters}
    for name in given:
        if name not in known:
            raise UserError(
                f"No parameter {name!r} in {', '.join(f.id for f in figures)}"
                f"{_nearest(name, known)}: it has {', '.join(sorted(known))}."
            )


def parse_assignments(pairs: Iterable[str]) -> dict[str, str]:
    """``["a=1", "b=x=y"]`` -> ``{"a": "1", "b": "x=y"}``.

    :raises UserError: no equals sign, or the same name twice.
    """
    values: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        name = name.strip()
        if not equals or not name:
            raise UserError(f"Parameter {pair!r} is not of the form name=value.")
        if name in values:
            raise UserError(f"Parameter {name} is given twice: give it once.")
        values[name] = value
    return values


def notebook_cells(notebook: Path) -> list[dict[str, Any]]:
    """The cells as {type, source, tags}: what a notebook says, without what it once printed.

    :raises UserError: it is no notebook.
    """
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        return [
            {
                "type": cell["cell_type"],
                "source": "".join(cell["source"]),
                "tags": sorted(cell.get("metadata", {}).get("tags", [])),
            }
            for cell in cells
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{notebook} cannot be read as a notebook: {error}.") from error


def _figure(notebook: Path, module: Path) -> Figure:
    sources = [c["source"] for c in notebook_cells(notebook) if "parameters" in c["tags"]]
    parameters = _parameters(sources[0], notebook) if len(sources) == 1 else {}
    if OUT_DIR not in parameters:
        raise UserError(
            f"{notebook} needs one cell tagged 'parameters' with a line "
            f'`{OUT_DIR} = "."  # str: folder for the figure`.'
        )
    constants: dict[str, Any] = {}
    functions: set[str] = set()
    for node in _parse(module.read_text(encoding="utf-8"), module).body:
        if isinstance(node, ast.FunctionDef):
            functions.add(node.name)
        elif (name := _target(node)) in ("TITLE", "PROVENANCE", "DATA", "INSTEAD"):
            constants[name] = _literal(node, module)
    provenance = constants.get("PROVENANCE", ())
    data = constants.get("DATA", ())
    return Figure(
        id=notebook.stem,
        notebook=notebook,
        module=module,
        parameters=parameters,
        title=constants.get("TITLE", ""),
        provenance=(provenance,) if isinstance(provenance, str) else tuple(provenance),
        data=(data,) if isinstance(data, str) else tuple(data),
        functions=frozenset(functions),
        instead=tuple(constants.get("INSTEAD", ())),
    )


def _parameters(source: str, notebook: Path) -> dict[str, Parameter]:
    return {
        name: Parameter(name, _literal(node, notebook))
        for node in _parse(source, notebook).body
        if (name := _target(node))
    }


def _parse(source: str, where: Path) -> ast.Module:
    try:
        return ast.parse(source)
    except SyntaxError as error:
        raise UserError(f"{where} does not parse: {error}.") from error


def _target(node: ast.stmt) -> str:
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return node.target.id
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        return node.targets[0].id
    return ""


def _literal(node: ast.stmt, where: Path) -> Any:
    try:
        return ast.literal_eval(node.value)  # type: ignore[attr-defined]
    except ValueError as error:
        raise UserError(
            f"{where}: {_target(node)} must be a literal, so that it can be read without running."
        ) from error


def _convert(given: object, kind: type) -> Any:
    if not isinstance(given, str):
        if kind in (float, type(None)) or isinstance(given, kind):
            return float(given) if kind is float else given  # type: ignore[arg-type]
        raise TypeError
    if kind is bool:
        return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[
            given.lower()
        ]
    if kind in (int, float, str):
        return kind(given)
    if kind is type(None):
        return given
    value = json.loads(given)
    if kind is tuple and isinstance(value, list):
        return tuple(value)
    if not isinstance(value, kind):
        raise TypeError
    return value


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.4)
    return f" (did you mean {close[0]}?)" if close else ""


def _natural(name: str) -> list[tuple[str, int]]:
    return [(text, int(digits or 0)) for text, digits in re.findall(r"(\D*)(\d*)", name)]
