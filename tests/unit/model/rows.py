"""Random packed rows with nested parallel blocks; who sees whom is kept as sets, without intervals."""

from dataclasses import dataclass, field
from random import Random

import numpy as np
import torch
from torch import Tensor


@dataclass
class Row:
    """positions [L], layout [K, L] and, by definition, sees [L, L] of a random packed row."""

    positions_1L: Tensor
    layout_KL: Tensor
    sees_LL: Tensor

    def __len__(self) -> int:
        return self.sees_LL.shape[0]


@dataclass
class _Token:
    document: int
    position: int
    paths: dict[int, int]  # block -> path that the token lies in
    hidden: list[tuple[int, int]]


@dataclass
class _Writer:
    rng: Random
    depth: int
    tokens: list[_Token] = field(default_factory=list)
    blocks: int = 0

    def text(self, document: int, position: int, paths: dict[int, int], hidden: list[tuple[int, int]]) -> int:
        for _ in range(self.rng.randint(1, 12)):
            self.tokens.append(_Token(document, position, paths, hidden))
            position += 1
        return position

    def stretch(
        self, document: int, position: int, paths: dict[int, int], hidden: list[tuple[int, int]], depth: int
    ) -> int:
        position = self.text(document, position, paths, hidden)
        for _ in range(self.rng.randint(0, 2) if depth else 0):
            block, first, ends = self.blocks, len(self.tokens), []
            self.blocks += 1
            for path in range(self.rng.randint(1, 4)):
                own = hidden if path == 0 else [*hidden, (first, len(self.tokens))]
                ends.append(self.stretch(document, position, {**paths, block: path}, own, depth - 1))
            position = self.text(document, max(ends), paths, hidden)
        return position


def random_row(seed: int, documents: int = 3, depth: int = 2) -> Row:
    writer = _Writer(Random(seed), depth)
    starts = []
    for document in range(documents):
        starts.append(len(writer.tokens))
        writer.stretch(document, 0, {}, [], depth)
    tokens = writer.tokens
    length = len(tokens)
    layout_KL = np.zeros((2 + 2 * depth, length), np.int32)
    sees_LL = np.zeros((length, length), bool)
    for q, token in enumerate(tokens):
        layout_KL[0, q], layout_KL[1, q] = q, starts[token.document]
        for level, (lo, hi) in enumerate(token.hidden):
            layout_KL[2 + 2 * level, q], layout_KL[3 + 2 * level, q] = lo, hi
        for k, other in enumerate(tokens[: q + 1]):
            sees_LL[q, k] = token.document == other.document and all(
                other.paths.get(block, path) == path for block, path in token.paths.items()
            )
    positions_1L = torch.tensor([[token.position for token in tokens]])
    return Row(positions_1L, torch.from_numpy(layout_KL), torch.from_numpy(sees_LL))


def causal_row(length: int) -> Row:
    index_L = torch.arange(length)
    layout_KL = torch.stack([index_L, torch.zeros_like(index_L)]).int()
    return Row(index_L[None], layout_KL, torch.ones(length, length, dtype=torch.bool).tril())
