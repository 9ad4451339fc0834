"""Faster training steps with the same weights and, up to rounding, the same results.

    attention     written out, where that is faster (attention.py)
    activation    gelu_new as a logistic function
    compilation   torch.compile of one layer, whose code all layers share; only for training

A backbone keeps its modules, weight names and config, so that it is saved as usual. It generates and
validates uncompiled. Knows nothing of batches and of Lightning.
"""

import logging
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from transformers import PreTrainedModel as Backbone
from transformers.activations import NewGELUActivation
from transformers.modeling_layers import GradientCheckpointingLayer

from full_stack_transformer.modelling.attention import use_written_out_attention

logger = logging.getLogger(__name__)

# Compiling takes 36 seconds of processor time, two thirds more when lengths vary, and saves a tenth to a
# sixth of each step: it pays from about ten minutes of training on. In FLOPs those of two cores in bf16,
# 250 GFLOP/s, and one minute of a large GPU. In fp32 on AVX2 it saves 7 % of forward and backward (the preset
# mini, one core: 0.448 against 0.483 s) for the same time to compile, and a step has fewer FLOPs a second.
_MIN_FLOPS = {"cpu": 1.5e14, "cuda": 6e15}
_MIN_MINUTES = 10.0
# Of 2 u in GELU's tanh form: a x + b x^3.
_SLOPE = 2.0 * math.sqrt(2.0 / math.pi)
_CUBIC = 0.044715 * _SLOPE


def accelerate(backbone: Backbone) -> None:
    """Replace parts of a backbone by faster ones that compute the same."""
    use_written_out_attention(backbone)
    for module in list(backbone.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, LogisticGelu())


class LogisticGelu(nn.Module):
    """GELU in its tanh form, gelu_new: 0.5 x (1 + tanh(u)) = x sigmoid(2 u), equal to 5e-7.

    Hendrycks and Gimpel 2016 (arXiv 1606.08415), section 2. Compiled for a processor a sigmoid is faster
    than a tanh: 11 against 25 ms forward and backward for 4,096 x 1,536 numbers on one core, 4 % of a
    step. Uncompiled, in fp32, `_LogisticGeluFunction` takes 15 ms on AVX2 and 14 on AVX-512, torch's kernel
    30 and 17, written out 31 and 37; in bf16 torch's kernel is the fastest.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        """GELU of numbers of any shape."""
        if torch.compiler.is_compiling():
            return inputs * torch.sigmoid(inputs * (_SLOPE + _CUBIC * inputs * inputs))
        if inputs.dtype == torch.float32 and inputs.device.type == "cpu":
            result: Tensor = _LogisticGeluFunction.apply(inputs)  # type: ignore[no-untyped-call]
            return result
        return nn.functional.gelu(inputs, approximate="tanh")


class _LogisticGeluFunction(torch.autograd.Function):
    """x s with s = sigmoid(x (a + b x^2)), in few passes over memory."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        slope = inputs.new_full((), _SLOPE)
        part = torch.addcmul(slope, inputs, inputs, value=_CUBIC).mul_(inputs).sigmoid_()
        ctx.save_for_backward(inputs, part)
        return inputs * part

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """g (s + s (1 - s) x (a + 3 b x^2))."""
        inputs, part = ctx.saved_tensors
        slope = inputs.new_full((), _SLOPE)
        change = torch.addcmul(slope, inputs, inputs, value=3 * _CUBIC).mul_(inputs)
        change.addcmul_(change, part, value=-1.0)
        return torch.addcmul(part, part, change).mul_(gradient)


