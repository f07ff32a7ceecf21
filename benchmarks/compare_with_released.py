"""Our functions against values recorded from the authors' released code, line by line.

    python benchmarks/compare_with_released.py --golden path/to/golden

The folder holds `model/` and records, each a JSON file: consecutive optimization steps of the released code on a tiny
Llama, on the CPU, in float32. All records are compared. Given the same ids, losses and gradients must agree to 1e-4
relative; k, candidates, shortlist, generated ids and the chosen token exactly, but for the order of values within 1e-6
of each other. Prints a line per quantity; exits with 1 if one does not agree.

Where the released code is odd, the oddity is put on top of our value here, and nowhere else:
- it draws rows anew whenever k grows: we follow the draws that it made;
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
from support.files import UserError, require
from support.settings import SearchSettings, run_script
from support.tokens import Row

TOLERANCE = 1e-4  # relative
SAME_PLACE = 1e-6  # values that are as close may stand in either order
FEWEST = 6  # proposals, below which the released code lets k grow


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

    def order(self, name, values, ours, theirs):
        """Two rankings [R, N] of the places in the rows of `values` [R, V]."""
        ours, theirs = torch.as_tensor(ours), torch.as_tensor(theirs)
        agrees = torch.allclose(values.gather(1, ours), values.gather(1, theirs), rtol=0, atol=SAME_PLACE)
        same = "equal" if torch.equal(ours, theirs) else f"equal but for orders within {SAME_PLACE:g}"
        self.line(name, agrees, same if agrees else f"ours {ours.tolist()}, released {theirs.tolist()}")

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
    """Compare one recorded step; `golden` is the record it stands in."""
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
    case = Case(engine, golden, step, search, report, f"{golden['name']}, position {step['position']}")
    prefix = compare_proposals(case)
    compare_gradient(case, prefix)
    objectives = {tried["token"]: compare_tried(case, tried) for tried in step["selection"]}

    position = step["position"]
    stop = [t for t in objectives if "." in engine.tokenizer.decode([t])] if position >= len(prompt) / 2 else []
    lowest = min(objectives.values())
    best = stop[:1] or [t for t, value in objectives.items() if value <= lowest + SAME_PLACE]
    theirs = step["result"]["prompt_ids"][: len(prompt)]
    chosen = theirs[position] if theirs[position] in best else best[-1]
    report.exact(f"{case.name}: the prompt after it", [*prompt[:position], chosen, *prompt[position + 1 :]], theirs)


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
    report.order(f"{name}: most likely allowed tokens", log_probs, log_probs.topk(len(top[0])).indices, top)
    compare_escalation(case, log_probs)
    union = {*proposal["union_of_intersections"], prompt[position]}
    report.exact(f"{name}: candidates", union, set(proposal["candidates"]))
    return prefix


def compare_escalation(case, log_probs):
    """Compare k and the union of intersections, given the draws of each k that the released code tried."""
    proposal, report = case.step["proposal"], case.report
    in_a_round = len(proposal["sampled_rows"])
    draws = proposal.get("all_draws", proposal["sampled_rows"])
    rounds = [draws[start : start + in_a_round] for start in range(0, len(draws), in_a_round)]
    ours, agrees = None, True  # ours: the first k that gives us enough
    for number, samples in enumerate(rounds):
        k = case.settings["top_k"] + 2 * number
        found, enough_at = core.propose_candidates(log_probs, samples, k, FEWEST, lambda token: True)
        sure, possible = bounds_of_union(log_probs, samples, k)
        if number < len(rounds) - 1:
            agrees = agrees and len(sure) < FEWEST
        if ours is None and enough_at == k:
            ours = k
    agrees = agrees and len(possible) >= FEWEST and k == proposal["top_k"]
    what = f"{k} in {len(rounds)} rounds" if agrees else f"ours {ours}, released {proposal['top_k']}"
    report.line(f"{case.name}: k after escalation", agrees, what)
    union = set(proposal["union_of_intersections"])
    agrees = sure <= union <= possible and (enough_at > k or sure <= set(found) <= possible)
    what = "equal" if sure == possible else f"equal but for orders within {SAME_PLACE:g}"
    what = what if agrees else f"ours {sorted(found)} at k = {enough_at}, released {sorted(union)}"
    report.line(f"{case.name}: union of intersections", agrees, what)


def bounds_of_union(log_probs, samples, k):
    """(sure, possible): the union over `samples` of the intersected top-k of log_probs [B, V], without and with the
    tokens that are among the k likeliest only by an order within SAME_PLACE."""
    kth, next_to_it = log_probs.topk(k + 1).values[:, -2:].split(1, dim=1)  # [B, 1] each
    unions = []
    for among in (log_probs > next_to_it + SAME_PLACE, log_probs >= kth - SAME_PLACE):  # [B, V]
        union = torch.stack([among[sample].all(0) for sample in samples]).any(0)  # [V]
        unions.append(set(union.nonzero().flatten().tolist()))
    return unions


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
    shortlist = [candidates.index(token) for token in step["gradient"]["shortlist"]]
    report.order(f"{name}: shortlist", total[None], total.argsort()[None, : len(shortlist)], [shortlist])


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


def read_records(folder):
    """The records in a folder, each with its file's name. Errors: UserError for a file that is none, or no file."""
    paths = sorted(folder.glob("*.json"))
    require(paths and (folder / "model").is_dir(), f"--golden {folder}: no model/ and no record, NAME.json, there")
    records = []
    for path in paths:
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"--golden: {path} is no JSON: {error}") from None
        whole = isinstance(record, dict) and {"settings", "banned_token_ids", "steps"} <= record.keys()
        require(whole, f"--golden: {path} is no record: it lacks settings, banned_token_ids or steps")
        records.append(record | {"name": path.stem})
    return records


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--golden", type=Path, required=True)
    folder = parser.parse_args().golden
    records = read_records(folder)
    engine = load_engine(str(folder / "model"), "cpu", "float32")
    report = Report()
    for record in records:
        for step in record["steps"]:
            compare_step(report, engine, record, step)
    print(f"\n{report.failures} mismatches" if report.failures else "\nall agree")
    sys.exit(1 if report.failures else 0)


if __name__ == "__main__":
    run_script(main)
