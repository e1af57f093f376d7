"""Tasks: filed unseen by the importer, decided by hand, shown with what changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from foedus.cli import run
from foedus.errors import BundleRefused, ConfigurationError
from foedus.net.bundle import Bundle
from foedus.net.owner.approvals import Approvals, Decision

URL = "https://a.example"


def bundle(lr: float, extra: str = "") -> Bundle:
    return Bundle.of({"task.py": f"lr = {lr}\n{extra}".encode()})


def filed(approvals: Approvals, what: Bundle, when: float = 0.0) -> str:
    return approvals.file(what.content, what.digest, target="task:federation", server=URL, when=when).digest


def test_a_task_waits_until_it_is_decided_and_may_be_decided_anew(tmp_path: Path) -> None:
    approvals, what = Approvals(tmp_path), bundle(0.1)
    digest = filed(approvals, what)
    assert not approvals.approved(what.digest)
    assert not approvals.denied(what.digest)
    approvals.decide(digest[:16], Decision.APPROVED, who="Dr Weiss", when=1.0)
    assert Approvals(tmp_path).approved(what.digest)
    filed(approvals, what)  # it came again
    assert approvals.approved(what.digest)
    approvals.decide(digest, Decision.DENIED, who="Dr Weiss", when=2.0)
    assert approvals.denied(what.digest)
    assert not approvals.approved(what.digest)
    assert len(approvals.tasks()) == 1


def test_filing_imports_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "it-ran"
    what = bundle(0.1, f"open({str(mark)!r}, 'w').close()\n")
    approvals = Approvals(tmp_path)
    approvals.review(approvals.find(filed(approvals, what)))
    assert not mark.exists()


def test_what_is_shown_is_what_changed_since_the_last_approval(tmp_path: Path) -> None:
    approvals = Approvals(tmp_path)
    first, second, third = (filed(approvals, bundle(lr), lr) for lr in (0.1, 0.2, 0.3))
    assert "+lr = 0.3" in approvals.review(approvals.find(third))
    assert "-lr" not in approvals.review(approvals.find(third))
    approvals.decide(first, Decision.APPROVED, who="x", when=1.0)
    approvals.decide(second, Decision.APPROVED, who="x", when=2.0)
    shown = approvals.review(approvals.find(third))
    assert "-lr = 0.2" in shown
    assert "+lr = 0.3" in shown
    approvals.decide(second, Decision.DENIED, who="x", when=3.0)
    assert "-lr = 0.1" in approvals.review(approvals.find(third))


def test_what_is_not_the_bundle_announced_is_not_filed(tmp_path: Path) -> None:
    approvals = Approvals(tmp_path)
    with pytest.raises(BundleRefused):
        approvals.file(bundle(0.1).content, bundle(0.2).digest, target="t:f", server=URL, when=0.0)
    assert approvals.tasks() == []


def test_a_bundle_that_was_changed_on_the_disk_is_refused_and_a_fresh_one_takes_its_place(tmp_path: Path) -> None:
    approvals = Approvals(tmp_path)
    digest = filed(approvals, bundle(0.1))
    approvals.path(digest).write_bytes(bundle(0.2).content)
    with pytest.raises(BundleRefused):
        approvals.bundle(approvals.find(digest))
    filed(approvals, bundle(0.1))
    assert approvals.bundle(approvals.find(digest)).files["task.py"] == b"lr = 0.1\n"


def test_one_task_has_to_be_meant(tmp_path: Path) -> None:
    approvals = Approvals(tmp_path)
    with pytest.raises(ConfigurationError, match="no task has come yet"):
        approvals.find("aa")
    digests = [filed(approvals, bundle(i)) for i in range(20)]
    with pytest.raises(ConfigurationError, match="several tasks"):
        approvals.find("")
    assert approvals.find(digests[3].upper()).digest == digests[3]
    (tmp_path / "approvals.json").write_text("[{}]")
    with pytest.raises(ConfigurationError, match="damaged"):
        approvals.tasks()


def test_an_owner_types_list_review_approve_and_deny(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = ["--folder", str(tmp_path)]
    assert run(["tasks", "list", *folder]) == 2  # perhaps mistyped: nothing of an owner's is in it
    assert "no owner's folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    approvals = Approvals(tmp_path)
    digest = filed(approvals, bundle(0.1, "# \n"))
    assert run(["tasks", "review", digest[:16], *folder]) == 0
    shown = capsys.readouterr().out
    assert "+lr = 0.1" in shown
    assert f"foedus tasks approve {digest[:16]}" in shown
    assert run(["tasks", "approve", digest[:16], "--who", "Dr Weiss", *folder]) == 0
    assert run(["tasks", "list", *folder]) == 0
    assert "approved by Dr Weiss" in capsys.readouterr().out
    second = filed(approvals, bundle(0.5))
    assert run(["tasks", "review", second, *folder]) == 0
    assert "compared with" in capsys.readouterr().out
    assert run(["tasks", "review", second, "--whole", *folder]) == 0
    assert "-lr" not in capsys.readouterr().out
    assert run(["tasks", "deny", second, "--who", "Dr Weiss", *folder]) == 0
    assert approvals.denied(bundle(0.5).digest)
    assert run(["tasks", "deny", "ffff", *folder]) == 2
