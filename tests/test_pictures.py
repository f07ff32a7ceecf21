"""Pictures: what they show against hand-computed values; their sizes, and what they say."""

import os
import re
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT
from made_runs import AUDITED, LLAMA, STEPS, TEXTS, TRANSFERS, WORDS, finalist, long_run, make_run, result

from support import pictures
from support.instruments import load_search, signal_of
from support.report import write_report
from support.runs import load_run

# --- What the pictures show -----------------------------------------------------------------------------------


def test_a_finalist_stands_at_the_step_at_which_it_first_appeared():
    prompts = [finalist([4, 2, 3], 0.9), finalist([4, 5, 3], 0.8), finalist([1, 2, 3], 0.5, True), finalist([9], 0.1)]
    # [4, 2, 3] is won at step 1, [4, 5, 3] is only tried at step 2, [9] was never seen.
    assert pictures.finalist_points(STEPS, prompts) == [
        (1, 0.9, 0.9 - 0.125, 0.9 + 0.0625, False),
        (2, 0.8, 0.8 - 0.125, 0.8 + 0.0625, False),
        (0, 0.5, 0.5 - 0.125, 0.5 + 0.0625, True),
    ]


def test_a_finalist_of_an_older_run_without_an_interval_has_a_bar_of_no_length():
    older = {name: value for name, value in finalist([4, 2, 3], 0.9).items() if name not in ("dev_low", "dev_high")}
    assert pictures.finalist_points(STEPS, [older]) == [(1, 0.9, 0.9, 0.9, False)]


def drawn_bars(monkeypatch, records):
    """[(width, error bar)] of the bars in the paper reading's panel, in per cent."""
    from matplotlib.axes import Axes

    bars, barh = [], Axes.barh

    def recorded(panel, y, width, *others, xerr, **look):
        bars.append((width, xerr))
        return barh(panel, y, width, *others, xerr=xerr, **look)

    monkeypatch.setattr(Axes, "barh", recorded)
    pictures.draw_accuracy(records, os.devnull)
    return bars[: len(bars) // 2]


def test_the_bar_of_one_result_is_its_wilson_interval_and_that_of_several_their_standard_error(monkeypatch):
    common = {"task": "demo", "model": "m"}
    one = result("initial", "test", 1.0, 20) | common | {"method": "initial prompt"}
    several = [result("best", "test", share, 100) | common | {"method": "GReaTer"} for share in (0.7, 0.8, 0.9)]
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_: None)
    (width, bar), (mean, spread) = drawn_bars(monkeypatch, [one, *several])
    assert width == 100 and bar[1] == [0] and bar[0][0] == pytest.approx(16.11, abs=0.01)  # 20 / (20 + 1.96 ** 2)
    assert mean == pytest.approx(80)
    assert [end[0] for end in spread] == pytest.approx([10 / 3**0.5] * 2)


def test_the_evolution_has_a_row_for_each_change_and_tells_when_each_token_was_set():
    parts, kind = pictures.prompt_parts(STEPS, TEXTS)
    assert kind == "tokens"
    start, first, second, grown = pictures.evolution_rows(STEPS, parts)
    assert (start.step, start.change, start.cells) == (0, None, [("read", 0), (" it", 0), (".", 0)])
    assert (first.step, first.change, first.cells) == (1, -3.0, [("check", 1), (" it", 0), (".", 0)])
    assert (second.step, second.change, second.cells) == (3, -0.5, [("check", 1), (" it", 0), (" all", 3)])
    assert (grown.step, grown.change) == (4, 0.25)
    assert grown.cells == [*second.cells, (".", 4)]


def test_a_token_that_came_or_went_leaves_the_others_their_steps():
    before = [(1, "a"), (2, "b"), (3, "c")]
    cells = [pictures.Cell("a", 5), pictures.Cell("b", 6), pictures.Cell("c", 7)]

    def steps(now):
        return [cell.set_at for cell in pictures.changed_cells(cells, before, now, 9)]

    assert steps([before[0], (8, "x"), *before[1:]]) == [5, 9, 6, 7]
    assert steps([before[0], before[2]]) == [5, 7]
    assert steps([*before, before[2]]) == [5, 6, 7, 9]  # grown by the same token
    assert steps([before[0], (8, "x"), before[2]]) == [5, 9, 7]


def test_token_texts_come_from_the_records_then_the_tokenizer_and_else_the_words_of_the_prompt():
    texts = pictures.token_texts(STEPS, "no/such/model")
    assert texts == WORDS
    unknown = [STEPS[0]]  # no candidates yet
    assert pictures.prompt_parts(unknown, pictures.token_texts(unknown, "no/such/model")) == (
        [[("read", "read"), ("it.", "it.")]],
        "words",
    )
    demo = [replace(STEPS[0], prompt_ids=(75, 92))]
    assert pictures.token_texts(demo, ROOT / "demo" / "model") == {75: "check", 92: "every"}


class Panel:
    """A panel that notes where a point is put."""

    def __init__(self):
        self.xs = []

    def errorbar(self, x, *_, **__):
        self.xs.append(x)


