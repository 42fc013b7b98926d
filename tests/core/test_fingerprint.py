"""Content hashes of conditionings and models."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from inversion_core.fingerprint import digest, weights_fingerprint

ROOT = Path(__file__).parents[2]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
DTYPES += [torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64]


def some(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


def weights() -> dict[str, Tensor]:
    """Every kind of tensor: matrices, a vector, a scalar, an empty one, all dtypes."""
    plain = {f"layer.{dtype}": some(40, 30, dtype=dtype) for dtype in DTYPES}
    return {**plain, "bias": some(7), "scale": some(), "empty": some(0, 4)}


def conditioning() -> Any:
    return [[some(1, 7, 5), {"pooled_output": some(1, 5, seed=1), "strength": 1.0, "note": None, "at": (3, "x", b"y")}]]


# --- digest -----------------------------------------------------------------------------------------------------------


def test_equal_content_has_the_equal_digest_whatever_the_objects() -> None:
    value = conditioning()
    (tokens, options) = value[0]
    rebuilt = (
        (
            tokens.transpose(1, 2).contiguous().transpose(1, 2),
            {key: options[key] for key in reversed(options)} | {"at": [3, "x", b"y"]},
        ),
    )
    assert rebuilt[0][0].stride() != tokens.stride()
    assert digest(rebuilt) == digest(value)
    assert len(digest(value)) == 64


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_hashed_and_one_bit_counts(dtype: torch.dtype) -> None:
    for shape in ((), (0,), (3, 2)):
        assert digest(some(*shape, dtype=dtype)) == digest(some(*shape, dtype=dtype))
    changed = some(3, 2, dtype=dtype).clone()
    changed.view(torch.uint8)[-1, -1] ^= 1
    assert digest(changed) != digest(some(3, 2, dtype=dtype))


def test_what_differs_has_different_digests() -> None:
    values = [None, "None", True, 1, 1.0, "1", b"1", 0, False, 0.0, -0.0, "", b"", [], {}, [[]], [None], {None: None}]
    values += ["ab", ["ab"], ["a", "b"], [["a"], "b"], ["a", ["b"]], {"a": "b"}, {"b": "a"}, ["b", "a"]]
    values += [{"a": 1, "b": 2}, {"a": 2, "b": 1}, [("a", 1), ("b", 2)], float("inf"), float("nan")]
    flat = torch.arange(6.0)
    values += [flat, flat.reshape(2, 3), flat.reshape(3, 2), flat.double(), flat.half(), flat.tolist(), flat.flip(0)]
    assert len({digest(value) for value in values}) == len(values)


def test_the_digest_of_a_parameter_is_that_of_its_values() -> None:
    assert digest(torch.nn.Parameter(some(3))) == digest(some(3))


def test_what_has_no_known_content_is_refused_by_its_place() -> None:
    with pytest.raises(TypeError, match=r"value\[0\]\[1\]\['control'\] is a builtins.object, whose content is unknown"):
        digest([[some(2), {"control": object()}]])
    with pytest.raises(TypeError, match=r"value key is a builtins.frozenset"):
        digest({frozenset(): 1})
    with pytest.raises(ValueError, match=r"value\['w'\] is on the meta device"):
        digest({"w": torch.empty(2, device="meta")})


# --- weights ----------------------------------------------------------------------------------------------------------


def test_neither_order_nor_memory_layout_nor_gradients_count() -> None:
    expected = weights_fingerprint(weights())
    shuffled = {name: weights()[name] for name in reversed(weights())}
    shuffled["bias"] = torch.nn.Parameter(shuffled["bias"])
    shuffled["layer.torch.float16"] = shuffled["layer.torch.float16"].t().contiguous().t()
    assert not shuffled["layer.torch.float16"].is_contiguous()
    assert weights_fingerprint(shuffled) == expected


@pytest.mark.parametrize("name", weights())
def test_every_weight_counts_by_name_dtype_and_shape(name: str) -> None:
    expected = weights_fingerprint(weights())
    changed = weights()
    tensor = changed.pop(name)
    others = [
        changed,
        {**changed, f"{name}_": tensor},
        {**changed, name: tensor.reshape(1, *tensor.shape)},
        {**changed, name: tensor.to(torch.complex128)},
    ]
    assert len({expected, *map(weights_fingerprint, others)}) == 5


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 60),
    columns=st.integers(1, 60),
    rank=st.integers(1, 4),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_a_lora_on_any_one_weight_changes_it(rows: int, columns: int, rank: int, dtype: torch.dtype, seed: int) -> None:
    before = {"other": some(8, 8), "weight": some(rows, columns, dtype=dtype)}
    change = some(rows, rank, seed=seed) @ some(rank, columns, seed=seed + 1) * 0.1
    after = {**before, "weight": (before["weight"].float() + change).to(dtype)}
    assert torch.equal(after["weight"], before["weight"]) == (weights_fingerprint(after) == weights_fingerprint(before))


@pytest.mark.parametrize("shape", [(64,), (8, 8), (63, 1), (2, 3, 5), (1,)])
def test_small_weights_are_hashed_whole(shape: tuple[int, ...]) -> None:
    base = some(*shape)
    seen = {weights_fingerprint({"w": base})}
    for i in range(base.numel()):
        changed = base.clone()
        changed.view(-1)[i] += 1
        seen.add(weights_fingerprint({"w": changed}))
    assert len(seen) == base.numel() + 1


@pytest.mark.parametrize("shape", [(65,), (320, 320), (64, 32, 3, 3)])
def test_the_samples_spread_over_large_weights(shape: tuple[int, ...]) -> None:
    """Both ends and 64 values in all, no more than one in each 64th of the weight."""
    base = torch.zeros(shape)
    plain = weights_fingerprint({"w": base})

    def seen(start: int, stop: int) -> bool:
        changed = base.clone()
        changed.view(-1)[start:stop] = 1
        return weights_fingerprint({"w": changed}) != plain

    size = base.numel()
    assert seen(0, 1) and seen(size - 1, size)
    assert not seen(1, (size - 1) // 63) and not seen(size - (size - 1) // 63, size - 1)
    assert all(seen(start, start + size // 63 + 1) for start in range(0, size, size // 63 + 1))


class Scaled(Tensor):
    """A quantised weight as packs build them: integers and a scale; the numbers exist only when asked for."""

    data8: Tensor
    scale: Tensor

    def __new__(cls, data: Tensor, scale: Tensor) -> "Scaled":
        wrapper = Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.float16, device=data.device)
        wrapper.data8, wrapper.scale = data, scale
        return wrapper

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["data8", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} would dequantise the weight")


def test_quantised_weights_count_by_what_is_stored() -> None:
    data = torch.randint(-128, 128, (90, 70), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    prints = {
        weights_fingerprint({"w": weight})
        for weight in (Scaled(data, some(1)), Scaled(data + 1, some(1)), Scaled(data, some(1) + 1), data)
    }
    assert len(prints) == 4
    assert weights_fingerprint({"w": Scaled(data.clone(), some(1))}) in prints


class Largest(TorchDispatchMode):
    """The size of the largest new tensor."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not func.is_view:
            self.elements = max(self.elements, out.numel())
        return out


def test_no_weight_is_copied() -> None:
    large = {"w": some(500, 300).t(), "x": some(500, 300, dtype=torch.bfloat16)}
    with Largest() as largest:
        weights_fingerprint(large)
    assert 64 <= largest.elements <= 64 * 4 * len(large)


def test_weights_without_values_are_refused() -> None:
    with pytest.raises(ValueError, match=r"block\.weight is on the meta device"):
        weights_fingerprint({"block.weight": torch.empty(3, device="meta")})
    with pytest.raises(ValueError, match="without weights"):
        weights_fingerprint({})


def test_another_process_finds_the_same() -> None:
    """Python's own hash() differs between processes; these must not."""
    script = (
        "import torch\n"
        "from inversion_core.fingerprint import digest, weights_fingerprint\n"
        "x = torch.arange(1000).to(torch.bfloat16)\n"
        "print(digest({'a': [x, 0.1], 'b': None}), weights_fingerprint({'x': x, 'y': x.half()}))\n"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    x = torch.arange(1000).to(torch.bfloat16)
    assert run.stdout.split() == [digest({"b": None, "a": (x, 0.1)}), weights_fingerprint({"y": x.half(), "x": x})]
