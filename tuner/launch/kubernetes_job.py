"""A study's workers as manifests for Kubernetes: an Indexed Job, and what may go with it.

An Indexed Job, not a JobSet: that one is for groups of pods that start together and talk to one another, and has to be
installed. Workers need only a number each, and to be started again each by itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import yaml

from tuner.errors import UsageError
from tuner.exits import ExitCode
from tuner.placement import VARIABLES
from tuner.text import printable

Manifest = dict[str, Any]

STUDY_LABEL: Final = "tuner/study"
STUDY_ANNOTATION: Final = "tuner/study-name"
WORKER: Final = "worker"
CHECK: Final = "check"
INDEX: Final = "batch.kubernetes.io/job-completion-index"
JOB_LABEL: Final = "batch.kubernetes.io/job-name"

URL_KEY: Final = "url"
PASSWORD_KEY: Final = "password"  # noqa: S105 - the name of a key
SECRETS_PATH: Final = "/run/secrets/tuner"
DATA_PATH: Final = "/data"
SHARED_MEMORY_PATH: Final = "/dev/shm"  # noqa: S108 - a volume of the pod's own
TEMPORARY_PATH: Final = "/tmp"  # noqa: S108 - as the last

USER: Final = 1000
"""Who runs the worker, and the group that its volumes and the Secret's files belong to: as in the Dockerfile."""

GRACE_S: Final = 90
"""How long a pod may take to end: a worker has given its trials back within ten seconds, unless its disks are slow."""
KEPT_S: Final = 24 * 3600
"""How long a Job that has ended is there, with the logs of its pods."""
RETRIES: Final = 6
"""How often an index that failed is started again: with the pauses of Kubernetes over ten minutes, as in an outage."""
_SECRET_MODE: Final = 0o440

MAX_WORKERS: Final = 100_000
"""The most completions that a Job with a limit for each index may have."""

_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_NAME = r"[A-Za-z0-9]([-\w.]*[A-Za-z0-9])?"
_EFFECTS: Final = ("NoSchedule", "PreferNoSchedule", "NoExecute")
_UNITS: Final = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12} | {
    f"{prefix}i": 1 << 10 * power for power, prefix in enumerate("KMGT", 1)
}


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What each worker gets, requested and at most: quantities as Kubernetes writes them."""

    gpus: int
    gpu_resource: str
    cpus: str
    memory: str
    shared_memory: str
    disk: str

    def __post_init__(self) -> None:
        """Raise UsageError for what no node could give."""
        if self.gpus < 0:
            raise UsageError(f"--gpus needs a whole number from 0, got {self.gpus}")
        if not is_qualified(self.gpu_resource, with_prefix=True):
            raise UsageError(f"--gpu-resource needs a name such as nvidia.com/gpu, got {self.gpu_resource!r}")
        if not re.fullmatch(r"\d+(\.\d{1,3})?|\d+m", self.cpus, re.ASCII) or not float(self.cpus.rstrip("m")):
            raise UsageError(f"--cpus needs a number of cores such as 4, 0.5 or 500m, got {self.cpus!r}")
        sizes = {"--memory": self.memory, "--shm": self.shared_memory, "--disk": self.disk}
        n_bytes = {option: _bytes(option, text) for option, text in sizes.items()}
        if n_bytes["--shm"] >= n_bytes["--memory"]:
            raise UsageError(
                f"--shm {self.shared_memory} is part of the worker's --memory {self.memory}, and has to be less"
            )

    def limits(self) -> dict[str, str]:
        """Return them as a container has them."""
        gpus = {self.gpu_resource: str(self.gpus)} if self.gpus else {}
        return {"cpu": self.cpus, "memory": self.memory, "ephemeral-storage": self.disk, **gpus}


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A Job of workers. `arguments` are those of their `tuner`; `storage`, URL and password, becomes a Secret if given.

    `selector`, `tolerations` and `claims` are what `selected`, `toleration` and `claim` return.
    """

    study_name: str
    label: str
    name: str
    image: str
    workers: int
    resources: Resources
    arguments: Sequence[str]
    secret: str
    namespace: str | None = None
    storage: tuple[str, str] | None = None
    pdb: int | None = None
    spread: str | None = None
    selector: Mapping[str, str]
    tolerations: Sequence[Mapping[str, str]]
    claims: Sequence[tuple[str, str, bool]]
    environment_from: Sequence[str]
    service_account: str | None = None
    pull_secret: str | None = None
    log_format: str | None = None

    def __post_init__(self) -> None:
        """Raise UsageError for names that Kubernetes would refuse, and for numbers that cannot be meant."""
        if not re.fullmatch(r"[a-z0-9][\w.:/@-]*", self.image) or self.image.endswith(("/", ":", "@")):
            raise UsageError(f"--image needs an image such as registry.example.org/team/tuner:1.2, got {self.image!r}")
        if not 1 <= self.workers <= MAX_WORKERS:
            raise UsageError(f"--workers needs a whole number from 1 to {MAX_WORKERS}, got {self.workers}")
        room = 63 - len(f"-{self.workers - 1}")  # the last pod's host is called so
        if not re.fullmatch(_LABEL, self.name) or len(self.name) > room:
            raise UsageError(
                f"--name needs lower-case letters, digits and hyphens, at most {room}, got {printable(self.name)!r}"
            )
        if self.namespace is not None and not (re.fullmatch(_LABEL, self.namespace) and len(self.namespace) < 64):
            raise UsageError(f"--namespace needs lower-case letters, digits and hyphens, got {self.namespace!r}")
        for option, names in {
            "--secret": [self.secret],
            "--env-from": self.environment_from,
            "--service-account": [self.service_account],
            "--image-pull-secret": [self.pull_secret],
        }.items():
            for name in names:
                if name is not None and not is_object_name(name):
                    raise UsageError(f"{option} needs the name of an object of Kubernetes, got {name!r}")
        if self.pdb is not None and not 1 <= self.pdb < self.workers:
            raise UsageError(
                f"--pdb needs how many of the {self.workers} workers stay while nodes are emptied: at least 1, and"
                f" fewer than all, or no node could be; got {self.pdb}"
            )
        if self.spread is not None and not is_qualified(self.spread):
            raise UsageError(f"--spread needs a label of nodes such as kubernetes.io/hostname, got {self.spread!r}")


