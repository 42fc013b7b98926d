"""These tests run ComfyUI's model code in this process; the server, whose module `nodes` is not ours, stays out."""

from collections.abc import Iterator

import pytest
import torch

from demo.comfy import ensure_importable

ensure_importable()
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def as_in_a_node() -> Iterator[None]:
    """ComfyUI runs every node in inference mode. No test finds in the bank what an earlier one left there."""
    from inversion_core.hosts.comfy_references import BANK

    BANK.clear()
    with torch.inference_mode():
        yield
