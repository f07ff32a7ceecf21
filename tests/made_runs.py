"""Hand-made runs: their records, and folders of their files, for the tests of what reads and shows runs."""

import random
from dataclasses import asdict, replace

from support.files import write_json, write_jsonl
from support.runs import Audit, Best, Candidate, RowOutcomes, Score, Step, Tried

LLAMA, GEMMA = "meta-llama/Meta-Llama-3-8B-Instruct", "google/gemma-2-9b-it"
START = "read it ."
WORDS = {1: "read", 2: " it", 3: ".", 4: "check", 5: " all"}  # token: text
# Some are long, and one has signs that matplotlib might take for a formula.
SUBWORDS = {
    11: " proper",
    12: " logical",
    13: " systematically",
    14: " decomposition",
    15: " mathematical",
    16: " the",
    17: " step",
    18: " intermediate",
    19: " calculations",
    20: " $x^$",
    21: "ization",
    22: "ly",
    23: "ness",
    24: ".",
}
TEXTS = WORDS | SUBWORDS


def result(role, split, accuracy, n=100, harness=0.5, **more):
    """A line of results.jsonl."""
    errors = [(p * (1 - p) / (n - 1)) ** 0.5 for p in (accuracy, harness)]
    return {
        "role": role,
        "split": split,
        "prompt": START if role == "initial" else role,
        "n": n,
        "accuracy": accuracy,
        "harness_accuracy": harness,
        "stderr": errors[0],
        "harness_stderr": errors[1],
        "unread": 0.25,
        "truncated": 0.125,
        "mean_tokens": 31.5,
    } | more


def score(prompt_ids, objective):
    """The fields of a `Score`; no test looks at more than ids, objective and cross-entropy."""
    return {
        "prompt_ids": tuple(prompt_ids),
        "cross_entropy": objective - 0.5,
        "error": 0.25,
        "nll": 2.5,
        "objective": objective,
        "tokens": 30,
    }


def step(number, position, prompt_ids, objective, gradients=None, shortlist=()):
    """A `Step` whose prompt is the best so far. gradients: {token: gradient}, the incumbent's too; shortlist:
    (token, prompt ids with it, objective)."""
    prompt = "".join(TEXTS[token] for token in prompt_ids).strip()
    return Step(
        **score(prompt_ids, objective),
        step=number,
        position=position,
        prompt=prompt,
        best=Best(objective, prompt),
        totals={"forward_tokens": 100 * number, "generated_tokens": 30 * number},
        batch_sizes={},
        seconds={"select": 0.5},
        candidates=[Candidate(token, gradient, TEXTS[token]) for token, gradient in (gradients or {}).items()],
        shortlist=[
            Tried(**score(ids, value), token=token, text=TEXTS[token], new=True) for token, ids, value in shortlist
        ],
    )


# Step 1 takes "check" for "read", step 2 keeps " it", step 3 takes " all" for ".", step 4 grows by ".".
STEPS = (
    step(0, None, (1, 2, 3), 8.0),
    step(1, 0, (4, 2, 3), 5.0, {4: -2.0, 5: -1.5, 1: 0.5}, [(4, (4, 2, 3), 5.0), (5, (5, 2, 3), 9.0)]),
    step(2, 1, (4, 2, 3), 5.0, {5: -1.0, 2: -0.25}, [(5, (4, 5, 3), 5.5)]),
    step(3, 2, (4, 2, 5), 4.5, {5: 0.25, 3: 0.5}, [(5, (4, 2, 5), 4.5)]),
    replace(step(4, 3, (4, 2, 5, 3), 4.75, {3: -1.0, 1: -0.5}, [(3, (4, 2, 5, 3), 4.75)]), grows=True),
)


def long_run(steps, length, most):
    """The steps of a search over subwords that begins with a prompt of `length` tokens and may grow to `most`."""
    rng = random.Random(0)
    tokens = list(SUBWORDS)
    prompt_ids, objective, position = rng.choices(tokens, k=length), 30.0, 0
    records = [step(0, None, prompt_ids, objective)]
    for number in range(1, steps + 1):
        grows = position == len(prompt_ids)
        gradients = {token: rng.gauss(0, 1) for token in tokens}
        shortlist = []
        for token in rng.sample(tokens, 3):
            changed = [*prompt_ids[:position], token, *prompt_ids[position + 1 :]]
            shortlist.append((token, changed, objective * rng.uniform(0.95, 1.1)))
        _, prompt_ids, objective = min(shortlist, key=lambda tried: tried[-1])
        records.append(replace(step(number, position, prompt_ids, objective, gradients, shortlist), grows=grows))
        position = position + 1 if position + 1 < len(prompt_ids) or len(prompt_ids) < most else 0
    return records


