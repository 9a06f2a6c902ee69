"""The whole conversion on a tiny base: one command, real training, real INT4, a bundle that the runtime opens."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from convert_support import write_recipe
from tiny import edit_manifest, refresh_files

torch = pytest.importorskip("torch", reason="the conversion layer needs edgeguard-runtime[convert]")
pytest.importorskip("transformers", reason="the conversion layer needs edgeguard-runtime[convert]")

from click.testing import CliRunner  # noqa: E402

from convert import steps  # noqa: E402
from convert.__main__ import main  # noqa: E402
from convert.base import plain_tokenizer_json  # noqa: E402
from convert.corpora.registry import CorpusError  # noqa: E402
from convert.distill import score  # noqa: E402
from convert.export.onnx_graph import build_guard_graph  # noqa: E402
from convert.fake_quant import enable_qat  # noqa: E402
from convert.gptq import load_weights  # noqa: E402
from convert.quantize import quantize_int4  # noqa: E402
from convert.recipe import Recipe, RecipeError, load_recipe  # noqa: E402
from convert.record import RecordError  # noqa: E402
from convert.scores import onnx_stage  # noqa: E402
from convert.smoke import requests, row, write_base, write_data, write_sets  # noqa: E402
from convert.steps.data import files_of, read_examples  # noqa: E402
from convert.steps.training import _taught_examples, blend_targets, smoothing  # noqa: E402
from convert.student import Student, StudentError  # noqa: E402
from convert.teachers.formats import TeacherError  # noqa: E402
from edgeguard import Guard  # noqa: E402
from edgeguard.bundle import sha256_of  # noqa: E402
from edgeguard.errors import ParityError  # noqa: E402


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Base, data and recipe, and the folder that one `convert run` made from them."""
    root = tmp_path_factory.mktemp("world")
    base, data = write_base(root / "base"), write_data(root / "data")
    recipe = write_recipe(root / "tiny.toml", base)
    paths = {"recipe": recipe, "build": root / "build", "models": root / "models", "data": data}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEGUARD_DATA", str(data))
        result = CliRunner().invoke(main, ["run", str(recipe), *_options(paths)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return paths


@pytest.fixture
def recipe(world: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setenv("EDGEGUARD_DATA", str(world["data"]))
    return load_recipe(world["recipe"], world["build"], world["models"])


def _options(paths: dict[str, Path]) -> list[str]:
    return [part for name in ("build", "models", "data") for part in (f"--{name}", str(paths[name]))]


def test_the_bundle_loads_and_tells_the_labels_apart(recipe: Recipe) -> None:
    guard = Guard.load(recipe.models / recipe.name)
    rows = [r for r in requests("gamma", 60, 3) if r["response"] is None]
    verdicts = guard.classify_many([r["prompt"] for r in rows])
    right = np.mean([v.unsafe == (r["label"] == "unsafe") for v, r in zip(verdicts, rows, strict=True)])
    assert right > 0.9


def test_the_report_is_what_the_runtime_says(recipe: Recipe) -> None:
    folder = recipe.models / recipe.name
    report = json.loads((folder / "report.json").read_text())
    entry = report["stages"]["student-int4-onnx"]["sets"]["tiny_test"]["points"]["balanced"]
    guard = Guard.load(folder)
    rows = requests("gamma", 60, 3)
    verdicts = guard.classify_many([{"prompt": r["prompt"], "response": r["response"]} for r in rows])
    caught = sum(v.unsafe for v, r in zip(verdicts, rows, strict=True) if r["label"] == "unsafe")
    assert entry["n"] == 60
    assert caught / 30 == pytest.approx(entry["recall"], abs=1 / 30)  # a margin at the threshold may fall either way
    assert report["stages"]["student-int4-onnx"]["sets"]["tiny_unsafe"]["points"]["balanced"]["f1"] is None
    assert set(report["lost"]["student-int4-onnx"]["fp32"]["by_set"]) == {"tiny_test"}


def test_card_plots_and_records_are_in_the_bundle(recipe: Recipe) -> None:
    folder = recipe.models / recipe.name
    card = (folder / "MODEL_CARD.md").read_text()
    assert "tiny_test" in card and "python -m convert run" in card
    for name in ("curves.png", "reliability.png", "train_loss.png", "qat_loss.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["provenance"]["recipe_sha256"] == recipe.sha256
    assert manifest["provenance"]["data_sha256"] == json.loads((folder / "data_manifest.json").read_text())["sha256"]


def test_int8_files_are_made_and_measured_anew(recipe: Recipe, world: dict[str, Path], tmp_path: Path) -> None:
    """Of a bundle as an older version left it; its weights and the figures of its other stages stay."""
    models = tmp_path / "models"
    bundle = Path(shutil.copytree(recipe.models / recipe.name, models / recipe.name))
    before = {path.name: path.read_bytes() for path in bundle.iterdir()}
    report = json.loads(before["report.json"])
    for name in ("model.int8.onnx", "model.int8.json"):
        (bundle / name).write_bytes(b"old")
    (bundle / "model.int8.unsigned.onnx").unlink()
    edit_manifest(bundle, lambda manifest: manifest["files"].pop("model.int8.unsigned.onnx"))
    refresh_files(bundle)
    newer = tmp_path / "tiny.toml"
    newer.write_text(world["recipe"].read_text().replace('version = "0.0.1"', 'version = "0.0.2"'))
    paths = {"build": world["build"], "models": models, "data": world["data"]}
    result = CliRunner().invoke(main, ["renew", str(newer), *_options(paths)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    kept = {name for name in before if (bundle / name).read_bytes() == before[name]}
    assert kept >= {"model.onnx", "tokenizer.json", "curves.png"}
    # Smoothing is measured on the INT4 student here, on the float32 one there: other bytes, and the same verdicts.
    found = json.loads((bundle / "report.json").read_text())
    assert found["int8"].pop("command") == "python -m convert renew recipes/tiny.toml"
    assert found["int8"]["rows"] == report["int8"]["rows"] and found["int8"]["max_abs_diff"] < 0.3
    stages = [{**r["stages"], "student-int8-onnx": None} for r in (found, report)]
    assert stages[0] == stages[1] and set(found["stages"]) == set(report["stages"])
    assert found["parity"]["student-int8-onnx"]["reference"] == "student-int4-qat"
    assert "convert renew" in (bundle / "RECORD.md").read_text()
    assert Guard.load(bundle, engine="onnx-int8").bundle.label.endswith("@0.0.2")


def test_a_bundle_measured_on_other_rows_is_not_renewed(recipe: Recipe, tmp_path: Path) -> None:
    models = tmp_path / "models"
    bundle = Path(shutil.copytree(recipe.models / recipe.name, models / recipe.name))
    report = json.loads((bundle / "report.json").read_text())
    report["calibration_data"]["sha256"] = "0" * 64
    (bundle / "report.json").write_text(json.dumps(report))
    refresh_files(bundle)
    before = {path.name: path.read_bytes() for path in bundle.iterdir()}
    with pytest.raises(RecordError, match="made on other calibration rows. Measure every stage"):
        steps.renew(load_recipe(recipe.path, recipe.build, models))
    assert {path.name: path.read_bytes() for path in bundle.iterdir()} == before


def test_finished_steps_are_kept(recipe: Recipe) -> None:
    stamps = {path: path.stat().st_mtime_ns for path in recipe.build.rglob("*.safetensors")}
    assert steps.export(recipe).is_file() and stamps
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_a_changed_recipe_does_not_reuse_old_results(recipe: Recipe, world: dict[str, Path], tmp_path: Path) -> None:
    changed = tmp_path / "tiny.toml"
    changed.write_text(world["recipe"].read_text().replace("learning_rate = 3e-3", "learning_rate = 4e-3"))
    with pytest.raises(RecipeError, match="made from other settings"):
        steps.train(load_recipe(changed, world["build"], world["models"]))


def test_what_a_step_was_made_from_is_the_recipes_own_table(recipe: Recipe) -> None:
    def kept(step: str) -> Any:
        return json.loads((recipe.build / step / "inputs.json").read_text())

    assert kept("corpus") == {"corpus": recipe.corpus, "files": files_of(recipe.corpus["sets"])}
    assert kept("teacher") == {
        **{k: recipe.teacher[k] for k in ("base", "layers", "train")},
        "data": kept("train")["data"],
    }
    assert {"student": recipe.student, "base": recipe.base}.items() <= kept("student").items()
    assert {"train": recipe.train, "distill": recipe.distill}.items() <= kept("train").items()
    assert [kept(step)[step] for step in ("qat", "gptq", "tune")] == [recipe.qat, recipe.gptq, recipe.tune]
    assert kept("export")["export"] == recipe.export
    done = json.loads((recipe.build / "scores.done.json").read_text())
    assert done["teacher"] == recipe.teacher
    assert done["asked"] == {
        **{k: recipe.distill[k] for k in ("unlabelled", "judged")},
        "data": kept("train")["data"],
        "files": files_of(recipe.distill["unlabelled"]),
    }


def test_a_step_that_made_nothing_takes_other_settings(recipe: Recipe, tmp_path: Path) -> None:
    """What a mix of unusable sets has left behind must not stand in the way of the corrected recipe."""
    text = recipe.path.read_text()
    (tmp_path / "wrong.toml").write_text(text.replace("tiny_train =", "tiny_test ="))
    with pytest.raises(CorpusError, match="tiny_test: role test"):
        steps.corpus(load_recipe(tmp_path / "wrong.toml", tmp_path / "build"))
    assert steps.corpus(load_recipe(recipe.path, tmp_path / "build")).is_file()
    with pytest.raises(RecipeError, match="made from other settings"):
        steps.corpus(load_recipe(tmp_path / "wrong.toml", tmp_path / "build"))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "tiny_unsafe: expected rows with a label, found none"),
        ([row("tiny_unsafe", 0, "How do I rob the old shop?", None)], "tiny_unsafe: expected rows with a label"),
    ],
)
def test_a_test_set_without_labels_is_refused_before_training(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[Any], message: str
) -> None:
    known = {r: requests(r, 60, 9 + i) for i, r in enumerate(("tiny_test", "tiny_calibration", "tiny_train"))}
    sets = {name: ({"role": name.removeprefix("tiny_")}, found) for name, found in known.items()}
    monkeypatch.setenv("EDGEGUARD_DATA", str(write_sets(tmp_path, {**sets, "tiny_unsafe": ({"role": "test"}, rows)})))
    with pytest.raises(CorpusError, match=message):
        steps.corpus(load_recipe(recipe.path, tmp_path / "build"))
    assert not (tmp_path / "build" / "corpus" / "mix.jsonl.gz").exists()


def test_a_test_set_of_one_class_has_no_curve(recipe: Recipe, tmp_path: Path) -> None:
    recipe.evaluate["curves"] = ["tiny_test", "tiny_unsafe"]
    with pytest.raises(RecipeError, match=r"\[evaluate\] curves: tiny_unsafe has rows of one class"):
        steps.corpus(replace(recipe, build=tmp_path))


def test_a_mix_of_a_set_that_was_corrected_is_not_reused(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(recipe.build / "corpus", tmp_path / "build" / "corpus")
    data = write_data(tmp_path / "data")
    rows = gzip.decompress((data / "train" / "tiny_train.jsonl.gz").read_bytes()).replace(b'"unsafe"', b'"safe"', 1)
    (data / "train" / "tiny_train.jsonl.gz").write_bytes(gzip.compress(rows))
    sets = json.loads((data / "sets.json").read_text())
    sets["tiny_train"]["sha256"] = hashlib.sha256(rows).hexdigest()
    (data / "sets.json").write_text(json.dumps(sets))
    monkeypatch.setenv("EDGEGUARD_DATA", str(data))
    with pytest.raises(RecipeError, match="made from other settings"):
        steps.corpus(replace(recipe, build=tmp_path / "build"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 9}, "layers = 9: the base has 3"),
        ({"intermediate_size": 4096}, "intermediate_size = 4096: the base has"),
        ({"layers": 9, "choose_layers": "lowest"}, "layers = 9: .* has 3"),
    ],
)
def test_more_than_the_base_has_is_refused(
    recipe: Recipe, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    for folder in ("corpus", "base", "trimmed"):
        shutil.copytree(recipe.build / folder, tmp_path / folder)
    with pytest.raises(StudentError, match=message):
        steps.student(replace(recipe, build=tmp_path, student={**recipe.student, **changes}))


def test_only_the_rows_that_the_recipe_asks_for_are_taught(recipe: Recipe, tmp_path: Path) -> None:
    build = Path(shutil.copytree(recipe.build, tmp_path / "build"))
    fewer = replace(recipe, build=build, distill={**recipe.distill, "judged": 50})
    rows = _taught_examples(fewer, 64, steps.trimmed_base(fewer))
    assert sum(row.teacher is not None for row in rows) == 50
    scores = tmp_path / "scores.jsonl"
    scores.write_text((build / "scores.jsonl").read_text().replace('{"id": "', '{"id": "other'))
    foreign = replace(fewer, teacher={"kind": "scores", "file": str(scores)})
    with pytest.raises(TeacherError, match="has a score of none of the"):
        _taught_examples(foreign, 64, steps.trimmed_base(fewer))


def test_a_base_that_no_container_holds_is_refused_before_training(recipe: Recipe, tmp_path: Path) -> None:
    from transformers import AutoConfig, LlamaForCausalLM

    base = shutil.copytree(recipe.base["folder"], tmp_path / "base")
    config = AutoConfig.from_pretrained(base)
    config.attention_bias = True
    LlamaForCausalLM(config).save_pretrained(base)
    write_recipe(tmp_path / "biased.toml", base)
    shutil.copytree(recipe.build / "corpus", tmp_path / "build" / "corpus")
    with pytest.raises(StudentError, match=r"self_attn\.q_proj\.bias as nothing, this base has \(64,\) \(and 11 more"):
        steps.student(load_recipe(tmp_path / "biased.toml", tmp_path / "build"))
    assert not (tmp_path / "build" / "student" / "student.safetensors").exists()


def _next(recipe: Recipe, folder: Path, changes: tuple[str, str] = ("", "")) -> Recipe:
    """A recipe that starts from ``recipe``'s student, whose results it finds made."""
    text = recipe.path.read_text()
    (folder / "tiny.toml").write_text(text)
    text = text.replace("[student]", '[student]\nstart_from = "tiny.toml"')
    (folder / "next.toml").write_text(text.replace(*changes))
    shutil.copytree(recipe.build, folder / "build" / "start", dirs_exist_ok=True)
    return load_recipe(folder / "next.toml", folder / "build", folder / "models")


def test_training_starts_from_another_recipes_student(recipe: Recipe, tmp_path: Path) -> None:
    following = _next(recipe, tmp_path)
    assert steps.student(following) == tmp_path / "build" / "start" / "train" / "final"
    assert not (tmp_path / "build" / "student").exists()


def test_a_trimmed_start_brings_its_own_vocabulary(recipe: Recipe, tmp_path: Path) -> None:
    following = _next(recipe, tmp_path, ("creative = 10", "creative = 20"))
    assert steps.trimmed_base(following) == tmp_path / "build" / "start" / "trimmed"


def _going_on(recipe: Recipe, folder: Path, layers: int = 2) -> tuple[Recipe, Student]:
    """A recipe that starts from a bundle of its base's lowest two layers, and the student in that bundle."""
    base = Path(recipe.base["folder"])
    held = Student.from_base(base, 2)
    torch.nn.init.normal_(held.head.weight)
    bundle = shutil.copytree(recipe.models / recipe.name, folder / "bundle")
    integers = {
        n: quantize_int4(w) if w.ndim == 2 and n != "head.weight" else w for n, w in held.numpy_weights().items()
    }
    model = build_guard_graph(integers, held.onnx_config(64), labels=held.labels)
    (bundle / "model.onnx").write_bytes(model.SerializeToString())
    (bundle / "tokenizer.json").write_text(plain_tokenizer_json(base), encoding="utf-8")
    refresh_files(bundle)
    start = f'start_bundle = {{ bundle = "bundle", manifest_sha256 = "{sha256_of(bundle / "manifest.json")}" }}'
    head, rest = recipe.path.read_text().split("[student]")
    (folder / "on.toml").write_text(f"{head}[student]\nlayers = {layers}\n{start}\n{rest[rest.index('max_tokens') :]}")
    return load_recipe(folder / "on.toml", _with_corpus(recipe, folder / "build"), folder / "models"), load_weights(
        held, integers
    )


def test_training_starts_from_a_bundle(recipe: Recipe, tmp_path: Path) -> None:
    following, held = _going_on(recipe, tmp_path)
    started = Student.load(steps.student(following)).state_dict()
    assert {n: w.tolist() for n, w in started.items()} == {n: w.tolist() for n, w in held.state_dict().items()}
    shutil.rmtree(tmp_path / "bundle")  # what was made of it stays; a new version may take its place
    assert steps.student(following) == tmp_path / "build" / "student"
    named = following.student["start_bundle"]
    moved = replace(following, student={**following.student, "start_bundle": {**named, "bundle": "elsewhere"}})
    assert steps.student(moved) == tmp_path / "build" / "student"  # the checksum says which bundle, not the place
    other = replace(following, student={**moved.student, "start_bundle": {**named, "manifest_sha256": "0" * 64}})
    with pytest.raises(RecipeError, match="made from other settings"):
        steps.student(other)
    with pytest.raises(RecipeError, match=r"on.toml: \[student\] start_bundle: .*elsewhere"):
        steps.student(replace(moved, build=_with_corpus(recipe, tmp_path / "again")))


def test_another_bundle_to_start_from_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    following, _ = _going_on(recipe, tmp_path)
    manifest = tmp_path / "bundle" / "manifest.json"
    manifest.write_text(manifest.read_text() + " ")
    with pytest.raises(RecipeError, match=r"start_bundle: the manifest in .* has the SHA-256 .* the recipe names"):
        steps.student(following)
    manifest.write_text(manifest.read_text()[:-1])
    shutil.copy(recipe.models / recipe.name / "tokenizer.json", tmp_path / "bundle" / "tokenizer.json")  # trimmed
    refresh_files(tmp_path / "bundle")
    renamed = replace(
        following,
        student={**following.student, "start_bundle": {"bundle": "bundle", "manifest_sha256": sha256_of(manifest)}},
    )
    with pytest.raises(StudentError, match="has another tokenizer than the base example/tiny"):
        steps.student(replace(renamed, build=_with_corpus(recipe, tmp_path / "again")))


def test_a_bundle_of_another_shape_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    following, _ = _going_on(recipe, tmp_path, layers=3)
    with pytest.raises(StudentError, match=r"holds StudentConfig\(.*num_layers=2.* say StudentConfig\(.*num_layers=3"):
        steps.student(following)
    assert not (following.build / "student" / "student.safetensors").exists()


def _with_corpus(recipe: Recipe, build: Path) -> Path:
    shutil.copytree(recipe.build / "corpus", build / "corpus")
    return build


def test_a_start_of_another_shape_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"starts from tiny\.toml, so \[base\] and \[student\] must be as there"):
        _next(recipe, tmp_path, ("layers = 2", "layers = 1"))


def test_the_target_lies_between_the_teacher_and_the_start(recipe: Recipe, tmp_path: Path) -> None:
    from convert.distill import score
    from convert.student import Student

    source = steps.trimmed_base(recipe)
    rows = read_examples(recipe, "validation", 48, source)[:6]
    pad_id, pupil = steps.text_side(source)[0].pad_id, Student.load(steps.train(recipe))
    own = score(pupil, rows, pad_id, bf16=True)
    taught = [replace(row, teacher=2.0 if i % 2 else None) for i, row in enumerate(rows)]
    kept = tmp_path / "margins.npz"
    blended = blend_targets(pupil, taught, pad_id, 0.25, kept)
    assert [row.teacher is None for row in blended] == [True, False] * 3
    wanted = [1.5 + 0.25 * (own[i, 1] - own[i, 0]) for i in (1, 3, 5)]
    assert [row.teacher for row in blended[1::2]] == pytest.approx(wanted, abs=0.05)  # bf16, other batches
    np.savez(kept, margins=np.zeros(3))  # a resumed run keeps the targets that it began with
    assert [row.teacher for row in blend_targets(pupil, taught, pad_id, 0.25, kept)[1::2]] == [1.5] * 3


@pytest.mark.parametrize("road", ["gptq", "tune"])
def test_the_integers_of_gptq_ship_as_they_are(
    road: str, recipe: Recipe, world: dict[str, Path], tmp_path: Path
) -> None:
    """Rounding GPTQ's values again would undo it: file, plan and torch must hold the integers that it chose."""
    from convert.quantize import Int4Weight, quantize_int4, read_int4
    from convert.student import Student
    from edgeguard.engines.gguf_source import read_onnx

    text = world["recipe"].read_text()
    start = text.index("[qat]")
    without_qat = text[:start] + text[text.index("\n[", start) + 1 :]
    (tmp_path / "gptq.toml").write_text(without_qat.replace("[export]\n", f'[export]\nroad = "{road}"\n'))
    for step in ("corpus", "train", "gptq", "tune", "student", "teacher"):
        shutil.copytree(recipe.build / step, tmp_path / "build" / step)
    for name in ("scores.jsonl", "scores.done.json"):
        shutil.copy(recipe.build / name, tmp_path / "build" / name)
    chosen = load_recipe(tmp_path / "gptq.toml", tmp_path / "build", tmp_path / "models")
    exported = read_onnx(steps.export(chosen)).weights
    folder = getattr(steps, road)(chosen)
    integers, values = read_int4(folder / "int4.npz"), Student.load(folder).numpy_weights()
    moved = 0
    for name, weight in integers.items():
        found = exported[name]
        assert isinstance(found, Int4Weight)
        np.testing.assert_array_equal(found.nibbles, weight.nibbles)
        np.testing.assert_array_equal(found.scales, weight.scales)
        np.testing.assert_array_equal(weight.dequantize(), values[name])
        moved += int((quantize_int4(values[name]).nibbles != weight.nibbles).sum())
    assert moved > 0
    assert not (tmp_path / "build" / "qat").exists()
    rounded = read_int4(steps.gptq(chosen) / "int4.npz")
    same = [np.array_equal(weight.scales, rounded[name].scales) for name, weight in integers.items()]
    assert all(same) if road == "gptq" else not any(same)
    assert all(np.array_equal(weight.nibbles, rounded[name].nibbles) for name, weight in integers.items())


def test_an_export_that_differs_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    from convert.student import Student

    build = tmp_path / "build"
    shutil.copytree(recipe.build, build)
    shutil.rmtree(build / "export")
    strict = load_recipe(recipe.path, build, tmp_path / "models")
    strict.export["tolerance"] = 0.0
    with pytest.raises(ParityError, match="does not reproduce"):
        steps.export(strict)
    assert not list((build / "export").glob("*.onnx"))
    assert isinstance(Student.load(build / "qat" / "final"), Student)


def test_what_ships_is_what_was_trained(recipe: Recipe) -> None:
    """The student in quantization-aware training and the INT4 file answer alike."""
    final, base = steps.qat(recipe), steps.trimmed_base(recipe)
    rows, pad_id = read_examples(recipe, "validation", 64, base), steps.text_side(base)[0].pad_id
    trained = Student.load(final)
    enable_qat(trained.model, shifts=smoothing(recipe, steps.train(recipe)))
    wanted = score(trained, rows, pad_id, bf16=False)
    found = onnx_stage("onnx", steps.export(recipe), pad_id).logits(rows)
    assert len(rows) > 5 and 0 < np.abs(found - wanted).max() < 0.5
    before = score(Student.load(final), rows, pad_id, bf16=False)  # the weights that rounding starts from
    assert np.abs(found - wanted).mean() < np.abs(found - before).mean()


def test_unknown_recipe_and_keys_are_named(tmp_path: Path, world: dict[str, Path]) -> None:
    with pytest.raises(RecipeError, match=r"recipes/mini\.toml"):
        load_recipe(tmp_path / "none.toml")
    odd = tmp_path / "odd.toml"
    odd.write_text(world["recipe"].read_text().replace("[qat]", "[quat]"))
    with pytest.raises(RecipeError, match=r"\[quat\]: no such key.*nearest is qat"):
        load_recipe(odd)
    result = CliRunner().invoke(main, ["train", str(odd)])
    assert result.exit_code == 1 and "the nearest is qat" in result.output
