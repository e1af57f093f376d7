"""What makes a round, whichever way it runs: a client's visit, the collecting of what clients send, and the commit.

``foedus.sim`` carries rounds out on one machine, ``foedus.net`` between machines; both use these functions, so that
the same task and algorithm give the same model. Nothing here opens sockets or knows a clock.
"""
