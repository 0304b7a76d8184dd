"""Whether a study has nothing but failures by one error, which further trials would only repeat."""

from __future__ import annotations

import re
from typing import Final

from sqlalchemy import Connection, and_, select

from storage.database.foreign import BAD, json_values
from storage.database.tables import trial_system_attributes, trial_user_attributes, trials
from storage.trials.queued import FIXED_PARAMS

N_ALIKE: Final = 3
"""So many failures alike, with no trial complete or pruned, end a study."""
# What differs by the params: sizes in the message of a shape, but not the line of the user's file.
_NUMBER: Final = re.compile(r"[-+]?(?<!line )(?<![\d.])\d[\d.]*(?:e[-+]?\d+)?")


def failed_alike(conn: Connection, study_id: int) -> str | None:
    """Return the latest message of N_ALIKE or more failures that say the same but for numbers, None without so many.

    Only errors of the objective's code count: memory and NaN may be the params' doing, of which others are better.
    So may be the errors of trials whose params somebody enqueued.
    """
    kind, message = trial_user_attributes.alias("kind"), trial_user_attributes.alias("message")
    fixed = trial_system_attributes
    query = (
        select(message.c.value_json)
        .select_from(trials)
        .join(kind, and_(kind.c.trial_id == trials.c.trial_id, kind.c.key == "failure"))
        .join(message, and_(message.c.trial_id == trials.c.trial_id, message.c.key == "failure_message"))
        .outerjoin(fixed, and_(fixed.c.trial_id == trials.c.trial_id, fixed.c.key == FIXED_PARAMS))
        .where(
            trials.c.study_id == study_id,
            trials.c.state == "FAIL",
            kind.c.value_json == '"user_error"',
            fixed.c.trial_id.is_(None),
        )
        .order_by(trials.c.number)
    )
    counts: dict[str, int] = {}
    found = None
    for text in conn.execute(query).scalars():
        shape = _NUMBER.sub("#", text)
        counts[shape] = counts.get(shape, 0) + 1
        if counts[shape] >= N_ALIKE:
            found = text
    return None if found is None else str(found if (value := json_values([found])[0]) is BAD else value)
