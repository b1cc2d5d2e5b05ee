"""Headless Chromium, where the machine has it with its driver; and the explore page in it."""

import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
ALONE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost"
PROGRAMS = [shutil.which("chromium"), shutil.which("chromedriver")]
needs_browser = pytest.mark.skipif(
    None in PROGRAMS, reason="needs Chromium and its driver: apt install chromium chromium-driver"
)

# Where a point of a plot is in the window.
PLACE = """
const view = Bokeh.index.find_one(Bokeh.documents[0].get_model_by_name(arguments[0]))
const box = view.canvas.el.getBoundingClientRect()
const {x_scale, y_scale} = view.frame
return [box.left + x_scale.compute(arguments[1]), box.top + y_scale.compute(arguments[2])]
"""


@contextmanager
def opened(page: Path | str, width: int = 1300, height: int = 1500):
    """A page in a window of this size, without a network; what it logs as wrong fails the test.

    A file, or an address of this machine.
    """
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location, driver = PROGRAMS
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with tempfile.TemporaryDirectory() as profile:
        window = (f"--window-size={width},{height}", f"--user-data-dir={profile}")
        for option in (
            *OPTIONS,
            *window,
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost",
        ):
            options.add_argument(option)
        browser = webdriver.Chrome(options=options, service=Service(driver))
        try:
            browser.get(page if isinstance(page, str) else page.as_uri())
            yield browser
            assert [line for line in browser.get_log("browser") if line["level"] == "SEVERE"] == []
        finally:
            browser.quit()


def points_of(browser):
    """The table behind the map."""
    columns = browser.execute_script(
        "const source = Bokeh.documents[0].get_model_by_name('points')"
        "; return Object.fromEntries(Object.entries(source.data).map(([k, v]) => [k, [...v]]))"
    )
    return {name: np.array(values) for name, values in columns.items()}


def point_at(browser, plot, x, y):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.actions.action_builder import ActionBuilder

    left, top = browser.execute_script(PLACE, plot, x, y)
    action = ActionBuilder(browser)
    action.pointer_action.move_to_location(round(left), round(top))
    action.perform()
    return ActionChains(browser)


def eventually(browser, check):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 20).until(lambda _: check())


def alone(x, y):
    """The point that is farthest from the others."""
    points = np.stack([x, y], 1)
    far = np.linalg.norm(points[:, None] - points, axis=-1)
    np.fill_diagonal(far, np.inf)
    return int(far.min(1).argmax())
