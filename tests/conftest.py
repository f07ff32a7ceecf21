"""Tiny models and tokenizers, made here: no network, no GPU, seconds.

Run all tests with `python -m pytest -n2 --dist loadfile`, or without the flags in one process.
"""

import importlib.util
import json
import os
import random
import signal
import sys
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import AutoModelForCausalLM as Auto
from transformers import AutoTokenizer, Gemma2Config, LlamaConfig, LlamaTokenizer, PreTrainedTokenizerFast, Qwen3Config
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from support import EXIT_CODES  # noqa: E402
from support.engine import Engine, load_engine  # noqa: E402
from support.settings import SearchSettings, TextSettings  # noqa: E402
from support.sources import split_rows  # noqa: E402
from support.tasks import Task, get_task  # noqa: E402
from support.tokens import choices_of, encode_prompt, encode_row  # noqa: E402


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; run with -m slow")


def pytest_collection_modifyitems(config, items):
    """Tests marked slow run only where they are asked for."""
    if "slow" not in config.getoption("markexpr"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="takes minutes: -m slow"))


torch.set_num_threads(1)  # tiny models run no faster on more, and two processes would wait for each other
FAMILIES = ("llama", "llama-tied", "gemma2", "qwen3")


def tiny_engine(family, tokenizer, dtype=torch.float64, seed=0):
    """The engine of a model with two layers of random weights, large enough that the logits differ. Gemma-2: scaled
    embeddings, both soft caps, scores in a scale of their own, and a sliding window of 8 tokens, shorter than every
    sequence here. Qwen-3: heads that are together wider than the hidden states."""
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16 if family == "qwen3" else 8,
        "initializer_range": 0.3,
        "max_position_embeddings": 512,
        "tie_word_embeddings": family in ("llama-tied", "qwen3"),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = {
        "llama": LlamaConfig,
        "llama-tied": LlamaConfig,
        "qwen3": Qwen3Config,
        "gemma2": lambda **s: Gemma2Config(
            **s, sliding_window=8, query_pre_attn_scalar=5, attn_logit_softcapping=5.0, final_logit_softcapping=4.0
        ),
    }[family](**sizes)
    torch.manual_seed(seed)
    return Engine(Auto.from_config(config, dtype=dtype), tokenizer)


class TorchInDouble:
    """torch, except that its float32 is float64."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.fixture(autouse=True)
def same_signals():
    """A stage that a test runs in this process ignores signals at its end, and so would processes begun later."""
    with kept_signals():
        yield


@contextmanager
def kept_signals():
    """The handlers of the signals that end a stage are afterwards what they were."""
    numbers = [getattr(signal, name) for name in EXIT_CODES if hasattr(signal, name)]
    handlers = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture
def double(monkeypatch):
    """Models compute norms and softmax in float32 whatever their dtype; here they do it in float64."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    for module in (modeling_llama, modeling_gemma2, modeling_qwen3):
        monkeypatch.setattr(module, "torch", TorchInDouble())


@pytest.fixture(params=FAMILIES)
def any_engine(request, demo_tokenizer, double):
    return tiny_engine(request.param, demo_tokenizer)


@pytest.fixture
def llama(demo_tokenizer, double):
    return tiny_engine("llama", demo_tokenizer)


@pytest.fixture(scope="session")
def demo_tokenizer(demo_engine):
    return demo_engine.tokenizer


@pytest.fixture(scope="session")
def demo_engine():
    return load_engine(str(ROOT / "demo" / "model"), "cpu", "float32")


@pytest.fixture(scope="session")
def demo_task():
    return get_task("demo")


@pytest.fixture(scope="session")
def demo_data(demo_task):
    return split_rows(demo_task)


def settings(**changes):
    small = {
        "steps": 3,
        "max_new_tokens": 12,
        "batch_size": 16,
        "gradient_batch_size": 4,
        "max_prompt_tokens": 12,
        "min_candidates": 4,
    }
    return SearchSettings(**(small | changes))


# Answers of one and of several tokens, some with a beginning in common, two that begin another.
ANSWERS = ((60,), (75, 61), (75, 61, 62), (75, 90), (60, 61, 63), (91,))


