"""What lies at a server under real masks and encryption: an upload that says nothing, and the sum."""

import numpy as np
import pytest

import foedus as fd
from foedus.audit.seen import Victim, look, passed
from foedus.audit.uploads import _Cohort, intercept
from foedus.backends import open_trainer
from foedus.errors import ConfigurationError, SecureAggregationFailed
from foedus.secure.homomorphic import forced

from .problems import flat, pictures, start, task

OTHERS = [pictures(4, seed=i) for i in (1, 2, 3)]
MASKED = fd.chain(fd.clip(1.0), fd.masked(fd.Withstand(clients=4, corrupt=0.0), bits=20))


def victim(round: int = 1) -> Victim:
    spec = fd.local_sgd(0.1, batch_size=None)
    return Victim(task=task(flat), before=start(flat), spec=spec, examples=pictures(4), round=round)


def encrypted():
    pytest.importorskip("tenseal")
    return fd.chain(fd.clip(1.0), fd.encrypted(4, key=fd.silo_key()))


def likeness(a, b) -> float:
    return abs(float(a @ b) / float(np.linalg.norm(a) * np.linalg.norm(b)))


@pytest.mark.parametrize("rule", [lambda: MASKED, encrypted], ids=["masked", "encrypted"])
def test_an_upload_is_nothing_like_the_update_and_the_sum_is_the_sum(rule):
    rule = rule()
    own, sums = look(victim()).update, look(victim(), others=OTHERS).update
    held = intercept(victim(), OTHERS, through=rule)
    assert likeness(held.upload.update, own) < 0.1  # 2,211 entries: by chance 0.02
    assert held.total is not None
    assert held.total.update == pytest.approx(sums, abs=1e-5)
    assert held.total.examples == 16
    assert held.upload.examples == 4


def test_numbers_without_a_mask_would_be_seen():
    """The same reading of what is under the mask finds the update: it is the mask that hides it."""
    trainer = open_trainer(task(flat), seed=0)
    cohort = _Cohort(victim(), tuple(OTHERS), MASKED, trainer)
    own = look(victim()).update
    bare = passed(MASKED, own, cohort._context(), weight=4)["sum"]
    assert likeness(cohort._read(bare, None).update, own) > 0.99


def test_masks_are_fresh_so_that_two_uploads_of_the_same_round_differ():
    first, second = (intercept(victim(), OTHERS, through=MASKED).upload.update for _ in range(2))
    assert likeness(first, second) < 0.1


def test_encrypted_alone_nothing_is_opened():
    held = intercept(victim(), through=encrypted())
    assert held.total is None
    assert np.isfinite(held.upload.update).all()


def test_what_hides_nothing_and_what_cannot_be_read_entry_by_entry_is_refused():
    with pytest.raises(ConfigurationError, match=r"look\(victim"):
        intercept(victim(), OTHERS, through=fd.mean())
    few = fd.chain(fd.random_mask(0.1), fd.masked(fd.Withstand(clients=4, corrupt=0.0)))
    with pytest.raises(ConfigurationError, match="entry by entry"):
        intercept(victim(), OTHERS, through=few)
    with pytest.raises(SecureAggregationFailed):
        intercept(victim(), OTHERS[:2], through=fd.masked(fd.Withstand(clients=8, corrupt=0.0), least=4))


def test_the_silos_own_key_reads_every_entry_where_an_attacker_looks():
    pytest.importorskip("tenseal")
    key = fd.silo_key()
    rule = fd.encrypted(4, key=key)
    trainer = open_trainer(task(flat), seed=0)
    cohort = _Cohort(victim(), (), rule, trainer)
    own = look(victim()).update
    sent = passed(rule, own, cohort._context(), weight=4)
    assert likeness(cohort._read(forced(sent, key, silos=4), None).update, own) > 0.99
