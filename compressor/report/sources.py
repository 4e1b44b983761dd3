"""What the sources of candidates are, in a few words, for readers who do not know the agents."""

from __future__ import annotations

import re

MEANINGS = {
    "uniform": "every group cut by the same share",
    "sensitivity": "one group cut alone, to measure what it costs",
    "saliency": "knapsack, by the saliency of the weights",
    "sensitivities": "knapsack, by the measured cost of each group",
    "fill": "first plans of the agent: knapsack, random, near the best",
    "start": "plans to begin with: uniform and knapsack",
    "random": "random plans",
    "joint": "the agent's policy, while the weights train",
    "policy": "the agent's policy, without chance",
    "stepwise": "the agent's policy, a group at a time",
    "near": "changes of the best plan so far",
    "favoured": "the plan that the training pulls towards",
    "again": "known plans, scaled to other budgets",
    "final": "the best ones, scored again at the end",
}
"""Source without its number -> what it is; sources of a user's own agent have no entry."""


def meaning(source: str) -> str:
    """Return what a source is; empty if it is not known.

    >>> meaning("again2"), meaning("saliency0.5"), meaning("mine")
    ('known plans, scaled to other budgets', 'knapsack, by the saliency of the weights to the power 0.5', '')
    """
    name, number = re.fullmatch(r"(.*?)([0-9.]*)", source, re.DOTALL).groups()  # type: ignore[union-attr]
    found = MEANINGS.get(name, "")
    return f"{found} to the power {number}" if found and name == "saliency" and number else found
