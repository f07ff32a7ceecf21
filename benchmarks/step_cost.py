"""What one optimization step costs, against a plain implementation of the same steps and against the hardware's floor.

    python benchmarks/step_cost.py                                 # the 110m shape, 16 rows, drawn reasoning lengths
    python benchmarks/step_cost.py --rows 8 --reasoning 64         # every reasoning 64 tokens
    python benchmarks/step_cost.py --shape 8b --rows 50            # a GPU
    python benchmarks/step_cost.py --sweep question                # how the cost grows
    python benchmarks/step_cost.py --variant generate_batch        # our decoding against transformers' own
    python benchmarks/step_cost.py --profile                       # where the time of a step goes

Random weights never stop by themselves, so each row is given a length: drawn log-normal with median 150 and 95th
percentile 600, at most 1024 tokens, or --reasoning. Questions have GSM8K's lengths (median 60 tokens here). A line of
JSON per measurement is appended to --out, and a sweep draws a picture.

The plain implementation takes one row at a time, reads whole sequences, keeps all logits, generates the current
prompt's reasoning anew and scores by reading everything again. The floor is the larger of the bytes that must be moved
over the measured bandwidth and the floating-point operations over the measured matrix rate, summed over the stages.
"""

import argparse
import json
import math
import random
import resource
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import greater_core as core
from support.engine import Engine, load_engine
from support.settings import SearchSettings
from support.sources import split_rows
from support.tasks import get_task
from support.tokens import Row, encode_prompt, encode_row

# hidden, intermediate, layers, heads, key/value heads, vocabulary, tied embeddings
SHAPES = {
    "demo": (128, 384, 4, 4, 4, 126, True),
    "110m": (768, 2560, 12, 12, 12, 8192, False),
    "1b": (2048, 8192, 16, 32, 8, 128256, True),
    "8b": (4096, 14336, 32, 32, 8, 128256, False),
}
TURN_END, EXTRACTOR, ANSWER = 8, 36, 1  # tokens, as in the released golden example
END = 2


def make_model(shape, device):
    hidden, intermediate, layers, heads, kv_heads, vocabulary, tied = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=4096,
        eos_token_id=END,
        bos_token_id=1,
        pad_token_id=0,
    )
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.requires_grad_(False).eval()
    return forbid_end(model)


def forbid_end(model):
    """Random weights could choose the end token by chance; the lengths are to be the drawn ones."""

    end = torch.tensor([END], device=model.device)

    def hook(_, inputs, logits):
        return logits.index_fill(-1, end, -1e4)

    model.get_output_embeddings().register_forward_hook(hook)
    return model


def draw_lengths(count, flags, rng):
    if flags.reasoning:
        return [flags.reasoning] * count
    sigma = math.log(600 / 150) / 1.645
    return [max(1, min(1024, round(rng.lognormvariate(math.log(150), sigma)))) for _ in range(count)]


def make_rows(flags, rng, vocabulary):
    def ids(count):
        return [rng.randrange(3, vocabulary) for _ in range(count)]

    turn_end, extractor = ids(TURN_END), ids(EXTRACTOR)
    drawn = [max(20, min(250, round(rng.lognormvariate(math.log(60), 0.4)))) for _ in range(flags.rows)]
    sizes = [flags.question or size for size in drawn]
    return [Row(ids(size), turn_end, extractor, ids(ANSWER)) for size in sizes], tuple(ids(flags.prompt))


def problem(flags, model):
    """(rows, prompt, position, candidates, {(n, i): length}) with everything drawn from one seed."""
    rng, vocabulary = random.Random(flags.seed), SHAPES[flags.shape][5]
    rows, prompt = make_rows(flags, rng, vocabulary)
    position = flags.prompt // 2
    others = [t for t in rng.sample(range(3, vocabulary), flags.candidates + 1) if t != prompt[position]]
    lengths = draw_lengths(flags.rows * (flags.mu + 1), flags, rng)
    jobs = [(n, i) for n in range(flags.mu + 1) for i in range(flags.rows)]
    return rows, prompt, position, [*others[: flags.candidates], prompt[position]], dict(zip(jobs, lengths))


