"""The page about attacks on privacy: tables and figures from what the other ``privacy_*.py`` scripts have stored.

python experiments/privacy_inversion.py     gradient inversion, and a server that lies
python experiments/privacy_gan.py           reconstruction by a participant
python experiments/privacy_members.py       membership, model inversion, properties
python experiments/privacy_canaries.py      ε as canaries measure it
python experiments/privacy_poisoning.py     poisoned updates and backdoors behind these protections
python experiments/privacy_attacks.py       then this: no training, some seconds
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from outcome import DOCS, RESULTS, document, stored, table
from PIL import Image

from foedus.report.attacks import plot_pictures

PAGE = "privacy-attacks"
PICTURES = DOCS.parent / "pictures"

Found = Mapping[str, Any]
Rows = Sequence[Mapping[str, Any]]  # of one case, a row for each seed


def part(found: Found, prefix: str) -> dict[str, Any]:
    """The figures whose names begin so, without that."""
    return {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}


def percent(value: Any) -> str | None:
    return None if value is None else f"{100 * value:.0f} %"


def of(found: Found, name: str, key: str) -> Any:
    return found.get(name, {}).get(key)


def share(rows: Rows, key: str) -> str | None:
    """A mean in per cent, and the standard deviation over seeds."""
    middle, spread = _moments(rows, key)
    return None if middle is None else f"{100 * middle:.0f}{_more(spread, 100, '.0f')} %"


def number(rows: Rows, key: str, form: str = ".2f") -> str | None:
    """A mean, and the standard deviation over seeds."""
    middle, spread = _moments(rows, key)
    return None if middle is None else f"{middle:{form}}{_more(spread, 1, form)}"


def _moments(rows: Rows, key: str) -> tuple[float | None, float | None]:
    values = [row[key] for row in rows if row.get(key) is not None]
    if not values or len(values) < len(rows):
        return None, None
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def _more(spread: float | None, factor: float, form: str) -> str:
    return "" if spread is None else f" ± {factor * spread:{form}}"


# --- gradient inversion -------------------------------------------------------------------------------------

QUALITY = ("PSNR", "SSIM", "baseline PSNR", "baseline SSIM", "rebuilt", "labels right")


def quality(row: Found) -> list[Any]:
    numbers = [f"{row[key]:.1f}" if "psnr" in key else f"{row[key]:.2f}" for key in ("psnr", "ssim")]
    numbers += [f"{row['baseline_psnr']:.1f}", f"{row['baseline_ssim']:.2f}"]
    return [*numbers, percent(row["recovered"]), percent(row["labels right"])]


def inversion(found: Found) -> str:
    plain = [[name, *quality(row)] for name, row in part(found, "undefended / ").items()]
    local = [[name, *quality(row)] for name, row in part(found, "local training / ").items()]
    return "\n\n".join(
        [
            "One step, undefended (attack, data, pictures in the batch):",
            table(("", *QUALITY), plain),
            "Local training of several steps (Fashion-MNIST, angle of gradients):",
            table(("", *QUALITY), local),
        ]
    )


def defended(found: Found) -> str:
    rows = part(found, "defended / ")
    names = list(dict.fromkeys(name.rpartition(" / ")[0] for name in rows))
    lines = []
    for name in names:
        one, eight = rows.get(f"{name} / 1"), rows.get(f"{name} / 8")
        lines.append([name, *_short(one), *_short(eight)])
    header = (
        "seen by the server, unless said otherwise",
        "PSNR, 1",
        "SSIM, 1",
        "rebuilt, 1",
        "PSNR, 8",
        "SSIM, 8",
        "rebuilt, 8",
    )
    return table(header, lines)


def _short(row: Found | None) -> list[Any]:
    return [None] * 3 if row is None else [f"{row['psnr']:.1f}", f"{row['ssim']:.2f}", percent(row["recovered"])]


def cheating(found: Found) -> str:
    header = (
        "20 clients of 4 pictures",
        "entries exposed",
        "cosine",
        "cosine, honest server",
        "PSNR",
        "SSIM",
        "rebuilt",
    )
    rows = [
        [name, f"{100 * row['exposed']:.2f} %", f"{row['likeness']:.4f}", f"{row['honest']:.2f}", *_short(row)]
        for name, row in part(found, "cheating server / ").items()
    ]
    return table(header, rows)


# --- the others ---------------------------------------------------------------------------------------------


def gan(found: Found) -> str:
    header = ("defence", "taken for a 3 by the judge", "how sure", "accuracy of the model", "ε of the run", "seeds")
    rows = [
        [name, *(share(r, key) for key in ("taken for a 3", "how sure", "accuracy")), r[0].get("epsilon"), len(r)]
        for name, r in found.items()
    ]
    return table(header, rows)


def membership(found: Found) -> str:
    header = (
        "defence", "AUC, loss", "TPR at 1 %, loss", "AUC, LiRA", "TPR at 1 %, LiRA", "accuracy", "ε of the run", "seeds"
    )  # fmt: skip
    rows = [
        [
            name, number(r, "loss auc"), share(r, "loss tpr"), number(r, "ratio auc"), share(r, "ratio tpr"),
            share(r, "accuracy"), r[0].get("epsilon"), len(r),
        ]
        for name, r in part(found, "membership / ").items()
    ]  # fmt: skip
    return table(header, rows)


def imagined(found: Found) -> str:
    header = ("defence", "classes recognised", "correlation with the mean", "SSIM", "accuracy", "ε of the run", "seeds")
    rows = [
        [
            name, share(r, "recognised"), number(r, "correlation"), number(r, "ssim"), share(r, "accuracy"),
            r[0].get("epsilon"), len(r),
        ]
        for name, r in part(found, "model inversion / ").items()
    ]  # fmt: skip
    return table(header, rows)


def properties(found: Found) -> str:
    header = ("defence", "AUC", "advantage", "by chance", "ε of the update", "seeds")
    rows = [
        [name, number(r, "auc"), share(r, "advantage"), share(r[:1], "by_chance"), r[0].get("epsilon"), len(r)]
        for name, r in part(found, "property / ").items()
    ]
    return table(header, rows)


def canaries(found: Found) -> str:
    header = (
        "protection", "ε promised", "every model", "at least", "final model", "at least", "one message", "accuracy",
        "seeds",
    )  # fmt: skip
    lines = []
    for name, rows in found.items():
        promised = rows[0]["claimed"]
        message = "∞" if any(row["message unbounded"] for row in rows) else number(rows, "message epsilon")
        keys = [f"{place} {key}" for place in ("every model", "final model") for key in ("epsilon", "least")]
        figures = [number(rows, key, ".3g") for key in keys]
        lines.append([name, promised, *figures, message, share(rows, "accuracy"), len(rows)])
    return table(header, lines)


# --- poisoned updates ---------------------------------------------------------------------------------------

POISONED = ("nobody", "labels flipped", "ALIE", "sign flip ×4", "backdoor", "backdoor ×10")
PLANTED = ("nobody", "backdoor", "backdoor ×10")


def poisoning(kept: Found) -> str:
    """Accuracy and the backdoor's success, defence × attack."""
    found, epsilon = kept["found"], kept["epsilon"]
    defences = list(dict.fromkeys(name.partition(" / ")[2] for name in found))
    planted, accurate = [], []
    for defence in defences:
        rows = {attack: found.get(f"{attack} / {defence}", []) for attack in POISONED}
        planted.append([defence, *(share(rows[a], "success") for a in PLANTED), epsilon.get(defence), _seeds(rows)])
        accurate.append([defence, *(share(r, "accuracy") for r in rows.values()), epsilon.get(defence), _seeds(rows)])
    return "\n\n".join(
        [
            "Success of the backdoor:",
            table(("defence", *PLANTED, "ε of the run", "seeds"), planted),
            "Accuracy:",
            table(("defence", *POISONED, "ε of the run", "seeds"), accurate),
            f"Asked to run a trimmed mean under masks, foedus says: *{kept['refused']}*",
        ]
    )


