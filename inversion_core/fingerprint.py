"""Content hashes: what a conditioning or a model *is*, whatever object, process or device holds it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

SAMPLES = 64
"""How many values of each weight `weights_fingerprint` looks at."""


def digest(value: Any) -> str:
    """SHA-256 of a nested value by content, as 64 hexadecimal digits: the same in every process and on every device.

    Args:
        value: None, bool, int, float, str, bytes, a tensor of any dtype, or dicts, lists and tuples of such values,
            however deep. A list equals a tuple, the order of a dict's items does not count. All else does: 1, 1.0
            and True differ, as do tensors of equal values but different dtype or shape.

    Raises:
        TypeError: a part of the value is of another type. Its content cannot be known, and its address would neither
            survive the process nor tell when it changes. The message says where it is.
        ValueError: a tensor is on the meta device.
    """
    return _digest(value, "value").hex()


def weights_fingerprint(weights: Mapping[str, Tensor]) -> str:
    """A cheap content hash of a model's weights, as 64 hexadecimal digits: equal in every process, on every device.

    Covers each weight's name, dtype, shape and up to `SAMPLES` of its values, bit for bit, evenly spaced from the
    first to the last in row-major order. No weight is copied or dequantised; each device is waited for once. Tensor
    subclasses that wrap others (quantised weights) count by what they wrap: the stored values, the scales.

    What it can miss: a change that leaves all sampled values as they are. Adding a LoRA, merging, fine-tuning or
    casting changes nearly every value of many weights, so that passing unseen is as good as impossible. Not so for a
    change confined to some rows or entries, such as one token of an embedding, or one so small that the dtype rounds
    it away almost everywhere. It is no protection against a forger either.

    Args:
        weights: the weights by name, as `torch.nn.Module.state_dict` gives them; their order does not count.

    Raises:
        ValueError: there are no weights at all, or one of them is on the meta device and has no values.
    """
    if not weights:
        raise ValueError("a model without weights has no fingerprint: load the model first")
    headers: list[str] = []
    samples: list[Tensor] = []
    for name in sorted(weights):
        for part, tensor in _plain(name, weights[name]):
            headers.append(f"{part}\0{tensor.dtype}\0{tuple(tensor.shape)}\0")
            samples.append(_sample(tensor))
    result = hashlib.sha256()
    for header, sample in zip(headers, _fetched(samples), strict=True):
        result.update(header.encode())
        result.update(sample)
    return result.hexdigest()


def _digest(value: Any, path: str) -> bytes:
    # Every part is hashed by itself before it counts for the whole: no two nestings can read the same.
    if value is None:
        return _hash("None", b"")
    if isinstance(value, bool | int):
        return _hash("bool" if isinstance(value, bool) else "int", b"%d" % value)
    if isinstance(value, str):
        return _hash("str", value.encode(errors="surrogatepass"))
    if isinstance(value, float):
        return _hash("float", value.hex().encode())
    if isinstance(value, bytes):
        return _hash("bytes", value)
    if isinstance(value, Tensor):
        _require_values(path, value)
        return _hash(f"tensor {value.dtype} {tuple(value.shape)}", _all_bytes(value))
    if isinstance(value, list | tuple):
        return _hash("sequence", b"".join(_digest(item, f"{path}[{i}]") for i, item in enumerate(value)))
    if isinstance(value, dict):
        items = [_digest(key, f"{path} key") + _digest(item, f"{path}[{key!r}]") for key, item in value.items()]
        return _hash("dict", b"".join(sorted(items)))
    raise TypeError(
        f"{path} is a {type(value).__module__}.{type(value).__qualname__}, whose content is unknown: hash only None, "
        "bool, int, float, str, bytes, tensors, and dicts, lists and tuples of them; leave it out or replace it"
    )


def _hash(kind: str, content: bytes | memoryview) -> bytes:
    result = hashlib.sha256(f"{kind}\0".encode())
    result.update(content)
    return result.digest()


def _all_bytes(tensor: Tensor) -> memoryview:
    with torch.no_grad():
        return tensor.to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data


def _plain(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensor with its name, or, if it only wraps others, those."""
    _require_values(name, tensor)
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:
        for inner in flatten()[0]:
            yield from _plain(f"{name}.{inner}", getattr(tensor, inner))
    else:
        yield name, tensor


def _require_values(name: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise ValueError(f"{name} is on the meta device and has no values to hash: load it first")


def _sample(tensor: Tensor) -> Tensor:
    """Bytes of evenly spaced values, 1-D on the tensor's device."""
    with torch.no_grad():
        # As integers, because not every device can index every floating type, and to hash NaN and -0 as they are.
        bits = tensor.as_subclass(Tensor)
        bits = torch.view_as_real(bits) if bits.is_complex() else bits
        bits = bits.view(_INTEGERS[bits.element_size()])
        count = min(bits.numel(), SAMPLES)
        place = torch.arange(count, device=bits.device) * (bits.numel() - 1) // max(count - 1, 1)
        index: list[Tensor] = []
        for size in reversed(bits.shape):  # not by flattening, which would copy a weight that is a transposed view
            index.insert(0, place % max(size, 1))
            place = place // max(size, 1)
        found = bits[tuple(index)] if bits.numel() > 0 else bits
        return found.reshape(-1).view(torch.uint8)


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _fetched(samples: list[Tensor]) -> list[bytes]:
    """The samples' bytes in their order, brought over together from each device."""
    found: dict[int, bytes] = {}
    for device in {sample.device for sample in samples}:
        here = [i for i, sample in enumerate(samples) if sample.device == device]
        joined = torch.cat([samples[i] for i in here]).cpu().numpy().tobytes()
        start = 0
        for i in here:
            stop = start + samples[i].numel()
            found[i] = joined[start:stop]
            start = stop
    return [found[i] for i in range(len(samples))]
