import subprocess
import sys
import time

from benchmarks.device.task import Outcome


def run(task):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    task.keep(Outcome(state="unfinished", line="one of three", found={"child": child.pid}))
    time.sleep(600)
