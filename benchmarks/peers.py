"""Other tools at equal multiply-adds and equal fine-tuning: Torch-Pruning and ModelOpt's FastNAS beside this toolkit.

    pip install -e .[peers]
    python -m benchmarks.peers --data folder:/data/cifar10-jpeg \\
        --weights cifar_resnet20=resnet20.pt cifar_resnet56=resnet56.pt

Every tool prunes the same weights to the same share of multiply-adds (fvcore counts them), sees the same training and
search images, and its network is fine-tuned by the same loop: plain, with the labels alone. Our networks, and the best
peer's, are also fine-tuned with our distillation from the dense network. Accuracies are on the test images, which
neither training nor a search has seen. Seeds above the first are run for our methods and for the best peer.

A cell is a search or a fine-tuning. Each one is a line of `--results`; a stopped command continues with the cells that
have none, several commands may run side by side, and docs/results/peers.md is written again after each cell. `--list`
prints the cells that are missing with an estimate of their time on this machine; `--only 'cifar_resnet20/50%/*'`
selects some.
"""

from __future__ import annotations

import argparse
import copy
import shutil
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from benchmarks import cells
from benchmarks.cells import Lines, Speed
from benchmarks.peers_page import COMPENSATED, PEERS, page, planned
from compressor.core.errors import CompressorError
from compressor.core.files import sha256_file, write_atomic

if TYPE_CHECKING:
    from torch import nn

    from compressor.pruning.plan import ChannelPlan
    from compressor.run.job import Job

TOOLS = {method: ("nvidia-modelopt" if method == "fastnas" else "torch-pruning", "torch") for method in PEERS}
"""Distributions whose versions are kept with a peer's search."""

GRADIENT_BATCHES = 10
"""Batches of 128 images from which Torch-Pruning's Taylor importance has its gradients."""


class Unreachable(CompressorError):
    """A tool cannot prune a network to the budget."""


def main(arguments: list[str] | None = None) -> None:
    options = parsed(arguments)
    console = Console(width=150)
    lines = Lines(options.results, {**cells.settings_of(options), "evaluations": options.evaluations,
                                    "divisor": options.divisor})  # fmt: skip
    check_weights(options, lines)
    if not options.page_only:
        run_all(options, lines, console)
    cells.finish(options, lines, page, console)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = cells.parser_of_cells("peers", __doc__, epochs=2)
    parser.add_argument("--evaluations", type=int, default=100, help="candidates that our searches score")
    parser.add_argument("--divisor", type=int, default=4, help="FastNAS tries widths that are multiples of this")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    return cells.parsed(parser, arguments)


def check_weights(options: argparse.Namespace, lines: Lines) -> None:
    """Refuse weights other than those of the stored cells."""
    for cell, entry in lines.entries().items():
        given = options.weights.get(cell.partition("/")[0])
        if cell.endswith("/dense") and given and entry["weights_sha256"] != sha256_file(given):
            raise SystemExit(
                f"{options.results} has cells of other weights than {given}: give another --results."
            )


# ---------------------------------------------------------------- running them
def ready(cell: str, done: dict[str, Any]) -> bool:
    """Whether the cells that this one builds on are finished."""
    *parts, last = cell.split("/")
    return last in ("dense", "search") or "/".join([*parts, "search"]) in done


def run_all(options: argparse.Namespace, lines: Lines, console: Console) -> None:
    """Run the missing cells, network by network and seed by seed, because loading the data takes a while."""
    deadline = time.monotonic() + 60 * options.minutes
    jobs = Jobs(options)
    if options.list:
        list_cells(options, lines, jobs, console)
        return
    tried: set[str] = set()
    while time.monotonic() < deadline:
        done = lines.entries()
        missing = [
            cell
            for cell in dict.fromkeys(cells.chosen(planned(options, done), options))
            if cell not in done and cell not in tried and ready(cell, done)
        ]
        if not missing:
            break
        cell = next((each for each in missing if jobs.loaded(each)), missing[0])
        tried.add(cell)
        with lines.claimed(cell) as ours:
            if not ours:
                continue
            job = jobs.of(cell)
            expected = cells.minutes(estimate(options, cell, job, jobs.speed))
            console.print(f"{cell}: about {expected} ...", highlight=False)
            started = time.perf_counter()
            values = run(options, cell, job)
            values["cell_seconds"] = round(time.perf_counter() - started, 1)
            lines.add(cell, values)
            console.print(f"{cell}: {shown(values)}", highlight=False)
        write_atomic(options.page, page(options, lines))