def test_finalists_stand_at_the_steps_where_they_were_found_however_long_the_run_is():
    panel = Panel()
    found_at = [7, 7, 7, 7, 90, 8]
    pictures.draw_finalists(panel, [pictures.FinalistPoint(step, 0.5, 0.4, 0.6, False) for step in found_at], last=1000)
    assert [round(x) for x in panel.xs] == found_at and len(set(panel.xs)) == len(found_at)


def test_a_run_in_which_no_answer_was_read_says_so_in_its_picture():
    assert "no answer was read" in pictures.unread_note([{"unread": 1.0}, {"unread": 1}])
    assert pictures.unread_note([{"unread": 1.0}, {"unread": 0.99}]) == pictures.unread_note([]) == ""


def test_the_steps_that_changed_the_prompt_have_colours_that_can_be_told_apart_in_a_run_of_any_length():
    for used in ([0, 3, 4, 7, 300], list(range(0, 105, 8))):
        colors = pictures.step_colors(300, used)[used]
        apart = np.abs(colors[:, None] - colors[None]).sum(-1) + np.eye(len(used))
        assert apart.min() > 0.1 and colors.mean(1).min() > 0.35  # and black letters can be read on them


def test_a_long_token_is_wrapped_then_cut_and_its_space_is_seen():
    assert pictures.clip(" systematically", 6, 2) == "·syste\nmatic…"
    assert pictures.clip("ness", 6, 2) == "ness"
    assert pictures.clip(" intermediate", 12, 2) == "·interm\nediate"
    assert pictures.clip("", 6, 2) == ""
    assert pictures.clip("\n", 6, 1) == "\\n"


@pytest.mark.parametrize(
    ("length", "folds", "columns", "most"), [(5, 1, 5, 64), (26, 1, 26, 64), (27, 2, 14, 32), (60, 3, 20, 21)]
)
def test_a_long_prompt_is_folded_and_of_many_changes_the_first_and_last_are_shown(length, folds, columns, most):
    cells = [pictures.Cell(" it", 0)] * length
    rows = [pictures.EvolutionRow(number, 1.0, 0.0, cells) for number in range(100)]
    layout = pictures.evolution_layout(rows)
    assert (layout.folds, layout.columns) == (folds, columns)
    assert [*layout.first, *layout.hidden, *layout.last] == rows
    assert len(layout.first) == most // 2 and len(layout.first + layout.last) == most
    # The hidden rows take the place of one.
    assert [row for _, row in layout.shown()] == layout.first + layout.last
    assert layout.shown()[most // 2][0] - layout.gap == pytest.approx(layout.row_height)
    assert layout.grid_height == pytest.approx((most + 1) * layout.row_height)


def test_rows_that_all_fit_are_all_shown():
    rows = [pictures.EvolutionRow(number, 1.0, 0.0, [pictures.Cell(" it", 0)] * 5) for number in range(64)]
    layout = pictures.evolution_layout(rows)
    assert [row for _, row in layout.shown()] == rows and layout.hidden == []


# --- Pictures -------------------------------------------------------------------------------------------------


def png_size(path):
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and len(content) > 10_000
    return int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")


@pytest.mark.parametrize(("steps", "length", "most"), [(105, 25, 25), (40, 60, 64), (0, 5, 5)])
def test_every_picture_of_a_run_is_drawn_legibly_wide_and_not_endlessly_high(tmp_path, steps, length, most):
    folder = make_run(tmp_path / "long", steps=long_run(steps, length, most))
    written = write_report(folder)
    sizes = {path.name: png_size(path) for path in written if path.suffix == ".png"}
    assert set(sizes) == {"accuracy.png", "objective.png", "evolution.png"} | ({"gradient.png"} if steps else set())
    assert all(1200 <= width <= 1600 and height <= 2800 for width, height in sizes.values())


@pytest.mark.parametrize("steps", [STEPS, long_run(40, 10, 12), AUDITED])
def test_the_picture_of_the_signal_is_drawn_also_of_what_was_not_recorded(tmp_path, steps):
    run = load_search(make_run(tmp_path / "run", steps=steps))
    pictures.draw_signal(run, signal_of(run.steps, run.prompts), tmp_path / "signal.png")
    assert png_size(tmp_path / "signal.png") == (1400, 1000)


def test_the_cap_on_rows_is_said_in_the_picture(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    titles = []
    monkeypatch.setattr(pictures, "MAX_LINES", 12)
    monkeypatch.setattr(Figure, "suptitle", lambda figure, text, **_: titles.append(text))
    run = load_run(make_run(tmp_path / "long", steps=long_run(105, 25, 25)))
    pictures.draw_evolution(run, tmp_path / "evolution.png")
    assert f"task gsm8k, model {LLAMA}, GReaTer, seed 0" in titles[0]
    shown, changes = map(int, re.search(r"(\d+) of (\d+) changes shown", titles[0]).groups())
    assert shown == 11 < changes <= 105  # 12 rows, the start among them


def test_the_transfer_picture_has_a_panel_for_each_task(tmp_path):
    one = png_size(pictures.transfer_picture(TRANSFERS[:3], tmp_path / "one.png"))
    two = png_size(pictures.transfer_picture(TRANSFERS, tmp_path / "two.png", "harness"))
    assert one[0] >= 800 and two[0] > 1.5 * one[0]
