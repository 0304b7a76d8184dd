"""Starts a slot by itself, where it cannot be forked (`tuner.slot.nursery`): `python -m tuner.slot.start OBJECTIVE`.

It imports torch, and the objective that its worker was given on the command line, while the worker makes sure of the
study; then it is a slot, which begins as soon as it is configured.
"""

from __future__ import annotations

import sys

from tuner.slot.preparing import import_objective, import_torch, prepare


def main() -> None:
    """Import what a slot needs, then be one (`tuner.slot.slot.main`)."""
    prepare()
    import_torch()
    import_objective(sys.argv[1])

    from tuner.slot import slot

    slot.main()


if __name__ == "__main__":
    main()
