"""Edits to a workflow in API form. Nodes are found by their title; each edit returns a new graph."""

import copy
import json
from pathlib import Path
from typing import Any

Graph = dict[str, dict[str, Any]]
"""Node id -> {"class_type", "inputs", "_meta": {"title"}}; an input is a value or a link [node id, output index]."""

_MASK_OUTPUT = 1  # of LoadImage, and of Demo Picture


class GraphError(Exception):
    """The workflow has not the node that was asked for."""


def load_graph(path: Path) -> Graph:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GraphError(f"{path} is no workflow in API form: {error}") from error


def node_titled(graph: Graph, title: str) -> str:
    """The id of the one node with this title."""
    titles = {node_id: str(node.get("_meta", {}).get("title")) for node_id, node in graph.items()}
    found = [node_id for node_id, own in titles.items() if own == title]
    if len(found) != 1:
        raise GraphError(
            f"the workflow has {len(found)} nodes titled {title!r}, exactly one is needed. "
            f"Its titles: {', '.join(sorted(titles.values()))}"
        )
    return found[0]


def with_inputs(graph: Graph, title: str, **inputs: Any) -> Graph:
    """Sets inputs of the node with this title; refuses one the node has not got."""
    node_id = node_titled(graph, title)
    unknown = inputs.keys() - graph[node_id]["inputs"].keys()
    if unknown:
        own = ", ".join(graph[node_id]["inputs"])
        raise GraphError(f"the node titled {title!r} has no input {', '.join(sorted(unknown))}; it has: {own}")
    edited = copy.deepcopy(graph)
    edited[node_id]["inputs"].update(inputs)
    return edited


def with_picture(graph: Graph, title: str, name: str) -> Graph:
    """Puts LoadImage with this picture of the input folder where the picture with this title is; links stay.

    Demo Picture and LoadImage both give IMAGE and MASK, in this order.
    """
    edited = copy.deepcopy(graph)
    node = edited[node_titled(graph, title)]
    node["class_type"] = "LoadImage"
    node["inputs"] = {"image": name}
    return edited


def without_mask(graph: Graph, title: str) -> Graph:
    """Cuts the mask links that come from the picture with this title.

    For a picture without alpha LoadImage yields an empty mask, which would mean "no object", not "the whole picture".
    What works inside a mask only goes with it.
    """
    link = [node_titled(graph, title), _MASK_OUTPUT]
    edited = copy.deepcopy(graph)
    for node in edited.values():
        inputs = node["inputs"]
        cut = [name for name, value in inputs.items() if value == link]
        for name in cut:
            del inputs[name]
        if cut and "flatten" in inputs:
            inputs["flatten"] = 0.0
    return edited


def with_checkpoint(graph: Graph, checkpoint: str) -> Graph:
    """Loads this checkpoint instead of the demo model; both loaders give MODEL, CLIP and VAE in this order.

    The demo world's shapes are outlines; real ones have folds and features inside, which are not flattened away.
    """
    edited = copy.deepcopy(graph)
    for node in edited.values():
        if "flatten" in node["inputs"]:
            node["inputs"]["flatten"] = 0.0
    model = edited[node_titled(graph, "Model")]
    model["class_type"] = "CheckpointLoaderSimple"
    model["inputs"] = {"ckpt_name": checkpoint}
    return edited
