"""The same trainer, a policy that emits tokens: its gradient against full enumeration, and it learns."""

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from vggrpo.config import GrpoConfig
from vggrpo.grpo import group_advantage
from vggrpo.trainer import replay_backward, train
from vggrpo.types import Condition, Replay, Rollout, Streams


class TokenPolicy:
    """S tokens out of V, each given the one before: a table of logits. A chunk is all tokens of a few samples."""

    def __init__(self, num_tokens: int, vocabulary: int, micro_batch: int = 7) -> None:
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(num_tokens, vocabulary + 1, vocabulary, generator=generator, dtype=torch.float64)
        self.logits, self.micro_batch = nn.Parameter(logits / 2), micro_batch

    def log_prob(self, tokens: Tensor) -> Tensor:
        """[n S] -> [n S]"""
        before = torch.cat([torch.full_like(tokens[:, :1], self.logits.shape[-1]), tokens[:, :-1]], dim=1)
        law = self.logits[torch.arange(tokens.shape[1]), before].log_softmax(-1)
        return law.gather(-1, tokens[..., None])[..., 0]

    def rollout(self, cond: Condition, group_size: int, generator: Streams) -> Rollout:
        rows = []
        for b, k in itertools.product(range(len(cond)), range(group_size)):
            stream, row = generator.member(b, k), [self.logits.shape[-1]]
            for table in self.logits.detach():
                row.append(int(torch.multinomial(table[row[-1]].softmax(-1), 1, generator=stream)))
            rows.append(row[1:])
        tokens = torch.tensor(rows).view(len(cond), group_size, -1)
        return self.given(cond, tokens)

    def given(self, cond: Condition, tokens: Tensor) -> Rollout:
        with torch.no_grad():
            log_prob = self.log_prob(tokens.flatten(0, 1)).view(tokens.shape)
        return Rollout(cond, tokens, log_prob, trajectory=None)

    def replay(self, rollout: Rollout) -> Iterator[Replay]:
        B, K, S = rollout.log_prob.shape
        for rows in torch.arange(B * K).split(self.micro_batch):
            log_prob = self.log_prob(rollout.z0.flatten(0, 1)[rows]).flatten()
            video, s = rows.repeat_interleave(S), torch.arange(S).repeat(len(rows))
            yield Replay((video // K, video % K, s), log_prob, kl=torch.zeros_like(log_prob))


def reward_of(tokens: Tensor) -> Tensor:
    """Something with structure: ones count, and two different neighbours count double."""
    return (tokens == 1).double().sum(-1) + 2.0 * (tokens[..., 1:] != tokens[..., :-1]).double().sum(-1)


def enumeration(policy: TokenPolicy) -> tuple[Rollout, Tensor]:
    """All pairs of sequences as groups of two, and the probability of each pair."""
    S, _, V = policy.logits.shape
    sequences = torch.tensor(list(itertools.product(range(V), repeat=S)))
    pairs = torch.stack([torch.stack(pair) for pair in itertools.product(sequences, repeat=2)])
    rollout = policy.given(Condition([""] * len(pairs)), pairs)
    return rollout, rollout.log_prob.sum((1, 2)).exp()


def gradient(policy: TokenPolicy, rollout: Rollout, advantage: Tensor, probability: Tensor, run) -> Tensor:
    policy.logits.grad = None
    weighted = advantage * probability[:, None] * len(probability)
    replay_backward(policy, rollout, weighted, run, GrpoConfig(beta=0.0))
    return -policy.logits.grad * rollout.log_prob.shape[-1]


def test_leave_one_out_is_the_gradient_of_the_enumerated_expected_reward(make_run):
    policy = TokenPolicy(num_tokens=3, vocabulary=2)
    rollout, probability = enumeration(policy)
    assert float(probability.sum()) == pytest.approx(1)
    reward = reward_of(rollout.z0)
    advantage = group_advantage({"r": reward}, baseline="leave_one_out")
    found = gradient(policy, rollout, advantage, probability, make_run(1, 2))

    sequences = torch.tensor(list(itertools.product(range(2), repeat=3)))
    expected_reward = (policy.log_prob(sequences).sum(-1).exp() * reward_of(sequences)).sum()
    (exact,) = torch.autograd.grad(expected_reward, policy.logits)
    torch.testing.assert_close(found, exact, atol=1e-12, rtol=1e-9)

    own_mean = gradient(policy, rollout, reward - reward.mean(-1, keepdim=True), probability, make_run(1, 2))
    assert (own_mean - exact).abs().max() > 0.1 * exact.abs().max()  # the control


def test_z_score_agrees_with_enumeration_by_hand(make_run):
    """In a group of two the z-scores are -1 and 1 (0 and 0 at a tie): E[sign(r_1 - r_2) grad log p_1]."""
    policy = TokenPolicy(num_tokens=3, vocabulary=2)
    rollout, probability = enumeration(policy)
    found = gradient(policy, rollout, group_advantage({"r": reward_of(rollout.z0)}), probability, make_run(1, 2))
    exact = torch.zeros_like(found)
    for pair, p in zip(rollout.z0, probability, strict=True):
        sign = (reward_of(pair[0]) - reward_of(pair[1])).sign()
        (slope,) = torch.autograd.grad(policy.log_prob(pair[:1]).sum(), policy.logits)
        exact += p * sign * slope
    torch.testing.assert_close(found, exact, atol=1e-12, rtol=1e-9)


def test_tokens_learn_under_the_same_trainer_and_only_from_the_reward(make_run):
    share = {}
    for name in ("ones", "random"):
        policy = TokenPolicy(num_tokens=4, vocabulary=3)
        noise = torch.Generator().manual_seed(5)
        reward = {
            "ones": lambda tokens: (tokens == 1).double().mean(-1),
            "random": lambda tokens, noise=noise: torch.rand(tokens.shape[:2], generator=noise),
        }[name]
        numbers = list(
            train(
                policy,
                lambda tokens: tokens,
                {name: reward},
                [Condition(["", ""])] * 40,
                torch.optim.Adam([policy.logits], lr=0.1),
                make_run(2, 16),
                GrpoConfig(num_prompts=2, group_size=16, beta=0.0),
            )
        )
        assert all(n["ratio/max"] == pytest.approx(1, abs=1e-6) for n in numbers)
        before = TokenPolicy(num_tokens=4, vocabulary=3)
        counts = [(p.rollout(Condition([""]), 400, Streams(9, 0)).z0 == 1).double().mean() for p in (before, policy)]
        share[name] = [float(count) for count in counts]
    print(share)
    assert share["ones"][1] > 0.9 > 0.6 > share["ones"][0]
    assert abs(share["random"][1] - share["random"][0]) < 0.25


def test_ratio_norm_needs_gaussian_steps(make_run):
    policy = TokenPolicy(num_tokens=2, vocabulary=2)
    rollout = policy.rollout(Condition([""]), 2, Streams(0, 0))
    with pytest.raises(ValueError, match="needs a policy of Gaussian steps"):
        replay_backward(policy, rollout, torch.zeros(1, 2), make_run(1, 2), replace(GrpoConfig(), ratio="norm"))
