"""The Trainer of transformers in a plain function, where it is installed: reports, prunes, goes on, and is kept."""

from __future__ import annotations

import importlib.util
import io
from collections import namedtuple

import optuna
import pytest
import torch
from attempts import PruneAt, attempt
from optuna.trial import TrialState

import tuner
from tuner.formats.program import load_program
from tuner.slot.kept_model import packed, unpacked
from tuner.training import Interrupted

# Not importorskip: its import takes seconds in each process that only collects the tests.
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="the extra transformers is not installed"
)
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

IDS = torch.randint(0, 20, (48, 6), generator=torch.Generator().manual_seed(0))
ROWS = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": int(ids[0] > 9)} for ids in IDS]


class Trains:
    """A function with a Trainer of a tiny BERT; `at` is called as each epoch begins."""

    def __init__(self, monitor="eval_accuracy", at=lambda epoch: None, **options):
        self.monitor, self.at, self.options, self.epochs = monitor, at, options, []

    def __call__(self, trial):
        from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

        outer = self

        class Tell(TrainerCallback):
            def on_epoch_begin(self, args, state, control, **_):
                outer.epochs.append(round(state.epoch))
                outer.at(round(state.epoch))

        config = BertConfig(
            vocab_size=20,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
            max_position_embeddings=8,
        )
        callback = tuner.callbacks.Transformers(trial, self.monitor)
        chosen = {
            "learning_rate": trial.suggest_float("lr", 0.001, 0.1),
            "num_train_epochs": 4,
            "eval_strategy": "epoch",
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
        }
        trainer = Trainer(
            BertForSequenceClassification(config),
            TrainingArguments(callback.output_dir, **chosen | self.options),
            train_dataset=ROWS[:32],
            eval_dataset=ROWS[32:],
            compute_metrics=lambda found: {"accuracy": (found.predictions.argmax(1) == found.label_ids).mean()},
            callbacks=[callback, Tell()],
        )
        trainer.train(resume_from_checkpoint=callback.resume_from_checkpoint)
        example = {"input_ids": IDS[:4], "attention_mask": torch.ones_like(IDS[:4]), "token_type_ids": None}
        tuner.keep_model(trial, trainer.model, example, class_names=("low", "high"))
        self.kept = trial.loop.kept
        return trainer.evaluate()["eval_loss"]


def a_study(pruner=None):
    study = optuna.create_study(direction="minimize", pruner=pruner or optuna.pruners.NopPruner())
    study.enqueue_trial({"lr": 0.05})
    return study


@needs_transformers
@pytest.mark.parametrize("save_strategy", ["no", "epoch"])
def test_a_trainer_goes_on_where_it_was_given_back_and_its_model_is_kept(tmp_path, monkeypatch, save_strategy):
    monkeypatch.setattr("tuner.slot.checked_trial.CheckedTrial.number", 0)
    whole, undisturbed = attempt(a_study(), Trains("eval_loss"), direction="minimize")
    assert whole.message == ""
    assert sorted(undisturbed.intermediate_values) == [0, 1, 2, 3]
    assert whole.value == undisturbed.intermediate_values[3]
    study, told = a_study(), []

    def check():
        if told:
            raise Interrupted

    first = Trains(
        "eval_loss", at=lambda epoch: told.append(epoch) if epoch == 2 else None, save_strategy=save_strategy
    )
    with pytest.raises(Interrupted):
        attempt(study, first, checkpoints=tmp_path, check=check, direction="minimize")
    study.enqueue_trial({"lr": 0.05})
    second = Trains("loss", save_strategy=save_strategy)
    outcome, trial = attempt(study, second, checkpoints=tmp_path, direction="minimize")
    assert (first.epochs, second.epochs) == ([0, 1, 2], [3])
    assert outcome.value == whole.value
    assert trial.intermediate_values == undisturbed.intermediate_values
    kept = unpacked(packed(second.kept))
    assert (kept.missing, list(kept.inputs), list(kept.outputs)) == ({}, ["input_ids", "attention_mask"], ["logits"])
    again = load_program(io.BytesIO(kept.program), "model.pt2")(**kept.inputs)
    assert torch.allclose(again["logits"], kept.outputs["logits"], atol=1e-5)


@needs_transformers
def test_a_trainer_is_pruned():
    trains = Trains()
    outcome, trial = attempt(a_study(PruneAt(1)), trains, direction="minimize")
    assert (outcome.state, trains.epochs) == (TrialState.PRUNED, [0, 1]), outcome.message
    assert sorted(trial.intermediate_values) == [0, 1]


@needs_transformers
def test_the_step_of_an_evaluation_between_epochs_is_the_trainers():
    outcome, trial = attempt(a_study(), Trains(eval_strategy="steps", eval_steps=3, max_steps=6), direction="minimize")
    assert (outcome.message, sorted(trial.intermediate_values)) == ("", [3, 6])


@needs_transformers
def test_what_cannot_be_reported_fails_the_trial():
    outcome, _ = attempt(a_study(), Trains(monitor="f1"), direction="minimize")
    assert outcome.failure == "user_error"
    assert "needs the metric 'f1', which compute_metrics is to return, got: epoch, eval_accuracy" in outcome.message


@needs_transformers
def test_a_trainer_of_other_devices_is_refused():
    callback = tuner.callbacks.Transformers(a_study().ask(), "eval_loss")
    there = namedtuple("Arguments", "world_size n_gpu device")
    for arguments, told in (
        (there(1, 2, torch.device("cuda")), "a trial has one device, got a Trainer of 2"),
        (there(2, 1, torch.device("cuda")), "a trial has one device, got a Trainer of 2"),
        (there(1, 1, torch.device("meta")), "got a Trainer on meta"),
    ):
        with pytest.raises(tuner.TunerError, match=told):
            callback.on_init_end(arguments, None, None)


def test_transformers_is_asked_for_where_it_is_not_installed(start_python):
    code = (
        "import sys; sys.modules['transformers'] = None\nimport tuner\n"
        "try:\n    tuner.callbacks.Transformers\nexcept tuner.TunerError as error:\n    print(error)"
    )
    out, err = start_python(code).communicate(timeout=60)
    assert (out.strip(), err) == (
        "tuner.callbacks.Transformers needs transformers, got no transformers: pip install 'tuner[transformers]'",
        "",
    )
