"""`longwave bench model`: one checkpoint of random weights in every library: prefill, decode, training step."""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longwave.bench.agreement import check_logits, check_training
from longwave.bench.memory import START, decode_memory
from longwave.bench.peers import (
    OURS,
    SOURCES,
    Peer,
    PeerMissing,
    Place,
    Trainable,
    open_peer,
    open_trainable,
    peers_on,
)
from longwave.bench.table import number, table, times
from longwave.bench.timing import Figure, Harness, ratio
from longwave.errors import UsageError
from longwave.hub.export import export
from longwave.hub.load import load
from longwave.models.language_model import LanguageModel
from longwave.tasks.progress import ProgressLine

_TRUTH = f"{OURS} float32"
_CHECKED = 40  # tokens that must agree
_PROMPT = 16  # tokens before those that decode times


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is timed, for one sequence, and in training for a batch of them."""

    prefill: tuple[int, ...] = (512, 2048)
    """Tokens taken in at once; one case for each. 0 leaves prefill out."""
    decode: int = 64
    """Tokens decoded one by one, greedily; 0 leaves decoding out."""
    train: int = 256
    """Tokens of each sequence in a training step, forward and backward; 0 leaves training out."""
    batch: int = 1
    """Sequences of a training step."""
    update: bool = False
    """Let a training step change the weights too: gradients clipped, AdamW."""
    decode_memory: int = 0
    """Decode so many tokens and report what the process grew by from the 100th on; 0 leaves that out."""

    def __post_init__(self):
        if self.batch < 1:
            raise UsageError(f"bench model: batch must be at least 1, got {self.batch}")
        wrong = [n for n in (*self.prefill, self.decode, self.train, self.decode_memory) if n < 0]
        if wrong:
            raise UsageError(
                f"bench model: a number of tokens must not be negative, got {wrong[0]}; 0 leaves a case out"
            )
        if 0 < self.decode_memory <= START:
            raise UsageError(f"bench model: decode_memory must be more than {START} tokens, got {self.decode_memory}")


def run(
    config: LanguageModel.Config,
    harness: Harness,
    work: Work,
    *,
    peers: Sequence[str] | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> dict:
    """Time a model of this configuration with random weights in longwave and in `peers`; all figures as plain values.

    `peers` are by default all that have models for the device.
    `say` gets the tables, as they are ready. Raises UsageError for a model that transformers' `mamba` and `mamba2`
    cannot express, and LongwaveError, before anything is timed, when a peer in float32 does not agree.
    """
    format = _format(config)
    place = Place(torch.device(device), torch.get_num_threads())
    torch.manual_seed(seed)
    sources = (OURS, *(peers_on(place.device) if peers is None else peers))
    bench = _Bench(harness, work, sources, format, config.vocab_size, place, say)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        export(LanguageModel(config), folder, format)
        bench.inference(folder)
        bench.training(folder)
        bench.memory(folder)
    for name, why in bench.missing.items():
        say(f"{name}: not measured: {why}")
    return {"cases": bench.cases, "agreement": bench.agreement, "memory": bench.memories, "missing": bench.missing}


class _Bench:
    """One benchmark of one checkpoint, and what it has found so far."""

    def __init__(
        self,
        harness: Harness,
        work: Work,
        sources: Sequence[str],
        format: str,
        vocab_size: int,
        place: Place,
        say: Callable[[str], None],
    ):
        self.cases: list[dict] = []
        self.agreement: dict[str, dict] = {}
        self.missing: dict[str, str] = {}
        self.memories: dict = {}
        self._harness, self._work, self._sources, self._format, self._say = harness, work, sources, format, say
        self._place = place
        longest = max([*work.prefill, work.train, _CHECKED]) + 1
        self._batch = torch.randint(vocab_size, (work.batch, longest))
        self._tokens: list[int] = self._batch[0].tolist()

    def inference(self, folder: Path) -> None:
        """Prefill and decode."""
        lengths = [n for n in self._work.prefill if n]
        if not lengths and not self._work.decode:
            return
        names = [(source, precision) for source in self._sources for precision in SOURCES[source].inference]
        with self._opened(open_peer, folder, names) as peers:
            self._agree("logits", check_logits(peers, self._tokens[:_CHECKED], _TRUTH))
            for n in lengths:
                self._time(f"prefill {n}", n, peers, partial(_prefill, tokens=self._tokens[:n]))
            if n := self._work.decode:
                self._time(f"decode {n}", n, peers, partial(_decode, prompt=self._tokens[:_PROMPT], n=n))

    def training(self, folder: Path) -> None:
        """Forward and backward."""
        if not (n := self._work.train):
            return
        names = [(source, precision) for source in self._sources for precision in SOURCES[source].training]
        tokens, targets = self._batch[:, :n], self._batch[:, 1 : n + 1]
        with self._opened(open_trainable, folder, names) as peers:
            self._agree("training", check_training(peers, tokens[:1, :_CHECKED], targets[:1, :_CHECKED], _TRUTH))
            once = partial(_train, tokens=tokens, targets=targets, update=self._work.update)
            batch = f" of {len(tokens)}" if len(tokens) > 1 else ""
            self._time(f"training step {n}{batch}", tokens.numel(), peers, once)

    def memory(self, folder: Path) -> None:
        """Bytes held."""
        model = load(folder, device=self._place.device).model.eval()
        self.memories = {"parameters": model.parameter_count(), "state_bytes": model.state_bytes(0)}
        self._say(f"\nstate: {self.memories['state_bytes']:,} bytes, however long the text")
        if n := self._work.decode_memory:
            self.memories |= decode_memory(model, self._tokens[:_PROMPT], n)
            self._say(f"decode from token {START} to {n}: the process grew by {self.memories['growth']:,} bytes")

    @contextmanager
    def _opened(
        self, open: Callable[..., Any], folder: Path, names: Sequence[tuple[str, str]]
    ) -> Iterator[dict[str, Any]]:
        """The peers, open; those that are missing are noted."""
        with ExitStack() as stack:
            peers = {}
            with ProgressLine("loading", len(names)) as progress:
                for source, precision in names:
                    try:
                        peer = open(source, folder, self._format, precision, self._place)
                    except PeerMissing as missing:
                        self.missing[f"{source} {precision}"] = str(missing)
                    else:
                        peers[f"{source} {precision}"] = stack.enter_context(closing(peer))
                    progress.add(1)
            yield peers

    def _agree(self, what: str, found: dict) -> None:
        self.agreement[what] = found
        kinds = list(found["differences"][_TRUTH])
        rows = [
            [name, *(f"{differences[kind]:.1e}" for kind in kinds)]
            for name, differences in found["differences"].items()
        ]
        self._say(f"\ndifference from {_TRUTH} on {found['tokens']} tokens\n{table(['', *kinds], rows)}")

    def _time(self, case: str, n: int, peers: Mapping[str, Any], once: Callable[[Any], float]) -> None:
        figures = self._harness.measure(case, {name: partial(once, peer) for name, peer in peers.items()})
        ours = [name for name in figures if name.startswith(OURS)]
        ratios = {name: {peer: ratio(figures[peer], figures[name]) for peer in figures} for name in ours}
        values = {name: figure.to_dict() | _speed(figure, n) for name, figure in figures.items()}
        self.cases.append({"case": case, "tokens": n, "figures": values, "times_faster": ratios})
        rows = [
            [
                name,
                number(values[name]["tokens_per_second"]),
                f"{len(figures[name].seconds)}/{self._harness.config.runs}",
                *(times(ratios[mine][name]) for mine in ours),
            ]
            for name in figures
        ]
        header = ["", "tokens/s", "runs", *(f"{mine} faster by" for mine in ours)]
        self._say(f"\n{case}\n{table(header, rows)}")


def _format(config: LanguageModel.Config) -> str:
    kinds = {layer.kind for layer in config.layers}
    if kinds not in ({"mamba"}, {"mamba2"}):
        raise UsageError(
            f"bench model: its peers run models of mamba or of mamba2 layers alone, not of {', '.join(sorted(kinds))}; "
            "try mamba-130m or mamba2-130m"
        )
    return kinds.pop()


def _speed(figure: Figure, n: int) -> dict[str, float | None]:
    return {"tokens_per_second": None if figure.median is None else n / figure.median}


def _prefill(peer: Peer, tokens: list[int]) -> float:
    started = time.perf_counter()
    peer.prefill(tokens)
    return time.perf_counter() - started


def _decode(peer: Peer, prompt: list[int], n: int) -> float:
    logits = peer.begin(prompt)
    started = time.perf_counter()
    for _ in range(n):
        logits = peer.step(int(logits.argmax()))
    return time.perf_counter() - started


def _train(peer: Trainable, tokens: Tensor, targets: Tensor, update: bool) -> float:
    started = time.perf_counter()
    peer.train_step(tokens, targets)
    if update:
        peer.update()
    return time.perf_counter() - started
