"""A turned student answers as before; its norms have no weights left, and no channel of its stream stands out."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch", reason="the conversion layer needs edgeguard-runtime[convert]")
pytest.importorskip("transformers", reason="the conversion layer needs edgeguard-runtime[convert]")

from torch import Tensor  # noqa: E402

from convert.rotate import rotate_residual, rotation  # noqa: E402
from convert.smoke import llama_config  # noqa: E402
from convert.student import Student  # noqa: E402


@pytest.fixture
def student() -> Student:
    """A random student with norms that weigh channels and one channel of the stream that stands out."""
    torch.manual_seed(0)
    made = Student(llama_config(96, hidden_size=96, attn_implementation="eager")).eval()
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "norm" in name:
                weight.uniform_(0.2, 3)
        made.head.weight.normal_()
        made.model.embed_tokens.weight.normal_()
        made.model.embed_tokens.weight[:, 5] *= 50
    return made


def logits(student: Student) -> Tensor:
    ids = torch.arange(60).reshape(3, 20)
    with torch.no_grad():
        found: Tensor = student(ids, torch.ones_like(ids))
    return found


def test_a_turned_student_answers_as_before(student: Student) -> None:
    before = logits(student)
    turned = rotate_residual(copy.deepcopy(student))
    torch.testing.assert_close(logits(turned), before, rtol=1e-4, atol=1e-4)
    assert (turned.model.layers[0].mlp.up_proj.weight - student.model.layers[0].mlp.up_proj.weight).abs().max() > 0.01


def test_norms_have_no_weights_left(student: Student) -> None:
    rotate_residual(student)
    norms = [weight for name, weight in student.named_parameters() if "norm" in name]
    assert len(norms) == 5
    assert all((weight == 1).all() for weight in norms)


def test_no_channel_of_the_embedding_stands_out(student: Student) -> None:
    sizes = student.model.embed_tokens.weight.abs().amax(0)
    assert sizes.max() > 20 * sizes.median()
    turned = rotate_residual(student).model.embed_tokens.weight.abs().amax(0)
    assert turned.max() < 4 * turned.median()


@pytest.mark.parametrize("width", [1, 64, 96, 45])
def test_a_rotation_is_orthogonal_and_a_function_of_its_seed(width: int) -> None:
    turn = rotation(width, 3)
    torch.testing.assert_close(turn.T @ turn, torch.eye(width, dtype=torch.float64))
    assert torch.equal(turn, rotation(width, 3))
    assert width == 1 or not torch.equal(turn, rotation(width, 4))


def test_a_power_of_two_is_mixed_evenly() -> None:
    torch.testing.assert_close(rotation(64, 0).abs(), torch.full((64, 64), 1 / 8, dtype=torch.float64))
