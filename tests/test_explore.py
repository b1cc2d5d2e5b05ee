"""The page of a run's test images, opened in a browser; and what it is made of."""

import base64
import io
import re

import numpy as np
import pytest
from browser import alone, eventually, needs_browser, opened, point_at, points_of
from PIL import Image
from short_runs import small

from supcon_jax import explore, train
from supcon_jax.evaluation import page
from supcon_jax.evaluation.tsne import tsne
from supcon_jax.suites import open_subject
from supcon_jax.trained import open_run

AWKWARD = "<b>&\"'"  # as the name of a class
TOOLTIPS = """
const found = []
const walk = (node) => {
  for (const child of node.querySelectorAll("*")) {
    if (child.shadowRoot) walk(child.shadowRoot)
    if (child.tagName == "IMG" && child.getRootNode() !== document) {
      found.push([child.src, child.getRootNode().textContent])
    }
  }
}
walk(document)
return found
"""


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "mine"
    train.train_and_evaluate(small(), workdir, pictures=False)
    return workdir


@pytest.fixture(scope="module")
def subject(workdir):
    return open_subject(open_run(workdir), "encoder", None, None)


@pytest.fixture(scope="module")
def html(workdir, tmp_path_factory):
    """The page that the command writes."""
    out = tmp_path_factory.mktemp("page") / "new" / "page.html"
    explore.main(["--workdir", str(workdir), "--images", "200", "--out", str(out)])
    return out


def panel(browser):
    return browser.execute_script(
        "return [document.querySelector('#panel h2').textContent, "
        "[...document.querySelectorAll('#panel .images figure')].map(f => [f.title, f.className, "
        "f.querySelector('b').textContent])]"
    )


@needs_browser
def test_hover_shows_the_image_and_a_click_its_neighbours(html, subject):
    with opened(html) as browser:
        eventually(browser, lambda: browser.execute_script("return Bokeh.documents.length"))
        points = points_of(browser)
        i = alone(points["x"], points["y"])
        mouse = point_at(browser, "map", float(points["x"][i]), float(points["y"][i]))
        (source, text), *others = eventually(browser, lambda: browser.execute_script(TOOLTIPS))
        assert source == points["thumbnail"][i] and not others
        assert f"label {points['label'][i]}" in " ".join(text.split())
        mouse.click().perform()
        place = points["place"][i]
        eventually(browser, lambda: panel(browser)[0] == f"Test image {place}")
        shown = panel(browser)[1]
    features = subject.test.features[points["place"].astype(int)]
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    cosines = unit @ unit[i]
    cosines[i] = -np.inf
    best = np.sort(cosines)[::-1][: page.NEIGHBOURS]
    row = {f"test image {p}": k for k, p in enumerate(points["place"])}
    found = [row[title] for title, _, _ in shown]
    np.testing.assert_allclose(cosines[found], best, atol=1e-5)
    for k, (_, kind, name) in zip(found, shown, strict=True):
        label = subject.test.labels[int(points["place"][k])]
        assert name == points["label"][k] == subject.class_names[label]
        assert kind == ("right" if name == points["label"][i] else "wrong")


@needs_browser
def test_a_click_on_a_cell_shows_its_images(html, subject):
    labels, predicted = subject.test.labels, subject.test.outputs.argmax(-1)
    matrix = np.zeros((10, 10), int)
    np.add.at(matrix, (labels, predicted), 1)
    row, column = np.argwhere((matrix > 0) & ~np.eye(10, dtype=bool))[0]
    with opened(html) as browser:
        eventually(browser, lambda: browser.execute_script("return Bokeh.documents.length"))
        points = points_of(browser)
        mouse = point_at(browser, "confusions", str(column), str(row))
        mouse.click().perform()
        eventually(browser, lambda: panel(browser)[0] == f"{row} taken for {column}")
        titles = [title for title, _, _ in panel(browser)[1]]
        said = browser.execute_script("return document.querySelector('#panel p').textContent")
    wanted = [p for p in points["place"] if (labels[int(p)], predicted[int(p)]) == (row, column)]
    assert titles == [f"test image {p}" for p in wanted]
    assert said == f"{matrix[row, column]} test images, {len(wanted)} of them shown"


@needs_browser
def test_names_of_classes_are_text_and_never_markup(tmp_path, subject):
    images, labels = subject.data.test.load(np.arange(40))
    names = (AWKWARD, *"bcdefghij")
    probabilities = np.full((40, 10), 0.05)
    probabilities[:, 0] = 0.55
    predicted = page.Predicted(labels, probabilities, names)
    thumbnails = [page.thumbnail(image) for image in images]
    features = images.reshape(40, -1).astype(np.float32)
    shown = page.Shown(np.arange(40), tsne(features), thumbnails, features)
    file = tmp_path / "page.html"
    file.write_text(page.page(AWKWARD, AWKWARD, predicted, shown, thumbnails[:3]))
    with opened(file) as browser:
        eventually(browser, lambda: browser.execute_script("return Bokeh.documents.length"))
        points = points_of(browser)
        i = alone(points["x"], points["y"])
        mouse = point_at(browser, "map", float(points["x"][i]), float(points["y"][i]))
        ((_, tip),) = eventually(browser, lambda: browser.execute_script(TOOLTIPS))
        mouse.click().perform()
        eventually(browser, lambda: panel(browser)[0] == f"Test image {i}")
        text = browser.execute_script("return document.querySelector('#panel').textContent")
        heading = browser.execute_script("return document.querySelector('h1').textContent")
        nested = browser.execute_script("return document.querySelectorAll('b b, p b').length")
    assert f"predicted {AWKWARD}" in " ".join(tip.split())
    assert (f"taken for {AWKWARD}" in text) == (labels[i] != 0)
    assert heading == AWKWARD and nested == 0


