"""OPRO's two mathematical demonstrations: a model reads the best solutions so far and writes better ones.

    python examples/opro_math.py --problem regression --model Qwen/Qwen2.5-0.5B-Instruct
    python examples/opro_math.py --problem tsp --cities 10 --optimizer-endpoint http://localhost:8000/v1 --model NAME

regression: the line w x + b through 50 noisy points of 15 x + 14, by its squared error; the model never sees the
points. tsp: a short round trip through cities, by its length. It is the loop of text_optimizers.py with a number in
place of a prompt's accuracy.
"""

import itertools
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from support.answerers import open_answerer
from support.files import require
from support.proposals import REPEATED
from support.runs import Scored
from support.settings import ModelFlags, ServerFlags, as_flag, flag, parse_flags, run_script
from support.trials import Search, Trials
from text_optimizers import Method, optimize

EXACT_UP_TO = 12  # cities
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.S | re.I)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


@dataclass
class Flags(ServerFlags, ModelFlags):
    problem: str = flag("tsp", "regression or tsp")
    cities: int = flag(10, f"of tsp; the shortest trip is known up to {EXACT_UP_TO}")
    optimizer_endpoint: str = flag("", "URL of an OpenAI-compatible server; --model is then the model's name there")
    rounds: int = flag(50, "rounds; the run ends earlier at the optimum, where that is known")
    samples: int = flag(8, "solutions wanted in a round")
    requests: int = flag(2, "requests in a round, each for all samples, if too few replies are solutions")
    shown: int = flag(10, "best solutions shown")
    optimizer_temperature: float = flag(1.0, "at which solutions are drawn")
    optimizer_tokens: int = flag(256, "longest reply, in tokens")
    seed: int = flag(0, "draws the problem, its first solutions and the replies")
    out: str = flag("", "folder that keeps the replies, optimizer.jsonl; empty: they are not kept")
    budget = 0  # of Trials: nothing is generated to score a solution

    def __post_init__(self):
        require(self.problem in PROBLEMS, f"--problem must be one of {', '.join(PROBLEMS)}, not {self.problem!r}")
        for name in ("rounds", "samples", "requests", "shown", "optimizer_tokens"):
            require(getattr(self, name) >= 1, f"{as_flag(name)} must be at least 1")
        require(self.cities >= 3, "--cities must be at least 3")
        require(self.optimizer_temperature >= 0, "--optimizer-temperature must not be negative")


# --- The problems: first solutions, what is asked, what a reply says, what it costs, what is known -------------


class Regression:
    """Solutions are the integers "w, b"."""

    META = """Find integers w and b that make a function small. Here are pairs that were tried, the smallest value last:

{earlier}

Give one new pair, different from all above, with a smaller value. Do not write code. Reply in this form: \
<answer>w, b</answer>"""

    def __init__(self, flags):
        self.x = np.arange(1, 51)
        self.y = 15 * self.x + 14 + np.random.default_rng(flags.seed).normal(size=50)

    def meta(self, earlier):
        return self.META.format(earlier="\n".join(f"w, b = {one.prompt}: {-one.accuracy:.0f}" for one in earlier))

    def draw(self, rng):
        return f"{rng.randint(10, 20)}, {rng.randint(10, 20)}"

    def parse(self, text):
        numbers = NUMBER.findall(text)
        if len(numbers) != 2 or max(map(len, numbers)) > 9:
            return None
        return ", ".join(str(round(float(number))) for number in numbers)

    def cost(self, solution):
        """The sum of squared errors."""
        w, b = map(int, solution.split(", "))
        return float(((self.y - w * self.x - b) ** 2).sum())

    def references(self):
        """The best integers lie around the best real numbers: the error is convex, and this window is wide enough."""
        w, b = np.polyfit(self.x, self.y, 1).round().astype(int)
        pairs = itertools.product(range(w - 1, w + 2), range(b - 30, b + 31))
        return {"optimum": min(self.cost(f"{w}, {b}") for w, b in pairs)}


class Tsp:
    """Solutions are round trips "0, 3, 1, 2" from city 0."""

    META = """A round trip through all these cities shall be as short as possible. City and coordinates:

{cities}

Here are trips that were tried, the shortest last:

{earlier}

Give one new trip, different from all above and shorter. It starts at city 0 and names each city once. Do not write \
code. Reply in this form: <answer>0, ...</answer>"""

    def __init__(self, flags):
        rng = random.Random(f"{flags.seed}/cities")
        self.points = [(rng.randint(-100, 100), rng.randint(-100, 100)) for _ in range(flags.cities)]
        points = np.array(self.points, dtype=float)
        self.distance = np.linalg.norm(points[:, None] - points[None], axis=2)

    def meta(self, earlier):
        cities = "\n".join(f"{city}: {x}, {y}" for city, (x, y) in enumerate(self.points))
        trips = "\n".join(f"{one.prompt}: length {-one.accuracy:.0f}" for one in earlier)
        return self.META.format(cities=cities, earlier=trips)

    def draw(self, rng):
        trip = [0, *rng.sample(range(1, len(self.points)), len(self.points) - 1)]
        return ", ".join(map(str, trip))

    def parse(self, text):
        trip, cities = re.findall(r"-?\d+", text), [str(city) for city in range(len(self.points))]
        if len(trip) > len(cities) and trip[-1] == "0":  # back at the start
            trip.pop()
        return ", ".join(trip) if trip[:1] == ["0"] and sorted(trip) == sorted(cities) else None

    def cost(self, solution):
        return self.length([int(city) for city in solution.split(", ")])

    def length(self, trip):
        """Of the closed trip."""
        return float(sum(self.distance[a, b] for a, b in zip(trip, trip[1:] + trip[:1])))

    def references(self):
        known = {"nearest neighbour": self.length(self.nearest_neighbour())}
        known["farthest insertion"] = self.length(self.farthest_insertion())
        return known | ({"optimum": self.shortest()} if len(self.points) <= EXACT_UP_TO else {})

    def nearest_neighbour(self):
        """From city 0 always to the nearest city that was not visited."""
        trip, left = [0], set(range(1, len(self.points)))
        while left:
            trip.append(min(left, key=lambda city: self.distance[trip[-1], city]))
            left.remove(trip[-1])
        return trip

    def farthest_insertion(self):
        """The city farthest from the trip so far goes where it lengthens it least."""
        trip, left, d = [0], set(range(1, len(self.points))), self.distance
        while left:
            city = max(left, key=lambda city: d[city, trip].min())
            detours = [d[a, city] + d[city, b] - d[a, b] for a, b in zip(trip, trip[1:] + trip[:1])]
            trip.insert(int(np.argmin(detours)) + 1, city)
            left.remove(city)
        return trip

    def shortest(self):
        """The length of the shortest trip, by dynamic programming over sets of visited cities (Held and Karp)."""
        d, others = self.distance, range(1, len(self.points))
        ways = {(frozenset([city]), city): d[0, city] for city in others}  # {(visited, the last): length}
        for size in range(2, len(self.points)):
            for visited in map(frozenset, itertools.combinations(others, size)):
                for last in visited:
                    before = visited - {last}
                    ways[visited, last] = min(ways[before, city] + d[city, last] for city in before)
        return float(min(ways[frozenset(others), last] + d[last, 0] for last in others))


