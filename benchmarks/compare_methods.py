"""GReaTer and the optimizers that work in text: methods x seeds at an equal number of scored generations, in pieces.

    python benchmarks/compare_methods.py --models A --tasks bbh/navigate --source DIR --budget 1000
    python benchmarks/compare_methods.py --models A --tasks gsm8k --methods greater opro random-prompts --minutes 60
    python benchmarks/compare_methods.py --models A --tasks gsm8k --only-table

A scored generation is a training row under a prompt. A piece is a search (stage 2 with --budget) or the fixed prompts
of a task and model (stage 3); real_models.py runs them. A killed driver goes on with the same command; other settings
need another --out. Writes results.md, and curves.png with the best training accuracy over scored generations.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from compare_methods_table import Comparison, Searched, write_comparison
from real_models import (
    PieceFlags,
    finished_pieces,
    folder_of,
    is_done,
    measurements_of,
    setting_of,
    settings_rows,
)

from support.files import read_jsonl, require
from support.runs import TextStep, generations_of, read_steps
from support.settings import GREATER, TITLES, flag, parse_flags, run_script

RANDOM_PROMPTS, RANDOM_SHORTLIST = "random-prompts", "random-shortlist"
METHODS = {  # what --methods calls it: (its name in tables, flags of stage 2)
    GREATER: (TITLES[GREATER], {}),
    RANDOM_SHORTLIST: ("random shortlist", {"shortlist": "random"}),
}
for name, title in TITLES.items():
    if name != GREATER:
        METHODS[RANDOM_PROMPTS if name == "random" else name] = (title, {"method": name})


@dataclass
class Flags(PieceFlags):
    KNOWN = METHODS
    out: str = flag("runs/compare-methods", "folder of all pieces and of the tables")
    budget: int = flag(1000, "scored generations of each search")
    optimizer_model: str = flag("", "the model that writes prompts, or its name on a server; empty: each task's model")
    optimizer_endpoint: str = flag("", "URL of a server that writes prompts, with --optimizer-model")

    def __post_init__(self):
        super().__post_init__()
        require(self.budget >= 1, "--budget must be at least 1")

    def search_flags(self, method, setting):
        """As of PieceFlags: the budget ends the search, whatever the method."""
        own = self.KNOWN[method][1] | {"budget": self.budget}
        own |= {"train_rows": setting.train_rows, "finalists": setting.finalists}
        if "method" not in own:
            # Twice as many as it holds if every prompt is new; those that are not cost nothing.
            steps = 2 * self.budget // (setting.train_rows * setting.shortlist_size)
            return own | {"steps": max(1, steps), "shortlist_size": setting.shortlist_size}
        if method != RANDOM_PROMPTS and self.optimizer_model:
            own |= {"optimizer_model": self.optimizer_model}
            own |= {"optimizer_endpoint": self.optimizer_endpoint} if self.optimizer_endpoint else {}
        return own


def searched(piece, tasks, flags):
    """The `Searched` of a finished search."""
    (measurement,) = measurements_of(piece, tasks, flags)
    folder = folder_of(piece, flags.out)
    rows = setting_of(flags, piece.model, piece.task).train_rows
    steps = read_steps(folder / "steps.jsonl")
    if isinstance(steps[-1], TextStep):
        scored = steps[-1].totals["scored_generations"]
    else:
        scored = generations_of(steps, rows)
    return Searched(replace(measurement, scored=scored), steps, read_jsonl(folder / "prompts.jsonl"), rows)


def write_tables(pieces, tasks, flags):
    """Write and print the tables of the finished pieces, and what is missing."""
    done = [piece for piece in pieces if is_done(piece, tasks, flags)]
    fixed = [measurements_of(piece, tasks, flags) for piece in done if piece.kind == "fixed"]
    comparison = Comparison(
        fixed=[one for several in fixed for one in several],
        searches=[searched(piece, tasks, flags) for piece in done if piece.kind == "search"],
        budget=flags.budget,
        settings=settings_rows(tasks, flags, left_out=("steps", "audit_every")),
        notes=[flags.note] if flags.note else [],
        missing=[piece.label for piece in pieces if piece not in done],
    )
    paths = write_comparison(comparison, Path(flags.out))
    print(f"\n{paths[0].read_text(encoding='utf-8')}")
    print("\n".join(f"  {path}" for path in paths))


def main():
    flags = parse_flags(Flags, __doc__)
    with finished_pieces(flags) as (pieces, tasks):
        write_tables(pieces, tasks, flags)


if __name__ == "__main__":
    run_script(main)
