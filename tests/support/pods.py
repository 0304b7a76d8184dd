"""A pod without Kubernetes: a container of a manifest as a process, with the file system, user and variables it has."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from command import Running

ROOT = Path(__file__).parents[2]
_FRESH = ("data", "tmp", "run")  # what of / a pod has for itself
_ENTER = """\
set -e
mount --make-rprivate /
mount -t tmpfs -o mode=755 pod "$1"
for each in /*; do
    name=${each#/}
    case " $2 " in *" $name "*) mkdir "$1/$name"; continue;; esac
    if [ -L "$each" ]; then cp -P "$each" "$1$each"
    elif [ -d "$each" ]; then mkdir "$1$each" && mount --rbind "$each" "$1$each"
    fi
done
shift 2
root=$1; shift
while [ "$1" != -- ]; do mkdir -p "$root$2"; mount --bind "$1" "$root$2"; shift 2; done
shift
mount -o remount,ro "$root"
exec chroot "$root" "$@"
"""


def why_not() -> str | None:
    """Return why this system cannot have pods, None if it can."""
    if os.geteuid() != 0:
        return "file systems of a pod's own need root"
    if missing := [name for name in ("unshare", "chroot", "setpriv") if shutil.which(name) is None]:
        return f"not installed: {', '.join(missing)}"
    done = subprocess.run(["unshare", "--mount", "mount", "--make-rprivate", "/"], capture_output=True, check=False)
    return None if done.returncode == 0 else "file systems cannot be mounted here"


@dataclass(frozen=True)
class Pod:
    """A pod of a Job's index on a node of a cluster that has `secrets` and `claims`; its volumes are in `directory`."""

    job: Mapping[str, Any]
    index: int
    node: str
    secrets: Mapping[str, Mapping[str, str]]
    claims: Mapping[str, Path]
    directory: Path

    @property
    def spec(self) -> Any:
        """What its template says."""
        return self.job["spec"]["template"]["spec"]

    def start(self, container: str) -> Running:
        """Start a container as the kubelet would, but for its limits and capabilities; close it afterwards."""
        [found] = [
            each for each in (*self.spec["initContainers"], *self.spec["containers"]) if each["name"] == container
        ]
        security = self.spec["securityContext"]
        assert found["securityContext"]["readOnlyRootFilesystem"]
        assert security["runAsNonRoot"]
        user, group = security["runAsUser"], security["runAsGroup"]
        environ = self._environ(found)
        program, *arguments = [_expanded(word, environ) for word in (*found["command"], *found.get("args", []))]
        root = self.directory / "root"
        root.mkdir(exist_ok=True)
        mounts = [(self.volume(each["name"]), each["mountPath"]) for each in found["volumeMounts"]]
        # what the image would have, where it is not hidden by what the pod has for itself
        image = [(path, path) for path in map(Path, dict.fromkeys([sys.prefix, sys.base_prefix, str(ROOT)]))]
        image = [(path, str(path)) for path, _ in image if path.parts[1] in _FRESH]
        identity = [f"--reuid={user}", f"--regid={group}", f"--groups={security['fsGroup']}", "--no-new-privs"]
        process = subprocess.Popen(
            [
                *("unshare", "--mount", "sh", "-c", _ENTER, "sh", root, " ".join(_FRESH), root),
                *(word for source, place in (*mounts, *image) for word in (source, place)),
                *("--", "setpriv", *identity, "--inh-caps=-all", "--bounding-set=-all"),
                *(Path(sys.executable).with_name(program), *arguments),
            ],
            env=environ,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        return Running(process)

    def _environ(self, container: Mapping[str, Any]) -> dict[str, str]:
        environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
        for variable in container["env"]:
            source = variable.get("valueFrom", {})
            if key := source.get("secretKeyRef"):
                value = self.secrets[key["name"]][key["key"]]
            elif field := source.get("fieldRef"):
                value = self._field(field["fieldPath"])
            else:
                value = _expanded(variable["value"], environ)
            environ[variable["name"]] = value
        return environ

    def _field(self, path: str) -> str:
        return {
            "metadata.namespace": self.job["metadata"].get("namespace", "default"),
            "metadata.annotations['batch.kubernetes.io/job-completion-index']": str(self.index),
            "spec.nodeName": self.node,
        }[path]

    def volume(self, name: str) -> Path:
        """Return a volume's directory, with the owner and the modes that the kubelet gives it."""
        [volume] = [each for each in self.spec["volumes"] if each["name"] == name]
        if claim := volume.get("persistentVolumeClaim"):
            return self.claims[claim["claimName"]]
        place = self.directory / name
        if place.exists():
            return place
        place.mkdir()
        group = self.spec["securityContext"]["fsGroup"]
        for key, value in self.secrets.get(volume.get("secret", {}).get("secretName", ""), {}).items():
            file = place / key
            file.write_text(value)
            os.chown(file, 0, group)
            file.chmod(volume["secret"]["defaultMode"])
        os.chown(place, 0, group)
        place.chmod(0o2777)
        return place


def _expanded(text: str, environ: Mapping[str, str]) -> str:
    """Return the text with its variables replaced, as Kubernetes does; $$ is $, and what is unknown stays."""

    def value(match: re.Match[str]) -> str:
        return "$" if match[0] == "$$" else environ.get(match["name"], match[0])

    return re.sub(r"\$\$|\$\((?P<name>[^)]*)\)", value, text)
