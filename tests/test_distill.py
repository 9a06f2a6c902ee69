"""Training: losses, the order of batches, checkpoints and resuming."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from convert.smoke import llama_config

torch = pytest.importorskip("torch", reason="the conversion layer needs edgeguard-runtime[convert]")
transformers = pytest.importorskip("transformers", reason="the conversion layer needs edgeguard-runtime[convert]")

from convert.batches import Batch, Example, batches, collate, training_batches  # noqa: E402
from convert.distill import (  # noqa: E402
    CheckpointError,
    Loss,
    Settings,
    Trainer,
    _hazard_loss,
    label_loss,
    qat_loss,
    score,
    teacher_loss,
)
from convert.student import Student, autocast  # noqa: E402
from edgeguard.taxonomy import HAZARDS  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

NONE = (0,) * len(HAZARDS)
S1 = (1, *NONE[1:])


def _student(seed: int = 0) -> Student:
    torch.manual_seed(seed)
    return Student(llama_config(64))


def _examples(count: int = 60) -> list[Example]:
    """The token 7 makes a row unsafe."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        ids = rng.integers(10, 60, size=int(rng.integers(3, 20))).tolist()
        if i % 2:
            ids[len(ids) // 2] = 7
        rows.append(Example(ids, "prompt" if i % 3 else "response", bool(i % 2), S1 if i % 2 else NONE, True, 1.0))
    return rows


def _settings(**changes: object) -> Settings:
    values = {
        "tokens_per_step": 128,
        "learning_rate": 3e-3,
        "head_learning_rate": 1e-2,
        "warmup": 0.1,
        "seed": 3,
        "evaluate_every": 50,
        "checkpoint_every": 4,
        "steps": 8,
    }
    return Settings(**{**values, **changes})  # type: ignore[arg-type]


def _trainer(folder: Path, student: Student, **changes: object) -> Trainer:
    rows = _examples()
    return Trainer(student, label_loss(0.3), rows, rows[:20], 0, _settings(**changes), folder)


def test_every_row_once_and_little_padding() -> None:
    rows = _examples(200)
    order = training_batches(rows, 128, seed=1)
    assert sorted(i for batch in order for i in batch) == list(range(200))
    assert order == training_batches(rows, 128, seed=1) != training_batches(rows, 128, seed=2)
    padded = sum(collate([rows[i] for i in b], 0).ids.numel() for b in order)
    assert padded < 1.15 * sum(len(r.ids) for r in rows)
    assert sorted(i for chosen, _ in batches(rows, 128, 0) for i in chosen) == list(range(200))


def test_padding_changes_no_logit() -> None:
    student, rows = _student(), _examples(6)
    torch.nn.init.normal_(student.head.weight)
    alone = np.concatenate([score(student, [r], 0, bf16=False) for r in rows])
    together = score(student, rows, 0, bf16=False)
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_hazard_loss_is_noisy_or() -> None:
    logits = torch.zeros(3, len(HAZARDS))
    two = torch.tensor([[1.0, 1.0, *NONE[2:]], list(NONE), list(S1)])
    batch = Batch(
        ids=torch.zeros(3, 1),
        mask=torch.ones(3, 1),
        unsafe=torch.tensor([True, False, True]),
        hazards=two,
        hazards_known=torch.tensor([1.0, 1.0, 0.0]),
        weight=torch.ones(3),
        teacher=torch.zeros(3),
        taught=torch.zeros(3),
        teacher_hazards=torch.zeros(3, len(HAZARDS)),
        hazards_taught=torch.zeros(3),
        trusted=torch.ones(3),
    )
    loss = _hazard_loss(logits, batch).tolist()
    # p = 1/2 everywhere: at least one of two holds with 3/4, each of the other twelve is absent with 1/2.
    assert loss[0] == pytest.approx(-math.log(0.75) + 12 * math.log(2), rel=1e-5)
    assert loss[1] == pytest.approx(14 * math.log(2), rel=1e-5)
    assert loss[2] == 0.0


def test_hazard_loss_stays_finite_at_extreme_logits() -> None:
    for value in (-200.0, 200.0):
        batch = collate(_examples(4), 0)
        logits = torch.full((4, len(HAZARDS)), value, requires_grad=True)
        loss = _hazard_loss(logits, batch).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        assert torch.isfinite(loss) and torch.isfinite(logits.grad).all()


def test_qat_loss_is_zero_at_its_target_only() -> None:
    target, other = _student(), _student(1)
    torch.nn.init.normal_(target.head.weight)
    other.head.load_state_dict(target.head.state_dict())
    batch = collate(_examples(8), 0)
    loss = qat_loss(target, hidden_weight=0.1, label_weight=0.0, hazard_weight=0.3)
    with torch.no_grad(), autocast(torch.device("cpu")):  # as the trainer computes here
        hazards = torch.nn.functional.binary_cross_entropy_with_logits
        wanted = target(batch.ids, batch.mask)[:, 2:]
        entropy = hazards(wanted, wanted.sigmoid())  # cross entropy does not fall below the target's own entropy
        assert float(loss(target, batch).mean()) == pytest.approx(float(entropy), abs=1e-4)
        assert float(loss(other, batch).mean()) > float(entropy) + 0.01


def test_qat_loss_adds_the_labels_by_their_weight() -> None:
    target, student = _student(), _student(1)
    torch.nn.init.normal_(target.head.weight)
    batch = collate(_examples(8), 0)
    with torch.no_grad(), autocast(torch.device("cpu")):
        without, half = (
            qat_loss(target, hidden_weight=0.1, label_weight=w, hazard_weight=0.3)(student, batch) for w in (0.0, 0.5)
        )
        torch.testing.assert_close(half - without, 0.5 * label_loss(0.3)(student, batch), rtol=1e-3, atol=1e-4)


def _margins(loss: Loss, batch: Batch, margins: list[float]) -> float:
    """``loss`` of a student that gives these margins whatever it reads."""

    class Fixed(torch.nn.Module):  # type: ignore[misc,name-defined]
        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            half = torch.tensor(margins) / 2
            hazards = torch.full((len(half), len(HAZARDS)), -40.0)
            logits: Tensor = torch.cat([torch.stack([-half, half], 1), hazards], 1)
            return logits

    return float(loss(Fixed(), batch))


def test_a_label_by_construction_yields_to_the_teacher_in_every_loss() -> None:
    def batch(**fields: object) -> Batch:
        return collate([dataclasses.replace(_examples(1)[0], hazards_known=False, **fields)], 0)  # type: ignore[arg-type]

    safe = math.log(1 + math.exp(3.0))
    assert _margins(label_loss(0.0), batch(teacher=3.0, trusted=False), [3.0]) == pytest.approx(0, abs=1e-6)
    assert _margins(label_loss(0.0), batch(teacher=3.0), [3.0]) == pytest.approx(safe, rel=1e-5)
    assert _margins(label_loss(0.0), batch(trusted=False), [3.0]) == pytest.approx(safe, rel=1e-5)


def test_teacher_loss_weighs_teacher_label_and_false_alarms() -> None:
    def batch(**fields: object) -> Batch:
        return collate([dataclasses.replace(_examples(1)[0], hazards_known=False, **fields)], 0)  # type: ignore[arg-type]

    def loss(**weights: float) -> Loss:
        return teacher_loss(
            **{"temperature": 2.0, "label_weight": 0.0, "hazard_weight": 0.0, "benign_weight": 0.0, **weights}
        )

    taught = batch(teacher=3.0)
    assert _margins(loss(), taught, [3.0]) == pytest.approx(0, abs=1e-6)
    p, q = 1 / (1 + math.exp(-1.5)), 0.5
    kl = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert _margins(loss(), taught, [0.0]) == pytest.approx(4 * kl, rel=1e-5)
    # The label (safe) counts beside the teacher by its weight, unless it is one by construction; alone it counts whole.
    safe = math.log(1 + math.exp(3.0))
    assert _margins(loss(label_weight=0.5), taught, [3.0]) == pytest.approx(0.5 * safe, rel=1e-5)
    assert _margins(loss(label_weight=0.5), batch(teacher=3.0, trusted=False), [3.0]) == pytest.approx(0, abs=1e-6)
    assert _margins(loss(label_weight=0.5), batch(trusted=False), [3.0]) == pytest.approx(safe, rel=1e-5)
    assert _margins(loss(benign_weight=0.7), taught, [3.0]) == pytest.approx(0.7 / (1 + math.exp(-3.0)), rel=1e-5)
    assert _margins(loss(benign_weight=0.7), batch(teacher=3.0, unsafe=True), [3.0]) == pytest.approx(0, abs=1e-6)


def test_the_teachers_hazards_count_where_the_row_names_none() -> None:
    told = (0.5,) * len(HAZARDS)
    row = dataclasses.replace(_examples(2)[1], teacher=0.0, teacher_hazards=told, trusted=False)
    weights = {"temperature": 1.0, "label_weight": 1.0, "benign_weight": 0.0}
    found = {}
    for known in (False, True):
        batch = collate([dataclasses.replace(row, hazards_known=known)], 0)
        found[known] = [_margins(teacher_loss(hazard_weight=w, **weights), batch, [0.0]) for w in (0.0, 1.0)]
    # The fixed logits are -40: each hazard that the teacher holds for likely costs half of that.
    assert found[False] == [pytest.approx(0, abs=1e-5), pytest.approx(0.5 * 40 * len(HAZARDS), rel=1e-3)]
    assert found[True] == [pytest.approx(0, abs=1e-5), pytest.approx(13.8, abs=0.1)]  # its own one is absent: -log 1e-6


def test_training_stops_early_with_its_best_weights(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, _student(), steps=200, evaluate_every=10, patience=2, checkpoint_every=1000)
    areas = iter([0.6, 0.8, 0.7, 0.7])
    weights = []

    def evaluate() -> dict[str, float]:
        weights.append({name: p.clone() for name, p in trainer.student.state_dict().items()})
        return {"auprc_prompt": next(areas)}

    trainer.evaluate = evaluate  # type: ignore[method-assign]
    trainer.run()
    assert trainer.step == 40
    for name, tensor in trainer.student.state_dict().items():
        assert torch.equal(tensor, weights[1][name])
    assert any(not torch.equal(weights[1][name], weights[3][name]) for name in weights[1])


def test_a_checkpoint_of_another_student_is_refused(tmp_path: Path) -> None:
    _trainer(tmp_path, _student()).run()
    with pytest.raises(CheckpointError, match="another kind"):
        _trainer(tmp_path, _student(), freeze_layers=1).run()


def test_training_learns(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, _student(), steps=60, checkpoint_every=100)
    trainer.run()
    assert trainer.evaluate()["auprc_prompt"] > 0.9
    assert (tmp_path / "loss.png").is_file()
    logits = score(trainer.student, _examples(), 0, bf16=False)
    trainer.student.save(tmp_path / "final")
    np.testing.assert_allclose(score(Student.load(tmp_path / "final"), _examples(), 0, bf16=False), logits, rtol=1e-5)


def test_a_resumed_run_ends_where_an_unbroken_one_does(tmp_path: Path) -> None:
    whole = _trainer(tmp_path / "whole", _student())
    whole.run()
    broken = _trainer(tmp_path / "broken", _student())
    update, calls = broken._update, 0

    def fails(rows: Sequence[Example]) -> float:
        nonlocal calls
        calls += 1
        if calls == 7:  # after the checkpoint at step 4
            raise KeyboardInterrupt
        return update(rows)

    broken._update = fails  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    (tmp_path / "broken" / ".checkpoint.pt.0a1b.part").touch()
    resumed = _trainer(tmp_path / "broken", _student(5))
    resumed.run()
    assert resumed.step == 8
    assert not list((tmp_path / "broken").glob(".*.part"))
    for name, tensor in whole.student.state_dict().items():
        torch.testing.assert_close(resumed.student.state_dict()[name], tensor, atol=2e-3, rtol=0.05)


@pytest.mark.parametrize("qat", [False, True])
def test_a_step_in_many_passes_is_the_same_step(tmp_path: Path, qat: bool) -> None:
    rows = [dataclasses.replace(row, weight=0.5 + i % 3) for i, row in enumerate(_examples(12))]
    target = _student(1)
    torch.nn.init.normal_(target.head.weight)
    loss = qat_loss(target, hidden_weight=0.1, label_weight=0.5, hazard_weight=0.3) if qat else label_loss(0.3)
    found = []
    for tokens in (None, 20):
        settings = _settings(tokens_per_step=1000, tokens_per_pass=tokens, warmup=0.0)
        trainer = Trainer(_student(), loss, rows, rows, 0, settings, tmp_path)
        # Plain gradient descent, so that the weights tell the gradients.
        groups = [{"params": list(trainer.student.parameters()), "peak": 1.0}]
        trainer.optimizer = torch.optim.SGD(groups, lr=1.0)
        found.append((trainer._update(rows), trainer.student.state_dict()))
    (whole, ends), (in_parts, parted) = found
    assert in_parts == pytest.approx(whole, rel=2e-3)
    start = _student().state_dict()
    for name, tensor in ends.items():
        assert not torch.equal(tensor, start[name])
        torch.testing.assert_close(parted[name] - start[name], tensor - start[name], atol=2e-3, rtol=0.02)


def test_frozen_layers_stay(tmp_path: Path) -> None:
    student = _student()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    _trainer(tmp_path, student, freeze_layers=1).run()
    moved = {name for name, tensor in student.state_dict().items() if not torch.equal(before[name], tensor)}
    assert not any(name.startswith(("model.embed_tokens", "model.layers.0.")) for name in moved)
    assert any(name.startswith("model.layers.1.") for name in moved) and "head.weight" in moved
