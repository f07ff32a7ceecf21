"""Our functions against values recorded from the authors' released code, line by line.

    python benchmarks/compare_with_released.py --golden path/to/golden

The folder holds `model/` and `object_counting.json`: two consecutive optimization steps of the released code on a tiny
Llama, on the CPU, in float32. Given the same ids, losses and gradients must agree to 1e-4 relative; candidates,
shortlist, generated ids and the chosen token exactly. Prints a line per quantity; exits with 1 if one does not agree.

Where the released code is odd, the oddity is put on top of our value here, and nowhere else:
- its gradient leaves out the candidate's own log-probability: ours minus that one term;
- it scores a shortlisted prompt without the end-of-turn token: we score the ids it scored;
- its selection takes the prompt's likelihood on stale labels: ours, gathered at those labels;
- of equal objectives the last wins, and a full stop in the second half is taken at once.
"""

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import greater_core as core
from support.engine import load_model, logits_at

TOLERANCE = 1e-4


class Report:
    """Prints one line per comparison and remembers whether all agreed."""

    def __init__(self):
        self.failures = 0

    def exact(self, name, ours, theirs):
        self.line(name, ours == theirs, "equal" if ours == theirs else f"ours {ours}, released {theirs}")

    def close(self, name, ours, theirs):
        """Largest relative difference; small entries of a list count relative to its largest."""
        ours, theirs = (torch.as_tensor(v, dtype=torch.float64) for v in (ours, theirs))
        worst = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        self.line(name, worst <= TOLERANCE, f"relative difference {worst:.1e}")

    def line(self, name, agrees, what):
        self.failures += not agrees
        print(f"{'ok      ' if agrees else 'MISMATCH'}  {name:52s}  {what}")


def compare_step(report, model, tokenizer, golden, step):
    settings = golden["settings"]
    config = SimpleNamespace(
        loss_temperature=settings["answer_loss_temperature"],
        fluency_weight=settings["gradient_nll_weight"],
        fluency="nll",
        batch_size=8,
        gradient_batch_size=4,
    )
    position, prompt = step["position"], step["prompt_ids"]
    name = f"step at position {position}"
    rows = [
        core.Row(*(r[f"{part}_ids"] for part in ("before", "between", "extractor", "answer"))) for r in step["rows"]
    ]

    work = core.Work()
    prefix = compare_proposals(report, name, model, golden, step, rows, work)
    log_probs, candidates = prefix.log_probs, step["proposal"]["candidates"]

    # Reasoning and losses of the current prompt
    contexts = [row.before + prompt + row.between for row in rows]
    compare_generation(report, name, model, settings, contexts, [r["generated_ids"] for r in step["rows"]])
    reasoning = [r["reasoning_ids"] for r in step["rows"]]
    theirs = step["gradient"]["rows"]
    cross_entropy, _, nll = core.answer_loss(model, rows, prompt, reasoning, config)
    report.close(f"{name}: answer cross-entropy / T", cross_entropy, [r["answer_cross_entropy_over_T"] for r in theirs])
    report.close(f"{name}: mean nll of the prompt", nll, [r["prompt_nll_mean"] for r in theirs])

    # Gradient and shortlist
    ours, losses = core.candidate_gradients(model, rows, prefix, prompt, candidates, reasoning, config, work)
    report.close(f"{name}: loss", losses, [r["loss"] for r in theirs])
    own = -config.fluency_weight * log_probs[:, candidates] / len(prompt)
    released = torch.tensor([r["one_hot_gradient"] for r in theirs])
    report.close(f"{name}: gradient, less the candidate's own term", ours - own, released)
    gap = ((ours - released).abs().max() / released.abs().max()).item()
    print(f"          {'':{len(name)}}  (that term is {gap:.2f} of the largest entry)")
    total = (ours - own).sum(0)
    total = total / total.norm()
    report.close(f"{name}: summed gradient, normalized", total, step["gradient"]["sum_normalized"])
    order = [candidates[i] for i in total.argsort().tolist()][: settings["shortlist"]]
    report.exact(f"{name}: shortlist", order, step["gradient"]["shortlist"])

    # Selection
    objectives = {}
    for tried in step["selection"]:
        objectives[tried["token"]] = compare_tried(report, name, model, settings, config, step, rows, tried)
    stop = [t for t in objectives if "." in tokenizer.decode([t])] if position >= len(prompt) / 2 else []
    lowest = min(objectives.values())
    chosen = stop[0] if stop else [t for t, value in objectives.items() if value == lowest][-1]
    result = [*prompt[:position], chosen, *prompt[position + 1 :]]
    report.exact(f"{name}: the prompt after it", result, step["result"]["prompt_ids"][: len(result)])


