"""``python -m benchmarks.color --json FILE``: do colours come out as they truly are, and at what cost?

64 withheld pairs of the demo world: the true composition is rendered, its object recoloured (by another colour's
tones, by a curve for each channel, or by a coloured light that mixes channels), and matched back to the picture the
appearance came from. CIEDE2000 against the truth, inside the object. Times are CPU time of one thread, each taken in
turns with kornia's RGB -> CIELAB -> RGB of as many pixels, and medians.

``--video`` adds the memory that 300 frames of 720p take, ``--guidance`` what AdaIN Color Guidance does on the demo
model (needs ComfyUI); with ``--only`` nothing else is measured, and what FILE holds of the rest is kept. ``--docs``
writes FILE's tables into docs/color.md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from kornia.color import lab_to_rgb, rgb_to_lab
from skimage.color import deltaE_ciede2000, rgb2lab
from skimage.exposure import match_histograms
from torch import Tensor
from tqdm import tqdm

from benchmarks.color_tables import write_tables
from benchmarks.quality.measures import interval
from demo import world
from inversion_core.color import ColorMatch, match_pictures
from inversion_core.statistics import Method

PAIRS = 64
GUIDED_PAIRS = 32
"""How many of the pairs are sampled for the guidance: half a minute each on one core."""
ROUNDS = 5
FIRST_SEED = 300_000
"""Disjoint from training (seeds of a million and up) and from the other benchmarks."""
KINDS = ("colour", "curves", "light")

Figures = dict[str, Any]


class Case:
    """One recoloured composition and what is known of it. Pictures (1, H, W, 3) of 8 bits, masks (1, H, W)."""

    def __init__(self, index: int) -> None:
        rng = np.random.default_rng(FIRST_SEED + index)
        a = world.sample(FIRST_SEED + 2 * index, shapes=world.WITHHELD_SHAPES, textures=world.TEXTURES)
        b = world.sample(FIRST_SEED + 2 * index + 1, shapes=tuple(world.SHAPES), textures=world.TEXTURES)
        composition = world.compose(a, b, a)
        truth, reference = world.render(composition), world.render(b)
        self.kind = KINDS[index % len(KINDS)]
        recoloured = _recoloured(self.kind, composition, truth, rng)
        self.truth, self.reference, self.picture = (_eight_bits(i) for i in (truth.image, reference.image, recoloured))
        self.mask, self.mask_ref = (torch.from_numpy(i)[None] for i in (truth.mask, reference.mask))

    def error(self, picture: Tensor) -> float:
        """Mean CIEDE2000 to the truth over the object's pixels."""
        return delta_e(picture[0].numpy(), self.truth[0].numpy(), self.mask[0].numpy())


def delta_e(picture: np.ndarray, truth: np.ndarray, mask: np.ndarray) -> float:
    difference = deltaE_ciede2000(rgb2lab(picture), rgb2lab(truth))
    return float(difference[mask > 0.5].mean())


def _recoloured(kind: str, factors: world.Factors, truth: world.Rendered, rng: np.random.Generator) -> np.ndarray:
    if kind == "colour":
        return world.render(replace(factors, appearance=_other_tones(factors.appearance, rng))).image
    if kind == "curves":
        changed = truth.image ** rng.uniform(0.5, 1.8, 3).astype(np.float32)
    else:
        light = np.diag(rng.uniform(0.5, 1.4, 3)) + rng.uniform(0, 0.25, (3, 3))
        linear = np.where(truth.image > 0.04045, ((truth.image + 0.055) / 1.055) ** 2.4, truth.image / 12.92)
        linear = np.clip(linear @ light.T, 0, 1)
        changed = np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, linear * 12.92)
    share = truth.mask[..., None]
    return truth.image * (1 - share) + changed * share


def _other_tones(look: world.Appearance, rng: np.random.Generator) -> world.Appearance:
    """Another colour's two tones, the second lighter or darker as it was: which tone was which stays decidable."""
    colour = str(rng.choice([name for name in world.COLOURS if name != look.colour]))
    tone = np.array(world.COLOURS[colour])
    lighter = sum(look.second_tone) > sum(look.tone)
    second = tone + (1 - tone) * 0.58 if lighter else tone * 0.44
    return replace(look, colour=colour, tone=_triple(tone), second_tone=_triple(second))


def _triple(tone: np.ndarray) -> tuple[float, float, float]:
    return float(tone[0]), float(tone[1]), float(tone[2])


def _eight_bits(image: np.ndarray) -> Tensor:
    return torch.from_numpy(np.round(np.clip(image, 0, 1) * 255).astype(np.float32) / 255)[None]


# --- what ComfyUI's core offers: the whole picture, no masks ----------------------------------------------------------


