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
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import greater_core as core
from support.answers import answer_columns
from support.engine import Context, Engine, load_engine
from support.settings import SearchSettings
from support.tokens import Row

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


@dataclass
class Case:
    """A step of the released code, and what our functions need for it."""

    engine: Engine
    golden: dict
    step: dict
    search: core.Search
    report: Report
    name: str

    @property
    def settings(self):
        return self.golden["settings"]


def compare_step(report, engine, golden, step):
    settings, prompt = golden["settings"], step["prompt_ids"]
    ours = SearchSettings(
        loss_temperature=settings["answer_loss_temperature"],
        fluency_weight=settings["gradient_nll_weight"],
        max_new_tokens=settings["max_new_tokens"],
        batch_size=8,
        gradient_batch_size=4,
    )
    rows = [Row(r["before_ids"], r["between_ids"], r["extractor_ids"], r["answer_ids"]) for r in step["rows"]]
    search = core.Search(engine, rows, ours, None, tuple(prompt))
    case = Case(engine, golden, step, search, report, f"step at position {step['position']}")
    prefix = compare_proposals(case)
    compare_gradient(case, prefix)
    objectives = {tried["token"]: compare_tried(case, tried) for tried in step["selection"]}

    position = step["position"]
    stop = [t for t in objectives if "." in engine.tokenizer.decode([t])] if position >= len(prompt) / 2 else []
    lowest = min(objectives.values())
    chosen = stop[0] if stop else [t for t, value in objectives.items() if value == lowest][-1]
    result = [*prompt[:position], chosen, *prompt[position + 1 :]]
    report.exact(f"{case.name}: the prompt after it", result, step["result"]["prompt_ids"][: len(result)])


def compare_proposals(case):
    """Compare the proposals at a step's position; the `core.Prefix` there."""
    step, report, name = case.step, case.report, case.name
    position, prompt, proposal = step["position"], step["prompt_ids"], step["proposal"]
    questions = core.prefill_questions(case.engine, case.search.rows, 4)
    prefix = core.prefix_at(case.engine, questions, tuple(prompt[:position]))
    log_probs = prefix.log_probs.clone()  # [B, V]
    log_probs[:, case.golden["banned_token_ids"]] = float("-inf")
    # The released code forbids the previous token; at position 0 that is the last one, by Python's indexing.
    log_probs[:, prompt[position - 1]] = float("-inf")
    top = [r["next_token_top_allowed"] for r in step["rows"]]
    report.exact(f"{name}: most likely allowed tokens", log_probs.topk(len(top[0])).indices.tolist(), top)
    samples, top_k = proposal["sampled_rows"], case.settings["top_k"]
    found, k = core.propose_candidates(log_probs, samples, top_k, 6, lambda token: True)
    report.exact(f"{name}: k after escalation", k, proposal["top_k"])
    report.exact(f"{name}: union of intersections", sorted(found), proposal["union_of_intersections"])
    report.exact(f"{name}: candidates", {*found, prompt[position]}, set(proposal["candidates"]))
    return prefix


def compare_gradient(case, prefix):
    """Compare reasoning, losses, gradients and shortlist of the current prompt."""
    step, report, name = case.step, case.report, case.name
    prompt, candidates, theirs = step["prompt_ids"], step["proposal"]["candidates"], step["gradient"]["rows"]
    contexts = [row.question + prompt + row.turn_end for row in case.search.rows]
    compare_generation(case, name, contexts, [r["generated_ids"] for r in step["rows"]])
    reasoning = [r["reasoning_ids"] for r in step["rows"]]
    scored = [scored_ids(row, prompt, ids) for row, ids in zip(case.search.rows, reasoning)]
    cross_entropy, _ = answer_losses(case, case.search.rows, scored)
    report.close(f"{name}: answer cross-entropy / T", cross_entropy, [r["answer_cross_entropy_over_T"] for r in theirs])
    nll = [prompt_nll(case, row, ids, prompt).mean() for row, ids in zip(case.search.rows, scored)]
    report.close(f"{name}: mean nll of the prompt", torch.stack(nll), [r["prompt_nll_mean"] for r in theirs])

    ours, losses = core.candidate_gradients(case.search, prefix, prompt, candidates, reasoning)
    report.close(f"{name}: loss", losses, [r["loss"] for r in theirs])
    own = -case.settings["gradient_nll_weight"] * prefix.log_probs[:, candidates] / len(prompt)
    released = torch.tensor([r["one_hot_gradient"] for r in theirs])
    report.close(f"{name}: gradient, less the candidate's own term", ours - own, released)
    gap = ((ours - released).abs().max() / released.abs().max()).item()
    print(f"          {'':{len(name)}}  (that term is {gap:.2f} of the largest entry)")
    total = (ours - own).sum(0)
    total = total / total.norm()
    report.close(f"{name}: summed gradient, normalized", total, step["gradient"]["sum_normalized"])
    order = [candidates[i] for i in total.argsort().tolist()][: case.settings["shortlist"]]
    report.exact(f"{name}: shortlist", order, step["gradient"]["shortlist"])