def clock(device):
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class DrawnLengths(Engine):
    """An engine whose reasonings have the drawn lengths: {(prompt, row number): tokens}, not the settings' limit."""

    lengths = {}

    def over_rows(self, function, jobs, stage, size, cost):
        def noted(batch):
            self.batch = batch
            return function(batch)

        return super().over_rows(noted, jobs, stage, size, cost)

    def generate(self, context, logits, limits):
        limits = [self.lengths.get(job, limit) for job, limit in zip(self.batch, limits)]
        return super().generate(context, logits, limits)


def our_step(model, flags):
    """({stage: seconds} of a step, its token counts). What earlier steps left is made before the clock starts."""
    rows, prompt, position, candidates, lengths = problem(flags, model)
    engine = DrawnLengths(model, SimpleNamespace(eos_token_id=END))
    settings = SearchSettings(batch_size=flags.batch_size, gradient_batch_size=flags.gradient_batch_size)
    search = core.Search(engine, rows, settings, allowed=None, initial=prompt)
    tried = [(*prompt[:position], token, *prompt[position + 1 :]) for token in candidates[: flags.mu]]
    # Before the clock starts the lengths are the current prompt's, whose reasoning is there when a step begins.
    engine.lengths = {(prompt, i): lengths[flags.mu, i] for i in range(len(rows))}
    questions = core.prefill_questions(engine, rows, settings.batch_size)
    prefix = core.prefix_at(engine, questions, prompt[: position - 1])
    ((_, reasoning),) = core.score_prompts(search, questions, [prompt])
    engine.lengths = {(tried[n], i): length for (n, i), length in lengths.items() if n < flags.mu}
    engine.counts.clear()

    device = model.device.type
    times = [clock(device)]
    prefix = core.prefix_at(engine, questions, prompt[:position], known=prefix)
    core.propose_candidates(prefix.log_probs, [list(range(min(5, len(rows))))], 10, 0, lambda token: True)
    times.append(clock(device))
    core.candidate_gradients(search, prefix, prompt, candidates, reasoning)
    times.append(clock(device))
    core.score_prompts(search, prefix, tried)
    times.append(clock(device))
    return stages(("propose", "gradient", "select"), times), dict(engine.counts)


def stages(names, times):
    """{stage: seconds} from the clock at the start and behind each stage."""
    return {name: end - start for name, start, end in zip(names, times, times[1:])}


def plain_step(model, flags):
    """The same step, plainly: one row at a time, whole sequences, all logits, nothing kept."""
    rows, prompt, position, candidates, lengths = problem(flags, model)
    device = model.device.type

    def generate(row, prompt, length):
        ids = torch.tensor([row.question + list(prompt) + row.turn_end], device=model.device)
        more = {"do_sample": False, "min_new_tokens": length, "max_new_tokens": length}
        return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **more)[0, ids.shape[1] :].tolist()

    def loss(row, prompt, reasoning, one_hot=None):
        ids = row.question + list(prompt) + row.turn_end + reasoning + row.extractor + row.answer
        ids, embed, start = torch.tensor([ids], device=model.device), model.get_input_embeddings(), len(row.question)
        embeddings = embed(ids)
        if one_hot is not None:
            chosen = one_hot @ embed(torch.tensor(candidates, device=model.device))
            at = start + position
            embeddings = torch.cat([embeddings[:, :at], chosen[None, None], embeddings[:, at + 1 :]], 1)
        logits = model(inputs_embeds=embeddings, use_cache=False).logits[0].float()
        answers, targets = len(row.answer), torch.tensor(row.answer, device=model.device)
        cross_entropy = torch.nn.functional.cross_entropy(logits[-1 - answers : -1] / 0.2, targets)
        nll = torch.nn.functional.cross_entropy(
            logits[start - 1 : start - 1 + len(prompt)], ids[0, start : start + len(prompt)]
        )
        return cross_entropy + 0.2 * nll

    times = [clock(device)]
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row.question + list(prompt[:position])], device=model.device)
            model(input_ids=ids, use_cache=False).logits[0, -1].topk(10)
    times.append(clock(device))
    reasoning = [generate(row, prompt, lengths[flags.mu, i]) for i, row in enumerate(rows)]
    times.append(clock(device))
    for row, ids in zip(rows, reasoning):
        one_hot = torch.zeros(len(candidates), device=model.device, dtype=model.dtype)
        one_hot[-1] = 1
        torch.autograd.grad(loss(row, prompt, ids, one_hot.requires_grad_()), one_hot)
    times.append(clock(device))
    for n, token in enumerate(candidates[: flags.mu]):
        tried = (*prompt[:position], token, *prompt[position + 1 :])
        for i, row in enumerate(rows):
            with torch.no_grad():
                loss(row, tried, generate(row, tried, lengths[n, i]))
    times.append(clock(device))
    return stages(("propose", "reason", "gradient", "select"), times), {}


