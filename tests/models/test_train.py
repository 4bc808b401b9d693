"""The trainer: the optimizer by hand, accumulation, averages, logs, non-finite numbers, evaluation."""

import dataclasses
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn

import nestloop as nl
from nestloop import zoo
from nestloop.models import checkpoint, evaluate
from nestloop.models import train as training
from nestloop.models.errors import CheckpointError, NonFiniteError, RecipeError, TooManyUnreadableError
from nestloop.models.logbook import Logbook, read_log
from nestloop.models.nonfinite import first_nonfinite_layer
from nestloop.models.optim import matrices, outer_optimizer, warmup_cosine
from nestloop.models.recipe import Recipe
from nestloop.models.recipes.digits import recipe as digits
from nestloop.models.train import train

TINY = dataclasses.replace(
    digits,
    mixer="mttt_mlp",
    width=16,
    depth=2,
    epochs=1,
    batch=120,
    warmup_steps=2,
    max_steps=4,
    backend="reference",  # nothing here depends on the backend, and this one compiles nothing
    device="cpu",
    log_every=1,
    ema=0.0,
)


def weights(run: training.Run) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in run.model.state_dict().items()}


def losses(run: training.Run) -> list[float]:
    return [record["loss"] for record in run.records if record["kind"] == "step"]


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory) -> training.Run:
    return train(TINY, tmp_path_factory.mktemp("tiny"))


