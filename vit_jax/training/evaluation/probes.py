"""Probes of frozen features: few-shot regression, nearest neighbours, linear probe.

Each is a function of features and labels on the host that returns accuracies on `test`; every
example counts once, and results are deterministic. Each raises UserError if a set has no examples,
features that are not finite or of another width than those of `train`, or labels outside of 0 to
num_classes - 1, and for numbers that are not positive.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.linalg
from jaxtyping import Array, Float, Float32, Float64, Int, Int32, Shaped

from vit_jax.errors import UserError

# A block of similarities is 256 MiB, one of training features of width 1024 is 64 MiB: with the
# copies for normalising and sorting, k-NN takes 1 to 2 GiB of device memory for any number of
# examples.
TEST_BLOCK, TRAIN_BLOCK = 4096, 16384


@dataclasses.dataclass(frozen=True)
class Features:
    """The features of n examples, and their classes."""

    x: Float32[np.ndarray, "n d"]
    y: Int32[np.ndarray, " n"]


def few_shot(
    train: Features,
    test: Features,
    num_classes: int,
    *,
    shots: Sequence[int],
    seeds: int,
    l2: float,
) -> dict[str, float]:
    """Few-shot linear regression: least squares in closed form, in float64 on the host.

    As in the ViT paper (arXiv 2010.11929, section 4.1), with the settings of big_vision's
    fewshot_lsr.py: features are standardised by the drawn examples, targets are -1 and 1, and an
    L2 penalty of `l2` (theirs: 1024) is on all weights, including that of the bias, a constant
    feature of 100. A class with fewer than `shots` examples contributes all it has.

    Returns:
      For 5 shots {"5shot": mean over the seeds 0, 1, ..., "5shot_std": standard deviation (ddof 1),
      if there are several seeds}.
    """
    check_sets(num_classes, train, test)
    check_positive(shots=shots, seeds=[seeds], l2=[l2])
    order, counts = np.argsort(train.y, kind="stable"), np.bincount(train.y, minlength=num_classes)
    classes = np.split(order, np.cumsum(counts)[:-1])
    found: dict[int, list[float]] = {count: [] for count in shots}
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        drawn = [rng.permutation(indices) for indices in classes]
        for count, accuracies in found.items():
            chosen = np.concatenate([indices[:count] for indices in drawn])
            scale = standard(train.x[chosen])
            targets = 2.0 * np.eye(num_classes)[train.y[chosen]] - 1
            weights = ridge(standardised(train.x[chosen], scale, 100, np.float64), targets, l2)
            predicted = (standardised(test.x, scale, 100, np.float64) @ weights).argmax(axis=1)
            accuracies.append(float(np.mean(predicted == test.y)))
    results = {f"{count}shot": float(np.mean(values)) for count, values in found.items()}
    if seeds > 1:
        results |= {f"{count}shot_std": float(np.std(v, ddof=1)) for count, v in found.items()}
    return results


def ridge(
    x: Float64[np.ndarray, "n d"], y: Float64[np.ndarray, "n k"], l2: float
) -> Float64[np.ndarray, "d k"]:
    """Ridge regression: the w that minimises ||x w - y||^2 + l2 ||w||^2, primal or dual by size."""
    primal = len(x) >= x.shape[1]
    gram = x.T @ x if primal else x @ x.T
    gram.flat[:: len(gram) + 1] += l2
    try:
        solved = scipy.linalg.solve(gram, x.T @ y if primal else y, assume_a="pos")
    except np.linalg.LinAlgError:
        raise UserError(f"l2 is {l2}, too little for these features; expected more") from None
    return solved if primal else x.T @ solved


def knn(
    train: Features,
    test: Features,
    num_classes: int,
    *,
    neighbours: Sequence[int],
    temperature: float,
) -> dict[str, float]:
    """Weighted k-nearest-neighbour classification by cosine similarity.

    Each of the k nearest votes for its class with exp(similarity / temperature), as in arXiv
    1805.01978 and DINO (arXiv 2104.14294; both: 0.07). Of equally similar examples the earlier in
    `train` is nearer, of classes with equal votes the lower wins. A zero vector has similarity 0
    to all. If k is larger than `train`, all vote.

    Returns:
      For a k of 20 {"knn20": accuracy}.
    """
    check_sets(num_classes, train, test)
    check_positive(neighbours=neighbours, temperature=[temperature])
    n, total = len(train.x), len(test.x)
    k = min(max(neighbours), n)
    rows, columns = min(total, TEST_BLOCK), min(n, TRAIN_BLOCK)
    hits = np.zeros(k, np.int64)
    for i in range(0, total, rows):
        queries = jnp.asarray(_padded(test.x[i : i + rows], rows))
        best = jnp.full((rows, k), -jnp.inf, jnp.float32), jnp.zeros((rows, k), jnp.int32)
        for j in range(0, n, columns):
            block = jnp.asarray(_padded(train.x[j : j + columns], columns))
            labels = jnp.asarray(_padded(train.y[j : j + columns], columns))
            # Blocks are copied one ahead of the computation; without this, more would pile up.
            jax.block_until_ready(best)
            best = _nearer(best, queries, block, labels, n - j)
        right = test.y[i : i + rows]
        elected = np.asarray(_elect(*best, temperature, num_classes))
        hits += (elected[:, : len(right)] == right).sum(axis=1)
    return {f"knn{count}": float(hits[min(count, n) - 1] / total) for count in neighbours}


@jax.jit
def _nearer(
    best: tuple[Float[Array, "b k"], Int32[Array, "b k"]],
    queries: Float[Array, "b d"],
    block: Float[Array, "m d"],
    labels: Int32[Array, " m"],
    count: Int[Array, ""],
) -> tuple[Float[Array, "b k"], Int32[Array, "b k"]]:
    """The most similar of the best so far and the first `count` of a block: (similarity, label)."""
    k, m = best[0].shape[1], len(labels)
    similar = jnp.matmul(_normalised(queries), _normalised(block).T, precision="highest")
    similar = jnp.where(jnp.arange(m) < count, similar, -jnp.inf)
    # top_k puts the first of equals in front: here, and below, where earlier blocks come first.
    similar, index = jax.lax.top_k(similar, min(k, m))
    similar = jnp.concatenate([best[0], similar], axis=1)
    labels = jnp.concatenate([best[1], labels[index]], axis=1)
    similar, index = jax.lax.top_k(similar, k)
    return similar, jnp.take_along_axis(labels, index, axis=1)


@functools.partial(jax.jit, static_argnames="num_classes")
def _elect(
    similar: Float[Array, "b k"],
    labels: Int32[Array, "b k"],
    temperature: Float[Array, ""],
    num_classes: int,
) -> Int32[Array, "k b"]:
    """The classes elected by the nearest 1, 2, ... k neighbours."""
    # Relative to the nearest: exp(1 / temperature) may overflow float32.
    weights = jnp.exp((similar - similar[:, :1]) / temperature)

    def vote(votes, voter):
        weight, label = voter
        votes += weight[:, None] * jax.nn.one_hot(label, num_classes)
        return votes, votes.argmax(axis=1).astype(jnp.int32)

    return jax.lax.scan(vote, jnp.zeros((len(labels), num_classes)), (weights.T, labels.T))[1]


def _normalised(x: Float[Array, "n d"]) -> Float[Array, "n d"]:
    # Divided by the largest first: squares of very large or small values leave float32's range.
    x /= jnp.maximum(jnp.abs(x).max(axis=1, keepdims=True), jnp.finfo(x.dtype).tiny)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1)


def _padded(x: Shaped[np.ndarray, "n ..."], rows: int) -> Shaped[np.ndarray, "{rows} ..."]:
    return np.pad(x, [(0, rows - len(x))] + [(0, 0)] * (x.ndim - 1))


def linear_probe(
    train: Features,
    val: Features | None,
    test: Features,
    num_classes: int,
    *,
    l2: Sequence[float],
    steps: int,
) -> dict[str, float]:
    """Linear probe: multinomial logistic regression on standardised features.

    Features are standardised by the examples fitted. The loss is the mean cross-entropy +
    l2 / 2 ||W||^2, with no penalty on the bias; each fit takes at most `steps` of L-BFGS. Of
    several `l2`, the best on `val` is chosen after fitting to `train` (the largest of equals), and
    used to fit both together. With one `l2`, `val` may be None. The device holds all features, and
    a few times their logits, in float32.

    Returns:
      {"accuracy": on test, "l2": the chosen one}.
    """
    check_sets(num_classes, train, test, val)
    check_positive(l2=l2, steps=[steps])
    if len(l2) > 1 and val is None:
        raise UserError(f"{len(l2)} values of l2 and no validation examples to choose by")
    # Start: zero weights, log shares of the classes as bias, which all but excludes absent ones.
    shares = np.bincount(train.y, minlength=num_classes) / len(train.y)
    weights = np.zeros((train.x.shape[1] + 1, num_classes), np.float32)
    weights[-1] = np.log(np.maximum(shares, 1e-13))
    chosen, weights = l2[0], jnp.asarray(weights)
    if len(l2) > 1:
        chosen, weights = _choose(train, val, weights, l2, steps)
    if val is not None:
        train = Features(np.concatenate([train.x, val.x]), np.concatenate([train.y, val.y]))
    scale = standard(train.x)
    weights = fit(*_on_device(train, scale), weights, chosen, steps)
    return {"accuracy": _accuracy(weights, *_on_device(test, scale)), "l2": float(chosen)}


def _choose(
    train: Features, val: Features, weights: Float[Array, "d k"], l2: Sequence[float], steps: int
) -> tuple[float, Float[Array, "d k"]]:
    """Chooses the best l2 on `val`, with its weights. Each fit starts from the previous one's."""
    scale = standard(train.x)
    ours, theirs = _on_device(train, scale), _on_device(val, scale)
    found = []
    for value in sorted(l2, reverse=True):
        weights = fit(*ours, weights, value, steps)
        found.append((_accuracy(weights, *theirs), value, weights))
    return max(found, key=lambda one: one[:2])[1:]


