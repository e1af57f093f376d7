"""The page about attacks on privacy: tables and figures from what the other ``privacy_*.py`` scripts have stored.

python experiments/privacy_inversion.py     gradient inversion, and a server that lies
python experiments/privacy_gan.py           reconstruction by a participant
python experiments/privacy_members.py       membership, model inversion, properties
python experiments/privacy_canaries.py      ε as canaries measure it
python experiments/privacy_attacks.py       then this: no training, some seconds
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from outcome import DOCS, RESULTS, document, stored, table
from PIL import Image

from foedus.report.attacks import plot_pictures

PAGE = "privacy-attacks"
PICTURES = DOCS.parent / "pictures"

Found = Mapping[str, Any]


def part(found: Found, prefix: str) -> dict[str, Any]:
    """The figures whose names begin so, without that."""
    return {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}


def percent(value: Any) -> str | None:
    return None if value is None else f"{100 * value:.0f} %"


def of(found: Found, name: str, key: str) -> Any:
    return found.get(name, {}).get(key)


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
    header = ("defence", "taken for a 3 by the judge", "how sure", "accuracy of the model", "ε of the run")
    rows = [
        [name, percent(row["taken for a 3"]), percent(row["how sure"]), percent(row["accuracy"]), row.get("epsilon")]
        for name, row in found.items()
    ]
    return table(header, rows)


def membership(found: Found) -> str:
    header = ("defence", "AUC, loss", "TPR at 1 %, loss", "AUC, LiRA", "TPR at 1 %, LiRA", "accuracy", "ε of the run")
    rows = [
        [
            name, f"{row['loss auc']:.2f}", percent(row["loss tpr"]), f"{row['ratio auc']:.2f}",
            percent(row["ratio tpr"]), percent(row["accuracy"]), row.get("epsilon"),
        ]
        for name, row in part(found, "membership / ").items()
    ]  # fmt: skip
    return table(header, rows)


def imagined(found: Found) -> str:
    header = ("defence", "classes recognised", "correlation with the mean", "SSIM", "accuracy", "ε of the run")
    rows = [
        [
            name,
            percent(row["recognised"]),
            f"{row['correlation']:.2f}",
            f"{row['ssim']:.2f}",
            percent(row["accuracy"]),
            row.get("epsilon"),
        ]
        for name, row in part(found, "model inversion / ").items()
    ]
    return table(header, rows)


def properties(found: Found) -> str:
    header = ("defence", "AUC", "advantage", "by chance", "ε of the update")
    rows = [
        [name, f"{row['auc']:.2f}", percent(row["advantage"]), percent(row["by_chance"]), row.get("epsilon")]
        for name, row in part(found, "property / ").items()
    ]
    return table(header, rows)


def canaries(found: Found) -> str:
    header = (
        "protection",
        "ε promised",
        "every model",
        "at least",
        "final model",
        "at least",
        "one message",
        "accuracy",
    )
    rows = []
    for name, row in found.items():
        message = "∞" if row["message unbounded"] else row["message epsilon"]
        figures = [row[f"{place} {key}"] for place in ("every model", "final model") for key in ("epsilon", "least")]
        rows.append([name, row["claimed"], *figures, message, percent(row["accuracy"])])
    return table(header, rows)


# --- the overview -------------------------------------------------------------------------------------------

SAME, BLIND = "as none", "nothing seen"
OVERVIEW = ("attack (figure)", "none", "clipping", "compression", "central noise", "local noise", "secure aggregation",
            "homomorphic sums")  # fmt: skip
NOISES = {  # which strength is shown, by attack: central, local
    "gan": ("central noise, z = 0.3", "local noise, z = 0.1"),
    "model": ("central noise, z = 0.5", "local noise, z = 0.1"),
}


def overview(inverted: Found, played: Found, models: Found, seen: Found) -> str:
    """Attack × defence: the figures that tell whether a defence helps."""

    def rebuilt(name: str) -> str:
        return " / ".join(percent(of(inverted, f"defended / {name} / {k}", "recovered")) or "–" for k in (1, 8))

    def judged(name: str) -> Any:
        row = played.get(name)
        return None if row is None else f"{percent(row['taken for a 3'])} ({percent(row['accuracy'])})"

    def model(kind: str, key: str) -> Any:
        def told(name: str) -> Any:
            row = models.get(f"{kind} / {name}")
            return None if row is None else f"{row[key]:.2f} ({percent(row['accuracy'])})"

        return told

    def inferred(name: str) -> Any:
        row = models.get(f"property / {name}")
        return None if row is None else f"{row['auc']:.2f}"

    def measured(name: str) -> Any:
        row = seen.get(name)
        if row is None or row["every model epsilon"] is None:
            return None if row is None or not row["every model unbounded"] else "∞"
        return f"{row['every model epsilon']:.3g} ({percent(row['accuracy'])})"

    by_server = ("none", "clipping", "top-k, 5 %", "central noise, z = 1, seen by the server", "local noise, z = 0.1")
    of_model = (*by_server[:3], "central noise, z = 0.1, seen in the model", "local noise, z = 0.1")
    alike = ("none", "clipping", "top-k, 5 %")
    counted = ("none", "clipping", "2 bits per entry", "central noise, z = 10", "local noise, z = 30")
    members, classes = model("membership", "ratio tpr"), model("model inversion", "correlation")
    rows = [
        ["gradient inversion by the server (rebuilt, of 1 / of 8)", *map(rebuilt, by_server),
         rebuilt("sum of 64 clients"), BLIND],
        ["the same by a client, from a round of one (rebuilt)", *map(rebuilt, of_model), rebuilt("sum of 64 clients"),
         rebuilt("sum of 64 clients")],
        ["GAN of a participant (taken for a 3)", *map(judged, (*alike, *NOISES["gan"])), SAME, SAME],
        ["membership (TPR at 1 %)", *map(members, (*alike, *NOISES["model"])), SAME, SAME],
        ["model inversion (correlation)", *map(classes, (*alike, *NOISES["model"])), SAME, SAME],
        ["property of a client, by the server (AUC)", *map(inferred, ("none", "clipping", "top-k, 1 %")), SAME,
         inferred("local noise, z = 0.1"), inferred("sum of 10 clients"), BLIND],
        ["canaries in the models (ε)", *map(measured, counted), measured("secure aggregation"), SAME],
    ]  # fmt: skip
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
    texts = {
        "overview": overview(inverted, played, models, seen),
        "inversion": inversion(inverted),
        "defended": defended(inverted),
        "cheating": cheating(inverted),
        "gan": gan(played),
        "membership": membership(models),
        "imagined": imagined(models),
        "properties": properties(models),
        "canaries": canaries(seen),
    }
    for mark, text in texts.items():
        document(PAGE, text, mark=mark)
    for path in draw():
        print(path)


if __name__ == "__main__":
    main()
