"""Pruning: what is dropped is what matters least, and what is left computes as before."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the conversion layer needs edgeguard-runtime[convert]")
pytest.importorskip("transformers", reason="the conversion layer needs edgeguard-runtime[convert]")

from convert.batches import Batch, Example, collate  # noqa: E402
from convert.prune import block_importance, keep_layers, keep_neurons, neuron_importance  # noqa: E402
from convert.smoke import llama_config  # noqa: E402
from convert.student import Student  # noqa: E402
from edgeguard.taxonomy import HAZARDS  # noqa: E402

NONE = (0,) * len(HAZARDS)


def _student(layers: int = 4) -> Student:
    torch.manual_seed(0)
    student = Student(llama_config(64, num_hidden_layers=layers)).eval()
    torch.nn.init.normal_(student.head.weight)
    return student


def _batches() -> list[Batch]:
    rows = [Example([3 + (i * j) % 60 for j in range(1, 4 + i)], "prompt", False, NONE, True, 1.0) for i in range(8)]
    return [collate(rows[:5], 0), collate(rows[5:], 0)]


def _silence(student: Student, layer: int) -> None:
    """Make a layer add nothing."""
    torch.nn.init.zeros_(student.model.layers[layer].self_attn.o_proj.weight)
    torch.nn.init.zeros_(student.model.layers[layer].mlp.down_proj.weight)


@pytest.mark.parametrize("silent", [1, 3])
def test_a_layer_that_does_nothing_has_no_importance(silent: int) -> None:
    student = _student()
    _silence(student, silent)
    importance = block_importance(student, _batches())
    assert importance[silent] == pytest.approx(0, abs=1e-6)
    assert all(importance[i] > 1e-4 for i in range(4) if i != silent)


def test_dropping_a_silent_layer_changes_no_logit() -> None:
    student, (batch, _) = _student(), _batches()
    _silence(student, 2)
    before = student(batch.ids, batch.mask)
    keep_layers(student, [0, 1, 3])
    assert student.model.config.num_hidden_layers == 3
    torch.testing.assert_close(student(batch.ids, batch.mask), before)


def test_importance_ignores_padding() -> None:
    student, batches = _student(), _batches()
    alone = [
        collate([Example(b.ids[i][: b.mask[i].sum()].tolist(), "prompt", False, NONE, True, 1.0)], 0)
        for b in batches
        for i in range(len(b.ids))
    ]
    torch.testing.assert_close(block_importance(student, alone), block_importance(student, batches))
    torch.testing.assert_close(neuron_importance(student, alone), neuron_importance(student, batches))


def test_neurons_that_stay_silent_go_first() -> None:
    student, batches = _student(2), _batches()
    for layer, silent in enumerate((range(64, 96), range(32))):
        student.model.layers[layer].mlp.gate_proj.weight.data[list(silent)] = 0
    importance = neuron_importance(student, batches)
    assert (importance[0, 64:] == 0).all() and (importance[1, :32] == 0).all()
    before = student(batches[0].ids, batches[0].mask)
    keep_neurons(student, importance, 64)
    assert student.model.config.intermediate_size == 64
    assert student.model.layers[0].mlp.down_proj.weight.shape == (64, 64)
    torch.testing.assert_close(student(batches[0].ids, batches[0].mask), before)


def test_impossible_cuts_are_refused() -> None:
    student = _student(2)
    with pytest.raises(ValueError, match="some of the layers 0 to 1"):
        keep_layers(student, [0, 5])
    with pytest.raises(ValueError, match="multiple of 32 up to 96"):
        keep_neurons(student, torch.zeros(2, 96), 50)


def test_a_pruned_student_is_saved_and_loaded(tmp_path: Path) -> None:
    student, (batch, _) = _student(), _batches()
    keep_layers(student, [0, 3])
    keep_neurons(student, neuron_importance(student, [batch]), 32)
    student.save(tmp_path)
    loaded = Student.load(tmp_path).eval()
    torch.testing.assert_close(loaded(batch.ids, batch.mask), student(batch.ids, batch.mask))
