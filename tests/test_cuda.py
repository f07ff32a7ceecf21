"""On an NVIDIA GPU, if there is one: the same numbers as on the CPU, and memory as it is counted."""

import copy
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import FAMILIES, ROOT, settings, tiny_engine, with_choices

import beyond_paper
import greater_core as core
from support.engine import Engine, Sampler, load_engine
from support.files import read_jsonl

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
DEMO = ROOT / "demo" / "model"
GIB = 2**30


def on_gpu(engine):
    return Engine(copy.deepcopy(engine.model).to("cuda"), engine.tokenizer)


@pytest.mark.parametrize("choices", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("positions", ["one", "all"])
def test_a_search_is_that_of_the_cpu(family, positions, choices, demo_tokenizer, few_rows, double):
    rows, prompt = few_rows
    rows = with_choices(rows) if choices else rows
    engine = tiny_engine(family, demo_tokenizer)
    config = settings(steps=3, audit_every=1, positions=positions)
    here, there = (
        list(core.optimize(one, rows, prompt, config, visit=beyond_paper.visit)) for one in (engine, on_gpu(engine))
    )
    assert len(here) == 4
    for ours, theirs in zip(here, there, strict=True):
        assert (ours.prompt_ids, ours.rows.reasoning) == (theirs.prompt_ids, theirs.rows.reasoning)
        assert ours.objective == pytest.approx(theirs.objective, rel=1e-9)
        gradients = [[candidate.gradient for candidate in step.candidates] for step in (ours, theirs)]
        assert gradients[0] == pytest.approx(gradients[1], rel=1e-6, abs=1e-12)
        if ours.audit:
            fixed = [[one.fixed_loss for one in step.shortlist] for step in (ours, theirs)]
            assert fixed[0] == pytest.approx(fixed[1], rel=1e-9)


def test_rows_end_where_they_end_on_the_cpu_though_a_gpu_looks_less_often(llama, few_rows):
    rows, prompt = few_rows
    sequences = [[*row.question, *prompt[n:], *row.turn_end] for n in range(len(prompt)) for row in rows]
    engines = llama, on_gpu(llama)
    for engine in engines:
        engine.end_ids = [*range(20, 26)]  # random weights would hardly choose the one end token
    here, there = (engine.complete(sequences, 40) for engine in engines)
    assert here == there and len({len(ids) for ids, stopped in here if stopped}) > 3


def test_sampled_tokens_are_those_of_the_cpu():
    torch.manual_seed(0)
    logits = torch.randn(64, 500, dtype=torch.float64)
    here, there = (
        Sampler(0.7, [f"row {n}" for n in range(64)]).draw(logits.to(device), [*range(64)])
        for device in ("cpu", "cuda")
    )
    assert here.tolist() == there.tolist()


def test_when_memory_runs_out_the_batch_halves_and_the_texts_are_the_same(llama, few_rows):
    rows, prompt = few_rows
    sequences = [[*row.question, *prompt, *row.turn_end] for row in rows] * 400
    engine = on_gpu(llama)
    expected = engine.complete(sequences[:5], 60)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(2**26 / torch.cuda.get_device_properties(0).total_memory)
    try:
        found = engine.complete(sequences, 60, batch_size=len(sequences))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert engine.batch_sizes and min(engine.batch_sizes.values()) < len(sequences)
    assert found == expected * 400


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_batches_of_the_size_that_fits_take_no_more_memory_than_was_meant(dtype, few_rows, monkeypatch):
    """Of a GPU that had 1 GiB: four fifths to generate, an eighth to read forward and back."""
    engine = load_engine(str(DEMO), "cuda", dtype)
    rows, prompt = few_rows
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=GIB))
    sequences = [[*row.question, *prompt, *row.turn_end] for row in rows]
    limit = 100
    fit = engine.rows_that_fit(max(map(len, sequences)) + limit)
    assert 50 < fit < 10**5
    torch.cuda.reset_peak_memory_stats()
    engine.complete((sequences * (fit // 5 + 1))[:fit], limit)
    assert torch.cuda.max_memory_allocated() < GIB and not engine.batch_sizes
    many = rows * 2000
    search = core.Search(engine, many, settings(gradient_batch_size=0), None, prompt)
    reasoning = [[*range(20, 60)]] * len(many)
    prefix = core.prefix_at(engine, core.prefill_questions(engine, many, 0), prompt[:2])
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    tokens = [prompt[2], *range(30, 40)]
    core.mean_gradients(replace(search, reasoning=reasoning), prefix, prompt, tokens)
    assert torch.cuda.max_memory_allocated() - held < GIB / 4 and not engine.batch_sizes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_demo_s_search_gets_as_far_as_on_the_cpu(dtype, tmp_path):
    command = [sys.executable, str(ROOT / "02_optimize.py"), "--task", "demo", "--device", "cuda", "--dtype", dtype]
    folders = {"data_dir": tmp_path / "data", "run_dir": tmp_path / "run"}
    more = [word for name, value in folders.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    ended = subprocess.run([*command, *more], capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr[-2000:]
    steps = read_jsonl(tmp_path / "run" / "steps.jsonl")
    assert steps[0]["error"] > 0.5 and min(step["error"] for step in steps) < 0.1
    results = {one["role"]: one for one in read_jsonl(tmp_path / "run" / "results.jsonl")}
    assert results["best"]["accuracy"] > 0.95 > results["initial"]["accuracy"]
