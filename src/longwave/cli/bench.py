"""`longwave bench`: measure operators and models, beside other libraries where installed."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Annotated, Any, Literal

import torch
from cyclopts import Parameter

from longwave.bench.first_call import first_calls, nothing_compiled
from longwave.bench.machine import machine
from longwave.bench.model import Work
from longwave.bench.model import run as run_model
from longwave.bench.ops import run as run_ops
from longwave.bench.quiet import GapProbe
from longwave.bench.timing import Harness
from longwave.cli.options import chosen, make_app, options_of, print_json
from longwave.config import nearest
from longwave.errors import LongwaveError, UsageError
from longwave.models.presets import PRESETS
from longwave.training.job import pick_device

HarnessOptions = options_of(Harness.Config)
WorkOptions = options_of(Work)
PeerName = Literal["transformers", "mambapy", "llama.cpp", "mamba_ssm"]

app = make_app(
    "bench",
    (
        "longwave bench ops --op selective_scan --op ssd",
        "longwave bench ops --device cuda --peers",
        "longwave bench model mamba-130m",
        "longwave bench model mamba2-130m --peers llama.cpp --train 0 --json",
        "longwave bench model mamba2-130m --device cuda --train 2048 --batch 8 --update",
    ),
)


@app.command
def ops(
    *,
    op: tuple[str, ...] = (),
    device: str = "cpu",
    peers: Annotated[bool, Parameter(negative="--no-peers")] = True,
    sizes: Literal["small", "full"] = "full",
    first_call: bool = False,
    harness: Annotated[HarnessOptions, Parameter(name="*")] = HarnessOptions(),  # pyright: ignore[reportInvalidTypeForm]  # noqa: B008
    no_gate: bool = False,
    threads: int | None = None,
    seed: int = 0,
    json: bool = False,
) -> None:
    """Time operators, forward and backward, beside plain torch, other libraries and the machine's best.

    Parameters
    ----------
    op
        An operator, a step or one of its cases; may be given several times. By default all.
    device
        cpu, or cuda: another set of cases, timed by the GPU's own clock.
    peers
        Time other libraries too. Those not installed are named.
    sizes
        full: on the CPU as in the 130M models, on a GPU those of large layers. small: to see that it works.
    first_call
        Begin with nothing compiled, and end with the seconds that first calls took.
    no_gate
        Accept every run, not only those between two looks at the machine that find it quiet. A GPU has no such gate.
    threads
        Of every library; by default torch's.
    seed
        Seed of the random inputs and weights.
    json
        One line of JSON only, without the tables.
    """

    where = pick_device(device)

    def run(harness: Harness, say: Callable[[str], None]) -> dict:
        with nothing_compiled() if first_call else nullcontext():
            found = run_ops(op, harness, device=where, sizes=sizes, peers=peers, seed=seed, say=say)
        if first_call:
            say(f"\n{first_calls(found['cases'])}")
        return found

    _report("ops", chosen(harness), where, not no_gate, threads, seed, json, run)


@app.command
def model(
    preset: str,
    *,
    device: str = "cpu",
    peers: Annotated[tuple[PeerName, ...] | None, Parameter(consume_multiple=True)] = None,
    work: Annotated[WorkOptions, Parameter(name="*")] = WorkOptions(),  # pyright: ignore[reportInvalidTypeForm]  # noqa: B008
    harness: Annotated[HarnessOptions, Parameter(name="*")] = HarnessOptions(),  # pyright: ignore[reportInvalidTypeForm]  # noqa: B008
    no_gate: bool = False,
    threads: int | None = None,
    seed: int = 0,
    json: bool = False,
) -> None:
    """Time a model of random weights: prefill, decode and training step, in longwave and in its peers.

    All read the same checkpoint, and all in float32 must agree on its logits before anything is timed.

    Parameters
    ----------
    preset
        mamba-130m, mamba2-130m, or another size of the two.
    device
        cpu, or cuda.
    peers
        Libraries beside longwave; by default transformers, mambapy and llama.cpp on the CPU, mamba_ssm on a GPU, where
        it trains. Those not installed are named.
    no_gate
        Accept every run, not only those between two looks at the machine that find it quiet. A GPU has no such gate.
    threads
        Of every library; by default torch's.
    seed
        Seed of the random inputs and weights.
    json
        One line of JSON only, without the tables.
    """
    if preset not in PRESETS:
        raise UsageError(f"there is no preset {preset!r}.{nearest(preset, PRESETS)}")
    wanted, where = Work(**chosen(work)), pick_device(device)

    def run(harness: Harness, say: Callable[[str], None]) -> dict:
        config = PRESETS[preset]()
        return {"model": preset} | run_model(config, harness, wanted, peers=peers, device=where, seed=seed, say=say)

    _report("model", chosen(harness), where, not no_gate, threads, seed, json, run)


def _report(
    benchmark: str,
    options: dict[str, Any],
    device: torch.device,
    gate: bool,
    threads: int | None,
    seed: int,
    json: bool,
    run: Callable[[Harness, Callable[[str], None]], dict],
) -> None:
    """Run a benchmark; print its tables as they come, and one line of JSON last.

    Raises LongwaveError after it if contenders disagreed.
    """
    if threads is not None:
        if threads < 1:
            raise UsageError(f"bench: threads must be at least 1, got {threads}")
        torch.set_num_threads(threads)
    config, facts, gate = Harness.Config(**options), machine(device), gate and device.type == "cpu"
    settings = options | {"gate": gate, "seed": seed}

    def say(text: str) -> None:
        if not json:
            print(text, flush=True)

    say("\n".join(f"{key:<18}{value}" for key, value in (facts | settings).items()))
    probe = GapProbe() if gate else None
    try:
        found = run(Harness(config, probe), say)
    finally:
        if probe:
            probe.close()
    say("")
    print_json({"benchmark": benchmark, "machine": facts, "settings": settings} | found)
    if wrong := found.get("wrong"):
        raise LongwaveError("; ".join(wrong.values()))
