"""mkdocs hook: pages link to files of the repository beside ``docs``; the site gets those files and the links follow.

On a code host such links work as they stand. Here a linked file is copied below ``repository/`` in the site, and
what ``PAGES`` names becomes a page.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = {
    "benchmarks/README.md": "measuring.md",
    "benchmarks/results": "benchmarks.md",
    "CONTRIBUTING.md": "contributing.md",
}
LINK = re.compile(r"(?<=\]\()(?![a-z]+:)(?P<path>[^)#\s]+)(?P<anchor>#[^)\s]*)?(?=\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what pages link to."""
    for source, page in PAGES.items():
        if (REPOSITORY / source).is_file():
            text = (REPOSITORY / source).read_text(encoding="utf-8")
            files.append(File.generated(config, page, content=_rewrite(text, source, page)))
    for page in [file for file in files if file.is_documentation_page()]:
        for match in LINK.finditer(page.content_string):
            target = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page.src_uri), match["path"]))
            if _lies_outside(target) and files.get_file_from_path(_place(target)) is None:
                files.append(File.generated(config, _place(target), abs_src_path=str(REPOSITORY / target)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Point links to where ``on_files`` has put the files."""
    return _rewrite(markdown, f"docs/{page.file.src_uri}", page.file.src_uri)


def _rewrite(text: str, source: str, page: str) -> str:
    """Links of a file ``source`` of the repository, as they must be on the page."""

    def rewrite(match: re.Match) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match["path"]))
        if target.startswith("docs/"):
            place = target.removeprefix("docs/")
        elif _lies_outside(target):
            place = _place(target)
        else:
            return match[0]
        return posixpath.relpath(place, posixpath.dirname(page) or ".") + (match["anchor"] or "")

    return LINK.sub(rewrite, text)


def _lies_outside(target: str) -> bool:
    return target in PAGES or (not target.startswith(("docs/", "..")) and (REPOSITORY / target).is_file())


def _place(target: str) -> str:
    return PAGES.get(target, f"repository/{target}")