def _seeds(rows: Mapping[str, Rows]) -> str:
    fewest, most = min(map(len, rows.values())), max(map(len, rows.values()))
    return str(most) if fewest == most else f"{fewest} to {most}"


# --- the overview -------------------------------------------------------------------------------------------

OVERVIEW = ("attack (figure)", "none", "clipping", "compression", "central noise", "local noise", "secure aggregation",
            "homomorphic sums")  # fmt: skip
ALIKE = ("none", "clipping", "top-k, 5 %")
HIDDEN = ("secure aggregation", "homomorphic sums")
NOISES = {  # which strength is shown, by attack: central, local
    "gan": ("central noise, z = 0.3", "local noise, z = 0.1"),
    "model": ("central noise, z = 0.5", "local noise, z = 0.1"),
    "poisoning": ("central noise, z = 3", "local noise, z = 0.1"),
}
NO_SUM = "no such sum"  # of one: there is a floor under the number of summands


def rebuilt(found: Found, name: str) -> str:
    """Of batches of 1 and of 8, which share of the pictures."""

    def told(k: int) -> str:
        row = found.get(f"defended / {name} / {k}")
        if row is None:
            return "–"
        return share([row], "recovered") or "–"

    return " / ".join(map(told, (1, 8)))


def inversions(found: Found) -> list[list[Any]]:
    by_server = ("none", "clipping", "top-k, 5 %", "central noise, z = 1, seen by the server", "local noise, z = 0.1")
    of_model = (*by_server[:3], "central noise, z = 0.1, seen in the model", "local noise, z = 0.1")
    uploads = ("masked, one client's upload", "encrypted, one client's upload")
    sums = ("masked, the opened sum of 64", "encrypted, the opened sum of 64")
    return [
        ["gradient inversion by the server, from one client's upload (rebuilt, of 1 / of 8)",
         *(rebuilt(found, name) for name in (*by_server, *uploads))],
        ["the same from a sum of 64 clients", rebuilt(found, "sum of 64 clients"), *[None] * 4,
         *(rebuilt(found, name) for name in sums)],
        ["the same by a client, from a round of one", *(rebuilt(found, name) for name in of_model), NO_SUM, NO_SUM],
    ]  # fmt: skip