class TestOptimizer:
    def test_matrices_are_decided_by_declaration(self):
        model = TINY.create_model(10)
        chosen = matrices(model)
        inner = {name.removeprefix("blocks.0.mixer.") for name in chosen if name.startswith("blocks.0.mixer.")}
        assert inner == {"views.k.weight", "views.q.weight", "fast.w1", "fast.w2", "slow.g", "out.weight"}
        vectors = {name for name, parameter in model.named_parameters() if parameter.ndim == 2} - chosen
        assert {name.removeprefix("blocks.0.mixer.") for name in vectors if "blocks.0" in name} >= {
            "fast.b1",
            "fast.b2",
        }
        assert {"embedding.weight", "pre_logits.weight", "head.weight", "blocks.1.mlp.up.weight"} <= chosen

    def test_scales_and_filters_of_maps_are_no_matrices(self):
        class Maps(zoo.TTTLinear):
            k = nl.view("d", make=[nl.conv(4), nl.affine()])

        layer = nl.Layer(Maps, 16, 2, backend="reference")
        assert matrices(layer) == {
            *(f"views.{name}.weight" for name in ("k.project", "q.project", "v", "eta")),
            *("fast.w", "out.weight"),
        }

    def test_frozen_weights_are_left_to_themselves(self):
        model = dataclasses.replace(TINY, mixer="mttt_linear").create_model(10)
        frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        optimizer = outer_optimizer(model, TINY)
        held = sum(len(group["params"]) for group in optimizer.param_groups)
        assert held + len(frozen) == len(list(model.parameters()))
        assert not set(frozen) & matrices(model)

    def test_three_steps_by_hand(self):
        """Adam with bias correction; a matrix also loses weight_decay x schedule a step, whatever the lr."""
        recipe = dataclasses.replace(TINY, lr=0.05, weight_decay=0.01, betas=(0.8, 0.9), warmup_steps=2)
        model = nn.Linear(3, 2).double()
        optimizer = outer_optimizer(model, recipe)
        schedule = warmup_cosine(optimizer, recipe.warmup_steps, total=6)
        expected = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in expected.items()}
        generator = torch.Generator().manual_seed(0)
        for step, share in enumerate([0.0, 0.5, 1.0, 0.5 * (1 + math.cos(math.pi / 4))]):
            for name, parameter in model.named_parameters():
                gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.grad = gradient
                first, second = moments[name]
                first, second = 0.8 * first + 0.2 * gradient, 0.9 * second + 0.1 * gradient**2
                moments[name] = (first, second)
                decay = 0.01 * share if name == "weight" else 0.0
                ratio = (first / (1 - 0.8 ** (step + 1))) / ((second / (1 - 0.9 ** (step + 1))).sqrt() + 1e-8)
                expected[name] = (1 - decay) * expected[name] - 0.05 * share * ratio
            optimizer.step()
            schedule.step()
            for name, parameter in model.named_parameters():
                torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-12, atol=1e-14)

    def test_the_papers_schedule(self):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-3)
        factor = warmup_cosine(optimizer, warmup=10_000, total=112_590).lr_lambdas[0]
        assert [factor(step) for step in (0, 5_000, 10_000)] == [0.0, 0.5, 1.0]
        assert factor((10_000 + 112_590) // 2) == pytest.approx(0.5) and factor(112_590) == 0.0

    def test_the_gradient_is_clipped_once_over_all_weights(self, tmp_path, tiny_run):
        """Adam forgets the scale of its gradients, so what it saw is read from its first moments."""
        clipped = train(dataclasses.replace(TINY, clip=1e-3, max_steps=1), tmp_path)
        state = checkpoint.load(checkpoint.find(clipped.run_dir))["optimizer"]["state"]
        norm = math.sqrt(sum(float((slot["exp_avg"] / (1 - 0.9)).square().sum()) for slot in state.values()))
        assert norm == pytest.approx(1e-3, rel=1e-3)
        logged = next(record for record in clipped.records if record["kind"] == "step")
        assert logged["gradient_norm"] > 1e-2  # the norm before clipping


class TestSteps:
    def test_gradient_accumulation_gives_the_same_steps(self, tmp_path, tiny_run):
        accumulated = train(dataclasses.replace(TINY, accumulate=4), tmp_path)
        np.testing.assert_allclose(losses(accumulated), losses(tiny_run), rtol=1e-5)
        of_micro_batches, of_batches = (
            [record["gradient_norm"] for record in run.records if "gradient_norm" in record]
            for run in (accumulated, tiny_run)
        )
        np.testing.assert_allclose(of_micro_batches, of_batches, rtol=1e-4)

    def test_the_same_recipe_gives_the_same_weights(self, tmp_path, tiny_run):
        again, expected = weights(train(TINY, tmp_path)), weights(tiny_run)
        assert all(torch.equal(again[name], expected[name]) for name in expected)

    def test_recompute_gives_the_same_losses(self, tmp_path, tiny_run):
        recomputed = train(dataclasses.replace(TINY, backend="torch", recompute=True), tmp_path)
        assert losses(recomputed) == pytest.approx(losses(tiny_run), rel=1e-5)
        with pytest.raises(RecipeError) as error:
            dataclasses.replace(TINY, backend="reference", recompute=True).create_model(10)
        assert str(error.value) == (
            "the reference backend takes gradients inside its forward, which cannot be recomputed\n"
            "  given: --recompute --backend reference\n"
            "  need:  the torch backend, or no recomputation\n"
            "  fix:   --backend torch, or --no-recompute"
        )

    def test_another_seed_gives_others(self, tmp_path, tiny_run):
        other = train(dataclasses.replace(TINY, seed=1), tmp_path)
        assert losses(other)[-1] != losses(tiny_run)[-1]

    def test_bf16_trains_close_to_float32_and_keeps_float32_weights(self, tmp_path, tiny_run):
        low = train(dataclasses.replace(TINY, bf16=True), tmp_path)
        np.testing.assert_allclose(losses(low), losses(tiny_run), rtol=0.03)
        assert {weight.dtype for weight in low.model.parameters()} == {torch.float32}

    def test_the_average_follows_the_weights_and_is_what_is_evaluated(self, tmp_path):
        run = train(dataclasses.replace(TINY, ema=0.5, checkpoint_every=1, keep=9), tmp_path)
        average: dict[str, torch.Tensor] = {}
        for path in checkpoint.all_checkpoints(tmp_path / "checkpoints"):
            state = checkpoint.load(path)
            for name, weight in state["model"].items():
                average[name] = 0.5 * average[name] + 0.5 * weight if name in average else weight
        for name, expected in average.items():
            torch.testing.assert_close(state["ema"][f"module.{name}"], expected, rtol=1e-5, atol=1e-7)
        logged = [record["loss"] for record in run.records if record["kind"] == "eval"][-1]
        options = evaluate.EvalOptions(str(tmp_path), workers=0, device="cpu")
        for chosen, same in (
            (options, True),
            (dataclasses.replace(options, weights="ema"), True),
            (dataclasses.replace(options, weights="trained"), False),
        ):
            figures = evaluate.run(chosen)
            assert (figures["loss"] == pytest.approx(logged, rel=1e-6)) is same

    def test_it_learns(self, tmp_path):
        """Linear attention, the cheapest: well above chance after four epochs."""
        recipe = dataclasses.replace(
            digits,
            mixer="linear_attention",
            backend="reference",
            depth=2,
            epochs=4,
            warmup_steps=20,
            device="cpu",
            log_every=20,
        )
        run = train(recipe, tmp_path)
        assert losses(run)[-1] < 1.9
        assert [record["top1"] for record in run.records if record["kind"] == "eval"][-1] > 0.3


class TestUnreadable:
    def folder(self, root: Path, damaged: int) -> Path:
        generator = np.random.default_rng(0)
        for split, count in (("train", 40), ("val", 4)):
            for label in ("a", "b"):
                (root / split / label).mkdir(parents=True)
                for number in range(count // 2):
                    pixels = generator.integers(0, 256, (8, 8), dtype=np.uint8)
                    Image.fromarray(pixels).save(root / split / label / f"{number}.png")
        for number in range(damaged):
            (root / "train" / "a" / f"{number}.png").write_bytes(b"no image")
        return root

    recipe = dataclasses.replace(TINY, mixer="linear_attention", batch=8, max_steps=None, epochs=2)

    def test_they_are_skipped_counted_and_named(self, tmp_path):
        data = self.folder(tmp_path / "data", damaged=1)
        recipe = dataclasses.replace(self.recipe, data=str(data), max_unreadable=0.1)
        run = train(recipe, tmp_path / "run")
        named = [record["image"] for record in run.records if record["kind"] == "unreadable"]
        assert len(named) == 1  # though each of the two epochs met it
        assert named[0].startswith("skipped unreadable image train/a/0.png: UnidentifiedImageError: ")
        state = checkpoint.load(checkpoint.find(tmp_path / "run"))
        assert next(iter(state["unreadable"]["train"].values()))[0] == "train/a/0.png"

    def test_too_many_stop_the_run(self, tmp_path):
        data = self.folder(tmp_path / "data", damaged=3)
        with pytest.raises(TooManyUnreadableError, match=r"^\d of 40 images of the train split cannot be read"):
            train(dataclasses.replace(self.recipe, data=str(data), max_unreadable=0.03), tmp_path / "run")


class TestNonFinite:
    def test_the_run_stops_saves_and_names_the_layer(self, tmp_path, monkeypatch):
        create = Recipe.create_model

        def poisoned(recipe: Recipe, num_classes: int) -> nn.Module:
            model = create(recipe, num_classes)
            with torch.no_grad():
                model.get_parameter("blocks.1.mlp.up.weight")[0, 0] = math.inf
            return model

        monkeypatch.setattr(Recipe, "create_model", poisoned)
        with pytest.raises(NonFiniteError) as error:
            train(TINY, tmp_path)
        dump = tmp_path / "nonfinite_step_00000001_rank_0.pt"
        assert str(error.value) == (
            "step 1 gave loss nan and a gradient of norm nan\n"
            f"  given: first in layer blocks.1.mlp.up (Linear): {120 * 64} values, "
            "its weight weight is not finite\n"
            "  need:  finite numbers; the weights were not updated\n"
            f"  fix:   batch and state are in {dump}; a lower --lr or more --warmup-steps often helps"
        )
        saved = torch.load(dump, weights_only=True)
        images, labels, valid, _ = saved["batches"][0]
        assert images.shape == (120, 1, 8, 8) and labels.shape == valid.shape == (120,)
        assert torch.isinf(saved["model"]["blocks.1.mlp.up.weight"][0, 0])
        assert read_log(tmp_path)[-1]["where"].startswith("layer blocks.1.mlp.up (Linear)")

    def test_the_first_layer_is_named_by_its_cause(self):
        class Overflow(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x.exp()

        model = nn.Sequential(nn.Linear(2, 2), Overflow(), nn.Linear(2, 2))
        nn.init.constant_(model.get_parameter("0.weight"), 1000.0)
        assert first_nonfinite_layer(model, torch.ones(3, 2)) == (
            "layer 1 (Overflow): 6 values, from finite inputs and weights"
        )
        assert first_nonfinite_layer(model, torch.full((3, 2), math.nan)) == (
            "the images: 6 of their values are not finite before any layer"
        )
        assert first_nonfinite_layer(model, torch.zeros(3, 2)) is None

    def test_a_gradient_that_is_not_finite_names_its_parameter(self, tmp_path, monkeypatch):
        class RootOfZero(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x + (x * 0).sqrt()  # 0 forward, infinite times 0 backward

        create = Recipe.create_model

        def poisoned(recipe: Recipe, num_classes: int) -> nn.Module:
            model = create(recipe, num_classes)
            model.set_submodule("pre_logits", nn.Sequential(model.pre_logits, RootOfZero()))
            nn.init.ones_(model.head.weight)
            return model

        monkeypatch.setattr(Recipe, "create_model", poisoned)
        with pytest.raises(NonFiniteError, match=r"first in gradient of pre_logits\.0\.bias: 16 of 16 values"):
            train(TINY, tmp_path)


class TestLog:
    def test_every_step_has_its_figures(self, tiny_run):
        steps = [record for record in read_log(tiny_run.run_dir) if record["kind"] == "step"]
        assert [record["step"] for record in steps] == [1, 2, 3, 4]
        for record in steps:
            assert record["images_per_second"] > 0 and 0 <= record["data_wait"] <= 1
            assert record["inner_last"] < record["inner_first"]  # one step on the loss lowers it here
        assert [record["lr"] for record in steps][:3] == [0.0, 0.001, 0.002]

    def test_self_attention_has_no_inner_losses(self, tmp_path):
        run = train(dataclasses.replace(TINY, mixer="self_attention", max_steps=1), tmp_path)
        assert not any("inner_first" in record for record in run.records)

    def test_plain_lines_where_there_is_no_terminal(self, tmp_path):
        stream = io.StringIO()
        train(dataclasses.replace(TINY, max_steps=2), tmp_path, Console(file=stream, width=200))
        lines = stream.getvalue().splitlines()
        assert lines[0].startswith("step 1/11  loss 2.30") and "images/s  waiting for data" in lines[0]
        assert "inner loss" in lines[0] and "\x1b" not in stream.getvalue()
        assert lines[2].startswith("epoch 1/1  accuracy ")

    def test_a_bar_where_there_is_one(self, tmp_path):
        stream = io.StringIO()
        console = Console(file=stream, force_terminal=True, width=200)
        train(dataclasses.replace(TINY, max_steps=2), tmp_path, console)
        assert "epoch 1/1" in stream.getvalue() and "2/2" in stream.getvalue()

    def test_a_run_that_ends_in_its_warm_up_says_so(self, tmp_path):
        run = train(dataclasses.replace(TINY, warmup_steps=44), tmp_path)
        assert run.records[0]["kind"] == "note" and run.records[0]["warmup_share"] == 0.25

    def test_tensorboard(self, tmp_path):
        pytest.importorskip("tensorboard")
        log = Logbook(tmp_path, tensorboard=True)
        log.record("step", 1, loss=2.0)
        log.close()
        assert list((tmp_path / "tensorboard").iterdir())
        assert json.loads((tmp_path / "log.jsonl").read_text())["loss"] == 2.0


class TestEvaluate:
    def test_the_command_repeats_what_training_logged(self, tiny_run, capsys):
        logged = [record for record in tiny_run.records if record["kind"] == "eval"][-1]
        argv = [str(tiny_run.run_dir), "--workers", "0", "--device", "cpu", "--eval-batch", "7", "--json"]
        assert evaluate.main(argv) == 0
        figures = json.loads(capsys.readouterr().out)
        assert figures["images"] == 360 and figures["top1"] == logged["top1"] and figures["top5"] == logged["top5"]
        assert figures["loss"] == pytest.approx(logged["loss"], rel=1e-5)

    def test_an_average_that_was_not_kept(self, tiny_run):
        with pytest.raises(CheckpointError, match="holds no average of the weights"):
            evaluate.run(evaluate.EvalOptions(str(tiny_run.run_dir), weights="ema"))
