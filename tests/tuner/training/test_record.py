"""What is recorded of a trial beside its value."""

import torch
from torch import nn

from tuner.training import Epoch
from tuner.training.record import Record

CPU = torch.device("cpu")


def an_epoch(number, **took):
    return Epoch(number=number, train_loss=0.5, metrics={}, **took)


def test_what_the_epochs_took_is_summed():
    record = Record(CPU, seed=3)
    record.add(an_epoch(1, rows=300, train_s=1.5, evaluate_s=0.25, wait_s=0.125))
    record.add(an_epoch(2, rows=300, train_s=2.5, evaluate_s=0.25, wait_s=0.5))
    attrs = record.attrs()
    of_epochs = {name: attrs[name] for name in ("epochs", "samples_per_s", "train_s", "evaluate_s", "wait_s")}
    assert of_epochs == {"epochs": 2, "samples_per_s": 150.0, "train_s": 4.0, "evaluate_s": 0.5, "wait_s": 0.625}


def test_epochs_that_took_no_time_have_no_speed():
    record = Record(CPU, seed=3)
    record.add(an_epoch(1, rows=300))
    assert record.attrs()["samples_per_s"] == 0.0


def test_without_an_epoch_there_is_what_the_process_took_and_the_weights():
    record = Record(CPU, seed=3)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2).requires_grad_(False))
    record.count(model)
    attrs = record.attrs()
    assert attrs.keys() == {
        *("seed", "device", "peak_memory_mb", "versions", "threads", "parameters", "trained_parameters")
    }
    assert (attrs["seed"], attrs["device"], attrs["threads"]) == (3, "cpu", torch.get_num_threads())
    assert (attrs["parameters"], attrs["trained_parameters"]) == (23, 15)
    assert 10 < attrs["peak_memory_mb"] < 2**20
