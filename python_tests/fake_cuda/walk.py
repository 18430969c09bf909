"""Calls every public function on a fake GPU: lists each call's host synchronisations and counts its launches.

    PYTHONPATH=python_tests python -m fake_cuda.walk [--markdown | --pin]

prints JSON, {"calls": {function: {form: {"waits": [...], "launches": n, ...}}}, ...}, or a table, or writes
launches.json, with which test_no_sync.py compares. It runs in a separate process, since it loads nothing_gpu.cpp before
torch and replaces parts of the library.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PINNED = Path(__file__).with_name("launches.json")


def walk() -> dict[str, dict[str, Any]]:
    """Three walks: one in which an operator of the library is one launch, and one on each backend for waits inside."""
    from . import calls, gpu

    gpu.install()
    walked: dict[str, dict[str, Any]] = {}
    for name, form, recorder in _recorded(calls.FUNCTIONS, None):
        entry = {"waits": recorder.waits, "launches": sum(recorder.launches.values()), "what": dict(recorder.launches)}
        walked.setdefault(name, {})[form] = entry
    for name, form, recorder in _recorded(calls.FUNCTIONS, gpu.operator_bodies()):
        walked[name][form]["waits in cuda"] = recorder.waits
    # group_diversity documents that it waits there, for the number of active tokens and the number of n-grams.
    kernels = {name: forms for name, forms in calls.FUNCTIONS.items() if name != "group_diversity"}
    with gpu.without_native_kernels():
        for name, form, recorder in _recorded(kernels, gpu.operator_bodies()):
            walked[name][form]["waits in triton"] = recorder.waits
    return walked


def known_waits() -> dict[str, list[str]]:
    """What the recorder lists for calls that do wait."""
    import torch
    from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

    from .recorder import Recorder

    def waits(call: Any) -> list[str]:
        with Recorder() as recorder, contextlib.suppress(DynamicOutputShapeException):
            call()
        return recorder.waits

    with FakeTensorMode():
        x, on, host = torch.empty(3, device="cuda"), torch.empty(3, device="cuda") > 0, torch.empty(3)
        calls = {
            "torch.tensor": lambda: torch.tensor(1.0, device="cuda"),
            "torch.as_tensor": lambda: torch.as_tensor([1.0, 2.0], device="cuda"),
            "to the GPU": lambda: host.to("cuda", non_blocking=True),
            "to the CPU": lambda: x.cpu(),
            "copy_": lambda: x.copy_(host),
            "item": lambda: x[0].item(),
            "tolist": lambda: x.tolist(),
            "bool": lambda: bool(x.any()),
            "equal": lambda: torch.equal(x, x),
            "nonzero": lambda: x.nonzero(),
            "mask": lambda: x[on],
            "write by a mask": lambda: x.index_put_((on,), x),
            "masked_select": lambda: x.masked_select(on),
            "unique": lambda: x.unique(),
            "repeat_interleave": lambda: x.repeat_interleave(torch.empty(3, dtype=torch.int64, device="cuda")),
            "bincount": lambda: on.to(torch.int64).bincount(),
        }
        return {name: waits(call) for name, call in calls.items()}


def auto() -> dict[str, str]:
    """The backend that "auto" resolves to, by dtype."""
    import torch

    from grpo_kernels.backends import resolve

    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    return {str(dtype): resolve("auto", torch.device("cuda", 0), dtype) for dtype in dtypes}


def _recorded(functions: dict[str, Any], bodies: Any) -> Iterator[tuple[str, str, Any]]:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from . import calls, gpu, inputs
    from .recorder import Recorder

    for name, forms in functions.items():
        inputs.LEAVES.clear()
        with FakeTensorMode(allow_non_fake_inputs=True):
            for form, call in forms():
                if bodies is not None and not calls.differs_inside(name, form):
                    continue
                for x in inputs.LEAVES:
                    x.grad = None
                recorder = Recorder(bodies)
                with gpu.launches_noted(recorder.launched), recorder:
                    call()
                yield name, form, recorder


def launches(walked: dict[str, dict[str, Any]]) -> dict[str, dict[str, int]]:
    return {name: {form: entry["launches"] for form, entry in forms.items()} for name, forms in walked.items()}


def markdown(walked: dict[str, dict[str, Any]]) -> str:
    lines = ["| function | form | launches |", "|---|---|---|"]
    for name, forms in launches(walked).items():
        lines += [f"| `{name}` | {form} | {count} |" for form, count in forms.items()]
    return "\n".join(lines)


def main(option: str = "") -> None:
    from .library import nothing_gpu

    ctypes.CDLL(str(nothing_gpu()), mode=ctypes.RTLD_GLOBAL)  # before torch
    walked = walk()
    if option == "--markdown":
        print(markdown(walked))
    elif option == "--pin":
        import torch

        pinned = {"torch": torch.__version__.partition("+")[0], "launches": launches(walked)}
        PINNED.write_text(json.dumps(pinned, indent=1) + "\n")
    else:
        json.dump({"calls": walked, "known waits": known_waits(), "auto": auto()}, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
