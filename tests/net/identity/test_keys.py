"""Keys and files: what is signed cannot be shown for something else, and secrets stay where they are."""

from __future__ import annotations

import copy
import hashlib
import logging
import os
import pickle
import stat
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foedus.errors import NotTrusted, SignatureInvalid
from foedus.net.identity.authority import Authority
from foedus.net.identity.credentials import Credentials
from foedus.net.identity.directory import invitation
from foedus.net.identity.files import create_once, read_secret, write_secret
from foedus.net.identity.keys import PublicKey, SigningKey, signed_bytes
from foedus.net.identity.sessions import Proof
from foedus.net.identity.signed import check, check_content, sign
from foedus.protocol.messages import Accepted, Blob, Finished, Kind

KEY = SigningKey.generate()
Parts = st.lists(st.binary(max_size=9), max_size=4)


@given(st.text(max_size=8), Parts, st.text(max_size=8), Parts)
def test_no_two_things_have_the_same_signed_bytes(a: str, parts: list[bytes], b: str, others: list[bytes]) -> None:
    same = (a, parts) == (b, others)
    assert (signed_bytes(a, *parts) == signed_bytes(b, *others)) is same


@given(st.binary(max_size=40), st.integers(0, 63), st.integers(1, 255))
def test_a_changed_signature_or_message_is_refused(content: bytes, at: int, flip: int) -> None:
    signature = KEY.sign("orders", content)
    KEY.public.verify(signature, "orders", content)
    bent = bytes(b ^ (flip if i == at else 0) for i, b in enumerate(signature))
    for other, purpose, parts in (
        (bent, "orders", (content,)),
        (signature, "bundle", (content,)),
        (signature, "orders", (content + b"\x00",)),
        (signature, "orders", (content, b"")),
        (signature[:63], "orders", (content,)),
    ):
        with pytest.raises(SignatureInvalid, match="it was not used"):
            KEY.public.verify(other, purpose, *parts)


def test_a_signature_from_a_published_vector() -> None:
    """RFC 8032, section 7.1, test 3: the raw primitive is Ed25519."""
    secret = bytes.fromhex("c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7")
    public = "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025"
    signature = (
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac"
        "18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a"
    )
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = SigningKey(Ed25519PrivateKey.from_private_bytes(secret))
    assert key.public.raw.hex() == public
    assert key.native.sign(bytes.fromhex("af82")).hex() == signature


def accepted() -> Accepted:
    return Accepted(
        run="heart",
        round=3,
        attempt=1,
        key=b"k" * 16,
        kind=Kind.TRAIN,
        orders=Blob(digest=b"o" * 32, size=5),
        bundle=Blob(digest=b"b" * 32, size=6),
        target="task:federation",
        position=2,
        seed=-7,
        closes_s=60.0,
        minimum=3,
        protections=("secure-aggregation",),
    )


CHANGES: dict[str, object] = {
    "run": "lung",
    "round": 4,
    "attempt": 2,
    "kind": Kind.EVALUATE,
    "key": b"l" * 16,
    "orders": Blob(digest=b"p" * 32, size=5),
    "bundle": None,
    "target": "task:other",
    "position": 1,
    "seed": 7,
    "limit": 1,
    "minimum": 1,
    "protections": (),
    "held": b"h" * 16,
    "plan": Blob(digest=b"p" * 32, size=5),
}


@pytest.mark.parametrize("field", sorted(CHANGES))
def test_what_a_server_signed_is_good_for_exactly_that(field: str) -> None:
    told = sign(KEY, accepted())
    check(KEY.public, told)
    with pytest.raises(SignatureInvalid):
        check(KEY.public, replace(told, **{field: CHANGES[field]}))  # type: ignore[arg-type]
    with pytest.raises(SignatureInvalid):
        check(SigningKey.generate().public, told)


def test_every_field_that_matters_is_signed() -> None:
    """A field that a later version adds is thought about here."""
    unsigned = {"closes_s", "signature"}
    assert {f.name for f in fields(Accepted)} == {*CHANGES, *unsigned}


