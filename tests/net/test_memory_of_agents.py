"""What an idle agent takes: no framework, no database of a server's, and little memory."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest

MOST_MB = 80


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is counted differently elsewhere")
def test_an_idle_agent_takes_at_most_80_mb() -> None:
    """All that an agent holds while it rests: connections, journal, ledger, rules; no training process."""
    script = """
        import asyncio, json, sys, tempfile
        from pathlib import Path
        import psutil
        from foedus.net import join
        from foedus.net.identity.authority import Authority, Trust
        from foedus.net.identity.credentials import Credentials

        async def main():
            folder = Path(tempfile.mkdtemp())
            authority = Authority.kept(folder / "authority", now=2e9)
            trust = Trust.checked(authority.document(now=2e9), pin=authority.pin, now=2e9)
            mine = Credentials.begun(folder / "me", url="https://127.0.0.1:9", trust=trust)
            settings = join.Joining(folder=folder / "owner")
            clock = join.WallClock()
            reach = join.Reach(mine, settings.outward, clock.now)
            agent = join._agent(mine, "data.py:examples", settings, join.Outside(reach, clock))
            await agent.findings()
            taken = psutil.Process().memory_info().rss
            await agent.close()
            print(json.dumps([taken / 1e6, sorted({m.partition(".")[0] for m in sys.modules})]))

        asyncio.run(main())
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    taken, loaded = json.loads(done.stdout)
    assert not {"torch", "jax", "sqlalchemy", "starlette", "uvicorn", "pandas"} & set(loaded)
    assert taken <= MOST_MB
    print(f"{taken:.0f} MB")