def compare_tried(case, tried):
    """Compare one tried token; its objective, as selection computes it."""
    report, name, prompt = case.report, f"{case.name}, token {tried['token']}", tried["prompt_ids"]
    theirs = tried["rows"]
    compare_generation(case, name, [r["input_ids"] for r in theirs], [r["generated_ids"] for r in theirs])
    scored = [r["scored_ids"] for r in theirs]
    for row, r in zip(case.search.rows, theirs):
        # The released code leaves the end of the turn out between prompt and reasoning.
        assert r["scored_ids"][: len(row.question) + len(prompt)] == row.question + prompt
        assert r["scored_ids"][r["target_start"] :] == r["target_ids"] == row.extractor + row.answer
    cross_entropy, wrong = answer_losses(case, case.search.rows, scored)
    mean = [sum(r["answer_cross_entropy_over_T"]) / len(r["answer_cross_entropy_over_T"]) for r in theirs]
    report.close(f"{name}: answer cross-entropy / T", cross_entropy, mean)
    report.exact(f"{name}: error flags", wrong.float().tolist(), [r["error"] for r in theirs])
    rows = zip(case.search.rows, scored, theirs)
    nll = [prompt_nll(case, row, ids, r["prompt_nll_labels"]).tolist() for row, ids, r in rows]
    report.close(f"{name}: prompt nll on the released labels", nll, [r["prompt_nll"] for r in theirs])
    stale = sum(r["prompt_nll_labels"] != prompt for r in theirs)
    print(f"          {'':{len(name)}}  (labels are stale in {stale} of {len(theirs)} rows)")
    mean_nll = sum(sum(values) / len(values) for values in nll) / len(nll)
    objective = wrong.float().mean().item() + case.settings["selection_nll_weight"] * mean_nll
    report.close(f"{name}: objective", objective, tried["objective"])
    return objective


def compare_generation(case, name, contexts, theirs):
    ours = case.engine.complete(contexts, case.settings["max_new_tokens"], 8)
    case.report.exact(f"{name}: generated ids", [ids for ids, _ in ours], theirs)


def scored_ids(row, prompt, reasoning):
    return [*row.question, *prompt, *row.turn_end, *reasoning, *row.extractor, *row.answer]


def logits_of(case, ids, columns):
    """Logits [L, V] of one sequence, read from nothing, at some columns."""
    ids = torch.tensor([ids])
    return case.engine.forward(Context([], ids[:, :0]), ids, columns=[columns])[0]


def answer_losses(case, rows, scored):
    """(cross-entropy [B], wrong [B]) of the answers that end sequences of ids, by the core's `answer_loss`."""
    longest = max(len(row.answer) for row in rows)
    logits = []
    for row, ids in zip(rows, scored):
        (read,) = row.reads
        columns = answer_columns(len(ids) - 1, read)  # less the answer's last token
        logits.append(logits_of(case, ids, columns + columns[-1:] * (longest - len(columns))))
    return core.answer_loss(torch.stack(logits)[:, None], rows, case.settings["answer_loss_temperature"])


def prompt_nll(case, row, ids, labels):
    """Negative log-likelihood of each label where the prompt stands: column c predicts token c + 1."""
    columns = list(range(len(row.question) - 1, len(row.question) - 1 + len(labels)))
    logits = logits_of(case, ids, columns)
    return torch.nn.functional.cross_entropy(logits, torch.tensor(labels), reduction="none")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--golden", type=Path, required=True)
    folder = parser.parse_args().golden
    if not (folder / "object_counting.json").is_file() or not (folder / "model").is_dir():
        print(f"error: --golden {folder}: no object_counting.json and model/ there", file=sys.stderr)
        sys.exit(2)
    golden = json.loads((folder / "object_counting.json").read_text(encoding="utf-8"))
    engine = load_engine(str(folder / "model"), "cpu", "float32")
    report = Report()
    for step in golden["steps"]:
        compare_step(report, engine, golden, step)
    print(f"\n{report.failures} mismatches" if report.failures else "\nall agree")
    sys.exit(1 if report.failures else 0)


if __name__ == "__main__":
    main()
