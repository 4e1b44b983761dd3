"""A reward after every group, and a double dueling Q-network that learns from it (PuRL, arXiv 2007.04756)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import nn

from compressor.core import progress
from compressor.search.allocation import POWERS, Allocator, Sensitivity, starting_plans
from compressor.search.base import Agent, LearningSettings, Published, register_agent
from compressor.search.environment import FEATURES
from compressor.search.neighbours import NearBest
from compressor.search.proposals import uniform_or_cheapest
from compressor.search.randomness import OwnRandomness
from compressor.search.records import SearchResult
from compressor.search.session import ANOTHER_TARGET, best_of_round, from_earlier_rounds, merit

if TYPE_CHECKING:
    from compressor.search.bounds import Widths
    from compressor.search.records import Candidate
    from compressor.search.session import SearchSession


class Dueling(nn.Module):
    """Q(s, a) = V(s) + A(s, a) - mean A(s, .) (Wang et al., arXiv 1511.06581), two hidden layers."""

    def __init__(self, inputs: int, actions: int, hidden: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
        self.value, self.advantage = nn.Linear(hidden, 1), nn.Linear(hidden, actions)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        seen = self.body(states)
        advantage: torch.Tensor = self.advantage(seen)
        total: torch.Tensor = self.value(seen) + advantage - advantage.mean(dim=1, keepdim=True)
        return total


class DoubleDqn:
    """Learns Q-values from a replay; the online network chooses the next action, the target network evaluates it
    (van Hasselt et al., arXiv 1509.06461).

    Args:
        inputs: Size of a state.
        actions: Number of actions.
        hidden: Width of the two hidden layers.
        rate: Learning rate of Adam.
        gamma: Discount.
        tau: Share of the online network that goes into the target at each update.
        capacity: Maximum number of stored transitions.
        seed: Seed of the networks and of all draws.
    """

    def __init__(
        self,
        inputs: int,
        actions: int,
        *,
        hidden: int,
        rate: float,
        gamma: float,
        tau: float,
        capacity: int,
        seed: int,
    ) -> None:
        self.actions, self.gamma, self.tau = actions, gamma, tau
        self.randomness = OwnRandomness(seed)
        with self.randomness.active():
            self.online = Dueling(inputs, actions, hidden)
            self.target = Dueling(inputs, actions, hidden)
        self.target.load_state_dict(self.online.state_dict())
        self.optimizer = torch.optim.Adam(self.online.parameters(), lr=rate)
        self._memory = torch.zeros(capacity, 2 * inputs + 3)
        self._inputs, self._stored = inputs, 0

    def act(self, state: NDArray[np.float32], epsilon: float) -> int:
        """Return the best action, or with probability `epsilon` a random one."""
        with self.randomness.active(), torch.no_grad():
            if np.random.random() < epsilon:
                return int(np.random.randint(self.actions))
            return int(self.online(torch.from_numpy(state)[None]).argmax())

    def remember(
        self,
        state: NDArray[np.float32],
        action: int,
        reward: float,
        following: NDArray[np.float32],
        last: bool,
    ) -> None:
        """Store a transition; it replaces the oldest if the replay is full."""
        row = np.concatenate([state, following, [action, reward, float(last)]]).astype(np.float32)
        self._memory[self._stored % len(self._memory)] = torch.from_numpy(row)
        self._stored += 1

    def learn(self, updates: int, batch: int) -> float:
        """Train on transitions drawn at random; return the mean loss."""
        losses = []
        size, n = min(self._stored, len(self._memory)), self._inputs
        with self.randomness.active():
            for _ in range(updates):
                rows = self._memory[torch.randint(size, (batch,))]
                states, following, (actions, rewards, lasts) = (
                    rows[:, :n],
                    rows[:, n : 2 * n],
                    rows[:, 2 * n :].T,
                )
                with torch.no_grad():
                    chosen = self.online(following).argmax(dim=1, keepdim=True)
                    worth = self.target(following).gather(1, chosen)[:, 0]
                    wanted = rewards + self.gamma * (1 - lasts) * worth
                predicted = self.online(states).gather(1, actions.long()[:, None])[:, 0]
                loss = nn.functional.smooth_l1_loss(predicted, wanted)
                self.optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                self.optimizer.step()
                with torch.no_grad():
                    for target, online in zip(self.target.parameters(), self.online.parameters(), strict=True):
                        target.lerp_(online, self.tau)
                losses.append(float(loss.detach()))
        return sum(losses) / max(1, len(losses))

    def state(self) -> dict[str, Any]:
        """Return networks, optimizer, replay and random numbers, as tensors and plain values."""
        return {
            "online": self.online.state_dict(),
            "target": self.target.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "memory": self._memory[: self._stored].clone(),
            "stored": self._stored,
            "randomness": self.randomness.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self.online.load_state_dict(state["online"])
        self.target.load_state_dict(state["target"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._memory[: len(state["memory"])] = state["memory"]
        self._stored = int(state["stored"])
        self.randomness.restore(state["randomness"])


ALPHAS = np.round(np.arange(0.0, 2.21, 0.1), 1)
"""The paper's actions: prune what lies below this many standard deviations of the layer's weights."""


Choice = Callable[[int, NDArray[np.float32]], tuple[int, float]]
"""Maps the index of a group and the state to an action, and the ratio to remove."""


class StepwiseSettings(LearningSettings):
    episodes: int = Field(
        55,
        ge=1,
        description="Episodes, including turns near the best, unless the limits set another number; the paper "
        "needs about 55. Each costs up to one evaluation per group; one near the best that is also played, up to "
        "two.",
    )
    again_episodes: int = Field(2, ge=1, description="Episodes after a budget was tightened.")
    beta: float = Field(5.0, gt=0, description="Scale of the rewards.")
    rate: float = Field(1e-3, gt=0, description="Learning rate (Adam).")
    gamma: float = Field(0.99, ge=0, le=1, description="Discount.")
    tau: float = Field(0.01, gt=0, description="Share that goes into the target network at each update.")
    replay: int = Field(10_000, ge=1, description="Transitions that are kept.")
    updates_per_step: int = Field(1, ge=1, description="Updates per decided group.")
    epsilon: float = Field(
        0.05,
        ge=0,
        le=1,
        description="Share of random actions at the end; it falls from 1 over the first two thirds of the episodes.",
    )
    actions: Literal["shares", "alpha"] = Field(
        "shares",
        description="shares: as many evenly spaced shares of a group's channels as there are thresholds; alpha: "
        "the paper's thresholds; norms of filters are close together, so that most of these remove none or all.",
    )
    warm_start: bool = Field(
        True,
        description="Whether the episodes begin with the knapsack's plan, and each group is measured for it if "
        "the limits leave enough for an episode afterwards; the replay gets the nearest actions.",
    )
    near_share: float = Field(
        0.75,
        ge=0,
        le=1,
        description="Share of the turns that vary the best plan so far instead of using the network: as many "
        "plans as an episode has evaluations, each scored once, when it is complete.",
    )


PUBLISHED = (
    Published("what is removed", "", "single weights", here="whole channels"),
    Published(
        "actions",
        "actions",
        "alpha",
        why="norms of filters lie close together: most of the published thresholds remove none of them or all",
    ),
    Published("reward after every group", "", "dense", here="dense", named=True),
    Published("scale of the rewards", "beta", 5.0),
    Published("episodes", "episodes", 55),
    Published(
        "groups measured before the first episode",
        "warm_start",
        False,
        why="the first episode is a good plan",
    ),
    Published(
        "turns near the best plan",
        "near_share",
        0.0,
        why="an episode costs one evaluation a group, and a whole plan near the best costs one",
    ),
)
"""The method as arXiv 2007.04756 has it; the source leaves network, replay and rates open."""


@register_agent
class StepwiseAgent(Agent):
    """Chooses a share for each group, and observes accuracy and cost after each.

    Reward after a group: -beta * (max(1 - A / T_A, 0) + max(1 - P / T_P, 0)), with A the accuracy of the network so
    far and T_A the dense one's, P the share of the cost removed so far and T_P the share that the tightest budget
    requires. The environment's bounds enforce the budgets. The thresholds of the original remove single weights; with
    the setting `actions: alpha` a threshold stands for the share of a group's filters whose norm lies below it, never
    below the minimum width. A filter counts by the root of its mean squared weight; for weights around 0, a layer's
    standard deviation is the quadratic mean of these.
    """

    name = "stepwise"
    source = "arXiv 2007.04756"
    published = PUBLISHED
    Settings = StepwiseSettings

    def unread_settings(self) -> dict[str, str]:
        names = ("near_spread", "proposals")
        return {} if self.settings.near_share else dict.fromkeys(names, "near_share is 0")

    def _search(self, run: SearchSession) -> SearchResult:
        search = _StepwiseSearch(run, self.settings)
        search.measure_groups()
        search.start_again()
        total = search.episodes()
        phase = f"stepwise{run.place.round or ''}"
        cost = search.groups + 1  # the first episode also needs the dense network's
        # Episodes over known plans cost less: if all evaluations are to be used, more of them follow.
        most = 10 * total if run.limits.use_all and not run.place.round else total
        with progress.bar("Playing episodes", total=total) as bar:
            bar.advance(run.place.steps.get(phase, 0))
            for episode in run.remaining(phase, most):
                if run.spent(reserve=2 * cost if episode else cost):  # one is reserved for the network's own
                    break
                search.turn(episode, total, phase)
                run.done(phase)
                bar.advance(note=f"{run.candidates[-1].accuracy:.1%}" if run.candidates else "")
        if run.limits.use_all and not run.place.round:
            search.play_out(phase)
        best = best_of_round(run)
        first = search.beginning() if best is None else best.widths
        shortlist = [list(first), uniform_or_cheapest(run.env).tolist()]
        return run.choose(shortlist, expected=search.near.expected)


class _StepwiseSearch:
    def __init__(self, run: SearchSession, settings: StepwiseSettings) -> None:
        self.run, self.env, self.settings = run, run.env, settings
        bounds = run.env.bounds
        self.groups = len(bounds.dense)
        self._ratios = self._alphas() if settings.actions == "alpha" else self._shares()
        self._allocator = Allocator(run.env)
        self._sensitivity = Sensitivity(run, self._allocator.levels)
        self._dense_share = bounds.shares(bounds.dense[None])[:, 0]
        self._binding = self._dense_share > 1.0  # the others are met from the start, and can only be exceeded
        self._dqn = DoubleDqn(
            len(FEATURES) + run.env.context_size + 2 + len(bounds.dense),
            len(ALPHAS),
            hidden=settings.hidden,
            rate=settings.rate,
            gamma=settings.gamma,
            tau=settings.tau,
            capacity=settings.replay,
            seed=run.agent.seed,
        )
        self.near = NearBest(run, self._allocator, self._sensitivity, settings.near_spread, settings.proposals)
        run.own = lambda: {
            "dqn": self._dqn.state(),
            "losses": self._sensitivity.losses,
            "near": self.near.state(),
        }
        if run.restored is not None:
            self._dqn.restore(run.restored["dqn"])
            self.near.restore(run.restored["near"])
            self._sensitivity.losses = list(run.restored["losses"])

    def _alphas(self) -> list[NDArray[np.float64]]:
        """Return the share of each group's filters below each threshold."""
        groups = [
            np.array([float((values < alpha * np.sqrt((values**2).mean())).mean()) for alpha in ALPHAS])
            for values in self.env.space.rank("l2").scores
        ]
        return [*groups, *self._shares()[len(groups) :]]

    def _shares(self) -> list[NDArray[np.float64]]:
        """Return for each group shares from none to all but the minimum width."""
        bounds = self.env.bounds
        return [
            np.linspace(0.0, 1.0 - float(choices[0]) / float(dense), len(ALPHAS))
            for choices, dense in zip(bounds.choices, bounds.dense, strict=True)
        ]

    def measure_groups(self) -> None:
        """For the warm start, measure the cost of pruning each group alone, if an episode can follow."""
        most, groups = self.run.limits.max_evaluations, len(self.env.bounds.dense)
        enough = most is None or most >= 2 * groups + self.groups + 3
        if self.settings.warm_start and enough and not self.run.place.round:
            self._sensitivity.measure()

    def start_again(self) -> None:
        """For another target, score the uniform plan and the knapsack's once each."""
        if not (self.run.another_target and self.settings.warm_start):
            return
        starts = starting_plans(self.env, self._allocator, self._sensitivity)
        phase = f"start{self.run.place.round}"
        for step in self.run.remaining(phase, len(starts)):
            if self.run.spent(reserve=self.groups + 2):
                return
            self.run.score(starts[step](), phase)
            self.run.done(phase)

    def episodes(self) -> int:
        """Number of episodes of this round within the limits."""
        if self.run.another_target:
            first = self.run.place.steps.get("stepwise", 0)
            return max(int(self.settings.again_episodes), round(ANOTHER_TARGET * first))
        if self.run.place.round:
            return int(self.settings.again_episodes)
        most = self.run.limits.max_evaluations
        if most is None:
            return int(self.settings.episodes)
        room = max(1, (most - 2 - sum(map(len, self._sensitivity.losses))) // self.groups)
        return room if self.run.limits.use_all else min(room, int(self.settings.episodes))

    def beginning(self) -> Widths:
        """Return the first plan: in a later round the last result, scaled to the current budgets, or a better one.

        Otherwise the knapsack's; or the uniform one without a warm start, or without the time to solve for another.
        """
        if self.run.place.round:
            best = best_of_round(self.run)
            return next(from_earlier_rounds(self.run)) if best is None else np.array(best.widths, dtype=np.int64)
        if not self.settings.warm_start or self.run.late:
            return uniform_or_cheapest(self.env)
        if self._sensitivity.complete:
            return self._allocator.solve(self._sensitivity.values())
        return self._allocator.solve_saliency(POWERS[0])

    def turn(self, episode: int, total: int, phase: str) -> None:
        """Play the first plan, then episodes of the network and turns that vary the best plan so far.

        The last planned episode of the network is deterministic.
        """
        generator = np.random.default_rng([self.run.agent.seed, self.run.place.round, episode])
        best = best_of_round(self.run)
        if episode == 0 and (self.settings.warm_start or self.run.place.round):
            self._play(self._following(self.beginning()), phase)
        elif episode == total - 1:
            self._play(self._learned(0.0), phase)
        elif best is not None and generator.random() < self.settings.near_share:
            self._vary()
            self._teach(best, phase)
        else:
            self._play(self._learned(self._epsilon(episode, total)), phase)

    def play_out(self, phase: str) -> None:
        """Spend the remaining evaluations: a deterministic episode of the network, then plans near the best."""
        if not self.run.spent(reserve=self.groups + 1) and "last" not in self.run.place.steps:
            self._play(self._learned(0.0), phase)
            self.run.done("last")
        for _ in self.run.remaining("out", 4 if self.settings.near_share else 0):
            if self.run.spent(reserve=1):
                return
            self._vary()
            self.run.done("out")

    def _vary(self) -> None:
        """Score plans near the best, each once, when it is complete: as many as an episode has evaluations."""
        for _ in range(self.groups):
            best = best_of_round(self.run)
            if best is None or self.run.spent(reserve=1):
                return
            self.near.score(np.array(best.widths, dtype=np.int64))

    def _teach(self, before: Candidate, phase: str) -> None:
        """Play the best plan as an episode if it is better than before, so that the network learns from it."""
        best = best_of_round(self.run)
        if best is None or merit(best) <= merit(before):
            return
        if not self.run.spent(reserve=self.groups + 1):
            self._play(self._following(np.array(best.widths, dtype=np.int64)), phase)

    def _learned(self, epsilon: float) -> Choice:
        def choice(step: int, state: NDArray[np.float32]) -> tuple[int, float]:
            action = self._dqn.act(state, epsilon)
            return action, float(self._ratios[step][action])

        return choice

    def _following(self, widths: Widths) -> Choice:
        """Follow these widths (G,), with the nearest actions."""
        ratios = 1.0 - widths / self.env.bounds.dense

        def choice(step: int, state: NDArray[np.float32]) -> tuple[int, float]:
            return int(np.abs(self._ratios[step] - ratios[step]).argmin()), float(ratios[step])

        return choice

    def _epsilon(self, episode: int, total: int) -> float:
        """Return the share of random actions in an episode."""
        if self.run.place.round:
            return self.settings.epsilon
        return max(float(self.settings.epsilon), 1.0 - episode / max(1.0, 2 / 3 * total))

    def _play(self, choice: Choice, phase: str) -> None:
        """Play one episode, with a reward after each group, and then update; stop if the time limit is reached."""
        env, groups = self.env, len(self.env.bounds.dense)
        dense = env.score(env.bounds.dense).accuracy
        widths, past = env.bounds.dense.copy(), np.zeros(groups)
        observation, _ = env.reset()
        state = self._state(observation, 1.0, self._progress(widths), past)
        for step in range(groups):
            if step and self.run.late:
                return
            action, ratio = choice(step, state)
            observation, _, last, _, info = env.step(np.array([ratio], dtype=np.float32))
            widths[step], past[step] = info["width"], info["action"]
            accuracy = self.run.score(widths, phase).accuracy if last else env.score(widths).accuracy
            reached = self._progress(widths)
            kept = accuracy / max(dense, 1e-9)
            reward = -self.settings.beta * (max(1 - kept, 0.0) + max(1 - reached, 0.0))
            following = self._state(observation, kept, reached, past)
            self._dqn.remember(state, action, reward, following, last)
            state = following
        loss = self._dqn.learn(self.settings.updates_per_step * groups, self.settings.batch)
        self.run.curves.add(len(self.run.candidates), {"agent/q_loss": loss})

    def _progress(self, widths: Widths) -> float:
        """Return P / T_P of the tightest budget, from -1 to 2; 1 is reached.

        A budget that the dense network meets requires nothing: it is reached, minus any excess.
        """
        shares, dense = self.env.bounds.shares(widths[None])[:, 0], self._dense_share
        reached = 1.0 - np.maximum(shares - 1.0, 0.0)
        binding = self._binding
        reached[binding] = (1.0 - shares[binding] / dense[binding]) / (1.0 - 1.0 / dense[binding])
        return float(np.clip(reached.min(initial=1.0), -1.0, 2.0))

    def _state(
        self, observation: NDArray[np.float32], kept: float, reached: float, past: NDArray[Any]
    ) -> NDArray[np.float32]:
        return np.concatenate([observation, [kept, reached], past]).astype(np.float32)
