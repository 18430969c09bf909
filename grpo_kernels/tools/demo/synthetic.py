"""A policy small enough to learn from nothing in seconds: a GRU over a thousand words, ten of which are digits."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from .policy import Batch, completion_mask
from .tasks import Completion, CopyDigits, Problem

END = 10  # tokens 0 to 9 are the digits, this one stops, all others are words of no use
START = 11


class _Recurrent(nn.Module):
    def __init__(self, vocabulary: int, width: int):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.wanted = nn.Embedding(11, width)  # the digit asked for at this place; 10 past the last one
        self.cell = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, previous: Tensor, wanted: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.cell(self.embedding(previous) + self.wanted(wanted), state)


class SyntheticPolicy:
    name = "synthetic GRU"

    def __init__(self, vocabulary: int = 1000, width: int = 64, seed: int = 0):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = _Recurrent(vocabulary, width)
            self._learn_the_language()
        self.reference = copy.deepcopy(self.model).requires_grad_(False)

    def parameters(self) -> Iterable[nn.Parameter]:
        return self.model.parameters()

    @torch.no_grad()
    def sample(self, problems: Sequence[Problem], copies: int, max_new_tokens: int) -> Batch:
        problems = [problem for problem in problems for _ in range(copies)]
        wanted = torch.full((len(problems), max_new_tokens), 10)
        digits = [[int(digit) for digit in CopyDigits.digits(problem)] for problem in problems]
        wanted[:, : CopyDigits.length] = torch.tensor(digits)[:, :max_new_tokens]
        token, state = torch.full((len(problems), 1), START), None
        sampled = []
        for place in range(max_new_tokens):
            hidden, state = self.model(token, wanted[:, place : place + 1], state)
            token = torch.multinomial(self.model.head(hidden[:, 0]).softmax(-1), 1)
            sampled.append(token)
        tokens = torch.cat(sampled, dim=1)
        mask = completion_mask(tokens, END)
        return Batch(
            problems=problems,
            completions=[_completion(row[kept].tolist()) for row, kept in zip(tokens, mask, strict=True)],
            targets=tokens,
            mask=mask,
            inputs={"previous": _shifted(tokens), "wanted": wanted},
        )

    def hidden_and_weight(self, batch: Batch, *, reference: bool = False) -> tuple[Tensor, Tensor]:
        model = self.reference if reference else self.model
        with torch.no_grad() if reference else nullcontext():
            hidden, _ = model(**batch.inputs)
        return hidden, model.head.weight

    def _learn_the_language(self, steps: int = 60, rows: int = 128, longest: int = 6) -> None:
        """Pre-training on random digit strings: it knows digits and stopping, and nothing of the task."""
        optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-2)
        for _ in range(steps):
            tokens = torch.randint(0, 10, (rows, longest))
            tokens[torch.rand(rows, longest) < 0.25] = END
            mask = completion_mask(tokens, END)
            hidden, _ = self.model(_shifted(tokens), torch.randint(0, 11, (rows, longest)))
            logits = self.model.head(hidden)
            loss = nn.functional.cross_entropy(logits[mask], tokens[mask])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def _shifted(tokens: Tensor) -> Tensor:
    return torch.cat([torch.full_like(tokens[:, :1], START), tokens[:, :-1]], dim=1)


@contextmanager
def one_thread() -> Iterator[None]:
    """The matmuls are too small to share: a second thread gains nothing, and loses 10x where another job is running."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _completion(tokens: list[int]) -> Completion:
    words = [str(token) if token < 10 else f"w{token}" for token in tokens if token != END]
    return Completion(text=" ".join(words), finished=bool(tokens) and tokens[-1] == END)