@jax.jit
def fit(
    x: Float[Array, "n d"],
    y: Int32[Array, " n"],
    start: Float[Array, "d k"],
    l2: Float[Array, ""],
    steps: Int[Array, ""],
) -> Float[Array, "d k"]:
    """Fits logistic regression and returns its weights; the last feature is constant."""

    def loss(weights):
        logits = jnp.matmul(x, weights, precision="highest")
        return cross_entropy(logits, y).mean() + l2 / 2 * jnp.sum(weights[:-1] ** 2)

    return minimise(loss, start, l2, steps)


def cross_entropy(logits: Float[Array, "*b k"], labels: Int32[Array, "*b"]) -> Float[Array, "*b"]:
    """-log softmax(logits)[label] at full precision; labels outside of the classes match none."""
    # log(1 + sum over the other classes of exp(logit - right logit)): the usual logsumexp minus
    # right logit cancels where the loss is small.
    right = jnp.arange(logits.shape[-1]) == labels[..., None]
    ahead = logits - jnp.sum(logits, axis=-1, keepdims=True, where=right)
    return jax.nn.softplus(jax.nn.logsumexp(ahead, axis=-1, where=~right))


def minimise(
    loss: Callable[[Float[Array, "d k"]], Float[Array, ""]],
    start: Float[Array, "d k"],
    l2: Float[Array, ""],
    steps: Int[Array, ""],
) -> Float[Array, "d k"]:
    """Minimises a convex loss that includes l2 / 2 ||W||^2, by at most `steps` of L-BFGS.

    Stops when the loss is within about 1e-8 of the minimum, by the bound ||gradient||^2 / (2 l2) on
    the gap. If l2 is tiny, float32 rounding stops it first.
    """
    optimizer = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def unfinished(carry):
        step, _, state = carry
        value, grad = optax.tree.get(state, "value"), optax.tree.get(state, "grad")
        little = value * jnp.maximum(2e-8 * l2, 1e-14 * value)
        return (step == 0) | ((step < steps) & (optax.tree.norm(grad, squared=True) > little))

    def improve(carry):
        step, weights, state = carry
        value, grad = value_and_grad(weights, state=state)
        updates, state = optimizer.update(
            grad, state, weights, value=value, grad=grad, value_fn=loss
        )
        return step + 1, optax.apply_updates(weights, updates), state

    return jax.lax.while_loop(unfinished, improve, (0, start, optimizer.init(start)))[1]


