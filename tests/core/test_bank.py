"""The bank of hidden states: two tiers, files, threads."""

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from inversion_core.bank import BankKey, ReferenceBank

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn]
LAYER = "output.3.0"


def key(name: str = "a", sigma: float = 1.0, model: str = "m") -> BankKey:
    return BankKey(model, name, "conditioning", sigma)


def entry(size: int, sites: int = 1, seed: int = 0) -> dict[str, Tensor]:
    """Tensors of so many bytes together."""
    generator = torch.Generator().manual_seed(seed)
    parts = [size // sites] * (sites - 1) + [size - size // sites * (sites - 1)]
    return {str(i): torch.randint(0, 256, (n,), dtype=torch.uint8, generator=generator) for i, n in enumerate(parts)}


def equal(found: Mapping[str, Tensor] | None, expected: Mapping[str, Tensor]) -> bool:
    """The same sites with the same dtypes, shapes and bits."""
    return (
        found is not None
        and found.keys() == expected.keys()
        and all(
            found[site].dtype == tensor.dtype
            and found[site].shape == tensor.shape
            and _bytes(found[site]) == _bytes(tensor)
            for site, tensor in expected.items()
        )
    )


def _bytes(tensor: Tensor) -> bytes:
    return tensor.as_subclass(Tensor).contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


class _OnGpu(Tensor):
    """A tensor that says it lies on the accelerator, for machines without one."""

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleVariableOverride]
        return GPU


class FakeGpu(TorchFunctionMode):
    """Lets `Tensor.to` move between memory and an accelerator that is not there, and counts the copies."""

    def __init__(self) -> None:
        super().__init__()
        self.up = 0
        self.down = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.to and isinstance(args[1], str | torch.device):
            tensor, target = args[0], torch.device(args[1])
            if tensor.device == target:
                return tensor
            self.up += target == GPU
            self.down += target == CPU
            copy = tensor.as_subclass(Tensor).clone()
            return copy.as_subclass(_OnGpu) if target == GPU else copy
        return func(*args, **(kwargs or {}))


@pytest.fixture
def gpu() -> Iterator[FakeGpu]:
    with FakeGpu() as mode:
        yield mode


def on_gpu(size: int, seed: int = 0) -> dict[str, Tensor]:
    return {site: tensor.to(GPU) for site, tensor in entry(size, seed=seed).items()}


def where(bank: ReferenceBank, *names: str) -> str:
    """One letter for each entry: d for device, r for RAM, - for forgotten. Uses none of them."""
    places = {name: bank._entries.get(key(name)) for name in names}
    return "".join("-" if place is None else "r" if place.in_ram else "d" for place in places.values())


# --- one tier ---------------------------------------------------------------------------------------------------------


def test_the_bank_returns_what_it_was_given_and_counts() -> None:
    bank = ReferenceBank(0, 1000)
    kept = {LAYER: torch.randn(3, 4), "4": torch.randn(2).half()}
    bank.put(key(), kept)

    found = bank.get(key(), [LAYER, "4"], CPU)
    assert found is not None and equal(found, kept)
    assert all(found[site].data_ptr() == kept[site].data_ptr() for site in kept)  # no copy on the way
    assert bank.get(key("b"), None, CPU) is None
    assert bank.stats == (1, 1, 0, 0, 1, 0, 52)
    assert key() in bank and key("b") not in bank


@pytest.mark.parametrize("other", [key("b"), key(sigma=1.0 + 2**-52), key(model="n"), key()._replace(conditioning="")])
def test_every_part_of_the_key_counts(other: BankKey) -> None:
    bank = ReferenceBank(0, 1000)
    bank.put(key(), entry(1))
    assert bank.get(other, None, CPU) is None


def test_a_hit_needs_all_sites_and_gives_those_asked_for() -> None:
    bank = ReferenceBank(0, 1000)
    kept = entry(9, sites=3)
    bank.put(key(), kept)

    assert bank.get(key(), ["0", "3"], CPU) is None
    assert equal(bank.get(key(), {"0", "2"}, CPU), {"0": kept["0"], "2": kept["2"]})
    assert equal(bank.get(key(), None, CPU), kept)
    assert bank.get(key(), (), CPU) == {}
    assert bank.stats[:2] == (3, 1)