def compare_proposals(report, name, model, golden, step, rows, work):
    """Compare the proposals at a step's position; the `core.Prefix` there."""
    position, prompt = step["position"], step["prompt_ids"]
    proposal = step["proposal"]
    prefix = core.prefix_at(model, core.read_questions(model, rows, 4, work), tuple(prompt[:position]), work)
    log_probs = prefix.log_probs
    allowed = torch.ones(log_probs.shape[1], dtype=torch.bool)
    allowed[golden["banned_token_ids"]] = False
    allowed[prompt[position - 1]] = False  # the previous token; at position 0 the last one, by Python's indexing
    masked = log_probs.masked_fill(~allowed, float("-inf"))
    top = [r["next_token_top_allowed"] for r in step["rows"]]
    report.exact(f"{name}: most likely allowed tokens", masked.topk(len(top[0])).indices.tolist(), top)
    start, samples = golden["settings"]["top_k"], proposal["sampled_rows"]
    found, k = core.propose_candidates(log_probs, allowed, samples, start, 6, lambda token: True)
    report.exact(f"{name}: k after escalation", k, proposal["top_k"])
    report.exact(f"{name}: union of intersections", sorted(found), proposal["union_of_intersections"])
    report.exact(f"{name}: candidates", {*found, prompt[position]}, set(proposal["candidates"]))
    return prefix


def compare_generation(report, name, model, settings, contexts, theirs):
    ours = core.generate_greedily(model, contexts, settings["max_new_tokens"], batch_size=8)
    report.exact(f"{name}: generated ids", [ids for ids, _ in ours], theirs)


def compare_tried(report, name, model, settings, config, step, rows, tried):
    """Compare one tried token; its objective, as selection computes it."""
    name, prompt = f"{name}, token {tried['token']}", tried["prompt_ids"]
    theirs = tried["rows"]
    compare_generation(
        report, name, model, settings, [r["input_ids"] for r in theirs], [r["generated_ids"] for r in theirs]
    )
    scored, reasoning = [], []
    for row, r in zip(rows, theirs):
        # Everything between prompt and extractor as one piece: the released code leaves the end of the turn out there.
        reasoning.append(r["scored_ids"][len(row.before) + len(prompt) : r["target_start"]])
        scored.append(core.Row(row.before, [], r["target_ids"][: -len(row.answer)], row.answer))
        assert row.before + prompt + reasoning[-1] + scored[-1].extractor + row.answer == r["scored_ids"]
    cross_entropy, wrong, _ = core.answer_loss(model, scored, prompt, reasoning, config)
    mean = [sum(r["answer_cross_entropy_over_T"]) / len(r["answer_cross_entropy_over_T"]) for r in theirs]
    report.close(f"{name}: answer cross-entropy / T", cross_entropy, mean)
    report.exact(f"{name}: error flags", wrong.float().tolist(), [r["error"] for r in theirs])
    nll = []
    for row, r in zip(scored, theirs):
        columns = torch.arange(len(prompt))[None] + len(row.before) - 1  # column c predicts token c + 1
        logits = logits_at(model, columns, input_ids=torch.tensor([r["scored_ids"]]))
        labels = torch.tensor(r["prompt_nll_labels"])
        nll.append(torch.nn.functional.cross_entropy(logits[0], labels, reduction="none").tolist())
    report.close(f"{name}: prompt nll on the released labels", nll, [r["prompt_nll"] for r in theirs])
    stale = sum(r["prompt_nll_labels"] != prompt for r in theirs)
    print(f"          {'':{len(name)}}  (labels are stale in {stale} of {len(theirs)} rows)")
    mean_nll = sum(sum(values) / len(values) for values in nll) / len(nll)
    objective = wrong.float().mean().item() + settings["selection_nll_weight"] * mean_nll
    report.close(f"{name}: objective", objective, tried["objective"])
    return objective


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--golden", type=Path, required=True)
    folder = parser.parse_args().golden
    if not (folder / "object_counting.json").is_file() or not (folder / "model").is_dir():
        print(f"error: --golden {folder}: no object_counting.json and model/ there", file=sys.stderr)
        sys.exit(2)
    golden = json.loads((folder / "object_counting.json").read_text(encoding="utf-8"))
    model, tokenizer = load_model(str(folder / "model"), "cpu", "float32")
    report = Report()
    for step in golden["steps"]:
        compare_step(report, model, tokenizer, golden, step)
    print(f"\n{report.failures} mismatches" if report.failures else "\nall agree")
    sys.exit(1 if report.failures else 0)


if __name__ == "__main__":
    main()
