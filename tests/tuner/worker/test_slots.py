"""What --slots means on a machine."""

import os
import sys

import pytest

from tuner import cores
from tuner.errors import UsageError
from tuner.worker import slots
from tuner.worker.slots import plan_slots, visible_gpus


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-7f")


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def summary(text: str, device: str | None = None) -> list[tuple[str | None, str | None, float]]:
    return [(plan.device, plan.visible, round(plan.share, 3)) for plan in plan_slots(text, device)]


def test_auto_is_a_slot_for_each_cuda_device(two_gpus):
    assert summary("auto") == [("cuda:0", "4", 1.0), ("cuda:1", "GPU-7f", 1.0)]
    assert [plan.own_device for plan in plan_slots("auto")] == [None, None]  # the only one that each sees, if any


@pytest.fixture
def four_cores(monkeypatch):
    monkeypatch.setattr(cores, "count", lambda: 4)
    for name in cores.VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.skipif(sys.platform == "darwin", reason="may have an mps")
def test_auto_without_a_gpu_is_as_many_slots_as_there_are_cores(no_gpu, four_cores):
    assert summary("auto") == [(None, None, 0.25)] * 4
    assert plan_slots("auto")[0].shown == "auto"
    assert summary("auto", "cpu") == [("cpu", "", 0.25)] * 4
    assert len(plan_slots("auto", at_most=3)) == 3


@pytest.mark.parametrize(
    ("n_cores", "threads", "of_openmp", "wanted"),
    [(4, 2, None, 2), (4, 3, None, 1), (4, 8, None, 1), (4, None, "2", 2), (4, 1, "2", 4), (64, None, None, 8)],
)
def test_slots_of_several_threads_are_so_many_as_have_cores_and_no_more_than_learn_from_one_another(
    no_gpu, four_cores, monkeypatch, n_cores, threads, of_openmp, wanted
):
    monkeypatch.setattr(cores, "count", lambda: n_cores)
    if of_openmp is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", of_openmp)
    assert len(plan_slots("auto", "cpu", threads=threads)) == wanted


