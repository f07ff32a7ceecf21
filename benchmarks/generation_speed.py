"""How fast real models read questions and generate: ours, transformers' `generate`, and the machine's floor.

    python benchmarks/generation_speed.py --models HuggingFaceTB/SmolLM2-135M-Instruct
    python benchmarks/generation_speed.py --models FOLDER FOLDER --source DIR   # local models and rows
    python benchmarks/generation_speed.py --models FOLDER --device cuda --dtype bfloat16 --rows 256

Both get the same questions of the task, chat template and initial prompt included, as one batch, and generate greedily,
in float32 on the CPU if nothing else is said. They take turns, so that other work on the machine slows both, and the
medians are printed. Memory is that of a process of its own that loads the model and generates once, without
transformers' model: resident, or on a GPU what PyTorch allocated there.

The floor counts the products of the linear layers and nothing else: 2 operations per weight and token. Questions are
read without padding, and only their last token meets the output embedding. A decoding step takes the longer of its
operations and of reading all weights from memory once. Both rates are measured between the repetitions: operations
with 2048 x 2048 matrices in the faster of PyTorch's and oneDNN's product, memory by a sum over 256 MiB; on a GPU 8192 x
8192 and 4 GiB.

Beside other work wall-clock seconds are those of whoever got the cores, and a short measurement of a rate meets idle
moments that a long one does not. --one-thread computes on one thread and counts the seconds that it had a core.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from support.settings import calm_threads

calm_threads()  # before torch is imported, as the scripts do
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from support.engine import load_engine, pad
from support.files import short_name
from support.onednn import use_onednn
from support.sources import split_rows
from support.tasks import get_task
from support.tokens import encode_chat

MIB = 2**20


class Rates(NamedTuple):
    """What the machine does in a second."""

    operations: float
    bytes: float


def seconds(function, *arguments):
    """(what the function returns, the seconds it took: on a core if there is one thread, else by the wall clock)"""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else int  # int() does nothing
    wait()
    started = clock()
    result = function(*arguments)
    wait()
    return result, clock() - started


def questions(engine, flags):
    """The token ids of each row: question and initial prompt in the model's chat template."""
    task = get_task(flags.task)
    rows = split_rows(task, flags.source)["test"][: flags.rows]
    return [encode_chat(engine.tokenizer, task, row["question"], task.initial_prompt) for row in rows]


@torch.inference_mode()
def generate(model, sequences, settings):
    """What transformers' own `generate` writes behind each sequence, end token and padding included."""
    ids, mask = pad(sequences, model.device, left=True)
    return model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)[:, ids.shape[1] :].tolist()


def before_end(ids, ends):
    """The ids before the first end token."""
    return ids[: next((n for n, token in enumerate(ids) if token in ends), len(ids))]


@torch.inference_mode()
def measured_rates(like):
    """The rates now of the device that this model is on, in its dtype."""
    size, count, tries = (8192, 2**30, 3) if like.device.type == "cuda" else (2048, 2**26, 3)
    there = {"device": like.device, "dtype": like.dtype}
    layers = torch.nn.Sequential(*(torch.nn.Linear(size, size, bias=False, **there) for _ in range(2)))
    inputs, source = torch.randn(size, size, **there), torch.ones(count, device=like.device)
    products = [min(seconds(layers[0], inputs)[1] for _ in range(tries))]
    layers.get_input_embeddings = lambda: torch.nn.Embedding(1, 1)
    use_onednn(layers)
    products.append(min(seconds(layers[1], inputs)[1] for _ in range(tries)))
    reading = min(seconds(source.sum)[1] for _ in range(tries))
    return Rates(2 * size**3 / min(products), source.nbytes / reading)


def floor_seconds(model, sequences, lengths, rates):
    """Seconds that the linear layers' products take at these rates. lengths: tokens that each row generates."""
    weights = sum(layer.in_features * layer.out_features for layer in model.modules() if is_linear(layer))
    head = model.get_output_embeddings()
    body = weights - head.in_features * head.out_features
    tokens = sum(map(len, sequences))
    reading = 2 * (body * tokens + (weights - body) * len(sequences)) / rates.operations
    moved = model.dtype.itemsize * weights / rates.bytes
    decoding = 0.0
    for step in range(1, max(lengths)):  # the first token follows from reading, the last one is not read
        going = sum(length > step for length in lengths)
        decoding += max(2 * weights * going / rates.operations, moved)
    return reading + decoding


def is_linear(layer):
    return isinstance(layer, torch.nn.Linear)


