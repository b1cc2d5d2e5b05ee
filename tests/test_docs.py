"""Every snippet of the documentation runs, and prints what the page says."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SLOW = ("loss.md", "extending.md")  # half a minute and more
SNIPPET = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", re.DOTALL)
END = "-- end of the snippet --"


def run(page):
    """`[(code, what the page says, what it printed)]`, all snippets of a page in one process."""
    snippets = SNIPPET.findall(page.read_text())
    program = f'\nprint("{END}")\n'.join(code for code, _ in snippets)
    # As on a user's machine: the tests' settings of jax stay outside, but for their eight devices.
    flags = "--xla_force_host_platform_device_count=8"
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONWARNINGS": "error"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    printed = done.stdout.split(END)
    return [(code, said, out.strip()) for (code, said), out in zip(snippets, printed, strict=True)]


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] * (page.name in SLOW), id=page.name)
        for page in PAGES
        if "```python" in page.read_text()
    ],
)
def test_snippets_print_what_the_page_says(page):
    results = run(page)
    assert results
    for code, said, printed in results:
        assert printed == said.strip(), code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_and_headings_lead_somewhere(page):
    text = page.read_text()
    headings = {
        re.sub(r"[^\w\- ]", "", line.lower()).strip().replace(" ", "-")
        for line in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif not target.startswith(("http://", "https://")):
            assert (page.parent / target.split("#")[0]).exists(), target
