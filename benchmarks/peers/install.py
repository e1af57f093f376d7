"""Makes one virtual environment per peer beside this file, `.venv-flower`, `.venv-pfl`, `.venv-fedjax`.

    python benchmarks/peers/install.py            # all
    python benchmarks/peers/install.py flower pfl # some

Everything is pinned, so pip resolves nothing (`--no-deps`): Flower 1.42.0 asks for a newer certifi than the package
index may have, and runs with the one pinned here. torch is installed first, by itself. Takes a few minutes.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
PEERS = sorted(path.stem.removeprefix("requirements-") for path in HERE.glob("requirements-*.txt"))


def install(peer: str) -> None:
    folder, requirements = HERE / f".venv-{peer}", HERE / f"requirements-{peer}.txt"
    print(f"{peer}: making {folder}", flush=True)
    venv.create(folder, with_pip=True, clear=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-deps"]
    torch = [line for line in requirements.read_text().splitlines() if line.startswith("torch==")]
    if torch:
        subprocess.run([*pip, *torch], check=True)
    subprocess.run([*pip, "-r", str(requirements)], check=True)


def main() -> None:
    asked = sys.argv[1:] or PEERS
    unknown = sorted(set(asked) - set(PEERS))
    if unknown:
        raise SystemExit(f"{__doc__}\nno peer called {', '.join(unknown)}; there are {', '.join(PEERS)}")
    for peer in asked:
        install(peer)


if __name__ == "__main__":
    main()
