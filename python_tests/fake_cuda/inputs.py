"""Fake tensors on the GPU, named like the functions' arguments. Making them is not recorded: it launches nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

SEQUENCES, TOKENS, VOCAB, HIDDEN, RANK, GROUP, REWARDS = 4, 8, 64, 16, 2, 2, 3
Call = Callable[[], Any]
LEAVES: list[Tensor] = []  # their gradients are cleared before each call, or calls would add to earlier gradients


def gpu(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    x = torch.empty(shape, dtype=dtype, device="cuda", requires_grad=grad)
    LEAVES.extend([x] if grad else [])
    return x


class Inputs:
    """The inputs of one form, named like the functions' arguments."""

    def __init__(self, packed: bool = False, dtype: torch.dtype = torch.float32) -> None:
        self.tokens = (SEQUENCES * TOKENS,) if packed else (SEQUENCES, TOKENS)
        self.dtype, self.packed = dtype, packed
        self.cu_seqlens = gpu(SEQUENCES + 1, dtype=torch.int32) if packed else None

    def per_token(self, dtype: torch.dtype | None = None, grad: bool = False) -> Tensor:
        acc_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        return gpu(*self.tokens, dtype=dtype or acc_dtype, grad=grad)

    def per_sequence(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return gpu(SEQUENCES, dtype=dtype)

    def mask(self) -> Tensor:
        return self.per_token(torch.bool)

    def targets(self) -> Tensor:
        return self.per_token(torch.int64)

    def logits(self, grad: bool = True) -> Tensor:
        return gpu(*self.tokens, VOCAB, dtype=self.dtype, grad=grad)

    def head(self) -> tuple[Tensor, Tensor]:
        return gpu(*self.tokens, HIDDEN, dtype=self.dtype, grad=True), gpu(VOCAB, HIDDEN, dtype=self.dtype, grad=True)

    def lora(self) -> tuple[Tensor, Tensor, float]:
        return gpu(RANK, HIDDEN, dtype=self.dtype, grad=True), gpu(VOCAB, RANK, dtype=self.dtype, grad=True), 0.5


def backward(loss: Tensor) -> None:
    loss.backward()


def both_layouts() -> Iterator[tuple[str, Inputs, dict[str, Any]]]:
    for packed in (False, True):
        x = Inputs(packed)
        yield "packed" if packed else "padded", x, {"cu_seqlens": x.cu_seqlens} if packed else {}
