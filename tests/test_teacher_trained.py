"""The teacher trained here: a LoRA adapter on a tiny Llama, kept, read back and judging."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the conversion layer needs edgeguard-runtime[convert]")
pytest.importorskip("transformers", reason="the conversion layer needs edgeguard-runtime[convert]")
pytest.importorskip("peft", reason="the conversion layer needs edgeguard-runtime[convert]")

from tokenizers import Tokenizer  # noqa: E402

from convert.base import chat_template, plain_tokenizer_json  # noqa: E402
from convert.batches import Example, encode_rows  # noqa: E402
from convert.corpora.registry import Row  # noqa: E402
from convert.distill import Settings, Trainer, label_loss, score  # noqa: E402
from convert.smoke import requests, write_base  # noqa: E402
from convert.student import Student  # noqa: E402
from convert.teachers.formats import TeacherError  # noqa: E402
from convert.teachers.score_file import label_rows, read_scores  # noqa: E402
from convert.teachers.trained import TrainedTeacher, add_adapter, load_adapter, save_adapter  # noqa: E402
from edgeguard.prompt import Template  # noqa: E402
from edgeguard.taxonomy import HAZARDS  # noqa: E402

LORA = {"rank": 4, "alpha": 8, "dropout": 0.1}
FROZEN = 1
MAX_TOKENS = 64
ROWS = [
    Row(r["id"], "tiny", r["target"], r["label"], r["prompt"], r["response"], tuple(r["hazards"]))
    for r in requests("alpha", 60, 1)
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


def text_side(base: Path) -> tuple[Template, Tokenizer]:
    return chat_template(base), Tokenizer.from_str(plain_tokenizer_json(base))


def examples(base: Path) -> list[Example]:
    return encode_rows(ROWS, *text_side(base), MAX_TOKENS)


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Student, Path]:
    """A student with its adapter after a few steps, and the folder that it was saved in."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    student = add_adapter(Student.from_base(base, 3), LORA, FROZEN)
    settings = Settings(
        512, 1e-2, 1e-2, 0.1, 0, evaluate_every=100, checkpoint_every=100, steps=6, freeze_layers=FROZEN
    )
    rows = examples(base)
    Trainer(student, label_loss(0.3), rows, rows, text_side(base)[0].pad_id, settings, folder / "run").run()
    save_adapter(student, folder / "final")
    return student, folder / "final"


def logits(student: Student, base: Path) -> np.ndarray:
    return score(student, examples(base), text_side(base)[0].pad_id, bf16=False)


def test_only_the_adapter_above_the_frozen_layers_and_the_head_learn(base: Path, trained: tuple[Student, Path]) -> None:
    weights = dict(trained[0].named_parameters())
    learning = {name for name, p in weights.items() if p.requires_grad}
    adapters = {name for name in learning if "lora_" in name}
    assert learning - adapters == {"head.weight", "head.bias"}
    assert {name.split("layers.")[1].split(".")[0] for name in adapters} == {"1", "2"}
    assert len(adapters) == 2 * 7 * 2  # layers, linears, the two factors
    assert all(weights[name].abs().sum() > 0 for name in adapters)  # the second factor starts at zero
    fresh = dict(Student.from_base(base, 3).model.named_parameters())
    for name, weight in weights.items():
        if "base_layer" in name:
            plain = name.removeprefix("model.base_model.model.").replace(".base_layer", "")
            assert torch.equal(weight, fresh[plain]), name


def test_its_first_weights_are_the_seeds(base: Path) -> None:
    found, drawn = [], []
    for before, seed in ((1, 5), (2, 5), (1, 6)):
        student = Student.from_base(base, 2)
        torch.manual_seed(before)
        add_adapter(student, LORA, FROZEN, seed=seed)
        drawn.append(torch.rand(1).item())
        found.append([p for name, p in student.named_parameters() if "lora_A" in name])
    first, again, other = found
    assert len(first) == 7 and all(map(torch.equal, first, again)) and not any(map(torch.equal, first, other))
    assert drawn[0] == drawn[2] != drawn[1]  # nobody else's random numbers are touched


def test_it_comes_back_merged_and_says_the_same(base: Path, trained: tuple[Student, Path]) -> None:
    student, folder = trained
    merged, expected = load_adapter(base, folder), logits(student, base)
    assert not [name for name, _ in merged.named_parameters() if "lora" in name]
    np.testing.assert_allclose(logits(merged, base), expected, atol=1e-4)
    assert np.abs(logits(Student.from_base(base, 3), base) - expected).max() > 0.05  # training did change it


def test_it_judges_rows(base: Path, trained: tuple[Student, Path], tmp_path: Path) -> None:
    student, folder = trained
    teacher, expected = TrainedTeacher(base, folder, *text_side(base), MAX_TOKENS), logits(student, base)
    for judgement, row in zip(teacher.judge(ROWS), expected, strict=True):
        assert judgement.margin == pytest.approx(row[1] - row[0], abs=0.05)  # bfloat16
        assert list(judgement.hazards) == list(HAZARDS)
        assert list(judgement.hazards.values()) == pytest.approx(list(1 / (1 + np.exp(-row[2:]))), abs=0.01)
    assert [teacher.length(row) for row in ROWS] == [len(e.ids) for e in examples(base)]
    scores = label_rows(teacher, ROWS, tmp_path / "scores.jsonl", tokens=512)
    assert read_scores(tmp_path / "scores.jsonl") == scores and len(scores) == len(ROWS)


def test_its_name_follows_its_weights_and_its_hash_what_it_reads(base: Path, trained: tuple[Student, Path]) -> None:
    student, folder = trained
    first = TrainedTeacher(base, folder, *text_side(base), MAX_TOKENS)
    shorter = TrainedTeacher(base, folder, *text_side(base), MAX_TOKENS // 2)
    assert first.name == shorter.name and first.template_hash != shorter.template_hash
    other = folder.with_name("other")
    with torch.no_grad():
        student.head.bias.add_(1)
        save_adapter(student, other)
        student.head.bias.sub_(1)
    assert TrainedTeacher(base, other, *text_side(base), MAX_TOKENS).name != first.name


def test_a_folder_without_a_finished_teacher_is_refused(
    base: Path, trained: tuple[Student, Path], tmp_path: Path
) -> None:
    with pytest.raises(TeacherError, match="no trained teacher there. Run the step that trains it"):
        load_adapter(base, tmp_path)
    assert json.loads((trained[1] / "teacher.json").read_text())["layers"] == 3
