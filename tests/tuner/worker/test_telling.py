"""What a plain log tells of a trial that runs."""

from tuner.worker.telling import reported


def test_an_epoch_is_told_with_its_metric_and_its_loss_a_step_of_a_function_with_its_value():
    epoch = {"trial": 3, "epoch": 2, "value": 0.912345678, "loss": 0.25}
    assert reported(epoch, 1, "accuracy") == "trial 3, epoch 2: accuracy 0.912346, loss 0.25 (slot 1)"
    assert reported({"trial": 3, "epoch": 40, "value": 0.5}, 0, "value") == "trial 3, step 40: value 0.5 (slot 0)"
