"""Sums of encrypted updates, for a few silos that share a key which the server never has (CKKS, by TenSEAL).

Whole numbers go into the slots of ciphertexts, 2,048 in each; anybody adds ciphertexts, exactly modulo q, and who has
the key decrypts the sum. CKKS computes approximately, and what is left of its noise in a decrypted number can betray
the key (Li & Micciancio 2021, "On the security of homomorphic encryption on approximate numbers"). Here numbers lie on
a grid so coarse that the noise rounds away: the sum comes out as the whole number that it is, which says nothing of the
noise, and is the same bits whoever encrypted it. How coarse is worked out when the aggregator is built, with room for
thirteen standard deviations.

Whoever has no key can still compute with ciphertexts: add one twice, leave one out, put one in another's place, add
numbers, multiply. Therefore every single ciphertext says, beside its share of the numbers, whose it is, and has tags:
sums of all of this times secret factors, modulo primes, which only who has the key can work out, and which are others
for every run, round, channel, length and place in a message. Tags of a sum are the sums of tags; those of anything
else that can be made of ciphertexts are right with a chance of less than one in 2^55. A silo opens nothing else.

This protects against a server, alone. **The server and any one silo together can decrypt every silo's update**: there
is one key. Where that matters, or there are more than a few silos, ``masked`` is what protects.

Sources: Cheon, Kim, Kim & Song 2017 ("Homomorphic encryption for arithmetic of approximate numbers"); Agrawal & Boneh
2009 ("Homomorphic MACs") for tags that add up; TenSEAL (Benaissa et al. 2021) over Microsoft SEAL.

Not here: how silos come by the key (``secure/silo_keys.py``).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foedus.core.aggregate import Aggregator, Sealed
from foedus.core.checks import check_number, check_whole
from foedus.core.coding import part, refused
from foedus.core.keystream import keystream
from foedus.core.values import Context, Message, State, Update
from foedus.errors import ConfigurationError, MissingExtra, NoGuarantee, Reason, SecureAggregationFailed, SumOverflow
from foedus.secure.fixed_point import Grid, whole_weight
from foedus.secure.primitives import derived, digest
from foedus.tree import Vector

DEGREE, MODULUS = 4096, (54, 54)  # 128 bits of security by the Homomorphic Encryption Standard (2018), table 1: ≤ 109
SLOTS = DEGREE // 2
CAPACITY = 51  # bits of the sum's numbers and of the scale they are encrypted at together; q has 54
SPREAD = math.sqrt(10.75 * SLOTS)  # a fresh ciphertext's noise in a slot, in units of 1 / scale: sub-Gaussian
TAIL = 13  # so many of them fit into a quarter of the grid's step: fails with a chance of about 2^−121 a number
SILOS = 64  # more of them keep no common secret
USUAL, LONGEST = 61_750, 1 << 17  # bytes of one ciphertext, about and at most
PRIMES = np.array([[536_870_909], [536_870_879], [536_870_869]])  # of tags: a change that one divides, two more notice
FACTOR = (1 << 29) - 1
ID = 16  # bytes by which keys are told apart


class SiloKey:
    """The key that silos share. Keep it from the server; ``bytes(key)`` is the secret itself.

    Attributes:
        id: 16 bytes that tell it from other keys, and nothing of it.

    Example:
        >>> key = silo_key()
        >>> SiloKey(bytes(key)).id == key.id, key
        (True, SiloKey(<secret>))
    """

    def __init__(self, secret: bytes) -> None:
        self._secret, root = bytes(secret), digest(bytes(secret))
        self.id = derived(root, b"foedus: id of a key for encrypted sums")[:ID]
        self._tags = derived(root, b"foedus: tags of encrypted sums")

    def __bytes__(self) -> bytes:
        return self._secret

    def __repr__(self) -> str:
        return "SiloKey(<secret>)"

    def tags(self, about: bytes) -> bytes:
        """The secret that the factors of tags about something come from."""
        return derived(self._tags, about)


def silo_key() -> SiloKey:
    """A fresh key, drawn from the operating system by SEAL. In a federation one silo makes it, see
    :mod:`foedus.secure.silo_keys`; in a simulation, in which one process plays all parts, whoever writes the script.

    Raises:
        MissingExtra: TenSEAL is not installed.

    Example:
        >>> silo_key().id == silo_key().id
        False
    """
    made = _library().context(
        _library().SCHEME_TYPE.CKKS, DEGREE, coeff_mod_bit_sizes=list(MODULUS),
        encryption_type=_library().ENCRYPTION_TYPE.SYMMETRIC, n_threads=1,
    )  # fmt: skip
    return SiloKey(_serialised(made, secret=True))


def encrypted(
    silos: int, *, key: SiloKey | None = None, bits: int = 20, bound: float = 1.0, most: int | None = None,
    least: int | None = None,
) -> Aggregator:  # fmt: skip
    """The mean of updates that are encrypted on their way and added up encrypted, for a few silos who trust each other
    more than the server.

    What stands before it in a chain must add up: ``chain(clip(1.0), encrypted(8, key=key))``. A message is large, some
    30 bytes for each parameter whatever ``bits`` is; ``encrypted(...).sealed`` says how large, and how large the error.

    Args:
        silos: how many there are, 3 to 64.
        key: the silos'; without it messages can be checked and added up, as the server does, and no more.
        bits: an entry is rounded, unbiased, to so many bits.
        bound: entries are cut to ±bound; ``clip(1.0)`` before it makes sure that none is beyond 1.
        most: weigh by the number of examples, of which at most so many count, rounded to whole ones; ``None``: all
            count the same.
        least: fewest silos in a sum that is decrypted; by default half of them, and 3 at least.

    Raises:
        NoGuarantee: too many share the key, or too small a sum would be shown.
        ConfigurationError: a sum could be too large to be decrypted.
        MissingExtra: TenSEAL is not installed.

    Example:
        >>> from foedus.core.aggregate import fold
        >>> rule = encrypted(4, key=silo_key(), bound=8.0)
        >>> contexts = [Context(seed=0, round=1, client=i, size=2) for i in range(3)]
        >>> sent = [rule.encode(Update(np.array([i, -4.0]), 1.0), c) for i, c in enumerate(contexts)]
        >>> total = fold(rule, [rule.admit(m, c) for m, c in zip(sent, contexts)])
        >>> rule.decode({}, total, contexts[0])[0].round(4).tolist()
        [1.0, -4.0]
    """
    check_whole("silos", silos, least=1)
    check_whole("bits", bits, least=2, most=24)
    check_number("bound", bound, above=True)
    if most is not None:
        check_whole("most", most, also=", or None")
    if key is not None and not isinstance(key, SiloKey):
        raise ConfigurationError(f"key is what silos share, e.g. silo_key(); not of type {type(key).__name__}")
    _check_silos(silos)
    floor = _floor(silos, least)
    told = f"encrypted({silos}, bits={bits}, bound={bound}"
    told += "" if most is None else f", most={most}"
    found = _Encrypted(silos, floor, most, Grid(bits, float(bound)), key, f"{told}, least={floor})")
    _check_capacity(found)
    _library()  # if it is not there, better now than in the first round
    return found.aggregator()


def _check_silos(silos: int) -> None:
    if silos > SILOS:
        raise NoGuarantee(
            f"{silos} silos would share one key, and any of them with the server could decrypt all updates: no secret "
            f"among so many, and 30 bytes a parameter for each. At most {SILOS}; for more, and for devices, write "
            f"foedus.masked(foedus.Withstand(clients={silos}, ...)), which needs no common key"
        )
    if silos < 3:
        raise NoGuarantee(
            f"among {silos} silos each finds the other's update by taking its own off the sum. There must be 3 at least"
        )


def _floor(silos: int, least: int | None) -> int:
    if least is None:
        return max(3, math.ceil(silos / 2))
    check_whole("least", least, most=silos, also=", or None")
    if least < 3:
        raise NoGuarantee(
            f"in a sum of {least} each silo finds the other's update by taking its own off. Write least=3, or more"
        )
    return int(least)


def _check_capacity(rule: _Encrypted) -> None:
    room = CAPACITY - rule.scale_bits
    largest = rule.silos * max(rule.grid.half * (rule.most or 1), int(PRIMES.max()))
    if largest.bit_length() <= room:
        return
    fits = rule.grid.bits - (largest.bit_length() - room)
    hint = f"bits={fits}" if fits >= 2 else "a smaller most="
    raise ConfigurationError(
        f"sums of {rule.silos} silos with {rule.grid.bits} bits an entry and weights up to {rule.most or 1} take "
        f"{largest.bit_length() + 1} bits, and there is room for {room + 1}. Write {hint}"
    )


class _Encrypted(NamedTuple):
    """An encrypted mean. Slots of every ciphertext hold entries, the last of them the weight; for every silo whether it
    is in the sum; and tags."""

    silos: int
    least: int
    most: int | None
    grid: Grid
    key: SiloKey | None
    label: str

    @property
    def scale_bits(self) -> int:
        """Numbers are encrypted times 2 to this power, so that a quarter of 1 is far above the noise of the sum."""
        return math.ceil(math.log2(TAIL * SPREAD * math.sqrt(self.silos))) + 2

    def aggregator(self) -> Aggregator:
        return Aggregator(
            init=lambda layout: {}, encode=self.encode, admit=self.admit, merge=self.merge, decode=self.decode,
            additive=True, label=self.label,
            sealed=Sealed(
                self.silos, self.least, self._cost, self.grid.step, -_chance(self.silos, self.scale_bits), self.keyed,
                self.open, self.opened,
            ),
        )  # fmt: skip

    def keyed(self, secret: bytes) -> Aggregator:
        """The same at a silo, which has the key."""
        if not _context(bytes(secret)).has_secret_key():
            raise ConfigurationError("this key has no secret in it, and decrypts nothing; silo_key() makes a whole one")
        return self._replace(key=SiloKey(secret)).aggregator()

    def _cost(self, size: int) -> int:
        """Bytes of a message for an update of so many entries, about."""
        return self._ciphertexts(size) * (USUAL + 8) + ID

    @property
    def _room(self) -> int:
        """Entries that a ciphertext has room for."""
        return SLOTS - self.silos - len(PRIMES)

    def _ciphertexts(self, size: int) -> int:
        return -(-(size + 1) // self._room)

    # --- at a silo

    def encode(self, update: Update, context: Context) -> Message:
        rows = self._rows(update, context)
        own, scale = _context(bytes(self._known())), 2.0**self.scale_bits
        made = [_library().ckks_vector(own, row, scale).serialize() for row in rows.astype(np.float64)]
        return _joined(made) | {"key": np.frombuffer(self._known().id, np.uint8)}

    def _rows(self, update: Update, context: Context) -> NDArray[np.int64]:
        """What is encrypted, [ciphertext, slot]."""
        if not 0 <= context.client < self.silos:
            raise ConfigurationError(
                f"{self.label} adds up the updates of {self.silos} silos, and there is one at position "
                f"{context.client}. Write encrypted({context.client + 1}, ...), or more"
            )
        numbers = self._numbers(update, context)
        rows = np.zeros((self._ciphertexts(len(update.vector)), SLOTS), np.int64)
        flat = np.zeros(len(rows) * self._room, np.int64)
        flat[: len(numbers)] = numbers
        rows[:, : self._room] = flat.reshape(len(rows), -1)
        rows[:, self._room + context.client] = 1
        secret = self._secret(context, len(update.vector))
        for place, row in enumerate(rows):
            row[-len(PRIMES) :] = _tags(secret, place, row[: -len(PRIMES)])
        return rows

    def _numbers(self, update: Update, context: Context) -> NDArray[np.int64]:
        """Entries on the grid times the weight; the weight."""
        weight = 1 if self.most is None else whole_weight(update, self.most, context)
        entries = self.grid.codes(update, context).astype(np.int64)
        entries -= self.grid.half
        entries *= weight
        return np.append(entries, weight)

    def _secret(self, context: Context, size: int) -> bytes:
        """Where the factors of tags come from: the same for all silos, and for this alone."""
        about = self.label.encode(), context.channel.encode(), f"{context.seed} {context.round} {size}".encode()
        return self._known().tags(digest(*about))

    def _known(self) -> SiloKey:
        if self.key is None:
            raise NoGuarantee(
                f"{self.label} has no key here, and only silos have one: a server adds up what it cannot read. Silos "
                "write encrypted(..., key=key); a simulation, which plays all parts, encrypted(..., key=silo_key())"
            )
        return self.key

    # --- anywhere

    def admit(self, message: Message, context: Context) -> Message:
        """Ciphertexts are taken apart and written anew, so that whatever else was in the bytes is gone."""
        if not 0 <= context.client < self.silos:
            raise refused(f"is none of the {self.silos} silos that {self.label} is for", context)
        count = self._ciphertexts(context.size)
        lengths = part(message, "lengths", context, dtype="int64", shape=(count,))
        if (lengths < 1).any() or (lengths > LONGEST).any():
            raise refused("sent ciphertexts of impossible lengths", context, Reason.RANGE)
        values = part(message, "values", context, dtype="uint8", shape=(int(lengths.sum()),))
        key = part(message, "key", context, dtype="uint8", shape=(ID,))
        if self.key is not None and key.tobytes() != self.key.id:
            raise refused("sent ciphertexts under another key than this silo's", context)
        found = [self._checked(raw, context) for raw in _parted(values, lengths)]
        return _joined(found) | {"key": key.copy(), "count": np.ones(1, np.int64)}

    def _checked(self, raw: bytes, context: Context) -> bytes:
        scale = 2.0**self.scale_bits
        try:
            vector = _library().ckks_vector_from(_context(_public()), raw)
            again: bytes = vector.serialize()
            sound = _is_sound(vector, scale) and again[-8:] == struct.pack("<d", scale)  # TenSEAL writes it once more
        except (ValueError, RuntimeError) as error:
            raise refused(f"sent what is no ciphertext: {str(error).splitlines()[0]}", context) from None
        if not sound:
            raise refused("sent a ciphertext of another size or scale than are added up", context)
        return again

    def merge(self, a: Message, b: Message) -> Message:
        if len(a["lengths"]) != len(b["lengths"]):
            raise ConfigurationError(
                f"messages of {len(b['lengths'])} and {len(a['lengths'])} ciphertexts do not add up"
            )
        if a["key"].tobytes() != b["key"].tobytes():
            raise SecureAggregationFailed(
                "they are encrypted under different keys, and nobody could decrypt the sum. All silos must have one "
                "and the same"
            )
        count = a["count"] + b["count"]
        if count[0] > self.silos:
            raise SumOverflow(f"{int(count[0])} messages are to be added up, and {self.label} has {self.silos} silos")
        pairs = zip(_parted(a["values"], a["lengths"]), _parted(b["values"], b["lengths"]), strict=True)
        return _joined([_added(*pair) for pair in pairs]) | {"key": a["key"], "count": count}

    # --- at the silos

    def open(self, message: Message, context: Context) -> Message:
        """The sum as whole numbers, once it is found to be what it is said to be."""
        _check_form(message)
        if message["key"].tobytes() != self._known().id:
            raise SecureAggregationFailed("the sum is encrypted under another key than this silo's")
        size, ciphertexts = context.size, _parted(message["values"], message["lengths"])
        if len(ciphertexts) != self._ciphertexts(size):
            raise SecureAggregationFailed(
                f"the sum has {len(ciphertexts)} ciphertexts where an update of {size} entries has "
                f"{self._ciphertexts(size)}"
            )
        own, scale = _context(bytes(self._known())), 2.0**self.scale_bits
        rows = np.stack([_whole(_decrypted(own, raw, scale)) for raw in ciphertexts])
        self._check_marks(rows[:, self._room : -len(PRIMES)], message, context)
        self._check_tags(rows, context)
        found = rows[:, : self._room].reshape(-1)[: size + 1]
        return {"sum": found[:size], "weight": found[size:], "count": message["count"]}

    def _check_marks(self, marks: NDArray[np.int64], message: Message, context: Context) -> None:
        """Whether every ciphertext is of the same silos, enough, each once, as the server says."""
        there = marks[0]
        count = int(there.sum())
        if not np.isin(marks, (0, 1)).all():
            raise SecureAggregationFailed(
                "the decrypted sum holds a silo twice, or something else than silos' updates: whoever added it up did "
                "not do as told. Nothing of it is used"
            )
        if (marks != there).any():
            raise SecureAggregationFailed(
                "the decrypted sum is of other silos in one place than in another: whoever added it up put ciphertexts "
                "of several sums together. Nothing of it is used"
            )
        if count != int(message["count"][0]) or count < self.least:
            raise SecureAggregationFailed(
                f"{count} silos are in the sum, said to be {int(message['count'][0])}, and {self.label} shows no sum "
                f"of fewer than {self.least}"
            )
        if 0 <= context.client < self.silos and not there[context.client]:
            raise SecureAggregationFailed(
                f"the update of client {context.client}, who is asked to decrypt the sum, is not in it"
            )

    def _check_tags(self, rows: NDArray[np.int64], context: Context) -> None:
        """Whether every ciphertext is a sum of what silos encrypted for this place, and of nothing else."""
        secret = self._secret(context, context.size)
        for place, row in enumerate(rows):
            numbers, tags = row[: -len(PRIMES)], row[-len(PRIMES) :]
            if (tags % PRIMES[:, 0] != _tags(secret, place, numbers)).any():
                raise SecureAggregationFailed(
                    f"ciphertext {place + 1} of {len(rows)} is no sum of what silos encrypted there for "
                    f"{context.channel!r} in round {context.round}: it was changed, or is of another place, another "
                    "round or another run. Nothing of it is used"
                )

    # --- anywhere again

    def opened(self, message: Message, count: int, context: Context) -> Message:
        """What a silo says that a sum opens to, if so many updates can add up to it."""
        weight = part(message, "weight", context, dtype="int64", shape=(1,))
        whole = part(message, "sum", context, dtype="int64", shape=(context.size,))
        if not count <= int(weight[0]) <= count * (self.most or 1):
            raise refused(f"says that {count} updates weigh {int(weight[0])} together", context, Reason.WEIGHT)
        most = self.grid.half * int(weight[0])
        if whole.size and not (-most <= int(whole.min()) and int(whole.max()) <= most):
            raise refused("says that a sum opens to numbers that none can have", context, Reason.RANGE)
        return {"sum": whole.copy(), "weight": weight.copy(), "count": np.array([count], np.int64)}

    def decode(self, state: State, message: Message, context: Context) -> tuple[Vector, State]:
        """The mean; of a sum in the open as it is, of an encrypted one by the key."""
        found = message if "sum" in message else self.open(message, context)
        return found["sum"] * (self.grid.step / int(found["weight"][0])), state


def forced(message: Message, key: SiloKey, *, silos: int) -> NDArray[np.float64]:
    """What the entries in ciphertexts decrypt to under a key, whichever it is, [entry, and room for more]: for an
    attacker, who has no other way to make numbers of them. Under another key than their own they are as good as drawn
    at random, and nothing here is checked: silos open sums by ``encrypted(...)``, which refuses these.

    Args:
        message: of a client, admitted or not.
        key: any, e.g. one of the attacker's own.
        silos: of the aggregator, which decide what of a ciphertext is entries.

    Example:
        >>> rule, context = encrypted(4, key=silo_key()), Context(seed=0, round=1, client=0, size=2)
        >>> sent = rule.encode(Update(np.array([0.5, -0.5]), 1.0), context)
        >>> bool(np.abs(forced(sent, silo_key(), silos=4)).min() > 1)
        True
    """
    own, room = _context(bytes(key)), SLOTS - silos - len(PRIMES)
    found = [_decrypted(own, raw, None)[:room] for raw in _parted(message["values"], message["lengths"])]
    return np.concatenate(found)


# --- TenSEAL ------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _library() -> Any:
    """Imported on first use."""
    try:
        import tenseal
    except ImportError:
        raise MissingExtra("tenseal", "he", "encrypted sums") from None
    return tenseal


def _check_form(message: Message) -> None:
    """Refuse what is no sum, whoever sent it."""
    forms = {"values": ("uint8", None), "lengths": ("int64", None), "key": ("uint8", ID), "count": ("int64", 1)}
    for name, (dtype, length) in forms.items():
        array = message.get(name)
        if array is None or array.dtype != dtype or array.ndim != 1 or (length is not None and len(array) != length):
            raise SecureAggregationFailed(f"this is no encrypted sum: its {name} are not what they must be")
    lengths = message["lengths"]
    if (lengths < 1).any() or (lengths > 2 * LONGEST).any() or int(lengths.sum()) != len(message["values"]):
        raise SecureAggregationFailed("this is no encrypted sum: its ciphertexts are of impossible lengths")


@lru_cache(maxsize=8)
def _context(serialised: bytes) -> Any:
    try:
        return _library().context_from(serialised, n_threads=1)
    except (ValueError, RuntimeError):
        raise ConfigurationError("this is no key of encrypted sums; silo_key() makes one") from None


@lru_cache(maxsize=1)
def _public() -> bytes:
    """The parameters alone, with which ciphertexts are added and nothing can be read."""
    return _serialised(_context(bytes(silo_key())), secret=False)


def _serialised(context: Any, *, secret: bool) -> bytes:
    found: bytes = context.serialize(
        save_public_key=False, save_secret_key=secret, save_galois_keys=False, save_relin_keys=False
    )
    return found


def _decrypted(own: Any, ciphertext: bytes, scale: float | None) -> NDArray[np.float64]:
    """What is in the slots, [slot]; of a ciphertext that must have a scale, unless it may have any."""
    try:
        vector = _library().ckks_vector_from(own, ciphertext)
        if scale is not None and not _is_sound(vector, scale):
            raise SecureAggregationFailed(
                "the sum has a ciphertext of another size, scale or level than silos encrypt. Nothing of it is used"
            )
        return np.array(vector.decrypt(), np.float64)
    except (ValueError, RuntimeError) as error:
        told = str(error).splitlines()[0]
        raise SecureAggregationFailed(f"the sum is no ciphertext of a silo's key: {told}. Nothing is used") from None


def _is_sound(vector: Any, scale: float) -> bool:
    """Whether it is one ciphertext of the size, the scale and the level at which silos encrypt."""
    if vector.size() != SLOTS or len(vector.ciphertext()) != 1:
        return False
    (only,) = vector.ciphertext()
    return bool(
        only.scale == scale and only.size() == 2 and only.coeff_modulus_size() == 1 and not only.is_transparent()
    )


def _whole(numbers: NDArray[np.float64]) -> NDArray[np.int64]:
    """The whole numbers that decrypted ones are, int64 [slot]."""
    whole = np.rint(numbers)
    if not np.abs(numbers - whole).max(initial=0.0) <= 0.25:
        raise SecureAggregationFailed(
            "the decrypted sum is not made of whole numbers: ciphertexts were changed on the way, or added to "
            "something else. Nothing of it is used"
        )
    return whole.astype(np.int64)


def _tags(secret: bytes, place: int, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """The tags of the numbers of the ciphertext at a place of a message, [tag]."""
    stream = keystream(derived(secret, struct.pack("<Q", place)), 4 * len(PRIMES) * len(numbers))
    factors = np.frombuffer(stream, "<u4").reshape(len(PRIMES), -1) & FACTOR
    found: NDArray[np.int64] = (numbers % PRIMES * factors % PRIMES).sum(1) % PRIMES[:, 0]
    return found


def _added(a: bytes, b: bytes) -> bytes:
    there, read = _context(_public()), _library().ckks_vector_from
    try:
        total = read(there, a)
        total.add_(read(there, b))
    except (ValueError, RuntimeError) as error:  # SEAL refuses a sum that would be readable without a key
        raise SecureAggregationFailed(f"two ciphertexts do not add up: {str(error).splitlines()[0]}") from None
    found: bytes = total.serialize()
    return found


def _joined(ciphertexts: Sequence[bytes]) -> Message:
    """Ciphertexts end to end, and their lengths."""
    lengths = np.array([len(c) for c in ciphertexts], np.int64)
    return {"values": np.frombuffer(b"".join(ciphertexts), np.uint8), "lengths": lengths}


def _parted(values: NDArray[np.uint8], lengths: NDArray[np.int64]) -> list[bytes]:
    ends = np.cumsum(lengths).tolist()
    raw = values.tobytes()
    return [raw[end - int(n) : end] for end, n in zip(ends, lengths, strict=True)]


def _chance(silos: int, scale_bits: int) -> float:
    """The logarithm to base 2 of the chance that the noise of a number of the sum exceeds a quarter."""
    room = 2.0 ** (scale_bits - 2) / (SPREAD * math.sqrt(silos))
    return 1 - room**2 / (2 * math.log(2))
