"""The staged copy of the newest checkpoint, kept in this host's memory after its trainer has died.

    spoil     a newer state is about to be copied over it
    keep      it is a checkpoint now: whoever loads that one on this host may read it from here

One keeper per rank (`storage.host_memory`), started with the trainer. To keep nothing costs a
restart its speed and no checkpoint its safety, so that no error here fails a save.
"""

import logging
from collections.abc import Sequence

from ray_ckpt.storage.host_memory.copies import FileInMemory, Keeper
from ray_ckpt.tensors.staging import Stager

log = logging.getLogger("ray_ckpt")


class KeptCopy:
    """Of the state that one stager, whose memory is shared, copies."""

    def __init__(self, stager: Stager, *, stays_s: float) -> None:
        self._stager = stager
        self._stays_s = stays_s
        self._keeper = Keeper(stays_s=stays_s)

    def spoil(self) -> None:
        """Nobody takes what is staged from now on for the last checkpoint."""
        self._keeper.spoil()

    def keep(self, step: int, files: Sequence[FileInMemory]) -> None:
        """The files of the step, which is committed, are held, and no others."""
        segments = {segment.number: segment.descriptor for segment in self._stager.segments}
        try:
            self._keeper.hold(files, segments)
        except OSError as error:
            log.warning(
                "step-%d is safe, but this host's memory does not keep a copy of it: %s",
                step,
                error,
            )
            self._keeper.close()
            self._keeper = Keeper(stays_s=self._stays_s)

    def close(self) -> None:
        """Nothing is kept."""
        self._keeper.close()
