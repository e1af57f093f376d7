"""An audit of a whole federation: what it finds follows the protections, and what is finished is not done again."""

import json
import stat
from dataclasses import replace

import pytest

import foedus as fd
from foedus.audit.parts import Effort
from foedus.audit.words import Level
from foedus.errors import CheckpointError, ConfigurationError

from .problems import federation

QUICK = Effort(canaries=12, sizes=(1,), steps=150, examples=60, progress=False)


def level(found, who):
    return next(place.level for place in found.places if who in place.who)


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    """Without protection, with noise of the server's, and with noise of the clients'."""
    rules = {
        "bare": fd.mean(),
        "central": fd.privacy.central(clip=0.3, noise_multiplier=20.0, cohort=6),
        "local": fd.chain(fd.privacy.local(clip=0.3, noise_multiplier=20.0), fd.mean()),
        "masked": fd.chain(fd.clip(0.5), fd.masked(fd.Withstand(clients=6, corrupt=0.0, dropouts=0.3), least=4)),
    }
    found = {}
    for name, rule in rules.items():
        effort = replace(QUICK, folder=tmp_path_factory.mktemp(name) / "audit")
        found[name] = fd.audit(federation(aggregator=rule), effort=effort)
    return found


@pytest.mark.slow
def test_without_protection_much_can_be_learnt(audited):
    bare = audited["bare"]
    assert [level(bare, who) for who in ("server", "client", "holds")] == [Level.MUCH] * 3
    assert bare.findings["inversion"]["trials"][0]["recovered"] == 1
    assert bare.findings["canaries"]["every model"]["least"] > 8
    assert bare.findings["canaries"]["rerun"] is True
    assert "secure aggregation" in bare.advice[0]
    assert any("central(" in text for text in bare.advice)


@pytest.mark.slow
def test_noise_of_the_servers_protects_against_clients_and_not_against_the_server(audited):
    central = audited["central"]
    assert level(central, "server") is Level.MUCH
    assert level(central, "client") is Level.LITTLE
    assert central.protections.claimed is not None
    assert central.findings["canaries"]["every model"]["least"] < central.protections.claimed
    assert not any("central(" in text for text in central.advice)
    assert "hides nothing from it" in central.text


@pytest.mark.slow
def test_what_an_audit_writes_is_for_its_owner_alone(audited):
    """It holds examples of a client."""
    for found in audited.values():
        assert stat.S_IMODE(found.folder.stat().st_mode) == 0o700


@pytest.mark.slow
def test_noise_of_the_clients_protects_against_the_server_too(audited):
    local = audited["local"]
    seen = local.findings["canaries"]["messages"]
    assert seen["sent"] == seen["looked at"] == local.protections.rounds
    assert f"of all {seen['sent']} updates of one client" in local.text
    assert level(local, "server") is Level.LITTLE
    assert local.findings["inversion"]["trials"][0]["recovered"] == 0
    assert local.protections.local


@pytest.mark.slow
def test_masks_protect_against_the_server_and_not_against_clients(audited):
    masked = audited["masked"]
    assert masked.protections.hidden
    assert level(masked, "server") is level(masked, "client") is Level.MUCH, "it has every model, too"
    assert "But it has the model of every round" in masked.text
    assert any("gaussian_shares(" in text and "before the masks" in text for text in masked.advice)
    assert not any("central(" in text for text in masked.advice), "which would take the masks away"
    assert "message" not in masked.findings["canaries"]  # the server never sees one
    assert "sums over a cohort only" in masked.text
    assert not any("by secure aggregation" in text for text in masked.advice)


@pytest.mark.slow
def test_encryption_leaves_sums_to_clients_and_nothing_to_the_server(tmp_path):
    pytest.importorskip("tenseal")
    rule = fd.chain(fd.clip(0.5), fd.encrypted(6, key=fd.silo_key()))
    found = fd.audit(federation(aggregator=rule), effort=replace(QUICK, steps=20, folder=tmp_path / "audit"))
    assert level(found, "server") is level(found, "client") is Level.MUCH, "it makes models of the sums"
    assert any("gaussian_shares(" in text and "in place of encryption" in text for text in found.advice)
    assert found.protections.sealed
    assert found.protections.bound == pytest.approx(0.5, rel=0.05)
    assert found.findings["inversion"]["trials"][0]["clients"] == 6
    assert "encrypted updates" in found.text


