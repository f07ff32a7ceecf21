"""Signs of life: bars that move while the work waits, on a terminal and in a file, and the time that remains."""

import io
import time
from collections import Counter
from types import SimpleNamespace

import pytest
from conftest import settings

from support import progress as progress_file
from support.progress import Lines, Progress, Remaining, activity, in_words, open_bar, remaining, tokens_per_second
from support.runs import Step


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(params=[Terminal, io.StringIO])
def screen(request, monkeypatch):
    """What a bar writes to, as a terminal and as a file; it is drawn many times a second."""
    monkeypatch.setattr(progress_file, "TICK", 0.02)
    monkeypatch.setattr(progress_file, "TICK_IN_FILE", 0.02)
    return write_to(request.param(), monkeypatch)


def write_to(stream, monkeypatch):
    """The stream, as the one that bars write to; pytest has its own hand on sys.stderr."""
    monkeypatch.setattr(progress_file, "sys", SimpleNamespace(stderr=stream))
    return stream


def until(screen, text):
    deadline = time.monotonic() + 10
    while text not in screen.getvalue() and time.monotonic() < deadline:
        time.sleep(0.01)
    return text in screen.getvalue()


def test_a_bar_shows_what_goes_on_while_the_caller_waits(screen):
    progress = Progress()
    with open_bar(progress, True, total=4, unit="step", desc="search"):
        progress.begin("gradient", 50)
        progress.done = 12
        assert until(screen, "gradient 12/50 rows")
        progress.begin("generation", 150)
        progress.tokens += 1000
        assert until(screen, "generation 0/150 rows") and until(screen, " tokens/s")


def test_a_closed_bar_is_not_drawn_again_even_if_the_work_failed(screen):
    with pytest.raises(ZeroDivisionError), open_bar(total=4, unit="row", desc="dev"):
        assert until(screen, "0/4")
        raise ZeroDivisionError
    written = screen.getvalue()
    time.sleep(0.1)
    assert screen.getvalue() == written


def test_in_a_file_each_state_is_a_line_of_its_own(monkeypatch):
    monkeypatch.setattr(progress_file, "TICK_IN_FILE", 0.02)
    file = write_to(io.StringIO(), monkeypatch)
    with open_bar(total=2, unit="prompt", desc="prompts"):
        with open_bar(Progress(), total=40, unit="row", desc="dev", leave=False) as inner:
            inner.update(30)
            assert until(file, "dev: 30/40 rows")
    lines = file.getvalue().splitlines()
    assert all(line.startswith(("dev: ", "prompts: 0/2 prompts")) for line in lines)
    assert not {"\r", "\x1b"} & set(file.getvalue())


def test_in_a_file_there_are_few_lines_and_none_of_short_work(monkeypatch):
    file = write_to(io.StringIO(), monkeypatch)
    with open_bar(Progress(), total=10_000, unit="row", desc="dev") as bar:
        for _ in range(10_000):
            bar.update()
    assert file.getvalue() == "" and progress_file.TICK_IN_FILE >= 10


def test_what_moves_a_cursor_is_no_line():
    stream = io.StringIO()
    for text in ("\r", "\rdev: 1/2   ", "\n", "\x1b[A", "\r          \r", "\x1b[A\rdev: 2/2"):
        Lines(stream).write(text)
    assert stream.getvalue() == "dev: 1/2\ndev: 2/2\n"


def test_tokens_per_second_are_those_of_the_time_that_was_seen():
    assert tokens_per_second([(10.0, 100), (11.0, 999), (14.0, 300)]) == 50
    busy = Progress("generation", 3, 8, 40)
    assert (
        activity(busy, 50.4, True) == "generation 3/8 rows, 50 tokens/s"
        and activity(busy, 50.4, False) == "50 tokens/s"
    )
    assert activity(busy, 0.0, True) == "generation 3/8 rows" and activity(Progress(), 0.0, True) == ""


# --- The time that remains ----------------------------------------------------------------------------------------


def step(number, seconds, tokens, generated):
    return Step(
        (1,), 1.0, 0.5, 1.0, 1.0, tokens, number, number or None, seconds, totals={"generated_tokens": generated}
    )


