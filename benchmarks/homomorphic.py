"""What encrypted sums cost: time, bytes and error of each step, beside TenSEAL as it is usually called.

    python benchmarks/homomorphic.py                   # one size, half a minute
    python benchmarks/homomorphic.py --sizes 199210,1663370 --json out.json
    python benchmarks/homomorphic.py --docs            # also put the table into docs/howto/encrypted-sums.md

One core. *Encrypt* is a silo's ``encode``; *check* what a server does with a message when it arrives (``admit``: parse
every ciphertext, and write it anew); *add* what it does to add it to the sum (``merge``: parse, add, write);
*decrypt* is ``decode``. TenSEAL's rows call ``ckks_vector`` on the floats with a public key, as its tutorials do, and
count what it takes to write ciphertexts and to read them, as ours do; published figures count neither in *add*. Masked
sums, which need no common key, stand beside them. Best of several tries.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import foedus as fd
from foedus.core.aggregate import message_bytes
from foedus.core.values import SERVER, Context, Update

SILOS = 10
PAGE = Path(__file__).resolve().parent.parent / "docs" / "howto" / "encrypted-sums.md"
SETTINGS = {"TenSEAL, N=8192 [60, 40, 60]": (8192, (60, 40, 60), 40), "TenSEAL, N=4096 [54, 54]": (4096, (54, 54), 30)}
HEADER = ("", "encrypt ms", "check ms", "add ms", "decrypt ms", "MB sent", "of float32", "largest error")
Figures = dict[str, Any]


def best(action: Callable[[], Any], tries: int = 15) -> float:
    """The shortest of some runs, in milliseconds."""
    found = []
    for _ in range(tries):
        begin = time.perf_counter()
        action()
        found.append(time.perf_counter() - begin)
    return 1e3 * min(found)


def ours(name: str, rule: Any, size: int) -> Figures:
    """Every step of an aggregator, with ten silos of whom three are really added up."""
    rng = np.random.default_rng(0)
    vectors = [np.clip(rng.normal(size=size) / 4, -1, 1) for _ in range(3)]
    contexts = [Context(0, 1, i, size=size) for i in range(3)]
    sent = [rule.encode(Update(v, 1.0), c) for v, c in zip(vectors, contexts, strict=True)]
    admitted = [rule.admit(m, c) for m, c in zip(sent, contexts, strict=True)]
    copies = [{n: a.copy() for n, a in m.items()} for m in admitted]
    total = rule.merge(rule.merge(*copies[:2]), copies[2])
    server = Context(0, 1, SERVER, size=size)
    mean = rule.decode({}, total, server)[0]
    return {
        "name": name,
        "encrypt": best(lambda: rule.encode(Update(vectors[0], 1.0), contexts[0])),
        "check": best(lambda: rule.admit(sent[0], contexts[0])),
        "add": best(lambda: rule.merge({n: a.copy() for n, a in admitted[0].items()}, admitted[1])),
        "decrypt": best(lambda: rule.decode({}, total, server)),
        "bytes": message_bytes(sent[0]),
        "error": float(np.abs(mean - np.mean(vectors, 0)).max()),
    }


def usual(name: str, size: int) -> Figures:
    """TenSEAL on floats, a public key, everything written and read."""
    import tenseal

    degree, modulus, scale = SETTINGS[name]
    secret = tenseal.context(tenseal.SCHEME_TYPE.CKKS, degree, coeff_mod_bit_sizes=list(modulus), n_threads=1)
    secret.global_scale = 2.0**scale
    values = np.zeros((-(-size // (degree // 2)), degree // 2))
    values.reshape(-1)[:size] = np.clip(np.random.default_rng(0).normal(size=size) / 4, -1, 1)
    encrypt = lambda: [tenseal.ckks_vector(secret, row).serialize() for row in values]  # noqa: E731
    read = lambda sent: [tenseal.ckks_vector_from(secret, raw) for raw in sent]  # noqa: E731
    sent = encrypt()
    add = lambda: [(a + b).serialize() for a, b in zip(read(sent), read(sent), strict=True)]  # noqa: E731
    total = add()
    decrypt = lambda: np.array([v.decrypt() for v in read(total)])  # noqa: E731
    return {
        "name": name,
        "encrypt": best(encrypt),
        "check": None,
        "add": best(add),
        "decrypt": best(decrypt),
        "bytes": sum(map(len, sent)),
        "error": float(np.abs(decrypt() - 2 * values).max()),
    }


def measured(size: int) -> list[Figures]:
    withstand = fd.Withstand(clients=SILOS, corrupt=0.1, dropouts=0.1)
    rows = [ours(f"encrypted({SILOS}), 20 bits", fd.encrypted(SILOS, key=fd.silo_key(), least=3), size)]
    rows += [ours(f"encrypted({SILOS}), 24 bits", fd.encrypted(SILOS, key=fd.silo_key(), bits=24, least=3), size)]
    rows += [usual(name, size) for name in SETTINGS]
    return [*rows, ours("masked, 20 bits (masks not counted)", fd.masked(withstand, bits=20, least=3), size)]


def lines(size: int, rows: list[Figures]) -> list[str]:
    table = [list(HEADER), ["---", *["---:"] * (len(HEADER) - 1)]]
    for row in rows:
        times = ["–" if row[n] is None else f"{row[n]:.1f}" for n in ("encrypt", "check", "add", "decrypt")]
        table.append(
            [row["name"], *times, f"{row['bytes'] / 1e6:.2f}", f"{row['bytes'] / size / 4:.1f}×", f"{row['error']:.1e}"]
        )
    return ["| " + " | ".join(cells) + " |" for cells in table]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="199210")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--docs", action="store_true", help="put the first table into the page")
    options = parser.parse_args()
    found = {}
    for size in map(int, options.sizes.split(",")):
        found[size] = measured(size)
        print(f"\n{size:,} parameters, {4 * size / 1e6:.2f} MB of float32\n")
        print("\n".join(lines(size, found[size])), flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    if options.docs:
        size = next(iter(found))
        before, mark, rest = PAGE.read_text("utf-8").partition("<!-- homomorphic -->\n")
        after = rest.partition("<!-- end -->")
        PAGE.write_text(f"{before}{mark}\n{chr(10).join(lines(size, found[size]))}\n\n{after[1]}{after[2]}", "utf-8")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