def flops_per_token(backbone: Backbone, num_context_tokens: int) -> float:
    """FLOPs of the forward and backward pass for one token, by PaLM's count: 6 N + 12 L H Q T.

    N counts the weights of matrices that multiply activations: all but embedding tables, and the output head
    even if it is tied to a table. L layers, H heads, Q width of a head, T tokens of context: attention counts
    in full, though half of it is masked, and recomputation does not count.

    Args:
        backbone: a decoder with `num_hidden_layers`, `num_attention_heads` and `hidden_size` in its config.
        num_context_tokens: T, tokens that a token may attend to; for packed rows the length of a document.
    """
    config = backbone.config
    num_weights = sum(matrix.numel() for matrix in backbone.parameters() if matrix.ndim > 1)
    tables = {
        id(module.weight): module.weight.numel()
        for module in backbone.modules()
        if isinstance(module, nn.Embedding)
    }
    head = backbone.get_output_embeddings()
    tied = tables.get(id(head.weight), 0) if head is not None else 0
    head_width = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    attention_width = config.num_attention_heads * head_width
    attention = 12 * config.num_hidden_layers * attention_width * num_context_tokens
    return float(6 * (num_weights - sum(tables.values()) + tied) + attention)


def pays_to_compile(device: torch.device, *, flops: float, minutes: float | None) -> bool:
    """Whether a training is long enough to save the time that compiling takes.

    Estimated, not measured: a resumed training must decide as before, or its results would be rounded
    differently.

    Args:
        device: where it runs.
        flops: of the whole training, by `flops_per_token`; infinite without a limit.
        minutes: time limit of the training, if there is one.
    """
    if device.type not in _MIN_FLOPS:
        return False
    return flops >= _MIN_FLOPS[device.type] and (minutes or math.inf) >= _MIN_MINUTES


def compile_layers(backbone: Backbone, *, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile the layers of a backbone in its first training step; log the reason if that fails.

    All layers share the code of one: as fast as compiling the whole model (2.29 and 2.33 s a step for
    6 x 384 on one core), but the time to compile does not grow with the depth. A batch of another length
    makes it compile once more, for any length.

    Args:
        backbone: its layers are those of transformers that support gradient checkpointing.
        backend: of torch.compile.
    """
    # torch's compiler reads the gradient of each input, and warns if there is none.
    warnings.filterwarnings("ignore", ".*grad attribute of a Tensor that is not a leaf Tensor.*")
    shared = _SharedCompilation(backend)
    for layer in backbone.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            # Not `layer.compile()`: it would compile validation and generation too.
            layer.forward = _TrainingForward(layer, shared)


class _SharedCompilation:
    """The compiled code of the layers of a backbone, by class; unused after a failure."""

    def __init__(self, backend: str | Callable[..., Any]) -> None:
        self._backend = backend
        self._functions: dict[type, Callable[..., Any]] = {}
        self.has_failed = False

    def function_of(self, layer: nn.Module) -> Callable[..., Any]:
        cls = type(layer)
        if cls not in self._functions:
            self._functions[cls] = torch.compile(cls.forward, backend=self._backend)
        return self._functions[cls]


def _is_of_compiler(error: Exception) -> bool:
    """Whether compiling failed, and not the computation.

    OSError: no space for the compiled code. Triton, which compiles for GPUs at the first call, needs a C
    compiler for its launcher and raises a RuntimeError without one.
    """
    if isinstance(error, TorchDynamoException | OSError):
        return True
    return "compiler" in str(error).lower()


class _TrainingForward:
    """A layer's `forward`: compiled if gradients are needed, else plain."""

    def __init__(self, layer: nn.Module, shared: _SharedCompilation) -> None:
        self._layer = layer
        self._shared = shared

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        layer, shared = self._layer, self._shared
        if layer.training and torch.is_grad_enabled() and not shared.has_failed:
            try:
                return shared.function_of(layer)(layer, *arguments, **options)
            except (TorchDynamoException, OSError, RuntimeError) as error:
                if not _is_of_compiler(error):
                    raise
                shared.has_failed = True
                # The first line says which part of torch failed, the second one why.
                reason = " ".join(str(error).strip().splitlines()[:2])
                logger.warning(
                    "compiling failed; training continues uncompiled, at about 0.8 of the speed: %s",
                    reason,
                )
        return type(layer).forward(layer, *arguments, **options)
