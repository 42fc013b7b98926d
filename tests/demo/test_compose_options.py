"""What `make demo` does before it talks to a server, and with what it gets back."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from demo import compose, world
from demo.comfy import ComfyUI
from demo.graph import Graph, GraphError, load_graph, node_titled, with_checkpoint, with_inputs, without_mask
from demo.sheet import contact_sheet

OURS = ComfyUI(Path("ours"), Path("python"), is_users=False)


@pytest.fixture
def graph() -> Graph:
    return load_graph(compose.WORKFLOW)


def users_comfyui(folder: Path) -> ComfyUI:
    return ComfyUI(folder, Path("python"), is_users=True)


def edited(graph: Graph, comfyui: ComfyUI, *arguments: str) -> Graph:
    options = compose.parse(list(arguments))
    return compose.edit(graph, options, compose.plan(options), comfyui)


def checkpoint(folder: Path, tensor: str) -> str:
    header = json.dumps({"__metadata__": {}, tensor: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}).encode()
    path = folder / "models" / "checkpoints" / "mine.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    return path.name


def encoders(graph: Graph) -> dict[str, dict]:
    """The inputs of the nodes that encode the references, by the title of the picture they are fed from."""
    found = {}
    for node in graph.values():
        if node["class_type"] == "ShapeAppearanceEncodeReference":
            found[graph[node["inputs"]["image"][0]]["_meta"]["title"]] = node["inputs"]
    return found


def save_picture(path: Path, mode: str, alpha: int = 255) -> Path:
    picture = Image.new("RGBA", (20, 10), (200, 100, 50, 255))
    picture.putpixel((3, 4), (200, 100, 50, alpha))
    picture.convert(mode).save(path)
    return path


def test_the_demo_pair_keeps_its_masks_and_the_workflow_its_size(graph: Graph) -> None:
    ready = edited(graph, OURS)

    assert all("mask" in inputs for inputs in encoders(ready).values())
    assert len(encoders(ready)) == 2
    assert ready[node_titled(ready, "Size")] == graph[node_titled(graph, "Size")]
    assert ready[node_titled(ready, "Prompt")]["inputs"]["text"] != ""


def test_only_the_picture_without_alpha_loses_its_mask(graph: Graph, tmp_path: Path) -> None:
    plain = save_picture(tmp_path / "plain.png", "RGB")
    masked = save_picture(tmp_path / "masked.png", "RGBA", alpha=0)

    ready = edited(graph, OURS, "--shape", str(plain), "--appearance", str(masked))

    inputs, kept = encoders(ready), [node_titled(graph, "Appearance image"), 1]
    assert "mask" not in inputs["Shape image"]
    assert inputs["Appearance image"]["mask"] == kept
    colours = ready[node_titled(ready, "Colours of the appearance")]["inputs"]
    assert "mask" not in colours and colours["reference_mask"] == kept


def test_an_opaque_alpha_channel_is_no_mask(tmp_path: Path) -> None:
    """It would come out of LoadImage as an empty mask: nothing of the picture would be the object."""
    assert compose.read_picture(save_picture(tmp_path / "opaque.png", "RGBA")).mode == "RGB"


def test_removing_a_mask_leaves_the_given_graph_as_it_was(graph: Graph) -> None:
    before = json.dumps(graph)
    without_mask(graph, "Shape image")
    with_inputs(graph, "Prompt", text="other")
    with_checkpoint(graph, "name")
    assert json.dumps(graph) == before


def test_a_checkpoint_replaces_the_loader_and_nothing_that_hangs_on_it(graph: Graph, tmp_path: Path) -> None:
    name = checkpoint(tmp_path, "first_stage_model.encoder.conv_in.weight")

    ready = edited(graph, users_comfyui(tmp_path), "--checkpoint", name)

    model = node_titled(graph, "Model")
    assert ready[model]["class_type"] == "CheckpointLoaderSimple"
    assert ready[model]["inputs"] == {"ckpt_name": name}
    links = [[v for v in node["inputs"].values() if isinstance(v, list)] for node in graph.values()]
    assert [[v for v in node["inputs"].values() if isinstance(v, list)] for node in ready.values()] == links


def test_a_checkpoint_without_the_users_comfyui_is_refused(graph: Graph) -> None:
    with pytest.raises(compose.BadOption, match=r"CHECKPOINT=mine\.safetensors needs COMFYUI_PATH"):
        edited(graph, OURS, "--checkpoint", "mine.safetensors")


@pytest.mark.parametrize(
    ("tensor", "side"),
    [
        ("cond_stage_model.transformer.text_model.embeddings.position_ids", 512),
        ("conditioner.embedders.1.model.ln_final.weight", 1024),
    ],
)
def test_the_size_fits_the_checkpoint(graph: Graph, tmp_path: Path, tensor: str, side: int) -> None:
    ready = edited(graph, users_comfyui(tmp_path), "--checkpoint", checkpoint(tmp_path, tensor))
    inputs = ready[node_titled(ready, "Size")]["inputs"]
    assert (inputs["width"], inputs["height"]) == (side, side)


def test_a_size_that_is_asked_for_goes_before_the_checkpoints(graph: Graph, tmp_path: Path) -> None:
    name = checkpoint(tmp_path, "conditioner.embedders.1.model.ln_final.weight")
    ready = edited(graph, users_comfyui(tmp_path), "--checkpoint", name, "--size", "768")
    assert ready[node_titled(ready, "Size")]["inputs"]["width"] == 768


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, struct.pack("<Q", 4) + b"nope"])
def test_a_checkpoint_that_cannot_be_read_is_taken_for_sd15_and_said_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    path = tmp_path / "odd.ckpt"
    path.write_bytes(content)
    assert compose.checkpoint_size(path) == 512
    assert "SIZE=" in capsys.readouterr().out


@pytest.mark.parametrize("size", ["0", "-8", "100"])
def test_a_size_the_latent_grid_cannot_hold_is_refused(graph: Graph, size: str) -> None:
    with pytest.raises(compose.BadOption, match=rf"SIZE={size}: .*multiple of 8"):
        edited(graph, OURS, "--size", size)


def test_the_prompt_is_the_given_one_else_the_demo_pairs_place_else_empty(tmp_path: Path) -> None:
    own = str(save_picture(tmp_path / "own.png", "RGB"))
    shape_of, appearance_of = world.demo_pair()
    *given, demo, without = [
        compose.plan(compose.parse(arguments)).prompt
        for arguments in (["--prompt", "mine"], ["--shape", own, "--prompt", "mine"], [], ["--shape", own])
    ]

    assert given == ["mine", "mine"]
    assert without == ""
    assert shape_of.background in demo
    # Shape and appearance have to come from the pictures.
    told = {shape_of.shape, appearance_of.appearance.colour, appearance_of.appearance.texture}
    assert not told & set(demo.split())


def test_own_pictures_have_no_truth_and_no_score(tmp_path: Path) -> None:
    job = compose.plan(compose.parse(["--shape", str(save_picture(tmp_path / "own.png", "RGB"))]))
    assert job.truth is None
    assert job.score is None


def test_the_demo_pair_is_uploaded_with_its_objects_transparent() -> None:
    shape_of, _ = world.demo_pair()
    rendered = world.render(shape_of)

    uploaded = np.asarray(compose.plan(compose.parse([])).shape, dtype=np.float32) / 255

    np.testing.assert_allclose(1 - uploaded[..., 3], rendered.mask, atol=0.5 / 255 + 1e-6)
    np.testing.assert_allclose(uploaded[..., :3], rendered.image, atol=0.5 / 255 + 1e-6)


def test_a_file_that_is_no_picture_is_named(tmp_path: Path) -> None:
    path = tmp_path / "notes.png"
    path.write_text("no picture")
    with pytest.raises(compose.BadOption, match=r"cannot read the picture .*notes\.png"):
        compose.read_picture(path)


def test_a_sideways_photograph_is_turned_upright(tmp_path: Path) -> None:
    picture = Image.new("RGB", (20, 10))
    exif = picture.getexif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    picture.save(tmp_path / "photo.jpg", exif=exif)
    assert compose.read_picture(tmp_path / "photo.jpg").size == (10, 20)


def test_a_missing_title_is_answered_with_those_there_are(graph: Graph) -> None:
    with pytest.raises(GraphError, match="0 nodes titled 'Nothing'.*Appearance image.*Prompt"):
        node_titled(graph, "Nothing")


def test_a_title_held_twice_is_refused(graph: Graph) -> None:
    twice = {**graph, "99": graph[node_titled(graph, "Prompt")]}
    with pytest.raises(GraphError, match="2 nodes titled 'Prompt'"):
        node_titled(twice, "Prompt")


def test_an_input_the_node_has_not_got_is_refused(graph: Graph) -> None:
    with pytest.raises(GraphError, match="'Prompt' has no input texts; it has: text, clip"):
        with_inputs(graph, "Prompt", texts="typing error")


def test_scores_are_written_with_the_truth_and_an_old_run_leaves_nothing(tmp_path: Path) -> None:
    job = compose.plan(compose.parse([]))
    assert job.truth is not None
    compose.save(tmp_path, job, job.truth)
    assert json.loads((tmp_path / "scores.json").read_text()).keys() == {"shape_iou", "appearance"}
    assert {path.name for path in tmp_path.iterdir()} == set(compose.RESULTS)

    compose.make_way(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_sheet_shows_small_pictures_unblurred_and_large_ones_whole() -> None:
    small = Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8))
    large = Image.new("RGB", (1024, 512), "blue")

    sheet = np.asarray(contact_sheet({"one": small, "two": large}))

    assert sheet.shape == (40 + 384 + 16, 16 + 2 * (384 + 16), 3)
    np.testing.assert_array_equal(sheet[40 : 40 + 384 : 3, 16 : 16 + 384 : 3], np.asarray(small))
    blue = (sheet == (0, 0, 255)).all(-1)
    assert blue.sum() == 384 * 192
