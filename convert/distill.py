"""Training the student: on labels, and quantization-aware with the float32 student as the target.

Both are one loop (:class:`Trainer`) with another loss. Weights are float32; it computes in bf16 under autocast where a
device has that. It keeps a checkpoint, and goes on from it: batches, order and learning rate are functions of the step
alone.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn

from convert.batches import CPU_TOKENS, Batch, Example, batches, training_batches
from convert.files import write_whole
from convert.student import Student, autocast, best_device
from edgeguard.errors import EdgeguardError
from edgeguard.metrics import average_precision

__all__ = ["CheckpointError", "Loss", "Settings", "Trainer", "label_loss", "qat_loss", "score", "teacher_loss"]


class CheckpointError(EdgeguardError):
    """A checkpoint that does not fit what is trained."""


DEVICE_TOKENS = 8192  # of a batch to score, where a GPU does it

Loss = Callable[[Student, Batch], Tensor]
"""Per row, [B]; the loss of a step is the mean over its rows. ``Batch.weight`` is 1 in the mean over a step."""


@dataclass(frozen=True)
class Settings:
    """One training run. ``steps`` None: as many as ``passes`` over the data need; rates are peaks, decayed linearly."""

    tokens_per_step: int
    learning_rate: float
    head_learning_rate: float
    warmup: float
    seed: int
    evaluate_every: int
    checkpoint_every: int
    passes: float = 1.0
    steps: int | None = None
    freeze_layers: int = 0
    tokens_per_pass: int | None = None
    """Tokens that go through the student at once, None: those of a step. A step's gradients are the sum over its
    passes, so this decides how much memory training takes, not what it learns."""
    patience: int | None = None
    """Evaluations in a row without a better mean validation AUPRC before training stops; None: never."""


def label_loss(hazard_weight: float) -> Loss:
    """Cross entropy of safe against unsafe, plus ``hazard_weight`` times the hazards' loss; times the row's weight.

    A label by construction counts where no teacher judged the row.
    """

    def loss(student: Student, batch: Batch) -> Tensor:
        return _labelled(student(batch.ids, batch.mask), batch, hazard_weight)

    return loss


def teacher_loss(*, temperature: float, label_weight: float, hazard_weight: float, benign_weight: float) -> Loss:
    """Match the teacher's margins; a row's own label counts beside it.

    Per row: KL of the verdict at ``temperature`` (times its square, Hinton et al. 2015, arXiv 1503.02531), where a
    teacher judged the row; ``label_weight`` times the cross entropy of its label, unless a teacher judged the row and
    the label is one by construction, which yields; all of the label where no teacher judged; ``hazard_weight`` times
    the hazards' loss, for which the teacher's probabilities count where the row names none; ``benign_weight`` times the
    probability that a safe row is called unsafe, which pushes down the rows that are false alarms and leaves alone
    those that are not.
    """

    def loss(student: Student, batch: Batch) -> Tensor:
        logits = student(batch.ids, batch.mask)
        margin = logits[:, 1] - logits[:, 0]
        wanted = torch.sigmoid(batch.teacher / temperature)
        told = nn.functional.binary_cross_entropy_with_logits(margin / temperature, wanted, reduction="none")
        entropy = nn.functional.binary_cross_entropy_with_logits(batch.teacher / temperature, wanted, reduction="none")
        unsafe = batch.unsafe.float()
        label = nn.functional.binary_cross_entropy_with_logits(margin, unsafe, reduction="none")
        counts = _label_counts(batch)
        share = torch.where(batch.taught > 0, label_weight * counts, counts)
        rows = (
            batch.taught * temperature**2 * (told - entropy)
            + share * label
            + hazard_weight * (_hazard_loss(logits[:, 2:], batch) + _taught_hazard_loss(logits[:, 2:], batch))
            + benign_weight * counts * (1 - unsafe) * margin.sigmoid()
        )
        weighted: Tensor = rows * batch.weight
        return weighted

    return loss


def _label_counts(batch: Batch) -> Tensor:
    """Per row: 1 where its own label counts, 0 where it yields to the teacher that judged the row."""
    return torch.where(batch.taught > 0, batch.trusted, torch.ones_like(batch.trusted))


def _labelled(logits: Tensor, batch: Batch, hazard_weight: float) -> Tensor:
    """Per row: :func:`label_loss`."""
    verdict = nn.functional.cross_entropy(logits[:, :2], batch.unsafe.long(), reduction="none")
    return (_label_counts(batch) * verdict + hazard_weight * _hazard_loss(logits[:, 2:], batch)) * batch.weight


def _hazard_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Per row: at least one of the named hazards holds (noisy or), none of the others does; 0 where unknown."""
    log_not = -nn.functional.softplus(logits)  # log(1 - p)
    absent = -(log_not * (1 - batch.hazards)).sum(1)
    none_of_named = (log_not * batch.hazards).sum(1)
    named = batch.hazards.sum(1) > 0
    present = torch.where(named, -torch.log(-torch.expm1(none_of_named.clamp(max=-1e-6))), torch.zeros_like(absent))
    return (absent + present) * batch.hazards_known