def generate_batch_step(model, flags):
    """The generations of a step, and nothing else, by transformers' continuous batching; its start is not counted."""
    rows, prompt, position, candidates, lengths = problem(flags, model)
    config = GenerationConfig(do_sample=False, eos_token_id=[END], pad_token_id=0, max_new_tokens=1024)
    with model.continuous_batching_context_manager(generation_config=config, block=True, timeout=5) as manager:

        def generate(jobs):
            for (n, i), length in jobs:
                tried = (*prompt[:position], candidates[n], *prompt[position + 1 :])
                manager.add_request(rows[i].question + list(tried) + rows[i].turn_end, max_new_tokens=length)
            left = len(jobs)
            while left:
                result = manager.get_result(timeout=1)
                if result is not None and result.error:
                    sys.exit(f"generate_batch failed: {result.error}")
                left -= result is not None and result.is_finished()
                if left and not manager.is_running():
                    sys.exit("generate_batch ended before its work was done")

        generate([((0, 0), 2)])
        started = clock(model.device.type)
        generate([(job, length) for job, length in lengths.items() if job[0] < flags.mu])
        return {"generate": clock(model.device.type) - started}, {}


def first_step(device):
    """Seconds from the loaded demo model to the record of the first step: the start prompt's score and one step."""
    task = get_task("demo")
    engine = load_engine(str(ROOT / "demo" / "model"), device)
    data = split_rows(task)["train"]
    started = clock(engine.device.type)
    settings = SearchSettings(**{n: v for n, v in task.defaults.items() if n in vars(SearchSettings())})
    rows = [encode_row(engine.tokenizer, task, row) for row in data[: settings.train_rows]]
    prompt = encode_prompt(engine.tokenizer, task, data[0]["question"], task.initial_prompt)[1]
    steps = core.optimize(engine, rows, prompt, settings)
    next(steps), next(steps)
    return clock(engine.device.type) - started