def on_models(played: Found, models: Found) -> list[list[Any]]:
    def told(found: Found, name: str, figure: str | None) -> str | None:
        return None if name not in found else f"{figure} ({share(found[name], 'accuracy')})"

    def judged(name: str) -> str | None:
        return told(played, name, share(played.get(name, []), "taken for a 3"))

    def members(name: str) -> str | None:
        return told(models, f"membership / {name}", share(models.get(f"membership / {name}", []), "ratio tpr"))

    def classes(name: str) -> str | None:
        return told(
            models, f"model inversion / {name}", number(models.get(f"model inversion / {name}", []), "correlation")
        )

    names = (*ALIKE, *NOISES["model"], *HIDDEN)
    return [
        ["GAN of a participant (taken for a 3)", *map(judged, (*ALIKE, *NOISES["gan"], *HIDDEN))],
        ["membership (TPR at 1 %)", *map(members, names)],
        ["model inversion (correlation)", *map(classes, names)],
    ]


def of_clients(models: Found) -> list[list[Any]]:
    def inferred(name: str | None) -> str | None:
        return None if name is None else number(models.get(f"property / {name}", []), "auc")

    plain = ("none", "clipping", "top-k, 1 %", "none", "local noise, z = 0.1")  # the server sees through its own noise
    uploads = ("masked, one client's upload", "encrypted, one client's upload")
    sums = ("masked, the opened sum of 10", "encrypted, the opened sum of 10")
    return [
        ["property of a client, by the server, from its upload (AUC)", *map(inferred, (*plain, *uploads))],
        ["the same from a sum of 10 clients", inferred("sum of 10 clients"), *[None] * 4, *map(inferred, sums)],
    ]


