"""What injections did in one sampling run: where, how often, how strongly, at what cost, and where they read."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .base import Grid


@dataclass
class Report:
    """The record of a run, filled while it runs. Nothing in it waits for the device before `finish`.

    Attributes:
        chosen: the self-attentions that were to be edited, in the order in which they run.
        calls: how many calls were edited, by site; decoder features under "features".
        change: |edited - plain| / |plain| of the attention's output, by site: in the evaluation nearest the middle of
            the first injection's window, or in its first one where no later one came.
        rows: rows of the batch that went through the model for the picture itself.
        reference_rows: rows that went through it for the references.
        hits: how often a reference was found in the bank.
        bytes: what the bank holds at the end.
        seconds: of the whole run.
        reference_seconds: of the references' passes; on a GPU, of handing them over to it.
    """

    chosen: list[str]
    calls: dict[str, int] = field(default_factory=dict)
    change: dict[str, float] = field(default_factory=dict)
    rows: int = 0
    reference_rows: int = 0
    hits: int = 0
    bytes: int = 0
    seconds: float = 0.0
    reference_seconds: float = 0.0
    _measured: dict[str, Tensor] = field(default_factory=dict)
    _share: tuple[str, Tensor, Tensor | None, Grid] | None = None
    _stage: int = 0
    _next_stage: int = 0

    def wants_measure(self, early: bool) -> bool:
        """Whether this evaluation is to be measured: the first that is edited, then the first that is not `early`."""
        self._next_stage = 1 if early else 2
        return self._stage < self._next_stage

    def count(self, site: str) -> None:
        """One more call edited."""
        self.calls[site] = self.calls.get(site, 0) + 1

    def measure(self, site: str, change: Tensor) -> None:
        """The relative change of a call, as a scalar on its device."""
        self._measured[site] = change
        self._stage = self._next_stage

    def look(self, site: str, share: Tensor, kept: Tensor | None, grid: Grid) -> None:
        """Where a reference was read: (M,) shares of the tokens numbered `kept` on its grid. The finest grid stays."""
        if self._share is None or grid.height * grid.width >= self._share[3].height * self._share[3].width:
            self._share = (site, share, kept, grid)

    def finish(self) -> None:
        """Bring what was measured over from the device, and leave nothing there."""
        if self._measured:
            values = torch.stack([one.float().cpu() for one in self._measured.values()]).tolist()
            self.change = dict(zip(self._measured, values, strict=True))
            self._measured = {}
        if self._share is not None:
            site, share, kept, grid = self._share
            self._share = (site, share.float().cpu(), None if kept is None else kept.cpu(), grid)

    @property
    def silent(self) -> list[str]:
        """Chosen self-attentions that never ran inside a window."""
        return [site for site in self.chosen if site not in self.calls]

    @property
    def reading(self) -> Tensor | None:
        """Where the first reference was read, (h, w), 1 at the place read most; None for edits that read no keys."""
        if self._share is None:
            return None
        _, share, kept, grid = self._share
        whole = share.new_zeros(grid.height * grid.width)
        whole[slice(None) if kept is None else kept] = share
        return whole.reshape(grid) / whole.amax().clamp_min(1e-12)

    def text(self) -> str:
        """The record in words, for a person."""
        lines = [
            f"rows through the model: {self.rows} for the picture, {self.reference_rows} for the references",
            f"bank: {self.hits} hits, {self.bytes / 2**20:.1f} MiB",
            f"time: {self.seconds:.2f} s, of it {self.reference_seconds:.2f} s for the references",
            "",
            "self-attention    calls    change",
        ]
        for site in self.chosen:
            change = f"{self.change[site]:8.1%}" if site in self.change else "       -"
            lines.append(f"{site:<15}{self.calls.get(site, 0):8d}  {change}")
        if "features" in self.calls:
            lines.append(f"{'features':<15}{self.calls['features']:8d}")
        if self.silent:
            lines += ["", f"never ran inside its window: {', '.join(self.silent)}"]
        return "\n".join(lines)