def resident(field):
    """MiB that this process holds ("VmRSS") or held at most ("VmHWM"), from Linux."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def forget_peak():
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def measure_memory(name, flags):
    """MiB of the weights, and resident: before loading, loaded, and the peaks of loading and of generating."""
    found = {"libraries": resident("VmRSS")}
    forget_peak()
    engine = load_engine(name, flags.device, flags.dtype)
    found["weights"] = sum(w.numel() * w.dtype.itemsize for w in engine.model.parameters()) / MIB
    found |= {"loaded": resident("VmRSS"), "loading": resident("VmHWM")}
    sequences = questions(engine, flags)
    forget_peak()
    engine.complete(sequences, flags.max_new_tokens)
    if engine.device.type == "cuda":
        return found | {"gpu": torch.cuda.max_memory_allocated() / MIB}
    return found | {"generating": resident("VmHWM")}


def measure_speed(name, flags):
    """Medians over the repetitions, after one that is not counted."""
    engine = load_engine(name, flags.device, flags.dtype)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=engine.model.dtype, use_safetensors=True).eval()
    model.to(engine.device)
    settings = GenerationConfig(
        max_new_tokens=flags.max_new_tokens,
        do_sample=False,
        eos_token_id=engine.end_ids,
        pad_token_id=engine.end_ids[0],
    )
    model.generation_config = settings  # the model's own may sample or punish repetition
    sequences = questions(engine, flags)
    runs = []
    for _ in range(flags.repeats + 1):
        ours, our_seconds = seconds(engine.complete, sequences, flags.max_new_tokens)
        theirs, their_seconds = seconds(generate, model, sequences, settings)
        lengths = [len(ids) + stopped for ids, stopped in ours]
        rates = measured_rates(engine.model)
        floor = floor_seconds(engine.model, sequences, lengths, rates)
        runs.append([our_seconds, their_seconds, floor, their_seconds / our_seconds, floor / our_seconds, *rates])
    names = ("ours", "generate", "floor", "times", "of_floor", "operations", "bytes")
    found = {name: statistics.median(values) for name, values in zip(names, zip(*runs[1:]))}
    same = sum(ids == before_end(row, engine.end_ids) for (ids, _), row in zip(ours, theirs))
    spread = [min(run[0] for run in runs[1:]), max(run[0] for run in runs[1:])]
    return found | {
        "same": same, "rows": len(ours), "read": sum(map(len, sequences)), "generated": sum(lengths), "spread": spread
    }  # fmt: skip


MEASURES = {"speed": measure_speed, "memory": measure_memory}


def run_apart(name, measure):
    """The record of one measurement in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--child", name, measure]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {' '.join(command)}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def report(name, speed, memory):
    """Lines for people."""
    per_second = speed["generated"] / speed["ours"]
    peaks = (
        f"peak on the GPU {memory['gpu']:.0f}"
        if "gpu" in memory
        else (
            f"resident {memory['libraries']:.0f} before loading, {memory['loaded']:.0f} loaded;"
            f" peaks {memory['loading']:.0f} loading, {memory['generating']:.0f} generating"
        )
    )
    return (
        f"{short_name(name)}: {speed['read']} tokens read, {speed['generated']} generated in {speed['rows']} rows\n"
        f"  ours      {speed['ours']:7.2f} s ({speed['spread'][0]:.2f} to {speed['spread'][1]:.2f})"
        f"  {per_second:.0f} generated tokens a second\n"
        f"  generate  {speed['generate']:7.2f} s  ours is {speed['times']:.2f} times as fast;"
        f" the same ids in {speed['same']} of {speed['rows']} rows\n"
        f"  floor     {speed['floor']:7.2f} s  ours is at {100 * speed['of_floor']:.0f} % of its speed"
        f" ({speed['operations'] / 1e9:.0f} GFLOP/s, {speed['bytes'] / 1e9:.0f} GB/s)\n"
        f"  memory    weights {memory['weights']:.0f} MiB; {peaks}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", required=True, help="names on the hub or folders")
    parser.add_argument("--task", default="gsm8k", help="whose test rows are read")
    parser.add_argument("--source", default="", help="folder with the task's files; without it they come from the hub")
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto", help="auto: float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--one-thread", action="store_true", help="count seconds of CPU: for a machine in use")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.child:
        torch.set_num_threads(1 if flags.one_thread else torch.get_num_threads())
        name, measure = flags.child
        print(json.dumps(MEASURES[measure](name, flags)))
        return
    for name in flags.models:
        print(report(name, run_apart(name, "speed"), run_apart(name, "memory")), flush=True)


if __name__ == "__main__":
    main()