def _taught_hazard_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Per row: the cross entropy to the teacher's hazards, where the row's own are unknown."""
    known = batch.teacher_hazards >= 0
    wanted = batch.teacher_hazards.clamp(min=0)
    told = nn.functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    return (told * known).sum(1) * batch.hazards_taught * (1 - batch.hazards_known)


def qat_loss(target: Student, *, hidden_weight: float, label_weight: float, hazard_weight: float) -> Loss:
    """Match ``target`` (float32): KL of the verdict, its margin and hazard logits, and its last hidden state.

    ``label_weight`` times :func:`label_loss` comes on top, so that what rounding has unlearned is learned again.
    """
    target.to(best_device()).eval()

    def loss(student: Student, batch: Batch) -> Tensor:
        device = batch.ids.device
        with torch.no_grad(), autocast(device):
            wanted_hidden = target.hidden(batch.ids, batch.mask).float()
            wanted = target.read_head(wanted_hidden)
        hidden = student.hidden(batch.ids, batch.mask).float()
        logits = student.read_head(hidden)
        verdict = nn.functional.kl_div(
            logits[:, :2].log_softmax(1), wanted[:, :2].log_softmax(1), reduction="none", log_target=True
        ).sum(1)
        margin = nn.functional.smooth_l1_loss(
            logits[:, 1] - logits[:, 0], wanted[:, 1] - wanted[:, 0], reduction="none"
        )
        hazards = nn.functional.binary_cross_entropy_with_logits(
            logits[:, 2:], wanted[:, 2:].sigmoid(), reduction="none"
        ).mean(1)
        scale = wanted_hidden.pow(2).mean(1).clamp(min=1e-6)
        moved = (hidden - wanted_hidden).pow(2).mean(1) / scale
        matched: Tensor = verdict + 0.1 * margin + hazards + hidden_weight * moved
        return matched + label_weight * _labelled(logits, batch, hazard_weight)

    return loss


def score(student: nn.Module, examples: Sequence[Example], pad_id: int, *, bf16: bool) -> np.ndarray:
    """Logits float32 [n, K] of all examples, in their order, in one pass by length. ``bf16``: where it is fast."""
    student.eval()
    out: np.ndarray | None = None
    device = next(student.parameters()).device
    tokens = CPU_TOKENS if device.type == "cpu" else DEVICE_TOKENS
    with torch.inference_mode(), autocast(device, bf16=bf16):
        for indices, batch in batches(examples, tokens, pad_id):
            logits = student(batch.ids.to(device), batch.mask.to(device)).float().cpu().numpy()
            if out is None:
                out = np.zeros((len(examples), logits.shape[1]), dtype=np.float32)
            out[indices] = logits
    assert out is not None, "no examples to score"
    return out


class Trainer:
    """One run in ``folder``: ``log.jsonl``, ``loss.png`` and ``checkpoint.pt``; the student is trained in place."""

    def __init__(
        self,
        student: Student,
        loss: Loss,
        train: Sequence[Example],
        validation: Sequence[Example],
        pad_id: int,
        settings: Settings,
        folder: Path,
    ) -> None:
        """``train``, ``validation``: encoded rows; ``pad_id`` fills short ones."""
        self.device = best_device()
        self.student, self.loss, self.settings, self.folder = student.to(self.device), loss, settings, folder
        self.train, self.validation, self.pad_id = train, validation, pad_id
        self._freeze(settings.freeze_layers)
        head = list(student.head.parameters())
        body = [p for p in student.model.parameters() if p.requires_grad]
        groups = [
            {"params": body, "lr": settings.learning_rate, "peak": settings.learning_rate},
            {"params": head, "lr": settings.head_learning_rate, "peak": settings.head_learning_rate},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
        self.steps = settings.steps or math.ceil(settings.passes * len(self._pass(0)))
        self.step = 0
        self.best: dict[str, Any] = {"auprc": 0.0, "step": 0, "worse": 0}

    def _freeze(self, layers: int) -> None:
        if layers:
            self.student.model.embed_tokens.requires_grad_(False)
        for layer in self.student.model.layers[:layers]:
            layer.requires_grad_(False)

    def _pass(self, number: int) -> list[list[int]]:
        return training_batches(self.train, self.settings.tokens_per_step, self.settings.seed * 1000 + number)

    def _batches(self) -> Iterator[list[int]]:
        """Batches from the current step on, pass after pass."""
        number, left = 0, self.step
        while True:
            order = self._pass(number)
            yield from order[left:]
            left = max(0, left - len(order))
            number += 1

    def _rate(self) -> float:
        """Share of the peak rate at this step: linear warm-up, then linear to zero."""
        warmup = max(1, int(self.steps * self.settings.warmup))
        if self.step < warmup:
            return (self.step + 1) / warmup
        return max(0.0, (self.steps - self.step) / max(1, self.steps - warmup))

    def run(self, *, resume: bool = True) -> None:
        """Train to the end, from the checkpoint if there is one.

        With ``patience``, the end may come early, and the best weights of an evaluation are put back.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for part in self.folder.glob(".*.part"):
            part.unlink()  # half a checkpoint, of a run that was killed while it wrote
        if resume and (self.folder / "checkpoint.pt").is_file():
            self._restore()
        started, tokens, losses = time.monotonic(), 0, list[float]()
        for indices in self._batches():
            if self.step >= self.steps:
                break
            rows = [self.train[i] for i in indices]
            losses.append(self._update(rows))
            tokens += sum(len(row.ids) for row in rows)
            self.step += 1
            if self.step % 10 == 0 or self.step == self.steps:
                rate = tokens / (time.monotonic() - started)
                self._log(
                    {"step": self.step, "steps": self.steps, "loss": float(np.mean(losses)), "tokens_per_s": rate}
                )
                started, tokens, losses = time.monotonic(), 0, []
            if self.step % self.settings.evaluate_every == 0 or self.step == self.steps:
                figures = self.evaluate()
                self._log({"step": self.step, **figures})
                plot_log(self.folder)
                if self._stops_early(figures):
                    break
            if self.step % self.settings.checkpoint_every == 0:
                self._checkpoint()
        if self.settings.patience and self.best["step"] not in (0, self.step):
            self._load(torch.load(self.folder / "best.pt", map_location=self.device, weights_only=True))
            click.echo(f"the weights of step {self.best['step']} were the best and are kept", err=True)

    def _stops_early(self, figures: Mapping[str, float]) -> bool:
        """Keep the weights when they are the best so far; whether ``patience`` evaluations have brought nothing."""
        if self.settings.patience is None or not figures:
            return False
        mean = float(np.mean(list(figures.values())))
        if mean > self.best["auprc"]:
            self.best = {"auprc": mean, "step": self.step, "worse": 0}
            write_whole(self.folder / "best.pt", lambda path: torch.save(self._trained(), path))
        else:
            self.best["worse"] += 1
        return bool(self.best["worse"] >= self.settings.patience)

    def _update(self, rows: Sequence[Example]) -> float:
        """One step on ``rows``, pass after pass; returns its loss."""
        self.student.train()
        rate, total = self._rate(), 0.0
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        mean_weight = float(np.mean([row.weight for row in rows]))
        for _, batch in batches(rows, self.settings.tokens_per_pass or self.settings.tokens_per_step, self.pad_id):
            weighted = replace(batch, weight=batch.weight / mean_weight).to(self.device)
            with autocast(self.device):
                loss = self.loss(self.student, weighted).sum() / len(rows)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def evaluate(self) -> dict[str, float]:
        """AUPRC on the validation split, by target."""
        logits = score(self.student, self.validation, self.pad_id, bf16=True)
        margins = logits[:, 1] - logits[:, 0]
        unsafe = np.array([e.unsafe for e in self.validation])
        figures = {}
        for target in ("prompt", "response"):
            chosen = np.array([e.target == target for e in self.validation])
            area = average_precision(unsafe[chosen], margins[chosen]) if chosen.any() else None
            if area is not None:
                figures[f"auprc_{target}"] = area
        return figures

    def _log(self, record: Mapping[str, Any]) -> None:
        with (self.folder / "log.jsonl").open("a") as stream:
            stream.write(json.dumps(record) + "\n")
        click.echo(" ".join(f"{k}={v:.4g}" for k, v in record.items()), err=True)

    def _trained(self) -> dict[str, Tensor]:
        """The weights that training changes; the others are those of the base, which is there."""
        return {name: p.detach() for name, p in self.student.named_parameters() if p.requires_grad}

    def _load(self, weights: Mapping[str, Tensor]) -> None:
        _, unexpected = self.student.load_state_dict(weights, strict=False)
        if unexpected or set(weights) != set(self._trained()):
            raise CheckpointError(f"{self.folder}: its checkpoint is of a student of another kind. Remove it.")

    def _checkpoint(self) -> None:
        state = {
            "weights": self._trained(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "best": self.best,
        }
        write_whole(self.folder / "checkpoint.pt", lambda path: torch.save(state, path))

    def _restore(self) -> None:
        state = torch.load(self.folder / "checkpoint.pt", map_location=self.device, weights_only=True)
        self._load(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.best = state["step"], state["best"]
        click.echo(f"resumed at step {self.step} of {self.steps}", err=True)


def plot_log(folder: Path) -> None:
    """``loss.png`` from ``log.jsonl``: training loss and validation AUPRC against the step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records: dict[int, dict[str, float]] = {}
    for line in (folder / "log.jsonl").read_text().splitlines():
        record = json.loads(line)
        records.setdefault(record["step"], {}).update(record)  # a resumed run repeats a few steps: the last one counts
    figure, left = plt.subplots(figsize=(7, 4))
    steps = [s for s in sorted(records) if "loss" in records[s]]
    left.plot(steps, [records[s]["loss"] for s in steps], color="tab:gray", linewidth=1, label="training loss")
    left.set_xlabel("step")
    left.set_ylabel("loss")
    right = left.twinx()
    for name in ("auprc_prompt", "auprc_response"):
        points = [s for s in sorted(records) if name in records[s]]
        right.plot(points, [records[s][name] for s in points], marker="o", label=f"validation {name}")
    right.set_ylabel("AUPRC")
    right.legend(loc="lower right")
    figure.tight_layout()
    write_whole(folder / "loss.png", lambda path: figure.savefig(path, dpi=120, format="png"))
    plt.close(figure)
