"""The page that a package registry shows: the README, without links that only work beside it.

All else of the package stands in pyproject.toml. With a `Repository` among its `[project.urls]`, links and pictures
lead there; without one, links become their text, and pictures are left out.
"""

import re
from pathlib import Path

from setuptools import setup

_LINK = re.compile(r"(!?)\[([^]]*)\]\((?![a-z]+:)([^)\s]+)\)")
"""Of Markdown, to a file beside the README."""


def registry_page(readme: str, repository: str | None) -> str:
    """Returns the README as it can stand alone.

    Args:
        readme: Markdown.
        repository: Address of the project's repository; None: it has none.
    """

    def stand_alone(link: re.Match[str]) -> str:
        picture, text, target = link.groups()
        if repository is None:
            return "" if picture else text
        return f"{picture}[{text}]({repository.rstrip('/')}/{'raw' if picture else 'blob'}/main/{target})"

    lines = []
    for line in readme.splitlines(keepends=True):
        alone = _LINK.sub(stand_alone, line)
        if alone == line or re.search(r"\w", alone):  # else it held nothing but pictures
            lines.append(alone)
    return "".join(lines)


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    address = re.search(r'^Repository = "(.+)"$', (here / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    setup(
        long_description=registry_page(
            (here / "README.md").read_text(encoding="utf-8"), address.group(1) if address else None
        ),
        long_description_content_type="text/markdown",
    )
