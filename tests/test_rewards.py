"""Rewards: where they come from, how several make one, how they are shaped, and whom errors name."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.rl_worlds import world
from tests.trainer_worlds import lines, small_policy, small_scalar
from trainer import grpo, ppo, reward_http
from trainer.aspects import Rewards, aspects_of, truncation_score
from trainer.models import ScalarModel
from trainer.packing import Sample, pack
from trainer.reward_compare import by_comparison
from trainer.rewards import reward_from
from trainer.rollout import Rollout
from trainer.shaping import RewardOptions, check, combined, ranged, shaped

HERE = "tests.test_rewards"
# "c", which ended, to "a b"; "a d", which did not, to "a"
ROLLOUT = Rollout([Sample([2, 3, 4, 1], 2), Sample([2, 2, 5], 1)], [False, True], [[0.0, 0.0], [0.0, 0.0]])
RECORDS: list[dict[str, Any]] = [{"prompt": "a b"}, {"prompt": "a", "extra": {"response": "e f"}}]


def words(prompts: Sequence[str], responses: Sequence[str], extras: Sequence[dict[str, Any]]) -> list[float]:
    return [float(len(r.split())) for r in responses]


def fails_on_d(prompts: Sequence[str], responses: Sequence[str], extras: Sequence[dict[str, Any]]) -> list[float]:
    return [1 / (0 if "d" in r else 1) for r in responses]


def fails_on_two(prompts: Sequence[str], responses: Sequence[str], extras: Sequence[dict[str, Any]]) -> list[float]:
    if len(responses) > 1:
        raise KeyError("both")
    return [0.0]


def says_nothing(prompts: Sequence[str], responses: Sequence[str], extras: Sequence[dict[str, Any]]) -> list[Any]:
    return [None if "d" in r else 1.0 for r in responses]


def shorter(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
    """A judge that compares, and that likes the first place a little."""
    return [min(float(len(a) < len(b)) + 0.1, 1.0) for a, b in zip(first, second, strict=True)]


def undecided(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
    return [2.0] * len(prompts)


def score(name: str) -> Tensor:
    reward = reward_from(name, small_policy().tokenizer, max_length=64, max_tokens=1000, device=torch.device("cpu"))
    return reward(ROLLOUT, RECORDS)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fails_on_d", r"raised ZeroDivisionError.*on sample 1 alone: prompt 'a', response 'a d'"),
        ("fails_on_two", r"raised KeyError.*on none of the 2 samples alone"),
        ("says_nothing", r"gave None to the response 'a d', want a finite number; the prompt was 'a'"),
    ],
)
def test_errors_name_the_sample(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score(f"{HERE}:{name}")


def test_a_reward_model_that_overflows_names_the_sample(tmp_path: Path) -> None:
    model = small_scalar()
    with torch.no_grad():
        model.head.weight.fill_(3e38)
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"gave (-?inf|nan) to the response 'c'"):
        score(str(tmp_path))


def test_a_judge_that_compares_makes_a_score_of_its_verdicts(tmp_path: Path) -> None:
    """Against the others to the same prompt, in both orders, so that a liking for the first place cancels."""
    with pytest.raises(ValueError, match="nothing to hold against the only response to 'a b'"):
        score(f"compare:{HERE}:shorter")
    reward = reward_from(
        f"compare:{HERE}:shorter", small_policy().tokenizer, max_length=64, max_tokens=99, device=torch.device("cpu")
    )
    with pytest.raises(ValueError, match=r"gave 2\.0 for the prompt 'a', want a number from 0 to 1"):
        by_comparison(undecided)(["a", "a"], ["b", "c"], [{}, {}])
    said = [[4, 1], [4, 5, 1], [4, 5, 6, 1], [4, 5, 1]]
    rollout = Rollout([Sample([2, *x], 1) for x in said], [False] * 4, [[0.0] * len(x) for x in said])
    alone: dict[str, Any] = {"prompt": "z", "extra": {"response": "a b c"}}
    found = reward(rollout, [{"prompt": "a"}] * 3 + [alone])
    torch.testing.assert_close(found, torch.tensor([0.95, 0.5, 0.05, 0.95]))
    options: dict[str, Any] = world(tmp_path) | {"reward": f"compare:{HERE}:shorter", "steps": 1}
    grpo.train(grpo.GRPOConfig(**options, num_generations=3))
    (step,) = lines(tmp_path / "out" / "metrics.jsonl")
    assert step["objective/scores"] == pytest.approx(0.5, abs=0.05)  # every win is another's loss, but for ties


def test_aspects_are_read_as_written(tmp_path: Path) -> None:
    (tmp_path / "a,b@2").mkdir()
    assert aspects_of(str(tmp_path / "a,b@2"))[0].sources == (str(tmp_path / "a,b@2"),)
    assert [tuple(a) for a in aspects_of("runs/rm")] == [("reward", 1.0, ("runs/rm",))]
    assert [tuple(a) for a in aspects_of(("helpful=runs/a,runs/b", "https://x.org/f?n=1@-0.5", "brief=m:f@2e-1"))] == [
        ("helpful", 1.0, ("runs/a", "runs/b")),
        ("reward_2", -0.5, ("https://x.org/f?n=1",)),
        ("brief", 0.2, ("m:f",)),
    ]
    for bad, message in (
        ([], "want at least one"),
        ("a,", r"want \[NAME=\]SOURCE"),
        ("a@1.2.3", r"got the weight '1\.2\.3'"),
        (["x=a", "x=b"], "names x, x, want each once"),
    ):
        with pytest.raises(ValueError, match=message):
            aspects_of(bad)


def options(**more: Any) -> RewardOptions:
    return RewardOptions(**{"data": Path(), "reward": "", **more})


def test_several_aspects_are_weighed_and_logged_apart(tmp_path: Path) -> None:
    tokenizer, device = small_policy().tokenizer, torch.device("cpu")
    for seed in (0, 1):
        small_scalar(seed).save(tmp_path / str(seed))
    members = torch.stack([score(str(tmp_path / s)) for s in "01"])
    cfg = options(reward=(f"helpful={tmp_path / '0'},{tmp_path / '1'}@0.5", f"brief={HERE}:words@-2"))
    rewards = Rewards(cfg, tokenizer, device)
    torch.testing.assert_close(rewards(ROLLOUT, RECORDS), 0.5 * members.mean(0) - 2 * torch.tensor([1.0, 2.0]))
    assert rewards.logged == pytest.approx(
        {
            "rewards/helpful": float(members.mean()),
            "rewards/helpful_std": float(members.mean(0).std(unbiased=False)),
            "rewards/helpful_spread": float(members.std(0, unbiased=False).mean()),
            "rewards/brief": 1.5,
            "rewards/brief_std": 0.5,
        },
        rel=1e-4,
    )
    single = Rewards(options(reward=f"{HERE}:words"), tokenizer, device)
    assert single(ROLLOUT, RECORDS).tolist() == [1.0, 2.0]
    assert single.logged == {}


def test_ppo_logs_what_trades_off(tmp_path: Path) -> None:
    """And starts its value model from the first reward model among the sources."""
    small_scalar(3).save(tmp_path / "rm")
    run: dict[str, Any] = world(tmp_path) | {"reward": (f"{HERE}:words@0.1", f"kind={tmp_path / 'rm'}"), "steps": 1}
    ppo.train(ppo.PPOConfig(**run, reward_normalize=True, reward_clip=1.5, lr=1e-9, value_lr=1e-9))
    (step,) = lines(tmp_path / "out" / "metrics.jsonl")
    assert step["rewards/reward_1"] > 1
    assert step["rewards/kind_std"] > 0
    assert abs(step["objective/scores"]) < 0.1 + 1.5
    value = ppo.PPO(ppo.PPOConfig(**run)).value_model(small_policy(), [])
    assert isinstance(value, ScalarModel)
    for mine, wanted in zip(value.backbone.parameters(), small_scalar(3).backbone.parameters(), strict=True):
        assert torch.equal(mine, wanted)


def test_ensembles_are_combined_as_the_paper_says() -> None:
    members = torch.tensor([[1.0, 0.0], [3.0, 0.0], [5.0, 3.0]])
    assert combined(options(ensemble="mean"), members).tolist() == [3.0, 1.0]
    assert combined(options(ensemble="worst"), members).tolist() == [1.0, 0.0]
    found = combined(options(ensemble="penalised", ensemble_penalty=0.3), members)
    torch.testing.assert_close(found, torch.tensor([3 - 0.3 * 8 / 3, 1 - 0.3 * 2]))


SCORES, LENGTHS, CUT = (
    torch.tensor([4.0, -1.0, 2.0]),
    torch.tensor([4.0, 8.0, 10.0]),
    torch.tensor([False, False, True]),
)


@pytest.mark.parametrize(
    ("option", "wanted"),
    [
        ({}, [4.0, -1.0, 2.0]),
        ({"reward_per_token": True}, [1.0, -0.125, 0.2]),
        ({"length_coef": -0.5}, [2.0, -5.0, -3.0]),
        ({"eos_bonus": 1.0}, [5.0, 0.0, 2.0]),
        ({"overlong_tokens": 4}, [4.0, -1.5, 1.0]),
        ({"truncation": "penalise", "truncation_score": -7.0}, [4.0, -1.0, -7.0]),
        ({"truncation": "penalise"}, [4.0, -1.0, -1.0]),
        ({"reward_per_token": True, "length_coef": 1.0, "eos_bonus": 1.0}, [6.0, 8.875, 10.2]),
    ],
)
def test_shaping_by_hand(option: dict[str, Any], wanted: list[float]) -> None:
    cfg = options(**{"truncation": "keep", "max_new_tokens": 10, **option})
    torch.testing.assert_close(shaped(cfg, SCORES, LENGTHS, CUT), torch.tensor(wanted))


def test_what_a_cut_response_scores_is_known_of_reward_models_alone(tmp_path: Path) -> None:
    small_scalar().save(tmp_path / "model")
    function = f"{HERE}:words"
    for reward, given, wanted in (
        (str(tmp_path), None, -2.0), (f"a={tmp_path},{tmp_path}@0.5", None, -2.0), (str(tmp_path), -1.0, -1.0),
        (function, None, None), (("a=" + str(tmp_path), "b=" + function), None, None), (function, 0.5, 0.5),
    ):  # fmt: skip
        assert truncation_score(options(reward=reward, truncation_score=given)) == wanted


def test_an_aspect_stays_in_its_range() -> None:
    assert ranged(options(reward_clip=1.5), SCORES).tolist() == [1.5, -1.0, 1.5]
    white = ranged(options(reward_normalize=True), SCORES)
    torch.testing.assert_close(white, (SCORES - SCORES.mean()) / SCORES.std(unbiased=False), rtol=1e-4, atol=1e-5)
    assert ranged(options(reward_normalize=True), torch.full((4,), 7.3)).tolist() == [0.0] * 4
    for bad, message in (
        ({"reward_clip": 0.0}, "reward_clip: got 0.0"),
        ({"overlong_tokens": 65, "max_new_tokens": 64}, "overlong_tokens: got 65, want 0 to max_new_tokens=64"),
        ({"ensemble_penalty": -1.0}, "ensemble_penalty: got -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            check(options(**bad))


Answer = Callable[[dict[str, Any]], tuple[int, str]]


@pytest.fixture
def server() -> Iterator[tuple[str, list[Answer], list[dict[str, Any]]]]:
    """An address, the answers that it will give, the last of them for good, and what it was asked."""
    answers: list[Answer] = []
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            status, body = (answers.pop(0) if len(answers) > 1 else answers[0])(asked[-1])
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}/score", answers, asked
        httpd.shutdown()
        thread.join()


def test_an_endpoint_scores(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    url, answers, asked = server
    monkeypatch.setattr("time.sleep", lambda _: None)
    good = lambda q: (200, json.dumps({"scores": [len(r) for r in q["responses"]]}))  # noqa: E731
    answers += [lambda q: (503, "busy"), lambda q: (429, "slow down"), good]
    assert score(url).tolist() == [1.0, 3.0]
    assert len(asked) == 3
    assert asked[2] == {"prompts": ["a b", "a"], "responses": ["c", "a d"], "extras": [{}, {"response": "e f"}]}
    monkeypatch.setattr(reward_http, "BATCH", 1)
    assert score(url).tolist() == [1.0, 3.0]
    assert len(asked) == 5


@pytest.mark.parametrize(
    ("status", "body", "message", "times"),
    [
        (200, "{}", r"answered \{\}, want \{\"scores\"", 1),
        (200, '{"scores": [1]}', "gave 1 scores for 2 responses, from sample 0 on: 'c'", 1),
        (200, "<html>", "did not answer in JSON", 1),
        (200, '{"scores": [1, null]}', "gave None to the response 'a d'", 1),
        (404, "nothing here", "status 404: nothing here", 1),
        (500, "crash", "status 500: crash", 4),
    ],
)
def test_an_endpoint_that_fails_is_explained(
    status: int, body: str, message: str, times: int, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, answers, asked = server
    monkeypatch.setattr("time.sleep", lambda _: None)
    answers.append(lambda q: (status, body))
    with pytest.raises(ValueError, match=message):
        score(url)
    assert len(asked) == times


def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    with pytest.raises(ValueError, match="did not answer"):
        score("http://127.0.0.1:9/score")


def test_scores_of_a_model_are_those_of_the_text(tmp_path: Path) -> None:
    small_scalar().save(tmp_path / "model")
    with torch.no_grad():
        torch.testing.assert_close(score(str(tmp_path)), small_scalar().scores(pack(ROLLOUT.samples)))