def test_put_adds_sites_and_the_newer_tensor_of_a_site_wins() -> None:
    bank = ReferenceBank(0, 100)
    first, second = entry(20, sites=2), {"1": torch.ones(30, dtype=torch.uint8), "2": torch.zeros(5, dtype=torch.uint8)}
    bank.put(key(), first)
    bank.put(key(), second)
    assert equal(bank.get(key(), None, CPU), {"0": first["0"], "1": second["1"], "2": second["2"]})
    assert bank.stats.ram_bytes == 45
    assert bank.stats.entries == 1


def test_what_was_got_stays_as_it_is_when_the_entry_changes() -> None:
    bank = ReferenceBank(0, 100)
    bank.put(key(), entry(20, sites=2))
    found = bank.get(key(), None, CPU)
    assert found is not None
    bank.put(key(), {"2": torch.zeros(3)})
    assert found.keys() == {"0", "1"}
    found.clear()
    assert bank.get(key(), ["0", "1", "2"], CPU) is not None


def test_entries_that_grow_beyond_the_budget_are_forgotten() -> None:
    bank = ReferenceBank(0, 100)
    bank.put(key(), entry(60))
    bank.put(key(), {"1": torch.zeros(41, dtype=torch.uint8)})
    assert key() not in bank
    assert bank.stats.ram_bytes == 0


def test_a_view_does_not_keep_the_memory_it_is_part_of() -> None:
    """Or the bank would hold more than it counts."""
    bank = ReferenceBank(0, 10_000)
    large = torch.randn(100, 10, requires_grad=True)
    bank.put(key(), {"0": large[3], "1": large[:, 2]})
    found = bank.get(key(), None, CPU)
    assert found is not None
    assert bank.stats.ram_bytes == 440 == sum(tensor.untyped_storage().nbytes() for tensor in found.values())
    assert torch.equal(found["0"], large[3]) and torch.equal(found["1"], large[:, 2])
    assert not found["0"].requires_grad


def test_tensors_of_one_entry_lie_together(gpu: FakeGpu) -> None:
    bank = ReferenceBank(100, 100)
    with pytest.raises(ValueError, match="lie on cpu, cuda:0: bring them onto one device"):
        bank.put(key(), {"0": torch.zeros(1), "1": torch.zeros(1).to(GPU)})
    assert key() not in bank


