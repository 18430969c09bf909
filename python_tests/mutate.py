"""Does the suite notice one wrong operator, constant, sign or comparison in the maths? In `python_tests`:

    python -m mutate reference|triton|cpp [--sample 60] [--seed 1] [--seconds 300]

Each mutant changes one thing in one of the place's files and runs the suite's own tests on that maths, in a fork of a
session that has collected them, until one fails. docs/reliability.md lists the survivors. A mutant whose tests take
longer than `--seconds`, or that ends its process, is noticed too.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib.machinery
import importlib.util
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
AT_LEAST = 0.95  # of the mutants are to be noticed


class Mutant(NamedTuple):
    file: Path
    function: str
    what: str
    source: Callable[[], str]


# ---- Python ----

OPERATORS: dict[type, list[type]] = {
    ast.Add: [ast.Sub], ast.Sub: [ast.Add], ast.Mult: [ast.Div], ast.Div: [ast.Mult],
    ast.Lt: [ast.LtE, ast.GtE], ast.LtE: [ast.Lt, ast.Gt], ast.Gt: [ast.GtE, ast.LtE], ast.GtE: [ast.Gt, ast.Lt],
    ast.Eq: [ast.NotEq], ast.NotEq: [ast.Eq], ast.BitAnd: [ast.BitOr], ast.BitOr: [ast.BitAnd],
}  # fmt: skip
NAMES = {"min_": "max_", "max_": "min_", "minimum": "maximum", "maximum": "minimum", "exp": "log", "mean": "sum", "low": "high", "high": "low"}  # fmt: skip


def python_changes(node: ast.AST) -> Iterator[tuple[str, Callable[[], None]]]:
    """What can be changed in one node, in place."""
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        for other in OPERATORS[type(node.op)]:
            yield f"{type(node.op).__name__} is {other.__name__}", lambda other=other: setattr(node, "op", other())
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in OPERATORS and len(node.ops) == 1:
        if not isinstance(node.comparators[0], ast.Constant) or not isinstance(node.comparators[0].value, str):
            for other in OPERATORS[type(node.ops[0])]:
                yield (
                    f"{type(node.ops[0]).__name__} is {other.__name__}",
                    lambda other=other: setattr(node, "ops", [other()]),
                )
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Invert)):
        yield (
            f"no {type(node.op).__name__}",
            lambda: setattr(node, "op", ast.UAdd()) if isinstance(node.op, ast.USub) else None,
        )
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield f"{node.value} is {node.value + 1}", lambda: setattr(node, "value", node.value + 1)
    elif isinstance(node, ast.Call):
        at = node.func
        name = at.id if isinstance(at, ast.Name) else at.attr if isinstance(at, ast.Attribute) else ""
        if name in NAMES:
            field = "id" if isinstance(at, ast.Name) else "attr"
            yield f"{name} is {NAMES[name]}", lambda: setattr(at, field, NAMES[name])


def functions_of(tree: ast.Module) -> list[ast.FunctionDef]:
    return [node for node in tree.body if isinstance(node, ast.FunctionDef)]


def sites_of(tree: ast.Module) -> list[tuple[str, ast.AST, str, Callable[[], None]]]:
    """(function, node, what, how) of everything that can be changed."""
    return [
        (function.name, node, what, change)
        for function in functions_of(tree) for node in ast.walk(function) for what, change in python_changes(node)
    ]  # fmt: skip


def python_mutants(file: Path, left_out: set[str]) -> Iterator[Mutant]:
    text = file.read_text()

    def mutated(i: int) -> str:
        tree = ast.parse(text)
        _, node, what, change = sites_of(tree)[i]
        change()
        if what == "no Invert":
            node.__class__, node.__dict__ = node.operand.__class__, node.operand.__dict__  # type: ignore[attr-defined]
        return ast.unparse(tree)

    for i, (function, node, what, _) in enumerate(sites_of(ast.parse(text))):
        if function not in left_out:
            where = f"{file.stem}.{function}, line {node.lineno}: {ast.unparse(node)}: {what}"  # type: ignore[attr-defined]
            yield Mutant(file, function, where, functools.partial(mutated, i))


def apply_python(mutant: Mutant) -> None:
    """The module's functions are made anew in its own namespace, and whoever had imported one gets the new one."""
    name = ".".join(mutant.file.relative_to(ROOT).with_suffix("").parts)
    module = sys.modules[name]
    before = {  # a jitted function is an object of Triton's, which holds the module's as `fn`
        k: v
        for k, v in vars(module).items()
        if getattr(getattr(v, "fn", v), "__module__", name) == name and not k.startswith("__")
    }
    source = mutant.source()
    path = Path(tempfile.mkdtemp(prefix="mutate-")) / mutant.file.name  # Triton reads a function's source from its file
    path.write_text(source)
    exec(compile(source, str(path), "exec"), vars(module))
    for other in list(sys.modules.values()):
        for key, value in list(vars(other).items()) if hasattr(other, "__dict__") else ():
            if key in before and value is before[key]:
                setattr(other, key, vars(module)[key])