def manifests(wanted: Wanted) -> list[Manifest]:
    """Return the documents, in the order in which they are to be made."""
    documents = [_job(wanted)]
    if wanted.storage is not None:
        documents.insert(0, _secret(wanted, *wanted.storage))
    if wanted.pdb is not None:
        documents.append(_disruption_budget(wanted, wanted.pdb))
    return documents


def as_yaml(documents: Sequence[Manifest], comment: Sequence[str]) -> str:
    """Return the documents as YAML that YAML 1.1 and 1.2 read alike, after lines of comment."""
    head = "".join(f"# {printable(line)}".rstrip() + "\n" for line in comment)
    told: str = yaml.dump_all(
        documents, Dumper=_Dumper, sort_keys=False, explicit_start=True, allow_unicode=True, width=10_000
    )
    return head + told


def toleration(given: str) -> dict[str, str]:
    """Return what tolerates a taint that is given as kubectl writes it, KEY[=VALUE][:EFFECT]. Raises UsageError."""
    taint, colon, effect = given.partition(":")
    key, equals, value = taint.partition("=")
    if not is_qualified(key) or (value and not is_label_value(value)) or (colon and effect not in _EFFECTS):
        raise UsageError(
            f"--toleration needs KEY[=VALUE][:EFFECT], as nvidia.com/gpu:NoSchedule, with an effect of"
            f" {', '.join(_EFFECTS)}; got {given!r}"
        )
    matching = {"operator": "Equal", "value": value} if equals else {"operator": "Exists"}
    return {"key": key, **matching, **({"effect": effect} if effect else {})}


def selected(given: Sequence[str]) -> dict[str, str]:
    """Return the labels that nodes are to have, each given as KEY=VALUE. Raises UsageError."""
    found: dict[str, str] = {}
    for pair in given:
        key, equals, value = pair.partition("=")
        if not equals or not is_qualified(key) or (value and not is_label_value(value)):
            raise UsageError(f"--node-selector needs a label of nodes as KEY=VALUE, got {pair!r}")
        if key in found:
            raise UsageError(f"--node-selector got {key!r} twice")
        found[key] = value
    return found


def claim(given: str) -> tuple[str, str, bool]:
    """Return the claim, the path and whether it is only read, of CLAIM:PATH[:ro]. Raises UsageError."""
    name, path, *mode = [*given.split(":"), ""][:3] if given.count(":") < 3 else ["", "", ""]
    own = (DATA_PATH, TEMPORARY_PATH, SHARED_MEMORY_PATH, SECRETS_PATH)
    wrong_path = not re.fullmatch(r"(/[\w.+-]+)+", path) or ".." in path.split("/")
    if not is_object_name(name) or wrong_path or mode not in ([""], ["ro"]):
        raise UsageError(f"--volume needs CLAIM:/path or CLAIM:/path:ro, a PersistentVolumeClaim, got {given!r}")
    if path in own or any(each.startswith(f"{path}/") for each in own):
        raise UsageError(f"--volume {given}: the worker has volumes of its own at {', '.join(own)}; below is free")
    return name, path, mode == ["ro"]