@pytest.mark.parametrize(("device", "ram", "name"), [(-1, 0, "device_budget"), (0, -1, "ram_budget")])
def test_a_negative_budget_is_refused(device: int, ram: int, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is -1 bytes"):
        ReferenceBank(device, ram)


def test_clear_and_drop_forget_and_keep_counting() -> None:
    bank = ReferenceBank(0, 100)
    for model in ("m", "n"):
        for name in ("a", "b"):
            bank.put(key(name, model=model), entry(10))
    assert bank.get(key(), None, CPU) is not None
    bank.drop("m")
    assert [key(name, model=model) in bank for model in ("m", "n") for name in ("a", "b")] == [0, 0, 1, 1]
    assert bank.stats == (1, 0, 0, 0, 2, 0, 20)
    bank.clear()
    assert bank.stats == (1, 0, 0, 0, 0, 0, 0)


@settings(max_examples=100, deadline=None)
@given(
    steps=st.lists(st.tuples(st.booleans(), st.sampled_from("abcdef"), st.integers(0, 60)), max_size=60),
    budget=st.integers(0, 150),
)
def test_in_memory_alone_it_is_the_simple_bank(steps: list[tuple[bool, str, int]], budget: int) -> None:
    """Against a model so simple that it is right at sight: the device's budget plays no part."""
    bank, model = ReferenceBank(10_000, budget), {}
    for i, (read, name, size) in enumerate(steps):
        if read:
            found = bank.get(key(name), None, CPU)
            assert (found is not None) == (name in model)
            if name in model:
                assert equal(found, model[name])
                model[name] = model.pop(name)
        else:
            kept = entry(size, seed=i)
            bank.put(key(name), kept)
            model.pop(name, None)
            if size <= budget:
                while sum(tensor["0"].nbytes for tensor in model.values()) + size > budget:
                    del model[next(iter(model))]
                model[name] = kept
        assert {k.reference for k in bank._entries} == set(model)
        assert bank.stats.ram_bytes == sum(tensor["0"].nbytes for tensor in model.values()) <= budget
        assert bank.stats.device_bytes == bank.stats.moved == 0


# --- two tiers --------------------------------------------------------------------------------------------------------


def test_what_leaves_the_device_goes_to_ram_and_from_there_to_nowhere(gpu: FakeGpu) -> None:
    bank = ReferenceBank(20, 20)
    for i, name in enumerate("abcde"):
        bank.put(key(name), on_gpu(10, seed=i))
    assert where(bank, *"abcde") == "-rrdd"
    assert bank.stats == (0, 0, 3, 1, 4, 20, 20)
    assert equal(bank.get(key("b"), None, CPU), entry(10, seed=1))


def test_a_read_from_ram_comes_back_into_free_room(gpu: FakeGpu) -> None:
    bank = ReferenceBank(20, 100)
    for i, name in enumerate("abc"):
        bank.put(key(name), on_gpu(10, seed=i))
    assert where(bank, *"abc") == "rdd"
    bank._pop(key("b"))
    found = bank.get(key("a"), None, GPU)
    assert equal(found, entry(10)) and found is not None and found["0"].device == GPU
    assert where(bank, *"ac") == "dd"
    assert bank.stats.device_bytes == 20 and bank.stats.ram_bytes == 0


def test_a_read_from_ram_pushes_out_only_what_was_not_used_since_its_own_last_use(gpu: FakeGpu) -> None:
    bank = ReferenceBank(20, 100)
    for name in "abc":
        bank.put(key(name), on_gpu(10))
    found = bank.get(key("a"), None, GPU)  # both others are newer
    assert found is not None and found["0"].device == GPU
    assert where(bank, *"abc") == "rdd"
    bank.get(key("c"), None, GPU)
    bank.get(key("a"), None, GPU)  # b was not used since
    assert where(bank, *"abc") == "drd"


def test_circles_of_sigmas_above_the_budget_still_find_the_device(gpu: FakeGpu) -> None:
    """Plain least-recently-used would find none of the 10 sigmas there, and pay for two copies every time."""
    bank = ReferenceBank(60, 1000)
    for _ in range(4):
        before = gpu.up, gpu.down
        for sigma in range(10):
            if bank.get(key(sigma=sigma), None, GPU) is None:
                bank.put(key(sigma=sigma), {"0": _OnGpu(torch.zeros(10, dtype=torch.uint8))})
    assert (gpu.up, gpu.down) == (before[0] + 4, before[1])
    assert bank.stats.hits == 30


def test_an_entry_above_the_devices_budget_lives_in_ram_and_one_above_both_nowhere(gpu: FakeGpu) -> None:
    bank = ReferenceBank(10, 30)
    bank.put(key("a"), on_gpu(10))
    bank.put(key("b"), on_gpu(30))
    bank.put(key("c"), on_gpu(31))
    assert where(bank, *"abc") == "dr-"
    found = bank.get(key("b"), None, GPU)
    assert equal(found, entry(30)) and found is not None and found["0"].device == GPU
    assert where(bank, *"abc") == "dr-"


def test_an_entry_too_large_for_ram_leaves_what_is_there(gpu: FakeGpu) -> None:
    bank = ReferenceBank(30, 10)
    bank.put(key("a"), entry(10))
    bank.put(key("b"), on_gpu(30))
    bank.put(key("c"), on_gpu(10))
    assert where(bank, *"abc") == "r-d"
    assert bank.stats.evicted == 1


def test_the_older_one_yields_in_ram_too(gpu: FakeGpu) -> None:
    """Moving down does not make an entry newer than what was used later."""
    bank = ReferenceBank(10, 10)
    bank.put(key("a"), on_gpu(10))
    bank.put(key("b"), entry(10))
    bank.put(key("c"), on_gpu(10))
    assert where(bank, *"abc") == "-rd"
    assert gpu.down == 0  # what is forgotten is not copied first


def test_added_sites_bring_the_rest_to_where_they_are(gpu: FakeGpu) -> None:
    bank = ReferenceBank(20, 100)
    bank.put(key("a"), entry(10))
    assert where(bank, "a") == "r"
    bank.put(key("a"), {"1": torch.ones(10, dtype=torch.uint8).to(GPU)})
    assert where(bank, "a") == "d"
    bank.put(key("a"), {"2": torch.ones(10, dtype=torch.uint8).to(GPU)})
    assert where(bank, "a") == "r"
    found = bank.get(key("a"), ["0", "1", "2"], CPU)
    assert equal(found, {**entry(10), "1": torch.ones(10, dtype=torch.uint8), "2": torch.ones(10, dtype=torch.uint8)})
    assert bank.stats.device_bytes == 0 and bank.stats.ram_bytes == 30


def test_reading_into_ram_leaves_the_entry_on_the_device(gpu: FakeGpu) -> None:
    bank = ReferenceBank(20, 100)
    bank.put(key(), on_gpu(10))
    found = bank.get(key(), None, CPU)
    assert found is not None and found["0"].device == CPU
    assert where(bank, "a") == "d"


class Machine(RuleBasedStateMachine):
    """Any order of operations on both tiers, against what was put."""

    @initialize(device=st.integers(0, 60), ram=st.integers(0, 60))
    def start(self, device: int, ram: int) -> None:
        self.mode = FakeGpu()
        self.mode.__enter__()
        self.bank = ReferenceBank(device, ram)
        self.put_ever: dict[BankKey, dict[str, Tensor]] = {}
        self.uses = count()
        self.last_use: dict[BankKey, int] = {}

    def teardown(self) -> None:
        if hasattr(self, "mode"):
            self.mode.__exit__(None, None, None)

    @rule(name=st.sampled_from("abcd"), site=st.sampled_from("012"), size=st.integers(0, 40), gpu=st.booleans())
    def put(self, name: str, site: str, size: int, gpu: bool) -> None:
        there = key(name) in self.bank
        tensor = entry(size, seed=next(self.uses))["0"]
        known = self.put_ever[key(name)] if there else {}
        self.put_ever[key(name)] = {**known, site: tensor}
        self.last_use[key(name)] = next(self.uses)
        self.bank.put(key(name), {site: tensor.to(GPU) if gpu else tensor})
        total = sum(tensor.nbytes for tensor in self.put_ever[key(name)].values())
        fits = total <= self.bank.ram_budget or (gpu and total <= self.bank.device_budget)
        assert (key(name) in self.bank) == fits

    @rule(name=st.sampled_from("abcd"), sites=st.sets(st.sampled_from("012")), gpu=st.booleans())
    def get(self, name: str, sites: set[str], gpu: bool) -> None:
        there = key(name) in self.bank
        known = self.put_ever.get(key(name), {})
        stats = self.bank.stats
        device = GPU if gpu else CPU
        found = self.bank.get(key(name), sites, device)
        hit = there and sites <= known.keys()
        assert self.bank.stats[:2] == (stats.hits + hit, stats.misses + (not hit))
        assert (found is not None) == hit
        if found is not None:
            assert equal(found, {site: known[site] for site in sites})
            assert all(tensor.device == device for tensor in found.values())
            self.last_use[key(name)] = next(self.uses)

    @rule()
    def clear(self) -> None:
        self.bank.clear()
        assert self.bank.stats.entries == 0

    @precondition(lambda self: hasattr(self, "bank"))
    @invariant()
    def the_books_balance(self) -> None:
        held = list(self.bank._entries.values())
        sizes = {tier: sum(t.nbytes for e in held if e.in_ram == tier for t in e.tensors.values()) for tier in (0, 1)}
        assert self.bank.stats.device_bytes == sizes[0] <= self.bank.device_budget
        assert self.bank.stats.ram_bytes == sizes[1] <= self.bank.ram_budget
        assert self.bank.stats.entries == len(held)
        assert all((t.device == CPU) == e.in_ram for e in held for t in e.tensors.values())
        assert [*self.bank._entries] == sorted(self.bank._entries, key=lambda k: self.last_use[k])


Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestAnyOrder = Machine.TestCase


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_real_device() -> None:
    sizes = 1 << 20
    bank = ReferenceBank(3 * sizes, 10 * sizes)
    originals = {name: entry(sizes, seed=i) for i, name in enumerate("abcde")}
    for name, tensors in originals.items():
        bank.put(key(name), {site: tensor.cuda() for site, tensor in tensors.items()})
    assert where(bank, *"abcde") == "rrddd"
    for _ in range(2):
        for name, tensors in originals.items():
            found = bank.get(key(name), None, GPU)
            assert found is not None and found["0"].device == GPU
            assert equal({site: tensor.cpu() for site, tensor in found.items()}, tensors)


@pytest.mark.parametrize("ram", [100, 25, 0])
def test_offloading_empties_the_device_and_keeps_what_was_used_last(gpu: FakeGpu, ram: int) -> None:
    bank = ReferenceBank(100, ram)
    names = "abcd"
    for i, name in enumerate(names):
        bank.put(key(name), on_gpu(10, seed=i))
    assert bank.get(key("a"), None, GPU) is not None

    bank.offload()

    kept = "bcda" if ram == 100 else "da" if ram == 25 else ""
    assert [one.reference for one in bank._entries] == list(kept)
    assert bank.stats.device_bytes == 0
    assert (bank.stats.ram_bytes, bank.stats.evicted) == (10 * len(kept), len(names) - len(kept))
    for name in kept:
        assert equal(bank.get(key(name), None, CPU), entry(10, seed=names.index(name)))
        assert equal(bank.get(key(name), None, GPU), entry(10, seed=names.index(name)))


# --- files ------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    sigmas=st.lists(st.floats(allow_nan=False), unique=True, min_size=1, max_size=4),
    sites=st.lists(
        st.text(max_size=5),
        unique=True,
        max_size=4,
    ),
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 4), max_size=3),
    seed=st.integers(0, 1000),
)
def test_a_file_gives_back_what_it_was_given(
    tmp_path_factory: pytest.TempPathFactory, sigmas: list[float], sites: list[str], dtype: Any, shape: list, seed: int
) -> None:
    path = tmp_path_factory.mktemp("bank") / "cache.safetensors"
    generator = torch.Generator().manual_seed(seed)
    entries = {
        key("référence", sigma=sigma): {site: torch.randn(shape, generator=generator).to(dtype) for site in sites}
        for sigma in sigmas
    }
    bank, other = ReferenceBank(0, 10_000), ReferenceBank(0, 10_000)
    for k, tensors in entries.items():
        bank.put(k, tensors)
    assert bank.save(path, "m", "m", "demo") == len(entries)
    assert other.load(path, "m", "m", "demo") == len(entries)
    for k, tensors in entries.items():
        assert equal(other.get(k, sites, CPU), tensors)
    assert [*other._entries] == [*bank._entries]


