"""What a network shows on calibration data: each site's moments, and how its output reacts to each site."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from passes.core.error import fisher_errors, sample_gradients
from passes.core.factor import fitted
from passes.core.fit import WIDE, FitProblem
from passes.core.metric import OutputMetric
from passes.core.moments import Moments, Samples
from passes.core.patches import outputs_at, patches, positions, sample_rows
from passes.core.site import Array, Chain, Site, compose
from passes.core.streamed import LARGE_BYTES, StreamedSvd, streams
from passes.core.workers import Workers
from passes.onnx_stepper import Feeds, Stepper, Stop
from passes.ranks.candidates import Candidate
from passes.torch_apply import as_array, run_chain

Tensor = torch.Tensor


@dataclass(frozen=True, eq=False)
class Reaction:
    """How the output reacts to a site: gradients with respect to the site's outputs, channels second.

    ``inputs`` are the site's, for scores by sample; None where they were not asked for.
    """

    gradients: Array
    inputs: Array | None = None


def moments_by_site(
    stepper: Stepper,
    feeds: Feeds,
    elements: int,
    seed: int,
    progress: Callable[[Site], None] = lambda site: None,
    threads: int = 1,
) -> tuple[dict[str, Moments], dict[str, Tensor]]:
    """Moments of every site of the stepper on the feeds, and the network's outputs.

    ``elements`` bounds the patch matrix (samples x K) that is formed at a time. The same for any number of ``threads``.
    """
    rng = np.random.default_rng(seed)
    found: dict[str, Moments] = {}
    coming: list[tuple[Site, Callable[[], Moments]]] = []  # of one site at most

    def take() -> None:
        while coming:
            site, moments = coming.pop()
            found[site.name] = moments()
            progress(site)

    def at_site(stop: Stop) -> Tensor:
        site, stage = stop.site, stop.site.stage
        x = as_array(site, stop.input)
        width = int(np.prod(stage.weight.shape[1:])) * stage.geometry.groups
        limit = max(elements // width, 1024)
        chosen = beside.soon(partial(sample_rows, stage.geometry, x.shape, limit, rng))
        y = run_chain(site, Chain((stage,)), stop.input)
        rows = chosen()
        wanted = outputs_at(as_array(site, y), stage.geometry.groups, rows)  # from here on, the walk may write to y
        take()

        def measured() -> Moments:
            return Moments.of(Samples(patches(x, stage.geometry, rows, workers), workers), wanted)

        coming.append((site, beside.soon(measured)))
        return y

    # the moments of a site are measured while the walk is on its way to the next one
    with torch.no_grad(), Workers(threads) as workers, Workers(min(threads, 2)) as beside:
        outputs = stepper.run(feeds, at_site)
        take()
        return found, outputs


Probe = Callable[[Mapping[str, Tensor], torch.Generator], Tensor]
"""A scalar of the outputs whose squared directional derivative is, on average, the loss of a small change."""


def output_noise(outputs: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
    """All floating outputs against noise of unit variance, each in units of its own size: relative squared error.

    The scores of a classifier are centred first, since a constant added to all of them changes nothing.
    """
    total = torch.zeros(())
    for output in (o for o in outputs.values() if o.is_floating_point()):
        value = output - output.mean(1, keepdim=True) if is_classifier(outputs) else output
        size = value.detach().square().mean().sqrt().clamp_min(1e-12)
        per_sample = value[0].numel() if value.ndim else 1
        noise = torch.randn(value.shape, generator=generator)
        total = total + (noise * value).sum() / size / float(np.sqrt(per_sample))
    return total


def drawn_label(outputs: Mapping[str, Tensor], generator: torch.Generator, temperature: float = 1.0) -> Tensor:
    """The log-probability of a class drawn from a classifier's own prediction: the probe of the Fisher information.

    ``temperature`` softens the scores, as distillation does. Summed over samples; probabilities are taken as such.
    """
    (score,) = [o for o in outputs.values() if o.is_floating_point()]
    likely = torch.log(score.clamp_min(1e-12)) if _sums_to_one(score) else torch.log_softmax(score / temperature, 1)
    drawn = torch.multinomial(likely.detach().exp(), 1, generator=generator)
    return likely.gather(1, drawn).sum()


def is_classifier(outputs: Mapping[str, Tensor]) -> bool:
    """True for a single floating output of shape (N, C) with at least two classes."""
    floating = [o for o in outputs.values() if o.is_floating_point()]
    return len(floating) == 1 and floating[0].ndim == 2 and floating[0].shape[1] >= 2


def _sums_to_one(score: Tensor) -> bool:
    rows = score.detach()
    return bool((rows >= 0).all()) and bool((rows.sum(1) - 1).abs().max() < 1e-3)


def divergence(outputs: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    """How far a network's outputs are from the reference's: mean KL for a classifier, else relative squared error."""
    if is_classifier(reference):
        (name,) = [n for n, o in reference.items() if o.is_floating_point()]
        a, b = reference[name].double(), outputs[name].double()
        if _sums_to_one(a):
            p, q = a.clamp_min(1e-12).log(), b.clamp_min(1e-12).log()
        else:
            p, q = torch.log_softmax(a, 1), torch.log_softmax(b, 1)
        return float((p.exp() * (p - q)).sum(1).mean())
    total, count = 0.0, 0
    for name, a in reference.items():
        if a.is_floating_point():
            wanted = a.double()
            missed = (outputs[name].double() - wanted).square().sum()
            total += float(missed / wanted.square().sum().clamp_min(1e-30))
            count += 1
    return total / max(count, 1)


def reactions(
    stepper: Stepper, feeds: Sequence[Feeds], seed: int, probe: Probe = output_noise, keep_inputs: bool = False
) -> dict[str, Reaction]:
    """Each site's reaction, batch by batch. Sites that no gradient reaches are left out."""
    generator = torch.Generator().manual_seed(seed)
    inputs: dict[str, list[Array]] = {}
    gradients: dict[str, list[Array]] = {}
    for batch in feeds:
        shifts: dict[str, tuple[Site, Tensor]] = {}

        def at_site(stop: Stop, shifts: dict[str, tuple[Site, Tensor]] = shifts) -> Tensor:
            site = stop.site
            y = run_chain(site, Chain((site.stage,)), stop.input)
            shift = torch.zeros_like(y, requires_grad=True)
            shifts[site.name] = (site, shift)
            if keep_inputs:
                inputs.setdefault(site.name, []).append(as_array(site, stop.input))
            return y + shift

        loss = probe(stepper.run(batch, at_site), generator)
        if not loss.requires_grad:
            return {}
        grads = torch.autograd.grad(loss, [shift for _, shift in shifts.values()], allow_unused=True)
        for (site, _), grad in zip(shifts.values(), grads, strict=True):
            if grad is not None:
                gradients.setdefault(site.name, []).append(as_array(site, grad))
    return {
        name: Reaction(np.concatenate(parts), np.concatenate(inputs[name]) if keep_inputs else None)
        for name, parts in gradients.items()
        if len(parts) == len(feeds)
    }


