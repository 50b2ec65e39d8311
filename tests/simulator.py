"""Blocks of simulated CUDA threads that wait for each other without polling: the tests run several times faster."""

import threading

import numpy as np
from numba.cuda.simulator import kernel


class Thread(kernel.BlockThread):
    def syncthreads(self):
        self._manager.wait()

    def run(self):
        super().run()
        self._manager.leave()


class Block(kernel.BlockManager):
    def run(self, grid_point, *args):
        points = list(np.ndindex(*self._block_dim))
        self.condition, self.live, self.waiting, self.phase = threading.Condition(), len(points), 0, 0
        threads = [Thread(lambda: self._f(*args), self, grid_point, p, self._debug) for p in points]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for thread in threads:
            if thread.exception:
                raise thread.exception[0].with_traceback(thread.exception[1])

    def wait(self):
        """Wait until all threads that have not ended wait."""
        with self.condition:
            phase = self.phase
            self.waiting += 1
            self._go_on()
            self.condition.wait_for(lambda: self.phase != phase)

    def leave(self):
        with self.condition:
            self.live -= 1
            self._go_on()

    def _go_on(self):
        if self.waiting and self.waiting == self.live:
            self.waiting = 0
            self.phase += 1
            self.condition.notify_all()


def install():
    kernel.BlockManager = Block
