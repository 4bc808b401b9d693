"""Settings of a recipe: those that make no sense are refused before anything is written."""

import dataclasses
from pathlib import Path

import pytest

from nestloop import cli
from nestloop.models import settings
from nestloop.models.errors import RecipeError
from nestloop.models.recipe import Recipe
from nestloop.models.recipes.digits import recipe as digits

WRONG: list[tuple[str, object, str]] = [
    ("batch", 0, "1 or more"),
    ("batch", -4, "1 or more"),
    ("keep", 0, "1 or more"),
    ("keep", -1, "1 or more"),
    ("epochs", 0, "1 or more"),
    ("max_steps", 0, "1 or more"),
    ("workers", -1, "0 or more"),
    ("warmup_steps", -5, "0 or more"),
    ("clip", -1.0, "a number, 0 or more"),
    ("lr", 0.0, "a number above 0"),
    ("lr", float("nan"), "a number above 0"),
    ("std", 0.0, "a number above 0"),
    ("weight_decay", float("inf"), "a number, 0 or more"),
    ("ema", 1.5, "0 or more, and below 1"),
    ("label_smoothing", 2.0, "0 or more, and below 1"),
    ("betas", (0.9, 3.0), "two numbers, 0 or more, and below 1"),
    ("holdout", 2.0, "a share, between 0 and 1"),
    ("max_unreadable", -0.1, "a share, 0 to 1"),
    ("channels", 2, "1 or 3"),
    ("randaugment", (2, 99), "1 or more ops, of a magnitude of 0 to 10"),
]


@pytest.mark.parametrize(("name", "value", "need"), WRONG)
def test_a_setting_out_of_its_range_is_refused(name: str, value: object, need: str):
    shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    with pytest.raises(RecipeError) as refusal:
        dataclasses.replace(digits, **{name: value})  # type: ignore[arg-type]
    option = f"--{name.replace('_', '-')}"
    assert str(refusal.value) == f"{option} cannot be {shown}\n  given: {option} {shown}\n  need:  {need}"


def test_the_table_names_settings_of_a_recipe():
    assert set(settings.NEEDS) <= {field.name for field in dataclasses.fields(Recipe)}


def test_images_are_not_evaluated_with_margins():
    with pytest.raises(RecipeError) as refusal:
        dataclasses.replace(digits, image_size=384, eval_resize=256)
    assert str(refusal.value) == (
        "images would be evaluated with black margins\n"
        "  given: --image-size 384 --eval-resize 256\n"
        "  need:  a shorter side, before the centre is cut out, of --image-size at least\n"
        "  fix:   --eval-resize 439"
    )


def test_nothing_is_written_for_a_command_that_is_refused(tmp_path: Path, capsys):
    assert cli.main(["train", "digits", "--batch", "0", "--run-dir", str(tmp_path / "run")]) == 1
    assert "--batch cannot be 0" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_what_the_system_refuses_is_a_message(tmp_path: Path, capsys):
    (tmp_path / "file").write_text("")
    command = ["train", "digits", "--depth", "1", "--width", "16", "--heads", "1", "--run-dir", str(tmp_path / "file")]
    assert cli.main(command) == 1
    err = capsys.readouterr().err
    assert err.startswith("nestloop: the system refuses: ") and str(tmp_path / "file") in err and "Traceback" not in err
