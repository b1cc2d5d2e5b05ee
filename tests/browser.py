"""Headless Chromium, where the machine has it with its driver."""

import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

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
PROGRAMS = [shutil.which("chromium"), shutil.which("chromedriver")]
needs_browser = pytest.mark.skipif(
    None in PROGRAMS, reason="needs Chromium and its driver: apt install chromium chromium-driver"
)


@contextmanager
def opened(page: Path, width: int = 1300, height: int = 1500):
    """A page in a window of this size, without a network; what it logs as wrong fails the test."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location, driver = PROGRAMS
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with tempfile.TemporaryDirectory() as profile:
        window = (f"--window-size={width},{height}", f"--user-data-dir={profile}")
        for option in (*OPTIONS, *window, "--host-resolver-rules=MAP * ~NOTFOUND"):
            options.add_argument(option)
        browser = webdriver.Chrome(options=options, service=Service(driver))
        try:
            browser.get(page.as_uri())
            yield browser
            assert [line for line in browser.get_log("browser") if line["level"] == "SEVERE"] == []
        finally:
            browser.quit()
