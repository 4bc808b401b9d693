"""Recipes: the paper's settings, overriding from the command line, a user's own file, what they promise."""

import dataclasses
from pathlib import Path

import pytest

from nestloop.models import recipes
from nestloop.models import train as training
from nestloop.models.errors import RecipeError, UnknownRecipeError
from nestloop.models.logbook import read_log
from nestloop.models.recipe import Recipe
from nestloop.models.recipes.digits import recipe as digits

NAMES = ["cifar10-patch", "cifar10-pixel", "digits", "imagenet-patch", "imagenet-pixel"]


@pytest.fixture
def trained(monkeypatch) -> list[tuple[Recipe, Path]]:
    """What `main` would have trained."""
    calls: list[tuple[Recipe, Path]] = []

    def train(recipe: Recipe, run_dir: Path) -> training.Run:
        calls.append((recipe, run_dir))
        return training.Run(None, run_dir, [{"kind": "eval"}])  # type: ignore[arg-type]

    monkeypatch.setattr(training, "train", train)
    return calls


def test_the_recipes_are_there_by_either_spelling():
    assert recipes.names() == NAMES
    for name in NAMES:
        assert recipes.load(name) == recipes.load(name.replace("-", "_"))


@pytest.mark.parametrize("name", NAMES)
def test_each_states_its_command_cost_and_expected_result_and_builds_its_model(name):
    stem, recipe, description = recipes.load(name)
    assert stem == name.replace("-", "_")
    for part in ("command", "cost", "expected"):
        assert f"\n{part}" in description
    assert f"train {name}" in description
    assert "2310.13807" in description or name == "digits"
    model = dataclasses.replace(recipe, depth=1, backend="reference", recompute=False).create_model(7)
    assert model.head.out_features == 7


@pytest.mark.parametrize(
    ("name", "model", "own"),
    [
        ("imagenet-patch", "vit_s16_mttt_mlp", {"randaugment": (2, 10), "mixup": 0.2}),
        ("imagenet-pixel", "vit_ti1_mttt_mlp_sgd4", {"randaugment": None, "mixup": 0.0}),
    ],
)
def test_imagenet_has_the_papers_settings(name, model, own):
    recipe = recipes.load(name)[1]
    settings = {
        **{"model": model, "epochs": 90, "batch": 1024, "lr": 1e-3, "warmup_steps": 10_000, "clip": 1.0},
        **{"weight_decay": 1e-4, "betas": (0.9, 0.999), "crop": "inception", "flip": True},
        **{"image_size": 224, "eval_resize": 256, "label_smoothing": 0.0, **own},
    }
    assert {key: getattr(recipe, key) for key in settings} == settings


def test_any_key_is_replaced_on_the_command_line(trained, capsys):
    argv = "--epochs 3 --model vit_s16_mttt_mlp --data PLACE --mixer self_attention --no-flip --randaugment None"
    assert training.main("imagenet-patch", argv.split()) == 0
    recipe, run_dir = trained[0]
    expected = dataclasses.replace(
        recipes.load("imagenet-patch")[1],
        epochs=3,
        model="vit_s16_mttt_mlp",
        data="PLACE",
        mixer="self_attention",
        flip=False,
        randaugment=None,
    )
    assert recipe == expected and run_dir == Path("runs/imagenet_patch")
    assert capsys.readouterr().out == "log and checkpoints are in runs/imagenet_patch\n"


def test_an_unknown_key_is_wrong_usage(trained, capsys):
    with pytest.raises(SystemExit) as exit:
        training.main("digits", ["--epoch", "3"])
    assert exit.value.code == 2 and not trained
    assert "--epochs" in capsys.readouterr().err


def test_an_unknown_recipe_lists_the_names():
    with pytest.raises(UnknownRecipeError) as error:
        training.main("digit", [])
    assert str(error.value) == (
        "there is no recipe 'digit'\n"
        "  need:  one of cifar10-patch, cifar10-pixel, digits, imagenet-patch, imagenet-pixel, "
        "or the path of your own recipe file, NAME.py"
    )


def test_a_users_own_file(tmp_path, trained):
    path = tmp_path / "mine.py"
    path.write_text(
        '"""Mine."""\n'
        "import dataclasses\n"
        "from nestloop.models.recipes.digits import recipe as digits\n"
        "recipe = dataclasses.replace(digits, epochs=2)\n"
    )
    assert training.main(str(path), ["--batch", "16"]) == 0
    assert trained[0] == (dataclasses.replace(digits, epochs=2, batch=16), Path("runs/mine"))

    path.write_text("recipe = {'epochs': 2}\n")
    with pytest.raises(RecipeError) as error:
        training.main(str(path), [])
    assert str(error.value) == (
        f"{path} defines no recipe\n"
        "  given: recipe = {'epochs': 2}\n"
        "  need:  recipe = Recipe(data=..., model=..., ...)\n"
        "  fix:   from nestloop.models.recipes import Recipe"
    )
    with pytest.raises(UnknownRecipeError, match="there is no recipe file"):
        recipes.load(str(tmp_path / "absent.py"))


def test_the_gain_scales_the_views_alone():
    import torch

    def weights(gain: float) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        recipe = dataclasses.replace(digits, view_gain=gain, depth=1, backend="reference")
        return dict(recipe.create_model(10).named_parameters())

    plain, scaled = weights(1.0), weights(2.0)
    changed = {name for name in plain if not torch.equal(plain[name], scaled[name])}
    assert changed == {"blocks.0.mixer.views.k.weight", "blocks.0.mixer.views.q.weight"}
    assert all(torch.equal(2 * plain[name], scaled[name]) for name in changed)


def test_the_gain_scales_the_projection_of_a_view_with_maps_once(monkeypatch):
    import torch

    import nestloop as nl
    from nestloop import zoo
    from nestloop.models import mixers

    class Maps(zoo.MTTTLinear):
        k = nl.view("d", of=nl.project(rank=3), make=[nl.conv(4), nl.rms_norm(), nl.affine()])
        q = nl.view("d", of=nl.rms_norm(), bias=True)

    monkeypatch.setitem(mixers.MIXERS, "maps", Maps)

    def weights(gain: float) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        recipe = dataclasses.replace(digits, mixer="maps", view_gain=gain, depth=1, backend="reference")
        return dict(recipe.create_model(10).named_parameters())

    plain, scaled = weights(1.0), weights(2.0)
    changed = {name for name in plain if not torch.equal(plain[name], scaled[name])}
    assert changed == {f"blocks.0.mixer.views.{name}.weight" for name in ("k.project.up", "q.project")}
    assert all(torch.equal(2 * plain[name], scaled[name]) for name in changed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "data", "flags"),
    [
        ("cifar10-patch", "", "--width 32 --heads 2 --batch 8 --eval-batch 100"),
        ("imagenet-patch", "imagenet-sample", "--width 24 --heads 2 --batch 4 --randaugment None"),
    ],
)
def test_real_images_train(shared, tmp_path, monkeypatch, name, data, flags):
    """A step on real files through the whole pipeline."""
    if not (shared / "data").is_dir():
        pytest.skip("the image samples are not here")
    if not data:
        pytest.importorskip("pyarrow")
    argv = f"--depth 1 --max-steps 2 --log-every 1 --workers 1 --device cpu --backend reference {flags}".split()
    monkeypatch.chdir(tmp_path)
    assert training.main(name, ["--data", str(shared / "data" / data), *argv]) == 0
    records = read_log(tmp_path / "runs" / name.replace("-", "_"))
    assert [record["step"] for record in records if record["kind"] == "step"] == [1, 2]