def test_a_file_holds_one_model_and_the_references_asked_for(tmp_path: Path) -> None:
    bank, other = ReferenceBank(0, 1000), ReferenceBank(0, 1000)
    for name, model in (("a", "m"), ("b", "m"), ("c", "m"), ("a", "n")):
        bank.put(key(name, model=model), entry(5))
    assert bank.save(tmp_path / "new" / "cache.safetensors", "m", "m", "demo", ["a", "c"]) == 2
    assert other.load(tmp_path / "new" / "cache.safetensors", "m", "m", "demo") == 2
    assert [*other._entries] == [key("a"), key("c")]
    with pytest.raises(ValueError, match="holds nothing that SDXL saw"):
        bank.save(tmp_path / "cache.safetensors", "o", "o", "SDXL")
    with pytest.raises(ValueError, match="sample with them once"):
        bank.save(tmp_path / "cache.safetensors", "m", "m", "demo", ["d"])
    assert not (tmp_path / "cache.safetensors").exists()


def test_tensors_of_any_memory_layout_and_place_can_be_saved(tmp_path: Path, gpu: FakeGpu) -> None:
    bank, other = ReferenceBank(1000, 1000), ReferenceBank(0, 1000)
    shared = torch.randn(4, 6)
    tensors = {"0": shared, "1": shared, "2": shared.t(), "3": shared.reshape(-1), "4": torch.randn(1, 3).expand(2, 3)}
    bank.put(key("a"), tensors)
    bank.put(key("b"), on_gpu(10))
    bank.save(tmp_path / "cache", "m", "m", "demo")
    assert other.load(tmp_path / "cache", "m", "m", "demo") == 2
    assert equal(other.get(key("a"), None, CPU), tensors)
    assert equal(other.get(key("b"), None, CPU), entry(10))


