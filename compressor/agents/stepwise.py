"""A reward after every group, and a Q-network that learns from it (PuRL, arXiv 2007.04756)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from compressor import progress
from compressor.agents.allocation import Allocator, Values
from compressor.agents.base import Agent, SearchResult
from compressor.agents.best import best_known, best_of_round, merit
from compressor.agents.dueling import DoubleDqn
from compressor.agents.proposals import near_widths, scaled_widths, uniform_or_cheapest
from compressor.agents.values import POWERS, Sensitivity, saliency_values
from compressor.env.observation import FEATURES
from compressor.errors import CompressorError

if TYPE_CHECKING:
    from compressor.agents.base import Candidate
    from compressor.agents.search_run import SearchRun

ALPHAS = np.round(np.arange(0.0, 2.21, 0.1), 1)
"""The paper's actions: prune what lies below so many standard deviations of the layer's weights."""


Choice = Callable[[int, NDArray[np.float32]], tuple[int, float]]
"""From the number of a group and the state to an action, and the ratio to remove."""


@dataclass(frozen=True)
class StepwiseSettings:
    """Attributes:
    episodes: unless the limits ask for others, turns near the best included; the paper needs about 55. Each costs
        one evaluation a group.
    again_episodes: episodes after a budget was tightened.
    beta: scale of the rewards.
    hidden: width of the two hidden layers.
    rate, gamma, tau, batch, replay: learning rate, discount, share that goes into the target network at each
        update, transitions in an update, transitions kept.
    updates_per_step: updates for each group decided.
    epsilon: share of random actions at the end; it falls from 1 over the first two thirds of the episodes.
    actions: "shares", as many evenly spaced shares of a group's channels as there are thresholds; or "alpha", the
        paper's thresholds: norms of filters lie close together, so that most of these remove none or all.
    warm_start: whether the episodes begin with the knapsack's plan, and each group is measured for it where there are
        three evaluations for each; the replay gets the nearest actions.
    near_share: share of the turns that vary the best plan so far instead of asking the network: as many plans as an
        episode has evaluations, each scored once, when it is whole.
    near_spread: standard deviation of their change to the logarithm of ratios.
    rewards: "dense", after every group; or "terminal", the same number once, after the last one, for comparison: one
        evaluation an episode, and the accuracy in the state stays the dense one's.
    """

    episodes: int = 55
    again_episodes: int = 2
    beta: float = 5.0
    hidden: int = 300
    rate: float = 1e-3
    gamma: float = 0.99
    tau: float = 0.01
    batch: int = 64
    replay: int = 10_000
    updates_per_step: int = 1
    epsilon: float = 0.05
    actions: Literal["shares", "alpha"] = "shares"
    warm_start: bool = True
    near_share: float = 0.5
    near_spread: float = 0.3
    rewards: Literal["dense", "terminal"] = "dense"

    def __post_init__(self) -> None:
        if self.rewards not in ("dense", "terminal"):
            raise CompressorError(f"The setting rewards is {self.rewards!r}, expected 'dense' or 'terminal'.")
        if self.actions not in ("shares", "alpha"):
            raise CompressorError(f"The setting actions is {self.actions!r}, expected 'shares' or 'alpha'.")


class StepwiseAgent(Agent):
    """Chooses a share for each group, and is told after each what became of accuracy and cost.

    Reward after a group: -beta * (max(1 - A / T_A, 0) + max(1 - P / T_P, 0)), with A the accuracy of the network so
    far and T_A the dense one's, P the share of the cost removed so far and T_P that which the tightest budget asks for.
    The environment's bounds keep the budgets. The thresholds of the original remove single weights; with the setting
    `actions: alpha` a threshold stands for the share of a group's filters whose norm lies below it, never below the
    minimum width. A filter counts by the root of its mean squared weight; for weights around 0, a layer's standard
    deviation is the quadratic mean of these.
    """

    name = "stepwise"
    Settings = StepwiseSettings

    def _search(self, run: SearchRun) -> SearchResult:
        env = run.env
        search = _StepwiseSearch(run, self.settings)
        search.measure_groups()
        total = search.episodes()
        phase = f"stepwise{run.place.round or ''}"
        most = total if run.place.round else max(1, total - 1)  # and the network's own at the end
        if run.limits.use_all and not run.place.round:
            most = 10 * total  # episodes over plans that are known cost less, so that more of them can follow
        with progress.bar("Playing episodes", total=total) as bar:
            bar.advance(run.place.steps.get(phase, 0))
            for episode in run.remaining(phase, most):
                if run.spent(reserve=2 * search.evaluations_an_episode + 1):
                    break
                search.turn(episode, total, phase)
                run.done(phase)
                bar.advance(note=f"{run.candidates[-1].accuracy:.1%}")
        more = not run.place.round and not run.spent(reserve=search.evaluations_an_episode + 1)
        for _ in run.remaining("last", int(more)):
            search.play(search.learned(epsilon=0.0), phase)
            run.done("last")
        uniform = uniform_or_cheapest(env).tolist()
        best = best_of_round(run)
        return run.choose([uniform] if best is None else [best.widths, uniform])


class _StepwiseSearch:
    def __init__(self, run: SearchRun, settings: StepwiseSettings) -> None:
        self.run, self.env, self.settings = run, run.env, settings
        bounds = run.env.bounds
        self._ratios = self._alphas() if settings.actions == "alpha" else self._shares()
        self._allocator = Allocator(run.env)
        self._sensitivity = Sensitivity(run, self._allocator.levels)
        self._dense_share = bounds.shares(bounds.dense[None])[:, 0]
        self._wanted = np.maximum(1.0 - 1.0 / np.maximum(self._dense_share, 1e-12), 1e-9)
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
        run.own = lambda: {"dqn": self._dqn.state(), "losses": self._sensitivity.losses}
        if run.restored is not None:
            self._dqn.restore(run.restored["dqn"])
            self._sensitivity.losses = list(run.restored["losses"])

    def _alphas(self) -> list[NDArray[np.float64]]:
        """For each group the share of its filters below each threshold."""
        return [
            np.array([float((values < alpha * np.sqrt((values**2).mean())).mean()) for alpha in ALPHAS])
            for values in self.env.space.rank("l2").scores
        ]

    def _shares(self) -> list[NDArray[np.float64]]:
        """For each group shares from none to all but the least width."""
        bounds = self.env.bounds
        return [
            np.linspace(0.0, 1.0 - float(choices[0]) / float(dense), len(ALPHAS))
            for choices, dense in zip(bounds.choices, bounds.dense, strict=True)
        ]

    def measure_groups(self) -> None:
        """For the warm start, measure what pruning each group alone costs."""
        most, groups = self.run.limits.max_evaluations, len(self.env.bounds.dense)
        enough = most is None or most >= 3 * groups + self.evaluations_an_episode
        if self.settings.warm_start and enough and not self.run.place.round:
            self._sensitivity.measure()

    def episodes(self) -> int:
        """Episodes of this round, as many as the limits have room for."""
        if self.run.place.round:
            return int(self.settings.again_episodes)
        most = self.run.limits.max_evaluations
        if most is None:
            return int(self.settings.episodes)
        room = max(1, (most - 2 - sum(map(len, self._sensitivity.losses))) // self.evaluations_an_episode)
        return room if self.run.limits.use_all else min(room, int(self.settings.episodes))

    @property
    def evaluations_an_episode(self) -> int:
        """The most that an episode can take."""
        return len(self.env.bounds.dense) if self.settings.rewards == "dense" else 1

    def turn(self, episode: int, total: int, phase: str) -> None:
        """The knapsack's plan first, then episodes of the network's and turns that vary the best plan so far.

        In a later round the first follows the best plan known, scaled to the budgets as they are then.
        """
        generator = np.random.default_rng([self.run.agent.seed, self.run.place.round, episode])
        best = best_of_round(self.run)
        if episode == 0 and self.run.place.round:
            ratios = np.asarray(best_known(self.run, 1)[0]) / self.env.bounds.dense
            self.play(self._following(scaled_widths(self.env, ratios)), phase)
        elif episode == 0 and self.settings.warm_start:
            self.play(self._following(self._allocator.solve(self._values())), phase)
        elif best is not None and generator.random() < self.settings.near_share:
            self._vary(best, generator, phase)
        else:
            self.play(self.learned(self._epsilon(episode, total)), phase)

    def _values(self) -> Values:
        """What widths are worth: as measured, or by Taylor saliency where the limits leave no room for that."""
        if self._sensitivity.complete:
            return self._sensitivity.values()
        return saliency_values(self.env.saliency(), self._allocator.levels, POWERS[0])

    def _vary(self, best: Candidate, generator: np.random.Generator, phase: str) -> None:
        """Score plans near the best, as many as an episode has evaluations; a better one is played, to be learned."""
        widths = np.array(best.widths, dtype=np.int64)
        near = [
            near_widths(
                self.env, widths, generator, self.settings.near_spread, float(generator.uniform(0.1, 1.0))
            )
            for _ in range(self.evaluations_an_episode)
        ]
        self.env.ahead(near)
        for each in near:
            if self.run.spent():
                return
            self.run.score(each, "near")
        found = best_of_round(self.run)
        if found is not None and merit(found) > merit(best):
            self.play(self._following(np.array(found.widths, dtype=np.int64)), phase)

    def learned(self, epsilon: float) -> Choice:
        def choice(step: int, state: NDArray[np.float32]) -> tuple[int, float]:
            action = self._dqn.act(state, epsilon)
            return action, float(self._ratios[step][action])

        return choice

    def _following(self, widths: NDArray[np.int64]) -> Choice:
        """These widths (G,), and the nearest actions."""
        ratios = 1.0 - widths / self.env.bounds.dense

        def choice(step: int, state: NDArray[np.float32]) -> tuple[int, float]:
            return int(np.abs(self._ratios[step] - ratios[step]).argmin()), float(ratios[step])

        return choice

    def _epsilon(self, episode: int, total: int) -> float:
        """Share of random actions in an episode."""
        if self.run.place.round:
            return self.settings.epsilon
        return max(float(self.settings.epsilon), 1.0 - episode / max(1.0, 2 / 3 * total))

    def play(self, choice: Choice, phase: str) -> None:
        """One episode: a group, its reward, an update, and so on."""
        env, groups = self.env, len(self.env.bounds.dense)
        dense = env.score(env.bounds.dense).accuracy
        widths, past = env.bounds.dense.copy(), np.zeros(groups)
        observation, _ = env.reset()
        state = self._state(observation, 1.0, np.zeros_like(self._wanted), past)
        for step in range(groups):
            action, ratio = choice(step, state)
            observation, _, last, _, info = env.step(np.array([ratio], dtype=np.float32))
            widths[step], past[step] = info["width"], info["action"]
            told = last or self.settings.rewards == "dense"
            accuracy = dense
            if told:
                accuracy = self.run.score(widths, phase).accuracy if last else env.score(widths).accuracy
            removed = 1.0 - env.bounds.shares(widths[None])[:, 0] / np.maximum(self._dense_share, 1e-12)
            kept = accuracy / max(dense, 1e-9)
            missing = max(float((1 - removed / self._wanted).max()), 0.0)
            reward = -self.settings.beta * (max(1 - kept, 0.0) + missing) if told else 0.0
            following = self._state(observation, kept, removed, past)
            self._dqn.remember(state, action, reward, following, last)
            state = following
        loss = self._dqn.learn(self.settings.updates_per_step * groups, self.settings.batch)
        self.run.curves.add(len(self.run.candidates), {"agent/q_loss": loss})

    def _state(
        self, observation: NDArray[np.float32], kept: float, removed: NDArray[np.float64], past: NDArray[Any]
    ) -> NDArray[np.float32]:
        share = float((removed / self._wanted).min().clip(-1.0, 2.0))
        return np.concatenate([observation, [kept, share], past]).astype(np.float32)
