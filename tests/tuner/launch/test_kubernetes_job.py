"""Workers as manifests: what Kubernetes takes, what it does by them, and what is refused before they are printed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tuner.errors import UsageError
from tuner.exits import ExitCode
from tuner.launch import kubernetes_job
from tuner.launch.kubernetes_job import Resources, Wanted, as_yaml, claim, manifests, selected, toleration

ROOT = Path(__file__).parents[3]
FILES = sorted((ROOT / "docker" / "kubernetes").glob("*.yaml"))
VERSIONS = ("1.29", "1.33", "1.37")
RESOURCES = Resources(gpus=2, gpu_resource="nvidia.com/gpu", cpus="8", memory="32Gi", shared_memory="2Gi", disk="20Gi")
PLAIN = Wanted(
    study_name="digits",
    label="tuner-digits-0123abcd",
    name="tuner-digits-0123abcd",
    image="registry.example.org:5000/team/tuner:1.2@sha256:0123",
    workers=16,
    resources=RESOURCES,
    arguments=["worker", "digits"],
    secret="tuner-storage",
    selector={},
    tolerations=[],
    claims=[],
    environment_from=[],
)
FULL = replace(
    PLAIN,
    study_name='y: "1e3"\n# $(HOME)',
    arguments=["worker", "--slots", "2", 'y: "1e3"\n# $(HOME)'],
    namespace="ml",
    storage=("postgresql://tuner@db/tuner", "1e3"),
    pdb=12,
    spread="kubernetes.io/hostname",
    selector=selected(["gpu=1e3", "y=n"]),
    tolerations=[toleration(text) for text in ("nvidia.com/gpu:NoSchedule", "dedicated=ml", "spot")],
    claims=[claim("data:/mnt/data:ro"), claim("own:/data/tuner/datasets")],
    environment_from=["s3"],
    service_account="trainer",
    pull_secret="registry",
    log_format="json",
)


def pods(documents: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The pods of the documents, by what makes them."""
    for one in documents:
        if "template" in one.get("spec", {}):
            yield f"{one['kind']} {one['metadata']['name']}", one["spec"]["template"]["spec"]


OF_FILES = [one for path in FILES for one in yaml.safe_load_all(path.read_text())]
PODS = dict(pods([*OF_FILES, *manifests(FULL)]))


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_of_each_version_takes_what_is_printed_and_the_files(version: str) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    for document in (*manifests(FULL), *manifests(PLAIN), *OF_FILES):
        kubernetes_validate.validate(document, version, strict=True)
    broken = manifests(PLAIN)
    broken[0]["spec"]["backoffLimitPerIndx"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken[0], version, strict=True)


def test_what_is_printed_is_read_as_it_was_meant_by_any_reader_of_yaml() -> None:
    text = as_yaml(manifests(FULL), ["workers of 'y'\nkind: Secret", "second"])
    assert list(yaml.safe_load_all(text)) == manifests(FULL)
    assert text.splitlines()[:3] == ["# workers of 'y'\\nkind: Secret", "# second", "---"]
    # YAML 1.2 and Go's reader take these for a number and a truth value
    assert 'gpu: "1e3"' in text
    assert '"y": "n"' in text
    assert 'password: "1e3"' in text


@pytest.mark.parametrize("name", PODS)
def test_a_pod_fits_a_namespace_with_the_restricted_standard(name: str) -> None:
    pod = PODS[name]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False
    allowed = {"emptyDir", "secret", "configMap", "persistentVolumeClaim"}
    assert {kind for volume in pod["volumes"] for kind in volume} <= {"name", *allowed}
    for volume in pod["volumes"]:
        assert volume.get("secret", {"defaultMode": 0o440})["defaultMode"] == 0o440
    for container in (*pod.get("initContainers", []), *pod["containers"]):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
        assert "memory" in container["resources"]["limits"]
        secret = {one["name"] for one in container["env"] if "valueFrom" not in one and "://" in one["value"]}
        assert all("@" not in one["value"].partition("@")[2] for one in container["env"] if one["name"] in secret)
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        claimed = {"data"} if name == "StatefulSet tuner-postgres" else set()
        assert mounted == {volume["name"] for volume in pod["volumes"]} | claimed


def test_what_a_worker_says_by_its_exit_code_is_what_the_job_does() -> None:
    [job] = manifests(PLAIN)
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 16, 16)
    assert pod["restartPolicy"] == "Never", "or there is no policy"
    rules = spec["podFailurePolicy"]["rules"]
    assert rules[0] == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    done: dict[ExitCode, str | None] = {
        code: next(
            (
                rule["action"]
                for rule in rules[1:]
                if code in rule["onExitCodes"]["values"] and rule["onExitCodes"].get("containerName") is None
            ),
            None,
        )
        for code in ExitCode
    }
    assert done == {
        ExitCode.DONE: None,
        ExitCode.FAILED: None,
        ExitCode.USAGE: "FailIndex",
        ExitCode.UNREACHABLE: None,
        ExitCode.NOT_LET_IN: None,
        ExitCode.STUDY_FAILED: "FailJob",
        ExitCode.AGAIN: "Ignore",
        ExitCode.HUNG_UP: "Ignore",
        ExitCode.INTERRUPTED: None,
        ExitCode.TERMINATED: "Ignore",
    }
    assert all(rule["onExitCodes"]["values"] == sorted(rule["onExitCodes"]["values"]) for rule in rules[1:])
    assert pod["terminationGracePeriodSeconds"] > 60