def with_choices(rows):
    """The rows with answers out of `ANSWERS`."""
    choices = choices_of(ANSWERS)
    return [replace(row, answer=list(ANSWERS[n % len(ANSWERS)]), choices=choices) for n, row in enumerate(rows)]


@pytest.fixture
def few_rows(demo_tokenizer, demo_task, demo_data):
    """Five rows of different length and their start prompt: (rows, prompt ids)."""
    data = sorted(random.Random(0).sample(demo_data["train"], 20), key=lambda r: len(r["question"]))[::4]
    rows = [encode_row(demo_tokenizer, demo_task, row) for row in data]
    assert len({len(row.question) for row in rows}) > 1
    ids = encode_prompt(demo_tokenizer, demo_task, data[0]["question"], demo_task.initial_prompt)[1]
    return rows, tuple(ids)


# --- Slow references -----------------------------------------------------------------------------------


def greedy_reference(engine, context, limit):
    """One token at a time, the whole sequence each time, no cache, no padding: (new ids, whether they ended)."""
    ids = list(context)
    for _ in range(limit):
        token = engine.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item()
        if token in engine.end_ids:
            return ids[len(context) :], True
        ids.append(token)
    return ids[len(context) :], False


def plain_logits(model, ids):
    """Logits [S, V] of a whole sequence in one pass."""
    return model(input_ids=torch.tensor([ids])).logits[0]


def slow_log_probs(logits_of, context, answers):
    """Log-probability [M] of each answer behind a context, each in a pass of its own, logits_of(ids) -> [S, V]; one
    that begins another counts only where the other does not follow."""
    whole = []
    for answer in answers:
        log_probs = logits_of([*context, *answer]).log_softmax(-1)
        whole.append(sum(log_probs[len(context) - 1 + n, token] for n, token in enumerate(answer)))
    exact = []
    for n, answer in enumerate(answers):
        longer = [m for m, other in enumerate(answers) if m != n and other[: len(answer)] == answer]
        direct = [m for m in longer if not any(k != m and answers[m][: len(answers[k])] == answers[k] for k in longer)]
        exact.append((whole[n].exp() - sum(whole[m].exp() for m in direct)).log() if direct else whole[n])
    return torch.stack(exact)


def slow_losses(model, row, prompt, reasoning, temperature):
    """(cross-entropy, wrong, nll) of one row, unpadded, all logits, plain indexing."""
    if row.choices:
        ids = row.question + list(prompt) + row.turn_end + reasoning + row.extractor
        log_probs = slow_log_probs(lambda ids: plain_logits(model, ids), ids, row.choices.answers)
        gold = row.choices.answers.index(tuple(row.answer))
        _, _, nll = slow_losses(model, replace(row, choices=None), prompt, reasoning, temperature)
        loss = F.cross_entropy(log_probs[None] / temperature, torch.tensor([gold]))
        return loss.item(), log_probs.argmax().item() != gold, nll
    ids = row.question + list(prompt) + row.turn_end + reasoning + row.extractor + row.answer
    logits = plain_logits(model, ids)
    start, end = len(row.question), len(ids) - len(row.answer)
    answers = torch.tensor(row.answer)
    cross_entropy = F.cross_entropy(logits[end - 1 : -1] / temperature, answers)
    wrong = bool((logits[end - 1 : -1].argmax(-1) != answers).any())
    nll = F.cross_entropy(logits[start - 1 : start - 1 + len(prompt)], torch.tensor(prompt))
    return cross_entropy.item(), wrong, nll.item()


def constant_engine(tokenizer, logits):
    """A model whose logits are the same everywhere."""
    model = tiny_engine("llama", tokenizer).model
    model.lm_head = torch.nn.Linear(model.config.hidden_size, len(logits), dtype=torch.float64)
    torch.nn.init.zeros_(model.lm_head.weight)
    model.lm_head.bias.data = torch.tensor(logits, dtype=torch.float64)
    return Engine(model, tokenizer)


# --- Real kinds of subword tokenizers ------------------------------------------------------------------

