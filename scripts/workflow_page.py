"""From a workflow's API form to what ComfyUI's page opens: nodes with places, links and widgets, and a note.

The API form says all that is computed; the page's form adds nothing but layout, titles and the note. A node id such as
`10:3` is node 3 inside the subgraph that node 10 of the page is.
"""

from __future__ import annotations

import math
import textwrap
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Graph = Mapping[str, Mapping[str, Any]]
"""API form: node id -> {"class_type", "inputs", "_meta": {"title"}}."""
Definitions = Mapping[str, Mapping[str, Any]]
"""What a server says of its nodes (`/object_info`), by class."""

WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
SEEDS = ("seed", "noise_seed")
PICTURES = ("SaveImage", "PreviewImage", "LoadImage", "ShapeAppearanceDemoPicture")
"""Nodes that show a picture when they have run."""
_WIDTH, _GAP, _ROW, _WIDGET, _TITLE = 290, 70, 20, 24, 30
_NOTE_WIDTH, _PICTURE, _TEXT = 420, 250, 90
_IN, _OUT = -10, -20
"""Ids of a subgraph's own input and output."""


class WorkflowError(Exception):
    """The API form does not fit the nodes that there are."""


@dataclass(frozen=True)
class Promoted:
    """What a subgraph shows outside: a name, and the input (node id inside, input name) or output (node id, index).

    Several inputs inside may take the same one from outside. An input of numbers becomes a slider.
    """

    name: str
    inside: tuple[tuple[str, str | int], ...]


@dataclass(frozen=True)
class Subgraph:
    """How the nodes `<id>:...` of an API form are folded into one."""

    id: str
    name: str
    inputs: tuple[Promoted, ...]
    outputs: tuple[Promoted, ...]


@dataclass
class _Node:
    """One node of the page while it is put together."""

    id: int
    type: str
    title: str
    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]
    values: list[Any]
    height: float
    properties: dict[str, Any] = field(default_factory=dict)
    pos: tuple[float, float] = (0, 0)

    def slot(self, name: str) -> int:
        return next(i for i, one in enumerate(self.inputs) if one["name"] == name)


def page(name: str, graph: Graph, note: str, definitions: Definitions, subgraph: Subgraph | None = None) -> dict:
    """The workflow as the page opens it. The same inputs always give the same file.

    Args:
        name: of the workflow; its identity is made of it.
        graph: its API form.
        note: Markdown for the artist, shown beside the nodes.
        definitions: of every class in the graph.
        subgraph: which of its nodes are folded into one.

    Raises:
        WorkflowError: a class or an input that the definitions do not know, or an input that is missing.
    """
    made: dict = {"id": _identity(name), "revision": 0}
    extra: dict[str, Any] = {}
    outer = dict(graph)
    nodes: dict[str, _Node] = {}
    if subgraph is not None:
        prefix = f"{subgraph.id}:"
        inner = {key.removeprefix(prefix): node for key, node in graph.items() if key.startswith(prefix)}
        outer = {key: node for key, node in graph.items() if not key.startswith(prefix)}
        folded, definition = _fold(name, subgraph, graph, inner, definitions)
        nodes[subgraph.id] = folded
        extra["definitions"] = {"subgraphs": [definition]}
    nodes |= {key: _node(int(key), node, definitions) for key, node in outer.items()}
    links = _links(outer, nodes, subgraph)
    if subgraph is not None:
        links += _links_inwards(graph, nodes, subgraph)
    _place(nodes, [(link[0], link[2]) for link in links])
    drawn = [_note(max(int(key) for key in nodes) + 1, note), *(_drawn(nodes[key]) for key in sorted(nodes, key=int))]
    ends = _numbered(nodes, links)
    for order, node in enumerate(drawn):
        node["order"] = order
    return {
        **made,
        "last_node_id": max(node["id"] for node in drawn),
        "last_link_id": len(ends),
        "nodes": drawn,
        "links": [[i, o, os, t, ts, kind] for i, (o, os, t, ts, kind) in enumerate(ends, 1)],
        "groups": [],
        **extra,
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def _identity(*words: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, "/".join(("shape-appearance", "workflows", *words))))


def _specs(node: Mapping[str, Any], definitions: Definitions) -> dict[str, tuple[Any, dict[str, Any]]]:
    """A class's inputs in order: name -> (type, options)."""
    kind = node["class_type"]
    if kind not in definitions:
        raise WorkflowError(f"there is no node {kind}")
    given = definitions[kind]["input"]
    found = {**given.get("required", {}), **given.get("optional", {})}
    unknown = node["inputs"].keys() - found.keys()
    missing = given.get("required", {}).keys() - node["inputs"].keys()
    if unknown or missing:
        raise WorkflowError(f"{kind}: unknown inputs {sorted(unknown)}, missing inputs {sorted(missing)}")
    return {key: (spec[0], dict(spec[1]) if len(spec) > 1 else {}) for key, spec in found.items()}


def _is_widget(kind: Any, options: Mapping[str, Any]) -> bool:
    return (isinstance(kind, list) or kind in WIDGETS) and not options.get("forceInput", False)


