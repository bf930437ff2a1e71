"""What can go wrong inside a relay. None of it leaves the process but as text; see ``client`` for what users see."""


class BrokenStream(Exception):
    """What came over a carrier cannot be right, or it ended early. The session ends."""


class ConnectionLost(BrokenStream):
    """A connection broke or ended. Where there are others, the session goes on over those."""


class WorkerLost(Exception):
    """The compressing process died. The session goes on without it."""
