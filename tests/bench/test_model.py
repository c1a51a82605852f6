import importlib.util
import json
import sys

import pytest
import torch

from longwave.bench import model as bench
from longwave.bench.agreement import check_training
from longwave.bench.model import Work, run
from longwave.bench.peers import AUTOCAST, SOURCES, Place, ours, peers_on
from longwave.errors import LongwaveError, UsageError
from longwave.hub.export import export
from longwave.mixers import Attention, Mamba
from longwave.models.language_model import LanguageModel

WORK = Work(prefill=(20, 48), decode=3, train=24)
NEEDS = {"transformers": ("transformers",), "mambapy": ("mambapy",), "llama.cpp": ("llama_cpp", "gguf")}


def installed(peer):
    return all(importlib.util.find_spec(package) for package in NEEDS[peer])


def quiet(text):
    pass


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_all_agree_and_are_timed(kind, ungated, monkeypatch, toy):
    llama = SOURCES["llama.cpp"]._replace(inference=("f32", "bf16", "q8_0") if kind == "mamba" else ("f32",))
    monkeypatch.setitem(SOURCES, "llama.cpp", llama)  # q8_0 takes a trial run in another process
    found = json.loads(json.dumps(run(toy(kind), ungated, WORK, say=quiet)))
    assert [case["case"] for case in found["cases"]] == ["prefill 20", "prefill 48", "decode 3", "training step 24"]
    inference, training = {"longwave float32", "longwave bfloat16"}, {"longwave float32", "longwave bfloat16 autocast"}
    for peer in NEEDS:
        if not installed(peer) or kind not in SOURCES[peer].formats:
            assert f"{peer} {SOURCES[peer].inference[0]}" in found["missing"]
            continue
        inference |= {f"{peer} {precision}" for precision in SOURCES[peer].inference}
        training |= {f"{peer} {precision}" for precision in SOURCES[peer].training}
    for case in found["cases"]:
        names = training if case["case"].startswith("training") else inference
        assert set(case["figures"]) == names
        figures = case["figures"]
        for mine, ratios in case["times_faster"].items():
            assert ratios == {who: pytest.approx(figures[who]["median"] / figures[mine]["median"]) for who in names}
        for figure in figures.values():
            assert figure["tokens_per_second"] == pytest.approx(case["tokens"] / figure["median"])
    for name, differences in found["agreement"]["logits"]["differences"].items():
        assert max(differences.values()) < (1e-5 if name.endswith(("float32", "f32")) else 0.1)
    for name, differences in found["agreement"]["training"]["differences"].items():
        assert max(differences.values()) < (1e-5 if name.endswith("float32") else 0.05)


@pytest.mark.parametrize("what", ["prefill", "step", "training"])
def test_a_wrong_peer_stops_before_the_clock_starts(what, ungated, monkeypatch, toy):
    """A peer like longwave, but with its weights disturbed from some moment on."""

    class Wrong(ours.Longwave):
        def step(self, token):
            if what == "step":
                self.model.norm_f.weight.data[3] += 0.1
            return super().step(token)

    def disturbed(folder, precision):
        model = ours.load(folder, dtype=precision).model
        if what != "step":
            model.norm_f.weight.data[3] += 0.1
        return model

    wrong = type(sys)("longwave.bench.peers.wrong")
    wrong.open_peer = lambda folder, precision, place: Wrong(disturbed(folder, precision))
    wrong.open_trainable = lambda folder, precision, place: ours.TorchTrainable(
        (model := disturbed(folder, "float32")), model.loss, place, autocast=False
    )
    monkeypatch.setitem(sys.modules, wrong.__name__, wrong)
    source = SOURCES["transformers"]._replace(module="wrong", inference=("float32",), training=("float32",))
    monkeypatch.setitem(SOURCES, "wrong", source)
    monkeypatch.setattr(ungated, "measure", lambda *_: pytest.fail("timed a wrong peer"))
    work = Work(prefill=(0,), decode=0, train=20) if what == "training" else WORK
    with pytest.raises(LongwaveError, match=r"wrong float32: .* more than 1e-03"):
        run(toy("mamba"), ungated, work, peers=("wrong",), say=quiet)


