"""The benchmarks run and say what they measured; how fast this machine is, is not a test."""

import importlib
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT


def run(script, *arguments, folder):
    command = [sys.executable, str(ROOT / "benchmarks" / script), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # other tests run beside it
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_step_cost_measures_both_implementations_on_the_same_lengths(tmp_path):
    flags = ["--shape", "demo", "--rows", 3, "--reasoning", 7, "--question", 20, "--device", "cpu"]
    printed = run("step_cost.py", *flags, folder=tmp_path)
    assert "times as fast as the plain implementation" in printed and "of what the hardware allows" in printed
    ours, plain = map(json.loads, (tmp_path / "runs/step_cost/step_cost.jsonl").read_text().splitlines())
    assert (ours["variant"], plain["variant"]) == ("ours", "plain")
    assert "from the loaded model to the first step's record" in printed and 0 < ours["first_step"] < 60
    assert 0 < ours["floor"] < ours["seconds"] and set(ours["stages"]) == {"propose", "gradient", "select"}
    # 3 tokens extend the prefix; 3 rows of 8 prompt tokens, 8 of the turn's end, 7 reasoning, 37 behind go forward and
    # back; 9 jobs read 8 + 8 tokens, generate 7, read each of these, and 37 behind them.
    gradient, jobs = 3 * (8 + 8 + 7 + 37), 9
    assert ours["tokens"] == {
        "forward_tokens": 3 + gradient + jobs * (8 + 8 + 7 + 37),
        "backward_tokens": gradient,
        "generated_tokens": jobs * 7,
    }


def test_a_sweep_draws_a_picture(tmp_path):
    flags = ["--shape", "demo", "--rows", 2, "--reasoning", 4, "--sweep", "mu", "--device", "cpu"]
    printed = run("step_cost.py", *flags, folder=tmp_path)
    assert printed.count("ours") == 4
    assert (tmp_path / "runs/step_cost/mu.png").read_bytes().startswith(b"\x89PNG")


def test_decoding_is_compared_with_continuous_batching_and_profiled(tmp_path):
    flags = ["--shape", "demo", "--rows", 2, "--device", "cpu", "--reasoning", 5]
    assert "where generate_batch takes" in run("step_cost.py", *flags, "--variant", "generate_batch", folder=tmp_path)
    assert "aten::" in run("step_cost.py", *flags, "--profile", folder=tmp_path)


@pytest.mark.parametrize("budget", [300])
def test_claims_compares_all_arms_at_the_same_budget(tmp_path, budget):
    printed = run("claims.py", "--seeds", 2, "--budgets", budget, "--train-rows", 5, folder=tmp_path)
    arms = ("full method", "random shortlist", "gradient without reasoning", "selection by error", "lambda 0")
    assert all(printed.count(f"\n{arm}  ") == 2 for arm in arms)
    results = json.loads((tmp_path / "runs/claims/claims.json").read_text())["results"]
    assert all(len(r[arm][str(budget)]) == 2 for r in results.values() for arm in arms)


def test_generation_is_compared_with_transformers_and_the_floor(tmp_path):
    model = ROOT / "demo" / "model"
    flags = ["--models", model, "--task", "demo", "--rows", 3, "--max-new-tokens", 5, "--repeats", 1, "--one-thread"]
    printed = run("generation_speed.py", *flags, folder=tmp_path)
    assert "15 generated in 3 rows" in printed and "the same ids in 3 of 3 rows" in printed
    assert re.search(r"ours is at \d+ % of its speed", printed) and re.search(r"resident \d+ before loading", printed)


def test_the_floor_of_generation_is_the_products_of_the_linear_layers(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    benchmark = importlib.import_module("generation_speed")
    model = torch.nn.Sequential(torch.nn.Linear(10, 20), torch.nn.ReLU(), torch.nn.Linear(20, 50))
    model.get_output_embeddings, model.dtype = lambda: model[2], torch.float32
    # 200 weights meet each of 7 tokens, 1000 the last of each of 2 rows. Of 3 and 1 new tokens the first are known then
    # and the last are not read: 2 steps of one row, whose 1200 weights take longer to move than to multiply.
    reading = 2 * (200 * 7 + 1000 * 2) / 100.0
    rates = benchmark.Rates(operations=100.0, bytes=10.0)
    found = benchmark.floor_seconds(model, [[1] * 3, [1] * 4], [3, 1], rates)
    assert found == pytest.approx(reading + 2 * 4 * 1200 / 10)
    rates = benchmark.Rates(operations=100.0, bytes=1e9)
    found = benchmark.floor_seconds(model, [[1] * 3, [1] * 4], [3, 2], rates)
    assert found == pytest.approx(reading + 2 * 1200 * (2 + 1) / 100)
    assert benchmark.before_end([4, 9, 2, 4], ends=[2, 3]) == [4, 9] and benchmark.before_end([4], [2]) == [4]