def rows_of(wrong, objectives, reasonings):
    """The `RowOutcomes` of rows whose reasonings are named by a letter each."""
    return RowOutcomes(wrong, objectives, "".join(f"{ord(letter):04x}" for letter in reasonings))


START_ROWS = rows_of("1111", [4.0, 6.0, 8.0, 10.0], "abcd")
TAKEN_ROWS = rows_of("0011", [1.0, 3.0, 5.0, 7.0], "xycd")  # three lower in every row
OTHER_ROWS = rows_of("0111", [4.0, 8.0, 12.0, 12.0], "abcz")


def audited_run():
    """Three steps with rows and audits. The random shortlist of step 1 is better, in steps 2 and 3 the gradient's."""
    start = replace(step(0, None, (1, 2, 3), 7.0), rows=START_ROWS)
    steps = [start]
    for number, position in ((1, 0), (2, 1), (3, 2)):
        before = steps[-1].prompt_ids
        ids = [(*before[:position], token, *before[position + 1 :]) for token in (4, 5)]
        gradients = {4: -2.0, 5: -1.0, before[position]: 0.5}
        tried = [(4, ids[0], 7.0 - number), (5, ids[1], 9.0 - number)]
        taken = step(number, position, ids[0], 7.0 - number, gradients, tried)
        shortlist = [
            replace(one, rows=rows, fixed_loss=loss)
            for one, rows, loss in zip(taken.shortlist, (TAKEN_ROWS, OTHER_ROWS), (6.0, 8.0), strict=True)
        ]
        drawn = replace(shortlist[1], objective=6.5 - number if number == 1 else 7.5 - number)
        again = Score(**score(before, steps[-1].objective + 0.25), rows=steps[-1].rows)
        audit = Audit(drawn=[drawn], fixed_loss=7.0, again=again, generations=8)
        steps.append(replace(taken, shortlist=shortlist, rows=TAKEN_ROWS, audit=audit))
    return tuple(steps)


AUDITED = audited_run()


def finalist(prompt_ids, accuracy, initial=False):
    """A line of prompts.jsonl."""
    return {
        "prompt": "x",
        "prompt_ids": list(prompt_ids),
        "dev_accuracy": accuracy,
        "dev_stderr": 0.05,
        "dev_low": accuracy - 0.125,
        "dev_high": accuracy + 0.0625,
        "initial": initial,
    }


def make_run(folder, best=0.8, results=None, steps=STEPS, **config):
    """Write the files of a run. best: the test accuracy of its best prompt; config: settings that differ from a usual
    run's. Returns the folder."""
    folder.mkdir(parents=True)
    write_json(folder / "run.json", {"config": {"task": "gsm8k", "model": LLAMA, "seed": 0} | config})
    usual = [result("initial", "dev", 0.5), result("initial", "test", 0.6), result("best", "test", best)]
    write_jsonl(folder / "results.jsonl", usual if results is None else results)
    write_jsonl(folder / "steps.jsonl", [asdict(record) for record in steps])
    write_jsonl(folder / "prompts.jsonl", [finalist((4, 2, 3), 0.9), finalist((1, 2, 3), 0.5, initial=True)])
    return folder


def transfer(task, method, source, target, accuracy):
    """A line of transfer.jsonl."""
    names = {"task": task, "method": method, "source": source, "target": target, "prompt": "p", "n": 100}
    return names | {"accuracy": accuracy, "stderr": 0.04, "harness_accuracy": 1 - accuracy, "harness_stderr": 0.03}


TRANSFERS = (
    transfer("bbh/hyperbaton", "initial prompt", "-", GEMMA, 0.5),
    transfer("bbh/hyperbaton", "GReaTer", LLAMA, LLAMA, 0.9),
    transfer("bbh/hyperbaton", "GReaTer", LLAMA, GEMMA, 0.8),
    transfer("gsm8k", "GReaTer", LLAMA, GEMMA, 0.7),
    transfer("bbh/causal_judgement", "GReaTer", LLAMA, LLAMA, 0.6),
)
