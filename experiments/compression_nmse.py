"""What compression costs: the normalised mean squared error of every quantiser at 1 to 4 bits an entry.

    python experiments/compression_nmse.py

One update of 2^20 entries goes through a stage and back: ‖decoded − x‖² / ‖x‖², mean over draws. Entries are normal,
lognormal (all positive), or Student's t with 3 degrees of freedom. EDEN's figures have a theory that is exact for long
vectors (Vargaftik et al. 2022, arXiv 2108.08842); the others are laid beside the published ones. No data, no training.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from outcome import document, store, table

import foedus as fd
from foedus.core.quantise import eden_error
from foedus.core.values import Context, Update

SIZE = 2**20
BITS = (1, 2, 3, 4)
DRAWS = 10
# Figures to compare with: rotation with rounding between minimum and maximum, plain rounding of heavy tails, a mask.
PUBLISHED = {
    "rotate + quantise": {1: (22, 25), 2: (1.8, 2.1), 3: (0.31, 0.35), 4: (0.067, 0.076)},
    "quantise, lognormal": {1: (32, 32), 2: (9.9, 9.9), 3: (3.7, 3.7), 4: (1.4, 1.4)},
    "quantise, t(3)": {1: (6745, 6745), 2: (670, 670), 3: (50, 50), 4: (27, 27)},
    "random mask": {1: (31, 31), 2: (15, 15), 3: (9.7, 9.7), 4: (7.0, 7.0)},
}


def vectors(tails: str, draw: int) -> np.ndarray:
    """An update [SIZE] with such entries."""
    rng = np.random.default_rng((draw, len(tails)))
    if tails == "t(3)":
        return rng.standard_t(3, SIZE).astype("f4")
    if tails == "lognormal":
        return rng.lognormal(0, 1, SIZE).astype("f4")
    return rng.standard_normal(SIZE).astype("f4")


def chains(bits: int) -> dict[str, tuple[Any, str]]:
    """Row of the table -> the chain, and the entries it is tried on."""
    return {
        "eden": (fd.chain(fd.eden(bits), fd.mean()), "normal"),
        "eden, lognormal": (fd.chain(fd.eden(bits), fd.mean()), "lognormal"),
        "eden, t(3)": (fd.chain(fd.eden(bits), fd.mean()), "t(3)"),
        "eden, biased": (fd.chain(fd.eden(bits, biased=True), fd.mean()), "normal"),
        "rotate + quantise": (fd.chain(fd.rotate(), fd.quantise(bits), fd.mean()), "normal"),
        "rotate + quantise, lognormal": (fd.chain(fd.rotate(), fd.quantise(bits), fd.mean()), "lognormal"),
        "rotate + quantise, t(3)": (fd.chain(fd.rotate(), fd.quantise(bits), fd.mean()), "t(3)"),
        "quantise": (fd.chain(fd.quantise(bits), fd.mean()), "normal"),
        "quantise, lognormal": (fd.chain(fd.quantise(bits), fd.mean()), "lognormal"),
        "quantise, t(3)": (fd.chain(fd.quantise(bits), fd.mean()), "t(3)"),
        "random mask": (fd.chain(fd.random_mask(bits / 32), fd.mean()), "normal"),
        "random mask, not scaled": (fd.chain(fd.random_mask(bits / 32, unbiased=False), fd.mean()), "normal"),
        "top-k, not scaled": (fd.chain(fd.top_k(bits / 40), fd.mean()), "normal"),
    }


def error(rule: Any, vector: np.ndarray, draw: int) -> tuple[float, float]:
    """‖decoded − x‖² / ‖x‖², and bits an entry on the wire."""
    context = Context(draw, 1, 0, size=SIZE)
    message = rule.encode(Update(vector, 1.0), context)
    bits = 8 * sum(array.nbytes for name, array in message.items() if name != "weight") / SIZE
    found, _ = rule.decode({}, rule.admit(message, context), context)
    wide = vector.astype("f8")
    return float(np.square(found - wide).sum() / np.square(wide).sum()), bits


def measure(draws: int) -> dict[str, dict[int, dict[str, Any]]]:
    """Row -> bits -> the mean error, the least and the largest of the draws, bits on the wire."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for bits in BITS:
        for name, (rule, tails) in chains(bits).items():
            rows = [error(rule, vectors(tails, draw), draw) for draw in range(draws)]
            errors = [e for e, _ in rows]
            found.setdefault(name, {})[bits] = {
                "error": float(f"{np.mean(errors):.5g}"),
                "least": float(f"{min(errors):.5g}"),
                "most": float(f"{max(errors):.5g}"),
                "bits": round(rows[0][1], 3),
            }
    return found


def judged(name: str, bits: int, value: float) -> float | None:
    """The figure over the theory's, or over the nearest end of the published range; ``None`` if there is none."""
    if name.startswith("eden"):
        return value / eden_error(bits, biased="biased" in name)
    if name in PUBLISHED:
        low, high = PUBLISHED[name][bits]
        return value / min(max(value, low), high)
    return None


def lines(found: dict[str, dict[int, dict[str, Any]]]) -> list[list[Any]]:
    """A row a chain: the errors, and by how much they differ from theory or publication."""
    rows = []
    for name, by_bits in found.items():
        ratios = [judged(name, b, f["error"]) for b, f in by_bits.items()]
        told = " / ".join("–" if r is None else f"{r:.3f}" if name.startswith("eden") else f"{r:.2f}" for r in ratios)
        rows.append([name, *(f["error"] for f in by_bits.values()), told if ratios[0] is not None else None])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=DRAWS, help="how many vectors and seeds")
    options = parser.parse_args()
    found = measure(options.draws)
    header = ("chain", *(f"{b} bit{'s' * (b > 1)}" for b in BITS), "over theory or publication")
    text = table(header, lines(found))
    if options.draws != DRAWS:
        print(text)
        return
    document("compression_nmse", text)
    store("compression_nmse", {"size": SIZE, "draws": DRAWS, "found": found})


if __name__ == "__main__":
    main()
