"""The screenshots of the documentation: the explore page of a run, and TensorBoard of some runs.

    python -m experiments.first_hour.screenshots explore runs/photos/explore.html
    python -m experiments.first_hour.screenshots tensorboard runs/demo

Needs Chromium with its driver, and Selenium (the extra `dev`). Writes docs/NAME.png, or --out.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from browser import alone, eventually, opened, point_at, points_of

DOCS = Path(__file__).resolve().parents[2] / "docs"
PORT = 16006
DRAWN = 8  # seconds that TensorBoard takes for its curves


def explore(page: Path, file: Path) -> None:
    """The page with the pointer on the image that was clicked, the one farthest from all others."""
    with opened(page) as browser:
        eventually(browser, lambda: browser.execute_script("return Bokeh.documents.length"))
        points = points_of(browser)
        i = alone(points["x"], points["y"])
        point_at(browser, "map", float(points["x"][i]), float(points["y"][i])).click().perform()
        time.sleep(1)
        browser.save_screenshot(str(file))


def tensorboard(runs: Path, file: Path) -> None:
    """The curves of the contrastive stage, of all runs in a folder."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(runs), "--port", str(PORT)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        time.sleep(DRAWN)
        address = f"http://localhost:{PORT}/?tagFilter=supcon#timeseries"
        with opened(address, 1600, 1000) as browser:
            time.sleep(DRAWN)
            browser.find_element("css selector", ".settings-button").click()  # closes its panel
            time.sleep(1)
            browser.save_screenshot(str(file))
    finally:
        server.terminate()


PAGES = {"explore": explore, "tensorboard": tensorboard}


def main() -> None:
    parser = argparse.ArgumentParser(description="Screenshots of the documentation.")
    parser.add_argument("name", choices=PAGES)
    parser.add_argument("of", type=Path, help="the explore page, or a folder of runs")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    PAGES[options.name](options.of.resolve(), options.out or DOCS / f"{options.name}.png")


if __name__ == "__main__":
    main()
