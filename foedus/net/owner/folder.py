"""The owner's folder: one for all servers that a machine works for, so that rules and ledger hold for all of them.

| file | |
|---|---|
| ``rules.toml`` | what is allowed; written with comments when there is none (``rules.py``) |
| ``consent.jsonl`` | who agreed to what (``consent.py``) |
| ``ledger.jsonl`` | what left (``ledger.py``) |
| ``releases.json`` | what left with noise of its own, so that it leaves once (``releases.py``) |
| ``spending.json`` | what DP-SGD has cost single examples (``spending.py``) |
| ``silo.key`` | the key of encrypted sums that this owner shares with others (``silos.py``) |
| ``approvals.json``, ``bundles/`` | tasks that were approved or denied, and their source (``approvals.py``) |
| ``servers/NAME/`` | of one server: credentials, what waits to be sent, what is kept between rounds, models |

Not here: what is in the files.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from foedus.errors import ConfigurationError
from foedus.net.identity.files import private_folder
from foedus.net.owner import rules
from foedus.net.owner.consent import Consents
from foedus.net.owner.ledger import Ledger
from foedus.net.owner.releases import Releases
from foedus.net.owner.spending import Spending
from foedus.record.files import replace

__all__ = ["OwnerFolder", "default", "file_name"]


def file_name(run: str) -> str:
    """A run's name as part of a file's: plain letters, and digits that tell alike ones apart.

    Example:
        >>> file_name("../heart attack")
        'heart-attack-6a747265'
    """
    plain = re.sub(r"[^A-Za-z0-9_]+", "-", run).strip("-")[:40]
    return f"{plain}-{hashlib.sha256(run.encode()).hexdigest()[:8]}".lstrip("-")


def default() -> Path:
    """Where the owner's folder is if nobody says: in the user's own data folder."""
    import platformdirs

    return Path(platformdirs.user_data_dir("foedus")) / "owner"


@dataclass(frozen=True)
class OwnerFolder:
    """The folder, and what lies in it.

    Example:
        >>> import tempfile
        >>> folder = OwnerFolder(Path(tempfile.mkdtemp()))
        >>> folder.server("https://fl.example.org:8765").name
        'fl.example.org-8765'
    """

    path: Path

    @property
    def rules_file(self) -> Path:
        """The owner's rules."""
        return self.path / "rules.toml"

    @property
    def silo_key(self) -> Path:
        """The key of encrypted sums, unless another file is named."""
        return self.path / "silo.key"

    @property
    def bundles(self) -> Path:
        """Source bundles that were fetched, by digest."""
        return self.path / "bundles"

    @property
    def begun(self) -> bool:
        """Whether anything of an owner's lies in it."""
        own = (
            "rules.toml", "consent.jsonl", "ledger.jsonl", "releases.json", "spending.json", "approvals.json",
            "bundles", "servers",
        )  # fmt: skip
        return any((self.path / name).exists() for name in own)

    def rules(self) -> rules.Rules:
        """The rules; a file with the template is written if there is none."""
        if not self.rules_file.exists():
            private_folder(self.path)
            replace(self.rules_file, rules.TEMPLATE.encode())
        return rules.read(self.rules_file)

    def consents(self) -> Consents:
        """The records of consent."""
        return Consents(private_folder(self.path) / "consent.jsonl")

    def ledger(self) -> Ledger:
        """The ledger, checked."""
        return Ledger(private_folder(self.path) / "ledger.jsonl")

    def releases(self) -> Releases:
        """What left with noise of its own."""
        return Releases(private_folder(self.path) / "releases.json")

    def spending(self) -> Spending:
        """What single examples have spent."""
        return Spending(private_folder(self.path) / "spending.json")

    def server(self, address: str) -> Path:
        """The folder of one server."""
        name = re.sub(r"[^\w.-]+", "-", address.partition("://")[2] or address).strip("-.")
        if not name:
            raise ConfigurationError(f"{address!r} is no address of a server; write https://HOST:PORT")
        return self.path / "servers" / name
