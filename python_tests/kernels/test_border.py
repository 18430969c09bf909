"""Arguments cross the border between Python and C++ by position, since names would cost 6 microseconds per call
(docs/measurements.md). These tests compare the positions in Python's tuples, the structs of kernels.h and the
subscripts in bindings.cpp. A swapped pair fails here."""

import ast
import inspect
import re
import textwrap

import pytest
from conftest import ROOT

from grpo_kernels.backends.native import NativeBackend
from grpo_kernels.inputs.grouping import Samples
from grpo_kernels.inputs.layout import PolicyInputs, Rows, RowStats

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="needs the source tree")


def fields(struct):
    """The members of a struct of kernels.h, in order."""
    text = re.sub(r"//[^\n]*", "", (ROOT / "csrc/kernels.h").read_text())
    (body,) = re.findall(rf"struct {struct} {{(.*?)\n}};", text, re.DOTALL)
    declared = [re.sub(r"^(const )?[\w<>:]+\s*", "", line.strip(), count=1) for line in body.split(";")]
    return [name.strip(" *\n") for line in declared for name in line.split(",") if name.strip()]


def test_tuples_are_structs():
    assert fields("RowStats") == [*RowStats._fields, "sum_p2"]
    *inputs, scalars, form = PolicyInputs._fields
    assert fields("PolicyInputs") == [*inputs, form, scalars]
    assert fields("AdvantageParams")[:6] == list(Samples._fields)
    views = ["logits", "targets", "active", "temperature"]
    assert fields("Rows")[:4] == views and {"logits", "targets", "active", "temperatures"} <= set(Rows._fields)


STRUCTS = {
    "token_policy": "TokenParams", "gae": "GaeParams", "value_loss": "ValueParams", "group_diversity": "DiversityParams",
}  # fmt: skip


def name_of(node):
    """What an argument is called: `x`, `_view(x)`, `None if ... else x`; None for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.IfExp):
        return name_of(node.body) or name_of(node.orelse)
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("_view", "_address"):
        return name_of(node.args[0])
    return None


@pytest.mark.parametrize("method", STRUCTS)
def test_arguments_are_in_the_order_of_the_struct(method):
    tree = ast.parse(textwrap.dedent(inspect.getsource(getattr(NativeBackend, method))))
    order, compared = fields(STRUCTS[method]), set()
    for node in ast.walk(tree):
        launch = isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "_launch"
        sequence = node.args if launch else getattr(node, "elts", [])
        named = [name for x in sequence if (name := name_of(x)) in order]
        compared.update(named)
        assert [order.index(name) for name in named] == sorted(order.index(name) for name in named), (named, order)
    assert len(compared) >= 6


def test_every_subscript_of_the_bindings_follows_the_one_before():
    text = (ROOT / "csrc/bindings.cpp").read_text()
    checked = 0
    for block in re.split(r"\n  m\.def\(|\ngk::|\n  const auto whitening", text):
        arrays = {}
        for name, subscript in re.findall(r"\b([a-z]+)\[(\d+)\]", block):
            arrays.setdefault(name, []).append(int(subscript))
        for name, subscripts in arrays.items():
            checked += len(subscripts)
            assert subscripts == list(range(len(subscripts))), (name, subscripts, block[:200])
    assert checked > 60
