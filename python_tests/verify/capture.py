"""Captures launches of the library instead of running them: a kernel's PTX, and the description that SentryWard
needs."""

from __future__ import annotations

import ctypes
import json
import re
import struct
from collections.abc import Iterable
from typing import Any, NamedTuple

from ptx.nvcc import CudaOnPtx, short, tensors_of_the_callers
from ptx.text import parse
from ptx.triton_launch import TritonOnPtx, leaves
from torch import Tensor

from grpo_kernels.backends.native import NativeBackend

PARAMETER = re.compile(r"\.param \.(\w+)\s+(\.ptr[^,]*?)?(\w+_param_\d+)")


class Launch(NamedTuple):
    kernel: str
    ptx: str  # of this entry only
    input: dict[str, Any]


class Memory:
    """The tensors of a launch by address. Tensors of one storage are one object, so that the verifier sees aliases."""

    def __init__(self, tensors: Iterable[Tensor], readable: Iterable[Tensor]):
        spans = {(s.data_ptr(), s.nbytes()): x for x in tensors for s in [x.untyped_storage()] if s.nbytes()}
        self.spans = [(begin, size) for begin, size in sorted(spans)]
        self.readable = {x.untyped_storage().data_ptr() for x in readable}

    def object_at(self, address: int) -> tuple[str, int] | None:
        """The name of the object at this address and the offset in it; None if no tensor is there."""
        for i, (begin, size) in enumerate(self.spans):
            if begin <= address < begin + size:
                return f"tensor{i}", address - begin
        return None

    def words_at(self, address: int) -> list[int] | None:
        """The int32 words from this address to the end of its object, if the verifier may read them."""
        for begin, size in self.spans:
            if begin in self.readable and begin <= address < begin + size:
                raw = ctypes.string_at(address, begin + size - address)
                raw += b"\0" * (-len(raw) % 4)
                return list(struct.unpack(f"<{len(raw) // 4}i", raw))
        return None


class Parameters:
    """The description of a kernel's parameters."""

    def __init__(self, memory: Memory):
        self.memory = memory
        self.declarations: list[dict[str, Any]] = []
        self.arguments: list[dict[str, Any]] = []
        self.contents: list[dict[str, Any]] = []

    def add(self, value: bytes, **where: Any) -> None:
        """Describes a tensor's address as a pointer to an object, and anything else as a number."""
        number = int.from_bytes(value, "little")
        target = self.memory.object_at(number) if len(value) == 8 else None
        if target is None:
            self.arguments.append({**where, "type": f"u{8 * len(value)}", "value": number})
            return
        name, begin = target
        pointer = {**where, "type": "pointer", "space": "global", "object": name}
        self.declarations.append({**pointer, "base_byte_offset": begin} if begin else pointer)
        words = self.memory.words_at(number)
        if words is not None:
            self.contents.append({**where, "shapes": [[word] for word in words]})

    def add_pointer(self, value: bytes, name: str) -> None:
        """Describes a parameter that is declared as a pointer, which needs an object even when it is null."""
        if self.memory.object_at(int.from_bytes(value, "little")) is not None:
            return self.add(value, parameter=name)
        self.declarations.append({"parameter": name, "type": "pointer", "space": "global", "object": f"none {name}"})

    def described(self, blocks: Iterable[int], threads: int, shared: int, cluster: int) -> dict[str, Any]:
        launch = {
            "grid_dim": list(blocks), "block_dim": [threads, 1, 1], "cluster_dim": [cluster, 1, 1],
            "dynamic_shared_bytes": shared,
        }  # fmt: skip
        made = {
            "schema": "spverify.kernel-input/v1", "launch": launch, "declarations": self.declarations,
            "arguments": self.arguments, "assumptions": {"representative_branches": True},
        }  # fmt: skip
        return {**made, "shape_arrays": self.contents} if self.contents else made


def with_threads(launch: Launch, threads: int, columns: int | None = None) -> Launch:
    """T. The launch with this number of threads per block, and of columns per row. The library's host code would not
    launch this, but the kernels read both at run time, and a smaller launch does in proportion what a larger one
    does."""
    described = json.loads(json.dumps(launch.input))
    before = described["launch"]["block_dim"][0]
    described["launch"]["block_dim"][0] = threads
    if columns is not None:
        words = [
            x
            for x in described["arguments"]
            if x["value"] >> 32 and x["value"] % 2**32 == columns * (before - 32) // (threads - 32)
        ]
        (vocab,) = words  # in one word with the number of slots
        vocab["value"] = vocab["value"] >> 32 << 32 | columns
    return launch._replace(input=described)


class Captured:
    """Common to both captures: the launches, and the tensors whose contents the verifier may read."""

    launches: list[Launch]
    readable: list[Tensor]

    def take(self) -> list[Launch]:
        taken, self.launches, self.readable = self.launches, [], []
        return taken


class CudaCapture(Captured, CudaOnPtx):
    def __init__(self, arch: int = 90):
        self.launches, self.readable, self._tensors = [], [], list[Tensor]()
        super().__init__(arch)

    def _launch(self, kernel: Any, device: Any, *arguments: Any) -> None:
        self._tensors = tensors_of_the_callers(2)
        NativeBackend._launch(self, kernel, device, *arguments)
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, name: bytes, blocks: Any, threads: int, shared: int, cluster: int, parameters: int) -> None:
        try:
            entry = name.decode()
            text = one_entry(self.edit(self._texts[entry], entry), entry)
            ((parameter, (_, size)),) = parse(text, entry).parameters.items()
            data = ctypes.string_at(parameters, size)
            made = Parameters(Memory(self._tensors, self.readable))
            for at in range(0, size, 8):  # a struct's pointers are aligned; two integers may be in one word
                made.add(data[at : at + 8], parameter=parameter, offset=at)
            described = made.described([blocks[i] for i in range(3)], threads, shared, cluster)
            self.launches.append(Launch(short(entry), text, described))
        except Exception as error:  # ctypes would print it and go on
            self._error = error


class TritonCapture(Captured, TritonOnPtx):
    def __init__(self, arch: int = 90):
        self.launches, self.readable = [], []
        super().__init__(arch)

    def launch(self, ptx: str, source: Any, metadata: Any, blocks: tuple[int, int, int], args: tuple) -> None:
        text = one_entry(ptx, metadata.name)
        passed = zip(source.fn.arg_names, args, strict=True)
        values = [value for name, x in passed for value in leaves(x, source.signature[name])]
        parameters = PARAMETER.findall(text[: text.index("\n{")])
        values += [bytes(8)] * (len(parameters) - len(values))  # the parameters that Triton appends are 0
        made = Parameters(Memory([x for x in args if isinstance(x, Tensor)], self.readable))
        for (kind, pointer, name), value in zip(parameters, values, strict=True):
            if pointer:
                made.add_pointer(value, name)
            elif kind != "f32":  # a float is not described, so branches on it are undecided
                made.add(value[: int(kind[1:]) // 8], parameter=name)
        described = made.described(blocks, 32 * metadata.num_warps, metadata.shared, 1)
        self.launches.append(Launch(metadata.name, text, described))


def one_entry(text: str, entry: str) -> str:
    """The text with only one of its kernels, and with its header and functions."""
    parts = re.split(r"(?m)^(?=(?:\.visible |\.weak )?\.(?:entry|func)\b)", text)
    return "".join(
        part for part in parts if ".entry" not in part[:40] or re.search(rf"\.entry {re.escape(entry)}\(", part)
    )
