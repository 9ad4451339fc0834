"""Which keys each query may look at, for each kind of attention layer that a model has.

Q queries, K keys of a slot; a key's place in the slot is its position in the text.
"""

import torch
from torch import Tensor
from transformers import PretrainedConfig

from full_stack_transformer.errors import ModelError

_FULL, _SLIDING, _CHUNKED = "full_attention", "sliding_attention", "chunked_attention"


class AttentionMasks:
    """Builds the masks of a model.

    Args:
        config: of the model.
        dtype: in which it computes.

    Raises:
        ModelError: the model has layers that are none of the known kinds.
    """

    def __init__(self, config: PretrainedConfig, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._window: int | None = getattr(config, "sliding_window", None)
        self._chunk: int | None = getattr(config, "attention_chunk_size", None)
        named = getattr(config, "layer_types", None)
        alone = _SLIDING if self._window else _FULL
        self._kinds = sorted(set(named)) if named else [alone]
        # Models whose layers differ take a mask for each kind, by its name.
        self._is_single = not named or self._kinds == [_FULL]
        unknown = [kind for kind in self._kinds if kind not in (_FULL, _SLIDING, _CHUNKED)]
        if unknown:
            raise ModelError(
                f"{config.model_type} has layers of {unknown[0]}, which keep something else than keys and "
                "values; such a model cannot be generated with here"
            )

    def make(self, positions: Tensor, num_keys: int) -> Tensor | dict[str, Tensor]:
        """Masks (rows, 1, Q, K): 0 where a query may look, -inf elsewhere.

        Args:
            positions: (rows, Q) of the queries.
            num_keys: K.
        """
        masks = {kind: self._mask(kind, positions, num_keys) for kind in self._kinds}
        return masks[self._kinds[0]] if self._is_single else masks

    def _mask(self, kind: str, positions: Tensor, num_keys: int) -> Tensor:
        keys = torch.arange(num_keys, device=positions.device)[None, None, None, :]
        queries = positions[:, None, :, None]
        allowed = keys <= queries
        if kind == _SLIDING and self._window:
            allowed &= keys > queries - self._window
        elif kind == _CHUNKED and self._chunk:
            allowed &= keys // self._chunk == queries // self._chunk
        mask = torch.zeros(allowed.shape, device=positions.device, dtype=self._dtype)
        return mask.masked_fill(~allowed, -torch.inf)
