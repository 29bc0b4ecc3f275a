"""Personal data, and what must not be taken for it; it is counted and not shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.trainer.inspect.test_tasks import needs_real_data
from trainer.cli import program as cli
from trainer.inspect.command import inspect
from trainer.inspect.personal_data import CARD, IBAN, MAIL, PHONE, SSN, find, masked

REAL = Path(__file__).resolve().parents[4] / "shared" / "data"

PERSONAL = [
    ("Write to jane.doe@mail.net.", MAIL, "jane.doe@mail.net"),
    ("<jane+news@sub.mail.co.uk>", MAIL, "jane+news@sub.mail.co.uk"),
    ("mailto:j_d@uni-bonn.de?subject=x", MAIL, "j_d@uni-bonn.de"),
    ("call (415) 555-2671 now", PHONE, "(415) 555-2671"),
    ("a,415-555-2671,b", PHONE, "415-555-2671"),
    ("- 415.555.2671", PHONE, "415.555.2671"),
    ("fax 1-415-555-2671", PHONE, "1-415-555-2671"),
    ("<p>+1 415-555-2671</p>", PHONE, "+1 415-555-2671"),
    ("+49 30 901820 is Berlin", PHONE, "+49 30 901820"),
    ("+4915112345678", PHONE, "+4915112345678"),
    ("Tel.: 030 9018 2345", PHONE, "030 9018 2345"),
    ("my phone number is 415 555 2671", PHONE, "415 555 2671"),
    ("card 4111 1111 1111 1111, 12/27", CARD, "4111 1111 1111 1111"),
    ("5500-0000-0000-0004", CARD, "5500-0000-0000-0004"),
    ("amex 378282246310005.", CARD, "378282246310005"),
    ("DE89 3704 0044 0532 0130 00", IBAN, "DE89 3704 0044 0532 0130 00"),
    ("to GB82WEST12345698765432 please", IBAN, "GB82WEST12345698765432"),
    ("SSN: 219-09-9999", SSN, "219-09-9999"),
]


@pytest.mark.parametrize(("text", "kind", "wording"), PERSONAL)
def test_personal_data_is_found(text: str, kind: str, wording: str) -> None:
    assert list(find(text)) == [(kind, wording)]


@pytest.mark.parametrize(
    "text",
    [
        "pi is 3.14159265358979", "1234567890123", "2024-01-15", "2024-01-15 10:30:00.123456", "01/15/2024 - 02/20/24",
        "call 555-1234", "call (415) 555-0123", "version 1.2.3.4567.89012", "10.0.0.1 192.168.100.200", "1705312800000",
        "$1,234,567,890.00", "+1234567", "x+4915112345678", "2 + 4915112345678 = 4915112345680",
        "the years 1999 2001 2024",
        "415-555-2671 = -2811", "<<415-555-2671=-2811>>", "200 300 4000", "id 8f14e45fceea167a5a36dedd4bea2543",
        "550e8400-e29b-41d4-a716-446655440000", "978-3-16-148410-0", "4111 1111 1111 1112", "9999 9999 9999 9995",
        "4111111111111111.5", "DE89 3704 0044 0532 0130 01", "XX89370400440532013000",
        "000-12-3456", "666-12-3456", "900-12-3456", "123-00-4567", "123-45-0000", "219-09-99999", "030 9018 2345",
        "jane@example.com", "jane@mail.example.org", "a@b.test", "a@host.invalid", "user@localhost", "@property",
        "a @ b.net", "git@github.com:owner/name.git", "https://u:secret@host.net/x", "logo@2x.png", "torch@2.1.0",
        "+0200 is a zone",
        "There are 16 - 3 - 4 = <<16-3-4=9>>9 eggs; 9 * 2 = $<<9*2=18>>18 every day.\n#### 18",
    ],
)  # fmt: skip
def test_what_is_no_personal_data(text: str) -> None:
    assert list(find(text)) == []


def test_personal_data_is_told_and_not_shown(write, tmp_path, capsys) -> None:
    rows: list[dict[str, object]] = [{"prompt": f"p{i}", "chosen": "b", "rejected": "a"} for i in range(9)]
    for i in range(1, 8):
        rows[i]["prompt"] = f"{i}: write to jane@mail{i}.net or john@mail{i}.net"
    rows[3]["rejected"] = "My card is 4111 1111 1111 1111."
    assert cli.main(["inspect", str(write(*rows)), "--no-baselines", "--json", str(tmp_path / "f.json")]) == 0
    shown, text = capsys.readouterr().out, (tmp_path / "f.json").read_text()
    assert json.loads(text)["personal"] == {
        MAIL: {
            "prompts": {"found": 14, "first_lines": [2, 3, 4, 5, 6]}, "replies": {"found": 0, "first_lines": []},
            "examples": ["j***@m***.net"],
        },
        CARD: {
            "prompts": {"found": 0, "first_lines": []}, "replies": {"found": 1, "first_lines": [4]},
            "examples": ["**** **** **** **11"],
        },
    }  # fmt: skip
    assert "2, 3, 4, 5, 6" in shown
    assert "Personal data: 14 mail addresses, 1 payment cards." in " ".join(shown.split())
    for secret in ("jane", "john", "mail1", "4111"):
        assert secret not in shown + text
    assert max(map(len, shown.splitlines())) <= 80
    for wording, kind in ((wording, kind) for _, kind, wording in PERSONAL):
        assert sum(c.isalnum() for c in masked(kind, wording)) <= (6 if kind == MAIL else 2)


@needs_real_data
def test_sums_are_no_personal_data() -> None:
    for name in ("gsm8k_train", "gsm8k_ranked"):
        assert inspect(REAL / f"{name}.jsonl.gz", with_baselines=False)["personal"] == {}
