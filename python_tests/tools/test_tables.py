"""One table, three ways to show it; numbers as a reader wants them; a picture that is a file."""

from __future__ import annotations

import io
import sys

import pytest

from grpo_kernels.tools.pictures import colour, picture
from grpo_kernels.tools.tables import Table
from grpo_kernels.tools.units import byte_unit, milliseconds, readable_bytes, times

TABLE = Table(("provider", "ms"), [("ours", "1.2"), ("[red] eager", "34.0"), (), ("in all", "35.2")], "a case")


def drawn(table: Table) -> list[str]:
    console = pytest.importorskip("rich.console").Console(file=io.StringIO(), width=60)
    console.print(table)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_markdown_is_padded_words_left_and_numbers_right():
    assert TABLE.markdown().splitlines() == [
        "| provider    |   ms |",
        "| ----------- | ---: |",
        "| ours        |  1.2 |",
        "| [red] eager | 34.0 |",
        "| in all      | 35.2 |",
    ]


def test_text_has_the_title_and_no_headings():
    assert TABLE.text().splitlines() == ["a case", "  ours          1.2", "  [red] eager  34.0", "  in all       35.2"]


def test_rich_draws_the_cells_as_they_are_and_an_empty_row_as_a_gap():
    title, *lines = [" ".join(line.split()) for line in drawn(TABLE)]
    assert (
        title == "a case"
        and lines[1] == "provider ms"
        and lines[3:] == ["ours 1.2", "[red] eager 34.0", "", "in all 35.2", ""]
    )


def test_rich_shows_no_headings_where_there_are_none():
    first, *_ = [line for line in drawn(Table(("", ""), [("a", "b")], left=2)) if line.strip()]
    assert first.split() == ["a", "b"]


def test_a_cell_with_a_style_is_its_text_in_markdown():
    text = pytest.importorskip("rich.text").Text
    assert Table(("state",), [(text("ok", "green"),)]).markdown().endswith("| ok    |")


def test_a_row_of_another_length_is_an_error():
    with pytest.raises(ValueError):
        Table(("a", "b"), [("1",)]).markdown()


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0.0 KiB"),
        (1000, "1.0 KiB"),
        (21.1 * 1024, "21.1 KiB"),
        ((1 << 20) - 1, "1,024.0 KiB"),
        (1 << 20, "1.0 MiB"),
        (561.3 * (1 << 20), "561.3 MiB"),
        (1780.5 * (1 << 20), "1.74 GiB"),
        (132.4 * (1 << 30), "132.40 GiB"),
    ],
)
def test_bytes_are_shown_in_their_own_unit(nbytes, text):
    assert readable_bytes(nbytes) == text and text.endswith(byte_unit(nbytes)[1])


def test_times_and_multiples_keep_about_three_digits():
    assert [milliseconds(s) for s in (1.234, 0.01234, 0.001234, 0.00001234)] == ["1234", "12.3", "1.23", "0.0123"]
    assert [times(ratio) for ratio in (12.3, 2.345, 1.5, 0.123)] == ["12x", "2.3x", "1.50x", "0.12x"]


def test_a_picture_is_a_file_and_changes_nothing_of_matplotlib(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    before = dict(matplotlib.rcParams)
    with picture(tmp_path / "new" / "a.png", 3, 2, "where it was measured") as figure:
        figure.subplots().plot([1, 2])
    assert (tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG")
    assert dict(matplotlib.rcParams) == before
    assert colour("ours-cpu-two-pass") == colour("ours-cuda") != colour("eager")


def test_without_matplotlib_a_picture_names_its_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'grpo-kernels\[bench\]'"), picture(tmp_path / "a.png", 1, 1):
        pass