class Jobs:
    """The job of the last cell; cells of the same network and seed share it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self._key: tuple[str, int] | None = None
        self._job: Job
        self.speed: Speed

    def loaded(self, cell: str) -> bool:
        return self._key == self._key_of(cell)

    def of(self, cell: str) -> Job:
        """Return the job with the cell's budget."""
        if not self.loaded(cell):
            self._key = self._key_of(cell)
            self._job = cells.load_job(self.options, *self._key, budget="flops:50%")
            self.speed = Speed.of(self._job)
        parts = cell.split("/")
        return cells.changed(self._job, budgets={"flops": parts[1]}) if len(parts) > 2 else self._job

    def _key_of(self, cell: str) -> tuple[str, int]:
        model, *parts = cell.split("/")
        return model, int(parts[2]) if len(parts) > 2 else self.options.seeds[0]


def list_cells(options: argparse.Namespace, lines: Lines, jobs: Jobs, console: Console) -> None:
    """Print the missing cells with their estimated times; the best peer's other seeds follow once it is known."""
    done, total = lines.entries(), 0.0
    for cell in dict.fromkeys(cells.chosen(planned(options, done), options)):
        if cell not in done:
            seconds = estimate(options, cell, jobs.of(f"{cell.partition('/')[0]}/dense"), jobs.speed)
            total += seconds
            console.print(f"{cell}: about {cells.minutes(seconds)}", highlight=False)
    console.print(f"All together about {total / 3600:.1f} hours on one core.", highlight=False)


