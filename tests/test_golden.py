"""Numbers that must not move: the demo model's ids, losses, gradients and choices, recorded in golden.json.

After a change that is meant to move them: `python tests/test_golden.py` writes the file anew; look at its diff.
"""

import importlib.util
import json
import math
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, settings

import greater_core as core
from support.engine import load_engine
from support.files import UserError
from support.sources import split_rows
from support.tasks import get_task
from support.tokens import allowed_ids, encode_prompt, encode_row

FILE = Path(__file__).parent / "golden.json"


def quantities(engine):
    """What the released code's golden values hold, too: ids in parts, candidates, losses, gradients, two steps."""
    task, tokenizer = get_task("demo"), engine.tokenizer
    data = split_rows(task)["train"][:6]
    rows = [encode_row(tokenizer, task, row) for row in data]
    prompt = encode_prompt(tokenizer, task, data[0]["question"], task.initial_prompt)[1]
    config = settings(steps=2, max_new_tokens=40)
    search = core.Search(engine, rows, config, None, tuple(prompt))
    questions = core.prefill_questions(engine, rows, 6)
    outcomes = core.reason_and_score(search, questions, [(tuple(prompt), i) for i in range(len(rows))])
    reasoning = [outcome.reasoning for outcome in outcomes]
    prefix = core.prefix_at(engine, questions, tuple(prompt[:1]))
    allowed = allowed_ids(tokenizer, len(tokenizer))
    log_probs = torch.full_like(prefix.log_probs, float("-inf"))
    log_probs[:, allowed] = prefix.log_probs[:, allowed]
    candidates, k = core.propose_candidates(log_probs, [[0, 2, 4]], 8, 6, lambda t: t != prompt[1])
    candidates = [*candidates, prompt[1]]
    gradients, losses = core.candidate_gradients(search, prefix, prompt, candidates, reasoning)
    steps = list(core.optimize(engine, rows, prompt, config))
    names = {"before": "question", "between": "turn_end", "extractor": "extractor", "answer": "answer"}
    return {
        "rows": [{name: getattr(row, part) for name, part in names.items()} for row in rows],
        "prompt_ids": list(prompt),
        "reasoning_ids": reasoning,
        "cross_entropy": [outcome.cross_entropy for outcome in outcomes],
        "wrong": [outcome.wrong for outcome in outcomes],
        "nll": [outcome.nll for outcome in outcomes],
        "candidates": candidates,
        "k": k,
        "losses": losses.tolist(),
        "gradients": gradients.tolist(),
        "shortlists": [[tried.token for tried in step.shortlist] for step in steps[1:]],
        "objectives": [step.objective for step in steps],
        "prompts": [step.prompt for step in steps],
    }


def test_the_demo_s_numbers_are_the_recorded_ones(demo_engine):
    recorded, found = json.loads(FILE.read_text()), quantities(demo_engine)
    assert found.keys() == recorded.keys()
    for name, value in found.items():
        if name in ("cross_entropy", "nll", "losses", "gradients", "objectives"):
            a, b = torch.tensor(value), torch.tensor(recorded[name])
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item(), msg=name)
        else:
            assert value == recorded[name], name


# --- The script that compares with the released code's values ------------------------------------------------


