"""A headless Chromium, as Debian packages it, driven by Playwright."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser

#: As Debian's package calls it, and others do.
NAMES = ("chromium", "chromium-browser", "google-chrome")

#: No sandbox: containers have none. Nothing goes on by itself, so that each request is the page's.
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


class WeightsUnavailableError(Exception):
    """There is no browser here; the message says why."""


@contextmanager
def browser() -> Iterator[Browser]:
    """Give a browser for a while.

    Raises:
        WeightsUnavailableError: There is none, or it does not start.
    """
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError as error:
        raise WeightsUnavailableError(str(error)) from error
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        raise WeightsUnavailableError(f"none of {', '.join(NAMES)} is installed")
    with sync_playwright() as playwright:
        try:
            found = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        except Error as error:
            raise WeightsUnavailableError(f"{path} does not start: {error}") from error
        try:
            yield found
        finally:
            found.close()
