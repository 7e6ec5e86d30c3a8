"""What the labels of a data set say about its objectives: shares with errors, cycles, and how objectives relate.

N rows, P labelled pairs, K objectives, G responses a row, R rows of one size. A label I becomes s = 2I - 1: 1, -1, or 0
for a tie. Rows with one prompt, or of one group, are one cluster: every standard error counts those, not pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mopo_cli.base.types import Example
from mopo_cli.data.prepare import as_text, unit_numbers

Z95 = 1.959964  # standard normal quantile of a two-sided 95 % interval
BLOCK = 2_000_000  # numbers in one array of outcomes at a time


@dataclass(frozen=True, slots=True)
class WithError:
    """A number with its standard error, from n observations; NaN where there is none."""

    value: float
    se: float
    n: int

    @property
    def low(self) -> float:
        return self.value - Z95 * self.se

    @property
    def high(self) -> float:
        return self.value + Z95 * self.se


@dataclass(frozen=True, slots=True)
class PairArrays:
    """All labelled pairs of all rows, as arrays."""

    row: np.ndarray  # (P,) which row
    first: np.ndarray  # (P,) place among the row's responses
    second: np.ndarray  # (P,)
    labels: np.ndarray  # (P, K) I, NaN where missing
    longer: np.ndarray  # (P,) words of the first response minus words of the second
    identical: np.ndarray  # (P,) whether both are the same text
    prompt: np.ndarray  # (N,) rows with one prompt, or of one group, share a number
    sizes: np.ndarray  # (N,) responses of the row
    prompt_words: np.ndarray  # (N,)
    response_words: np.ndarray  # (sum of sizes,)

    @property
    def outcomes(self) -> np.ndarray:
        """(P, K) s = 2I - 1."""
        return 2.0 * self.labels - 1.0

    @property
    def cluster(self) -> np.ndarray:
        """(P,) the prompt of each pair."""
        return self.prompt[self.row]


def tabulate(examples: Sequence[Example]) -> PairArrays:
    """The examples' pairs as arrays; words are separated by white space."""
    words = [[len(as_text(response).split()) for response in example.responses] for example in examples]
    pairs = [
        (n, a, b, words[n][a] - words[n][b], example.responses[a] == example.responses[b])
        for n, example in enumerate(examples)
        for a, b in example.pairs
    ]
    row, first, second, longer, identical = np.array(pairs, dtype=np.int64).T
    return PairArrays(
        row,
        first,
        second,
        np.array([label for example in examples for label in example.labels], dtype=np.float64),
        longer,
        identical.astype(bool),
        unit_numbers(examples),
        np.array([len(example.responses) for example in examples]),
        np.array([len(as_text(example.prompt).split()) for example in examples]),
        np.array([count for row_words in words for count in row_words]),
    )


def ratio(numerator: np.ndarray, denominator: np.ndarray, cluster: np.ndarray) -> WithError:
    """sum(numerator) / sum(denominator), with a standard error that is robust to dependence within a cluster.

    n is the sum of the denominator. NaN where that is 0; the error is NaN with a single cluster.
    """
    total = float(denominator.sum())
    if total <= 0:
        return WithError(math.nan, math.nan, 0)
    value = float(numerator.sum()) / total
    return WithError(value, _clustered((numerator - value * denominator) / total, cluster), round(total))


def mean(values: np.ndarray, cluster: np.ndarray) -> WithError:
    """The mean of the values that are not NaN, with its cluster-robust standard error."""
    known = ~np.isnan(values)
    return ratio(values[known], np.ones(int(known.sum())), cluster[known])


def _clustered(influence: np.ndarray, cluster: np.ndarray) -> float:
    _, numbered = np.unique(cluster, return_inverse=True)
    sums = np.bincount(numbered, weights=influence)
    count = len(sums)
    return math.sqrt(float((sums**2).sum()) * count / (count - 1)) if count > 1 else math.nan


