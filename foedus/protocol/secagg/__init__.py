"""Secure aggregation as a conversation: a server learns the sum of its clients' numbers, and nothing of any one of
them.

**The idea** (Bonawitz et al. 2017, with the graph of Bell et al. 2020). Every client agrees a key with each of its
neighbours, and adds to its numbers a mask made of that key; the neighbour takes the same mask off, and so all of these
cancel in the sum. A mask of its own on top, from a seed, covers what it sent if it turns out late rather than lost.
Keys and seeds are shared among the neighbours: of whoever is in the sum they tell the server their shares of the
*seed*, of whoever was lost those of the *key*, and never both. What remains when all masks are off is the sum.

**How a transport drives it.** For every client of the attempt, :func:`~foedus.protocol.secagg.client.begin` with the
:class:`~foedus.protocol.secagg.messages.Terms`, and then :func:`~foedus.protocol.secagg.client.step` with each message
that comes; for the server :func:`~foedus.protocol.secagg.server.open_attempt` and
:func:`~foedus.protocol.secagg.server.step`. Both give back actions: write this to disk, send that. The order for a
client is

    keys → shares → masked numbers → (vote →) answer

with a message of the server's before each but the first. The transport does five things besides: it authenticates who
sends and puts the sender's slot beside the message; it delivers at least once (what comes twice is answered alike); it
says ``Close`` when time is up for a phase; it carries out ``Remember`` durably before it sends what follows; it
announces another attempt, with a number one higher and a fresh graph, when one has failed. A state is never written to
disk: secrets of an attempt die with it. The model is named by its digest, which a client computes from what it
received.

**Against a server that lies** (``Withstand(malicious=True)``) clients sign their keys and the set of survivors they
were shown with identities that the server did not issue.

Not here: numbers (``foedus.secure.masked``), cryptography (``foedus.secure.primitives``), sockets.
"""
