"""One real server and one real page in headless Chromium for the tests of this folder.

Screenshots of what each test saw lie in `demo_output/browser/`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from playwright.sync_api import sync_playwright

from demo.server import ComfyServer, free_port
from scripts.setup import NO_BROWSER, find_browser

from .page import SCREENSHOTS, ComfyPage

# No sound, no graphics card, and nothing that calls home.
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="module")
def browser_path() -> str:
    """Where Chromium is. Without one the tests are skipped, and on CI they fail."""
    found = find_browser()
    if found is not None:
        return found
    if os.environ.get("CI"):
        pytest.fail(NO_BROWSER)
    pytest.skip(f"THE PAGE WAS NOT TESTED: {NO_BROWSER}")


@pytest.fixture(scope="module")
def page_server(browser_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    log = tmp_path_factory.mktemp("browser") / "server.log"
    with ComfyServer(free_port(), log=log, arguments=["--preview-method", "latent2rgb"]) as running:
        yield running


# Not for longer than its module: while Playwright is open, this thread has a running event loop that no other may join.
@pytest.fixture(scope="module")
def opened(browser_path: str, page_server: ComfyServer) -> Iterator[ComfyPage]:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    for old in SCREENSHOTS.glob("*.png"):
        old.unlink()
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser_path, headless=True, args=list(FLAGS))
        context = chromium.new_context(viewport={"width": 1400, "height": 900}, locale="en-US")
        page = ComfyPage(context.new_page(), page_server.url)
        # Without it the page greets a newcomer with the list of templates.
        page.set_setting("Comfy.TutorialCompleted", True)
        page.set_setting("Comfy.VueNodes.Enabled", False)
        page.visit()
        yield page
        chromium.close()


@pytest.fixture
def page(opened: ComfyPage, request: pytest.FixtureRequest) -> Iterator[ComfyPage]:
    """The page with an empty canvas. What it shows at the end of the test is kept."""
    opened.clear()
    yield opened
    opened.screenshot(SCREENSHOTS / f"{request.node.name}.png")
