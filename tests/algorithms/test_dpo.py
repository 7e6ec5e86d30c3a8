"""DPO, IPO, SFT and the pairs that they see: values and gradients by hand, identities, missing labels, whole runs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from random import Random
from signal import SIGKILL
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from running import TINY, Finished, cache_of, read_json, read_metrics, results, stop_when
from torch import Tensor

from mopo_cli.algorithms.mopo.core import regression_loss
from mopo_cli.algorithms.pairwise.batches import PairLogps, label_weights, pair_notes, pair_table, weighted_labels
from mopo_cli.algorithms.pairwise.dpo import LOSSES, Dpo, log_ratio_difference, pair_loss
from mopo_cli.algorithms.pairwise.sft import Sft
from mopo_cli.base.errors import UserError
from mopo_cli.base.types import Example
from mopo_cli.config.checks import normalised_weights
from mopo_cli.data.table import TokenRow
from mopo_cli.maths.estimates import against_all, leave_one_out, scalarise
from mopo_cli.planning.policy import TabularPolicy
from mopo_cli.training.stage import Notes

Run = Callable[..., Finished]
NAN = math.nan
NAMES = ("helpful", "harmless")


def f64(*values: Any) -> Tensor:
    return torch.tensor(values if len(values) != 1 else values[0], dtype=torch.float64)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def slope(of: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    h = at.clone().requires_grad_()
    return torch.autograd.grad(of(h).sum(), h)[0]


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def pairs_of(policy: Tensor, labels: Tensor, weights: Tensor, reference: Tensor | None = None) -> PairLogps:
    return PairLogps(
        policy,
        torch.zeros_like(policy) if reference is None else reference,
        torch.ones_like(policy),
        labels.to(policy),
        weights.to(policy),
    )


# --------------------------------------------------------------------------------------------- the loss


class TestByHand:
    @pytest.mark.parametrize(
        ("loss", "smoothing", "value", "gradient"),
        [
            ("sigmoid", 0.0, -math.log(sigmoid(0.6)), -0.3 * sigmoid(-0.6)),
            ("sigmoid", 0.1, -0.9 * math.log(sigmoid(0.6)) - 0.1 * math.log(sigmoid(-0.6)),
             -0.27 * sigmoid(-0.6) + 0.03 * sigmoid(0.6)),
            ("ipo", 0.0, (2.0 - 1 / 0.6) ** 2, 2 * (2.0 - 1 / 0.6)),
            ("ipo", 0.1, (2.0 - 0.8 / 0.6) ** 2, 2 * (2.0 - 0.8 / 0.6)),
            ("hinge", 0.0, 0.4, -0.3),
            ("hinge", 0.1, 0.9 * 0.4 + 0.1 * 1.6, -0.27 + 0.03),
            ("robust", 0.1, (-0.9 * math.log(sigmoid(0.6)) + 0.1 * math.log(sigmoid(-0.6))) / 0.8,
             (-0.27 * sigmoid(-0.6) - 0.03 * sigmoid(0.6)) / 0.8),
        ],
    )  # fmt: skip
    def test_value_and_gradient(self, loss: str, smoothing: float, value: float, gradient: float):
        h, first = f64([2.0]), f64([1.0])
        for sign, label in ((1.0, first), (-1.0, 1.0 - first)):  # the pair, and the pair the other way round
            found = pair_loss(sign * h, label, 0.3, loss, smoothing)
            torch.testing.assert_close(found, f64([value]))
            torch.testing.assert_close(
                slope(lambda x, y=label: pair_loss(x, y, 0.3, loss, smoothing), sign * h), f64([sign * gradient])
            )

    def test_a_hinge_is_flat_beyond_its_margin(self):
        assert pair_loss(f64([4.0]), f64([1.0]), 0.3, "hinge").item() == 0.0
        assert slope(lambda h: pair_loss(h, f64([1.0]), 0.3, "hinge"), f64([4.0])).item() == 0.0

    def test_log_ratios_and_their_means_over_tokens(self):
        policy, reference, lengths = f64([[-6.0, -9.0]]), f64([[-8.0, -3.0]]), f64([[4.0, 3.0]])
        assert log_ratio_difference(policy, reference, lengths, False).item() == 2.0 + 6.0
        assert log_ratio_difference(policy, reference, lengths, True).item() == 0.5 + 2.0

    def test_an_unknown_loss(self):
        with pytest.raises(UserError, match=r"algorithm\.loss=kto: must be sigmoid or ipo or hinge or robust"):
            pair_loss(f64([0.0]), f64([1.0]), 0.1, "kto")


class TestIdentities:
    @pytest.mark.parametrize("tau", [0.05, 0.1, 1.0])
    def test_at_the_reference(self, tau: float):
        h, label = torch.zeros(1, dtype=torch.float64), f64([1.0])
        torch.testing.assert_close(pair_loss(h, label, tau), f64([math.log(2.0)]))
        torch.testing.assert_close(pair_loss(h, label, tau, "robust", 0.2), f64([math.log(2.0)]))
        torch.testing.assert_close(pair_loss(h, label, tau, "ipo"), f64([1 / (4 * tau**2)]))
        torch.testing.assert_close(pair_loss(h, label, tau, "hinge"), f64([1.0]))

    @pytest.mark.parametrize("loss", LOSSES)
    def test_the_order_of_a_pair_does_not_matter(self, loss: str):
        h, label = draw(0, 20), torch.sigmoid(draw(1, 20))
        torch.testing.assert_close(pair_loss(h, label, 0.3, loss, 0.1), pair_loss(-h, 1 - label, 0.3, loss, 0.1))

    @pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge"])
    def test_near_one_half_smoothing_forgets_the_label(self, loss: str):
        h, nearly = draw(0, 20), 0.5 - 1e-9
        first, second = (pair_loss(h, torch.full_like(h, label), 0.3, loss, nearly) for label in (1.0, 0.0))
        torch.testing.assert_close(first, second, rtol=0, atol=1e-7)
        torch.testing.assert_close(first, pair_loss(-h, torch.ones_like(h), 0.3, loss, nearly), rtol=0, atol=1e-7)

    @pytest.mark.parametrize("loss", ["sigmoid", "hinge", "robust"])
    def test_a_soft_label_mixes_the_two_hard_ones(self, loss: str):
        h, label = draw(0, 20), torch.sigmoid(draw(1, 20))
        yes, no = (pair_loss(h, torch.full_like(h, hard), 0.3, loss, 0.2) for hard in (1.0, 0.0))
        torch.testing.assert_close(pair_loss(h, label, 0.3, loss, 0.2), label * yes + (1 - label) * no)

    @given(st.floats(-20, 20), st.floats(0, 0.45), st.sampled_from([0.0, 1.0]))
    @settings(max_examples=50, deadline=None)
    def test_robust_is_unbiased_under_flips(self, h: float, flips: float, label: float):
        noisy = sum(
            chance * pair_loss(f64([h]), f64([seen]), 0.7, "robust", flips)
            for chance, seen in ((1 - flips, label), (flips, 1 - label))
        )
        torch.testing.assert_close(noisy, pair_loss(f64([h]), f64([label]), 0.7), rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize(
        ("loss", "smoothing", "optimum"),
        [
            ("sigmoid", 0.0, lambda p: torch.logit(p)),
            ("sigmoid", 0.1, lambda p: torch.logit(0.9 * p + 0.1 * (1 - p))),
            ("ipo", 0.0, lambda p: p - 0.5),
            ("robust", 0.1, lambda p: torch.logit((p - 0.1) / 0.8)),
        ],
    )
    def test_the_optimum_of_a_population(self, loss: str, smoothing: float, optimum: Callable[[Tensor], Tensor]):
        """Prompts with two responses each, the first preferred with probability p."""
        tau, p = 0.4, f64([0.3, 0.5, 0.62, 0.85])
        reference = torch.log_softmax(draw(3, 4, 2), -1)
        policy = TabularPolicy(reference)

        def total() -> Tensor:
            h = log_ratio_difference(policy(), reference, torch.ones_like(reference), False)
            return pair_loss(h, p, tau, loss, smoothing).sum()

        minimise(policy, total)
        h = log_ratio_difference(policy(), reference, torch.ones_like(reference), False)
        torch.testing.assert_close(h.detach(), optimum(p) / tau, rtol=1e-6, atol=1e-6)


def minimise(policy: TabularPolicy, total: Callable[[], Tensor]) -> None:
    optimiser = torch.optim.LBFGS(policy.parameters(), max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16,
                                  line_search_fn="strong_wolfe")  # fmt: skip

    def closure() -> float:
        optimiser.zero_grad()
        loss = total()
        loss.backward()
        return float(loss.detach())

    optimiser.step(closure)


# --------------------------------------------------------------------------------------------- several objectives


LABELS = f64([[1.0, 0.0], [0.0, NAN], [NAN, 1.0], [0.5, 0.75], [NAN, NAN], [1.0, 1.0]])


class TestWeightedLabels:
    def test_by_hand(self):
        found = weighted_labels(LABELS, f64([0.7, 0.3]))
        torch.testing.assert_close(found.weight, f64([1.0, 0.7, 0.3, 1.0, 0.0, 1.0]))
        torch.testing.assert_close(found.label, f64([0.7, 0.0, 1.0, 0.575, 0.5, 1.0]))

    @pytest.mark.parametrize("loss", LOSSES)
    def test_the_loss_is_the_weighted_sum_of_the_objectives_losses(self, loss: str):
        """Exactly where a loss is linear in its label; the square of ipo leaves a constant, and the same gradient."""
        w, h = [0.7, 0.3], draw(0, len(LABELS))
        asked = weighted_labels(LABELS, f64(w))

        def ours(h: Tensor) -> Tensor:
            return asked.weight * pair_loss(h, asked.label, 0.3, loss, 0.1)

        def apart(h: Tensor) -> Tensor:
            each = [
                w[k]
                * torch.where(LABELS[:, k].isnan(), 0.0, pair_loss(h, LABELS[:, k].nan_to_num(0.5), 0.3, loss, 0.1))
                for k in (0, 1)
            ]
            return each[0] + each[1]

        if loss != "ipo":
            torch.testing.assert_close(ours(h), apart(h))
        torch.testing.assert_close(slope(ours, h), slope(apart, h))

    def test_a_mean_over_each_objectives_own_pairs(self):
        """Few labels of an objective weigh as much as many: sum_k w_k times the mean over D_k."""
        example = Example("?", ("a", "b"), ((0, 1),), ((1.0, 0.0),))
        rows = [Example("?", ("a", "b"), ((0, 1),), (tuple(row),)) for row in LABELS.tolist()]
        assert label_weights([example], (0.7, 0.3)) == pytest.approx([0.7, 0.3])
        assert label_weights(rows, (0.7, 0.3)) == pytest.approx([0.7 * 5 / 4, 0.3 * 5 / 4])
        assert label_weights(rows, (1.0, 0.0)) == [1.0, 0.0]
        weights = f64(label_weights(rows[:3], (0.7, 0.3)))
        method = Dpo(NAMES, 0.3, weights={"helpful": 0.7, "harmless": 0.3})
        policy = draw(0, 3, 2)
        h = policy[:, 0] - policy[:, 1]
        own = [pair_loss(h[list(known)], LABELS[list(known), k], 0.3).mean() for k, known in ((0, (0, 1)), (1, (0, 2)))]
        found = method.losses(pairs_of(policy, LABELS[:3], weights)).mean()
        torch.testing.assert_close(found, 0.7 * own[0] + 0.3 * own[1])

    def test_one_objective_is_dpo_on_its_pairs(self):
        policy, known = draw(0, len(LABELS), 2), ~LABELS[:, 1].isnan()
        found = Dpo(NAMES, 0.3, weights={"harmless": 2}).losses(pairs_of(policy, LABELS, f64([0.0, 1.0])))
        plain = pair_loss((policy[:, 0] - policy[:, 1])[known], LABELS[known, 1], 0.3)
        torch.testing.assert_close(found[known], plain)
        assert not found[~known].any()

    @pytest.mark.parametrize("responses", [2, 3, 5])
    def test_mopo_with_fixed_multipliers_is_weighted_ipo(self, responses: int):
        """Regression on observed labels at tau and lambda: ipo at tau / (1 + sum lambda), in gradient.

        Of two responses any labels do. Of more, mopo's targets are win rates against all of them and not single labels:
        the two are equal where a label is 1/2 plus a difference of strengths.
        """
        prompts, tau, duals = 4, 0.2, f64([0.5, 2.0])
        labels = torch.rand(prompts, responses, responses, 3, generator=torch.Generator().manual_seed(0)).double()
        labels = (labels + 1 - labels.transpose(1, 2)) / 2  # I(y, y') + I(y', y) = 1
        if responses > 2:
            strength = 0.05 * draw(3, prompts, responses, 3)
            labels = 0.5 + strength[:, :, None] - strength[:, None]
        mask = torch.ones(prompts, responses, dtype=torch.bool)
        rates = against_all(leave_one_out(labels, mask), mask, mask)
        reference, policy = draw(1, prompts, responses), draw(2, prompts, responses)
        first, second = torch.triu_indices(responses, responses, 1)
        of_pairs = labels[:, first, second].flatten(0, 1)
        method = Dpo(("a", "b", "c"), tau / (1 + float(duals.sum())), "ipo", {"a": 1.0, "b": 0.5, "c": 2.0})

        def mopo(policy: Tensor) -> Tensor:
            return regression_loss(policy, reference, scalarise(rates, duals), mask, tau)

        def ipo(policy: Tensor) -> Tensor:
            now, before = (torch.stack([v[:, first], v[:, second]], -1).flatten(0, 1) for v in (policy, reference))
            return method.losses(pairs_of(now, of_pairs, f64(method.shares), before)).view(prompts, -1).mean(1)

        torch.testing.assert_close(slope(mopo, policy), slope(ipo, policy))


class TestSft:
    def test_weights_clone_each_objectives_winners(self):
        policy = draw(0, len(LABELS), 2)
        method = Sft(NAMES, {"helpful": 0.7, "harmless": 0.3})
        found = method.loss(pairs_of(policy, LABELS, f64([0.7, 0.3])))
        by_hand = [
            sum(w * -(label * a + (1 - label) * b) for w, label in zip((0.7, 0.3), row, strict=True) if label == label)
            for row, (a, b) in zip(LABELS.tolist(), policy.tolist(), strict=True)
        ]
        torch.testing.assert_close(found, f64(by_hand))

    def test_the_tokens_that_are_cloned(self):
        lengths = f64([[3.0, 8.0]]).repeat(len(LABELS), 1)
        pairs = PairLogps(torch.zeros_like(lengths), lengths, lengths, LABELS, f64([0.5, 0.5]))
        by_hand = f64([0.5 * 3 + 0.5 * 8, 0.5 * 8, 0.5 * 3, 0.5 * 5.5 + 0.5 * 4.25, 0.0, 3.0])
        torch.testing.assert_close(Sft(NAMES).tokens(pairs), by_hand)


class TestSettings:
    def test_weights(self):
        assert normalised_weights(NAMES, None) == (1.0, 0.0)
        assert normalised_weights(NAMES, {"harmless": 3, "helpful": 1}) == (0.25, 0.75)
        assert normalised_weights(NAMES, {"harmless": 0.2}) == (0.0, 1.0)

    @pytest.mark.parametrize(
        ("weights", "message"),
        [
            ({"helpfull": 1.0}, "algorithm.weights={helpfull: 1.0}: helpfull is no objective; the set has "),
            ({"helpful": -0.1}, "algorithm.weights.helpful=-0.1: must be a number, 0 or more"),
            ({"helpful": NAN}, "algorithm.weights.helpful=nan: must be a number, 0 or more"),
            ({"helpful": "much"}, "algorithm.weights.helpful=much: must be a number, 0 or more"),
            ({"helpful": 0.0, "harmless": 0}, "all are zero; at least one must be above 0"),
            ([0.5, 0.5], "must be a weight for each objective, as {helpful: 0.7, ...}, or null"),
        ],
    )  # fmt: skip
    def test_bad_weights(self, weights: Any, message: str):
        for method in (lambda: Dpo(NAMES, 0.1, weights=weights), lambda: Sft(NAMES, weights)):
            with pytest.raises(UserError) as told:
                method()
            assert message in str(told.value)

    @pytest.mark.parametrize(
        "bad", [{"loss": "kto"}, {"smoothing": 0.5}, {"smoothing": -0.1}, {"smoothing": "a"}, {"length_normalised": 1}]
    )
    def test_bad_settings(self, bad: dict[str, Any]):
        with pytest.raises(UserError, match=f"algorithm.{next(iter(bad))}="):
            Dpo(NAMES, 0.1, **bad)


# --------------------------------------------------------------------------------------------- the table of pairs


class TestPairTable:
    examples = (
        Example("p", ("a", "b", "c"), ((0, 2), (1, 2), (2, 0)), ((1.0, NAN), (NAN, 1.0), (0.5, 0.5))),
        Example("q", ("a", "b"), ((1, 0),), ((0.0, 0.25),)),
        Example("r", ("a", "b"), ((0, 1),), ((NAN, 1.0),)),
    )
    tokens = (
        TokenRow([1], [[5], [5, 6], [5, 6, 7]]),
        TokenRow([1], [[5, 5, 5, 5], [6]]),
        TokenRow([1], [[5, 5], [6, 6, 6]]),
    )

    def table(self, *weights: float, rows: tuple[int, ...] = (0, 1, 2)) -> Any:
        reference = [torch.arange(len(self.tokens[i].responses)) + 10.0 * i for i in rows]
        rewards = {i: torch.stack([r, -r], -1) for i, r in zip(rows, reference, strict=True)}
        return pair_table(self.examples, self.tokens, rows, weights, weights, reference, rewards)

    def test_a_batch_in_any_order(self):
        pairs = self.table(0.5, 0.5).of([1, 0], torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0]))
        assert pairs.policy.tolist() == [[-2, -1], [-3, -5], [-4, -5], [-5, -3]]
        assert pairs.reference.tolist() == [[11, 10], [0, 2], [1, 2], [2, 0]]
        assert pairs.lengths.tolist() == [[1, 4], [1, 3], [2, 3], [3, 1]]
        assert pairs.labels[[0, 3]].tolist() == [[0.0, 0.25], [0.5, 0.5]]
        assert pairs.labels.isnan().tolist() == [[False] * 2, [False, True], [True, False], [False] * 2]
        assert pairs.rewards is not None
        assert pairs.rewards[0].tolist() == [[11, -11], [10, -10]]

    def test_pairs_without_a_label_that_counts_are_left_out(self):
        table = self.table(1.0, 0.0, rows=(0, 1))
        assert table.pairs_of([0]) == 2
        assert table.of([0], torch.zeros(3)).reference.tolist() == [[0, 2], [2, 0]]
        assert table.sums(torch.tensor([1.0, 2.0, 4.0])).tolist() == [3.0, 4.0]

    def test_what_is_noted_of_a_batch(self):
        notes = pair_notes(self.table(1.0, 0.0, rows=(0, 1)).of([0, 1], torch.tensor([-1.0, -2.0, -3.0, -4.0, -9.0])))
        assert sorted(notes["preferred_logp"].tolist()) == [-4.0, -1.0]  # the tie counts for nothing
        assert sorted(notes["other_logp"].tolist()) == [-9.0, -3.0]
        assert notes["accuracy"].tolist() == [1.0, 1.0]
        undecided = Notes()
        undecided.add(lambda: pair_notes(pairs_of(torch.zeros(1, 2), torch.full((1, 2), 0.5), torch.ones(2))))
        assert all(math.isnan(value) for value in undecided.means().values())


# --------------------------------------------------------------------------------------------- whole runs


def write_rows(path: Path, labels: Callable[[int], dict[str, list[list[float]]]], rows: int = 60) -> tuple[str, ...]:
    """Yes-or-no questions with labels; the overrides that train on them."""
    made = [{"prompt": f"Q {i}?", "responses": ["Yes.", "No."], "labels": labels(i)} for i in range(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return ("dataset=pairs", f"dataset.path={path}", "dataset.max_rows=null", "objectives=helpful_harmless")


@pytest.mark.slow
class TestRuns:
    WEIGHTS = "algorithm.weights={helpful: 0.5, harmless: 0.5}"

    @pytest.mark.parametrize("algorithm", ["dpo", "ipo", "sft"])
    def test_missing_labels(self, here: Path, run_here: Run, algorithm: str):
        """helpful judges the even rows and says yes, harmless judges every fifth and says yes."""

        def labels(i: int) -> dict[str, list[list[float]]]:
            found = {"helpful": [[0, 1, 1.0]]} if i % 2 == 0 else {}
            return found | ({"harmless": [[0, 1, 1.0]]} if i % 5 == 0 else {})

        data = write_rows(here / "rows.jsonl", labels)
        rate = "optimiser.learning_rate=3e-3"
        done = run_here("train", *TINY, *data, f"algorithm={algorithm}", self.WEIGHTS, rate, "run.dir=run")
        assert done.status == 0, done.err
        metrics, summary = read_metrics(here / "run"), read_json(here / "run" / "summary.json")
        gap = [line["preferred_logp"] - line["other_logp"] for line in metrics]
        assert gap[-1] > gap[0] + 0.5
        assert summary["algorithm"] == algorithm
        assert summary["train"]["steps"] == 40
        assert summary["duals"] == {}

    def test_a_killed_run_goes_on_to_the_same_end(self, smoke: Path, here: Path, run_here: Run):
        settings = (*TINY, f"cache={cache_of(smoke)}", "algorithm=dpo", self.WEIGHTS, "steps=150")
        assert run_here("train", *settings, "run.dir=whole").status == 0
        run = here / "run"

        def under_way() -> bool:
            return any((run / "checkpoints").glob("step-*"))

        stopped = stop_when(under_way, SIGKILL, "train", *settings, f"run.dir={run}", cwd=here)
        assert stopped.status == -SIGKILL
        assert run_here("train", *settings, f"run.dir={run}", "run.resume=true").status == 0
        assert results(run) == results(here / "whole")
        ours, theirs = ((path / "model" / "model.safetensors").read_bytes() for path in (run, here / "whole"))
        assert ours == theirs

    def test_an_objective_whose_labels_do_not_fit_the_context(self, here: Path, run_here: Run):
        def labels(i: int) -> dict[str, list[list[float]]]:
            return {"helpful": [[0, 1, 1.0]]} | ({"harmless": [[0, 1, 1.0]]} if i < 6 else {})

        data = write_rows(here / "rows.jsonl", labels)
        rows = (here / "rows.jsonl").read_text().splitlines()
        rows[:6] = [row.replace("?", f" {Random(i).getrandbits(12000):x}?") for i, row in enumerate(rows[:6])]
        (here / "rows.jsonl").write_text("\n".join(rows) + "\n")
        done = run_here("train", *TINY, *data, "algorithm=dpo", self.WEIGHTS, "dataset.overlong=drop", "run.dir=run")
        assert done.status == 2
        assert "algorithm.weights: harmless has weight 0.5, and none of the " in done.err
        assert "Give it weight 0, or use data that judge it" in done.err
