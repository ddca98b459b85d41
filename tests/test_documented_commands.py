"""Each command and option that the documentation names is one that the parsers take."""

from __future__ import annotations

import re
import shlex
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import tyro

from mla_study.cli import _FLAGS as FLAGS  # pyright: ignore[reportPrivateUsage]
from mla_study.cli import Program, RankProbe

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
OTHERS = {"--fixtures", "--nproc-per-node", "--tyro-write-completion"}
"""Options of pytest, torchrun and of every command that tyro makes."""
PROGRAMS = {"mla-study": Program, "rank-probe": RankProbe}
STARTS = re.compile(r"^(?:\S*/)?(mla-study|rank-probe)\s|^torchrun .*-m mla_study\s")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")

Parser = Any  # tyro has an ArgumentParser of its own


@lru_cache
def parser_of(program: str) -> Parser:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the one way to have all options
        kind = PROGRAMS[program]
        return tyro.extras.get_parser(  # pyright: ignore[reportDeprecated]
            kind, prog=program, config=FLAGS
        )


def subcommands(parser: Parser) -> dict[str, Parser]:
    choices = [action.choices for action in parser._actions if action.option_strings == []]
    return {name: one for held in choices if isinstance(held, dict) for name, one in held.items()}


def options(parser: Parser) -> set[str]:
    """Those of a parser and of all its subcommands."""
    own = set(parser._option_string_actions)
    return own.union(*(options(one) for one in subcommands(parser).values()))


def below(parser: Parser, words: list[str]) -> tuple[Parser, list[str]]:
    """The parser of the subcommand that words name, and what is left of them."""
    while words and words[0] in subcommands(parser):
        parser, words = subcommands(parser)[words[0]], words[1:]
    return parser, words


def code(page: Path) -> tuple[list[str], list[str]]:
    """Lines of code blocks, continued ones joined, and inline code."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    blocks += re.findall(r"^ {4}.*$", text, re.M)
    lines = "\n".join(block.removeprefix("    ") for block in blocks)
    lines = re.sub(r"\\\n\s*", "", lines)
    prose = "\n".join(line for line in text.splitlines() if not line.startswith("    "))
    inline = [" ".join(found.split()) for found in re.findall(r"`([^`]+)`", prose)]
    return lines.splitlines(), inline


def words_of(line: str) -> tuple[str, list[str]] | None:
    """(program, arguments) of a line with one of our commands; what a shell would eat is gone."""
    started = STARTS.match(line)
    if started is None:
        return None
    words = shlex.split(re.split(r" [|>] ", line[started.end() :])[0], comments=True)
    return started[1] or "mla-study", [word for word in words if word not in ("...", "…")]


def commands() -> list[tuple[str, str]]:
    """(page, line) of each of our commands in a code block."""
    return [
        (page.name, line) for page in PAGES for line in code(page)[0] if words_of(line) is not None
    ]


def test_the_pages_hold_commands_and_options() -> None:
    pages = {page for page, _ in commands()}
    assert {"README.md", "vbench.md"} <= pages and len(commands()) > 40
    named = set(OPTION.findall(" ".join(code(ROOT / "docs" / "vbench.md")[1])))
    assert {"--static-filter", "--no-static-filter", "--upstream-exact", "--anyway"} <= named


@pytest.mark.parametrize(("page", "line"), commands())
def test_a_command_of_a_code_block_is_taken_by_its_parser(
    page: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = words_of(line)
    assert found is not None
    program, words = found
    parser, rest = below(parser_of(program), words)
    assert program == "rank-probe" or parser.prog != program, f"{page}: no such command: {line}"
    unknown = set(OPTION.findall(" ".join(rest))) - options(parser) - {"--help"}
    assert not unknown, f"{page}: {line}"
    if "--help" in rest or "..." in line:
        return  # the line leaves out what the parser wants
    try:
        tyro.cli(PROGRAMS[program], prog=program, args=words, config=FLAGS)
    except SystemExit:
        pytest.fail(f"{page}: {line}\n{capsys.readouterr().err}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_an_option_of_inline_code_is_some_parsers(page: Path) -> None:
    ours = parser_of("mla-study")
    allowed = options(ours) | options(parser_of("rank-probe")) | OTHERS
    if page.name == "vbench.md":
        allowed = options(subcommands(ours)["vbench"])
    for text in code(page)[1]:
        found = words_of(f"{text} ")
        if found is None:
            assert not set(OPTION.findall(text)) - allowed, f"{page.name}: `{text}`"
            continue
        program, words = found
        parser, rest = below(parser_of(program), words)
        assert not set(OPTION.findall(" ".join(rest))) - options(parser) - OTHERS, (
            f"{page.name}: `{text}`"
        )
        named = [word for word in words if not word.startswith("-")]
        wanted = program == "rank-probe" or not named or parser.prog != program
        assert wanted, f"{page.name}: no such command: `{text}`"
