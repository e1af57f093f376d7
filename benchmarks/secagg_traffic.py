"""The bytes of one client's messages in a masked sum beside the published formula, at the sizes that it is published
for: all with all.

    python benchmarks/secagg_traffic.py                      # 2¹⁰ clients, 2²⁰ entries: some seconds
    python benchmarks/secagg_traffic.py --clients 16384 --entries 16777216      # three minutes

The messages are real: one client's own keys, shares, masked numbers and answer, made by its state machine. It is told
what a server would tell it: everybody's public keys, everybody's parcel for it, sealed under the key that the two agree
on, and that all survived. Of the others there is no more than their keys: what is in the parcels is of the size of two
shares, but was not dealt.
"""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

import numpy as np

from foedus.protocol.secagg import client as clients
from foedus.protocol.secagg import messages
from foedus.secure import primitives, traffic
from foedus.secure.fixed_point import width
from foedus.secure.graph import Withstand
from foedus.secure.planes import word
from foedus.secure.primitives import KEY, Agreement, derived, public_key, sealed

SLOT = 1  # of the client; one mate's mask is taken off, all others' are put on
MODEL = bytes(32)


def measured(count: int, entries: int) -> dict[str, Any]:
    """Bytes of one client among so many, sent and received, by message, and what the formula gives.

    Args:
        count: how many clients there are; all mask with all.
        entries: numbers of 16 bits in an update.
    """
    bits = width(count, 16, 1)
    share = 0.5 - 1 / count
    withstand = Withstand(clients=count, corrupt=share, dropouts=share)  # so much that all mask with all
    promise = messages.Promise(withstand, 2, (messages.Channel("update", entries, bits),))
    terms = messages.terms_for(
        promise, session=bytes(16), round=1, attempt=1, model=MODEL, graph=bytes(32), clients=count
    )  # fmt: skip
    assert terms.degree == count - 1
    said = _conversation(terms, promise, entries, bits)
    found = {name: messages.message_size(message) for name, message in said.items()} | {"terms": traffic.TERMS}
    formula, total, plain = traffic.published(count, entries, bits), sum(found.values()), 2 * entries
    return {
        "clients": count, "entries": entries, "bits": bits, "bytes": found, "total": total,
        "tags": 2 * (count - 1) * primitives.TAG, "times plain": round(total / plain, 4),
        "formula times plain": round(formula / plain, 4), "over the formula": round(total / formula, 5),
    }  # fmt: skip


def _conversation(terms: messages.Terms, promise: messages.Promise, entries: int, bits: int) -> dict[str, Any]:
    """All messages of one client, by name."""
    client, (_, keys) = clients.begin(terms, clients.Own(SLOT, promise, os.urandom(KEY), MODEL))
    others = [slot for slot in range(terms.clients) if slot != SLOT]
    secrets = {slot: (os.urandom(KEY), os.urandom(KEY)) for slot in others}
    rows = b"".join(public_key(mask) + public_key(share) for mask, share in secrets.values())
    public = np.frombuffer(rows, np.uint8).reshape(-1, 2 * KEY)
    everybody = messages.bits(np.ones(terms.clients, bool))
    mates = messages.bits(np.arange(terms.clients) != SLOT)
    roster = messages.Roster(mates, public, np.zeros((len(others), 0), np.uint8))
    client, (parcels,) = clients.step(client, roster)
    delivery = messages.Delivery(mates, _sealed_for(keys.message.share, terms.binding, secrets))
    client, _ = clients.step(client, delivery)
    assert not client.unopened
    numbers = np.random.default_rng(0).integers(0, 2**16, entries, np.uint32).astype(word(bits))
    client, (masked,) = clients.step(client, clients.Numbers((numbers,)))
    survivors = messages.Survivors(everybody, terms.clients)
    _, (_, shares) = clients.step(client, survivors)
    up = {"keys": keys, "parcels": parcels, "numbers": masked, "answer": shares}
    down = {"roster": roster, "delivery": delivery, "survivors": survivors}
    return {name: action.message for name, action in up.items()} | down


def _sealed_for(public: bytes, binding: bytes, secrets: dict[int, tuple[bytes, bytes]]) -> Any:
    """What every other client seals for this one: uint8 [mate, 80]."""
    rows = []
    for slot, (_, share) in secrets.items():
        context = messages.about(binding, "share", slot, SLOT)
        rows.append(sealed(derived(Agreement(share).secret(public), context), os.urandom(2 * KEY), context))
    return np.frombuffer(b"".join(rows), np.uint8).reshape(len(secrets), -1)


def main() -> None:
    given = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    given.add_argument("--clients", type=int, default=2**10)
    given.add_argument("--entries", type=int, default=2**20)
    asked = given.parse_args()
    print(json.dumps(measured(asked.clients, asked.entries), indent=1))


if __name__ == "__main__":
    main()
