"""What a worker tells people about its slots, in words."""

from __future__ import annotations

from typing import Any


def printed(line: str, number: int, trial: int | None) -> str:
    """Return a line that slot `number` printed while it had a trial, or none."""
    return f"slot {number}: {line}" if trial is None else f"slot {number}, trial {trial}: {line}"


def reported(event: dict[str, Any], number: int, metric: str) -> str:
    """Return what a trial of slot `number` reported; the loss is known of those that are trained by us."""
    loss = f", loss {event['loss']:.6g}" if "loss" in event else ""
    step = f"{'epoch' if loss else 'step'} {event['epoch']}"
    return f"trial {event['trial']}, {step}: {metric} {event['value']:.6g}{loss} (slot {number})"


def hung(trial: int | None, slot: str, reason: str) -> str:
    """Return what is told before a slot is killed, and what it wrote of its threads."""
    return f"trial {trial} hangs: {reason}; {slot} is to say where its threads are, and is killed"


def describe(name: str, event: dict[str, Any], number: int, device: str, metric: str) -> str | None:
    """Return what to tell people about an event of slot `number`, None for nothing."""
    because = f": {event['message']}" if "message" in event else ""
    if name == "trial_ended":
        value = f": {metric} {event['value']:.6g}" if "value" in event else ""
        took = f"{event.get('seconds', 0):.1f} s"
        return f"trial {event['trial']} {event['state'].lower()}{value}{because} ({took}, slot {number})"
    described = {
        "trial_released": f"trial {event.get('trial')} given back{because} (slot {number})",
        "out_of_memory": f"trial {event.get('trial')} ran out of memory; it runs again when {device} is free",
        "result_kept": f"trial {event.get('trial')} ended{because} (slot {number})",
        "note": f"{event.get('message')} (slot {number})",
        "database_away": f"slot {number}{because}; trying again",
    }
    return described.get(name)
