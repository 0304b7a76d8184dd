"""Which slots a worker has: `--slots`, the devices of this machine, and what each slot's process finds of them.

Nothing here imports torch: the worker itself never touches a device. NVIDIA's are counted by their driver; where torch
is for others, a process of its own asks it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from tuner import cores
from tuner.errors import UsageError

_ITEM = re.compile(r"(?P<device>cpu|mps|(?:cuda|xpu)(?::[0-9]+)?)(?:\*(?P<count>[0-9]+))?")
_NUMBER = re.compile(r"[0-9]+")
_WANTED = "--slots needs auto, a number, or devices such as cuda:0*3,cuda:1 or cpu*4"
_COMPILERS = "TORCHINDUCTOR_COMPILE_THREADS"  # processes
_CUDA = {
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # devices have the numbers that nvidia-smi gives them
    # torch looks at it once, when it multiplies its first matrices, and refuses deterministic training without.
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}
MAX_OF_CPU = 8
"""How many trials a CPU runs at a time unless somebody says: each is a process, and of more at once each learns from
fewer."""
MAX_SLOTS = 1000
"""More is a slip of the finger: each is a process of some hundred megabytes."""
MAX_THREADS = 1024
"""OpenMP ends a process that cannot have as many as it was told."""
ASK_S = 120.0
"""How long torch may take to import and to count the devices."""
_ASK = """
import torch
found = torch.accelerator.current_accelerator(check_available=True)
print("cpu 0" if found is None else f"{found.type} {torch.accelerator.device_count()}")
"""


@dataclass(frozen=True, kw_only=True)
class SlotPlan:
    """One slot. `device` is None for the best there is, which the slot finds out when it has imported torch.

    `share` is the part of its device that the slot has, `threads` what `--threads` says. `visible` is what its process
    gets as CUDA_VISIBLE_DEVICES, None to leave that as it is. `is_chosen` if nobody named the device: should torch not
    find it, the slot takes the best that there is instead.
    """

    number: int
    device: str | None
    share: float
    threads: int | None = None
    visible: str | None = None
    is_chosen: bool = False

    @property
    def shown(self) -> str:
        """The device as people know it."""
        return self.device or "auto"

    @property
    def own_device(self) -> str | None:
        """The device as the slot's process has to call it: the one that is visible is its first."""
        if self.is_chosen and not (self.device or "").startswith("xpu"):
            return None
        return "cuda:0" if self.visible else self.device

    @property
    def shares_cores(self) -> bool:
        """Whether it has as many threads as its share of the cores, nobody having said how many."""
        return self.threads is None and cores.named() is None

    def shared_environment(self, share: int) -> dict[str, str]:
        """Return the environment of the worker's slots, each of which has that share of the cores.

        Slots share the cores: with all of them each, they would fight. What the worker's own environment says comes
        before, and `--threads` before that. torch goes by MKL's number where that is given, hence it is always.
        """
        threads = str(self.threads or cores.named() or share)
        said = dict(os.environ)
        for name in cores.VARIABLES:
            if self.threads is not None or cores.number_of(said.get(name, "")) is None:
                said[name] = threads
        return {_COMPILERS: threads, **_CUDA, **cores.waiting(), **said}

    @property
    def own_environment(self) -> dict[str, str]:
        """What the slot's process finds in its environment instead."""
        return {} if self.visible is None else {"CUDA_VISIBLE_DEVICES": self.visible}

    def environment(self, share: int) -> dict[str, str]:
        """Return the whole environment of the slot's process."""
        return {**self.shared_environment(share), **self.own_environment}


def plan_slots(
    text: str,
    device: str | None = None,
    *,
    at_most: int | None = None,
    threads: int | None = None,
    device_share: float = 1.0,
) -> list[SlotPlan]:
    """Return the slots that `--slots` asks for, the first `at_most`, each with `threads`, if that is given.

    They have the part `device_share` of each device among them. `device`, that of `--device`, is for a number. `auto`
    is one slot for each CUDA or XPU device, else as many as a CPU has cores for, or one for the best other device.
    Raises UsageError.
    """
    if threads is not None and not 0 < threads <= MAX_THREADS:
        raise UsageError(f"--threads needs a number from 1 to {MAX_THREADS}, got {threads}")
    is_named = text != "auto" and not _NUMBER.fullmatch(text)
    wanted = text if is_named else device
    gpus = visible_gpus() if wanted is None or "cuda" in wanted else []  # it may take seconds to tell
    kind = "cuda"
    if gpus is None:
        kind, gpus = _counted_by_torch()
    if not is_named:
        devices = _devices(text, device, kind, gpus, threads)
    elif device is not None:
        raise UsageError(f"--slots names the devices already, got --slots {text} and --device {device}: leave one out")
    else:
        devices = [found for item in text.split(",") for found in _named(item.strip(), text, gpus)]
    if not devices:
        raise UsageError(f"{_WANTED}, at least one, got {text!r}")
    devices = devices[:at_most]  # before they share: the others take no memory and no threads
    shares = Counter(devices)
    if not 0 < device_share <= 1:
        raise UsageError(f"--device-share needs a part of 1, as 0.5, got {device_share:g}")
    return [
        SlotPlan(
            number=number,
            device=found,
            share=device_share / shares[found],
            threads=threads,
            visible=_visible(found, gpus if kind == "cuda" else []),
            is_chosen=not is_named and device is None,
        )
        for number, found in enumerate(devices)
    ]