PROBLEMS = {"regression": Regression, "tsp": Tsp}


# --- The loop is that of the text methods ----------------------------------------------------------------------


class Opro(Method):
    """Shows the best solutions, worst first. Asks again, a few times, where replies are no solutions."""

    def propose(self, search):
        settings, valid = search.settings, []
        for _ in range(settings.requests):
            meta = search.judge.meta(reversed(search.pool))
            valid += [one for one in search.write_prompts([[meta]], settings.samples) if one]
            if len(valid) >= settings.samples:
                break
        return valid[: settings.samples]

    def keep(self, search, scored):
        return search.top(search.settings.shown)


class SolutionSearch(Search):
    """A search whose prompts are solutions of a problem, its `judge`, and whose accuracy is the negative cost."""

    def accept(self, replies):
        """The solution in each reply, None for one that is none; all are counted."""
        solutions = []
        for reply in replies:
            solution = self.judge.parse((ANSWER.findall(reply) or [reply])[-1])
            seen = solution in self.accepted or solution in self.archive
            self.replies.update(["all", "invalid" if solution is None else REPEATED if seen else "new"])
            self.accepted.add(solution)
            solutions.append(solution)
        return solutions

    def score(self, solution):
        if solution not in self.archive:
            self.archive[solution] = Scored(solution, -self.judge.cost(solution), 0, self.step)
        return self.archive[solution]


def solve(problem, writer, flags, folder):
    """Run the search. Yields its TextSteps until one has the optimum. writer: answerers.Answerer."""
    optimum = problem.references().get("optimum", -np.inf)
    seeds = [problem.draw(random.Random(f"{flags.seed}/start {number}")) for number in range(5)]
    search = SolutionSearch(Trials(None, writer, None, [], flags, folder), problem, seeds, flags.rounds)
    for step in optimize(Opro(), search):
        yield step
        if -step.best.accuracy <= optimum + 1e-6:
            return


# --- The script ------------------------------------------------------------------------------------------------


def report(problem, steps, flags):
    """Lines on what was found, beside what is known and what as many draws without any feedback give."""
    first, last = steps[0], steps[-1]
    costs = {"start": -first.best.accuracy, "found": -last.best.accuracy}
    rng, tried = random.Random(f"{flags.seed}/random"), sum(len(step.proposed) for step in steps)
    costs["random, as many"] = min(problem.cost(problem.draw(rng)) for _ in range(tried))
    costs |= problem.references()
    for name, cost in costs.items():
        gap = f"  {100 * (cost / costs['optimum'] - 1):+7.1f} %" if "optimum" in costs else ""
        yield f"{name:20s} {cost:12.1f}{gap}"
    replies = {name: last.replies.get(name, 0) for name in ("all", "new", REPEATED, "invalid")}
    yield f"found: {last.best.prompt}, in round {last.best.step} of {last.step}; {tried} solutions scored"
    yield "replies: " + ", ".join(f"{count} {name}" for name, count in replies.items())


def main():
    flags = parse_flags(Flags, __doc__)
    flags.check_server_flags()
    flags.answer_turn = "ask"  # no half-written message is continued
    flags.model = flags.model if flags.optimizer_endpoint else flags.model_path()
    with TemporaryDirectory() as elsewhere:
        folder = Path(flags.out or elsewhere)
        require(not (folder / "optimizer.jsonl").exists(), f"--out {folder} holds a run: choose another")
        folder.mkdir(parents=True, exist_ok=True)
        problem, steps = PROBLEMS[flags.problem](flags), []
        for step in solve(problem, open_answerer(flags, flags.model, flags.optimizer_endpoint), flags, folder):
            counts = ", ".join(f"{count} {name}" for name, count in step.replies.items())
            line = f"round {step.step:3d}  best {-step.best.accuracy:10.1f}  {step.best.prompt}"
            print(f"{line}  replies: {counts or 'none'}", flush=True)
            steps.append(step)
    print("\n".join(report(problem, steps, flags)))


if __name__ == "__main__":
    run_script(main)
