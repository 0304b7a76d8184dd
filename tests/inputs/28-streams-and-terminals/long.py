"""Its first trial fails in its own code, its second one reports for longer than a worker is silent."""

import threading
import time


def fails():
    print("about to fail")
    return [][3]


def objective(trial):
    if trial.number == 0:
        fails()
    began, step = time.monotonic(), 0
    while time.monotonic() < began + 11:
        step += 1
        trial.report(step / 4, step)
        threading.Event().wait(0.25)
    return 1.0
