"""The extractor against timm's own forward pass and against plain hooks, for every registered backbone."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.testing import assert_close

from demo.vit import BACKBONE as DEMO
from demo.weights import FOLDER
from inversion_core.features import (
    BACKBONES,
    Backbone,
    FeatureError,
    Features,
    Recent,
    TimmExtractor,
    build,
    digest,
    fitted_size,
    load,
    prepare,
    principal_colors,
    self_similarity,
)

DEMO_VIT = Backbone(**DEMO)
# Two blocks of the real class with the real options say as much as twelve, in a tenth of the time and memory.
SHALLOW = [replace(one, options={**one.options, "depth": 2}) for one in (DEMO_VIT, *BACKBONES.values())]
ODD = (75, 130)
"""Height and width of a picture that fits no patch."""


def random_weights(model: nn.Module) -> nn.Module:
    """timm starts layer scales near 0 and biases at 0, so that a block would hardly do anything."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            spread = 0.5 if weight.ndim == 1 else 1 / math.sqrt(weight[0].numel())
            weight.copy_(torch.randn(weight.shape, generator=generator) * spread)
    return model


def extractor_of(backbone: Backbone) -> TimmExtractor:
    return TimmExtractor(random_weights(build(backbone)), backbone)


def pictures(count: int = 2, height: int = ODD[0], width: int = ODD[1], seed: int = 0) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=SHALLOW, ids=lambda one: one.name)
def extractor(request: pytest.FixtureRequest) -> TimmExtractor:
    return extractor_of(request.param)


@pytest.fixture(scope="module")
def demo() -> TimmExtractor:
    return extractor_of(SHALLOW[0])


