"""Who is who between machines: a server's own authority, clients' keys, join tokens, sessions and tickets.

The way in, for a silo (a hospital) and, without the certificate, for a device:

    join command: address, pin, token                      (copied by a person, once)
      → document, checked against the pin                  ``authority.py``, ``tls.py``
      → enrolment: token + own public key → position, certificate   ``directory.py``, ``access.py``
      → session: challenge → proof by the own key → ticket ``sessions.py``
      → every request: ticket, over a connection that proves the certificate → `Caller`

What the server sends to be run or trained from is signed by a key that the pinned authority vouches for
(``signed.py``), whatever stands between. docs/threat-model.md has what this defends against, and what not.

Not here: what members may do in a run (``protocol``), the agent's own rules (``net/agent.py``).
"""