def test_loading_adds_to_what_is_there(tmp_path: Path) -> None:
    bank, other = ReferenceBank(0, 100), ReferenceBank(0, 100)
    bank.put(key(), entry(20))
    bank.save(tmp_path / "cache", "m", "m", "demo")
    more = {"7": torch.ones(5, dtype=torch.uint8)}
    other.put(key(), more)
    other.put(key("z"), entry(20))
    assert other.load(tmp_path / "cache", "m", "m", "demo") == 1
    assert equal(other.get(key(), None, CPU), {**entry(20), **more})
    assert key("z") in other


def test_loading_obeys_the_budget_and_says_how_much_it_holds(tmp_path: Path) -> None:
    bank, other = ReferenceBank(0, 100), ReferenceBank(0, 50)
    for name in "abc":
        bank.put(key(name), entry(20))
    bank.save(tmp_path / "cache", "m", "m", "demo")
    other.put(key("z"), entry(20))
    assert other.load(tmp_path / "cache", "m", "m", "demo") == 2
    assert [*other._entries] == [key("b"), key("c")]  # what was used last in the other bank
    found = other.get(key("b"), None, CPU)
    assert found is not None and found["0"].untyped_storage().nbytes() == 20  # not the whole mapped file


def test_the_file_may_be_replaced_while_what_it_gave_is_in_use(tmp_path: Path) -> None:
    bank = ReferenceBank(0, 100)
    bank.put(key(), entry(20))
    bank.save(tmp_path / "cache", "m", "m", "demo")
    bank.clear()
    bank.load(tmp_path / "cache", "m", "m", "demo")
    bank.save(tmp_path / "cache", "m", "m", "demo")
    (tmp_path / "cache").write_bytes(b"")
    assert equal(bank.get(key(), None, CPU), entry(20))
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_a_save_that_fails_leaves_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = ReferenceBank(0, 100)
    bank.put(key(), entry(20))
    bank.save(tmp_path / "cache", "m", "m", "demo")
    before = (tmp_path / "cache").read_bytes()

    def full(arrays: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(before[:50])
        raise OSError("no space left on device")

    monkeypatch.setattr("inversion_core.bank.save_file", full)
    with pytest.raises(OSError, match="no space left"):
        bank.save(tmp_path / "cache", "m", "m", "demo")
    assert (tmp_path / "cache").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def _rewritten(path: Path, change: Callable[[dict[str, str], dict[str, Tensor]], object]) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(metadata, tensors)
    save_file(tensors, path, metadata)


def _entries(change: Callable[[Any], object]) -> Callable[[dict[str, str], Any], None]:
    def changed(metadata: dict[str, str], tensors: Any) -> None:
        index = json.loads(metadata["entries"])
        change(index)
        metadata["entries"] = json.dumps(index)

    return changed


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (_cut, "is damaged or no safetensors file"),
    "empty": (lambda path: path.write_bytes(b""), "is damaged or no safetensors file"),
    "text": (lambda path: path.write_bytes(b"a text that is no cache"), "is damaged or no safetensors file"),
    "weights": (lambda path: save_file({"w": torch.zeros(2)}, path), "is no reference cache"),
    "newer": (
        lambda p: _rewritten(p, lambda m, t: m.update(version="2")),
        "of version 2, but .* reads version 1",
    ),
    "no tensor": (lambda p: _rewritten(p, lambda m, t: t.pop("1.0")), "is damaged"),
    "no list": (lambda p: _rewritten(p, lambda m, t: m.pop("entries")), "is damaged"),
    "no json": (lambda p: _rewritten(p, lambda m, t: m.update(entries="[")), "is damaged"),
    "no sigma": (lambda p: _rewritten(p, _entries(lambda e: e[1].pop("sigma"))), "is damaged"),
    "no site": (lambda p: _rewritten(p, _entries(lambda e: e[1].update(sites=[{}]))), "is damaged"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_is_no_whole_cache_is_refused_and_changes_nothing(tmp_path: Path, name: str) -> None:
    spoil, message = REFUSED[name]
    path = tmp_path / "cache.safetensors"
    bank = ReferenceBank(0, 25)
    bank.put(key("a"), entry(10))
    bank.put(key("b"), entry(10))
    bank.save(path, "m", "m", "demo")
    bank.clear()
    bank.put(key("c"), entry(20))
    before = bank.stats
    spoil(path)
    with pytest.raises(ValueError, match=message) as error:
        bank.load(path, "m", "m", "demo")
    assert str(path) in str(error.value)
    assert bank.stats == before and [*bank._entries] == [key("c")]


def test_no_broken_byte_of_the_header_breaks_the_bank(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    bank = ReferenceBank(0, 100)
    bank.put(key("a"), {LAYER: entry(10)["0"], "4": entry(10)["0"]})
    bank.save(path, "m", "m", "demo")
    whole = path.read_bytes()
    refused = 0
    for i in range(8 + int.from_bytes(whole[:8], "little")):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
        other = ReferenceBank(0, 100)
        try:
            other.load(path, "m", "m", "demo")
        except ValueError:
            refused += 1
            assert other.stats.entries == 0
    assert refused > 100


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="cache"):
        ReferenceBank(0, 100).load(tmp_path / "cache", "m", "m", "demo")


def test_another_models_cache_is_refused_by_name(tmp_path: Path) -> None:
    bank = ReferenceBank(0, 100)
    bank.put(key(model="12345678" * 8), entry(20))
    bank.save(tmp_path / "cache", "12345678" * 8, "12345678" * 8, "SD1.5")
    bank.clear()
    with pytest.raises(ValueError) as error:
        bank.load(tmp_path / "cache", "abcdef" * 10, "abcdef" * 10, "SDXL with detail.safetensors")
    message = str(error.value)
    for part in ("what SD1.5 (fingerprint 123456781234)", "is SDXL with detail.safetensors (fingerprint abcdefabcdef)"):
        assert part in message
    assert "connect the model that the cache was saved with, or sample with this one" in message
    assert bank.stats.entries == 0


# --- threads ----------------------------------------------------------------------------------------------------------


def test_threads_may_use_it_together(tmp_path: Path) -> None:
    bank = ReferenceBank(0, 200)
    bank.put(key("a"), entry(10))
    bank.save(tmp_path / "cache", "m", "m", "demo")
    failures: list[BaseException] = []
    done = threading.Event()

    def guarded(work: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - shown by the test
                failures.append(error)

        return run

    def sample(number: int) -> None:
        for i in range(300):
            name = "abcdefgh"[(i * (number + 3)) % 8]
            found = bank.get(key(name), None, CPU)
            assert found is None or equal(found, entry(10 + ord(name) % 7, seed=ord(name)))
            bank.put(key(name), entry(10 + ord(name) % 7, seed=ord(name)))
            if i % 50 == 0:
                bank.drop("m") if number else bank.load(tmp_path / "cache2", "n", "n", "demo")

    def watch() -> None:
        while not done.is_set():
            stats = bank.stats
            assert 0 <= stats.ram_bytes <= 200
            assert stats.entries > 0 or stats.ram_bytes == 0

    other = ReferenceBank(0, 200)
    other.put(key("x", model="n"), entry(30))
    other.save(tmp_path / "cache2", "n", "n", "demo")
    bank.clear()
    watcher = threading.Thread(target=guarded(watch))
    workers = [threading.Thread(target=guarded(lambda number=number: sample(number))) for number in range(3)]
    for thread in (watcher, *workers):
        thread.start()
    for thread in workers:
        thread.join()
    done.set()
    watcher.join()
    assert not failures
    assert bank.stats.hits + bank.stats.misses == 900


def test_the_numbers_can_be_read_while_an_operation_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy may wait for the device; the server's thread must not."""
    bank = ReferenceBank(0, 100)
    inside, go_on = threading.Event(), threading.Event()

    def slow(tensor: Tensor, device: torch.device) -> Tensor:
        inside.set()
        assert go_on.wait(10)
        return tensor

    monkeypatch.setattr("inversion_core.bank._moved", slow)
    thread = threading.Thread(target=bank.put, args=(key(), entry(10)))
    thread.start()
    assert inside.wait(10)
    assert bank.stats.ram_bytes == 0
    go_on.set()
    thread.join()
    assert bank.stats.ram_bytes == 10
