"""The device that trials run on, and what torch tells of it: here mostly of a machine without an accelerator."""

import pytest
import torch

from tuner.errors import UsageError
from tuner.training.checkpoint import generator_states, set_generator_states
from tuner.training.devices import choose_device, current, empty_cache, memory_of, name_of, peak_of, start_peak
from tuner.training.memory import free_memory

CPU = torch.device("cpu")


def test_a_device_that_was_named_is_taken():
    assert str(choose_device("cpu")) == "cpu"


@pytest.mark.parametrize("name", ["banana", "cuda:99", "xpu:99"])
def test_a_device_that_is_not_here_is_refused(name):
    with pytest.raises(UsageError, match=f"--device needs a device of this machine, got '{name}'"):
        choose_device(name)


def test_without_a_name_torch_s_accelerator_is_taken_or_the_cpu():
    found = torch.accelerator.current_accelerator(check_available=True)
    device = choose_device()
    assert device.type == ("cpu" if found is None else found.type)
    assert float(torch.ones(2, device=device).sum()) == 2


def test_the_cpu_has_memory_and_no_name_peak_or_generator_of_its_own():
    free, total = memory_of(CPU)
    assert 0 < free <= total
    assert (name_of(CPU), peak_of(CPU)) == (None, None)
    start_peak(CPU)
    empty_cache()
    free_memory()
    with current(CPU):
        assert torch.empty(0).device == CPU
    assert generator_states(CPU).keys() == {"python", "numpy", "torch"}


@pytest.mark.cuda
def test_a_cuda_device_tells_its_name_memory_and_peak_and_keeps_its_generator():
    device = choose_device("cuda")
    start_peak(device)
    kept = torch.ones(2**20, device=device)
    assert peak_of(device)[1] >= peak_of(device)[0] >= 4 * len(kept)
    assert 0 < memory_of(device)[0] < memory_of(device)[1]
    assert name_of(device) == torch.cuda.get_device_name(device)
    states = generator_states(device)
    drawn = torch.rand(3, device=device).tolist()
    set_generator_states(states, device)
    assert torch.rand(3, device=device).tolist() == drawn
    with current(device):
        assert torch.accelerator.current_device_index() == device.index