def released_values(engine):
    """A golden file in the released code's format, computed one row at a time with plain indexing."""
    task, model, tokenizer = get_task("demo"), engine.model, engine.tokenizer
    data = split_rows(task)["train"][:4]
    rows = [encode_row(tokenizer, task, row) for row in data]
    prompt = encode_prompt(tokenizer, task, data[0]["question"], task.initial_prompt)[1]
    position, t, weight = 1, 0.2, 0.2
    embed = model.get_input_embeddings()
    samples, top_k = [[0, 1, 2], [1, 2, 3]], 12
    banned = sorted(set(range(len(embed.weight))) - set(allowed_ids(tokenizer, len(embed.weight))))

    def generate(ids):
        return engine.complete([ids], 40, 1)[0][0]

    def losses(parts, choice=None):
        """(cross-entropy / T, wrong, [nll of each prompt token]) of one row's parts."""
        ids = torch.tensor([sum(parts, [])])
        embedded = embed(ids)
        if choice is not None:
            column = len(parts[0]) + position
            embedded = torch.cat([embedded[:, :column], choice[None, None], embedded[:, column + 1 :]], 1)
        log = model(inputs_embeds=embedded).logits[0]
        start, answer = len(parts[0]), ids[0, -len(parts[-1]) :]
        read = log[-len(parts[-1]) - 1 : -1]
        nll = torch.nn.functional.cross_entropy(
            log[start - 1 : start - 1 + len(prompt)], ids[0, start : start + len(prompt)], reduction="none"
        )
        return torch.nn.functional.cross_entropy(read / t, answer), float((read.argmax(-1) != answer).any()), nll

    tops, before = [], torch.tensor(prompt[:position])
    for row in rows:
        log = model(input_ids=torch.cat([torch.tensor(row.question), before])[None]).logits[0, -1].clone()
        log[[*banned, prompt[position - 1]]] = float("-inf")
        tops.append(log.topk(20).indices.tolist())
    union = set().union(*(set.intersection(*(set(tops[i][:top_k]) for i in sample)) for sample in samples))
    candidates = [*sorted(union - {prompt[position]}), prompt[position]]
    gradient_rows, records = [], []
    for row in rows:
        reasoning = generate(row.question + prompt + row.turn_end)
        one_hot = torch.zeros(len(candidates))
        one_hot[-1] = 1
        one_hot.requires_grad_()
        parts = [row.question, prompt, row.turn_end, reasoning, row.extractor, row.answer]
        cross_entropy, _, nll = losses(parts, one_hot @ embed(torch.tensor(candidates)))
        loss = cross_entropy + weight * nll.mean()
        gradient_rows.append(
            {
                "loss": loss.item(),
                "answer_cross_entropy_over_T": cross_entropy.item(),
                "prompt_nll_mean": nll.mean().item(),
                "one_hot_gradient": torch.autograd.grad(loss, one_hot)[0].tolist(),
            }
        )
        ids = {
            "before_ids": row.question,
            "between_ids": row.turn_end,
            "extractor_ids": row.extractor,
            "answer_ids": row.answer,
        }
        records.append(
            {
                **ids,
                "reasoning_ids": reasoning,
                "generated_ids": reasoning,
                "next_token_top_allowed": tops[len(records)],
            }
        )
    total = torch.tensor([r["one_hot_gradient"] for r in gradient_rows]).sum(0)
    total = total / total.norm()
    shortlist = [candidates[i] for i in total.argsort().tolist()][:3]
    selection = []
    for token in shortlist:
        tried = [*prompt[:position], token, *prompt[position + 1 :]]
        tried_rows = []
        for row in rows:
            context = row.question + tried + row.turn_end
            reasoning = generate(context)
            parts = [row.question, tried, reasoning, row.extractor, row.answer]
            with torch.no_grad():
                cross_entropy, wrong, nll = losses(parts)
            tried_rows.append(
                {
                    "input_ids": context,
                    "generated_ids": reasoning,
                    "scored_ids": sum(parts, []),
                    "target_start": len(row.question) + len(tried) + len(reasoning),
                    "target_ids": row.extractor + row.answer,
                    "answer_cross_entropy_over_T": [cross_entropy.item()],
                    "error": wrong,
                    "prompt_nll": nll.tolist(),
                    "prompt_nll_labels": tried,
                }
            )
        error = sum(r["error"] for r in tried_rows) / len(rows)
        nll = sum(sum(r["prompt_nll"]) for r in tried_rows) / len(rows) / len(prompt)
        selection.append({"token": token, "prompt_ids": tried, "rows": tried_rows, "objective": error + 0.02 * nll})
    best = min(reversed(selection), key=lambda s: s["objective"])
    step = {
        "position": position,
        "prompt_ids": prompt,
        "rows": records,
        "proposal": {
            "sampled_rows": samples,
            "top_k": top_k,
            "union_of_intersections": sorted(union),
            "candidates": candidates,
        },
        "gradient": {"rows": gradient_rows, "sum_normalized": total.tolist(), "shortlist": shortlist},
        "selection": selection,
        "result": {"prompt_ids": best["prompt_ids"]},
    }
    config = {"answer_loss_temperature": t, "gradient_nll_weight": weight, "selection_nll_weight": 0.02}
    config |= {"top_k": top_k, "shortlist": 3, "max_new_tokens": 40}
    return {"settings": config, "banned_token_ids": banned, "steps": [step]}