def test_autocast_is_judged_too():
    class Fixed:
        def __init__(self, loss):
            self.loss = loss

        def train_step(self, tokens, targets):
            return self.loss

        def gradient_norm(self):
            return 1.0

    def differ_by(share):
        return {"longwave float32": Fixed(1.0), f"peer {AUTOCAST}": Fixed(1.0 + share)}

    tokens = torch.zeros(1, 3)
    check_training(differ_by(0.04), tokens, tokens, "longwave float32")
    with pytest.raises(LongwaveError, match=r"loss differ by 6\.0e-02 of the reference, more than 5e-02"):
        check_training(differ_by(0.06), tokens, tokens, "longwave float32")


def test_missing_peers_are_named_with_the_line_that_installs_them(ungated, block, toy):
    for peer, packages in NEEDS.items():
        block(packages[0], SOURCES[peer].module)
    said = []
    found = run(toy("mamba"), ungated, WORK, say=said.append)
    assert set(found["cases"][0]["figures"]) == {"longwave float32", "longwave bfloat16"}
    for peer in NEEDS:
        name = f"{peer} {SOURCES[peer].inference[0]}"
        assert SOURCES[peer].install in found["missing"][name]
        assert any(line.startswith(f"{name}: not measured: pip install") for line in said)


def test_a_peer_that_crashes_is_left_out(tmp_path, monkeypatch):
    llama = pytest.importorskip("longwave.bench.peers.llama_cpp", exc_type=ImportError)
    (tmp_path / "bad.gguf").write_bytes(b"no model")
    with pytest.raises(bench.PeerMissing, match="could not load"):
        llama._try_in_another_process(tmp_path / "bad.gguf", 1)


def test_decode_memory_counts_the_state(ungated, toy):
    work = Work(prefill=(0,), decode=0, train=0, decode_memory=150)
    found = run(toy("mamba2"), ungated, work, peers=(), say=quiet)
    memory = found["memory"]
    # conv window of w - 1 = 3 inputs of e + 2 n, state of h p n, in two layers of float32
    assert memory["state_bytes"] == memory["state_bytes_expected"] == 2 * 4 * (3 * (128 + 32) + 128 * 16)
    assert memory["growth"] == memory["process_bytes_at_end"] - memory["process_bytes_at_100"]
    assert found["cases"] == []


def test_models_that_no_peer_runs(ungated):
    layers = (Mamba.Config(d_state=8), Attention.Config(n_heads=2))
    config = LanguageModel.Config(vocab_size=64, d_model=32, layers=layers)
    with pytest.raises(UsageError, match="not of attention, mamba"):
        run(config, ungated, WORK)


def test_a_batch_with_the_optimiser(ungated, toy):
    work = Work(prefill=(0,), decode=0, train=16, batch=3, update=True)
    (case,) = run(toy("mamba"), ungated, work, peers=(), say=quiet)["cases"]
    assert case["case"] == "training step 16 of 3"
    for figure in case["figures"].values():
        assert figure["tokens_per_second"] == pytest.approx(3 * 16 / figure["median"])


def test_an_update_changes_the_weights_and_a_step_alone_does_not(tmp_path, toy):
    export(LanguageModel(toy("mamba")), tmp_path, "mamba")
    peer = ours.open_trainable(tmp_path, "float32", Place(torch.device("cpu"), 1))
    tokens = torch.randint(256, (2, 9))
    first = peer.train_step(tokens[:, :-1], tokens[:, 1:])
    assert peer.train_step(tokens[:, :-1], tokens[:, 1:]) == first
    peer.update()
    assert peer.train_step(tokens[:, :-1], tokens[:, 1:]) < first


def test_who_runs_where():
    assert peers_on(torch.device("cpu")) == ("transformers", "mambapy", "llama.cpp")
    assert peers_on(torch.device("cuda")) == ("mamba_ssm",)
    place = Place(torch.device("cpu"), 1)
    with pytest.raises(bench.PeerMissing, match="its mamba does not run on cpu"):
        bench.open_trainable("mamba_ssm", None, "mamba", "float32", place)


@pytest.mark.parametrize("options", [{"prefill": (-1,)}, {"decode": -3}, {"decode_memory": 100}, {"batch": 0}])
def test_impossible_lengths(options):
    with pytest.raises(UsageError, match=r"got -?\d"):
        Work(**options)


def test_the_same_seed_gives_the_same_checkpoint(ungated, toy):
    work = Work(prefill=(8,), decode=0, train=0)
    torch.manual_seed(5)
    first, second = (run(toy("mamba"), ungated, work, peers=(), say=quiet)["agreement"]["logits"] for _ in range(2))
    assert first == second