def test_each_worker_gets_the_gpus_that_were_asked_for_and_no_others() -> None:
    for gpus, found in ((2, {"amd.com/gpu": "2"}), (0, {})):
        resources = replace(RESOURCES, gpus=gpus, gpu_resource="amd.com/gpu")
        [job] = manifests(replace(PLAIN, resources=resources))
        [worker] = job["spec"]["template"]["spec"]["containers"]
        assert worker["resources"]["limits"] == worker["resources"]["requests"]
        assert {name: n for name, n in worker["resources"]["limits"].items() if "/" in name} == found


def test_a_variable_s_name_in_a_study_s_is_left_as_it_is() -> None:
    [_, job, _] = manifests(FULL)
    [worker] = job["spec"]["template"]["spec"]["containers"]
    assert worker["args"][-1] == 'y: "1e3"\n# $$(HOME)'


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"image": ""}, "--image needs an image"),
        ({"image": "Team/tuner"}, "--image needs an image"),
        ({"image": "tuner latest"}, "--image needs an image"),
        ({"image": "tuner:"}, "--image needs an image"),
        ({"workers": 0}, "--workers needs a whole number from 1 to 100000, got 0"),
        ({"workers": 100_001}, "--workers needs a whole number from 1"),
        ({"name": "Digits"}, "--name needs lower-case"),
        ({"name": "a" * 61}, "at most 60"),
        ({"name": "a\n"}, "--name needs lower-case"),
        ({"namespace": "a.b"}, "--namespace needs lower-case"),
        ({"secret": "a_b"}, "--secret needs the name"),
        ({"environment_from": ["s3", ""]}, "--env-from needs the name"),
        ({"pdb": 16}, "fewer than all"),
        ({"pdb": 0}, "at least 1"),
        ({"spread": "a b"}, "--spread needs a label"),
    ],
)
def test_what_kubernetes_would_refuse_is_refused_at_once(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(PLAIN, **changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"gpus": -1}, "--gpus needs a whole number from 0, got -1"),
        ({"gpu_resource": "gpu"}, "--gpu-resource needs a name such as nvidia.com/gpu"),
        ({"cpus": "0"}, "--cpus needs"),
        ({"cpus": "four"}, "--cpus needs"),
        ({"memory": "16GB"}, "--memory needs a size"),
        ({"disk": "0Gi"}, "--disk needs a size"),
        ({"shared_memory": "32Gi"}, "has to be less"),
    ],
)
def test_resources_that_no_node_has_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(RESOURCES, **changed)


@pytest.mark.parametrize(
    ("read", "text"),
    [
        *((toleration, text) for text in ("", ":NoSchedule", "a:Never", "a=b c", "a b")),
        *((lambda text: selected([text]), text) for text in ("", "a", "=b", "a=b c")),
        *((claim, text) for text in ("", "a", "a:b", "a:/b:rw", "A:/b", "a:/b:ro:c", "a:/b/../c")),
        *((claim, text) for text in ("a:/data", "a:/tmp", "a:/dev", "a:/run", "a:/run/secrets/tuner", "a:/")),
    ],
)
def test_what_is_given_in_another_form_is_refused(read: Any, text: str) -> None:
    with pytest.raises(UsageError, match=r"needs|volumes of its own"):
        read(text)


def test_the_files_are_what_compose_runs() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    [postgres] = PODS["StatefulSet tuner-postgres"]["containers"]
    assert postgres["image"] == services["postgres"]["image"]
    assert {one["name"]: one["value"] for one in postgres["env"]} == services["postgres"]["environment"]
    assert ["CMD", *postgres["readinessProbe"]["exec"]["command"]] == services["postgres"]["healthcheck"]["test"]
    for service, maker in (("dashboard", "Deployment tuner-dashboard"), ("setup", "Job tuner-setup")):
        [container] = PODS[maker]["containers"]
        assert container["args"] == services[service]["command"]
        theirs = services[service]["environment"]
        own = {one["name"]: one["value"] for one in container["env"]}
        assert own["TUNER_STORAGE"].replace("@tuner-postgres/", "@postgres/") == theirs["TUNER_STORAGE"]
        files = {name: Path(value).name for name, value in theirs.items() if name.endswith("_FILE")}
        assert {name: Path(value).name for name, value in own.items() if name.endswith("_FILE")} == files
        [secret] = [volume["secret"] for volume in PODS[maker]["volumes"] if "secret" in volume]
        assert [item["key"] for item in secret["items"]] == services[service]["secrets"], "and no other"


def test_what_reaches_the_database_is_what_is_called_tuner() -> None:
    policies = {one["metadata"]["name"]: one["spec"] for one in OF_FILES if one["kind"] == "NetworkPolicy"}
    [rule] = policies["tuner-postgres"]["ingress"]
    [source] = rule["from"]
    [job] = manifests(PLAIN)
    assert source["podSelector"]["matchLabels"].items() <= job["spec"]["template"]["metadata"]["labels"].items()
    assert policies["tuner-postgres"]["egress"] == policies["tuner-worker"]["ingress"] == []
    assert policies["tuner-dashboard"]["ingress"] == []
    assert kubernetes_job.WORKER in policies["tuner-worker"]["podSelector"]["matchLabels"].values()