# ---- C++ ----

CPP = {
    r" \+ ": [" - "], r" - ": [" + "], r" \* ": [" / "], r" / ": [" * "], r" < ": [" <= ", " >= "], r" > ": [" >= ", " <= "],
    r" <= ": [" < ", " > "], r" >= ": [" > ", " < "], r" == ": [" != "], r" != ": [" == "], r" && ": [" || "], r" \|\| ": [" && "],
    r"(?<=[(,{=?:] )-(?=[a-z_])|(?<=[({])-(?=[a-z_])|(?<=return )-(?=[a-z_])": [""],
    r"\bmin_(?=\()": ["max_"], r"\bmax_(?=\()": ["min_"], r"\bT\(0\)": ["T(1)"], r"\bT\(1\)": ["T(0)"], r"(?<=[ (])!(?=[a-z(])": [""],
    r"(?<=[ (])[124](?=[ )*;,])": ["3"],
}  # fmt: skip
SKIPPED = re.compile(r"^\s*(//|#|template|constexpr|enum|\w+ = |k[A-Z])|operator|for \(")


def cpp_mutants(file: Path) -> Iterator[Mutant]:
    lines, function = file.read_text().splitlines(True), ""
    for i, line in enumerate(lines):
        code = line.split("//")[0]
        if head := re.match(r"(?:template.*)?GK_HD.* (\w+)\(", line):
            function = head.group(1)
        if SKIPPED.search(line) and not ("return" in line or "? " in line):
            continue
        for pattern, others in CPP.items():
            for found in re.finditer(pattern, code):
                if code.startswith("template") and "{" not in code[: found.start()]:
                    continue
                for other in others:
                    changed = [*lines[:i], line[: found.start()] + other + line[found.end() :], *lines[i + 1 :]]
                    what = f"{file.name}, {function}, line {i + 1}: {line.strip()}: {found.group().strip()} at {found.start()} is {other.strip()}"
                    yield Mutant(file, function, what, functools.partial("".join, changed))


