"""A decoder of transformers as OpenVINO GenAI reads it: an IR that keeps keys and values itself.

    forward(ids, mask, positions, past) of PyTorch ──trace──> IR ──past becomes state──> IR ──> int8

What optimum-intel does for a hundred architectures and an older transformers is done here for two.
GenAI's continuous batching then puts its paged attention in place of the traced one. It insists on a
tokenizer; the one written beside the model is never asked. Knows nothing of clocks.
"""

import importlib
from pathlib import Path
from typing import Any

import numpy as np

_MASKED = -65504.0
_INT4_GROUP_SIZE = 64


def write(backbone: Any, out: Path, *, weights: str) -> None:
    """IR, tokenizer and detokenizer in the directory `out`.

    Args:
        backbone: GPT-2 or Llama of transformers.
        out: an empty directory.
        weights: float32, int8 for a scale for each output of a linear layer, or int4 for one for each
            group of inputs.
    """
    openvino = importlib.import_module("openvino")
    model = _convert(backbone)
    _keep_state(model, backbone.config)
    if weights != "float32":
        model = _quantize(model, weights)
    openvino.save_model(model, out / "openvino_model.xml", compress_to_fp16=False)
    _write_tokenizer(out)


def _convert(backbone: Any) -> Any:
    """Inputs: ids, mask, positions, keys and values so far; outputs: logits, keys and values after."""
    torch = importlib.import_module("torch")
    cache_class = importlib.import_module("transformers").DynamicCache
    config = backbone.config
    num_heads, head_size = _heads(config)

    class Step(torch.nn.Module):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.backbone = backbone

        def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, past: Any) -> Any:
            cache = cache_class(config=config)
            for layer, (keys, values) in zip(cache.layers, past, strict=True):
                layer.keys, layer.values, layer.is_initialized = keys, values, True
                layer.dtype, layer.device = keys.dtype, keys.device
            # The mask of transformers cannot be traced; one of four dimensions is taken as it is.
            is_future = torch.arange(attention_mask.shape[1]) > position_ids[:, :, None]
            mask = torch.zeros_like(is_future, dtype=torch.float32).masked_fill(is_future, _MASKED)
            output = self.backbone(
                input_ids=input_ids,
                attention_mask=mask[:, None],
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
            )
            states = [state for layer in cache.layers for state in (layer.keys, layer.values)]
            return output.logits, *states

    # Sizes that differ from each other, lest one be taken for another.
    num_samples, num_past, num_new = 2, 3, 4
    past = [
        tuple(torch.zeros(num_samples, num_heads, num_past, head_size) for _ in range(2))
        for _ in range(config.num_hidden_layers)
    ]
    positions = torch.arange(num_past, num_past + num_new)
    example = {
        "input_ids": torch.ones(num_samples, num_new, dtype=torch.long),
        "attention_mask": torch.ones(num_samples, num_past + num_new, dtype=torch.long),
        "position_ids": positions.expand(num_samples, -1),
        "past": past,
    }
    with torch.no_grad():
        return importlib.import_module("openvino").convert_model(Step(), example_input=example)


def _quantize(model: Any, weights: str) -> Any:
    nncf = importlib.import_module("nncf")
    modes = nncf.CompressWeightsMode
    if weights == "int8":
        return nncf.compress_weights(model, mode=modes.INT8_ASYM)
    options = {"group_size": _INT4_GROUP_SIZE, "ratio": 1.0, "all_layers": True}
    return nncf.compress_weights(model, mode=modes.INT4_SYM, **options)


def _heads(config: Any) -> tuple[int, int]:
    """Number of heads of keys and values, and size of a head."""
    num_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    return num_heads, config.hidden_size // config.num_attention_heads


def _keep_state(model: Any, config: Any) -> None:
    """Let keys and values stay in the model, and a new input say which sample goes on from which."""
    openvino = importlib.import_module("openvino")
    operations = importlib.import_module("openvino.opset13")
    num_heads, head_size = _heads(config)
    for one, name in zip(
        model.inputs, ("input_ids", "attention_mask", "position_ids"), strict=False
    ):
        one.get_tensor().set_names({name})
    model.outputs[0].get_tensor().set_names({"logits"})
    samples = operations.parameter([-1], np.int32, name="beam_idx")
    samples.output(0).get_tensor().set_names({"beam_idx"})
    names = {}
    for number, (past, present) in enumerate(zip(model.inputs[3:], model.outputs[1:], strict=True)):
        past.get_node().set_partial_shape(openvino.PartialShape([-1, num_heads, -1, head_size]))
        consumers = list(past.get_target_inputs())
        chosen = operations.gather(past.get_node(), samples, operations.constant(np.int64(0)))
        for consumer in consumers:
            consumer.replace_source_output(chosen.output(0))
        past.get_tensor().set_names({f"past.{number}"})
        present.get_tensor().set_names({f"present.{number}"})
        names[f"past.{number}"] = f"present.{number}"
    model.add_parameters([samples])
    model.validate_nodes_and_infer_types()
    transformations = importlib.import_module("openvino._offline_transformations")
    transformations.apply_make_stateful_transformation(model, names)
    _start_empty(model, operations, num_heads, head_size)


def _start_empty(model: Any, operations: Any, num_heads: int, head_size: int) -> None:
    """Keys and values of no tokens for each sample, before the first step."""
    shape = operations.shape_of(model.input("input_ids"), "i64")
    num_samples = operations.gather(
        shape, operations.constant(np.array([0])), operations.constant(np.int64(0))
    )
    sizes = [operations.constant(np.array([size])) for size in (num_heads, 0, head_size)]
    empty = operations.broadcast(
        operations.constant(np.float32(0)), operations.concat([num_samples, *sizes], 0)
    )
    for node in model.get_ops():
        if node.get_type_name() == "ReadValue":
            node.set_arguments([empty.output(0)])
    model.validate_nodes_and_infer_types()


def _write_tokenizer(out: Path) -> None:
    """One that knows the 256 bytes."""
    openvino = importlib.import_module("openvino")
    tokenizers = importlib.import_module("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    fast = importlib.import_module("transformers").PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=alphabet[0], eos_token=alphabet[0]
    )
    convert = importlib.import_module("openvino_tokenizers").convert_tokenizer
    for model, name in zip(
        convert(fast, with_detokenizer=True), ("tokenizer", "detokenizer"), strict=True
    ):
        openvino.save_model(model, out / f"openvino_{name}.xml")