def measure_hardware(model, flags):
    """(bytes per second, floating-point operations per second), measured on this machine now."""
    device, dtype = model.device.type, model.dtype
    hidden, intermediate = SHAPES[flags.shape][:2]
    source = torch.empty(2**28 // dtype.itemsize, dtype=dtype, device=device).fill_(1)
    weight = torch.randn(intermediate, hidden, dtype=dtype, device=device)
    inputs = torch.randn(2048, hidden, dtype=dtype, device=device)

    def best(function, work, tries=5):
        rates = []
        for _ in range(tries):
            started = clock(device)
            for _ in range(3):
                function()
            rates.append(3 * work / (clock(device) - started))
        return max(rates)

    bandwidth = best(lambda: source.sum(), source.numel() * dtype.itemsize)  # decoding reads weights, it does not write
    rate = best(lambda: torch.nn.functional.linear(inputs, weight), 2 * 2048 * hidden * intermediate)
    return bandwidth, rate


def floor(model, flags, bandwidth, rate):
    """(seconds of the step's floor, of its decoding alone): weights once per pass and decoding step, keys and values
    once per row and token; 2 operations per weight and token forward, as many backward to the inputs."""
    rows, _, position, _, lengths = problem(flags, model)
    embedding = model.get_input_embeddings().weight.numel()
    body = sum(p.numel() for p in model.parameters()) - embedding * (1 if SHAPES[flags.shape][6] else 2)
    size = model.dtype.itemsize
    config = model.config
    kv = 2 * config.num_hidden_layers * config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
    jobs = [
        (len(rows[i].question) + flags.prompt + TURN_END, length, i)
        for (n, i), length in lengths.items()
        if n < flags.mu
    ]
    behind = flags.prompt - position + TURN_END
    gradient_tokens = sum(behind + lengths[flags.mu, i] + EXTRACTOR + ANSWER for i in range(len(rows)))
    read_tokens = sum(behind + EXTRACTOR + ANSWER for _ in jobs)

    def stage(tokens, passes, kv_tokens=0, factor=2):
        return max((passes * body + kv_tokens * kv) * size / bandwidth, factor * body * tokens / rate)

    longest = max(length for _, length, _ in jobs)
    decoding = 0.0
    for t in range(longest):  # one decoding step over the rows that are still going
        going = [context + t for context, length, _ in jobs if length > t]
        tokens = len(going)
        moved = (body + embedding + sum(going) * kv) * size / bandwidth
        decoding += max(moved, 2 * (body + embedding) * tokens / rate)
    return stage(len(rows), 1) + stage(gradient_tokens, 2, factor=4) + stage(read_tokens, 2) + decoding, decoding


def peak_memory(device):
    """MiB: of the GPU's tensors, or the largest resident size of this process (libraries included)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(flags):
    model = make_model(flags.shape, flags.device)
    step = {"ours": our_step, "plain": plain_step, "generate_batch": generate_batch_step}[flags.variant]
    if flags.profile:
        with profile(activities=[getattr(ProfilerActivity, flags.device.upper())]) as found:
            step(model, flags)
        table = found.key_averages().table(sort_by=f"self_{flags.device}_time_total", row_limit=25)
        return {"profile": table, "attention": attention_share(found.key_averages(), flags.device)}
    if flags.device == "cuda":
        step(model, flags)  # compiles and caches kernels
        torch.cuda.reset_peak_memory_stats()
    runs = [step(model, flags) for _ in range(flags.repeats)]
    stages, counts = min(runs, key=lambda run: sum(run[0].values()))
    record = {
        name: getattr(flags, name) for name in "variant shape rows question prompt reasoning mu candidates".split()
    }
    record |= {
        "stages": stages,
        "seconds": sum(stages.values()),
        "peak_mib": peak_memory(flags.device),
        "tokens": counts,
    }
    if flags.variant == "ours":
        bandwidth, rate = measure_hardware(model, flags)
        floor_seconds, decoding = floor(model, flags, bandwidth, rate)
        record |= {
            "floor": floor_seconds,
            "decoding_floor": decoding,
            "gb_per_s": bandwidth / 1e9,
            "gflops": rate / 1e9,
        }
        generated = sum(length for (n, _), length in problem(flags, model)[4].items() if n < flags.mu)
        record["tokens_per_s"] = generated / stages["select"]
        if flags.shape == "demo":
            record["first_step"] = first_step(flags.device)
    return record


def attention_share(operations, device):
    """The share of attention in the profiled time: its products and softmax, and copies of keys and values (with a few
    other copies)."""
    times = {op.key: op.self_device_time_total if device == "cuda" else op.self_cpu_time_total for op in operations}
    names = "aten::bmm", "aten::_scaled_dot_product", "aten::_softmax", "aten::cat", "aten::index", "aten::copy_"
    return sum(time for key, time in times.items() if key.startswith(names)) / sum(times.values())


def run_apart(flags, **changes):
    """The record of a measurement in a process of its own, so that peak memory is its own."""
    values = {**vars(flags), **changes}
    names = (
        "variant shape rows question prompt reasoning mu candidates seed batch_size gradient_batch_size repeats device"
    ).split()
    command = [sys.executable, __file__, "--child", *(["--profile"] if values["profile"] else [])]
    for name in names:
        command += [f"--{name.replace('_', '-')}", str(values[name])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {' '.join(command)}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def report(record):
    stages = "  ".join(f"{name} {seconds:.2f}" for name, seconds in record["stages"].items())
    print(
        f"{record['variant']:6s} {record['seconds']:8.2f} s  ({stages})  peak {record['peak_mib']:.0f} MiB", flush=True
    )


SWEEPS = {
    "rows": [4, 8, 16, 32],
    "question": [50, 100, 200, 400],
    "prompt": [8, 16, 32, 64],
    "reasoning": [32, 64, 128, 256],
    "candidates": [8, 16, 64, 256],
    "mu": [1, 2, 3, 6],
}


def draw(records, name, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    xs = [record[name] for record in records]
    bottom = [0.0] * len(records)
    for stage in records[0]["stages"]:
        heights = [record["stages"][stage] for record in records]
        axes.bar([str(x) for x in xs], heights, bottom=bottom, label=stage)
        bottom = [a + b for a, b in zip(bottom, heights)]
    totals = [record["seconds"] * (1 - record["attention"]) for record in records]
    axes.plot([str(x) for x in xs], totals, "k.:", label="without attention")
    axes.plot([str(x) for x in xs], [record["floor"] for record in records], "k_", markersize=30, label="floor")
    axes.set(xlabel=name, ylabel="seconds a step", title=f"{records[0]['shape']}, {records[0]['rows']} rows")
    axes.legend()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="110m")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--question", type=int, default=0, help="tokens of every question; 0: drawn")
    parser.add_argument("--prompt", type=int, default=16, help="tokens of the prompt; its middle one is searched")
    parser.add_argument("--reasoning", type=int, default=0, help="tokens of every reasoning; 0: drawn")
    parser.add_argument("--mu", type=int, default=3)
    parser.add_argument("--candidates", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=0, help="0: as many rows as fit")
    parser.add_argument("--gradient-batch-size", type=int, default=0, help="0: by the model's size")
    parser.add_argument("--repeats", type=int, default=1, help="the fastest of so many steps counts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--variant", choices=("both", "ours", "plain", "generate_batch"), default="both")
    parser.add_argument("--sweep", choices=SWEEPS, help="vary one size")
    parser.add_argument("--profile", action="store_true", help="print the profiler's table of one of our steps")
    parser.add_argument("--out", type=Path, default=Path("runs/step_cost"))
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.child:
        print(json.dumps(measure(flags)))
        return
    if flags.profile:
        found = run_apart(flags, variant="ours")
        print(f"{found['profile']}\nattention, with copies: {100 * found['attention']:.0f} %")
        return
    flags.out.mkdir(parents=True, exist_ok=True)
    records = []
    variants = {"both": ("ours", "plain"), "generate_batch": ("ours", "generate_batch")}.get(
        flags.variant, (flags.variant,)
    )
    variants = variants[:1] if flags.sweep else variants
    for value in SWEEPS[flags.sweep] if flags.sweep else [None]:
        for variant in variants:
            record = run_apart(flags, variant=variant, **({flags.sweep: value} if flags.sweep else {}))
            records.append(record)
            if flags.sweep:
                shape = {flags.sweep: value}
                record["attention"] = run_apart(flags, variant=variant, profile=True, **shape)["attention"]
                print(f"{flags.sweep} {value:4d}, attention {100 * record['attention']:.0f} %: ", end="")
            report(record)
            with open(flags.out / "step_cost.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
    ours = records[0]
    if ours["variant"] != "ours":
        return
    share = 100 * ours["floor"] / ours["seconds"]
    print(f"measured {ours['gflops']:.0f} GFLOP/s and {ours['gb_per_s']:.1f} GB/s; {ours['tokens_per_s']:.0f} tokens/s")
    print(f"floor {ours['floor']:.2f} s: the step runs at {share:.0f} % of what the hardware allows")
    if flags.variant == "both" and not flags.sweep:
        print(f"{records[1]['seconds'] / ours['seconds']:.1f} times as fast as the plain implementation")
    if flags.variant == "generate_batch":
        ratio = records[1]["stages"]["generate"] / ours["stages"]["select"]
        print(f"our selection, which also scores, takes 1 part of time where generate_batch takes {ratio:.2f}")
    if "first_step" in ours:
        print(f"demo: {ours['first_step']:.2f} s from the loaded model to the first step's record")
    if flags.sweep:
        draw(records, flags.sweep, flags.out / f"{flags.sweep}.png")
    print(f"105 such steps: {105 * ours['seconds'] / 60:.1f} minutes  -> {flags.out}")


if __name__ == "__main__":
    main()
