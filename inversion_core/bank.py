"""The bank that keeps what a model saw in its references, over steps, images and runs, and in files."""

from __future__ import annotations

import json
import os
import uuid
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = "shape-appearance reference bank"
VERSION = "1"


class BankKey(NamedTuple):
    """What a pass over a reference depends on.

    Attributes:
        model: what tells a model with all its patches from others in this process.
        reference: the reference's content (`Reference.content`).
        conditioning: digest of the conditioning of the reference's pass.
        sigma: noise level of the pass.
    """

    model: str
    reference: str
    conditioning: str
    sigma: float


class BankStats(NamedTuple):
    """What the bank did since it was made, and what it holds now. Counts of whole entries, but for the bytes.

    Attributes:
        hits: reads that found all they asked for.
        misses: reads that did not.
        moved: entries moved from the device to RAM to make room.
        evicted: entries forgotten to make room.
        entries: entries held.
        device_bytes: bytes of tensors held on accelerators.
        ram_bytes: bytes of tensors held in RAM.
    """

    hits: int = 0
    misses: int = 0
    moved: int = 0
    evicted: int = 0
    entries: int = 0
    device_bytes: int = 0
    ram_bytes: int = 0


@dataclass(frozen=True, eq=False)
class _Entry:
    """The tensors of one pass, all in one place. Immutable, so that a reader may keep it without the lock."""

    tensors: Mapping[str, Tensor]
    in_ram: bool
    size: int