def _is_link(value: Any) -> bool:
    return isinstance(value, list)


def _node(number: int, node: Mapping[str, Any], definitions: Definitions) -> _Node:
    """Sockets first, then widgets, as the page orders them."""
    specs, info = _specs(node, definitions), definitions[node["class_type"]]
    sockets, widgets, values, height = [], [], [], 0.0
    for key, (kind, options) in specs.items():
        shown = "COMBO" if isinstance(kind, list) else kind
        optional = {"shape": 7} if key in info["input"].get("optional", {}) else {}
        if not _is_widget(kind, options):
            sockets.append({"name": key, "type": shown, **optional, "link": None})
            continue
        widgets.append({"name": key, "type": shown, **optional, "widget": {"name": key}, "link": None})
        value = node["inputs"].get(key, options.get("default"))
        values.append(options.get("default") if _is_link(value) else value)
        height += _TEXT if options.get("multiline") else _WIDGET
        if kind == "INT" and options.get("control_after_generate", key in SEEDS):
            values.append("fixed")
            height += _WIDGET
        if options.get("image_upload"):
            values.append("image")
            height += _WIDGET
    outputs = [
        {"name": name, "type": kind, "links": []}
        for name, kind in zip(info["output_name"], info["output"], strict=True)
    ]
    height += _ROW * max(len(sockets), len(outputs), 1) + 14
    height += _PICTURE if node["class_type"] in PICTURES else 0
    title = node.get("_meta", {}).get("title", info["display_name"])
    made = _Node(number, node["class_type"], title, sockets + widgets, outputs, values, height)
    made.properties = {"Node name for S&R": node["class_type"]}
    return made


_Link = tuple[str, int, str, str]
"""Origin id, output index, target id, input name."""


def _links(graph: Graph, nodes: Mapping[str, _Node], subgraph: Subgraph | None) -> list[_Link]:
    """Links between nodes on one level; those that come out of a subgraph leave its output."""
    found: list[_Link] = []
    for key, node in graph.items():
        for name, value in node["inputs"].items():
            if not _is_link(value):
                continue
            origin, index = str(value[0]), int(value[1])
            if subgraph is not None and origin.startswith(f"{subgraph.id}:"):
                inside = (origin.removeprefix(f"{subgraph.id}:"), index)
                slot = next((i for i, one in enumerate(subgraph.outputs) if inside in one.inside), None)
                if slot is None:
                    raise WorkflowError(f"node {key} takes {origin}, which the subgraph does not give out")
                origin, index = subgraph.id, slot
            found.append((origin, index, key, name))
    return found


def _links_inwards(graph: Graph, nodes: Mapping[str, _Node], subgraph: Subgraph) -> list[_Link]:
    """Links from outside to the subgraph's inputs. All that one of them feeds must take the same."""
    found: list[_Link] = []
    for one in subgraph.inputs:
        values = [graph[f"{subgraph.id}:{key}"]["inputs"][name] for key, name in one.inside]
        if any(value != values[0] for value in values):
            raise WorkflowError(f"the subgraph's input {one.name!r} would need several values: {values}")
        if _is_link(values[0]):
            found.append((str(values[0][0]), int(values[0][1]), subgraph.id, one.name))
    return found


def _numbered(nodes: Mapping[str, _Node], links: Sequence[_Link]) -> list[tuple[int, int, int, int, str]]:
    """Writes the links' numbers, from 1, into the slots; returns origin, slot, target, slot and type of each."""
    ends = []
    for number, (origin, index, target, name) in enumerate(links, 1):
        output, into = nodes[origin].outputs[index], nodes[target]
        slot = into.slot(name)
        output["links"].append(number)
        into.inputs[slot]["link"] = number
        ends.append((nodes[origin].id, index, into.id, slot, output["type"]))
    return ends


def _place(nodes: Mapping[str, _Node], links: Sequence[tuple[str, str]]) -> None:
    """Columns from left to right along the links."""
    before: dict[str, set[str]] = {key: set() for key in nodes}
    for origin, target in links:
        before[target].add(origin)
    column: dict[str, int] = {}

    def depth(key: str) -> int:
        if key not in column:
            column[key] = max((depth(one) + 1 for one in before[key]), default=0)
        return column[key]

    for key in nodes:
        depth(key)
    # Pictures and models stand on the left; all else just before what first needs it.
    for key in sorted(nodes, key=lambda key: -column[key]):
        after = [column[target] for origin, target in links if origin == key]
        if after and (before[key] or (nodes[key].type not in PICTURES and len(nodes[key].outputs) == 1)):
            column[key] = min(after) - 1
    for place in range(max(column.values()) + 1):
        top = 0.0
        for key in sorted((key for key, at in column.items() if at == place), key=int):
            nodes[key].pos = (place * (_WIDTH + _GAP), top)
            top += nodes[key].height + _TITLE + _GAP / 2


def _drawn(node: _Node) -> dict[str, Any]:
    return {
        "id": node.id,
        "type": node.type,
        "pos": list(node.pos),
        "size": [_WIDTH, node.height],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": node.inputs,
        "outputs": node.outputs,
        "title": node.title,
        "properties": node.properties,
        "widgets_values": node.values,
    }


