"""The documentation site: it builds without a warning, and nothing in it leads nowhere."""

import ast
import importlib
import importlib.util
import os
import re
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
from conftest import ROOT

import supcon_jax
from supcon_jax import config as configuration
from supcon_jax.__main__ import COMMANDS

DOCS = ROOT / "docs"
PAGES = [path.relative_to(DOCS).with_suffix("") for path in sorted(DOCS.rglob("*.md"))]
# Modules all of whose public functions and classes are in the API pages, but for these.
WHOLE = {
    "losses": {"with_margin"},
    "models": {"DEPTHS", "ENCODERS"},
    "data.augment": {"one_by_one"},
    "data.policies": set(),
    "inference": {"apply_to_files", "preprocess"},
    "evaluation.knn": set(),
    "evaluation.probe": set(),
    "evaluation.confusion": {"Confused"},
    "evaluation.calibration": {"Reliability", "of_bins"},
    "evaluation.corruptions": {"CorruptionError"},
    "evaluation.class_means": {"check_references"},
}
ALONE = (
    "config.base",
    "config.load",
    "train.train_and_evaluate",
    "evaluate.evaluate",
    "embed.embed_images",
    "predict.predict_images",
    "search.nearest",
    "export.export_run",
    "explore.explore",
    "suites.open_subject",
    "data.sources.from_arrays",
    "data.sources.decoder",
)


def load(name):
    """A module of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(site, *options):
    """`mkdocs build` as `make docs` does it, into another folder."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    return subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)


