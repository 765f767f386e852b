"""What SIGINT and SIGTERM do to a run: it stops where no step is half done.

    with Signals() as signals:
        ...                        # a signal raises KeyboardInterrupt
        hold_signals()             # from here on it waits
        signals.release()          # if there was one, KeyboardInterrupt is raised here

grpo.train catches it and writes a checkpoint.
"""

from __future__ import annotations

import os
import signal

from world import ALONE, World


class Signals:
    """What SIGINT and SIGTERM do during training; a context manager that installs the handlers.

    The first signal stops the run at a point where no step is half done. If the weights have not changed yet,
    it raises KeyboardInterrupt at once and the step under way is dropped, because a step of a large model
    takes minutes and schedulers wait 30 seconds. From `hold` to `release` it waits: that is from the first
    change of the weights until the step is recorded and its checkpoint, if one is due, is written. A second
    signal ends the program at once, unless a checkpoint is being written, which is always completed.

    With several processes all have to stop at the same point. So a signal is kept until the next `hold` or
    `release`, where the processes ask each other. A terminal sends Ctrl-C to torchrun and to the processes,
    and torchrun sends its signal after it, so a second one does not end the program. torchrun kills its
    processes 30 seconds after a signal (--shutdown-timeout)."""

    installed: Signals | None = None

    def __init__(self, world: World = ALONE):
        self.world, self.received, self.held, self.writing = world, 0, False, False

    def __enter__(self):
        self.previous = {s: signal.signal(s, self) for s in (signal.SIGINT, signal.SIGTERM)}
        Signals.installed = self
        return self

    def __exit__(self, *error):
        Signals.installed = None
        # After an error of one process torchrun sends SIGTERM to all. The handlers stay, so that this process
        # can still print its error.
        if self.world.size > 1 and error[0]:
            return
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def __call__(self, number, frame):
        self.received += 1
        if self.writing or self.world.size > 1:
            return
        if self.received > 1:
            os._exit(130)
        if not self.held:
            raise KeyboardInterrupt

    def hold(self):
        """From here on a signal waits for `release`. If one of several processes has one, all stop here."""
        if self.world.size > 1 and not self.held:
            self.release()
        self.held = True

    def release(self):
        """Raises KeyboardInterrupt if a signal came meanwhile, to any of the processes."""
        self.held = False
        if self.world.most(self.received):
            raise KeyboardInterrupt


def hold_signals():
    """Lets a first signal wait until the step is recorded. Does nothing outside of training, so that `update`
    can be called from anywhere."""
    if Signals.installed:
        Signals.installed.hold()