def plain(extractor: TimmExtractor, pixels: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """What the block gives, and its keys (B, N, C) by the definition: the middle third of its projection."""
    network: Any = extractor.model
    seen: dict[str, Tensor] = {}
    hooks = [
        network.blocks[block].register_forward_hook(lambda m, i, out: seen.update(out=out)),
        network.blocks[block].norm1.register_forward_hook(lambda m, i, out: seen.update(attended=out)),
    ]
    network.forward_features(pixels)
    for hook in hooks:
        hook.remove()
    attention = network.blocks[block].attn
    width = attention.qkv.weight.shape[1]
    bias = None if attention.qkv.bias is None else attention.qkv.bias[width : 2 * width]
    return seen["out"], F.linear(seen["attended"], attention.qkv.weight[width : 2 * width], bias)


def prepared(extractor: TimmExtractor, images: Tensor, size: int) -> Tensor:
    return prepare(images, extractor.patch, size, extractor.mean, extractor.std)


def test_the_last_block_is_timms_own_forward(extractor: TimmExtractor) -> None:
    size = 110
    found = extractor(pictures(), size=size)
    network: Any = extractor.model
    whole = network.forward_features(prepared(extractor, pictures(), size))
    n = found.grid[0] * found.grid[1]
    assert found.grid[0] < found.grid[1]
    assert_close(found.normed, whole[:, -n:])
    assert_close(found.cls_normed, whole[:, 0])
    assert_close(network.norm(found.tokens), found.normed)
    assert whole.shape[1] == n + extractor.prefix


@pytest.mark.parametrize("block", [0, 1])
def test_any_block_is_what_plain_hooks_see(extractor: TimmExtractor, block: int) -> None:
    found = extractor(pictures(), block=block, size=96)
    out, keys = plain(extractor, prepared(extractor, pictures(), 96), block)
    n = found.grid[0] * found.grid[1]
    assert_close(found.tokens, out[:, -n:])
    assert_close(found.cls, out[:, 0])
    assert_close(found.descriptors("keys"), keys[:, -n:])
    assert found.cls_key is not None
    assert_close(found.cls_key.flatten(1), keys[:, 0])
    assert_close(found.keys[:, 1], keys[:, -n:, found.keys.shape[-1] : 2 * found.keys.shape[-1]])
    if block == 1:
        assert_close(extractor(pictures(), block=-1, size=96).tokens, found.tokens)


def test_position_embeddings_are_resampled_as_timm_does(extractor: TimmExtractor) -> None:
    backbone = extractor.backbone
    static: Any = build(replace(backbone, options={**backbone.options, "dynamic_img_size": False}))
    static.load_state_dict(extractor.model.state_dict())
    pixels = prepared(extractor, pictures(), 130)
    static.set_input_size(tuple(pixels.shape[2:]))
    found = extractor(pictures(), size=130)
    assert_close(found.normed, static.forward_features(pixels)[:, extractor.prefix :], atol=1e-4, rtol=1e-4)


def test_a_batch_is_its_pictures(extractor: TimmExtractor) -> None:
    together = extractor(pictures(), size=96)
    alone = extractor(pictures()[1:], size=96)
    assert_close(together.tokens[1:], alone.tokens)
    assert_close(together.keys[1:], alone.keys)


def test_the_gradient_is_that_of_plain_hooks(extractor: TimmExtractor) -> None:
    def loss(keys: Tensor, cls: Tensor) -> Tensor:
        similarity = F.cosine_similarity(keys[:, :, None], keys[:, None], dim=-1)
        return similarity.square().mean() + cls.square().mean()

    expected = pictures(1).requires_grad_()
    out, keys = plain(extractor, prepared(extractor, expected, 64), 1)
    loss(keys[:, extractor.prefix :], out[:, 0]).backward()
    images = pictures(1).requires_grad_()
    found = extractor(images, size=64, grad=True)
    assert found.cls is not None
    (self_similarity(found).square().mean() + found.cls.square().mean()).backward()
    assert images.grad is not None and expected.grad is not None
    assert float(expected.grad.abs().max()) > 0
    scale = float(expected.grad.abs().max())
    assert_close(images.grad / scale, expected.grad / scale, atol=1e-4, rtol=1e-3)


def test_half_precision_sees_the_same(extractor: TimmExtractor) -> None:
    whole = extractor(pictures(), size=96)
    half = TimmExtractor(copy.deepcopy(extractor.model).half(), extractor.backbone)(pictures(), size=96)
    assert half.tokens.dtype == half.keys.dtype == torch.float16
    for found, expected in ((half.normed, whole.normed), (half.keys, whole.keys)):
        assert float(F.cosine_similarity(found.float(), expected, dim=-1).min()) > 0.99


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([8, 14, 16]), st.integers(1, 1024))
def test_fitted_sizes(height: int, width: int, patch: int, size: int) -> None:
    fitted = fitted_size(height, width, patch, size)
    assert all(side >= patch and side % patch == 0 for side in fitted)
    scale = size / math.sqrt(height * width)
    for side, own in zip(fitted, (height, width), strict=True):
        assert side == patch or abs(side - own * scale) <= patch / 2 + 1e-6


