"""`longwave generate`: continue a prompt, streaming."""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Group, Parameter

from longwave.cli.options import make_app, print_json
from longwave.errors import UsageError
from longwave.generate.sampling import Sampling
from longwave.generate.text_model import Stream
from longwave.generate.transcript import Piece
from longwave.hub.load import load
from longwave.models.state import State
from longwave.tasks.tokenizer import Tokenizer
from longwave.training.interrupt import Interrupt, Interrupted
from longwave.training.job import pick_device

app = make_app(
    "generate",
    (
        'longwave generate runs/notes "Dear diary" --temperature 0.8 --seed 1',
        "longwave generate runs/notes --state-out talk.state < long.txt",
        'longwave generate runs/notes " And then" --state-in talk.state',
    ),
)


@app.default
def generate(
    model: str,
    prompt: str | None = None,
    *,
    max_tokens: int = 256,
    stop: tuple[str, ...] = (),
    sampling: Annotated[Sampling, Parameter(name="*", group=Group("Sampling", sort_key=1))] = Sampling(),  # noqa: B008
    state_in: Path | None = None,
    state_out: Path | None = None,
    chunk_len: int = 512,
    logprobs: bool = False,
    device: str = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    json: bool = False,
) -> None:
    """Print the prompt's continuation as it is drawn.

    Ctrl-C stops between two tokens; --state-out is then written as at any other end.

    Parameters
    ----------
    model
        Folder of a model, of a training run, or of a checkpoint of another library.
    prompt
        Text to continue, behind -- if it begins with a dash. Without it: standard input, of any length.
    max_tokens
        Draw at most this many tokens.
    stop
        Text at which to stop, where \\n stands for a line end and \\t for a tab. May be given several times.
    state_in
        Go on from the state in this file: the prompt follows what it has seen.
    state_out
        Write the state after the last token to this file, for --state-in.
    chunk_len
        Tokens of the prompt taken in at a time. Bounds memory, changes nothing else.
    logprobs
        Print each token with its log-probability, one a line.
    device
        cpu, cuda, cuda:1, ...; auto takes the first GPU, else the CPU.
    dtype
        Precision of the weights; else that in which they are stored.
    json
        Print one line of JSON at the end instead of text as it comes.
    """
    loaded = load(model, device=pick_device(device), dtype=dtype)
    loaded.model.eval()
    state = State.load(state_in, loaded.model) if state_in else None
    stream = loaded.generate(
        _read_prompt(prompt, continues=state is not None),
        max_tokens=max_tokens,
        stop=[text.replace("\\n", "\n").replace("\\t", "\t") for text in stop],
        state=state,
        chunk_len=chunk_len,
        sampling=sampling,
    )
    write = _write_json if json else _write_table if logprobs else _write_text
    drawn: list[Piece] = []
    reader_gone = None
    with Interrupt() as interrupt:
        try:
            write(_until_signal(stream, interrupt, drawn), loaded.tokenizer)
        except BrokenPipeError as error:
            reader_gone = error
    if state_out:
        stream.state.save(state_out)
    if reader_gone:
        raise reader_gone
    if interrupt.signal_number:
        kept = f"; go on with --state-in {state_out}" if state_out else ""
        raise Interrupted(f"stopped after {len(drawn)} tokens{kept}", interrupt.signal_number)


def _until_signal(stream: Stream, interrupt: Interrupt, drawn: list[Piece]) -> Iterator[Piece]:
    for piece in stream:
        drawn.append(piece)
        yield piece
        if interrupt.signal_number:
            return


def _write_text(pieces: Iterable[Piece], tokenizer: Tokenizer | None) -> None:
    for piece in pieces:
        print(piece, end="", flush=True)
    print(flush=True)


def _write_table(pieces: Iterable[Piece], tokenizer: Tokenizer | None) -> None:
    for piece in pieces:
        text = repr(tokenizer.decode([piece.token])) if tokenizer else ""
        print(f"{piece.logprob:9.4f}  {piece.token:6d}  {text}", flush=True)


def _write_json(pieces: Iterable[Piece], tokenizer: Tokenizer | None) -> None:
    pieces = list(pieces)
    print_json(
        {
            "text": "".join(map(str, pieces)),
            "tokens": [piece.token for piece in pieces],
            "logprobs": [piece.logprob for piece in pieces],
            "finish_reason": pieces[-1].finish_reason if pieces else "length",
        }
    )


def _read_prompt(prompt: str | None, *, continues: bool) -> str:
    if prompt is None and not sys.stdin.isatty():
        try:
            prompt = sys.stdin.buffer.read().decode()
        except UnicodeDecodeError as error:
            raise UsageError(f"the prompt on standard input is no UTF-8 text ({error}); convert it first") from error
    if not prompt and continues:
        raise UsageError("--state-in needs something to go on with; give a prompt after the model")
    return prompt or ""