def compare(folder):
    command = [sys.executable, str(ROOT / "benchmarks" / "compare_with_released.py"), "--golden", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_comparison_agrees_with_plain_values_and_notices_each_quantity_that_is_off(tmp_path, demo_engine):
    (tmp_path / "model").symlink_to(ROOT / "demo" / "model")
    golden = released_values(demo_engine)
    file = tmp_path / "object_counting.json"
    file.write_text(json.dumps(golden))
    done = compare(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    step = golden["steps"][0]
    step["rows"][1]["generated_ids"] = step["rows"][1]["generated_ids"][:-1]
    step["gradient"]["rows"][0]["loss"] *= 1.001
    step["gradient"]["shortlist"].reverse()
    step["selection"][0]["rows"][0]["error"] = 1 - step["selection"][0]["rows"][0]["error"]
    file.write_text(json.dumps(golden))
    done = compare(tmp_path)
    wrong = [line for line in done.stdout.splitlines() if line.startswith("MISMATCH")]
    assert done.returncode == 1 and len(wrong) == 4 and "4 mismatches" in done.stdout


@pytest.fixture
def comparison():
    """The script as a module."""
    path = ROOT / "benchmarks" / "compare_with_released.py"
    spec = importlib.util.spec_from_file_location("compare_with_released", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def intersections_of(log_probs, samples, k):
    """The union over samples of what is among the k likeliest of all their rows."""
    top = [set(row.topk(k).indices.tolist()) for row in log_probs]
    return set().union(*(set.intersection(*(top[i] for i in sample)) for sample in samples))


@pytest.fixture
def escalated(comparison):
    """(case, log_probs): a step of the released code whose k grew, with rows drawn anew each time."""
    log_probs = torch.randn(8, 300, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    rng, draws, k = random.Random(0), [], 40
    while True:
        draws += [rng.sample(range(8), 3) for _ in range(2)]
        union = intersections_of(log_probs, draws[-2:], k)
        if len(union) >= 6:
            break
        k += 2
    proposal = {"sampled_rows": draws[-2:], "all_draws": draws, "top_k": k, "union_of_intersections": sorted(union)}
    step, report = {"proposal": proposal}, comparison.Report()
    return SimpleNamespace(step=step, settings={"top_k": 40}, report=report, name="redrawn"), log_probs


def test_k_is_that_of_the_draws_made_anew_for_each_k(comparison, escalated, capsys):
    case, log_probs = escalated
    proposal = case.step["proposal"]
    draws, k = proposal["all_draws"], proposal["top_k"]
    assert len(draws) == 2 + (k - 40) > 6
    for start in range(0, len(draws), 2):  # none of the draws would have given this k alone
        assert core.propose_candidates(log_probs, draws[start : start + 2], 40, 6, lambda token: True)[1] != k
    comparison.compare_escalation(case, log_probs)
    assert case.report.failures == 0 and f"{k} in {len(draws) // 2} rounds" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "failures"),
    [
        (lambda proposal: proposal.update(top_k=proposal["top_k"] + 2), 1),
        (lambda proposal: proposal.update(all_draws=proposal["all_draws"][-2:]), 2),  # the union is that of 40, too
        (lambda proposal: proposal["all_draws"].extend(proposal["sampled_rows"]), 2),  # on, though there were enough
        (lambda proposal: proposal["union_of_intersections"].pop(), 1),
    ],
)
def test_another_k_or_another_union_is_noticed(comparison, escalated, change, failures):
    case, log_probs = escalated
    change(case.step["proposal"])
    comparison.compare_escalation(case, log_probs)
    assert case.report.failures == failures


def test_every_record_in_the_folder_is_compared(tmp_path, comparison, monkeypatch):
    (tmp_path / "model").mkdir()
    for name in ("navigate", "object_counting"):
        record = {"settings": {}, "banned_token_ids": [], "steps": [f"of {name}"] * 2}
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    compared = []
    monkeypatch.setattr(comparison, "load_engine", lambda *arguments: None)
    monkeypatch.setattr(comparison, "compare_step", lambda report, engine, record, step: compared.append(step))
    monkeypatch.setattr(sys, "argv", ["compare", "--golden", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        comparison.main()
    assert compared == ["of navigate"] * 2 + ["of object_counting"] * 2 and ended.value.code == 0


def test_values_within_a_millionth_may_stand_in_either_order_and_others_not(comparison):
    values = torch.tensor([[0.5, 0.5 + 5e-7, 0.1, 0.2]])
    report = comparison.Report()
    report.order("a tie", values, [[1, 0, 3]], [[0, 1, 3]])
    assert report.failures == 0
    report.order("no tie", values, [[1, 0, 3]], [[1, 0, 2]])
    assert report.failures == 1


def test_only_tokens_at_the_edge_of_the_top_k_are_in_doubt(comparison):
    log_probs = torch.tensor([[-1.0, -2.0, -2.0 - 5e-7, -3.0, -math.inf], [-1.0, -2.0, -3.0, -4.0, -math.inf]])
    bounds = [comparison.bounds_of_union(log_probs, [[0], [0, 1]], k) for k in (1, 2, 3, 4)]
    assert bounds == [[{0}, {0}], [{0}, {0, 1, 2}], [{0, 1, 2}, {0, 1, 2}], [{0, 1, 2, 3}, {0, 1, 2, 3}]]


def test_a_missing_golden_folder_is_one_line():
    done = compare("nowhere")
    assert done.returncode == 2 and done.stderr.startswith("error: --golden nowhere")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"steps": []}'])
def test_a_file_that_is_no_record_is_refused(tmp_path, comparison, content):
    (tmp_path / "model").mkdir()
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(UserError, match="x.json is no"):
        comparison.read_records(tmp_path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    values = quantities(load_engine(str(ROOT / "demo" / "model"), "cpu", "float32"))
    FILE.write_text(json.dumps(values) + "\n")