def test_a_fitting_picture_is_only_normalised() -> None:
    images = pictures(1, 32, 48)
    found = prepare(images, 16, round(math.sqrt(32 * 48)), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    assert_close(found[:, 1], (images[:, 1] - 0.2) / 0.6)
    assert found.shape == images.shape


def test_self_similarity_is_the_cosine_of_every_pair(demo: TimmExtractor) -> None:
    found = demo(pictures(), size=40)
    keys = found.keys.double()
    for row, column in ((0, 0), (3, 7), (20, 4)):
        a, b = keys[1, :, row].flatten(), keys[1, :, column].flatten()
        assert_close(self_similarity(found)[1, row, column].double(), a @ b / (a.norm() * b.norm()), atol=1e-5, rtol=0)
    whole = self_similarity(found, with_cls=True)
    assert_close(whole[:, 1:, 1:], self_similarity(found))
    assert found.cls_key is not None
    cls = found.cls_key[0].flatten()
    assert_close(whole[0, 0, 5], F.cosine_similarity(cls, found.keys[0, :, 4].flatten(), dim=0))
    with pytest.raises(FeatureError, match="no CLS token"):
        self_similarity(replace(found, cls_key=None), with_cls=True)


def test_a_picture_is_looked_at_once() -> None:
    extractor = extractor_of(SHALLOW[0])
    looks = []
    extractor.model.register_forward_pre_hook(lambda *_: looks.append(0))
    network: Any = extractor.model
    network.patch_embed.register_forward_hook(lambda *_: looks.append(1))
    first, again = extractor(pictures(), size=64), extractor(pictures().clone(), size=64)
    assert len(looks) == 1
    assert first.content == again.content
    assert_close(first.keys, again.keys, rtol=0, atol=0)
    assert extractor_of(SHALLOW[0])(pictures(), size=64).content == first.content
    other = build(SHALLOW[0])
    assert TimmExtractor(other, SHALLOW[0])(pictures(), size=64).content != first.content
    contents = {first.content}
    for changed in (
        extractor(pictures(seed=1), size=64),
        extractor(pictures(), size=72),
        extractor(pictures(), size=64, block=0),
        extractor(pictures(height=ODD[1], width=ODD[0]), size=64),
    ):
        contents.add(changed.content)
    assert len(looks) == len(contents) == 5
    extractor(pictures().requires_grad_(), size=64, grad=True)
    assert len(looks) == 6


def test_without_asking_there_is_no_graph_and_no_inference_tensor(demo: TimmExtractor) -> None:
    with torch.inference_mode():
        found = demo(pictures(seed=9), size=40)
    assert not found.keys.requires_grad and not found.keys.is_inference()
    weight = torch.ones_like(found.keys).requires_grad_()
    (found.keys * weight).sum().backward()
    assert weight.grad is not None
    assert_close(weight.grad, found.keys)


@pytest.mark.parametrize("how", ["made", "moved"])
def test_gradients_flow_inside_inference_mode_and_through_weights_from_there(how: str) -> None:
    expected = pictures(1).requires_grad_()
    extractor = extractor_of(SHALLOW[0])
    self_similarity(extractor(expected, size=40, grad=True)).square().sum().backward()
    hosted = extractor_of(SHALLOW[0])
    images = pictures(1).requires_grad_()
    with torch.inference_mode():
        if how == "moved":
            hosted.model.double().float()
        else:
            for owner in hosted.model.modules():
                for name, weight in owner.named_parameters(recurse=False):
                    setattr(owner, name, nn.Parameter(weight.clone(), requires_grad=False))
        found = hosted(images, size=40, grad=True)
        with torch.inference_mode(False), torch.enable_grad():
            self_similarity(found).square().sum().backward()
    assert images.grad is not None
    assert_close(images.grad, expected.grad)


def test_a_host_is_asked_for_room_when_it_is_needed(demo: TimmExtractor) -> None:
    class Host:
        device = torch.device("cpu")

        def __init__(self) -> None:
            self.asked: list[int] = []

        def load(self, room: int) -> None:
            self.asked.append(room)

    host = Host()
    hosted = TimmExtractor(demo.model, demo.backbone, host)
    hosted(pictures(), size=64)
    hosted(pictures(4), size=64)
    hosted(pictures(4).requires_grad_(), size=64, grad=True)
    hosted(pictures(), size=64)
    first, more, graph = host.asked
    assert 0 < first < graph
    assert more == 2 * first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": torch.zeros(3, 8, 8)}, r"\(3, 8, 8\), needed is \(B, 3, H, W\)"),
        ({"images": torch.zeros(1, 4, 8, 8)}, "needed is"),
        ({"block": 2}, "block is 2, but demo-vit has blocks 0 to 1"),
        ({"block": -3}, "block is -3"),
        ({"size": 0}, "size is 0"),
        ({"grad": True}, "require no gradient"),
    ],
)
def test_what_cannot_be_done_is_said(demo: TimmExtractor, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        demo(**{"images": pictures(), **arguments})


def test_files(tmp_path: Path) -> None:
    backbone = SHALLOW[0]
    model = random_weights(build(backbone))
    path = tmp_path / backbone.file
    save_file(model.state_dict(), path)
    loaded = load(backbone, path)
    assert_close(dict(loaded.state_dict()), dict(model.state_dict()))
    assert not any(weight.requires_grad for weight in loaded.parameters())
    assert not loaded.training
    assert next(load(backbone, path, torch.bfloat16).parameters()).dtype == torch.bfloat16
    with pytest.raises(FeatureError, match="demo-vit are not at"):
        load(backbone, tmp_path / "none")
    with pytest.raises(FeatureError, match="does not hold the weights of dino-vits16"):
        load(replace(BACKBONES["dino-vits16"], options={"depth": 1}), path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(FeatureError, match="cannot be read"):
        load(backbone, path)
    with pytest.raises(FeatureError, match="does not know vit_of_tomorrow"):
        build(replace(backbone, model="vit_of_tomorrow"))


def test_the_demos_vit_knows_the_objects_of_its_world() -> None:
    """Patches of one object are alike, and unlike those of the ground: the committed weights are the trained ones."""
    from demo import world

    extractor = TimmExtractor(load(DEMO_VIT, FOLDER / DEMO_VIT.file), DEMO_VIT)
    for seed in (1, 2, 3):
        rendered = world.render(world.sample(seed))
        found = extractor(torch.from_numpy(rendered.image).permute(2, 0, 1)[None])
        inside = F.avg_pool2d(torch.from_numpy(rendered.mask)[None], 8).flatten()
        similarity = self_similarity(found)[0]
        object_, ground = inside > 0.99, inside < 0.01
        within, across = similarity[object_][:, object_].mean(), similarity[object_][:, ground].mean()
        assert float(within) > float(across) + 0.1


def test_the_registry_is_one_table_of_pinned_files() -> None:
    assert len({one.file for one in BACKBONES.values()}) == len(BACKBONES)
    for name, backbone in BACKBONES.items():
        assert backbone.name == name
        assert backbone.file.endswith(".safetensors")
        if backbone.download is not None:
            assert len(backbone.download.revision) == 40
            assert len(backbone.download.sha256) == 64
            assert backbone.download.url.startswith(f"https://huggingface.co/{backbone.source}/resolve/")


def test_principal_colors_part_what_differs() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(3, 32, generator=generator) * 3
    parts = torch.arange(3).repeat_interleave(50)
    descriptors = centres[parts] + torch.randn(150, 32, generator=generator) * 0.05
    colors = principal_colors(descriptors)
    assert colors.shape == (150, 3)
    assert float(colors.min()) >= 0 and float(colors.max()) <= 1
    means = torch.stack([colors[parts == part].mean(0) for part in range(3)])
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert float((means[a] - means[b]).abs().max()) > 0.3
    # Turning the space around does not change what is seen.
    turn, _ = torch.linalg.qr(torch.randn(32, 32, generator=generator))
    turned = principal_colors(descriptors @ turn)
    same = (turned - colors).abs().mean(0) < 0.02
    mirrored = (1 - turned - colors).abs().mean(0) < 0.02
    assert bool((same | mirrored)[:2].all())


def test_principal_colors_of_a_masked_part_span_the_range_there() -> None:
    descriptors = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    descriptors[100:] *= 100
    mask = torch.arange(200) < 100
    colors = principal_colors(descriptors, mask)
    assert float(colors[mask].std(0).min()) > 0.15
    assert_close(colors[mask], principal_colors(descriptors[mask]))


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 12)), max_size=40))
def test_recent_keeps_its_budget_and_the_last_used(uses: list[tuple[str, int]]) -> None:
    recent = Recent[int](10, lambda size: size)
    order: dict[str, int] = {}
    for key, size in uses:
        if recent.get(key) is None:
            recent.put(key, size)
            if size <= 10 and key not in order:
                order[key] = size
        else:
            order[key] = order.pop(key)
        while sum(order.values()) > 10:
            del order[next(iter(order))]
    assert {key: recent.get(key) for key in "abcdef" if recent.get(key) is not None} == order


def test_digests_tell_contents_apart() -> None:
    x = torch.zeros(2, 3)
    names = {
        digest(x),
        digest(x + 1e-7),
        digest(x.T),
        digest(x.half()),
        digest(x, "a"),
        digest("a", x),
        digest("ab"),
        digest("a", "b"),
    }
    assert len(names) == 8
    assert digest(x.clone()) == digest(torch.zeros(3, 2).T.contiguous())


def test_features_move_and_count_their_bytes(demo: TimmExtractor) -> None:
    found: Features = demo(pictures(1), size=40)
    n, width = found.grid[0] * found.grid[1], 128
    assert found.bytes == (3 * n * width + 3 * width) * 4
    with torch.inference_mode():
        moved = found.to("meta")
    assert not moved.keys.is_inference()
    assert moved.cls_normed is not None
    assert moved.keys.device.type == moved.cls_normed.device.type == "meta"
    assert moved.grid == found.grid
