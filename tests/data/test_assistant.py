"""The embedded world: what it promises about its texts, its probabilities and its conflict."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.stats import chi2

from mopo_cli.base.types import Corpus, Example
from mopo_cli.data import assistant
from mopo_cli.data.assistant import SLOTS, World
from mopo_cli.data.topics import TOPICS, Topic
from mopo_cli.maths import oracle


def world_of(corpus: Corpus) -> World:
    assert isinstance(corpus.world, World)
    return corpus.world


@pytest.fixture(scope="module")
def world() -> World:
    return world_of(assistant.assistant(rows=1, cyclic=True))


@pytest.fixture(scope="module")
def prompts(world: World) -> list[str]:
    """A prompt of every topic."""
    return list({topic: prompt for prompt, topic in world.prompts.items()}.values())


class TestTexts:
    def test_there_are_many_topics_and_prompts(self, world: World, prompts: list[str]):
        assert len(TOPICS) == len(set(TOPICS)) == len(prompts) >= 60
        assert len(world.prompts) == len(TOPICS) * 24
        assert {topic.risky for topic in TOPICS} == {True, False}

    def test_108_different_responses_to_each_prompt(self, world: World, prompts: list[str]):
        assert len(SLOTS) == len(set(SLOTS)) == 108
        assert all(len(set(world.responses(prompt))) == 108 for prompt in prompts)

    @pytest.mark.parametrize("topic", TOPICS, ids=lambda topic: topic.task)
    def test_slots_are_read_back_from_the_text(self, topic: Topic):
        for slots in SLOTS:
            assert assistant.read_slots(assistant.compose(slots, topic), topic) == slots

    def test_any_text_can_be_scored(self, world: World, prompts: list[str]):
        texts = ["", "?", "Sure! " * 3, world.responses(prompts[0])[5] + " More."]
        matrices = world.preferences(prompts[0], texts, texts)
        assert matrices.shape == (4, 4, 4)
        assert np.all((matrices >= 0) & (matrices <= 1))


class TestProbabilities:
    def test_mu_is_a_distribution(self, world: World, prompts: list[str]):
        for prompt in prompts:
            mu = world.mu(prompt)
            assert mu.shape == (108,)
            assert np.all(mu > 0)
            assert mu.sum() == pytest.approx(1.0, abs=1e-12)

    def test_preferences_of_two_orders_sum_to_one(self, world: World, prompts: list[str]):
        for prompt in prompts[::8]:
            responses = world.responses(prompt)
            p = world.preferences(prompt, responses, responses)
            assert p.shape == (4, 108, 108)
            np.testing.assert_allclose(p + p.swapaxes(1, 2), 1.0, atol=1e-12)

    def test_bradley_terry_by_hand(self):
        topic = Topic("bake", "Bake it.", risky=False)
        world = World(("helpful", "harmless", "concise"), {"How?": topic})
        right, cautious = "Bake it.", "Bake it. " + assistant.CAUTION
        p = world.preferences("How?", [right], [cautious])[:, 0, 0]
        more_words = len(assistant.CAUTION.split())
        logits = np.array([0.3, -0.9, 0.08 * more_words])  # caution: less helpful, more harmless, longer
        np.testing.assert_allclose(p, 1 / (1 + np.exp(-logits)), atol=1e-12)

    def test_tone_is_rock_paper_scissors(self, world: World, prompts: list[str]):
        texts = [f"{opening} {assistant.VAGUE}".strip() for opening in assistant.OPENINGS]
        tone = world.preferences(prompts[0], texts, texts)[3]
        np.testing.assert_allclose(tone, [[0.5, 0.1, 0.9], [0.9, 0.5, 0.1], [0.1, 0.9, 0.5]], atol=1e-12)

    def test_win_rates_are_the_mean_against_mu(self, world: World, prompts: list[str]):
        prompt = prompts[3]
        rates = world.win_rates(prompt)
        assert rates.shape == (108, 4)
        np.testing.assert_allclose(world.mu(prompt) @ rates, 0.5, atol=1e-12)  # mu against itself is parity
        responses = world.responses(prompt)
        by_hand = world.preferences(prompt, responses[7:8], responses)[0, 0] @ world.mu(prompt)
        assert rates[7, 0] == pytest.approx(by_hand, abs=1e-12)
        np.testing.assert_allclose(world.win_rates(prompt, responses[7:9]), rates[7:9], atol=1e-12)


class TestCorpus:
    ROWS = 400

    @pytest.fixture(scope="class")
    def corpus(self) -> Corpus:
        return assistant.assistant(rows=self.ROWS, cyclic=True, data_seed=3)

    @pytest.fixture(scope="class")
    def examples(self, corpus: Corpus) -> list[Example]:
        return list(corpus.examples)

    def test_every_response_is_one_of_the_listed(self, corpus: Corpus, examples: list[Example]):
        world = world_of(corpus)
        for example in examples[:100]:
            assert isinstance(example.prompt, str)
            assert set(example.responses) <= set(world.responses(example.prompt))

    def test_a_label_for_every_pair_and_objective(self, corpus: Corpus, examples: list[Example]):
        assert corpus.objectives == ("helpful", "harmless", "concise", "tone")
        assert len(examples) == self.ROWS
        for example in examples[:50]:
            assert example.pairs == ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
            assert all(len(row) == 4 and set(row) <= {0.0, 1.0} for row in example.labels)

    def test_labels_match_their_probabilities(self, corpus: Corpus, examples: list[Example]):
        world = world_of(corpus)
        p, labels = [], []
        for example in examples:
            texts = [str(text) for text in example.responses]
            matrices = world.preferences(str(example.prompt), texts, texts)
            p += [matrices[:, a, b] for a, b in example.pairs]
            labels += example.labels
        for k, name in enumerate(world.objectives):
            assert chi_square(np.array(p)[:, k], np.array(labels)[:, k]) > 1e-3, name

    def test_responses_are_drawn_from_mu(self, corpus: Corpus):
        world = world_of(corpus)
        one = next(prompt for prompt, topic in world.prompts.items() if topic.risky)
        draws = assistant._examples(world, [assistant.Prompt(one, world.prompts[one])], 2000, 4, 11)
        where = {text: i for i, text in enumerate(world.responses(one))}
        counts = np.bincount([where[str(text)] for example in draws for text in example.responses], minlength=108)
        expected = 8000 * world.mu(one)
        assert expected.min() > 5  # as the chi-square distribution needs
        assert chi2.sf(((counts - expected) ** 2 / expected).sum(), 107) > 1e-3

    def test_the_same_arguments_give_the_same_data(self, examples: list[Example]):
        again = assistant.assistant(rows=self.ROWS, cyclic=True, data_seed=3)
        assert list(again.examples) == examples
        assert own_test(again) == own_test(assistant.assistant(rows=5, cyclic=True, data_seed=3))
        other = assistant.assistant(rows=self.ROWS, cyclic=True, data_seed=4)
        assert [e.prompt for e in other.examples] != [e.prompt for e in examples]

    def test_test_prompts_are_new_and_cover_every_topic(self):
        corpus = assistant.assistant(rows=3000)
        world = world_of(corpus)
        train, test = ({str(e.prompt) for e in part} for part in (corpus.examples, own_test(corpus)))
        assert not train & test
        assert len(test) == 2 * len(TOPICS)
        assert {world.prompts[prompt] for prompt in test} == set(TOPICS)
        assert train | test == set(world.prompts)

    def test_arguments(self):
        corpus = assistant.assistant(rows=7, responses=3)
        examples = list(corpus.examples)
        assert len(examples) == 7
        assert all(len(e.responses) == 3 and len(e.pairs) == 3 for e in examples)
        assert corpus.objectives == ("helpful", "harmless", "concise")


def chi_square(p: np.ndarray, labels: np.ndarray) -> float:
    """The probability of labels this far from p, or farther, over ten bins of p."""
    order = np.argsort(p)
    statistic = 0.0
    for which in np.array_split(order, 10):
        expected, variance = p[which].sum(), (p[which] * (1 - p[which])).sum()
        statistic += (labels[which].sum() - expected) ** 2 / variance
    return float(chi2.sf(statistic, 10))


def own_test(corpus: Corpus) -> list[Example]:
    assert corpus.test is not None
    return list(corpus.test)


class TestConflict:
    def test_helpfulness_alone_costs_harmlessness_that_could_be_had(self):
        """What makes the world worth training on: without a constraint the optimum is far less harmless than today."""
        corpus = assistant.assistant(rows=1)
        world = world_of(corpus)
        prompts = [str(example.prompt) for example in own_test(corpus)]
        rates = np.stack([world.win_rates(prompt) for prompt in prompts])
        log_mu = np.log(np.stack([world.mu(prompt) for prompt in prompts]))
        free: Any = oracle.solve(rates, log_mu, tau=0.08, thresholds=np.array([-np.inf, -np.inf]))
        assert free.win_rates[0] > 0.7
        assert free.win_rates[1] <= 0.42
        assert free.attainable[0] >= 0.65
        kept: Any = oracle.solve(rates, log_mu, tau=0.08, thresholds=np.array([0.55, 0.5]))
        assert kept.feasible
        assert kept.duals[0] > 0
        assert 0.5 < kept.win_rates[0] < free.win_rates[0]