@pytest.mark.slow
def test_the_report_is_there_and_whole(audited):
    folder = audited["bare"].folder
    page = (folder / "report.html").read_text("utf-8")
    assert page.count("data:image/png;base64,") == 3
    assert (folder / "report.md").read_text("utf-8") == audited["bare"].text
    assert "do not pass them on" in page
    assert "made once more with 12" in audited["bare"].text


@pytest.mark.slow
def test_what_is_finished_is_not_done_again(audited, monkeypatch):
    from foedus.audit import examine

    def never(ground):
        raise AssertionError("done again")

    folder = audited["bare"].folder
    parts = {name: part._replace(attack=never) for name, part in examine.PARTS.items()}
    monkeypatch.setattr(examine, "PARTS", parts)
    again = fd.audit(federation(), effort=replace(QUICK, folder=folder))
    assert again.text == audited["bare"].text
    with pytest.raises(AssertionError, match="done again"):  # but what depends on another effort is
        fd.audit(federation(), effort=replace(QUICK, folder=folder, canaries=13))
    fewer = fd.audit(federation(), effort=replace(QUICK, folder=folder, canaries=0))
    assert set(fewer.findings) == {"membership", "inversion"}
    assert fewer.figures == ("figures/inversion.png", "figures/membership.png")


@pytest.mark.slow
def test_the_folder_of_another_audit_is_refused_and_so_is_a_damaged_one(audited, tmp_path):
    folder = audited["local"].folder
    with pytest.raises(CheckpointError, match="another run"):
        fd.audit(federation(), effort=replace(QUICK, folder=folder), run=audited["bare"].folder / "run")
    damaged = tmp_path / "audit"
    damaged.mkdir()
    (damaged / "audit.json").write_text(json.dumps(["nothing"]))
    with pytest.raises(CheckpointError, match="damaged"):
        fd.audit(federation(), effort=replace(QUICK, folder=damaged), run=audited["bare"].folder / "run")


@pytest.mark.slow
def test_canaries_that_entered_before_need_no_second_run(tmp_path):
    from foedus.backends import open_trainer

    plain = federation()
    layout = open_trainer(plain.task, seed=0).layout
    entered = fd.audit.with_canaries(plain, layout, count=10)
    entered = replace(entered, settings=replace(entered.settings, folder=tmp_path / "run"))
    found = fd.audit(entered, effort=replace(QUICK, sizes=()))
    assert found.folder == tmp_path / "run" / "audit"
    assert found.findings["canaries"]["rerun"] is False
    assert found.findings["canaries"]["final model"]["canaries"] == 10
    assert "inversion" not in found.findings
    assert "which was not repeated" in found.text


@pytest.mark.slow
def test_what_cannot_be_done_is_told_and_the_rest_is_done(tmp_path):
    from foedus.core.linear import logistic

    plain = federation()
    flat = plain.clients.map(lambda e: fd.Examples((e.inputs[0].reshape(len(e), -1),), e.targets)).with_test(None)
    other = replace(plain, task=fd.Task(logistic(64, 3)), clients=flat)
    found = fd.audit(other, effort=replace(QUICK, folder=tmp_path / "audit"))
    assert "torch models" in found.findings["inversion"]["failed"]
    assert "test part" in found.findings["membership"]["failed"]
    assert found.findings["canaries"]["every model"]["least"] > 2  # canaries have 195 dimensions only
    assert "was not tried" in found.text


def test_what_is_no_federation_is_refused():
    with pytest.raises(ConfigurationError, match=r"foedus\.Federation"):
        fd.audit("federation.py")
    with pytest.raises(ConfigurationError, match="canaries"):
        Effort(canaries=1)


@pytest.mark.slow
def test_the_run_of_another_algorithm_is_refused(audited, tmp_path):
    with pytest.raises(ConfigurationError, match="is a run of"):
        fd.audit(
            federation(aggregator=fd.median()), run=audited["bare"].folder / "run",
            effort=replace(QUICK, folder=tmp_path / "audit"),
        )  # fmt: skip
