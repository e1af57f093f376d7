"""The server's core: messages and the time come in, messages go out.

It is synchronous and deterministic: it opens no socket, reads no clock, and draws keys from a source that it is given.
The very same object runs behind HTTP (``net/http.py``), in memory (tests), and in the simulation of faults.

    message, time ─▶ front ─▶ admission   who is let in, and with which orders
                          ├─▶ taking      updates into the sum          ├─▶ masks     turns of masked sums
                          ├─▶ steps       commits, and what is next     ├─▶ giving    what clients may fetch
                          ├─▶ safe        what of a round is on a disk  ╰─▶ recovery  going on from what is written
                          all of them ─▶ driver: the machine of a run; persist, then act

Every part has one reason to change, and sees the others only as far as it is given them.

Not here: who somebody is (``net/identity``), what a round makes (``net/learning.py``), bytes on their way
(``net/uploads.py``).
"""

from foedus.net.coordinator.front import Coordinator
from foedus.net.coordinator.ground import Ground, Who
from foedus.net.coordinator.steps import METRICS, TIMINGS

__all__ = ["METRICS", "TIMINGS", "Coordinator", "Ground", "Who"]
