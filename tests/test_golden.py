"""Numbers that must not move: the demo model's ids, losses, gradients and choices, recorded in golden.json.

After a change that is meant to move them: `python tests/test_golden.py` writes the file anew; look at its diff.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, settings

import greater_core as core
from support.engine import load_engine
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
    assert done.returncode == 0, done.stdout
    step = golden["steps"][0]
    step["rows"][1]["generated_ids"] = step["rows"][1]["generated_ids"][:-1]
    step["gradient"]["rows"][0]["loss"] *= 1.001
    step["gradient"]["shortlist"].reverse()
    step["selection"][0]["rows"][0]["error"] = 1 - step["selection"][0]["rows"][0]["error"]
    file.write_text(json.dumps(golden))
    done = compare(tmp_path)
    wrong = [line for line in done.stdout.splitlines() if line.startswith("MISMATCH")]
    assert done.returncode == 1 and len(wrong) == 4 and "4 mismatches" in done.stdout


@pytest.mark.parametrize("folder", ["nowhere"])
def test_a_missing_golden_folder_is_one_line(folder):
    done = compare(folder)
    assert done.returncode == 2 and done.stderr.startswith("error: --golden nowhere")


if __name__ == "__main__":
    torch.set_num_threads(1)
    values = quantities(load_engine(str(ROOT / "demo" / "model"), "cpu", "float32"))
    FILE.write_text(json.dumps(values) + "\n")