def wilson(share: WithError, clusters: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, which stays sensible near 0 and 1 and with few observations.

    The effective number of observations is what the clustered standard error leaves of n; where every observation is
    the same and the error is 0, it is the number of clusters.
    """
    p = share.value
    size = p * (1 - p) / share.se**2 if share.se > 0 else float(clusters)
    size = min(size, share.n)
    centre = (p + Z95**2 / (2 * size)) / (1 + Z95**2 / size)
    half = Z95 / (1 + Z95**2 / size) * math.sqrt(p * (1 - p) / size + Z95**2 / (4 * size**2))
    return centre - half, centre + half


def sign_agreement(table: PairArrays, j: int, k: int) -> tuple[WithError, tuple[float, float]]:
    """How often objectives j and k prefer the same response, among the pairs that both decided; and its interval."""
    s = table.outcomes[:, [j, k]]
    both = ~np.isnan(s).any(axis=1) & (s != 0).all(axis=1)
    same = (s[both, 0] > 0) == (s[both, 1] > 0)
    cluster = table.cluster[both]
    share = mean(same.astype(float), cluster)
    return share, wilson(share, len(np.unique(cluster))) if share.n else (math.nan, math.nan)


def longer_preferred(table: PairArrays, k: int) -> tuple[WithError, float]:
    """How often objective k prefers the longer of two responses, and the correlation of s with the difference in words.

    The correlation is not centred, so that it does not depend on which response of a pair comes first.
    """
    s, longer = table.outcomes[:, k], table.longer.astype(float)
    judged = ~np.isnan(s)
    told = judged & (s != 0) & (longer != 0)
    share = mean(((s[told] > 0) == (longer[told] > 0)).astype(float), table.cluster[told])
    s, longer = s[judged], longer[judged]
    scale = math.sqrt(float((s**2).sum() * (longer**2).sum()))
    return share, float((s * longer).sum()) / scale if scale else math.nan


@dataclass(frozen=True, slots=True)
class WithinRows:
    """What the labels of each row with three responses or more say; NaN where its labels do not tell."""

    cross: np.ndarray  # (N, K, K) mean of s_j(y, y') s_k(y, y'') over y and two different others
    ranks: np.ndarray  # (N, K, K) Spearman's correlation of the responses' win rates
    cyclic: np.ndarray  # (N, K) triples that go in a circle
    triples: np.ndarray  # (N, K) triples of which every pair is decided


def within_rows(table: PairArrays) -> WithinRows:
    """Moments, rank correlations and cycles within each row."""
    rows, size = len(table.sizes), table.labels.shape[1]
    square = np.full((rows, size, size), np.nan)
    found = WithinRows(square, square.copy(), np.zeros((rows, size)), np.zeros((rows, size)))
    for which, outcomes in _blocks(table):
        found.cross[which] = _cross_moments(outcomes)
        found.ranks[which] = _rank_correlations(outcomes)
        found.cyclic[which], found.triples[which] = _cycles(outcomes)
    return found


def _blocks(table: PairArrays) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(rows, outcomes (R, K, G, G)) for each G above 2: s of the second-last index over the last, NaN if unknown."""
    s, size = table.outcomes, table.labels.shape[1]
    for responses in np.unique(table.sizes[table.sizes >= 3]):
        same_size = np.flatnonzero(table.sizes == responses)
        for which in np.array_split(same_size, -(-len(same_size) * size * responses**2 // BLOCK)):
            place = np.full(len(table.sizes), -1)
            place[which] = np.arange(len(which))
            here = place[table.row] >= 0
            r, a, b = place[table.row[here]], table.first[here], table.second[here]
            outcomes = np.full((len(which), size, responses, responses), np.nan)
            outcomes[r, :, a, b] = s[here]
            outcomes[r, :, b, a] = -s[here]
            yield which, outcomes


def _cross_moments(outcomes: np.ndarray) -> np.ndarray:
    def products(x: np.ndarray) -> np.ndarray:  # over ordered (y, y', y'') with y' and y'' different
        totals, flat = x.sum(axis=3), x.reshape(*x.shape[:2], -1)
        return totals @ totals.swapaxes(1, 2) - flat @ flat.swapaxes(1, 2)

    count = products((~np.isnan(outcomes)).astype(float))
    return np.divide(products(np.nan_to_num(outcomes)), count, out=np.full_like(count, np.nan), where=count > 0)


def _rank_correlations(outcomes: np.ndarray) -> np.ndarray:
    size = outcomes.shape[1]
    found = np.full((len(outcomes), size, size), np.nan)
    for j in range(size):
        for k in range(j, size):
            known = ~np.isnan(outcomes[:, j]) & ~np.isnan(outcomes[:, k])  # win rates over the same opponents
            first, second = (_ranks(outcomes[:, i], known) for i in (j, k))
            scale = np.sqrt((first**2).sum(axis=1) * (second**2).sum(axis=1))
            dot = (first * second).sum(axis=1)
            found[:, j, k] = np.divide(dot, scale, out=np.full_like(dot, np.nan), where=scale > 0)
            found[:, k, j] = found[:, j, k]
    return found


def _ranks(s: np.ndarray, known: np.ndarray) -> np.ndarray:
    """(R, G) centred ranks of the mean outcome against the known opponents, equal ones sharing theirs; 0 if unknown."""
    count = known.sum(axis=2)
    rates = np.round(np.where(known, s, 0.0).sum(axis=2) / np.maximum(count, 1), 9)
    met = count > 0
    above = np.sign(rates[:, :, None] - rates[:, None, :]) * met[:, None, :]
    return np.where(met, above.sum(axis=2) / 2.0, 0.0)  # rank - mean rank = (wins - losses) / 2


def _cycles(outcomes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    beats = (outcomes > 0).astype(float)  # NaN compares false
    decided = beats + beats.swapaxes(2, 3)
    cyclic = np.trace(beats @ beats @ beats, axis1=2, axis2=3) / 3
    return cyclic, np.trace(decided @ decided @ decided, axis1=2, axis2=3) / 6


def true_correlation(cross: np.ndarray, cluster: np.ndarray, j: int, k: int) -> WithError:
    """The within-prompt correlation of the true win rates p_j and p_k of a response, freed of label noise.

    A single 0/1 label is mostly noise, so the correlation of win rates counted from the labels of one row lies closer
    to 0 than the truth (attenuation). But for responses y, y', y'' drawn alike, labels of two *different* pairs err
    independently, so that

        E s_j(y, y') s_k(y, y'') = 4 Cov(p_j(y), p_k(y)),    E s_k(y, y') s_k(y, y'') = 4 Var p_k(y),

    where p is the mean win rate against the behaviour policy, the one in problem (P). Their quotient is Spearman's
    correction for attenuation (1904); without noise it is Spearman's rank correlation itself, by Kruskal's identity
    rho = 3 (concordant - discordant) over triples (1958), since a win rate without noise is a rank. It assumes labels
    given pair by pair: noise in a score that made all the labels of a response is not removed.

    cross (N, K, K) as in WithinRows. The error is of first order (delta method), over prompts; n counts rows. NaN
    where either variance is less than three standard errors above 0: there is too little signal to divide by.
    """
    moments = cross[:, [j, j, k], [k, j, k]]  # (N, 3): Cov, Var_j, Var_k, each times 4
    known = ~np.isnan(moments).any(axis=1)
    moments, cluster = moments[known], cluster[known]
    covariance, *variances = (mean(column, cluster) for column in moments.T)
    if any(not v.value > 3 * v.se for v in variances):
        return WithError(math.nan, math.nan, len(moments))
    scale = math.sqrt(variances[0].value * variances[1].value)
    rho = covariance.value / scale
    relative = moments[:, 1:] / [v.value for v in variances]
    influence = moments[:, 0] / scale - rho * relative.mean(axis=1)
    return WithError(rho, _clustered(influence / len(moments), cluster), len(moments))