def output_metric(site: Site, reaction: Reaction, floor: float) -> OutputMetric:
    """What errors of the site's outputs count, by channel and by position, from gradients g of the result.

    A factor fitted in the metric E[g g'] spends its rank on the output directions that the network's result reacts
    to. Between positions the mean of g'g counts: next to a border fewer outputs behind depend on a value. Both are in
    units of their mean, and ``floor`` is added, since the gradients are those of the uncompressed network.
    """
    groups = site.stage.geometry.groups
    last = np.moveaxis(reaction.gradients, 1, -1)
    flat = last.reshape(-1, groups, site.stage.out_channels // groups)
    metric = np.einsum("ngo,ngp->gop", flat, flat, optimize=True).astype(np.float64)
    level = np.trace(metric, axis1=1, axis2=2) / metric.shape[1]
    metric = metric / np.where(level > 0, level, 1.0)[:, None, None] + floor * np.eye(metric.shape[1])
    values, vectors = np.linalg.eigh(metric)
    root = np.matmul(vectors * np.sqrt(np.maximum(values, 0))[:, None, :], vectors.swapaxes(1, 2))
    positions = np.square(last, dtype=np.float64).sum(-1).mean(0)
    level = positions.mean()
    positions = (positions / (level if level > 0 else 1.0) + floor) / ((1.0 if level > 0 else 0.0) + floor)
    return OutputMetric(np.asarray(root), np.asarray(positions))


def scores(site: Site, reaction: Reaction, samples: int) -> Array:
    """Per-sample weight gradients of the site: (n, g, O, K)."""
    geometry = site.stage.geometry
    x, g = reaction.inputs, reaction.gradients
    if x is None:
        raise ValueError("scores need reactions with their inputs")
    total = int(np.prod(positions(geometry, x.shape))) if geometry.ndim else x.shape[0]
    rows = np.arange(total)
    return sample_gradients(patches(x, geometry, rows), outputs_at(g, geometry.groups, rows), samples)


@dataclass(frozen=True, eq=False)
class ScoredSite:
    """The candidates of a site that are worth choosing from, the dense one first, and what each is expected to lose.

    ``relative``: squared output error over output energy (of weights, without calibration data). ``fisher``: the
    Fisher estimate, None where no gradient reaches the site.
    """

    site: Site
    candidates: tuple[Candidate, ...]
    relative: Array
    fisher: Array | None


def score(
    site: Site,
    found: Sequence[Candidate],
    moments: Moments | None,
    ridge: float,
    reaction: Reaction | None = None,
    samples: int = 0,
    limit: int = 40,
) -> ScoredSite:
    """Errors of a site's candidates; the factors of each are fitted to the moments before they are judged.

    A candidate is first judged by its decomposition's spectrum, which costs nothing. Where another one is as cheap
    and, by that estimate, loses less than 0.6 of it, no fit will turn the two around, and it is dropped.
    A layer of :data:`passes.core.streamed.LARGE_BYTES` and no moments gets only candidates that need no copy of it.
    """
    if moments is None and reaction is None and site.stage.weight.nbytes >= LARGE_BYTES:
        return _score_large(site, found, limit)
    weight = site.stage.grouped_weight().astype(np.float64)
    problem = FitProblem(weight, None if moments is None else moments.ridge(ridge))
    energy = max(problem.energy(), 1e-30)
    names = {c.name: c.format for c in found if c.format is not None}
    decomposed = {n: f.decompose(site.stage.geometry, problem) for n, f in names.items()}
    estimates = np.array([0.0 if c.format is None else decomposed[c.name].loss(c.rank) / energy for c in found])
    kept = _worth_fitting(found, estimates, limit)
    narrow = problem.matrix.shape[-1] <= WIDE
    relative, changes = np.zeros(len(kept)), []
    for index, position in enumerate(kept):
        candidate = found[position]
        if candidate.format is None:
            changes.append(np.zeros(problem.matrix.shape, np.float32))
            continue
        source = decomposed[candidate.name]
        if not narrow and reaction is None:
            relative[index] = estimates[position]
            continue
        stages = fitted(source, candidate.rank, problem, rounds=1, steps=4) if narrow else source.stages(candidate.rank)
        composed = compose(stages)
        relative[index] = problem.error(composed) / energy
        changes.append((composed - weight).reshape(problem.matrix.shape).astype(np.float32))
    fisher = None
    if reaction is not None:
        fisher = fisher_errors(changes, scores(site, reaction, samples))
    return ScoredSite(site, tuple(found[i] for i in kept), relative, fisher)


def _score_large(site: Site, found: Sequence[Candidate], limit: int) -> ScoredSite:
    """By the weights' own spectrum, without a copy of the weights; formats that would need one are left out."""
    taken = [c for c in found if c.format is None or streams(c.format)]
    estimates = np.zeros(len(taken))
    names = {c.name: c.format for c in taken if c.format is not None}
    for name, format in names.items():
        decomposed = StreamedSvd.of(format, site.stage)
        energy = max(decomposed.energy(), 1e-30)
        for index, candidate in enumerate(taken):
            if candidate.name == name:
                estimates[index] = decomposed.loss(candidate.rank) / energy
    kept = _worth_fitting(taken, estimates, limit)
    return ScoredSite(site, tuple(taken[i] for i in kept), estimates[kept], None)


def _worth_fitting(found: Sequence[Candidate], estimates: Array, limit: int) -> list[int]:
    latency = np.array([c.cost.latency for c in found])
    kept = []
    for index in range(len(found)):
        better = (latency <= latency[index]) & (estimates < 0.6 * estimates[index])
        if found[index].format is None or not better.any():
            kept.append(index)
    if len(kept) <= limit:
        return kept
    # thin out evenly along the latency, in order of the estimate times the latency within each bin
    order = sorted(kept[1:], key=lambda i: (latency[i], estimates[i]))
    bins = np.array_split(np.array(order), limit - 1)
    return [kept[0], *sorted(int(b[np.argmin(estimates[b] * latency[b])]) for b in bins)]
