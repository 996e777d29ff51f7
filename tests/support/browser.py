"""A headless Chromium from the distribution, driven by Playwright."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser

#: Names of the program in Debian and in other distributions.
NAMES = ("chromium", "chromium-browser", "google-chrome")

#: No sandbox, as containers have none. No background activity, so that every request is the page's.
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


class BrowserUnavailableError(Exception):
    """There is no browser here; the message says why."""


@contextmanager
def browser() -> Iterator[Browser]:
    """Yield a browser.

    Raises:
        BrowserUnavailableError: No browser is installed, or it does not start.
    """
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError as error:
        raise BrowserUnavailableError(str(error)) from error
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        raise BrowserUnavailableError(f"none of {', '.join(NAMES)} is installed")
    with sync_playwright() as playwright:
        try:
            found = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        except Error as error:
            raise BrowserUnavailableError(f"{path} does not start: {error}") from error
        try:
            yield found
        finally:
            found.close()