def estimate(options: argparse.Namespace, cell: str, job: Job, speed: Speed) -> float:
    """Return the seconds that a cell will take, from the time of an image and the number of images."""
    parts = cell.split("/")
    test = len(job.task.test) * speed.scored
    if parts[-1] == "dense":
        return test
    share, method = float(parts[1].rstrip("%")) / 100, parts[2]
    if parts[-1] != "search":
        distilled = parts[-1] == "distilled"
        return cells.fine_tuning_seconds(speed, job, options.epochs, share, distilled=distilled)
    images = options.search_images + 128 * options.batch_norm_batches
    if method == "fastnas":  # it prunes one layer at a time, so that the networks are nearly dense
        choices = sum(
            max(1, min(20, group.width // options.divisor) - 1) for group in inner_groups(job)
        )
        return choices * images * speed.scored + test
    if method in PEERS:
        return 20 + GRADIENT_BATCHES * 128 * speed.trained + test
    # compensation keeps a candidate's time under one and a half of what it is without
    return options.evaluations * images * speed.scored * share * (1.5 if COMPENSATED in method else 1) + test


def inner_groups(job: Job) -> list[Any]:
    """Return the groups that no residual addition couples."""
    return [group for group in job.space.groups if group.name.endswith("conv1") and "." in group.name]


def run(options: argparse.Namespace, cell: str, job: Job) -> dict[str, Any]:
    """Run one cell."""
    model, *parts = cell.split("/")
    if parts == ["dense"]:
        return {
            "after": cells.tested(job, job.model),
            "macs": cells.count(job, job.model),
            "test_images": len(job.task.test),
            "train_images": len(job.task.train),
            "weights_sha256": sha256_file(options.weights[model]),
        }
    share, method, seed, part = parts
    target = int(float(share.rstrip("%")) / 100 * cells.count(job, job.model))
    path = options.work / f"{model}-{share.rstrip('%')}-{method}-{seed}.safetensors"
    if part == "search":
        try:
            return search(options, job, method, target, path)
        except Unreachable:
            return {"unreachable": True, "target_macs": target}
    if not path.exists():  # the search was run elsewhere; it gives the same network again
        search(options, job, method, target, path)
    network = load_network(job, path)
    seconds = cells.fine_tune(job, network, options.epochs, distilled=part == "distilled")
    return {"after": cells.tested(job, network), "seconds": seconds}


def search(options: argparse.Namespace, job: Job, method: str, target: int, path: Path) -> dict[str, Any]:
    """Search with one tool, verify its multiply-adds, and save the network for the fine-tunings."""
    from compressor.training.scoring import reestimate_batch_norm

    job.model.eval()
    plan = None
    started = time.process_time()
    if method == "fastnas":
        network, extra = fast_nas(options, job, target)
    elif method in PEERS:
        network, extra = torch_pruning(job, method, target)
    else:
        network, plan, extra = our_search(options, job, method, path.with_suffix(".search"))
    seconds = time.process_time() - started
    macs = cells.count(job, network)
    if macs > target:
        raise CompressorError(f"{method} has {macs:,} multiply-adds, more than the {target:,} of the budget.")
    as_found = cells.tested(job, network)
    if COMPENSATED not in method:  # compensation decides itself whether to re-estimate
        reestimate_batch_norm(network, job.task.train, batches=10, device=job.torch_device)
    save_network(network, plan, path)
    return {
        "seconds": seconds,
        "macs": macs,
        "target_macs": target,
        "params": sum(parameter.numel() for parameter in network.parameters()),
        "as_found": as_found,
        "before": as_found if COMPENSATED in method else cells.tested(job, network),
        "versions": {name: version(name) for name in TOOLS.get(method, ("torch",))},
        **extra,
    }


# ---------------------------------------------------------------- the tools
def torch_pruning(job: Job, method: str, target: int) -> tuple[nn.Module, dict[str, Any]]:
    """Prune with Torch-Pruning: the smallest ratio that keeps the budget, found by bisection.

    Its graph does not follow channels that are padded on a shortcut, so that layers on residual additions stay dense.
    """
    import torch
    import torch_pruning as tp
    from torch import nn
    from torch.nn import functional

    importance: Any = {
        "torch-pruning-l1": lambda: tp.importance.MagnitudeImportance(p=1),
        "torch-pruning-taylor": tp.importance.TaylorImportance,
        "torch-pruning-bn": tp.importance.BNScaleImportance,
    }[method]()
    source = copy.deepcopy(job.model)
    if method == "torch-pruning-taylor":
        batches = job.task.train.sample(GRADIENT_BATCHES * 128, job.recipe.seed).batches(128)
        for images, labels in batches:
            functional.cross_entropy(source(images), labels).backward()
    inner = {f"{group.name}" for group in inner_groups(job)}

    def pruned(ratio: float) -> nn.Module:
        network = copy.deepcopy(source)
        for mine, theirs in zip(network.parameters(), source.parameters(), strict=True):
            mine.grad = None if theirs.grad is None else theirs.grad.clone()
        dense = [
            module
            for name, module in network.named_modules()
            if isinstance(module, nn.Conv2d | nn.Linear) and name not in inner
        ]
        pruner = tp.pruner.BasePruner(
            network,
            torch.zeros(1, *job.task.preprocessing.input_shape),
            importance=importance,
            global_pruning=method != "torch-pruning-l1",
            pruning_ratio=ratio,
            max_pruning_ratio=0.95,
            ignored_layers=dense,
            # mutable defaults of torch-pruning, which keep every network alive
            in_channel_groups={},
            out_channel_groups={},
            channel_groups={},
            num_heads={},
        )
        pruner.step()
        network.zero_grad(set_to_none=True)
        return network

    low, high = 0.0, 0.95  # the ratio that removes too little, and the one that keeps the budget
    best = pruned(high)
    if cells.count(job, best) > target:
        raise Unreachable(f"{method} cannot reach {target:,} multiply-adds.")
    for _ in range(12):
        middle = (low + high) / 2
        network = pruned(middle)
        if cells.count(job, network) <= target:
            best, high = network, middle
        else:
            low = middle
    return best, {"ratio": high}


def fast_nas(options: argparse.Namespace, job: Job, target: int) -> tuple[nn.Module, dict[str, Any]]:
    """Prune with ModelOpt's FastNAS: sensitivities of each layer, then a threshold by binary search.

    It counts operations itself, with a factor of its own, so that its limit is the budget's share of the dense network.
    Where fvcore counts more than the budget, the search is repeated with a smaller limit. Its sensitivities are kept,
    so that this needs no new scores.
    """
    import torch

    try:
        import modelopt.torch.prune as mtp
        from modelopt.torch.nas.utils import inference_flops
        from modelopt.torch.prune.fastnas import FastNASConfig
    except ImportError as error:
        raise CompressorError(f"ModelOpt cannot be imported: {error}.", "pip install -e .[peers]") from None

    from compressor.training.scoring import accuracy

    scored = job.task.search.sample(options.search_images, job.recipe.seed).in_memory()
    calibration = list(
        job.task.train.sample(128 * options.batch_norm_batches, job.recipe.seed).batches(128)
    )
    config = FastNASConfig()
    config["nn.Conv2d"]["*"]["channel_divisor"] = options.divisor
    config["nn.BatchNorm2d"]["*"]["feature_divisor"] = options.divisor
    calls = 0

    def score(network: nn.Module) -> float:
        nonlocal calls
        calls += 1
        return accuracy(network, scored, device=job.torch_device)

    path = options.work / f"fastnas-{job.recipe.model}-{job.recipe.seed}-{options.divisor}.pth"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # else the time of the search would be that of a part
    dummy = torch.zeros(1, *job.task.preprocessing.input_shape)
    limit = float(inference_flops(job.model, dummy_input=dummy, unit=1.0)) * target / cells.count(job, job.model)
    for _ in range(8):
        network, _state = mtp.prune(
            copy.deepcopy(job.model).eval(),
            mode=[("fastnas", config)],
            constraints={"flops": limit},
            dummy_input=dummy,
            config={
                "score_func": score,
                "data_loader": calibration,
                "collect_func": lambda batch: batch[0],
                "max_iter_data_loader": len(calibration),
                "checkpoint": str(path),
                "verbose": False,
            },
        )
        macs = cells.count(job, network)
        if macs <= target:
            break
        limit *= 0.999 * target / macs
    path.unlink(missing_ok=True)
    return network, {"evaluations": calls, "limit": limit}


def our_search(
    options: argparse.Namespace, job: Job, method: str, folder: Path
) -> tuple[nn.Module, ChannelPlan, dict[str, Any]]:
    """Search with one of our agents, on the given weights."""
    from compressor.core.records import Checkpoint, EpisodeLog
    from compressor.run.compensation import compensation_of
    from compressor.run.stages import environment
    from compressor.search.base import create_agent
    from compressor.search.records import Limits
    from compressor.search.schedule import Schedule

    agent_name, compensated, _ = method.partition(COMPENSATED)
    job = cells.compensating(job, "auto" if compensated else "off", options.fit_images)
    env, evaluator = environment(job, job.budgets())
    agent = create_agent(agent_name, seed=job.recipe.seed, schedule=Schedule())
    shutil.rmtree(folder, ignore_errors=True)  # else the time would be that of the part after a stop
    folder.mkdir(parents=True)
    result = agent.search(
        env,
        evaluator,
        Limits(max_evaluations=options.evaluations, use_all=True),
        log=EpisodeLog(folder / "episodes.jsonl"),
        checkpoint=Checkpoint(folder / "state.pt"),
    )
    evaluator.close()
    shutil.rmtree(folder)
    found = compensation_of(job, result.best)
    network = job.space.apply(result.best) if found is None else found.network
    extra = {
        "evaluations": result.evaluations,
        "search_accuracy": result.accuracy,
        "agent_seconds": result.timing["agent"],
    }
    return network.eval(), result.best, extra


# ---------------------------------------------------------------- networks on disk
def save_network(network: nn.Module, plan: ChannelPlan | None, path: Path) -> None:
    """Save the weights, and our plan beside them."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {} if plan is None else {"plan": plan.to_json()}
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata=metadata)
    partial.replace(path)


def load_network(job: Job, path: Path) -> nn.Module:
    """Return a saved network: our plan applied, or the dense network with layers of the saved sizes."""
    from safetensors import safe_open
    from torch import nn

    from compressor.pruning.plan import ChannelPlan

    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    if "plan" in metadata:
        network = job.space.apply(ChannelPlan.from_json(metadata["plan"]))
        for name, module in network.named_modules():  # compensation may add a bias
            if f"{name}.bias" in state and getattr(module, "bias", True) is None:
                module.bias = nn.Parameter(state[f"{name}.bias"].clone())
    else:
        network = copy.deepcopy(job.model)
        for name, module in network.named_modules():
            if f"{name}.weight" in state:
                resize(module, {key: state[f"{name}.{key}"] for key in module.state_dict()})
    network.load_state_dict(state)
    return network


def resize(module: nn.Module, state: dict[str, Any]) -> None:
    """Give a layer the sizes of the tensors, in place."""
    from torch import nn

    if isinstance(module, nn.Conv2d):
        module.out_channels, module.in_channels = state["weight"].shape[:2]
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = state["weight"].shape
    elif isinstance(module, nn.BatchNorm2d):
        module.num_features = len(state["weight"])
    for name, tensor in state.items():
        holder = module._parameters if name in module._parameters else module._buffers
        holder[name] = nn.Parameter(tensor.clone()) if name in module._parameters else tensor.clone()


def shown(values: dict[str, Any]) -> str:
    parts = [f"{name} {100 * values[name]:.2f} %" for name in ("before", "after") if name in values]
    if "macs" in values:
        parts.append(f"{values['macs']:,} multiply-adds")
    return ", ".join([*parts, f"{values['cell_seconds']:.0f} s"])


if __name__ == "__main__":
    try:
        main()
    except CompressorError as error:
        raise SystemExit(f"{error.message} {error.hint or ''}") from None
