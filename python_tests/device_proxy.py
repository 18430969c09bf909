"""A backend for tensors on another device: each call copies them there and back.

With it the tests that use the `backend` fixture and make their tensors on the CPU also test the kernels of a GPU. It
copies entire storages, so that strides, offsets and memory shared between arguments stay as they are, and copies all of
them back: what a kernel writes in place, and what it should not have written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_kernels.backends import Backend

STAYS = ("new_matrix", "unavailable", "rejects")  # new_matrix allocates on its argument's device
# Fields with numbers that Python reads before the launch.
ON_THE_HOST = ("scalars",)
OWN_FILES = ("test_triton.py", "test_triton_token.py", "test_cuda_tokens.py")  # use these backends without the fixture
COMPILING = ("test_compiled",)  # compile for GPUs that need not be present
FUNCTIONS = tuple(
    name for name, value in vars(Backend).items() if callable(value) and not name.startswith("_") and name not in STAYS
)


class Journey:
    """Copies the storages of one call to the device and back."""

    def __init__(self, device: str) -> None:
        self._device, self._moved = device, dict[int, tuple[Tensor, Tensor]]()

    def there(self, x: Any) -> Any:
        if torch.is_tensor(x):
            return self._tensor(x)
        if isinstance(x, tuple):
            names = getattr(x, "_fields", (None,) * len(x))
            moved = [y if name in ON_THE_HOST else self.there(y) for name, y in zip(names, x, strict=True)]
            return type(x)(*moved) if hasattr(x, "_fields") else tuple(moved)
        return x

    def _tensor(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if x.device.type != "cpu":
            return x
        if storage.data_ptr() not in self._moved:
            here = torch.empty(0, dtype=torch.uint8).set_(storage)
            self._moved[storage.data_ptr()] = here, _copy(here, self._device)
        moved = self._moved[storage.data_ptr()][1].untyped_storage()
        like = torch.empty(0, dtype=x.dtype, device=self._device)
        return like.set_(moved, x.storage_offset(), x.shape, x.stride())

    def back(self) -> None:
        for here, there in self._moved.values():
            here.copy_(there)


def _copy(x: Tensor, device: str) -> Tensor:
    moved = x.to(device)
    return moved.clone() if moved.data_ptr() == x.data_ptr() else moved


def home(x: Any) -> Any:
    """Copies a result to the CPU."""
    if torch.is_tensor(x):
        return x.cpu()
    if isinstance(x, tuple):
        return type(x)(*map(home, x)) if hasattr(x, "_fields") else tuple(map(home, x))
    return x


class OnDevice:
    """`backend`, also for CPU tensors. Attributes that are no functions of `Backend` are passed through."""

    def __init__(self, backend: Any, device: str) -> None:
        self._backend, self._device = backend, device
        self.calls: dict[str, int] = dict.fromkeys(FUNCTIONS, 0)

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._backend, name)
        return self._travelling(name, attribute) if name in FUNCTIONS else attribute

    def rejects(self, device: torch.device, dtype: torch.dtype | None) -> str | None:
        return self._backend.rejects(torch.device(self._device) if device.type == "cpu" else device, dtype)

    def _travelling(self, name: str, run: Any) -> Any:
        @torch.no_grad()
        def call(*args: Any) -> Any:
            self.calls[name] += 1
            journey = Journey(self._device)
            result = run(*journey.there(args))
            journey.back()
            return home(result)

        return call


def travel(names: list[str], device: str = "cuda") -> None:
    """Makes the backends of these names accept CPU tensors. Call it before a test uses one of them."""
    from grpo_kernels import backends

    for name in names:
        proxy: Any = OnDevice(backends.implementation(name), device)
        backends.register(name, lambda proxy=proxy: proxy)


def of_backends(items: list[Any], names: list[str]) -> tuple[list[Any], list[Any]]:
    """Splits the tests into those that run on a backend of these names, and the others."""

    def of(item: Any) -> bool:
        if item.path.name in OWN_FILES:
            return item.originalname not in COMPILING
        return hasattr(item, "callspec") and item.callspec.params.get("backend") in names

    return [item for item in items if of(item)], [item for item in items if not of(item)]
