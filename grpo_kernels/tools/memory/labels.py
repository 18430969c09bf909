"""Words for a block of memory: what a reader of a GRPO step would call it, from its operator, shape and dtype."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch

from .events import Block

# Operators that only make room: the one that called them says what the room is for.
_PLUMBING = frozenset(
    "aten::" + name
    for name in (
        "empty empty_like empty_strided new_empty new_empty_strided zeros zeros_like new_zeros ones ones_like full "
        "full_like new_full zero_ fill_ resize_ resize to contiguous reshape set_ as_strided"
    ).split()
)
_WORDS = {
    "aten::_log_softmax": "log-softmax",
    "aten::_softmax": "softmax",
    "aten::_to_copy": "copy in another dtype",
    "aten::clone": "copy",
    "aten::copy_": "copy",
    "aten::mm": "matmul",
    "aten::addmm": "matmul",
    "aten::bmm": "matmul",
    "aten::matmul": "matmul",
    "aten::linear": "matmul",
    "aten::scaled_dot_product_attention": "attention",
    "aten::embedding": "embedding",
}
_GRADIENTS_OF = {
    "Gather": "gradient of log-softmax",
    "LogSoftmax": "gradient of logits",
    "ToCopy": "gradient of logits",
}
_MATMULS = frozenset(name for name, words in _WORDS.items() if words == "matmul")
_COPIES = frozenset(("aten::_to_copy", "aten::clone", "aten::copy_"))


def short_dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.").replace("bfloat16", "bf16").replace("float", "fp")


def operator_of(block: Block) -> str:
    """The innermost operator that is not plumbing; the outermost where all are, "" outside of any."""
    meaningful = [name for name in block.operators if name not in _PLUMBING]
    return meaningful[-1] if meaningful else block.operators[0] if block.operators else ""


def is_scratch(block: Block) -> bool:
    """Scratch of the BLAS, for repacked operands: how much depends on the processor."""
    return block.temporary and operator_of(block) in _MATMULS


def label(block: Block, sizes: Mapping[str, int] | None = None) -> str:
    """`sizes`: names of dimensions, such as ``{"N": 4096, "V": 151936, "H": 896}``, which turn shapes into roles."""
    if is_scratch(block):
        return "scratch memory of a matmul"
    if sizes:
        role = _role(block, sizes)
        if role:
            return role
    operator = operator_of(block)
    words = _WORDS.get(operator, operator.removeprefix("aten::"))
    if block.node:
        node = block.node.removeprefix("torch::autograd::").removesuffix("Backward0").removesuffix("Backward")
        own = not operator or operator.endswith(("backward_data", "Backward"))
        words = f"gradient through {node}" if own else f"gradient through {node}, {words}"
    return f"{words or 'outside operators'}{_shape(block)}"


def _shape(block: Block) -> str:
    if block.shape is None or block.dtype is None:
        return ""
    return f", {short_dtype(block.dtype)} {list(block.shape)}"


# ---- the roles of a loss step ----


def _role(block: Block, sizes: Mapping[str, int]) -> str | None:
    """By what multiplies to the block's size: rows x V is of the logits, V x H of the lm_head, rows x H hidden."""
    rows, vocab, hidden = sizes["N"], sizes["V"], sizes.get("H", 0)
    if block.dtype is not None and block.shape is not None:
        of_shape = _role_of_shape(block, short_dtype(block.dtype), block.shape, rows, vocab, hidden)
        if of_shape:
            return of_shape
    for itemsize, dtype in _dtypes(block):
        elements = block.nbytes // itemsize
        if elements == rows * vocab:
            return f"{_logits_role(block)}, {dtype} [N, V]"
        if hidden and elements == vocab * hidden:
            return f"{_head_role(block)}, {dtype} [V, H]"
        if elements % vocab == 0 and 1 < elements // vocab < rows:
            return f"{_logits_role(block)}, {dtype} chunk [{elements // vocab}, V]"
        if hidden and elements == rows * hidden:
            return f"{'gradient of hidden' if _backward(block) else 'hidden'}, {dtype} [N, H]"
        if elements == rows > 1:
            return f"per token, {dtype} [N]"
    return None


def _role_of_shape(block: Block, dtype: str, shape: tuple[int, ...], rows: int, vocab: int, hidden: int) -> str | None:
    """A part of a matrix that is cut along the vocabulary."""
    if len(shape) != 2 or not hidden:
        return None
    if shape[0] <= rows and hidden < shape[1] < vocab:
        return f"tile of logits, {dtype}"
    if shape[1] == hidden and rows < shape[0] < vocab:
        return f"part of lm_head, {dtype}"
    return None


def _dtypes(block: Block) -> list[tuple[int, str]]:
    """(bytes, name): what it is, or may be."""
    if block.dtype is not None:
        return [(block.dtype.itemsize, short_dtype(block.dtype))]
    return [(size, name) for size, name in ((4, "fp32"), (2, "bf16")) if block.nbytes % size == 0]


def _backward(block: Block) -> bool:
    """In autograd's, or in an operator that computes gradients in its forward."""
    return block.node is not None or any("policy" in name for name in block.operators)


def _head_role(block: Block) -> str:
    sum_of_chunks = "aten::zeros_like" in block.operators
    return "gradient of lm_head" if _backward(block) or sum_of_chunks else "copy of lm_head"


def _logits_role(block: Block) -> str:
    operator = operator_of(block)
    ours = next((name for name in block.operators if name.startswith("grpo_kernels::")), None)
    if ours is not None:
        return "logits, then their gradient" if "linear" in ours else "gradient of logits"
    if block.node is not None:
        if block.node.startswith("CompiledFunction"):
            return "gradient in a compiled graph"
        node = block.node.removesuffix("Backward0")
        return _GRADIENTS_OF.get(node, f"gradient through {node}")
    if operator == "CompiledFunction":
        return "logits in a compiled graph"
    if operator in _MATMULS:
        return "logits"
    if operator in _COPIES:
        return "copy of logits"
    return _WORDS.get(operator, operator.removeprefix("aten::") or "logits-sized")


def grouped(labels: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Bytes by label, the largest first."""
    ordered = sorted(labels)
    sums = [(name, sum(size for _, size in group)) for name, group in itertools.groupby(ordered, lambda x: x[0])]
    return sorted(sums, key=lambda x: -x[1])