def _accuracy(w: Float[Array, "d k"], x: Float[Array, "n d"], y: Int32[Array, " n"]) -> float:
    predicted = jnp.matmul(x, w, precision="highest").argmax(axis=1)
    return float(np.mean(np.asarray(predicted == y)))


Scale = tuple[Float64[np.ndarray, " d"], Float64[np.ndarray, " d"]]


def standard(x: Float32[np.ndarray, "n d"]) -> Scale:
    """Mean and standard deviation (+ 1e-5, as in big_vision)."""
    mean = x.mean(axis=0, dtype=np.float64)
    # In blocks: a float64 copy of all of ImageNet's features is 10 GB.
    blocks = (x[i : i + 65536] - mean for i in range(0, len(x), 65536))
    variance = sum(np.square(block).sum(axis=0) for block in blocks) / len(x)
    return mean, np.sqrt(variance) + 1e-5


def standardised(
    x: Float32[np.ndarray, "n d"], scale: Scale, constant: int, dtype: type
) -> Float[np.ndarray, "n e"]:
    """Standardises features, and appends a constant for the bias."""
    result = np.full((len(x), x.shape[1] + 1), constant, dtype)
    np.subtract(x, scale[0], out=result[:, :-1], casting="same_kind")
    result[:, :-1] /= scale[1]
    return result


