"""Names of a model's self-attentions, and how a person chooses among them.

A place is written as ComfyUI writes it: ``output.3.0`` is the first transformer block of decoder block 3 of a UNet,
``double.7.0`` the attention of double block 7 of a diffusion transformer. Every host uses these names, so that one
choice means the same place everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Part = Literal["input", "middle", "output", "double", "single"]

_PARTS: dict[str, Part] = {
    "encoder": "input",
    "middle": "middle",
    "decoder": "output",
    "double": "double",
    "single": "single",
}
_RULE = re.compile(rf"(?P<part>{'|'.join(_PARTS)})(?:\.(?P<level>[a-z]+)|\[(?P<start>-?\d*):(?P<stop>-?\d*)\])?")
_LEVELS = ("coarse", "mid", "finest", "fine")
_THIRDS = ("early", "mid", "late")


@dataclass(frozen=True, order=True)
class Site:
    """One self-attention of a UNet, or one attention of a diffusion transformer that a picture's tokens take part in.

    Attributes:
        part: encoder ("input"), middle or decoder ("output") of a UNet; "double" or "single", a transformer's blocks
            with two streams or one, as ComfyUI names them.
        number: the block's number within its part.
        index: the attention's number within the block.
        scale: how many latent cells a token spans in each direction: 1, 2, 4, ...
    """

    part: Part
    number: int
    index: int
    scale: int

    @property
    def block(self) -> str:
        """The block's name, ``output.3``."""
        return f"{self.part}.{self.number}"

    @property
    def name(self) -> str:
        """The site's name, ``output.3.0``."""
        return f"{self.block}.{self.index}"


def select(rules: str, sites: Sequence[Site]) -> frozenset[str]:
    """The names of the sites that a list of rules means on a model.

    Args:
        rules: separated by commas, each one of
            ``all``, ``encoder``, ``middle``, ``decoder``;
            ``decoder.coarse``, ``.mid``, ``.finest``: the level of the fewest tokens, those between, that of the most;
            ``decoder.fine``: all levels but the coarsest (the same for ``encoder``; with a single level, that level);
            ``decoder[1:-1]``: from the second to the last but one of its blocks that have self-attention;
            ``double``, ``single``, ``double[1:-1]``: a transformer's blocks by their kind;
            ``early``, ``mid``, ``late``: a transformer's first, second and last third;
            ``output.3`` or ``output.3.0``: a block or a site by its name.
            A question mark after a rule allows it to mean nothing on this model.
        sites: the model's, in the order in which they run.

    Raises:
        ValueError: a rule that is not understood or means nothing; the message lists the model's blocks.
    """
    chosen: set[str] = set()
    for item in rules.split(","):
        rule = item.strip()
        found = _meant(rule.removesuffix("?"), sites)
        if not found and not rule.endswith("?"):
            blocks = ", ".join(dict.fromkeys(site.block for site in sites))
            besides = (
                "double, single, early, mid, late, double[1:-1]"
                if any(_of_transformer(site) for site in sites)
                else "encoder, middle, decoder, decoder.fine, decoder.coarse, decoder[1:-1]"
            )
            raise ValueError(
                f"sites: {rule!r} means no self-attention of this model. Its blocks are {blocks}; allowed besides are "
                f"all, {besides}, several by commas"
            )
        chosen |= {site.name for site in found}
    return frozenset(chosen)


def _meant(rule: str, sites: Sequence[Site]) -> list[Site]:
    if rule == "all":
        return list(sites)
    if rule in _THIRDS:
        return _third(rule, [site for site in sites if _of_transformer(site)])
    match = _RULE.fullmatch(rule)
    if match is None:
        return [site for site in sites if rule in (site.block, site.name)]
    part = [site for site in sites if site.part == _PARTS[match["part"]]]
    if match["level"] is not None:
        return _level(match["level"], part)
    blocks = list(dict.fromkeys(site.block for site in part))
    within = slice(*(int(match[end]) if match[end] else None for end in ("start", "stop")))
    return [site for site in part if site.block in blocks[within]]


def _of_transformer(site: Site) -> bool:
    return site.part in ("double", "single")


def _third(name: str, sites: Sequence[Site]) -> list[Site]:
    """A third of the blocks; what is left over makes the middle larger."""
    blocks = list(dict.fromkeys(site.block for site in sites))
    edge = len(blocks) // 3
    wanted = {"early": blocks[:edge], "mid": blocks[edge : len(blocks) - edge], "late": blocks[len(blocks) - edge :]}
    return [site for site in sites if site.block in wanted[name]]


def _level(name: str, sites: Sequence[Site]) -> list[Site]:
    scales = sorted({site.scale for site in sites})
    if name not in _LEVELS or not scales or _of_transformer(sites[0]):  # all of whose blocks are of one scale
        return []
    wanted = {"coarse": scales[-1:], "mid": scales[1:-1], "finest": scales[:1], "fine": scales[:-1] or scales}[name]
    return [site for site in sites if site.scale in wanted]