def counted(seen: Found) -> list[list[Any]]:
    def measured(name: str) -> str | None:
        if name not in seen:
            return None
        return f"{number(seen[name], 'every model epsilon', '.3g')} ({share(seen[name], 'accuracy')})"

    names = ("none", "clipping", "2 bits per entry", "central noise, z = 10", "local noise, z = 30",
             "secure aggregation", "homomorphic sums, 40 clients")  # fmt: skip
    return [["canaries in the models (ε)", *map(measured, names)]]


def planted(found: Found) -> list[list[Any]]:
    def told(attack: str, key: str) -> list[Any]:
        cells = []
        for name in (*ALIKE, *NOISES["poisoning"], *HIDDEN):
            rows, loose = (found.get(f"{attack} / {name}{more}", []) for more in ("", ", no bound kept"))
            cell = share(rows, key)
            if cell is not None and loose:
                cell += f", no bound kept: {share(loose, key)}"
            if cell is not None and key != "accuracy":
                cell += f" ({share(rows, 'accuracy')})"
            cells.append(cell)
        return cells

    return [
        ["backdoor, an update as it comes out (success)", *told("backdoor", "success")],
        ["backdoor, ten times as long (success)", *told("backdoor ×10", "success")],
        ["poisoning: four times the opposite (accuracy)", *told("sign flip ×4", "accuracy")],
    ]


def overview(inverted: Found, played: Found, models: Found, seen: Found, poisoned: Found) -> str:
    """Attack × defence: the figures that tell whether a defence helps."""
    rows = [*inversions(inverted), *on_models(played, models), *of_clients(models), *counted(seen), *planted(poisoned)]
    return table(OVERVIEW, rows)


# --- figures ------------------------------------------------------------------------------------------------


def arrays(name: str) -> dict[str, Any]:
    path = RESULTS / f"{name}.npz"
    return dict(np.load(path)) if path.exists() else {}


def inverted_rows(pairs: Found) -> dict[str, Any]:
    """Reconstructions below their originals, which are shown once for all that share them."""
    rows: dict[str, Any] = {}
    last = None
    for name, (truth, rebuilt) in sorted(pairs.items(), key=lambda pair: pair[1].tobytes(), reverse=True):
        short = name.replace("undefended / ", "").replace("defended / ", "").replace("local training / ", "")
        if last is None or truth.tobytes() != last:
            rows["original" + " " * len(rows)] = truth  # names differ by blanks, which nobody sees
        last = truth.tobytes()
        rows[short] = rebuilt
    return rows


def draw() -> list[Path]:
    pairs, made, models = (arrays(f"privacy_{name}") for name in ("inversion", "gan", "members"))
    figures = {
        "privacy-inversion": inverted_rows(pairs),
        "privacy-gan": {name: pictures[:8] for name, pictures in made.items()},
        "privacy-model-inversion": {n.removeprefix("model inversion / "): p[:8] for n, p in models.items()},
    }
    drawn = [plot_pictures(rows, PICTURES / f"{name}.png") for name, rows in figures.items() if rows]
    for path in drawn:
        with Image.open(path) as picture:  # they are grey
            grey = picture.convert("L").resize((picture.width * 3 // 5, picture.height * 3 // 5))
        grey.save(path, optimize=True)
    return drawn


def main() -> None:
    inverted, played = stored("privacy_inversion").get("found", {}), stored("privacy_gan").get("found", {})
    models, seen = stored("privacy_members").get("found", {}), stored("privacy_canaries").get("found", {})
    poisoned = stored("privacy_poisoning")
    texts = {
        "overview": overview(inverted, played, models, seen, poisoned["found"]),
        "inversion": inversion(inverted),
        "defended": defended(inverted),
        "cheating": cheating(inverted),
        "gan": gan(played),
        "membership": membership(models),
        "imagined": imagined(models),
        "properties": properties(models),
        "canaries": canaries(seen),
        "poisoning": poisoning(poisoned),
    }
    for mark, text in texts.items():
        document(PAGE, text, mark=mark)
    for path in draw():
        print(path)


if __name__ == "__main__":
    main()