def test_a_machine_of_apple_has_one_slot_on_the_best_there_is(no_gpu, four_cores, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert summary("auto") == [(None, None, 1.0)]


def test_slots_share_a_gpu_and_see_no_other(two_gpus):
    assert summary("cuda:0*3,cuda:1") == [("cuda:0", "4", 0.333)] * 3 + [("cuda:1", "GPU-7f", 1.0)]
    assert [plan.own_device for plan in plan_slots("cuda:0*3,cuda:1")] == ["cuda:0"] * 4
    assert plan_slots("cuda:1")[0].environment(1)["CUDA_VISIBLE_DEVICES"] == "GPU-7f"


def test_a_number_of_slots_is_dealt_out_to_the_gpus(two_gpus):
    assert [device for device, _, _ in summary("3")] == ["cuda:0", "cuda:1", "cuda:0"]
    assert summary("2", "cuda:1") == [("cuda:1", "GPU-7f", 0.5)] * 2
    assert summary("auto", "cuda:1") == [("cuda:1", "GPU-7f", 1.0)]


def test_slots_on_the_cpu_see_no_gpu(two_gpus):
    plans = plan_slots("cpu*2, cuda")
    assert [(plan.number, plan.device, plan.own_device) for plan in plans] == [
        (0, "cpu", "cpu"),
        (1, "cpu", "cpu"),
        (2, "cuda:0", "cuda:0"),
    ]
    assert plans[0].environment(1)["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize(
    ("option", "of_openmp", "of_mkl", "wanted"),
    [
        (None, None, None, ("3", "3", "3")),
        (None, "7", None, ("7", "7", "7")),
        (None, "7,2", None, ("7,2", "7", "7")),
        (None, None, "7", ("7", "7", "7")),
        (None, "7", "5", ("7", "5", "7")),
        (None, "many", "", ("3", "3", "3")),
        (2, "7", "5", ("2", "2", "2")),
    ],
)
def test_a_slot_has_as_many_threads_as_were_wanted_or_else_as_it_has_a_share_of_the_cores(
    no_gpu, monkeypatch, option, of_openmp, of_mkl, wanted
):
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS")
    for name, value in zip(names, (of_openmp, of_mkl, None), strict=True):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    (plan,) = plan_slots("cpu", threads=option)
    environment = plan.environment(3)
    assert tuple(environment[name] for name in names) == wanted
    assert plan.shares_cores == (wanted[0] == "3")


@pytest.mark.parametrize("threads", [0, -1, 1025])
def test_a_number_of_threads_that_cannot_be_is_refused(no_gpu, threads):
    with pytest.raises(UsageError, match=f"--threads needs a number from 1 to 1024, got {threads}"):
        plan_slots("cpu", threads=threads)


def test_a_slot_s_process_is_set_up_for_its_device_unless_the_worker_s_own_environment_says_otherwise(
    two_gpus, monkeypatch
):
    wanted = {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "TORCHINDUCTOR_COMPILE_THREADS": "3",
        "OMP_WAIT_POLICY": "passive",
        "GOMP_SPINCOUNT": "3000",
    }
    for name in (*wanted, "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    (plan,) = plan_slots("cuda")
    assert wanted.items() <= plan.environment(3).items()
    own = {
        "CUDA_DEVICE_ORDER": "FASTEST_FIRST",
        "CUBLAS_WORKSPACE_CONFIG": ":16:8",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "OMP_WAIT_POLICY": "active",
    }
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    environment = plan.environment(3)
    assert own.items() <= environment.items()
    assert "GOMP_SPINCOUNT" not in environment  # libgomp would heed it before OMP_WAIT_POLICY


@pytest.mark.parametrize(
    "text", ["", "0", "cpu*0", "gpu", "cuda:x", "cpu*", "-1", "cpu,", "2,3", "\u0663", "cpu*\u0663"]
)
def test_what_is_no_slots_is_refused(no_gpu, text):
    with pytest.raises(UsageError, match="--slots needs auto, a number, or devices such as cuda:0"):
        plan_slots(text)


def test_a_gpu_that_is_not_there_is_refused(two_gpus):
    with pytest.raises(UsageError, match="--slots names cuda:2, but this machine has 2 CUDA devices"):
        plan_slots("cuda:2*2")


@pytest.mark.parametrize("text", ["1001", "99999999999", "cpu*99999999999"])
def test_more_slots_than_any_machine_has_are_refused_before_they_are_planned(no_gpu, text):
    with pytest.raises(UsageError, match="a worker has at most 1000 slots of a device, got '"):
        plan_slots(text)


@pytest.mark.skipif(sys.platform == "darwin", reason="has the device")
def test_a_device_of_another_kind_of_machine_is_refused(no_gpu):
    with pytest.raises(UsageError, match="--slots names mps, which only machines of Apple have"):
        plan_slots("cpu,mps")


def test_devices_are_named_once(two_gpus):
    with pytest.raises(UsageError, match="got --slots cpu and --device cuda: leave one out"):
        plan_slots("cpu", "cuda")


def test_a_machine_without_nvidias_tools_has_no_cuda_device(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert visible_gpus() == []


@pytest.fixture
def smi(monkeypatch, tmp_path):
    """Have nvidia-smi list these lines; the path of what it leaves behind when it runs."""

    def lists(*lines):
        tool = tmp_path / "nvidia-smi"
        (tmp_path / "listed").write_text("".join(f"{line}\n" for line in lines))
        tool.write_text(f'#!/bin/sh\ntouch {tmp_path}/ran\ntest "$*" = --list-gpus && cat {tmp_path}/listed\n')
        tool.chmod(0o755)
        return tmp_path / "ran"

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return lists


def test_nvidias_tool_counts_the_devices(smi):
    smi("GPU 0: H100 (UUID: GPU-1)", "GPU 1: H100 (UUID: GPU-2)")
    assert visible_gpus() == ["0", "1"]


def test_each_instance_of_a_divided_gpu_is_a_device(smi):
    smi(
        "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)",
        "  MIG 3g.40gb     Device  0: (UUID: MIG-7a)",
        "  MIG 3g.40gb     Device  1: (UUID: MIG-7b)",
        "GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-2)",
    )
    assert visible_gpus() == ["MIG-7a", "MIG-7b", "1"]
    assert [plan.environment(1)["CUDA_VISIBLE_DEVICES"] for plan in plan_slots("auto")] == ["MIG-7a", "MIG-7b", "1"]


@pytest.mark.parametrize(
    ("slots", "device", "asked"),
    [
        ("cpu*2", None, False),
        ("auto", "cpu", False),
        ("2", "cpu", False),
        ("cuda,cpu", None, True),
        ("auto", None, True),
    ],
)
def test_the_devices_are_counted_only_for_slots_that_may_have_one(smi, slots, device, asked):
    ran = smi("GPU 0: H100 (UUID: GPU-1)")
    plan_slots(slots, device)
    assert ran.exists() == asked


@pytest.mark.parametrize(
    ("counted", "planned"),
    [
        (("xpu", ["0", "1"]), [("xpu:0", None, "xpu:0"), ("xpu:1", None, "xpu:1")]),
        (("cuda", ["0", "1"]), [("cuda:0", "0", None), ("cuda:1", "1", None)]),
        (("cuda", None), [(None, None, None)]),
    ],
)
def test_devices_that_only_torch_counts_get_a_slot_each(monkeypatch, counted, planned):
    monkeypatch.setattr(slots, "visible_gpus", lambda: None)
    monkeypatch.setattr(slots, "_counted_by_torch", lambda: counted)
    assert [(plan.device, plan.visible, plan.own_device) for plan in plan_slots("auto")] == planned
    n_devices = len(counted[1] or ())
    assert len({plan.device for plan in plan_slots("4")}) == max(1, n_devices)


def test_xpu_devices_may_be_named():
    assert summary("xpu*2,xpu:1") == [("xpu:0", None, 0.5)] * 2 + [("xpu:1", None, 1.0)]


@pytest.mark.slow
def test_torch_is_asked_in_a_process_of_its_own():
    import torch

    kind, found = slots._counted_by_torch()
    assert kind == "cuda"
    assert found == ([str(n) for n in range(torch.cuda.device_count())] if torch.cuda.is_available() else None)
