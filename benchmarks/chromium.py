"""Chromium without a window and without a network, driven by selenium."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")

_FLAGS = (
    *("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "no-first-run"),
    *("disable-background-networking", "disable-component-update", "disable-sync"),
    *("disable-default-apps", "window-size=1280,1000", "host-resolver-rules=MAP * ~NOTFOUND"),
)


@contextmanager
def chromium(profile: Path) -> Iterator[Any]:
    """A driver for the time inside.

    Args:
        profile: A folder for what the browser keeps.
    """
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    os.environ.update(SE_OFFLINE="true", SE_AVOID_STATS="true")
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*_FLAGS, f"user-data-dir={profile}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(executable_path=DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def resized(driver: Any, width: int, height: int) -> None:
    """Give the page this size in CSS pixels; a window can't be as narrow as a phone."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def wait_for(look: Callable[[], Any], what: str, patience: float = 120.0) -> Any:
    """What `look` finds, as soon as it finds something.

    Raises:
        TimeoutError: If it found nothing for `patience` seconds.
    """
    deadline = time.monotonic() + patience
    while not (found := look()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not appear within {patience:.0f} s")
        time.sleep(0.02)
    return found
