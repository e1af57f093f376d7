"""The conversation between machines, without I/O: messages, wire format, state machines."""
