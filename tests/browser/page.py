"""ComfyUI's page as somebody at a desk uses it: by mouse and keyboard where that is what is tested."""

from __future__ import annotations

import json
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Locator, Page
from playwright.sync_api import TimeoutError as WaitedTooLong

from demo.comfy import PACK

SCREENSHOTS = PACK / "demo_output" / "browser"
WAIT_SECONDS = 180
"""For anything: the machine may be busy with other things."""
_READY = "window.app?.graph && window.app.extensionManager && Object.keys(LiteGraph.registered_node_types).length > 100"
# The place of a node's input or output on the screen.
_PLACE = """([id, side, name]) => {
    const node = app.graph.getNodeById(id)
    const slots = side === 'input' ? node.inputs : node.outputs
    const names = slots.map(slot => slot.localized_name ?? slot.name)
    const index = names.indexOf(name)
    if (index < 0) throw new Error(`${node.type} has no ${side} ${name}, but ${names}`)
    const place = side === 'input' ? node.getInputPos(index) : node.getOutputPos(index)
    const [x, y] = app.canvas.convertOffsetToCanvas(place)
    const box = app.canvas.canvas.getBoundingClientRect()
    return [x + box.left, y + box.top]
}"""


class ComfyPage:
    """The page of the server at `url`. Node ids are those of the graph that was opened."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.url = url
        page.set_default_timeout(WAIT_SECONDS * 1000)

    def visit(self) -> None:
        """Opens the page, or opens it anew."""
        self.page.goto(self.url)
        self.wait_for(_READY)
        self.page.locator("#graph-canvas").wait_for(state="visible")

    def clear(self) -> None:
        """An empty canvas, with no dialog and no panel open."""
        for _ in range(2):
            self.page.keyboard.press("Escape")
        for layer in (self.dialog, self.page.locator(".p-dialog-mask")):  # while one fades, it takes the mouse
            layer.first.wait_for(state="detached")
        self.evaluate("() => { app.graph.clear(); app.canvas.ds.reset(); app.canvas.deselectAll() }")
        self.evaluate("() => app.extensionManager.toast.removeAll?.()")
        if self.panel.is_visible():
            self.evaluate("() => { app.extensionManager.sidebarTab.activeSidebarTabId = null }")
            self.panel.wait_for(state="hidden")
        if self.properties.is_visible():
            self.evaluate("() => app.extensionManager.setting.set('Comfy.RightSidePanel.IsOpen', false)")
            self.properties.wait_for(state="hidden")

    def open(self, graph: Mapping[str, Any]) -> None:
        """Shows a workflow in API form."""
        self.evaluate("graph => app.loadApiJson(graph, 'test')", dict(graph))
        self.wait_for(f"app.graph._nodes.length === {len(graph)}")
        self.evaluate("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")

    def open_search(self, x: int, y: int) -> None:
        """The search for nodes, by a double click on the canvas: again if a page that has just come did not listen."""
        typing = "document.activeElement.tagName === 'INPUT'"
        for _ in range(WAIT_SECONDS // 5):
            self.page.mouse.dblclick(x, y)
            try:
                self.page.wait_for_function(typing, timeout=5000)
                return
            except WaitedTooLong:
                continue
        raise AssertionError(f"no search opened within {WAIT_SECONDS} s")

    def run(self) -> None:
        self.page.get_by_test_id("queue-button").click()

    def cancel(self) -> None:
        self.page.get_by_role("button", name="Cancel current run").click()

    def wait_until_idle(self) -> None:
        """Until the server runs nothing."""
        for _ in range(WAIT_SECONDS):
            if not self.page.request.get(f"{self.url}/queue").json()["queue_running"]:
                return
            self.page.wait_for_timeout(1000)
        raise AssertionError(f"the server still runs something after {WAIT_SECONDS} s")

    def open_help(self) -> None:
        """Of the node that is selected, by the button above it; the oldest page names it by its class."""
        self.page.get_by_test_id("info-button").or_(self.page.locator(".help-button")).click()

    def add(self, kind: str, x: int, y: int) -> int:
        """A new node of this class; its id."""
        return self.evaluate(
            """([kind, x, y]) => {
                const node = LiteGraph.createNode(kind)
                node.pos = [x, y]
                app.graph.add(node)
                return node.id
            }""",
            [kind, x, y],
        )

    def connect(self, source: tuple[int, str], target: tuple[int, str]) -> None:
        """Drags a link from a node's output to a node's input with the mouse."""
        self.next_frames()
        start = self.evaluate(_PLACE, [source[0], "output", source[1]])
        end = self.evaluate(_PLACE, [target[0], "input", target[1]])
        mouse = self.page.mouse
        mouse.move(*start)
        mouse.down()
        mouse.move((start[0] + end[0]) / 2, (start[1] + end[1]) / 2, steps=5)
        mouse.move(*end, steps=5)
        mouse.up()
        self.page.keyboard.press("Escape")  # a link let go somewhere offers a list of nodes

    def next_frames(self, count: int = 4) -> None:
        """Lets the canvas draw, which is also when it notes where things are."""
        self.evaluate("async n => { for (; n > 0; n--) await new Promise(requestAnimationFrame) }", count)

    def linked(self, target: tuple[int, str]) -> bool:
        return self.evaluate(
            "([id, name]) => app.graph.getNodeById(id).inputs.find(input => input.name === name).link !== null",
            list(target),
        )

    def kinds(self) -> list[str]:
        """The classes of the nodes on the canvas."""
        return self.evaluate("app.graph._nodes.map(node => node.type)")

    def red(self) -> list[Any]:
        """The nodes that the page does not know, and shows in red."""
        return self.evaluate("app.graph._nodes.filter(node => node.has_errors).map(node => node.type)")

    def failed(self) -> Any:
        """The id of the node that is framed as the one where the run failed."""
        return self.evaluate("app.graph._nodes.find(node => node.strokeStyles.executionError.call(node))?.id")

    def upload(self, picture: Image.Image, name: str) -> str:
        """The name by which Load Image knows the picture."""
        buffer = BytesIO()
        picture.save(buffer, "PNG")
        file: Any = {"name": name, "mimeType": "image/png", "buffer": buffer.getvalue()}
        answer = self.page.request.post(f"{self.url}/upload/image", multipart={"image": file})
        self.evaluate("() => app.refreshComboInNodes()")  # the newer page marks pictures it has not heard of
        return answer.json()["name"]

    def told(self, words: str) -> str:
        """Waits until the page reports an error with these words; the whole text of the report."""
        corner = self.page.get_by_test_id("error-overlay")
        self.dialog.or_(corner).first.wait_for()
        if corner.is_visible():  # the newer page: a few words there, all in the panel at the right
            corner.get_by_role("button", name="View details").click()
        report = self.dialog.or_(self.properties).filter(has_text=words)
        report.wait_for()
        return report.inner_text()

    def set_setting(self, key: str, value: Any) -> None:
        """As in the settings dialog; some count from the next visit on."""
        assert self.page.request.post(f"{self.url}/api/settings/{key}", data=json.dumps(value)).ok

    @property
    def panel(self) -> Locator:
        """What is open at the left side: the node library, or in the older page a help page."""
        return self.page.locator(".side-bar-panel")

    @property
    def properties(self) -> Locator:
        """The newer page's panel at the right side: errors, help and inputs."""
        return self.page.get_by_test_id("properties-panel")

    @property
    def help(self) -> Locator:
        """The help page of a node, at the left side in the older page, at the right in the newer."""
        return self.page.locator(".node-help-content")

    @property
    def library_nodes(self) -> Locator:
        """The nodes in the node library: of the older page, and of the newer."""
        return self.panel.locator(".p-tree-node-leaf, [role=treeitem][draggable=true]")

    @property
    def alerts(self) -> Locator:
        """Warnings and errors in the corner."""
        return self.page.locator(".p-toast-message")

    @property
    def dialog(self) -> Locator:
        return self.page.get_by_role("dialog")

    def evaluate(self, script: str, argument: Any = None) -> Any:
        return self.page.evaluate(script, argument)

    def wait_for(self, condition: str, argument: Any = None) -> Any:
        return self.page.wait_for_function(condition, arg=argument).json_value()

    def screenshot(self, path: Path) -> None:
        self.page.screenshot(path=path)