CORPUS = [
    "Use proper logical reasoning and think step by step. Finally give the actual correct answer.",
    "Therefore, the final answer, written as a dollar sign followed by one of A, B, C or D, is $ A",
    "Therefore, the final answer, written as a dollar sign followed by an integer without commas, is $8",
    "Is the argument valid or invalid? True or False? Yes or No, yes or no: 3 + 14 = 17, useful users use it.",
    "it is A or B or C or D or E or F or G or H or I or J or K or L or M or N or O or P or Q or R ( [ { < > } ] ) .",
    "Sort the following words: barn damp delmarva yes no Yes No True False valid invalid",
    "If you follow these instructions, do you return to the starting point?\nOptions:\n- Yes\n- No",
]
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_CHAT = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA_CHAT = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def llama3_like():
    """Byte-level BPE with Llama-3's splitting and special tokens."""
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    backend = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special, initial_alphabet=alphabet)
    backend.train_from_iterator(CORPUS * 3, trainer)
    return wrap(backend, LLAMA3_CHAT, "<|begin_of_text|>", "<|eot_id|>", special)


def gemma_like():
    """SentencePiece-style BPE: a marker for spaces, none at the start of a text, bytes as the last resort."""
    from tokenizers import normalizers

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    byte_tokens = [f"<0x{b:02X}>" for b in range(256)]
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    # Gemma's merges do not cross words; training on single marked words gives such merges.
    words = [f"▁{word}" for text in CORPUS * 3 for word in text.split(" ")]
    backend.train_from_iterator(words, trainers.BpeTrainer(vocab_size=1000, special_tokens=special + byte_tokens))
    return wrap(backend, GEMMA_CHAT, "<bos>", "<end_of_turn>", special)


LLAMA2_CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] | trim }} [/INST]"
    "{% else %} {{ m['content'] | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)


def llama2_like():
    """transformers' own LlamaTokenizer, with Llama-2's way of marking a turn by words that are no control tokens."""
    special = ["<unk>", "<s>", "</s>"]
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    words = [f"▁{word}" for text in [*CORPUS, "[INST] [/INST]"] * 3 for word in text.split(" ")]
    byte_tokens = [f"<0x{b:02X}>" for b in range(256)]
    backend.train_from_iterator(words, trainers.BpeTrainer(vocab_size=1000, special_tokens=special + byte_tokens))
    model = json.loads(backend.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return LlamaTokenizer(vocab=model["vocab"], merges=merges, chat_template=LLAMA2_CHAT)


def wrap(backend, template, bos, eos, special):
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=template,
        bos_token=bos,
        eos_token=eos,
        pad_token=special[0],
        additional_special_tokens=special,
    )


# Folders of real tokenizers, separated by ":", to run the same tests on: GREATER_TOKENIZERS=a/smollm2:b/qwen3 pytest
REAL_TOKENIZERS = [folder for folder in os.environ.get("GREATER_TOKENIZERS", "").split(os.pathsep) if folder]


@pytest.fixture(scope="session", params=["llama3", "gemma", "llama2", *REAL_TOKENIZERS])
def subword_tokenizer(request):
    own = {"llama3": llama3_like, "gemma": gemma_like, "llama2": llama2_like}
    return own[request.param]() if request.param in own else AutoTokenizer.from_pretrained(request.param)


def own_task(kind="number", extractor="The answer is $", choices=(), **more):
    return Task("own", kind, extractor, tuple(choices), **more)


@pytest.fixture(scope="session")
def demo_server():
    """The URL of the optimizer in the demo's language."""
    spec = importlib.util.spec_from_file_location("demo_optimizer", ROOT / "demo" / "optimizer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with module.serving() as url:
        yield url


# --- Text optimizers ---------------------------------------------------------------------------------------


@dataclass
class TextFlags(SearchSettings, TextSettings):
    """The settings of stage 2, as far as the text methods have them."""


def text_settings(method, **changes):
    """The settings of a text method, those that are not given resolved."""
    chosen = TextFlags(**({"method": method, "max_new_tokens": 40, "batch_size": 200} | changes))
    chosen.resolve()
    return chosen
