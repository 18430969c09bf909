"""Parses PTX text into kernels: parameters, registers, symbols, and instructions with separate operands."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field

WORD = re.compile(r"[%$\w.]+")
ARRAY = re.compile(r"\.(shared|global|const) (?:\.align (\d+) )?\.(\w+) ([\w$]+)(\[\d*\])?")


def size_of(kind: str) -> int:
    """Bytes of a type such as 'f32' or 'bf16x2'; a predicate is one."""
    if kind == "pred":
        return 1
    bits, _, lanes = re.sub(r"^[a-z]+", "", kind).partition("x")
    return int(bits) // 8 * int(lanes or 1)


@dataclass(frozen=True)
class Instruction:
    text: str
    parts: tuple[str, ...]  # the opcode, split at its dots
    operands: tuple[str, ...]
    guard: str | None = None  # the predicate's register
    negated: bool = False

    @property
    def opcode(self) -> str:
        return ".".join(self.parts)


@dataclass
class Kernel:
    name: str
    parameters: dict[str, tuple[int, int]] = field(default_factory=dict)  # offset, size
    parameter_bytes: int = 0
    registers: dict[str, str] = field(default_factory=dict)  # types
    shared: dict[str, int] = field(default_factory=dict)  # offsets
    shared_bytes: int = 0  # dynamic memory, `[]`, begins there
    constants: dict[str, int] = field(default_factory=dict)  # sizes of arrays in global memory
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


class Scope:
    """The names declared between two braces: inline assembly reuses the same ones."""

    def __init__(self, parent: Scope | None):
        self.parent, self.names = parent, dict[str, str]()
        self._numbers = itertools.count(1) if parent is None else parent._numbers

    def declare(self, name: str) -> str:
        self.names[name] = name if self.parent is None else f"{name}@{next(self._numbers)}"
        return self.names[name]

    def resolve(self, word: str) -> str:
        scope: Scope | None = self
        while scope is not None:
            if word in scope.names:
                return scope.names[word]
            scope = scope.parent
        return word


def entries(text: str) -> list[str]:
    return re.findall(r"\.entry ([\w$]+)\(", text)


def parse(text: str, name: str) -> Kernel:
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(r"^\s*(\.loc|\.file|\.section)\b[^\n]*", "", text, flags=re.MULTILINE)
    start = re.search(rf"\.entry {re.escape(name)}\(", text)
    if start is None:
        raise ValueError(f"no kernel {name!r} in this PTX; it has {', '.join(entries(text))}")
    opened = text.index("\n{", start.start())
    kernel = Kernel(name)
    _read_parameters(kernel, text[start.end() : opened])
    outside = re.sub(r"\n\{.*?\n\}", "", text[: start.start()], flags=re.DOTALL)  # of the other kernels
    for line in re.findall(r"^.*\.(?:shared|global|const) .*$", outside, re.MULTILINE):
        _declare_array(kernel, line)
    _read_body(kernel, text[opened + 1 :])
    return kernel


def _read_parameters(kernel: Kernel, header: str) -> None:
    for line in re.findall(r"\.param ([^\n,)]*)", header):
        kind = re.search(r"\.([usbf]\d+)\b", line)[1]
        name, _, count = line.split()[-1].partition("[")
        explicit = re.search(r"\.align (\d+) \.b8", line)
        size = size_of(kind) * (int(count.rstrip("]")) if count else 1)
        align = int(explicit[1]) if explicit else size_of(kind)
        offset = -(-kernel.parameter_bytes // align) * align
        kernel.parameters[name] = offset, size
        kernel.parameter_bytes = offset + size


def _declare_array(kernel: Kernel, statement: str) -> None:
    match = ARRAY.search(statement)
    if match is None:
        raise NotImplementedError(f"an unknown declaration: {statement!r}")
    space, align, kind, name, count = match.groups()
    size = size_of(kind) * (int(count[1:-1] or 0) if count else 1)
    if space != "shared":
        kernel.constants[name] = size
        return
    step = int(align or size_of(kind))
    offset = -(-kernel.shared_bytes // step) * step
    kernel.shared[name] = offset
    kernel.shared_bytes = offset + size


def _read_body(kernel: Kernel, text: str) -> None:
    """Statements up to the closing brace. Names are resolved at the end, as a scope's labels may come after their
    use."""
    statements: list[tuple[Scope, str]] = []
    dynamic = [name for name, at in kernel.shared.items() if at == kernel.shared_bytes]
    scope, at = None, 0
    while True:
        at = _skip_blanks(text, at)
        if text[at] == "{":
            scope, at = Scope(scope), at + 1
        elif text[at] == "}":
            scope, at = scope.parent, at + 1
            if scope is None:
                break
        elif label := re.compile(r"([$\w]+)\s*:(?!:)").match(text, at):
            kernel.labels[scope.declare(label[1])], at = len(statements), label.end()
        else:
            end = text.index(";", at)
            statement, at = " ".join(text[at:end].split()), end + 1
            if statement.startswith("."):
                _declare(kernel, scope, statement)
            elif statement:
                statements.append((scope, statement))
    for name in dynamic:  # after everything that the body declares
        kernel.shared_bytes = kernel.shared[name] = -(-kernel.shared_bytes // 128) * 128
    kernel.code = [_instruction(WORD.sub(lambda m, s=s: s.resolve(m[0]), text)) for s, text in statements]


def _skip_blanks(text: str, at: int) -> int:
    while text[at] in " \t\n\r;":
        at += 1
    return at


def _declare(kernel: Kernel, scope: Scope, statement: str) -> None:
    if statement.startswith(".reg"):
        _, kind, names = statement.split(maxsplit=2)
        for name in names.split(","):
            base, _, count = name.strip().partition("<")
            for each in [f"{base}{i}" for i in range(int(count[:-1]))] if count else [base]:
                kernel.registers[scope.declare(each)] = kind[1:]
    elif statement.startswith((".shared", ".global", ".const")):
        _declare_array(kernel, statement)
    elif not statement.startswith((".pragma", ".param")):
        raise NotImplementedError(f"an unknown directive: {statement!r}")


def _instruction(text: str) -> Instruction:
    guard = re.match(r"@(!?)([%$\w.@]+)\s+", text)
    opcode, _, rest = (text[guard.end() :] if guard else text).partition(" ")
    return Instruction(
        text, tuple(opcode.split(".")), tuple(split(rest)), guard[2] if guard else None, bool(guard and guard[1])
    )


def split(operands: str) -> list[str]:
    """Splits at the commas outside brackets."""
    parts, depth, now = [], 0, ""
    for c in operands:
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            parts.append(now.strip())
            now = ""
        else:
            now += c
    return [*parts, now.strip()] if now.strip() else parts
