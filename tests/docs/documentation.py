"""What README.md and the pages in docs/ show: command lines, code blocks, markers."""

import re
import shlex
from collections.abc import Iterator
from typing import NamedTuple

from paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

_FENCE = re.compile(r"\s*```(\w*)")
_NEEDS = re.compile(r"\s*<!-- needs: (.+) -->")
_NEEDS_ON_PAGE = re.compile(r"<!-- needs on this page: (.+) -->")
_SHELL = ("", "bash")
_OPERATORS = set("();<>|&")


class Command(NamedTuple):
    """One command line of a page."""

    page: str
    """Relative to the repository."""
    line: int
    """Where its block begins, from 1."""
    words: list[str]
    """As the shell would pass them on; variables stay as they are written."""
    needs: str | None
    """What it takes that a test cannot have, as the marker before its block says."""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {shlex.join(self.words)}"


def commands() -> Iterator[Command]:
    """Yields every command of every shell block: fenced and of no language or bash, or indented by four spaces.

    A block that a test cannot run has the line ``<!-- needs: WHAT -->`` before it; at the top of a page
    ``<!-- needs on this page: WHAT -->`` speaks for all of its blocks.
    """
    for page in PAGES:
        text = page.read_text()
        on_page = _NEEDS_ON_PAGE.search(text)
        name = page.relative_to(ROOT).as_posix()
        for line, needs, block in _shell_blocks(text.splitlines()):
            for words in _split(block):
                yield Command(name, line, words, needs or (on_page[1] if on_page else None))


def _shell_blocks(lines: list[str]) -> Iterator[tuple[int, str | None, list[str]]]:
    """Yields line number, marker and lines of each block that can hold commands."""
    needs, number = None, 0
    while number < len(lines):
        line, start = lines[number], number
        fence = _FENCE.match(line)
        if fence:
            number = next(i for i in range(start + 1, len(lines)) if lines[i].strip() == "```")
            if fence[1] in _SHELL:
                yield start + 1, needs, lines[start + 1 : number]
            needs = None
        elif line.startswith("    ") and (start == 0 or not lines[start - 1].strip()):
            while number + 1 < len(lines) and lines[number + 1].startswith("    "):
                number += 1
            block = lines[start : number + 1]
            if not any(_FENCE.match(other) for other in block):
                yield start + 1, needs, block
                needs = None
            else:  # a fenced block inside a list
                number = start
        elif match := _NEEDS.match(line):
            needs = match[1]
        elif line.strip():
            needs = None
        number += 1


def _split(block: list[str]) -> Iterator[list[str]]:
    """Yields the commands of a block, without comments, assignments before them, redirections and control words."""
    for line in re.sub(r"\\\n\s*", " ", "\n".join(block)).splitlines():
        lexer = shlex.shlex(line.strip(), posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        try:
            tokens = list(lexer)
        except ValueError:  # prose with an apostrophe, in an indented paragraph
            continue
        words: list[str] = []
        for token in tokens:
            if set(token) <= _OPERATORS:
                break
            words.append(token)
        while words and (words[0] == "srun" or re.fullmatch(r"\w+=\S*", words[0])):
            words = words[1:]
        if words:
            yield words