def _on_device(features: Features, scale: Scale) -> tuple[Float[Array, "n e"], Int32[Array, " n"]]:
    return jnp.asarray(standardised(features.x, scale, 1, np.float32)), jnp.asarray(features.y)


def check_sets(
    num_classes: int, train: Any, test: Any, val: Any = None, *, unknown: bool = False
) -> None:
    """Raises a UserError for sets (x [n ... d], y) that do not fit each other, or the classes.

    Args:
      unknown: whether labels may be -1, which is of no class; not all of them.
    """
    for name, given in (("training", train), ("validation", val), ("test", test)):
        if given is None:
            continue
        if not len(given.x):
            raise UserError(f"there are no {name} examples; expected at least one")
        wide, expected = given.x.shape[-1], train.x.shape[-1]
        if wide != expected:
            raise UserError(f"{name} features are {wide} wide; expected {expected}, as in training")
        if not np.isfinite(given.x).all():
            raise UserError(f"the features of the {name} examples are not finite: a model diverged")
        low, high, last = given.y.min(), given.y.max(), num_classes - 1
        if unknown and low == -1:
            if high < 0:
                raise UserError(f"no label of the {name} examples is of any class")
            low = 0
        if low < 0 or high > last:
            raise UserError(f"labels of {name} examples are {low} to {high}; expected 0 to {last}")


def check_positive(**numbers: Sequence[int] | Sequence[float]) -> None:
    """Raises a UserError for an empty sequence, or a number that is not positive and finite."""
    for name, values in numbers.items():
        if not values or not all(0 < value < float("inf") for value in values):
            raise UserError(f"{name} is {list(values)}; expected numbers above 0")
