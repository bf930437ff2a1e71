"""Typed clients of the host daemon's API.

``host`` is the client, typed by the table in ``wire.endpoints``; ``route`` is how a host is reached (Unix socket or
mutual TLS) and found; ``http`` is one HTTP/1.1 connection; ``console`` ties a terminal to a VM's serial console.

Everything here is synchronous and imports little: a command's start-up is part of every move's wall time.
"""
