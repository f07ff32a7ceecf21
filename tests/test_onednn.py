"""oneDNN's products are the products of the plain layers, and so are their gradients."""

import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, tiny_engine

from support import engine as engine_file
from support.onednn import OneDnnLinear, OneDnnProduct, use_onednn

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or platform.machine() not in ("x86_64", "AMD64"),
    reason="oneDNN is used on x86 processors only",
)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_engine_s_products_in_onednn_are_the_same_and_have_the_same_gradient(demo_tokenizer, family, monkeypatch):
    model = tiny_engine(family, demo_tokenizer, torch.float32).model
    monkeypatch.setattr(engine_file, "use_onednn", lambda model: None)
    plain = tiny_engine(family, demo_tokenizer, torch.float32).model
    products = [layer for layer in model.modules() if type(layer) is OneDnnLinear]
    assert len(products) == sum(type(layer) is torch.nn.Linear for layer in plain.modules()) == 2 * 7 + 1
    tied = plain.get_output_embeddings().weight is plain.get_input_embeddings().weight  # whose rows are looked up
    assert sum(layer.weight.is_mkldnn for layer in products) == 2 * 7 + (not tied)
    for count in (1, 3, 40):
        embeddings = torch.randn(count, 5, 32, requires_grad=True)
        found, expected = (m(inputs_embeds=embeddings).logits for m in (model, plain))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        gradients = [torch.autograd.grad(logits.square().sum(), embeddings)[0] for logits in (found, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-3)


def test_a_product_with_a_bias_has_the_layer_s_value_and_gradient():
    layer, inputs = torch.nn.Linear(6, 4), torch.randn(2, 6, requires_grad=True)
    expected = layer(inputs)
    found = OneDnnProduct.apply(inputs, layer.weight.detach(), layer.bias.detach())
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(v.sum(), inputs)[0] for v in (found, expected)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_in_another_precision_keeps_its_layers(demo_tokenizer, dtype, monkeypatch):
    model = tiny_engine("llama", demo_tokenizer, dtype).model
    assert not any(type(layer) is OneDnnLinear for layer in model.modules())
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    plain = tiny_engine("llama", demo_tokenizer, torch.float32).model
    use_onednn(plain)
    assert not any(type(layer) is OneDnnLinear for layer in plain.modules())


def resident():
    """Bytes that this process holds in memory of its own."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="how much memory is held is read from Linux")
def test_the_weights_are_held_once():
    torch.empty(2**22).fill_(0)  # of 16 MiB: once it is freed, glibc takes smaller tensors from its own heaps
    with ThreadPoolExecutor(4) as threads:  # as transformers loads them
        products = list(threads.map(lambda _: torch.nn.Linear(1024, 1024, bias=False), range(32)))  # 4 MiB each
    layers = torch.nn.Sequential(*products)
    del products
    layers.get_input_embeddings = lambda: torch.nn.Embedding(1, 1)
    before = resident()
    use_onednn(layers)
    assert all(layer.weight.is_mkldnn for layer in layers) and resident() - before < 32 * 2**20