def _note(number: int, text: str) -> dict[str, Any]:
    lines = sum(max(1, math.ceil(len(line) / 52)) for line in textwrap.dedent(text).splitlines())
    return {
        "id": number,
        "type": "MarkdownNote",
        "pos": [-_NOTE_WIDTH - _GAP, 0],
        "size": [_NOTE_WIDTH, 60 + 22 * lines],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "title": "What to do here",
        "properties": {},
        "widgets_values": [text],
        "color": "#432",
        "bgcolor": "#653",
    }


def _fold(
    name: str, subgraph: Subgraph, graph: Graph, inner: Graph, definitions: Definitions
) -> tuple[_Node, dict[str, Any]]:
    """The node outside and the definition of what is inside."""
    nodes = {key: _node(int(key), node, definitions) for key, node in inner.items()}
    prefix, promoted = f"{subgraph.id}:", {end for one in subgraph.inputs for end in one.inside}
    links: list[_Link] = []
    for key, node in inner.items():
        for input_name, value in node["inputs"].items():
            if _is_link(value) and (key, input_name) not in promoted:
                if not str(value[0]).startswith(prefix):
                    raise WorkflowError(f"{prefix}{key} takes {value[0]} from outside, which is no input of {name}")
                links.append((str(value[0]).removeprefix(prefix), int(value[1]), key, input_name))
    _place(nodes, [(link[0], link[2]) for link in links])
    ends = _numbered(nodes, links)
    drawn_links = [
        {"id": i, "origin_id": o, "origin_slot": os, "target_id": t, "target_slot": ts, "type": kind}
        for i, (o, os, t, ts, kind) in enumerate(ends, 1)
    ]
    identity = _identity(name, subgraph.name)
    right = max(node.pos[0] for node in nodes.values()) + _WIDTH + _GAP
    folded = _Node(int(subgraph.id), identity, subgraph.name, [], [], [], 0)
    ports: dict[str, list[dict[str, Any]]] = {"inputs": [], "outputs": []}

    def connect(link: dict[str, Any]) -> int:
        drawn_links.append({"id": len(drawn_links) + 1, **link})
        return len(drawn_links)

    sliders = []
    for slot, one in enumerate(subgraph.inputs):
        slots = [(nodes[key], nodes[key].slot(str(inside))) for key, inside in one.inside]
        kind = slots[0][0].inputs[slots[0][1]]["type"]
        numbers = []
        for node, at in slots:
            ends_at = {"target_id": node.id, "target_slot": at, "type": kind}
            node.inputs[at]["link"] = connect({"origin_id": _IN, "origin_slot": slot, **ends_at})
            numbers.append(node.inputs[at]["link"])
        value = inner[one.inside[0][0]]["inputs"][one.inside[0][1]]
        if _is_link(value):
            folded.inputs.append({"name": one.name, "type": kind, "link": None})
        else:
            sliders.append(one.name)
            folded.values.append(value)
        ports["inputs"].append(_port(identity, one.name, kind, numbers, "input", [-_GAP, slot * _ROW]))
    for slot, one in enumerate(subgraph.outputs):
        ((key, index),) = one.inside
        output = nodes[key].outputs[int(index)]
        number = connect(
            {
                "origin_id": nodes[key].id,
                "origin_slot": int(index),
                "target_id": _OUT,
                "target_slot": slot,
                "type": output["type"],
            }
        )
        output["links"].append(number)
        folded.outputs.append({"name": one.name, "type": output["type"], "links": []})
        ports["outputs"].append(
            _port(identity, one.name, output["type"], [number], "output", [right + 20, slot * _ROW])
        )
    folded.properties = {"proxyWidgets": [["-1", slider] for slider in sliders]}
    folded.height = _ROW * max(len(folded.inputs), len(folded.outputs)) + _WIDGET * len(sliders) + 14
    numbers = [node.id for node in nodes.values()]
    state = {"lastGroupId": 0, "lastNodeId": max(numbers), "lastLinkId": len(drawn_links), "lastRerouteId": 0}
    definition = {
        "id": identity,
        "version": 1,
        "state": state,
        "revision": 0,
        "config": {},
        "name": subgraph.name,
        "inputNode": {"id": _IN, "bounding": [-_GAP - 160, 0, 160, _ROW * (len(subgraph.inputs) + 2)]},
        "outputNode": {"id": _OUT, "bounding": [right, 0, 120, 60]},
        **ports,
        "widgets": [],
        "nodes": [{**_drawn(nodes[key]), "order": at} for at, key in enumerate(sorted(nodes, key=int))],
        "groups": [],
        "links": drawn_links,
        "extra": {},
    }
    return folded, definition


def _port(identity: str, name: str, kind: str, links: list[int], way: str, pos: list[float]) -> dict[str, Any]:
    own = str(uuid.uuid5(uuid.UUID(identity), f"{way}/{name}"))
    return {"id": own, "name": name, "type": kind, "linkIds": links, "pos": pos}
