"""A state is a value: read a long text once, keep the state, and go on from it in several ways.

python examples/fork_a_state.py runs/demo README.md
"""

import sys
from pathlib import Path

import longwave


def main(folder: str, file: str) -> None:
    model = longwave.load(folder)
    text = Path(file).read_text(encoding="utf-8")
    read = model.complete(text, max_tokens=0)  # in pieces: memory does not grow with the text
    print(f"read {len(text):,} characters; the state takes {read.state.nbytes / 2**20:.2f} MiB")
    for seed in range(3):
        told = model.complete("\nIn short: ", max_tokens=60, temperature=0.8, seed=seed, state=read.state)
        print(f"\n{seed}: {told.text!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