def is_object_name(name: str) -> bool:
    """Whether an object of Kubernetes may have this name: a DNS subdomain."""
    return len(name) <= 253 and re.fullmatch(rf"{_LABEL}(\.{_LABEL})*", name) is not None


def is_label_value(value: str) -> bool:
    """Whether a label may have this value, which is not empty."""
    return len(value) <= 63 and re.fullmatch(_NAME, value, re.ASCII) is not None


def is_qualified(name: str, *, with_prefix: bool = False) -> bool:
    """Whether this may be a label's key, [PREFIX/]NAME with a domain as prefix; `with_prefix` that of a resource."""
    prefix, slash, own = name.rpartition("/")
    return is_label_value(own) and (is_object_name(prefix) if slash else not with_prefix)


def _bytes(option: str, given: str) -> int:
    found = re.fullmatch(r"(\d+)([kMGT]|[KMGT]i)?", given, re.ASCII)
    if found is None or not int(found[1]):
        raise UsageError(f"{option} needs a size such as 16Gi or 500M, got {given!r}")
    return int(found[1]) * _UNITS[found[2] or ""]


def _labels(wanted: Wanted) -> dict[str, str]:
    return {
        "app.kubernetes.io/name": "tuner",
        "app.kubernetes.io/component": WORKER,
        STUDY_LABEL: wanted.label,
    }


def _metadata(wanted: Wanted, name: str) -> Manifest:
    namespace = {} if wanted.namespace is None else {"namespace": wanted.namespace}
    annotations = {STUDY_ANNOTATION: wanted.study_name}
    return {"name": name, **namespace, "labels": _labels(wanted), "annotations": annotations}


def _secret(wanted: Wanted, url: str, password: str) -> Manifest:
    namespace = {} if wanted.namespace is None else {"namespace": wanted.namespace}
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": wanted.secret, **namespace, "labels": {"app.kubernetes.io/name": "tuner"}},
        "type": "Opaque",
        "stringData": {URL_KEY: url, PASSWORD_KEY: password},
    }


def _disruption_budget(wanted: Wanted, stay: int) -> Manifest:
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": _metadata(wanted, wanted.name),
        # of a Job's pods it knows no total, without which no percentage and no maxUnavailable is taken
        "spec": {"minAvailable": stay, "selector": {"matchLabels": {JOB_LABEL: wanted.name}}},
    }


def _job(wanted: Wanted) -> Manifest:
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": _metadata(wanted, wanted.name),
        "spec": {
            # one number: so it may be changed while they run
            "completions": wanted.workers,
            "parallelism": wanted.workers,
            "completionMode": "Indexed",
            "backoffLimitPerIndex": RETRIES,
            # others go on where one node is broken; where most are, something else is
            "maxFailedIndexes": wanted.workers // 2,
            "ttlSecondsAfterFinished": KEPT_S,
            "podFailurePolicy": {"rules": list(_rules())},
            "template": {
                "metadata": {"labels": _labels(wanted), "annotations": {STUDY_ANNOTATION: wanted.study_name}},
                "spec": _pod(wanted),
            },
        },
    }


def _rules() -> Iterator[Manifest]:
    """Yield what becomes of a pod that failed, by the first rule that fits; by none it comes again, RETRIES times."""
    yield {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    again = (ExitCode.AGAIN, ExitCode.HUNG_UP, ExitCode.TERMINATED)
    yield {"action": "Ignore", "onExitCodes": {"operator": "In", "values": sorted(map(int, again))}}
    yield {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [int(ExitCode.STUDY_FAILED)]}}
    yield {"action": "FailIndex", "onExitCodes": {"operator": "In", "values": [int(ExitCode.USAGE)]}}
    # the image lacks the objective, or has another one; the database is away by another code
    never = {"containerName": CHECK, "operator": "In", "values": [int(ExitCode.FAILED)]}
    yield {"action": "FailIndex", "onExitCodes": never}


