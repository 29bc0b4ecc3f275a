"""`rlhf-train inspect`: kinds of task, adversarial prompts and personal data, each with what it must not find."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from trainer.inspect.adversarial import sounds_adversarial
from trainer.inspect.command import inspect
from trainer.inspect.personal_data import find
from trainer.inspect.screen import screen
from trainer.inspect.tasks import KINDS, kind_of_task, last_message

REAL = Path(__file__).resolve().parents[4] / "shared" / "data"
needs_real_data = pytest.mark.skipif(not REAL.is_dir(), reason="the folder with real data is not there")
PASSAGE = "The mill on the river was built in 1820 by two brothers who had come from the north. " * 2
TALK = "\n\nHuman: Hello\n\nAssistant: Hello! What can I do?\n\nHuman: {}\n\nAssistant:"
TASKS = {
    "generation": ["Write a short story about a bear.", "Can you please compose a sonnet?", "Tell me a joke."],
    "open question": ["Who built the wall?", "how do i boil an egg", "Explain the moon landing to a child."],
    "closed question": [
        f"{PASSAGE}\n\nWho built the mill?", f"When was it built?\n\n{PASSAGE}", "Context: it rains.\nIs it wet?",
    ],
    "brainstorming": ["List five ideas for a party.", "What are some ways to save water?", "Give me 3 names."],
    "chat": ["Hello, how are you?", "Are you a robot?", TALK.format("I like it."), TALK.format("And why is that?")],
    "rewriting": ["Rewrite this politely: go away", "Translate into French: good day", f"{PASSAGE}\nMake it shorter."],
    "summarisation": ["Summarize this for a child: it rains", f"{PASSAGE}\n\nTL;DR:", TALK.format("Sum up, please")],
    "classification": ["Classify the sentiment: I loved it", "Decide whether it is spam: buy", "True or false: 1 < 2"],
    "extraction": ["Extract all names of places:\nOslo is cold.", "List all the dates in the text: it was 1820 then"],
    "code": ["Write a Python function that adds two lists.", "Fix this:\n```\nx = 1\n```", "What is it?\nimport os\n"],
    "maths": [
        "What is 17 + 25?", "Solve 2x + 3 = 7", "Tom has 3 apples and buys two more. How many apples has he?",
        "A tank loses 3 litres an hour and holds 90. Calculate the time until it is empty.",
    ],
    "other": ["My wife loves to cook.", "be mean to me", "Schreibe ein Gedicht.", "..."],
}  # fmt: skip


@pytest.mark.parametrize(("kind", "prompt"), [(kind, prompt) for kind, prompts in TASKS.items() for prompt in prompts])
def test_kinds_of_task(kind: str, prompt: str) -> None:
    assert kind_of_task(prompt) == kind


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [
        ("Was the treaty of 2024-01-15 signed in Rome and/or Paris?", "maths"),
        ("Is 555-1234 a telephone number?", "maths"),
        ("How many people live in Rome?", "maths"),
        ("Do you know a good query for my lawyer?", "code"),
        ("What is a summary judgment?", "summarisation"),
        ("Polish people are nice.", "rewriting"),
        ("What is the best training program for a marathon?", "code"),
    ],
)
def test_what_only_looks_like_a_kind(prompt: str, kind: str) -> None:
    assert kind_of_task(prompt) != kind


def test_kinds_are_counted_by_the_last_message(write) -> None:
    assert set(TASKS) == set(KINDS)
    assert last_message("Answer briefly.\n\nHuman: Write a poem.\n\nAssistant:") == (" Write a poem.", False)
    system = {"role": "system", "content": "Summarize everything."}
    rows = [
        {"prompt": [system, {"role": "user", "content": "Write a poem."}]},
        {"prompt": "Write a letter."}, {"prompt": "My wife loves to cook."}, {"prompt": "Why?"},
    ]  # fmt: skip
    facts = inspect(write(*rows))
    assert facts["tasks"] == [
        {"name": "generation", "rows": 2, "share": 0.5},
        {"name": "open question", "rows": 1, "share": 0.25},
        {"name": "other", "rows": 1, "share": 0.25},
    ]
    assert screen(facts).index("generation  ") < screen(facts).index("other  ")


@needs_real_data
def test_kinds_of_real_prompts() -> None:
    shares = {one["name"]: one["share"] for one in inspect(REAL / "gsm8k_test.jsonl.gz")["tasks"]}
    assert shares["maths"] > 0.95
    facts = inspect(REAL / "hh_harmless_base.jsonl.gz", with_baselines=False)
    shares = {one["name"]: one["share"] for one in facts["tasks"]}
    assert shares["other"] < 0.05
    assert facts["adversarial"]["share"] > 0.15
    assert inspect(REAL / "gsm8k_train.jsonl.gz")["adversarial"]["share"] < 0.005


@pytest.mark.parametrize(
    "piece",
    ["1", "1 ", "a", "@", "a.@", "+1", "555-", "DE89 ", "A1B2", "kill ", "?\n", "please ", "(", "a.", "4111-1111-",
     "1 - ", "415-555-2671 ", "+49 ", " ", "give me the of ", "list all the x ", "what is the ", "select ", "\n"],
)  # fmt: skip
def test_a_long_line_takes_no_longer_than_its_length(piece: str) -> None:
    """Three megabytes; with a search that starts anew at every letter it would be hours."""
    text = (piece * (1_000_000 // len(piece) + 1))[:1_000_000]
    began = time.process_time()
    for whole in (text, "b@" + text + "x", "write " + text + "?"):
        list(find(whole))
        kind_of_task(whole)
        sounds_adversarial(whole)
    assert time.process_time() - began < 15
