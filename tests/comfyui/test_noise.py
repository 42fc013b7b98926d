"""Invert Reference in a real server: its outputs plug into the stock SamplerCustom and give the picture back."""

from typing import Any

import pytest

from demo.client import ComfyClient

from .graphs import difference, encoded, node, pictures, rendered, text_to_image


def inverted(reference: str, policy: str, **sampling: Any) -> dict[str, dict[str, Any]]:
    graph = text_to_image()
    graph["picture"] = node("LoadImage", image=reference)
    graph["encode"] = encoded("picture")
    graph["invert"] = node(
        "ShapeAppearanceInvertReference",
        model=["demo", 0],
        reference=["encode", 0],
        policy=policy,
        steps=20,
        noise_seed=3,
        conditioning=["positive", 0],
    )
    graph["sampler"] = node(
        "SamplerCustom",
        **{
            "model": ["demo", 0],
            "add_noise": False,
            "noise_seed": 0,
            "cfg": 1.0,
            "positive": ["positive", 0],
            "negative": ["negative", 0],
            "sampler": ["invert", 2],
            "sigmas": ["invert", 3],
            "latent_image": ["invert", 1],
            **sampling,
        },
    )
    return graph


@pytest.mark.parametrize("policy", ["ddim", "edit-friendly"])
def test_the_picture_comes_back_through_stock_nodes(client: ComfyClient, policy: str) -> None:
    """Edit-friendly exactly as the autoencoder alone gives it; DDIM much nearer to it than from other noise."""
    reference = client.upload_image(rendered(500), "invert_me.png")
    plain = text_to_image()
    plain["picture"] = node("LoadImage", image=reference)
    plain["sampler"] = node("VAEEncode", pixels=["picture", 0], vae=["demo", 2])
    expected = pictures(client, plain)
    found = pictures(client, inverted(reference, policy))
    if policy == "edit-friendly":
        assert difference(found, expected) < 0.1
    else:
        other = pictures(client, inverted(reference, policy, noise_seed=1, add_noise=True, latent_image=["size", 0]))
        assert difference(found, expected) < difference(other, expected) / 2