def flags(**changes):
    small = settings(train_rows=10, steps=4, shortlist_size=3)
    small.finalists = 2
    for name, value in changes.items():
        setattr(small, name, value)
    return small


# 10 rows with 9 tokens each and an end token take 20 s: 2 s a row.
START = step(0, {"select": 20.0}, 90, 100)


def test_before_the_first_step_the_search_is_estimated_from_the_start():
    left = remaining(flags(), [START], 50, 200)
    assert left == Remaining(search=4 * 3 * 10 * 2, dev=3 * 50 * 2, test=2 * 200 * 2)
    assert str(left) == "about 22 min: search 4.0 min, dev 5.0 min, test 13 min"


def test_later_steps_are_taken_to_last_as_long_as_those_before():
    steps = [START, step(1, {"propose": 1.0, "gradient": 9.0, "select": 30.0}, 90, 400)]
    left = remaining(flags(), steps, 50, 200)
    assert left.search == 3 * 40  # the seconds of the step, of all its parts
    assert left.dev == pytest.approx(3 * 50 * (50 / 400) * 10)  # 50 s of reasoning gave 400 tokens; 10 tokens a row
    steps.append(step(2, {"propose": 1.0, "gradient": 9.0, "select": 10.0}, 190, 500))
    left = remaining(flags(), steps, 50, 200)
    assert left.search == 2 * 30
    assert left.test == pytest.approx(2 * 200 * (60 / 500) * 20)  # the current prompt's reasonings are twice as long


def test_a_run_whose_search_is_over_has_dev_and_test_before_it():
    steps = [START, step(4, {"propose": 1.0, "gradient": 9.0, "select": 30.0}, 90, 400)]
    left = remaining(flags(), steps, 50, 200)
    assert left.search == 0 and left.dev > 0 and left.test > 0


def test_no_more_prompts_are_counted_than_there_can_be():
    assert remaining(flags(steps=0), [START], 50, 200) == Remaining(0, 50 * 2, 200 * 2)
    many = remaining(flags(steps=1, finalists=10), [START], 50, 200)
    assert many.dev == 4 * 50 * 2 and many.test == 2 * 200 * 2
    assert remaining(flags(shortlist="all", min_candidates=5), [START], 50, 200).search == 4 * 5 * 10 * 2


def test_a_model_that_says_nothing_gives_an_estimate_all_the_same():
    assert remaining(flags(), [step(0, {"select": 20.0}, 0, 10)], 50, 200).dev == 3 * 50 * 2


def test_a_time_is_told_in_two_digits():
    assert [in_words(s) for s in (0.2, 59.6, 100, 599, 610, 7200)] == [
        "0 s",
        "60 s",
        "1.7 min",
        "10.0 min",
        "10 min",
        "120 min",
    ]


# --- What the engine says of itself -----------------------------------------------------------------------------


@pytest.fixture
def contexts(few_rows):
    rows, prompt = few_rows
    return [row.question + list(prompt) + row.turn_end for row in rows]


def test_the_engine_counts_the_rows_of_a_stage_as_they_end_and_all_tokens(llama, contexts):
    context, logits = llama.prefill(contexts)
    assert (llama.progress.stage, llama.progress.total) == ("reading questions", 5)
    llama.progress.begin("generation", 5)
    before, seen = llama.progress.tokens, Counter()
    for ended in llama.generate(context, logits, [3, 9, 1, 6, 9]):
        seen.update(rows=len(ended.rows), tokens=sum(map(len, ended.ids)) + sum(ended.stopped))
        assert llama.progress.done == seen["rows"] and llama.progress.tokens - before >= seen["tokens"]
    assert (seen["rows"], llama.progress.tokens - before) == (5, seen["tokens"])


def test_the_rows_of_a_stage_count_once_in_each_batch(llama, contexts):
    seen = []

    def work(batch):
        seen.append((llama.progress.done, llama.progress.total))
        llama.progress.done += len(batch) // 2  # some rows report their end, or do so again after memory ran out
        return batch

    llama.over_rows(work, range(7), "gradient", 3, cost=lambda job: 0)
    assert seen == [(0, 7), (3, 7), (6, 7)] and llama.progress.stage == "gradient"
