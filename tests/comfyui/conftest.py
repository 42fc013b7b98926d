"""One real ComfyUI server for all tests below this folder; its log is shown with a test that fails."""

from collections.abc import Generator, Iterator

import pytest

from demo.client import ComfyClient
from demo.server import ComfyServer, free_port


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    log = tmp_path_factory.mktemp("comfyui") / "server.log"
    with ComfyServer(free_port(), log=log, arguments=["--preview-method", "latent2rgb"]) as running:
        yield running


@pytest.fixture
def client(server: ComfyServer) -> Iterator[ComfyClient]:
    with ComfyClient(server.url) as connected:
        yield connected


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    server = getattr(item, "funcargs", {}).get("server")
    if report.failed and server is not None:
        report.sections.append(("the end of ComfyUI's log", server.log_tail()))
    return report