def _pod(wanted: Wanted) -> Manifest:
    optional = {
        "serviceAccountName": wanted.service_account,
        "imagePullSecrets": [{"name": wanted.pull_secret}] if wanted.pull_secret is not None else None,
        "nodeSelector": dict(wanted.selector),
        "tolerations": list(map(dict, wanted.tolerations)),
        "topologySpreadConstraints": [] if wanted.spread is None else [_spread(wanted, wanted.spread)],
    }
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_S,
        "automountServiceAccountToken": False,
        # or a Service called tuner-worker would set TUNER_WORKER_..., which are options
        "enableServiceLinks": False,
        # the pause container, and not the worker, waits for processes that others left
        "shareProcessNamespace": True,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        **{name: value for name, value in optional.items() if value},
        "initContainers": [_container(wanted, CHECK, [wanted.arguments[0], "--check", *wanted.arguments[1:]])],
        "containers": [_container(wanted, WORKER, wanted.arguments)],
        "volumes": [
            {"name": "data", "emptyDir": {}},
            {"name": "tmp", "emptyDir": {}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": wanted.resources.shared_memory}},
            {"name": "storage", "secret": {"secretName": wanted.secret, "defaultMode": _SECRET_MODE}},
            *(
                {"name": f"claim-{number}", "persistentVolumeClaim": {"claimName": name}}
                for number, (name, _, _) in enumerate(wanted.claims)
            ),
        ],
    }


def _spread(wanted: Wanted, key: str) -> Manifest:
    return {
        "maxSkew": 1,
        "topologyKey": key,
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": {JOB_LABEL: wanted.name}},
    }


def _container(wanted: Wanted, name: str, arguments: Sequence[str]) -> Manifest:
    limits = wanted.resources.limits()
    sources = [{"secretRef": {"name": each}} for each in wanted.environment_from]
    return {
        "name": name,
        "image": wanted.image,
        "command": ["tuner"],
        "args": list(map(_literal, arguments)),
        "env": list(_environment(wanted)),
        **({"envFrom": sources} if sources else {}),
        "resources": {"requests": dict(limits), "limits": dict(limits)},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        # the worker's last word is in the pod's status
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            {"name": "data", "mountPath": DATA_PATH},
            {"name": "tmp", "mountPath": TEMPORARY_PATH},
            {"name": "shm", "mountPath": SHARED_MEMORY_PATH},
            {"name": "storage", "mountPath": SECRETS_PATH, "readOnly": True},
            *(
                {"name": f"claim-{number}", "mountPath": path, **({"readOnly": True} if read_only else {})}
                for number, (_, path, read_only) in enumerate(wanted.claims)
            ),
        ],
    }


def _environment(wanted: Wanted) -> Iterator[Manifest]:
    yield {
        "name": "TUNER_STORAGE",
        "valueFrom": {"secretKeyRef": {"name": wanted.secret, "key": URL_KEY}},
    }
    values = {
        "TUNER_STORAGE_PASSWORD_FILE": f"{SECRETS_PATH}/{PASSWORD_KEY}",
        "TUNER_DATA_DIR": f"{DATA_PATH}/tuner",
        # volumes are open to everybody, and nobody else is in the pod
        "TUNER_TRUSTED_DIRECTORIES": f"{DATA_PATH}:{TEMPORARY_PATH}",
        **({} if wanted.log_format is None else {"TUNER_LOG_FORMAT": wanted.log_format}),
        "HOME": DATA_PATH,
        "USER": "tuner",
        "PYTHONDONTWRITEBYTECODE": "1",
        VARIABLES["engine"]: "k8s",
    }
    yield from ({"name": name, "value": value} for name, value in values.items())
    for name, field in {
        "POD_NAMESPACE": "metadata.namespace",
        VARIABLES["task"]: f"metadata.annotations['{INDEX}']",
        VARIABLES["node"]: "spec.nodeName",
    }.items():
        yield {"name": name, "valueFrom": {"fieldRef": {"fieldPath": field}}}
    yield {"name": VARIABLES["job"], "value": f"$(POD_NAMESPACE)/{wanted.name}"}


def _literal(argument: str) -> str:
    """Return an argument as Kubernetes leaves it: $(NAME) would be replaced by a variable's value."""
    return argument.replace("$", "$$")


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]  # PyYAML has no types
    def ignore_aliases(self, _: object) -> bool:
        return True


def _string(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    """Quote what any reader of YAML could take for no text; PyYAML alone leaves what only others would, such as 1e3."""
    is_plain = re.fullmatch(r"[A-Za-z/-][\w./-]+", value, re.ASCII) is not None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if is_plain else '"')


_Dumper.add_representer(str, _string)