class ReferenceBank:
    """Hidden states of references: on the device up to a budget, then in RAM up to another, then forgotten.

    An entry is what one pass over a reference left, a tensor for each site. It lies where its tensors lay when it was
    put; without an accelerator there is RAM alone. Room is made by moving the entry that was not used for the longest
    time one tier down. A read from RAM brings an entry back onto the device into free room, or into that of entries
    that were not used since it was last itself. Other reads from RAM are copies: sampling goes through the sigmas in
    circles, and if every read brought its entry back, a circle larger than the budget would push each entry out just
    before its turn, at the price of two copies a read instead of one.

    Tensors are kept, not copied: do not write into what was put or got. Only a view that would keep a larger memory
    block alive is copied.

    May be used by several threads. Reading `stats` never waits.

    Args:
        device_budget: bytes of tensors to keep on accelerators at most, all of them together.
        ram_budget: bytes of tensors to keep in RAM at most.
    """

    def __init__(self, device_budget: int, ram_budget: int) -> None:
        for name, budget in (("device_budget", device_budget), ("ram_budget", ram_budget)):
            if budget < 0:
                raise ValueError(f"{name} is {budget} bytes, but it cannot be negative")
        self.device_budget = device_budget
        self.ram_budget = ram_budget
        self._entries: OrderedDict[BankKey, _Entry] = OrderedDict()  # least recently used first, of both tiers
        self._bytes = {True: 0, False: 0}  # by _Entry.in_ram
        self._counts = dict.fromkeys(("hits", "misses", "moved", "evicted"), 0)
        self._lock = Lock()
        self._stats = BankStats()

    @property
    def stats(self) -> BankStats:
        """The numbers as the last finished operation left them."""
        return self._stats

    def __contains__(self, key: BankKey) -> bool:
        """Whether there is an entry, without using it."""
        return key in self._entries

    def get(self, key: BankKey, sites: Collection[str] | None, device: torch.device) -> dict[str, Tensor] | None:
        """The tensors at these sites on this device, and the entry is the most recently used; None if one is missing.

        Args:
            key: which entry.
            sites: which of its tensors; None asks for whatever the entry holds.
            device: where the caller needs them. On CUDA, copies from RAM are queued, not waited for.
        """
        with self._changing():
            entry = self._entries.get(key)
            if entry is None or not (sites is None or all(site in entry.tensors for site in sites)):
                self._counts["misses"] += 1
                return None
            self._counts["hits"] += 1
            if entry.in_ram and not _is_ram(device):
                entry = self._brought_back(key, entry, device)
            self._entries.move_to_end(key)
            return {site: _moved(entry.tensors[site], device) for site in (entry.tensors if sites is None else sites)}

    def put(self, key: BankKey, entry: Mapping[str, Tensor]) -> None:
        """Keep these tensors beside those that the key already has for other sites, as the most recently used.

        The whole lies where the new tensors do, in RAM if that is above the device's budget, nowhere if it is above
        both.

        Raises:
            ValueError: the tensors lie on different devices.
        """
        with self._changing():
            self._put(key, entry)

    def offload(self) -> None:
        """Move all entries from the device to RAM, as far as they fit there: what was used last stays."""
        with self._changing():
            for key in list(self._entries):
                if key in self._entries and not self._entries[key].in_ram:
                    self._move_down(key)

    def clear(self) -> None:
        """Forget all entries; the counts of hits and misses go on."""
        with self._changing():
            for key in list(self._entries):
                self._pop(key)

    def drop(self, model: str) -> None:
        """Forget what this model saw."""
        with self._changing():
            for key in [key for key in self._entries if key.model == model]:
                self._pop(key)

    def save(
        self, path: Path, model: str, fingerprint: str, model_name: str, references: Collection[str] | None = None
    ) -> int:
        """Write the entries of a model into a safetensors file, in one step: a reader never sees half of it.

        Args:
            path: where to; folders are made, an older file is replaced.
            model: whose entries (`BankKey.model`).
            fingerprint: what tells this model from others in other processes too.
            model_name: how people call it, for the message of a refused `load`.
            references: contents of the references to save; None saves all.

        Returns:
            How many entries were written.

        Raises:
            ValueError: there is nothing to save.
        """
        with self._lock:
            chosen = [
                (key, entry.tensors)
                for key, entry in self._entries.items()
                if key.model == model and (references is None or key.reference in references)
            ]
        if not chosen:
            raise ValueError(
                f"the bank holds nothing that {model_name} saw in these references: sample with them once, then save"
            )
        index = [
            {
                "reference": key.reference,
                "conditioning": key.conditioning,
                "sigma": key.sigma,  # JSON keeps every float exactly
                "sites": list(tensors),
            }
            for key, tensors in chosen
        ]
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "model": fingerprint,
            "model_name": model_name,
            "entries": json.dumps(index),
        }
        arrays: dict[str, Tensor] = {}
        seen: set[int] = set()
        for i, (_, tensors) in enumerate(chosen):
            for j, tensor in enumerate(tensors.values()):
                array = tensor.to("cpu").contiguous()
                if array.data_ptr() in seen:  # safetensors refuses tensors that share their memory
                    array = array.clone()
                seen.add(array.data_ptr())
                arrays[_name(i, j)] = array
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
        try:
            save_file(arrays, partial, metadata)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        return len(chosen)

    def load(self, path: Path, model: str, fingerprint: str, model_name: str) -> int:
        """Put the entries of a file that `save` wrote into RAM, as the most recently used.

        Args:
            path: the file.
            model: who will read them (`BankKey.model`).
            fingerprint: that model's, as given to `save`.
            model_name: how people call it, for the message of a refusal.

        Returns:
            How many of the file's entries the bank holds now: all, unless they are above RAM's budget.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is of another model, of a newer version of the pack, damaged, or no such file at all; the
                bank is then as it was.
        """
        try:
            with safe_open(path, framework="pt") as file:
                # These are views of the mapped file: they take no memory before they are copied below.
                entries = _read(file, path, model, fingerprint, model_name)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or no safetensors file ({error}): save the cache again") from error
        with self._changing():
            for key, tensors in entries.items():
                self._put(key, {site: tensor.clone() for site, tensor in tensors.items()})
            return sum(key in self for key in entries)

    # --- with the lock held -------------------------------------------------------------------------------------------

    @contextmanager
    def _changing(self) -> Iterator[None]:
        with self._lock:
            try:
                yield
            finally:
                self._stats = BankStats(
                    **self._counts,
                    entries=len(self._entries),
                    device_bytes=self._bytes[False],
                    ram_bytes=self._bytes[True],
                )

    def _put(self, key: BankKey, entry: Mapping[str, Tensor]) -> None:
        devices = {tensor.device for tensor in entry.values()} or {torch.device("cpu")}
        if len(devices) > 1:
            names = ", ".join(sorted(map(str, devices)))
            raise ValueError(f"the tensors of one entry lie on {names}: bring them onto one device first")
        device = devices.pop()
        older = self._pop(key)
        tensors = {} if older is None else dict(older.tensors)
        tensors.update((site, _own(tensor)) for site, tensor in entry.items())
        size = sum(tensor.nbytes for tensor in tensors.values())
        if size > self._budget(_is_ram(device)):
            device = torch.device("cpu")
        if size > self._budget(_is_ram(device)):
            return
        victims = self._victims(_is_ram(device), size)
        assert victims is not None, "an entry within the budget fits once enough others went"
        for victim in victims:
            self._move_down(victim)
        self._add(key, tensors, device)

    def _brought_back(self, key: BankKey, entry: _Entry, device: torch.device) -> _Entry:
        """The entry, now on the device if there is room for it that is free or was not used for longer."""
        victims = self._victims(False, entry.size, before=key)
        if victims is None:
            return entry
        self._pop(key)
        for victim in victims:
            self._move_down(victim)
        return self._add(key, entry.tensors, device)

    def _move_down(self, key: BankKey) -> None:
        """From the device to RAM, unless all there that would have to go was used later; from RAM to nowhere."""
        entry = self._entries[key]
        victims = None if entry.in_ram else self._victims(True, entry.size, before=key)
        if victims is None:
            self._pop(key)
            self._counts["evicted"] += 1
            return
        for victim in victims:
            self._move_down(victim)
        tensors = {site: _moved(tensor, torch.device("cpu")) for site, tensor in entry.tensors.items()}
        self._entries[key] = _Entry(tensors, True, entry.size)  # in its old place in the order
        self._bytes[False] -= entry.size
        self._bytes[True] += entry.size
        self._counts["moved"] += 1

    def _victims(self, in_ram: bool, size: int, before: BankKey | None = None) -> list[BankKey] | None:
        """The least recently used entries of a tier that must go for this many bytes; None if not enough can.

        Only those used before the key `before` can, if it is given.
        """
        room = self._budget(in_ram) - self._bytes[in_ram]
        found: list[BankKey] = []
        for key, entry in self._entries.items():
            if room >= size or key == before:
                break
            if entry.in_ram == in_ram:
                found.append(key)
                room += entry.size
        return found if room >= size else None

    def _budget(self, in_ram: bool) -> int:
        return self.ram_budget if in_ram else self.device_budget

    def _add(self, key: BankKey, tensors: Mapping[str, Tensor], device: torch.device) -> _Entry:
        there = {site: _moved(tensor, device) for site, tensor in tensors.items()}
        entry = _Entry(there, _is_ram(device), sum(tensor.nbytes for tensor in there.values()))
        self._entries[key] = entry
        self._bytes[entry.in_ram] += entry.size
        return entry

    def _pop(self, key: BankKey) -> _Entry | None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._bytes[entry.in_ram] -= entry.size
        return entry


