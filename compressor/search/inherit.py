"""Let the search for one target begin with what the finished search for another one has scored, trained and learned."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from compressor.core.files import replacing

if TYPE_CHECKING:
    from compressor.core.records import Checkpoint


def inherit(earlier: Checkpoint, own: Checkpoint) -> int:
    """Copy the state of a finished search, so that the next one continues it with budgets of its own.

    Scored plans, measured groups, trained weights and the agent's state are kept; times and episodes begin anew. The
    state is written last: what was killed before can be done again.

    Args:
        earlier: Checkpoint of the finished search.
        own: Where the next search finds its checkpoint.

    Returns:
        Number of plans that the next search knows; 0 if there is no finished search.
    """
    state = earlier.load()
    if state is None or state["place"]["chosen"] is None:
        return 0
    if state["weights"] is not None:
        with replacing(own.path.with_name(state["weights"])) as temporary:
            shutil.copyfile(earlier.path.with_name(state["weights"]), temporary)
    place = {**state["place"], "first_round": state["place"]["round"] + 1, "seconds": 0.0, "training_seconds": 0.0}
    env = {**state["env"], "evaluation_seconds": 0.0}
    own.save({**state, "place": place, "env": env, "episodes": 0})
    return len(state["env"]["known"])
