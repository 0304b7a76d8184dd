"""Who placed a process, by its environment alone."""

import pytest

from tuner.placement import Placement, placement

ARRAY = {"SLURM_JOB_ID": "18", "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "0", "SLURMD_NODENAME": "n1"}
OURS = {
    "TUNER_PLACED_BY": "k8s",
    "TUNER_PLACED_JOB": "digits",
    "TUNER_PLACED_TASK": "3",
    "TUNER_PLACED_NODE": "n",
}


@pytest.mark.parametrize(
    ("environ", "shown"),
    [
        ({}, None),
        (ARRAY, "slurm 17_0 on n1"),
        ({"SLURM_JOB_ID": "18", "SLURMD_NODENAME": "n1"}, "slurm 18 on n1"),
        ({"SLURM_JOB_ID": "18"}, None),  # the shell of salloc, on a login node
        (OURS, "k8s digits_3 on n"),
        ({**ARRAY, **OURS}, "k8s digits_3 on n"),  # a cluster of an engine that is itself a job of SLURM
        ({"TUNER_PLACED_BY": "ray", "TUNER_PLACED_JOB": "a", "TUNER_PLACED_NODE": ""}, "ray a"),
    ],
)
def test_the_environment_tells_who_placed_a_process(environ, shown):
    found = placement(environ)
    assert (None if found is None else found.shown) == shown
    assert found is None or Placement.of_fields(found.fields()) == found


def test_what_another_version_stored_is_read():
    assert Placement.of_fields({"engine": "slurm", "job": "1", "later": "x"}) == Placement(engine="slurm", job="1")
