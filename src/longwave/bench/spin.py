"""One process of the gap probe: for every number of seconds on stdin, spin so long and print the share of it lost.

Run as a script by `quiet.GapProbe`, without site packages, so that it starts at once and holds no memory.
"""

import sys
import time

GAP = 2e-4  # seconds between two looks at the clock that nothing but another program explains


def lost_share(seconds: float) -> float:
    """The share of `seconds` of spinning that went in gaps of more than GAP."""
    last = start = time.perf_counter()
    lost = 0.0
    while last - start < seconds:
        now = time.perf_counter()
        if now - last > GAP:
            lost += now - last
        last = now
    return lost / (last - start)


if __name__ == "__main__":
    for line in sys.stdin:
        print(lost_share(float(line)), flush=True)
