"""Links of a page that lead out of docs/: pictures are copied in, the rest leads to the repository.

MkDocs calls `on_files` and `on_page_markdown` by their names.
"""

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PICTURES = (".png", ".jpg", ".svg", ".gif")
CODE = re.compile(r"^(`{3,}).*?^\1", re.DOTALL | re.MULTILINE)
TARGET = re.compile(r"(?<=\]\()(\.\./[^)\s#]+)(#[^)\s]*)?(?=\))")
log = logging.getLogger("mkdocs.hooks.links")


def on_files(files: Files, config: Any) -> Files:
    """Add the pictures outside of docs/ that pages link to."""
    for page in files.documentation_pages():
        for link in TARGET.finditer(CODE.sub("", page.content_string)):
            path = outside(page.src_uri, link.group(1))
            known = path is None or files.get_file_from_path(path) is not None
            if not known and path.endswith(PICTURES) and (ROOT / path).is_file():
                files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Replace the links of a page that lead out of docs/."""
    blocks = CODE.finditer(markdown)
    result, end = "", 0
    for block in blocks:  # code stays as it is
        result += replaced(markdown[end : block.start()], page.file.src_uri, config.repo_url)
        result, end = result + block.group(), block.end()
    return result + replaced(markdown[end:], page.file.src_uri, config.repo_url)


def replaced(text: str, page: str, repository: str) -> str:
    """A text with the links of a page that lead out of docs/ replaced."""

    def one(link: re.Match) -> str:
        path, heading = outside(page, link.group(1)), link.group(2) or ""
        if path is None:
            return link.group()
        if not (ROOT / path).exists():
            log.warning("%s links to %s, which is not there", page, path)
        if path.endswith(PICTURES):
            return posixpath.relpath(path, posixpath.dirname(page) or ".")
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return f"{repository}/{kind}/main/{path}{heading}"

    return TARGET.sub(one, text)


def outside(page: str, target: str) -> str | None:
    """Path in the repository of a link that leads out of docs/, else None."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
    return None if path.startswith("docs/") else path