@needs_browser
def test_a_narrow_window_needs_no_sideways_scrolling(html):
    with opened(html, width=500) as browser:
        eventually(browser, lambda: browser.execute_script("return Bokeh.documents.length"))
        wide, window = browser.execute_script(
            "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
        )
    assert wide <= window


def test_the_page_loads_nothing_from_elsewhere(html):
    text = html.read_text()
    addresses = re.findall(r"<(?:script|link|img|iframe)\b[^>]*?\s(?:src|href)=\"([^\"]*)", text)
    assert len(addresses) == page.HARDEST and all(a.startswith("data:") for a in addresses)
    assert "200 of 360 test images of digits/test" in text
    assert "Classifier: the stage linear" in text


def test_hardest_images_come_first(html, subject):
    shown = re.findall(r'<figure class="(\w+)" title="test image (\d+)">', html.read_text())
    logits = subject.test.outputs.astype(np.float64)
    logits -= logits.max(1, keepdims=True)
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    of_label = probabilities[np.arange(360), subject.test.labels]
    order = np.argsort(of_label)[: page.HARDEST]
    assert len(shown) == page.HARDEST
    np.testing.assert_allclose(of_label[[int(p) for _, p in shown]], of_label[order], rtol=1e-4)
    right = probabilities.argmax(1) == subject.test.labels
    assert [kind == "right" for kind, _ in shown] == [bool(right[int(p)]) for _, p in shown]


@pytest.mark.parametrize("block", [7, 1024])
def test_neighbours_are_the_nearest_others(monkeypatch, subject, block):
    monkeypatch.setattr(page, "BLOCK", block)
    features = subject.test.features[:50]
    places, cosines = page.nearest(features, 5)
    for i in range(50):
        lengths = np.linalg.norm(features, axis=1)
        all_cosines = features @ features[i] / lengths / lengths[i]
        others = np.delete(np.arange(50), i)
        np.testing.assert_allclose(cosines[i], np.sort(all_cosines[others])[::-1][:5], atol=1e-5)
        np.testing.assert_allclose(all_cosines[places[i]], cosines[i], atol=1e-5)
        assert i not in places[i]
    assert page.nearest(features[:3], 5)[0].shape == (3, 2)


def test_thumbnails_keep_small_images_whole_and_make_large_ones_small():
    random = np.random.RandomState(0)
    for shape in [(8, 8, 1), (32, 32, 3), (200, 200, 3)]:
        image = random.randint(0, 256, shape).astype(np.uint8)
        address = page.thumbnail(image)
        decoded = Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))
        assert address.startswith(f"data:image/{decoded.format.lower()};base64,")
        if shape[0] <= page.THUMBNAIL:
            np.testing.assert_array_equal(np.asarray(decoded).reshape(shape), image)
        else:
            assert decoded.size == (page.THUMBNAIL, page.THUMBNAIL)


def test_maps_keep_groups_together_and_take_a_dead_encoder():
    random = np.random.RandomState(0)
    centres = np.repeat(np.eye(3), 20, axis=0)
    points = tsne((centres + 0.01 * random.randn(60, 3)).astype(np.float32))
    groups = points.reshape(3, 20, 2)
    spread = np.linalg.norm(groups - groups.mean(1, keepdims=True), axis=-1).max()
    between = np.linalg.norm(groups.mean(1)[:, None] - groups.mean(1), axis=-1)
    assert spread < between[~np.eye(3, dtype=bool)].min() / 2
    assert not tsne(np.ones((5, 4), np.float32)).any()


def test_a_run_without_a_classifier_is_judged_by_the_probe(tmp_path):
    train.train_and_evaluate(small(stages=("supcon",)), tmp_path / "run", pictures=False)
    subject = open_subject(open_run(tmp_path / "run"), "projection", None, None)
    text = explore.explore(subject, images=30)
    assert "Features: projection. Classifier: the fast probe." in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "1"], "a map needs at least 2 images; --images=1 was asked for"),
        (["--features", "head"], "no features 'head' in this run; there are encoder, projection"),
    ],
)
def test_bad_arguments_end_in_one_line(workdir, capsys, arguments, message):
    with pytest.raises(SystemExit):
        explore.main(["--workdir", str(workdir), *arguments])
    assert capsys.readouterr().err == f"error: {message}\n"


def test_a_folder_without_a_run_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        explore.main(["--workdir", str(tmp_path)])
    assert f"error: no finished run in {tmp_path}: it has no config.json" in capsys.readouterr().err