def _is_ram(device: torch.device) -> bool:
    return device.type == "cpu"


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    # Onto CUDA a copy that need not be waited for is safe: CUDA has read unpinned memory before the call returns. In
    # the other direction, and on MPS, it is not.
    return tensor.to(device, non_blocking=device.type == "cuda")


def _own(tensor: Tensor) -> Tensor:
    """The tensor without its history, copied if it is a small part of a memory block that it would keep alive."""
    tensor = tensor.detach()
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def _name(entry: int, site: int) -> str:
    return f"{entry}.{site}"


def _read(file: Any, path: Path, model: str, fingerprint: str, model_name: str) -> dict[BankKey, dict[str, Tensor]]:
    """The entries of an open file, after every check."""
    metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is no reference cache: choose a file that Save Reference Cache wrote")
    if metadata.get("version") != VERSION:
        raise ValueError(
            f"{path} is a reference cache of version {metadata.get('version')}, but this pack reads version {VERSION}: "
            "update the pack, or save the cache again"
        )
    if metadata.get("model") != fingerprint:
        raise ValueError(
            f"{path} holds what {metadata.get('model_name')} ({_short(metadata.get('model'))}) saw in its references, "
            f"but this model is {model_name} ({_short(fingerprint)}). Another model, or the same one with other LoRAs, "
            "sees other things: connect the model that the cache was saved with, or sample with this one and save anew"
        )
    try:
        found: dict[BankKey, dict[str, Tensor]] = {}
        for i, entry in enumerate(json.loads(metadata["entries"])):
            key = BankKey(model, entry["reference"], entry["conditioning"], entry["sigma"])
            sites = entry["sites"]
            found[key] = {site: file.get_tensor(_name(i, j)) for j, site in enumerate(sites)}
        return found
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged (its list of entries: {error!r}): save the cache again") from error


def _short(fingerprint: str | None) -> str:
    return f"fingerprint {fingerprint[:12] if fingerprint else None}"
