"""Linear layers in oneDNN, with the weights in its own order: for float32 models on x86 CPUs.

Decoding multiplies few rows by large matrices. PyTorch's own way, MKL, is slow there; oneDNN, which PyTorch brings
along, takes about half the time (benchmarks/README.md). The operators are PyTorch's own but private; where a version
of PyTorch lacks them nothing is changed.
"""

import ctypes
import os
import platform

import torch

OPERATORS = ("_linear_pointwise", "_reorder_linear_weight")


def use_onednn(model):
    """Give the model's linear layers oneDNN's product, in place, where that is possible."""
    usable = platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()
    if not usable or not all(hasattr(torch.ops.mkldnn, name) for name in OPERATORS):
        return
    embedding = model.get_input_embeddings().weight
    for layer in model.modules():
        if type(layer) is torch.nn.Linear and layer.weight.dtype == torch.float32 and layer.weight.device.type == "cpu":
            layer.__class__ = OneDnnLinear
            if layer.weight is not embedding:  # whose rows are looked up
                ordered = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
                layer.weight = torch.nn.Parameter(ordered, requires_grad=False)
                return_freed_memory()


def return_freed_memory():
    """Give the system what was freed. glibc keeps it for later tensors, which are smaller: the weights in their first
    order would stay beside those in oneDNN's."""
    if os.name == "posix":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have no such function, nor need one
        if trim:
            trim(0)


class OneDnnLinear(torch.nn.Linear):
    def forward(self, inputs):
        if not inputs.requires_grad:
            return product_of(inputs, self.weight, self.bias)
        rows = inputs.flatten(0, -2)  # of two dimensions the product is no view, so a model may change it in place
        return OneDnnProduct.apply(rows, self.weight, self.bias).unflatten(0, inputs.shape[:-1])


def product_of(inputs, weight, bias=None):
    """F.linear, by an operator that PyTorch has for its compiler, without a derivative."""
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")


class OneDnnProduct(torch.autograd.Function):
    """The same with its derivative with respect to the inputs; the weights are frozen."""

    @staticmethod
    def forward(ctx, inputs, weight, bias):
        ctx.weight = weight
        return product_of(inputs, weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        # oneDNN's order serves one direction; a copy in the usual order costs little beside the product.
        weight = ctx.weight.to_dense() if ctx.weight.is_mkldnn else ctx.weight
        return product_of(gradient.contiguous(), weight.t()), None, None