@pytest.mark.parametrize("change", [{"rounds": 4}, {"personal": True}, {"model": None}, {"target": "x:y"}, {"seed": 1}])
def test_the_final_model_is_signed(change: dict[str, object]) -> None:
    told = sign(KEY, Finished(run="heart", model=Blob(digest=b"m" * 32, size=9), rounds=3))
    check(KEY.public, told)
    with pytest.raises(SignatureInvalid):
        check(KEY.public, replace(told, **change))  # type: ignore[arg-type]


def test_bytes_are_compared_with_what_was_signed_for() -> None:
    blob = Blob(digest=hashlib.sha256(b"weights").digest(), size=7)
    check_content(blob, b"weights")
    for other in (b"weightz", b"weights ", b""):
        with pytest.raises(SignatureInvalid, match="cut or changed"):
            check_content(blob, other)


# --- files ----------------------------------------------------------------------------------------------------


def test_secrets_are_written_for_their_owner_only(tmp_path: Path) -> None:
    os.umask(os.umask(0))  # whatever the umask is
    path = tmp_path / "key.pem"
    create_once(path, b"one")
    create_once(path, b"two")
    assert (read_secret(path), stat.S_IMODE(path.stat().st_mode)) == (b"one", 0o600)
    write_secret(path, b"three")
    assert (read_secret(path), stat.S_IMODE(path.stat().st_mode)) == (b"three", 0o600)
    assert [p.name for p in tmp_path.iterdir()] == ["key.pem"]  # nothing left beside it


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660])
def test_a_secret_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    SigningKey.kept(tmp_path / "key.pem")
    (tmp_path / "key.pem").chmod(mode)
    with pytest.raises(NotTrusted, match=f"can be read by others .mode {mode:04o}.*chmod 600"):
        SigningKey.kept(tmp_path / "key.pem")


def test_every_file_of_a_server_and_of_a_client_is_private(tmp_path: Path) -> None:
    old = os.umask(0)  # the most careless
    try:
        authority = Authority.kept(tmp_path / "server", now=1e9)
        authority.server_files(["localhost"], now=1e9)
        from foedus.net.identity.authority import Trust

        trust = Trust.checked(authority.document(now=1e9), pin=authority.pin, now=1e9)
        mine = Credentials.begun(tmp_path / "client", url="https://localhost", trust=trust)
        given_ = authority.client_certificate("clinic", mine.key.public, now=1e9)
        mine.joined(name="clinic", position=0, certificate=given_)
    finally:
        os.umask(old)
    for folder in ("server", "client"):
        assert stat.S_IMODE((tmp_path / folder).stat().st_mode) == 0o700
        for path in (tmp_path / folder).iterdir():
            if path.name not in ("server.pem", "signing.pem"):  # certificates that anybody may see
                assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert Credentials.read(tmp_path / "client", now=1e9).position == 0


def test_a_damaged_key_is_told_of(tmp_path: Path) -> None:
    write_secret(tmp_path / "key.pem", b"-----BEGIN PRIVATE KEY-----\nnonsense\n-----END PRIVATE KEY-----\n")
    with pytest.raises(NotTrusted, match=r"key\.pem is not a private key in PEM form"):
        SigningKey.kept(tmp_path / "key.pem")
    with pytest.raises(NotTrusted, match="32 bytes"):
        PublicKey(b"short")


# --- secrets in texts -------------------------------------------------------------------------------------------


def test_no_secret_is_in_what_python_prints(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """``repr``, ``str``, ``%r`` in a log line, and tracebacks of dataclasses: none shows key, token or signature."""
    authority = Authority.kept(tmp_path, now=1e9)
    token, invited = invitation(now=0.0)
    proof = Proof.signed(KEY, "session", server="s", name="clinic", challenge=b"c" * 56, channel="")
    secrets = [
        KEY.pem().decode().split("\n")[1],
        authority.signing.pem().decode().split("\n")[1],
        (tmp_path / "authority.key").read_text().split("\n")[1],
        token,
    ]
    caplog.set_level(logging.DEBUG)
    for value in (KEY, authority, authority.signing, invited, proof, vars(authority)["_key"]):
        logging.getLogger("foedus").info("%r %s", value, value)
    told = caplog.text
    for secret in [*secrets, repr(proof.signature)[2:20]]:
        assert secret not in told


def test_a_private_key_does_not_travel() -> None:
    for way in (pickle.dumps, copy.deepcopy):
        with pytest.raises(NotTrusted, match="does not travel"):
            way(KEY)
