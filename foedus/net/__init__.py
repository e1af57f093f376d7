"""The running system: server, client agent, transports, stores. Async; owns clocks, sockets and disks."""
