"""The student: the lower layers of a small language model, and a head of K rows on the last token.

One forward pass gives the logits of ``safe``, ``unsafe`` and the hazards. The body is any causal model of transformers
without its output layer; what is exported must be a Llama. A trained teacher is the same thing, larger.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from convert.files import read_json, write_json, write_whole
from convert.quantize import GROUP_SIZE
from edgeguard.bench.peer_files import transformers_config
from edgeguard.engines.int4_weights import shortest
from edgeguard.errors import EdgeguardError
from edgeguard.taxonomy import HAZARDS

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from convert.export.onnx_graph import StudentConfig

__all__ = ["HEAD", "Student", "StudentError", "autocast", "best_device", "bf16_is_fast"]


class StudentError(EdgeguardError):
    """A base that no student can be made of."""


HEAD = ("safe", "unsafe", *HAZARDS)
OTHER_BASE = "Take another base model."


class Student(nn.Module):
    """``ids, mask`` [batch, length] (right padding) -> logits float32 [batch, K] of each row's last real token."""

    def __init__(self, config: PretrainedConfig, labels: tuple[str, ...] = HEAD) -> None:
        """Random weights of the shape of ``config``; ``labels`` name the rows of the head."""
        from transformers import AutoModel

        super().__init__()
        self.model = AutoModel.from_config(config)
        self.head = nn.Linear(config.hidden_size, len(labels))
        self.labels = labels

    @classmethod
    def from_base(
        cls,
        folder: Path,
        layers: int | None = None,
        labels: tuple[str, ...] = HEAD,
        target_tokens: Mapping[str, int] | None = None,
    ) -> Student:
        """The first ``layers`` layers (None: all) of the base in ``folder``, and a head with a row a label.

        A label that ``target_tokens`` (label -> token id) names starts with that token's row of the unembedding, as the
        base would have answered; every other row starts at zero. Raises StudentError for more layers than there are.
        """
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        config = base.config
        if (layers or 0) > config.num_hidden_layers:
            raise StudentError(f"layers = {layers}: {folder} has {config.num_hidden_layers}. Take as many, or fewer.")
        config.num_hidden_layers, config.use_cache = layers or config.num_hidden_layers, False
        config._attn_implementation = _attention()
        student = cls(config, labels)
        kept = {name.removeprefix("model."): w for name, w in base.state_dict().items() if name.startswith("model.")}
        student.model.load_state_dict({name: w for name, w in kept.items() if name in student.model.state_dict()})
        nn.init.zeros_(student.head.weight)
        nn.init.zeros_(student.head.bias)
        unembedding = base.get_output_embeddings().weight
        with torch.no_grad():
            for label, token in (target_tokens or {}).items():
                student.head.weight[labels.index(label)] = unembedding[token]
        return student

    @classmethod
    def of_shape(cls, shape: StudentConfig, labels: tuple[str, ...] = HEAD) -> Student:
        """Random weights of the shape that a container holds."""
        from transformers import LlamaConfig

        config = LlamaConfig(**transformers_config(shape, labels, pad_id=0), use_cache=False)
        config._attn_implementation = _attention()
        return cls(config, labels)

    def hidden(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The final hidden state [batch, hidden] of each row's last real token."""
        states: Tensor = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        return states[torch.arange(len(ids)), mask.sum(1) - 1]

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits [batch, K]."""
        return self.read_head(self.hidden(ids, mask))

    def read_head(self, hidden: Tensor) -> Tensor:
        """Logits [batch, K] in float32, whatever the body computes in: the head is 16 rows and costs nothing."""
        with torch.autocast(hidden.device.type, enabled=False):
            logits: Tensor = nn.functional.linear(hidden.float(), self.head.weight.float(), self.head.bias.float())
        return logits

    def numpy_weights(self) -> dict[str, np.ndarray]:
        """All weights as float32 arrays under their Hugging Face names, plus ``head.weight`` and ``head.bias``."""
        return {name: tensor.detach().float().numpy() for name, tensor in self.state_dict().items()}

    def onnx_config(self, max_tokens: int) -> StudentConfig:
        """The shape that every container is built from.

        Raises RopeError for RoPE scaling that they cannot hold, StudentError for anything else that they cannot: a body
        that is no Llama, weights beside a Llama's usual ones (biases), widths that INT4 groups do not divide.
        """
        from convert.export.onnx_graph import StudentConfig
        from convert.export.rope import rope_factors

        config = self.model.config
        if config.model_type != "llama":
            raise StudentError(f"a student is exported as a Llama, this base is a {config.model_type}.")
        for name, held in (("hidden_act", "silu"), ("partial_rotary_factor", 1.0)):
            if (found := getattr(config, name, held)) != held:
                raise StudentError(f"containers hold a Llama with {name} {held}, this base has {found}. {OTHER_BASE}")
        try:
            shape = StudentConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_layers=config.num_hidden_layers,
                num_heads=config.num_attention_heads,
                num_kv_heads=config.num_key_value_heads,
                head_dim=config.head_dim,
                rms_norm_eps=shortest(config.rms_norm_eps),  # read from a GGUF it is a float32
                rope_theta=config.rope_theta,
                max_tokens=max_tokens,
                head_size=len(self.labels),
                rope_factors=rope_factors(config),
            )
        except ValueError as error:
            raise StudentError(f"no container holds this base: {error} {OTHER_BASE}") from error
        self._check_weights(shape.shapes())
        return shape

    def _check_weights(self, held: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse weights that are not those that containers hold (``held``: name -> shape), or that INT4 cannot be."""
        found = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
        if other := [name for name in {**found, **held} if found.get(name) != held.get(name)]:
            name = other[0]
            raise StudentError(
                f"containers hold {name} as {held.get(name, 'nothing')}, this base has {found.get(name, 'none')} "
                f"(and {len(other) - 1} more such weights). {OTHER_BASE}"
            )
        for name, shape in held.items():
            if name.startswith("model.") and len(shape) == 2 and shape[1] % GROUP_SIZE:
                raise StudentError(
                    f"{name}: expected a width that INT4 groups of {GROUP_SIZE} divide, found {shape}. {OTHER_BASE}"
                )

    def save(self, folder: Path) -> None:
        """Write ``student.safetensors`` and ``student.json`` (config and labels)."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        write_json(folder / "student.json", {"labels": list(self.labels), "config": self.model.config.to_dict()})
        write_whole(folder / "student.safetensors", lambda path: save_file(state, path))

    @classmethod
    def load(cls, folder: Path) -> Student:
        """Read what :meth:`save` wrote."""
        from transformers import AutoConfig

        record = read_json(folder / "student.json")
        config = AutoConfig.for_model(**record["config"])
        config._attn_implementation = _attention()
        student = cls(config, tuple(record["labels"]))
        student.load_state_dict(load_file(folder / "student.safetensors"))
        return student


def best_device() -> torch.device:
    """CUDA, Apple's MPS or the CPU: the fastest that torch can use here."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def autocast(device: torch.device, *, bf16: bool = True) -> torch.autocast:
    """Compute in bfloat16 on ``device``, where that is asked for and fast there."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16 and bf16_is_fast(device))


@functools.cache
def bf16_is_fast(device: torch.device) -> bool:
    """Whether ``device`` multiplies in bfloat16 faster than in float32: measured once a process, in a moment.

    A CPU without instructions for it (AVX512-BF16, AMX, ARM's BF16) computes it in software: a Zen 3 took eighty times
    as long as for float32.
    """
    if device.type != "cpu":
        return True
    return _product_seconds(torch.bfloat16) < _product_seconds(torch.float32)


def _product_seconds(dtype: torch.dtype) -> float:
    """The best of three products of [256, 512] by [512, 512], after one that warms up."""
    a, b = torch.ones(256, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _attention() -> str:
    """On short rows and a CPU, plain attention is faster than the fused kernel's backward."""
    return "eager" if best_device().type == "cpu" else "sdpa"
