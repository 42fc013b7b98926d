"""Bad input through the API: the message names the value, what was expected and the way out; the node is the right one.

A used port is tested in test_server.py, the demo's weights in tests/hosts/test_demo_weights.py.
"""

from typing import Any

import pytest

from demo.client import ComfyClient, ExecutionFailed, PromptRefused

from .graphs import custom, encoded, injected, node, pictures, rendered


@pytest.fixture
def reference(client: ComfyClient) -> str:
    return client.upload_image(rendered(3), "reference.png")


def failure(client: ComfyClient, graph: dict[str, Any], where: str) -> str:
    """The message of the error this workflow ends with, which must be that node's."""
    with pytest.raises(ExecutionFailed) as failed:
        client.run(graph)
    assert (failed.value.node_id, failed.value.node_type) == (where, graph[where]["class_type"])
    return failed.value.message


def masked(reference: str, where: str, value: float, width: int, height: int) -> dict[str, Any]:
    graph = injected(reference)
    graph["mask"] = node("SolidMask", value=value, width=width, height=height)
    graph[where]["inputs"]["mask"] = ["mask", 0]
    return graph


def says(message: str, *words: str) -> None:
    assert [word for word in words if word not in message] == [], message


def test_an_empty_reference_mask(client: ComfyClient, reference: str) -> None:
    says(failure(client, masked(reference, "encode", 0.0, 128, 128), "encode"), "128x128", "empty", "disconnect")


def test_a_reference_mask_of_another_shape(client: ComfyClient, reference: str) -> None:
    message = failure(client, masked(reference, "encode", 1.0, 96, 64), "encode")
    says(message, "96x64", "128x128", "connect the mask that belongs to this picture")


def test_a_reference_mask_of_another_size_but_the_same_shape_is_resized(client: ComfyClient, reference: str) -> None:
    assert pictures(client, masked(reference, "encode", 1.0, 64, 64)).shape == (1, 128, 128, 3)


def test_several_masks_for_one_picture(client: ComfyClient, reference: str) -> None:
    graph = masked(reference, "encode", 1.0, 128, 128)
    graph["two"] = node("RepeatImageBatch", image=["as_image", 0], amount=2)
    graph["as_image"] = node("MaskToImage", mask=["mask", 0])
    graph["as_mask"] = node("ImageToMask", image=["two", 0], channel="red")
    graph["encode"]["inputs"]["mask"] = ["as_mask", 0]
    says(failure(client, graph, "encode"), "batch of 2", "one", "pick one")


def test_several_pictures_as_one_reference(client: ComfyClient, reference: str) -> None:
    graph = injected(reference)
    graph["two"] = node("RepeatImageBatch", image=["picture", 0], amount=2)
    graph["encode"]["inputs"]["image"] = ["two", 0]
    says(failure(client, graph, "encode"), "batch of 2", "a reference is one", "pick one")


@pytest.mark.parametrize("role", ["appearance", "shape"])
def test_a_reference_of_a_vae_with_other_channels(client: ComfyClient, reference: str, role: str) -> None:
    """Core's own "pixel_space" VAE has three."""
    graph = injected(reference, **{role: ["other", 0]})
    graph["vae"] = node("VAELoader", vae_name="pixel_space")
    graph["other"] = encoded("picture", vae=["vae", 0])
    says(failure(client, graph, "inject"), "3 latent channels", "works with 4", "VAE that belongs to this model")


def test_an_empty_output_mask(client: ComfyClient, reference: str) -> None:
    says(failure(client, masked(reference, "inject", 0.0, 128, 128), "inject"), "output mask is empty", "disconnect")


def test_an_output_mask_of_another_size_is_resized(client: ComfyClient, reference: str) -> None:
    assert pictures(client, masked(reference, "inject", 1.0, 50, 50)).shape == (1, 128, 128, 3)


def test_a_window_that_ends_before_it_starts(client: ComfyClient, reference: str) -> None:
    message = failure(client, custom(reference, start_percent=0.8, end_percent=0.2), "custom")
    says(message, "0.8 to 0.2", "0 <= start <= end <= 1")


def test_a_window_no_step_falls_into(client: ComfyClient, reference: str) -> None:
    message = failure(client, custom(reference, start_percent=1.0, end_percent=1.0), "sampler")
    says(message, "changed nothing", "Widen start and end percent", "denoise")


def test_sites_the_model_has_not(client: ComfyClient, reference: str) -> None:
    message = failure(client, custom(reference, sites="decoder, output.9"), "inject")
    says(message, "'output.9'", "means no self-attention", "output.3", "decoder.fine")


@pytest.mark.parametrize(("name", "value"), [("strength", 1.5), ("color", -0.1), ("shape_strength", 2.0)])
def test_a_number_out_of_range_is_refused_before_the_run(
    client: ComfyClient, reference: str, name: str, value: float
) -> None:
    with pytest.raises(PromptRefused, match=rf"node inject \(ShapeAppearanceKVInjection\).*{name}") as refused:
        client.run(injected(reference, **{name: value}))
    assert list(refused.value.node_errors) == ["inject"]
    assert str(value) in str(refused.value) or "max" in str(refused.value) or "min" in str(refused.value)


def test_a_missing_reference_is_refused_before_the_run(client: ComfyClient, reference: str) -> None:
    graph = injected(reference)
    del graph["inject"]["inputs"]["appearance"]
    with pytest.raises(PromptRefused, match="node inject .*appearance"):
        client.run(graph)


def test_after_all_these_errors_a_good_workflow_runs(client: ComfyClient, reference: str) -> None:
    with pytest.raises(ExecutionFailed):
        client.run(masked(reference, "encode", 0.0, 128, 128))
    assert pictures(client, injected(reference)).shape == (1, 128, 128, 3)
