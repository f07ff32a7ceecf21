"""The programs that a run leaves: run as they stand they give the answers of stage 3."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from conftest import ROOT, settings

from support.answerers import local_answerer
from support.evaluation import evaluate
from support.takeaway import messages_of, sent, write_programs

MODEL = str(ROOT / "demo" / "model")
PROMPT = "show each step ."


def loaded(path):
    """The program as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def framed(demo_task, place):
    return {
        "behind": demo_task,
        "before": replace(demo_task, template="please {prompt} {question}"),
        "system": replace(demo_task, template="{question}", system="please {prompt} now ."),
        "choices": replace(demo_task, kind="label", choices=tuple(str(n) for n in range(30))),
        # "1" begins "1 2", which the tokenizer reads as two words
        "long choices": replace(demo_task, kind="label", choices=("1", "1 2", "1 2 3", "2", "7 1", "30")),
    }[place]


@pytest.mark.parametrize("place", ["behind", "before", "system", "choices", "long choices"])
def test_the_program_for_transformers_gives_the_texts_and_answers_of_stage_3(
    demo_engine, demo_task, demo_data, tmp_path, place
):
    task, rows = framed(demo_task, place), demo_data["test"][:8]
    found = evaluate(local_answerer(demo_engine, MODEL), task, rows, PROMPT, settings(max_new_tokens=30))
    path, _ = write_programs(tmp_path, task, PROMPT, MODEL, 30, demo_engine.tokenizer)
    program = loaded(path)
    for row, expected in zip(rows, found):
        answer, reasoning = program.ask(row["question"])
        assert reasoning == expected["text"]
        if task.choices:
            assert answer == expected["answer"]
        else:
            assert answer == expected["reply"]


def test_the_program_for_transformers_runs_as_it_stands(demo_engine, demo_task, demo_data, tmp_path):
    rows = demo_data["test"][:2]
    path, _ = write_programs(tmp_path, demo_task, PROMPT, MODEL, 30, demo_engine.tokenizer)
    command = [sys.executable, str(path), *(row["question"] for row in rows)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    found = evaluate(local_answerer(demo_engine, MODEL), demo_task, rows, PROMPT, settings(max_new_tokens=30))
    assert done.stdout.splitlines() == [prediction["reply"] for prediction in found], done.stderr


def test_the_messages_are_those_that_are_sent_with_a_place_for_the_question(demo_task):
    task = framed(demo_task, "system")
    assert messages_of(task, PROMPT) == [
        {"role": "system", "content": "please show each step . now ."},
        {"role": "user", "content": "{question}"},
    ]
    assert "please show each step . now ." in "\n".join(sent(task, PROMPT))


def test_a_program_for_a_template_that_asks_for_the_date_says_the_same_date(demo_engine, demo_task, tmp_path):
    class Tokenizer:
        def get_chat_template(self):
            return "{{ strftime_now('%Y') }}"

    path, _ = write_programs(tmp_path, demo_task, PROMPT, MODEL, 30, Tokenizer())
    assert "macro strftime_now" in path.read_text()
