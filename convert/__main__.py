"""``python -m convert STEP recipes/NAME.toml``: makes a guard, step by step; every step resumes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import click

from convert.corpora.registry import DATA_VARIABLE, load_sets, origin_urls
from convert.recipe import load_recipe
from edgeguard.errors import EdgeguardError

ROOT = Path(__file__).resolve().parent.parent


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Make a guard: a small INT4 student from a teacher, base weights and labelled sets.

    Steps, in order: base, corpus, teacher, label, student, train, qat, gptq, tune, export, evaluate, package; `run`
    does them all. Each keeps its result in build/RECIPE and is skipped when that is there; an interrupted step goes
    on where it was.

    \b
    python -m convert run recipes/mini.toml          makes models/edgeguard-mini
    python -m convert train recipes/mini.toml        up to this step only
    python -m convert run recipes/mini.toml --smoke  the same chain in minutes, to see that it works here
    python -m convert transcode models/edgeguard-mini mini.gguf   the same weights for llama.cpp
    python -m convert corpora                        the known sets and where they are published
    """  # noqa: D301 - click reads \b


def _step(name: str, help_text: str) -> None:
    @main.command(name, help=help_text)
    @click.argument("recipe", type=click.Path(path_type=Path))
    @click.option("--build", type=click.Path(file_okay=False, path_type=Path), help="Working folder [build/RECIPE].")
    @click.option("--models", type=click.Path(file_okay=False, path_type=Path), help="Where the bundle goes [models/].")
    @click.option("--data", type=click.Path(exists=True, file_okay=False), help=f"Labelled sets [${DATA_VARIABLE}].")
    @click.option("--smoke", is_flag=True, help="Try the chain: tiny random base, made-up rows.")
    def command(recipe: Path, build: Path | None, models: Path | None, data: str | None, smoke: bool) -> None:
        from convert import steps

        if data:
            os.environ[DATA_VARIABLE] = data
        try:
            loaded = load_recipe(recipe, build, models)
            if smoke:
                from convert.smoke import shrink

                loaded = shrink(loaded)
            click.echo(getattr(steps, name)(loaded))
        except EdgeguardError as error:
            raise click.ClickException(str(error)) from error


for _name, _help in {
    "base": "Fetch the base model and check its checksum.",
    "corpus": "Build the training mix and put the calibration split aside.",
    "student": "Cut the student out of its base: vocabulary, layers, neurons, head.",
    "teacher": "Train the teacher, where the recipe trains one.",
    "label": "Let the teacher score the rows that the student learns from.",
    "train": "Train the float32 student on the teacher's scores and the labels.",
    "qat": "Quantization-aware steps on the INT4 grid, where the recipe says so.",
    "gptq": "Round the float32 student to the INT4 grid with GPTQ, where the recipe says so.",
    "tune": "Train the scales of GPTQ's integers, the norms and the head, where the recipe says so.",
    "export": "Write the INT4 containers and compare them with the torch model.",
    "evaluate": "Calibrate, choose operating points, measure every test set.",
    "package": "Write the bundle, its card, report and plots.",
    "run": "All steps in order.",
    "renew": "Make and measure the packaged bundle's INT8 files anew, from its INT4 weights; all else stays.",
}.items():
    _step(_name, _help)


@main.command()
@click.option("--role", help="Only sets of this role (train, test, calibration, unlabelled, injection).")
def corpora(role: str | None) -> None:
    """List the known sets: role, commercial use, rows, licence, origin."""
    try:
        sets = load_sets()
    except EdgeguardError as error:
        raise click.ClickException(str(error)) from error
    for entry in sets.values():
        if role in (None, entry.role):
            urls = " ".join(origin_urls(entry))
            click.echo(f"{entry.role}\t{entry.name}\t{entry.commercial}\t{entry.rows}\t{entry.license}\t{urls}")


@main.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Also write the JSON here.")
def sizes(recipe: Path, output: Path | None) -> None:
    """Bytes of every container of the [shape] of a RECIPE: real files of random weights, deleted again."""
    from convert.export.shape_sizes import measure_sizes
    from convert.files import write_json

    try:
        loaded = load_recipe(recipe)
        if not loaded.shape:
            raise click.ClickException(f"{loaded.path.name} has no [shape].")
        record = measure_sizes(loaded.shape)
    except EdgeguardError as error:
        raise click.ClickException(str(error)) from error
    if output:
        write_json(output, record)
    click.echo(json.dumps(record, indent=1))


@main.command()
@click.argument("new", type=click.Path(path_type=Path))
@click.argument("old", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Also write the JSON here.")
def compare(new: Path, old: Path, output: Path | None) -> None:
    """Whether the guard of recipe NEW beats that of recipe OLD: AUPRC, and false alarms at the same recall."""
    from convert.compare import compare_recipes, comparison_markdown
    from convert.files import write_json

    try:
        found = compare_recipes(load_recipe(new), load_recipe(old))
    except EdgeguardError as error:
        raise click.ClickException(str(error)) from error
    if output:
        write_json(output, found)
    click.echo(comparison_markdown(found))


@main.command()
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("gguf", type=click.Path(dir_okay=False, path_type=Path))
def transcode(bundle: Path, gguf: Path) -> None:
    """Write the weights of BUNDLE's ONNX file as GGUF, integer for integer, for llama.cpp."""
    from edgeguard.bundle import Bundle
    from edgeguard.export.gguf_transcode import bundle_to_gguf

    try:
        bundle_to_gguf(Bundle.open(bundle), gguf)
    except EdgeguardError as error:
        raise click.ClickException(str(error)) from error
    click.echo(gguf)


@main.command()
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--rows", default=1000, show_default=True, type=click.IntRange(1), help="Public rows to judge.")
@click.option("--set", "sets", multiple=True, help="Draw from this labelled set (may be repeated); else from five.")
@click.option("--build", type=click.Path(file_okay=False, path_type=Path), help="Working folder [build/parity].")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Also write the JSON here.")
def parity(bundle: Path, rows: int, sets: tuple[str, ...], build: Path | None, output: Path | None) -> None:
    """Whether the containers of BUNDLE judge alike: ONNX, INT8 compute, GGUF, standard operators.

    What each answered is kept; an interrupted run goes on with the next container.
    """
    from convert.files import write_json
    from convert.parity import SETS, bundle_parity, parity_markdown, public_rows

    try:
        record = bundle_parity(bundle, public_rows(sets or SETS, rows), build or ROOT / "build" / "parity")
    except EdgeguardError as error:
        raise click.ClickException(str(error)) from error
    if output:
        write_json(output, record)
    click.echo(parity_markdown(record))


@main.command()
@click.option("--check", is_flag=True, help="Write nothing; fail when README.md is not what the records say.")
def readme(check: bool) -> None:
    """Fill the tables of README.md from the records of the shipped bundle."""
    from convert.files import write_whole
    from convert.readme import ReadmeError, render

    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    try:
        rendered = render(text)
    except ReadmeError as error:
        raise click.ClickException(str(error)) from error
    if check and rendered != text:
        raise click.ClickException("README.md is not what the records say. Run `python -m convert readme`.")
    if not check:
        write_whole(path, lambda part: part.write_text(rendered, encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main())
