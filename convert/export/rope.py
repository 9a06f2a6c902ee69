"""How much slower than plain RoPE each pair of a head turns: all that the containers need to know of RoPE scaling.

Llama 3.1 and later slow the slow frequencies down further (``rope_type`` ``llama3``). That is one divisor a frequency,
the same at every position: a graph's tables, a GGUF's ``rope_freqs.weight`` and torch's ``inv_freq`` each take it in.
Other kinds, some of which change with the length of a row or scale the attention as well, are refused.

Source: transformers ``modeling_rope_utils.py`` (``ROPE_INIT_FUNCTIONS``), which computes the frequencies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeguard.errors import EdgeguardError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["RopeError", "rope_factors"]


class RopeError(EdgeguardError):
    """A kind of RoPE scaling that the containers cannot hold."""


def rope_factors(config: PretrainedConfig) -> tuple[float, ...] | None:
    """Divisors of the ``head_dim / 2`` plain frequencies, fastest first, each a float32; None for plain RoPE.

    ``config``: of a transformers model. Raises RopeError for a kind of scaling other than ``llama3``.
    """
    scaling = getattr(config, "rope_scaling", None) or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise RopeError(
            f"the model's RoPE scaling is of the type {kind!r}; only plain RoPE and 'llama3' can be exported. "
            "Take another base model."
        )
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    (plain, _), (scaled, attention_scaling) = (ROPE_INIT_FUNCTIONS[k](config, "cpu") for k in ("default", kind))
    if attention_scaling != 1:
        raise RopeError(f"the model's RoPE scaling multiplies cos and sin by {attention_scaling}; only 1 is exported.")
    factors: list[float] = (plain / scaled).tolist()
    return tuple(factors)