class Page(HTMLParser):
    """The anchors of a page, what it links to, and what a browser loads with it."""

    def __init__(self, text):
        super().__init__()
        self.anchors, self.links, self.loaded = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.anchors |= {given[key] for key in ("id", "name") if given.get(key)}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if given.get("src"):
            self.loaded.append(given["src"])
        if tag == "link" and given.get("rel") in ("stylesheet", "icon", "preconnect"):
            self.loaded.append(given["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """`{place in the site: page}` of the built site, and its folder."""
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {path: Page(path.read_text()) for path in folder.rglob("*.html")}
    return folder, found


def lead_nowhere(folder, pages):
    """Links and loaded files of a site that are not there, or that another machine has to serve."""
    for place, page in pages.items():
        if place.name == "404.html":  # its links begin at the root of the server
            continue
        for target in page.loaded:
            if re.match(r"(https?:)?//", target):
                yield place, target
        for target in page.links + page.loaded:
            path, anchor = urldefrag(target)
            if re.match(r"[a-z]+:|//", target):
                continue
            there = Path(os.path.normpath(place.parent / unquote(path))) if path else place
            there = there / "index.html" if there.is_dir() else there
            anchored = not anchor or there not in pages or unquote(anchor) in pages[there].anchors
            if not there.is_file() or not anchored or folder not in there.parents:
                yield place, target


@pytest.mark.slow
def test_every_page_is_built(site):
    folder, pages = site
    assert len(PAGES) > 15
    for name in PAGES:
        html = folder / (name.parent if name.name == "index" else name) / "index.html"
        assert html in pages, name


@pytest.mark.slow
def test_links_lead_somewhere_and_nothing_is_loaded_from_elsewhere(site):
    folder, pages = site
    assert sum(len(page.links) for page in pages.values()) > 1000
    assert list(lead_nowhere(folder, pages)) == []


@pytest.mark.slow
def test_a_link_to_a_missing_file_is_seen(site):
    folder, pages = site
    place = folder / "index.html"
    for link in ("nowhere/", "loss/#no-such-heading", "../../outside.html"):
        broken = {**pages, place: Page(f'<a href="{link}">')}
        assert list(lead_nowhere(folder, broken)) == [(place, link)]
    assert [*lead_nowhere(folder, {place: Page('<script src="//cdn.com/x.js">')})]


@pytest.mark.slow
def test_pictures_of_experiments_are_in_the_site(site):
    folder, pages = site
    loaded = pages[folder / "first_run" / "index.html"].loaded
    assert "../experiments/digits/curves.png" in loaded
    copied = (folder / "experiments/digits/curves.png").read_bytes()
    assert copied == (ROOT / "experiments/digits/curves.png").read_bytes()


@pytest.mark.slow
def test_every_public_function_is_in_the_api(site):
    _, pages = site
    anchors = {a for place, page in pages.items() if "api" in place.parts for a in page.anchors}
    expected = {f"supcon_jax.{name}" for name in (*supcon_jax.__all__, *ALONE)}
    for module, left_out in WHOLE.items():
        public = names(module)
        assert left_out <= public, f"{module}: {left_out - public} is not there"
        expected |= {f"supcon_jax.{module}.{name}" for name in public - left_out}
    expected = {e.replace("supcon_jax.losses.", "supcon_jax.") for e in expected}
    assert not expected - anchors


def names(module):
    """Of a package its `__all__`, of a module its public functions and classes."""
    found = importlib.import_module(f"supcon_jax.{module}")
    if hasattr(found, "__all__"):
        return set(found.__all__)
    tree = ast.parse(Path(found.__file__).read_text())
    defined = (n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef))
    return {n.name for n in defined if not n.name.startswith("_")}


@pytest.mark.slow
def test_what_a_function_returns_is_not_taken_for_a_type(site):
    """`Returns:` with a colon in its first line: what is before it is shown as a type."""
    folder, _ = site
    section = re.compile(r">Returns:</span></p>\s*<ul>\s*<li[^>]*>.*?<code>(.*?)</code>", re.DOTALL)
    text = "".join(path.read_text() for path in folder.glob("api/*/index.html"))
    plain = (unescape(re.sub(r"<[^>]*>", "", found)) for found in section.findall(text))
    types = [re.sub(r"'.*?'", "", one) for one in plain]
    assert len(types) > 50
    assert not [one for one in types if re.search(r"[a-z] [a-z]", one)]


@pytest.mark.slow
def test_a_dead_link_fails_the_build(tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    text = (ROOT / "mkdocs.yml").read_text()
    text = re.sub(r"(?ms)^nav:.*?(?=^theme:)", "", text).replace("docs/hooks.py", "hooks.py")
    (tmp_path / "mkdocs.yml").write_text(text)
    (tmp_path / "hooks.py").write_text((DOCS / "hooks.py").read_text())
    (docs / "site.css").touch()
    (docs / "index.md").write_text("# One\n\n[itself](#one)\n")
    options = ("--config-file", str(tmp_path / "mkdocs.yml"))
    assert build(tmp_path / "site", *options).returncode == 0
    for link in ("nowhere.md", "#two", "../nowhere.png", "../LICENSES"):
        (docs / "index.md").write_text(f"# One\n\n[elsewhere]({link})\n")
        assert build(tmp_path / "site", *options).returncode != 0, link


@pytest.mark.parametrize("name", sorted({*COMMANDS} - {"doctor"}))  # which has no options
def test_every_option_of_a_command_is_on_its_page(name):
    text = (DOCS / "api" / "commands.md").read_text()
    section = text.split(f"::: supcon_jax.{name}\n")[1].split(":::")[0]
    tree = ast.parse((ROOT / "supcon_jax" / f"{name.replace('.', '/')}.py").read_text())
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and n.args]
    given = [n.args[0] for n in calls if isinstance(n.func, ast.Attribute)
             and re.match(r"add_argument$|DEFINE_(?!config)", n.func.attr)]  # fmt: skip
    options = {a.value.lstrip("-") for a in given if isinstance(a, ast.Constant)}
    options -= {"workdirs", "dataset"}  # which have no dashes
    assert options
    assert not {o for o in options if f"`--{o}`" not in section}


def test_links_out_of_docs_lead_to_the_repository():
    hooks = load("hooks")
    text = (
        "[a](../experiments/README.md#claims) [b](loss.md) ![c](../experiments/digits/curves.png)\n"
        "[d](../experiments) [e](https://x.org)\n\n```text\n[f](../LICENSE)\n```\n[g](../LICENSE)"
    )
    page = type("Page", (), {"file": type("File", (), {"src_uri": "first_run.md"})})
    config = type("Config", (), {"repo_url": "https://host/us"})
    assert hooks.on_page_markdown(text, page, config) == (
        "[a](https://host/us/blob/main/experiments/README.md#claims) [b](loss.md) "
        "![c](experiments/digits/curves.png)\n"
        "[d](https://host/us/tree/main/experiments) [e](https://x.org)\n\n"
        "```text\n[f](../LICENSE)\n```\n[g](https://host/us/blob/main/LICENSE)"
    )
    assert hooks.outside("api/data.md", "../data.md") is None
    assert hooks.outside("api/data.md", "../../README.md") == "README.md"
    assert hooks.replaced("![x](../../a.png)", "api/data.md", "") == "![x](../a.png)"


def test_tables_of_fields_are_as_the_code_has_them():
    fields = load("fields")
    page = fields.PAGE.read_text()
    assert fields.updated(page) == page, "python docs/fields.py writes them anew"
    rows = re.findall(r"^\| `([\w.]+)` \|", page, re.MULTILINE)
    stages = "|".join(configuration.STAGES)
    declared = configuration.flatten(configuration.base())
    assert set(rows) == {re.sub(rf"^({stages})\.", "", name) for name in declared}


def test_a_field_without_a_comment_is_refused():
    with pytest.raises(ValueError, match=r"data\.new: no comment"):
        load("fields").section("Data", {"data.new": 1}, {"data.old": "something"})


def test_every_trouble_has_a_number_to_look_at_its_meaning_and_a_remedy():
    sections = (DOCS / "troubleshooting.md").read_text().split("\n### ")[1:]
    assert len(sections) > 40
    for section in sections:
        parts = re.findall(r"^- \*\*(Look at|Means:|Do:)\*\*", section, re.MULTILINE)
        assert parts == ["Look at", "Means:", "Do:"], section.splitlines()[0]
