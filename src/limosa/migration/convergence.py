"""What to do while a move does not come to its end; pure.

A pre-copy move ends when what remains can be sent within the downtime limit. The policy watches the least that ever
remained: as long as that keeps falling it waits. When it stalls, it takes the next step, cheapest for the guest first:

1. raise the downtime limit to what is needed, within the VM's blackout budget;
2. slow the guest's processors (auto-converge), step by step, where that is safe;
3. switch to post-copy, if that was allowed;
4. begin anew, once, so that the guest can be slowed though that is not safe;
5. give up, with the reason.

Every step restarts the clock, there are finitely many, and the last one ends the move: it never loops for ever.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from limosa.model.units import format_bytes, format_rate
from limosa.qemu.protocol import MigrationStatistics
from limosa.settings.host import ConvergencePolicy

#: What remains counts as fallen when it is below this share of the least seen so far.
PROGRESS = 0.9
#: Seconds without progress before the limit is raised, and before each step that slows the guest.
STALL_S = 0.5
THROTTLE_STALL_S = 2.0
THROTTLE_STEP_PERCENT = 20
#: Seconds after which it is said that nothing is sent. Nothing is done for what the guest writes when that is so.
SILENT_S = 2.0
#: Room for the estimate of bandwidth to be wrong when the limit is set to what is needed.
MARGIN = 1.25


@dataclass(frozen=True)
class Wait:
    """Do nothing; ``note`` says in words what it waits for."""

    note: str


@dataclass(frozen=True)
class RaiseDowntimeLimit:
    """Let the blackout be up to ``milliseconds`` long."""

    milliseconds: float
    note: str


@dataclass(frozen=True)
class Hold:
    """Let the guest stop only when nothing remains."""

    note: str


@dataclass(frozen=True)
class Throttle:
    """Slow the guest's processors by up to ``max_percent``."""

    max_percent: int
    note: str


@dataclass(frozen=True)
class StartPostCopy:
    """Run the guest at the destination now and fetch the rest behind it."""

    note: str


@dataclass(frozen=True)
class BeginAnew:
    """Begin the copy anew, so that the guest can be slowed."""

    why: str


@dataclass(frozen=True)
class GiveUp:
    """End the move; the VM stays where it is. ``is_silent``: not because of what the guest writes, but because nothing
    arrives."""

    why: str
    is_silent: bool = False


Action = Wait | RaiseDowntimeLimit | Hold | Throttle | StartPostCopy | BeginAnew | GiveUp