class CppBuild:
    """The CPU module with one translation unit compiled anew, without optimisation: the token kernel's."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="mutate-"))
        shutil.copytree(ROOT / "csrc", self.folder / "csrc")
        built = next((ROOT / "build").glob("cpython-*/grpo_kernels.backends._cpu"))
        self.objects = [str(o) for o in built.glob("*.o") if not o.name.startswith("tokens.cpp")]
        self.suffix = importlib.machinery.EXTENSION_SUFFIXES[0]

    def module(self, mutant: Mutant | None, number: int) -> Path | None:
        """None: it does not compile."""
        at = None if mutant is None else self.folder / mutant.file.relative_to(ROOT)
        if at is not None:
            at.write_text(mutant.source())  # type: ignore[union-attr]
        out = self.folder / str(number) / f"_cpu{self.suffix}"
        out.parent.mkdir()
        flags = ["-std=c++17", "-O0", "-fPIC", "-fvisibility=hidden", "-w", "-DGK_X86", "-DGK_MODULE=_cpu", "-DGK_CPU"]
        unit = str(self.folder / "csrc" / "cpu" / "tokens.cpp")
        done = subprocess.run(
            ["g++", *flags, "-shared", "-o", str(out), unit, *self.objects, "-lpthread"], capture_output=True, text=True
        )
        if at is not None:
            at.write_text(mutant.file.read_text())  # type: ignore[union-attr]
        if done.returncode != 0 and mutant is None:
            raise RuntimeError(done.stderr)
        return out if done.returncode == 0 else None

    @staticmethod
    def load(path: Path) -> None:
        from grpo_kernels.backends import _cpu, cpu, native

        spec = importlib.util.spec_from_file_location("_cpu", path)
        module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        spec.loader.exec_module(module)  # type: ignore[union-attr]
        vars(_cpu).update({name: value for name, value in vars(module).items() if not name.startswith("__")})
        assert cpu and native


# ---- the session ----

REFERENCE, TRITON, MATH = (ROOT / "grpo_kernels/reference", ROOT / "grpo_kernels/backends/triton", ROOT / "csrc/math")
FORMULAS = ["loss/test_branches.py", "loss/test_zero_rule.py", "loss/test_losses.py"]
PLACES: dict[str, Any] = {
    # files, functions of them that are not this maths, the tests' files and names
    "reference": (
        [REFERENCE / "objectives.py", REFERENCE / "loss.py"], set(),
        [*FORMULAS, "loss/test_mutations.py", "loss/test_logps.py"],
        "(cpu and every_form) or (zero_rule and reference) or specification",
    ),
    "triton": (
        [TRITON / "math.py", TRITON / "softmax.py"], {"centred", "scaled", "advantage", "temporal_difference"},
        [*FORMULAS, "loss/test_removed.py", "advantages/test_returns.py"], "triton and (branches or zero_rule or removed or value or every_form)",
    ),
    "cpp": ([MATH / "policy.h", MATH / "tokens.h"], set(), FORMULAS, "cpu and (branches or zero_rule or every_form)"),
}  # fmt: skip


class Session:
    """Instead of running what was collected, once a mutant."""

    def __init__(self, mutants: list[Mutant], place: str, seconds: float) -> None:
        self.mutants, self.seconds, self.survivors = mutants, seconds, []
        self.enough = False
        self.build = CppBuild() if place == "cpp" else None

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        start, broken = time.perf_counter(), 0
        for i, file in enumerate(sorted({mutant.file for mutant in self.mutants})):  # loaded anew, but as it is
            same = Mutant(
                file,
                "",
                "nothing",
                lambda file=file: (
                    ast.unparse(ast.parse(file.read_text())) if file.suffix == ".py" else file.read_text()
                ),
            )
            assert not self.fails(session, same, -i, 10 * self.seconds), f"the tests fail with {file.name} as it is"
        order = list(session.items)
        for i, mutant in enumerate(self.mutants, 1):
            session.items[:] = likely_first(order, mutant)
            outcome = self.fails(session, mutant, i, self.seconds)
            broken += outcome == "does not compile"
            if not outcome:
                self.survivors.append(mutant)
            print(f"{i}/{len(self.mutants)} {outcome or 'SURVIVED'}: {mutant.what}", flush=True)
        made = len(self.mutants) - broken
        caught = made - len(self.survivors)
        self.enough = caught >= AT_LEAST * made
        print(f"{caught} of {made} noticed ({caught / max(made, 1):.1%}), {time.perf_counter() - start:.0f} s")
        return True

    def fails(self, session: pytest.Session, mutant: Mutant | None, number: int, seconds: float) -> str:
        """Why the mutant was noticed; "" if it was not."""
        module = self.build.module(mutant, number) if self.build else None
        if self.build and module is None:
            return "does not compile"
        child = os.fork()
        if child == 0:
            sys.stdout = sys.stderr = open(os.devnull, "w")
            signal.alarm(int(seconds))
            code = 3
            try:
                if module is not None:
                    CppBuild.load(module)
                elif mutant is not None:
                    apply_python(mutant)
                code = run_items(session)
            finally:
                os._exit(code)
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status):
            return f"signal {os.WTERMSIG(status)}"
        return {0: "", 1: "noticed"}.get(os.WEXITSTATUS(status), "raises")


def likely_first(items: list[pytest.Item], mutant: Mutant) -> list[pytest.Item]:
    """Tests whose name has a word of the function's, then the others, each at random."""
    words = [
        w for w in mutant.function.split("_") if len(w) > 1 and w not in ("objective", "term", "policy", "token", "of")
    ]
    shuffled = random.Random(0).sample(items, len(items))
    return sorted(shuffled, key=lambda item: not any(word in item.name for word in words))


def run_items(session: pytest.Session) -> int:
    from _pytest.runner import runtestprotocol

    for item, following in zip(session.items, [*session.items[1:], None], strict=True):
        if any(report.failed for report in runtestprotocol(item, log=False, nextitem=following)):
            return 1
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("place", choices=PLACES)
    parser.add_argument("--sample", type=int, help="so many of them at random; all if not given")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=300, help="for the tests of one mutant")
    a = parser.parse_args()
    files, left_out, tests, names = PLACES[a.place]
    every = [
        m for file in files for m in (cpp_mutants(file) if file.suffix == ".h" else python_mutants(file, left_out))
    ]
    mutants = every if a.sample is None else random.Random(a.seed).sample(every, min(a.sample, len(every)))
    print(f"{a.place}: {len(mutants)} of {len(every)} mutants, seed {a.seed}", flush=True)
    run = Session(mutants, a.place, a.seconds)
    paths = [str(ROOT / "python_tests" / name) for name in tests]
    code = pytest.main(
        [*paths, "-k", names, "-p", "no:cacheprovider", "-p", "no:xdist", "-q", "-s", "-W", "ignore"], plugins=[run]
    )
    for mutant in run.survivors:
        print("survived:", mutant.what)
    sys.exit(code or int(not run.enough))


if __name__ == "__main__":
    main()
