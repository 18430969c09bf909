"""Records a call's launches and host synchronisations, from the operations that reach torch's dispatcher."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# Operations whose result's size, or a number that Python needs, requires the device to have finished.
WAITS = {
    aten._local_scalar_dense.default: "item",
    aten.is_nonzero.default: "bool",
    aten.equal.default: "equal",
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten.unique_dim.default: "unique",
    aten._unique2.default: "unique",
    aten.unique_consecutive.default: "unique",
    aten.repeat_interleave.Tensor: "repeat_interleave",
    aten.bincount.default: "bincount",
}
COPIES = (aten._to_copy.default, aten.copy_.default, aten.copy.default)
BY_INDEX = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
ALLOCATIONS = {
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    torch.ops.prim.device.default,
    aten.lift_fresh.default,
    aten._unsafe_view.default,
}


def _tensors(*trees: Any) -> list[Tensor]:
    return [x for x in tree_leaves(trees) if isinstance(x, Tensor)]


def _on_gpu(tensors: list[Tensor]) -> bool:
    return any(x.device.type == "cuda" for x in tensors)


def _is_view(op: Any) -> bool:
    return any(r.alias_info is not None and not r.alias_info.is_write for r in op._schema.returns)


def _by_mask(args: Any) -> bool:
    """Whether an index is a boolean mask, for which torch needs nonzero; writing a single value does not."""
    one_value = len(args) > 2 and args[2].numel() == 1
    return not one_value and any(x.dtype in (torch.bool, torch.uint8) for x in _tensors(args[1]))


@functools.cache
def _is_made_of_others(op: Any) -> bool:
    return op.namespace != "prim" and op.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)


class Recorder(TorchDispatchMode):
    """Lists the host synchronisations of a call, and counts its launches.

    A launch is an operation on the GPU that is neither a view nor an allocation. An operator of torch counts as one,
    whatever its kernels, and so does one of the library, unless `bodies` has a function to run instead.
    """

    def __init__(self, bodies: dict[Any, Callable] | None = None) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.launches: Counter[str] = Counter()
        self._bodies = bodies or {}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if op in self._bodies:
            with self:
                return self._bodies[op](*args, **kwargs)
        if _is_made_of_others(op):  # below autograd, in a body, it arrives undecomposed
            with self:
                return op.decompose(*args, **kwargs)
        given = _tensors(args, kwargs)
        if op in WAITS:  # a fake tensor on the CPU has no data either, but does not synchronise
            self.waits += [WAITS[op]] if _on_gpu(given) else []
            return self._without_data(op, args, kwargs)
        if op in BY_INDEX and _on_gpu(given) and _by_mask(args):
            self.waits.append("boolean index")
        outputs = op(*args, **kwargs)
        self._note(op, given, _tensors(outputs))
        return outputs

    def launched(self, name: str) -> None:
        """Records a launch that does not pass the dispatcher."""
        self.launches[name] += 1

    def _note(self, op: Any, given: list[Tensor], made: list[Tensor]) -> None:
        if not _on_gpu(given) and not _on_gpu(made):
            return
        if op in COPIES and len({x.device.type for x in (given + made)}) > 1:
            self.waits.append(f"copy {given[-1].device.type} to {made[0].device.type}")
        if op not in ALLOCATIONS and not _is_view(op):
            self.launches[str(op).removesuffix(".default")] += 1

    def _without_data(self, op: Any, args: Any, kwargs: Any) -> Any:
        """A result as if every element were 1, so that the call can continue; or torch's own error."""
        x = args[0]
        if op is aten.nonzero.default:
            return torch.zeros(x.numel(), x.dim(), dtype=torch.int64, device=x.device)
        if op is aten._local_scalar_dense.default:
            return True if x.dtype == torch.bool else 1.0 if x.is_floating_point() else 1
        if op in (aten.is_nonzero.default, aten.equal.default):
            return True
        return op(*args, **kwargs)