@dataclass(frozen=True)
class Convergence:
    """The policy and what it has seen. ``judge`` returns the next value; nothing is changed in place."""

    policy: ConvergencePolicy
    downtime_limit_ms: float
    #: whether the guest can be slowed in this try
    slows: bool = True
    least_remaining: float = float("inf")
    most_transferred: int = 0
    #: when anything was sent last
    sent_at: float | None = None
    progress_at: float | None = None
    throttle_percent: int = 0
    in_post_copy: bool = False
    is_held: bool = False

    @classmethod
    def begin(cls, policy: ConvergencePolicy, *, slows: bool = True) -> Convergence:
        """The state of a try that has just started."""
        return cls(policy, policy.first_downtime_ms, slows)

    def judge(self, at: float, look: MigrationStatistics) -> tuple[Convergence, Action]:
        """What to do after this look, taken at ``at`` (seconds of any steady clock), and the state after doing it."""
        if self.is_held:
            return replace(self, is_held=False), RaiseDowntimeLimit(self.downtime_limit_ms, self._note(look))
        return self._sent(at, look)._judge(at, look)

    def hold(self, at: float, note: str) -> tuple[Convergence, Action]:
        """Instead of :meth:`judge`, when the guest should not stop yet for another reason than its memory."""
        held = replace(self, is_held=True, progress_at=at, sent_at=at)
        return held, Wait(note) if self.is_held else Hold(note)

    def _sent(self, at: float, look: MigrationStatistics) -> Convergence:
        if self.sent_at is None or look.transferred_bytes > self.most_transferred:
            return replace(self, most_transferred=look.transferred_bytes, sent_at=at)
        return self

    def _judge(self, at: float, look: MigrationStatistics) -> tuple[Convergence, Action]:
        silent_s = at - (self.sent_at if self.sent_at is not None else at)
        if silent_s > STALL_S:
            return self, self._wait_or_end(look, silent_s)
        if self._has_progress(look):
            return self._seen(at, look), Wait(self._note(look))
        stalled_s = at - (self.progress_at if self.progress_at is not None else at)
        if stalled_s < (THROTTLE_STALL_S if self.throttle_percent else STALL_S):
            return self, Wait(self._note(look))
        return self._escalate(at, look, stalled_s)

    def _has_progress(self, look: MigrationStatistics) -> bool:
        if self.progress_at is None or look.iteration <= 1 or self.in_post_copy:
            return True
        return look.remaining_bytes < self.least_remaining * PROGRESS

    def _seen(self, at: float, look: MigrationStatistics) -> Convergence:
        # In the first pass what remains was mostly not sent once yet: no measure of the guest's writing.
        least = self.least_remaining if look.iteration <= 1 else look.remaining_bytes
        return replace(self, progress_at=at, least_remaining=least)

    def _wait_or_end(self, look: MigrationStatistics, silent_s: float) -> Action:
        if silent_s < self.policy.patience_s:
            return Wait(f"no memory has been sent for {silent_s:.0f} s" if silent_s >= SILENT_S else self._note(look))
        return GiveUp(f"no memory could be sent for {self.policy.patience_s:g} s", is_silent=True)

    def _escalate(self, at: float, look: MigrationStatistics, stalled_s: float) -> tuple[Convergence, Action]:
        policy = self.policy
        if self.downtime_limit_ms < policy.blackout_budget_ms:
            limit = min(policy.blackout_budget_ms, max(2 * self.downtime_limit_ms, self._needed_ms(look) * MARGIN))
            note = f"{self._writes(look)}; a blackout of up to {limit:.0f} ms is planned"
            return replace(self, downtime_limit_ms=limit, progress_at=at), RaiseDowntimeLimit(limit, note)
        if policy.auto_converge and self.slows and self.throttle_percent < policy.max_throttle_percent:
            percent = min(policy.max_throttle_percent, self.throttle_percent + THROTTLE_STEP_PERCENT)
            note = f"{self._writes(look)}; its processors are slowed by up to {percent} %"
            return replace(self, throttle_percent=percent, progress_at=at), Throttle(percent, note)
        if policy.post_copy:
            note = f"{self._writes(look)}; it continues at the destination, its memory follows"
            return replace(self, in_post_copy=True, progress_at=at), StartPostCopy(note)
        if policy.auto_converge and not self.slows:
            return self, BeginAnew(self._writes(look))
        if stalled_s < self.policy.patience_s:
            return self, Wait(self._note(look))
        return self, GiveUp(f"{self._writes(look)}; nothing helped for {self.policy.patience_s:g} s")

    def _needed_ms(self, look: MigrationStatistics) -> float:
        least = min(self.least_remaining, look.remaining_bytes)
        return 1000 * least / look.rate_bytes_per_s if look.rate_bytes_per_s > 0 else float("inf")

    def _writes(self, look: MigrationStatistics) -> str:
        if look.dirty_rate_bytes_per_s > 0 and look.rate_bytes_per_s > 0:
            dirty, rate = format_rate(look.dirty_rate_bytes_per_s), format_rate(look.rate_bytes_per_s)
            return f"the guest writes {dirty}, the network carries {rate}"
        return f"{format_bytes(look.remaining_bytes)} of memory remain to be sent again"

    def _note(self, look: MigrationStatistics) -> str:
        if look.iteration <= 1:
            return "copying memory"
        if self.in_post_copy:
            return "memory follows the guest (post-copy)"
        if self.throttle_percent:
            return f"{self._writes(look)}; its processors are slowed by up to {self.throttle_percent} %"
        return "sending again what the guest wrote meanwhile"
