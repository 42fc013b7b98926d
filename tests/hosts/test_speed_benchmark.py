"""The speed benchmark on tiny UNets: what it counts, and that its rivals are rivals. Never a time."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import speed, steps, training_steps
from benchmarks.arithmetic import extra_flops, flops_of
from benchmarks.memory import peak_bytes
from benchmarks.rivals import doubled_masactrl, materialised_cross_image
from benchmarks.unets import UNet, build, sample, within_a_run
from inversion_core.hosts.comfy_injection import attach, last_report
from inversion_core.injection import Injection, Window
from inversion_core.presets import CROSS_IMAGE, MASACTRL, PRESETS, Preset

Work = Callable[[], None]


@pytest.fixture(scope="module")
def unet() -> UNet:
    return build("sd15", 16, torch.float32, tiny=True)


def injections_of(preset: Preset, unet: UNet) -> tuple[Injection, ...]:
    return preset.injections((unet.appearance,), unet.shape if preset.shape else None)


@pytest.mark.parametrize("name", ["default", "masactrl", "visual-style", "style-id"])
def test_with_a_warm_bank_nothing_is_computed_twice_or_in_vain(unet: UNet, name: str) -> None:
    """The host's FLOPs are those of the formulas, to the last one. (Biases and contrast take other kernels.)"""
    injections = injections_of(PRESETS[name], unet)
    counted = []

    def work(plain: Work, edited: Work) -> None:
        edited()
        counted.append(flops_of(edited) - flops_of(plain))

    within_a_run(unet, attach(unet.patcher, *injections), work)
    assert counted == [extra_flops(unet, injections)]


@pytest.mark.parametrize("name", ["default", "masactrl", "visual-style", "style-aligned"])
def test_on_a_stack_of_flux_blocks_nothing_is_computed_twice_either(name: str) -> None:
    """Keys that count more than others go through the attention with eight channels more: not the formula's."""
    flux = build("flux", 16, torch.float32, tiny=True)
    preset = PRESETS[name]
    injections = preset.injections((flux.appearance,), flux.shape if preset.shape else None, transformer=True)
    injections = tuple(replace(one, edit=replace(one.edit, reference_bias=0.0)) for one in injections)
    counted = []

    def work(plain: Work, edited: Work) -> None:
        for _ in range(2):
            edited()  # the first is measured for the report
        counted.append(flops_of(edited) - flops_of(plain))

    within_a_run(flux, attach(flux.patcher, *injections), work)
    assert counted == [extra_flops(flux, injections)]


def test_more_keys_need_more_and_shared_ones_less(unet: UNet) -> None:
    assert extra_flops(unet, injections_of(PRESETS["style-aligned"], unet)) > 0
    assert extra_flops(unet, injections_of(PRESETS["default"], unet)) < 0


def test_rows_are_counted_by_the_host() -> None:
    found = steps.rows(3)
    assert found.pop("steps") == 3
    assert found.keys() == PRESETS.keys()
    for name, counts in found.items():
        references = 2 if PRESETS[name].shape else 1
        assert [one["picture"] for one in counts.values()] == [6, 6]
        assert 0 < counts["cold"]["references"] <= references * 3
        assert counts["warm"]["references"] == 0


def test_everything_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    presets = {one.name: one for one in (MASACTRL, CROSS_IMAGE)}
    monkeypatch.setattr(steps, "PRESETS", presets)
    monkeypatch.setattr(speed, "CONTRAST_TOKENS", 64)
    monkeypatch.setattr(speed, "HEADS", {"sd15": (8, 40)})
    file = tmp_path / "speed.json"
    figures = speed.measure(file, ("attention", "contrast", "rows"), speed.QUICK, ("sd15",))
    assert json.loads(file.read_text(encoding="utf-8")) == figures
    measured = figures["unets"]["sd15"]
    for name in presets:
        found = measured["presets"][name]
        assert {"cached_ratio", "first_run_ratio", "flop_floor", "peak_memory_ratio"} <= found.keys()
        assert all(value > 0 for value in found.values())
        assert found["first_run_rows"] == 1
    text = speed.tables(figures)
    for name in (*measured["presets"], *measured["rivals"], "Exact contrast", "Rows at 10 steps"):
        assert name in text


def test_the_rivals_do_the_same_edit_at_a_higher_price(unet: UNet) -> None:
    """With one prompt for everything they agree with the presets: references see no other prompt then."""
    unet = replace(unet, negative=unet.positive)
    always = {"window": Window(), "shape_window": Window(), "rows": "all"}
    for preset, rival in (
        (MASACTRL, doubled_masactrl(unet.patcher, unet.appearance)),
        (CROSS_IMAGE, materialised_cross_image(unet.patcher, unet.appearance, unet.shape)),
    ):
        ours = attach(unet.patcher, *(replace(one, **always) for one in injections_of(preset, unet)))
        made, theirs = sample(unet, ours, 2, 5.0), sample(unet, rival, 2, 5.0)
        torch.testing.assert_close(made, theirs, atol=1e-4, rtol=1e-3)
        assert (made - sample(unet, unet.patcher, 2, 5.0)).abs().max() > 1e-2
        assert last_report(ours).rows == 4


def test_the_peak_is_what_is_held_at_once() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def mebibytes(n: int) -> torch.Tensor:
        return torch.empty(n * 2**20, dtype=torch.uint8, device=device)

    def work() -> None:
        first = mebibytes(3)
        second = mebibytes(2)
        del first
        third = mebibytes(1)
        del second, third

    assert peak_bytes(work) == 5 * 2**20


# --- training ---------------------------------------------------------------------------------------------------------


def test_all_three_train_on_the_same_model() -> None:
    """diffusers' UNet and text encoder give what ComfyUI's do, and its loop changes one row of the table alone."""
    with torch.inference_mode(False):
        setting = training_steps.Setting.of(torch.float32, 8, 1, tiny=True)
        states = torch.randn(1, 77, 64)
        noisy, timestep = torch.randn(1, 4, 8, 8), torch.tensor([500])
        with torch.no_grad():
            ours = setting.patcher.model.diffusion_model(noisy, timestep, context=states)
            torch.testing.assert_close(setting.unet(noisy, timestep, states).sample, ours, atol=1e-4, rtol=1e-3)
            tokens = setting.clip.tokenize("a red star")
            ids = torch.tensor([[one for one, _ in tokens["l"][0]]])
            encoded = setting.clip.cond_stage_model.encode_token_weights(tokens)[0]
            torch.testing.assert_close(setting.text(ids)[0], encoded, atol=1e-4, rtol=1e-3)
        rival = training_steps.TextualInversion(setting)
        before = rival.table.weight.detach().clone()
        rival.begin()
        rival.step()
        changed = (rival.table.weight.detach() != before).any(1)
        assert changed.nonzero().flatten().tolist() == [rival.word]


def test_training_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is held at once is measured elsewhere: recording it takes long."""
    monkeypatch.setattr(training_steps, "peak_bytes", lambda work: work() or 2**20)
    size = speed.QUICK._replace(latents={"sd15": 8})
    file = tmp_path / "speed.json"
    figures = speed.measure(file, ("training",), size)
    assert json.loads(file.read_text(encoding="utf-8")) == figures
    assert figures["training"]["kinds"].keys() == {"shape", "appearance"}
    for found in figures["training"]["kinds"].values():
        assert all(value > 0 for value in found.values())
        assert {"training_step_ratio", "diffusers_step_ratio", "checkpointed_peak_memory_ratio"} <= found.keys()
    assert "Training on sd15" in speed.tables(figures)
