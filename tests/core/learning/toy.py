"""A tiny model that learning can be tried on, and pictures for it."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inversion_core.learning.model import PROJECTIONS, Attention, Conditioning, Prediction, Schedule

CHANNELS, WIDTH, WORD = 4, 16, 8
LENGTH = 6


class ToyAttention(nn.Module):
    def __init__(self, context: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.to_k = nn.Linear(context, WIDTH, bias=False)
        self.to_v = nn.Linear(context, WIDTH, bias=False)
        self.to_out = nn.Sequential(nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (
            y.unflatten(2, (2, -1)).transpose(1, 2) for y in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class ToyModel(nn.Module):
    """A `LearningModel` of one block: self- and cross-attention and a feed-forward layer; every prompt has `LENGTH`
    places."""

    family = "toy"
    checkpointing: Callable[[], AbstractContextManager[None]] | None = None

    def __init__(self, prediction: Prediction = "eps") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.prediction: Prediction = prediction
        self.into, self.out = nn.Linear(CHANNELS + 1, WIDTH), nn.Linear(WIDTH, CHANNELS)
        self.attn1, self.attn2 = ToyAttention(WIDTH), ToyAttention(WORD)
        self.ff = nn.Linear(WIDTH, WIDTH)
        self.table = nn.Embedding(16, WORD)
        self.requires_grad_(False)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def attentions(self) -> dict[str, Attention]:
        def layers(module: nn.Module) -> dict[str, nn.Module]:
            return {name: module.get_submodule(name) for name in PROJECTIONS}

        return {
            "block.attn1": Attention("self", "decoder", 2, layers(self.attn1)),
            "block.attn2": Attention("cross", "decoder", 2, layers(self.attn2)),
        }

    def feed_forwards(self) -> dict[str, nn.Module]:
        return {"block.ff.net.2": self.ff}

    def words(self, text: str) -> dict[str, Tensor]:
        return {"toy": torch.stack([self._word(word) for word in text.split()]) if text else torch.zeros(0, WORD)}

    def _word(self, word: str) -> Tensor:
        return self.table(torch.tensor(sum(map(ord, word)) % 16))

    def encode(self, prompts: Sequence[str], learned: Mapping[str, Mapping[str, Tensor]]) -> Conditioning:
        rows, places = [], {name: torch.zeros(len(prompts), LENGTH, dtype=torch.bool) for name in learned}
        for number, prompt in enumerate(prompts):
            row: list[Tensor] = []
            for word in prompt.split():
                name = word.strip("<>")
                if word.startswith("<"):
                    vectors = learned[name]["toy"]
                    places[name][number, len(row) : len(row) + len(vectors)] = True
                    row += list(vectors)
                else:
                    row.append(self._word(word))
            rows.append(torch.stack(row + [torch.zeros(WORD)] * (LENGTH - len(row))))
        return Conditioning(torch.stack(rows), None, places)

    def schedule(self, level: Tensor) -> Schedule:
        if self.prediction == "flow":
            sigma = 0.02 + 0.96 * level
            return Schedule(1 - sigma, sigma)
        angle = (0.02 + 0.96 * level) * torch.pi / 2
        return Schedule(angle.cos(), angle.sin())

    def predict(self, noisy: Tensor, level: Tensor, conditioning: Conditioning) -> Tensor:
        height, width = noisy.shape[-2:]
        tokens = noisy.flatten(2).transpose(1, 2)
        x = self.into(torch.cat([tokens, level[:, None, None].expand(-1, tokens.shape[1], 1)], dim=2))
        x = x + self.attn1(x, x)
        x = x + self.attn2(x, conditioning.context)
        x = x + self.ff(F.gelu(x))
        return self.out(x).transpose(1, 2).unflatten(2, (height, width))


def picture(seed: int = 0, size: int = 32) -> tuple[Tensor, Tensor]:
    """A picture (1, size, size, 3) with a brighter square, and the square's mask (1, size, size)."""
    torch.manual_seed(seed)
    mask = torch.zeros(1, size, size)
    mask[:, size // 4 : -size // 4, size // 4 : -size // 4] = 1
    return (0.3 * torch.rand(1, size, size, 3) + 0.6 * mask[..., None]).clamp(0, 1), mask


def encode(pictures: Tensor) -> Tensor:
    """(B, H, W, 3) -> (B, 4, H/4, W/4)."""
    small = F.avg_pool2d(pictures.permute(0, 3, 1, 2), 4)
    return torch.cat([small, small.mean(1, keepdim=True)], dim=1) * 4 - 2