def _in_lab(match: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def run(picture: Tensor, reference: Tensor) -> Tensor:
        lab, lab_ref = (rgb_to_lab(i.movedim(-1, 1)).flatten(2)[0] for i in (picture, reference))
        planes = match(lab, lab_ref).view(1, 3, *picture.shape[1:3])
        return lab_to_rgb(planes).clamp(0, 1).movedim(1, -1)

    return run


def _reinhard(x: Tensor, y: Tensor) -> Tensor:
    std, mean = torch.std_mean(x, 1, keepdim=True)
    std_ref, mean_ref = torch.std_mean(y, 1, keepdim=True)
    return (x - mean) / std * std_ref + mean_ref


def _mkl(x: Tensor, y: Tensor) -> Tensor:
    def power(matrix: Tensor, exponent: float) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        return vectors @ torch.diag(values.clamp_min(1e-8) ** exponent) @ vectors.T

    root, whiten = power(torch.cov(x), 0.5), power(torch.cov(x), -0.5)
    matrix = whiten @ power(root @ torch.cov(y) @ root, 0.5) @ whiten
    return matrix @ (x - x.mean(1, keepdim=True)) + y.mean(1, keepdim=True)


def _histogram(picture: Tensor, reference: Tensor) -> Tensor:
    matched = match_histograms(picture[0].numpy(), reference[0].numpy(), channel_axis=-1)
    return torch.from_numpy(matched.astype(np.float32))[None]


CORE_LIKE = {
    "core-like reinhard_lab": _in_lab(_reinhard),
    "core-like mkl_lab": _in_lab(_mkl),
    "core-like histogram": _histogram,
}


# --- the measurements -------------------------------------------------------------------------------------------------

Run = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def methods() -> dict[str, Run]:
    """Everything that is compared: (picture, reference, mask, reference's mask) -> picture."""

    def ours(method: Method, space: Any, masked: bool) -> Run:
        match = ColorMatch(method, space)
        if masked:
            return lambda x, y, mask, mask_ref: match_pictures(x, y, mask, mask_ref, match)
        return lambda x, y, mask, mask_ref: match_pictures(x, y, None, None, match)

    def core(run: Callable[[Tensor, Tensor], Tensor]) -> Run:
        return lambda x, y, mask, mask_ref: run(x, y)

    found = {f"{m} {s} masked": ours(m, s, True) for m in get_args(Method) for s in ("lab", "linear_rgb")}
    found |= {f"{m} lab unmasked": ours(m, "lab", False) for m in get_args(Method)}
    return found | {name: core(run) for name, run in CORE_LIKE.items()}


def measure(keep: Callable[[Figures], None]) -> None:
    """Every method; `keep` is called after each, for a full run takes a while."""
    cases = [Case(i) for i in range(PAIRS)]
    before = np.array([case.error(case.picture) for case in cases])
    kinds = np.array([case.kind for case in cases])
    noise = np.random.default_rng(0)
    large = [_eight_bits(noise.uniform(0, 1, (1024, 1024, 3))) for _ in range(2)]
    everywhere = torch.ones(1, 1024, 1024)
    planes = large[0].movedim(-1, 1).contiguous()
    for name, run in tqdm(methods().items(), desc="methods"):
        after = np.array([case.error(run(case.picture, case.reference, case.mask, case.mask_ref)) for case in cases])
        spent, round_trip = milliseconds(
            partial(run, large[0], large[1], everywhere, everywhere), lambda: lab_to_rgb(rgb_to_lab(planes))
        )
        figures = {
            "delta_e_before": float(before.mean()),
            "delta_e_after": float(after.mean()),
            "fall": float(1 - after.mean() / before.mean()),
            **{f"fall_{kind}": float(1 - after[kinds == kind].mean() / before[kinds == kind].mean()) for kind in KINDS},
            "milliseconds_1024": spent,
            "round_trip_milliseconds_1024": round_trip,
        }
        keep({name: figures})
        tqdm.write(f"{name:>28} {after.mean():6.2f} {figures['fall']:6.1%} {spent:6.0f} ms, {spent / round_trip:.2f}")


def milliseconds(*runs: Callable[[], object]) -> list[float]:
    """Median CPU time of each, one thread, taken in turns so that what else the machine does strikes all alike."""
    times = []
    for _ in range(ROUNDS):
        times.append([])
        for run in runs:
            start = time.process_time()
            run()
            times[-1].append(time.process_time() - start)
    return (np.median(times, axis=0) * 1000).tolist()


def measure_video(frames: int = 300) -> Figures:
    """How much memory, beside the frames put in and the frames that come out, the matching takes."""
    import psutil

    process = psutil.Process()
    video = torch.rand(1, 720, 1280, 3).expand(frames, -1, -1, -1)  # one frame in memory, whatever the number
    reference = torch.rand(1, 720, 1280, 3) ** 2
    start, peak = process.memory_info().rss, 0
    clock = time.perf_counter()
    with tqdm(total=frames, desc="frames") as bar:

        def watch(done: int, total: int) -> None:
            nonlocal peak
            peak = max(peak, process.memory_info().rss)
            bar.update()

        result = match_pictures(video, reference, match=ColorMatch("mkl", "lab", frames="all"), progress=watch)
    size = result.numel() * result.element_size()
    return {
        "frames": frames,
        "seconds": time.perf_counter() - clock,
        "result_mib": size / 2**20,
        "beside_the_result_mib": (peak - start - size) / 2**20,
    }


def measure_guidance() -> Figures:
    """KV Injection on the demo model, without and with AdaIN Color Guidance: same pairs, same seeds, same run."""
    from demo import comfy as comfy_host

    comfy_host.ensure_importable()
    from demo.generate import generate
    from demo.judge import Judge
    from demo.model import load_demo_model
    from inversion_core.hosts import comfy_color, comfy_unet
    from inversion_core.metrics import mask_iou
    from inversion_core.presets import PRESETS

    demo, judge = load_demo_model(), Judge.load()
    results: dict[str, list[tuple[float, ...]]] = {"injection": [], "injection + guidance": []}
    for index in tqdm(range(GUIDED_PAIRS), desc="pairs"):
        seed = FIRST_SEED + 2 * index
        a = world.sample(seed, shapes=world.WITHHELD_SHAPES, textures=world.TEXTURES)
        b = world.sample(seed + 1, textures=world.TRAINED_TEXTURES)
        truth = world.render(world.compose(a, b, a))
        mask = torch.from_numpy(truth.mask)
        shape, appearance = (_reference(demo.vae, world.render(one)) for one in (a, b))
        injections = PRESETS["default"].injections([appearance], shape)
        injected = comfy_unet.attach(demo.model, *injections)
        guidance = comfy_color.ColorGuidance(appearance, mask=mask[None, None])
        for name, model in (
            ("injection", injected),
            ("injection + guidance", comfy_color.attach(injected, guidance)),
        ):
            words = f"a shape on {a.background}"
            picture = generate(demo._replace(model=model), [words], [seed], cfg=3.0)
            found = mask_iou(judge.look(picture).mask[0], mask)
            result = picture[0].numpy()
            inside = truth.mask > 0.5
            own, true = (np.broadcast_to(i[inside].mean(0), (1, 1, 3)) for i in (result, truth.image))
            means = delta_e(own, true, np.ones((1, 1)))
            spread = _distribution_error(result[inside], truth.image[inside])
            results[name].append((found, delta_e(result, truth.image, truth.mask), means, spread))
    keys = ("shape_iou", "delta_e", "delta_e_of_mean_colour", "distribution_error")
    figures: Figures = {"pairs": GUIDED_PAIRS}
    plain, guided = (np.array(rows) for rows in results.values())
    for name, rows in (*zip(results, (plain, guided), strict=True), ("change", guided - plain)):
        figures[name] = {}
        for key, column in zip(keys, rows.T, strict=True):
            mean, low, high = interval(column.tolist())
            figures[name] |= {key: mean, f"{key}_low": low, f"{key}_high": high}
    return figures


def _distribution_error(own: np.ndarray, true: np.ndarray) -> float:
    """How far apart the colours of two sets of as many pixels (N, 3) lie, wherever the pixels are: the Wasserstein
    distance along each axis of CIELAB, the mean of the three."""
    a, b = (np.sort(rgb2lab(x[None])[0], axis=0) for x in (own, true))
    return float(np.abs(a - b).mean())


def _reference(vae: Any, rendered: world.Rendered) -> Any:
    from inversion_core.reference import Reference

    latent = vae.encode(torch.from_numpy(rendered.image)[None]).detach().to("cpu", torch.float32).clone()
    mask = torch.from_numpy(rendered.mask)[None, None]
    return Reference(latent, torch.nn.functional.interpolate(mask, size=latent.shape[-2:], mode="area"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.color", description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where the figures are kept")
    parser.add_argument("--video", action="store_true", help="measure the memory for 300 frames of 720p too")
    parser.add_argument("--guidance", action="store_true", help="measure the guidance on the demo model too")
    parser.add_argument("--only", action="store_true", help="not the methods; FILE's other figures stay")
    parser.add_argument("--docs", action="store_true", help="write the tables into docs/color.md")
    options = parser.parse_args()
    file: Path = options.json
    figures: Figures = json.loads(file.read_text(encoding="utf-8")) if options.only and file.exists() else {}

    def keep(found: Figures) -> None:
        figures.update(found)
        file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")

    torch.set_num_threads(1)
    with torch.inference_mode():
        if options.video:  # first, while no memory lies about that others have given back
            keep({"video": measure_video()})
        if not options.only:
            measure(keep)
        if options.guidance:
            keep({"guidance": measure_guidance()})
    if options.docs:
        write_tables(figures)


if __name__ == "__main__":
    main()
