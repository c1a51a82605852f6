"""`longwave generate`: continue a prompt, streaming."""

import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from longwave.cli.options import make_app, print_json
from longwave.errors import UsageError
from longwave.generate.sampling import Sampling
from longwave.generate.text_model import TextModel
from longwave.hub.load import load
from longwave.models.state import State
from longwave.training.job import pick_device

app = make_app(
    "generate",
    (
        'longwave generate runs/notes "Dear diary" --temperature 0.8 --min-p 0.05 --seed 1',
        "echo 'and then' | longwave generate runs/notes --state-in talk.state --state-out talk.state --stop '\\n\\n'",
    ),
)


@app.default
def generate(
    model: str,
    prompt: str | None = None,
    *,
    max_tokens: int = 256,
    sampling: Annotated[Sampling, Parameter(name="*")] = Sampling(),  # noqa: B008
    stop: tuple[str, ...] = (),
    state_in: Path | None = None,
    state_out: Path | None = None,
    logprobs: bool = False,
    chunk_len: int = 512,
    device: str = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    json: bool = False,
) -> None:
    """Print the prompt's continuation as it is drawn.

    Parameters
    ----------
    model
        Folder of a model, of a training run, or of a checkpoint of another library.
    prompt
        Text to continue; `-` or nothing: standard input, if it is not a terminal.
    max_tokens
        Draw at most this many tokens.
    stop
        Text at which to stop; may be given several times.
    state_in
        Go on from this state: the prompt follows what it has seen.
    state_out
        Write the state after the last token here, for --state-in.
    logprobs
        Print each token with its log-probability, one a line.
    chunk_len
        Tokens of the prompt taken in at a time.
    device
        cpu, cuda, cuda:1, ...; auto takes the first GPU, else the CPU.
    dtype
        Precision of the weights; by default that in which they are stored.
    json
        Print one line of JSON at the end instead of text as it comes.
    """
    loaded = load(model, device=pick_device(device), dtype=dtype)
    loaded.model.eval()
    state = State.load(state_in, loaded.model) if state_in else None
    text = _read_prompt(prompt, continues=state is not None)
    stops = tuple(s.encode().decode("unicode_escape") if s.isascii() else s for s in stop)
    stream = loaded.generate(
        text, max_tokens=max_tokens, stop=stops, state=state, chunk_len=chunk_len, sampling=sampling
    )
    pieces = []
    for piece in stream:
        pieces.append(piece)
        if logprobs and not json:
            print(f"{piece.logprob:9.4f}  {piece.token:6d}  {_shown(loaded, piece.token)}", flush=True)
        elif not json:
            print(piece, end="", flush=True)
    if state_out:
        stream.state.save(state_out)
    if json:
        print_json(
            {
                "text": "".join(map(str, pieces)),
                "tokens": [piece.token for piece in pieces],
                "logprobs": [piece.logprob for piece in pieces],
                "finish_reason": stream.finish_reason,
            }
        )
    elif not logprobs:
        print()


def _shown(model: TextModel, token: int) -> str:
    return "" if model.tokenizer is None else repr(model.tokenizer.decode([token]))


def _read_prompt(prompt: str | None, *, continues: bool) -> str:
    if prompt == "-" or (prompt is None and not sys.stdin.isatty()):
        prompt = sys.stdin.read()
    if not prompt and continues:
        raise UsageError("--state-in needs something to go on with; give a prompt after the model")
    return prompt or ""