def visible_gpus() -> list[str] | None:
    """Return the CUDA devices of this machine as CUDA_VISIBLE_DEVICES names them; None if torch has to count devices.

    Each instance (MIG) that a GPU is divided into is a device of its own, and the GPU itself is none.
    """
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name.strip() not in ("", "-1")]
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        found = Path("/proc/driver/nvidia/gpus")
        if found.is_dir():
            return [str(number) for number in range(len(list(found.iterdir())))]
        return None if _has_others() else []
    return _listed(listed.stdout)


def _has_others() -> bool:
    """Whether there may be devices of AMD or Intel, for which torch has builds of their own."""
    return Path("/dev/kfd").exists() or any(kind in version("torch") for kind in ("+rocm", "+xpu"))


def _counted_by_torch() -> tuple[str, list[str] | None]:
    """Return the kind of accelerator that torch finds, and the names of those; None for them where it finds none."""
    try:
        asked = [sys.executable, "-P", "-c", _ASK]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=ASK_S, check=True)
        kind, count = done.stdout.split()
    except (OSError, ValueError, subprocess.SubprocessError):
        return "cuda", None
    return (kind, [str(number) for number in range(int(count))]) if kind in ("cuda", "xpu") else ("cuda", None)


def _listed(text: str) -> list[str]:
    """Return the devices that nvidia-smi lists: a GPU a line, and after it, indented, its instances."""
    gpus: list[list[str]] = []
    for line in text.splitlines():
        instance = re.search(r"\(UUID: (MIG-[^)]+)\)", line)
        if line.startswith("GPU "):
            gpus.append([])
        elif instance is not None and gpus:
            gpus[-1].append(instance[1])
    return [name for number, instances in enumerate(gpus) for name in instances or [str(number)]]


def _devices(text: str, device: str | None, kind: str, gpus: list[str] | None, threads: int | None) -> list[str | None]:
    if text == "auto":
        if device == "cpu" or (device is None and gpus == [] and sys.platform != "darwin"):  # which may have an mps
            return [device] * min(MAX_OF_CPU, max(1, cores.count() // (threads or cores.named() or 1)))
        if device is not None:
            return [device]
        return [f"{kind}:{number}" for number in range(len(gpus or ()))] or [None]
    count = _count(text, text)
    if device is not None or not gpus:
        return [device] * count
    return [f"{kind}:{number % len(gpus)}" for number in range(count)]


def _named(item: str, text: str, gpus: list[str] | None) -> list[str | None]:
    match = _ITEM.fullmatch(item)
    if match is None:
        raise UsageError(f"{_WANTED}, got {text!r}")
    device = f"{match['device']}:0" if match["device"] in ("cuda", "xpu") else match["device"]
    if device.startswith("cuda") and gpus is not None and int(device[5:]) >= len(gpus):
        has = f"{len(gpus)} CUDA device{'' if len(gpus) == 1 else 's'}"
        raise UsageError(f"--slots names {match['device']}, but this machine has {has}")
    if device == "mps" and sys.platform != "darwin":
        raise UsageError("--slots names mps, which only machines of Apple have")
    return [device] * _count(match["count"] or "1", text)


def _count(digits: str, text: str) -> int:
    if len(digits) > len(str(MAX_SLOTS)) or int(digits) > MAX_SLOTS:
        raise UsageError(f"a worker has at most {MAX_SLOTS} slots of a device, got {text!r}")
    return int(digits)


def _visible(device: str | None, gpus: list[str] | None) -> str | None:
    if device == "cpu":
        return ""
    number = re.fullmatch(r"cuda(?::(\d+))?", device or "")
    if number is None or not gpus or int(number[1] or 0) >= len(gpus):
        return None
    return gpus[int(number[1] or 0)]
