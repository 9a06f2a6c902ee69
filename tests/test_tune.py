"""Scales trained while integers stay: what is kept, what moves, and that INT4 comes nearer to float32."""

from __future__ import annotations

import copy

import numpy as np
import pytest

pytest.importorskip("torch", reason="the conversion layer needs edgeguard-runtime[convert]")
pytest.importorskip("transformers", reason="the conversion layer needs edgeguard-runtime[convert]")

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from convert.batches import Batch, Example, collate  # noqa: E402
from convert.distill import qat_loss  # noqa: E402
from convert.gptq import load_weights  # noqa: E402
from convert.quantize import Int4Weight, QuantizeError, quantize_int4  # noqa: E402
from convert.smoke import llama_config  # noqa: E402
from convert.student import Student  # noqa: E402
from convert.tune import free_scales, tuned_weights  # noqa: E402
from edgeguard.taxonomy import HAZARDS  # noqa: E402


@pytest.fixture
def target() -> Student:
    torch.manual_seed(0)
    made = Student(llama_config(64))
    torch.nn.init.normal_(made.head.weight)
    return made


@pytest.fixture
def batch() -> Batch:
    rng = np.random.default_rng(0)
    rows = [rng.integers(1, 64, rng.integers(5, 20)).tolist() for _ in range(32)]
    return collate([Example(ids, "prompt", False, (0,) * len(HAZARDS), True, 1.0) for ids in rows], pad_id=0)


def rounded(target: Student) -> tuple[Student, dict[str, Int4Weight]]:
    """The student in INT4, and its integers; one group is all zeros."""
    weights = {n: w.copy() for n, w in target.numpy_weights().items() if w.ndim == 2 and n != "head.weight"}
    weights["model.layers.0.mlp.down_proj.weight"][3, 32:64] = 0
    integers = {name: quantize_int4(weight) for name, weight in weights.items()}
    return load_weights(copy.deepcopy(target), integers), integers


def logits(student: Student, batch: Batch) -> Tensor:
    with torch.no_grad():
        found: Tensor = student(batch.ids, batch.mask)
    return found


def test_untrained_scales_change_nothing(target: Student, batch: Batch) -> None:
    student, integers = rounded(target)
    before = logits(student, batch)
    free = free_scales(student, integers)
    torch.testing.assert_close(logits(free, batch), before, atol=1e-5, rtol=1e-5)
    plain, kept = tuned_weights(free)
    assert {n: w.tolist() for n, w in plain.state_dict().items()} == {
        n: w.tolist() for n, w in rounded(target)[0].state_dict().items()
    }
    assert kept.keys() == integers.keys()
    for name, weight in integers.items():
        assert np.array_equal(kept[name].nibbles, weight.nibbles) and np.array_equal(kept[name].scales, weight.scales)


def test_training_brings_the_rounded_student_nearer_and_keeps_every_integer(target: Student, batch: Batch) -> None:
    student, integers = rounded(target)
    wanted, before = logits(target, batch), logits(student, batch)
    free = free_scales(student, integers)
    loss = qat_loss(copy.deepcopy(target), hidden_weight=0.1, label_weight=0.0, hazard_weight=0.3)
    optimizer = torch.optim.Adam([p for p in free.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        loss(free, batch).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    plain, tuned = tuned_weights(free)
    assert (logits(plain, batch) - wanted).square().mean() < 0.5 * (before - wanted).square().mean()
    torch.testing.assert_close(logits(plain, batch), logits(free, batch), atol=5e-3, rtol=5e-3)
    for name, weight in integers.items():
        assert np.array_equal(tuned[name].nibbles, weight.nibbles), name
    assert any(not np.array_equal(tuned[name].scales, weight.scales) for name, weight in integers.items())


def test_the_gradient_of_a_scale_is_that_of_its_weights(target: Student, batch: Batch) -> None:
    """Against autograd on the weight written out."""
    name = "model.layers.1.mlp.up_proj.weight"
    student, integers = rounded(target)
    free = free_scales(copy.deepcopy(student), integers)
    free(batch.ids, batch.mask).sum().backward()
    student(batch.ids, batch.mask).sum().backward()
    weight = integers[name]
    steps = torch.from_numpy(weight.nibbles.astype(np.float32) - 8).reshape(*weight.scales.shape, 32)
    whole, found = student.get_parameter(name).grad, free.get_parameter(name.replace(".weight", ".change")).grad
    assert whole is not None
    wanted = (whole.reshape(steps.shape) * steps).sum(-1)
    torch.testing.assert_close(found, wanted * torch.from_numpy(weight.scales.astype(np.float32)), atol=1e-4, rtol=1e-3)


def test_a_scale_that_diverged_is_refused(target: Student) -> None:
    free = free_scales(*rounded(target))
    with torch.no_grad():
        free.get_parameter("model.layers.0.mlp.up_proj.change")[0, 0] = float("nan")
    with pytest.raises(QuantizeError, match="training diverged"):
        tuned_weights(free)
