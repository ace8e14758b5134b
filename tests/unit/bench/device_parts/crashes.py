import os
import signal

from benchmarks.device.task import Outcome


def run(task):
    task.keep(Outcome(state="unfinished", line="two of three", found={"done": 2}))
    os.kill(os.getpid(), signal.SIGSEGV)
