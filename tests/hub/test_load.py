"""Folders as they come: every file format, and every way in which one can be damaged, foreign or absent."""

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import longwave
from longwave.errors import LongwaveError, UsageError
from longwave.generate.text_model import TextModel
from longwave.hub.export import export
from longwave.hub.load import load
from longwave.mixers import Mamba
from longwave.models.language_model import LanguageModel
from longwave.tasks.tokenizer import ByteTokenizer

LAYER = Mamba.Config(d_state=8)


def small_model(vocab_size=97, d_model=32):
    return LanguageModel(LanguageModel.Config(vocab_size=vocab_size, d_model=d_model, layers=(LAYER, LAYER)))


@pytest.fixture
def folder(tmp_path):
    """A folder of `mamba` with model.safetensors."""
    export(small_model(), tmp_path / "model", "mamba")
    return tmp_path / "model"


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


def refused(folder, kind, *words):
    """The one-line error of loading the folder, which names `words`."""
    with pytest.raises(LongwaveError) as error:
        load(folder)
    message = str(error.value)
    assert type(error.value) is kind
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def as_bin(folder):
    torch.save(tensors_of(folder), folder / "pytorch_model.bin")


def as_old_bin(folder):
    torch.save(tensors_of(folder), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def as_shards(folder, name, save):
    tensors = tensors_of(folder)
    weight_map = {key: name.format(i % 3 + 1) for i, key in enumerate(tensors)}
    for shard in set(weight_map.values()):
        save({key: tensor for key, tensor in tensors.items() if weight_map[key] == shard}, folder / shard)
    return {"metadata": {}, "weight_map": weight_map}


def as_safetensors_shards(folder):
    index = as_shards(folder, "model-{:05}-of-00003.safetensors", save_file)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def as_bin_shards(folder):
    index = as_shards(folder, "pytorch_model-{:05}-of-00003.bin", torch.save)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def with_tied_head(folder):
    tensors = tensors_of(folder)
    tensors["lm_head.weight"] = tensors["backbone.embeddings.weight"].clone()
    torch.save(tensors, folder / "pytorch_model.bin")


@pytest.mark.parametrize("convert", [as_bin, as_old_bin, as_safetensors_shards, as_bin_shards, with_tied_head])
def test_every_form_of_the_weights_gives_the_same_model(folder, convert):
    expected = load(folder).model.state_dict()
    convert(folder)
    (folder / "model.safetensors").unlink()
    for name, tensor in load(folder).model.state_dict().items():
        assert torch.equal(tensor, expected[name])


def test_their_shards(peer, truth):
    theirs, folder = peer("mamba2")
    theirs.save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    assert (folder / "model.safetensors.index.json").exists()
    tokens = torch.randint(0, 97, (1, 9))
    with torch.no_grad():
        torch.testing.assert_close(load(folder).model(tokens)[0], truth(theirs, tokens), atol=1e-5, rtol=0)


def test_our_own_folder_with_its_tokenizer(tmp_path):
    model = TextModel(small_model(257), ByteTokenizer())
    model.save(tmp_path)
    again = longwave.load(tmp_path)
    assert again.model.config == model.model.config
    assert isinstance(again.tokenizer, ByteTokenizer)
    assert load(tmp_path, dtype="bfloat16").model.embedding.weight.dtype == torch.bfloat16


def test_no_tokenizer_is_none(folder):
    assert load(folder).tokenizer is None


class Allocated(TorchDispatchMode):
    """Bytes of the tensors that operators make, views and the meta device left out."""

    def __init__(self):
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = isinstance(result, torch.Tensor) and result.device.type != "meta" and not func.is_view
        self.nbytes += result.nbytes if made and not func._schema.is_mutable else 0
        return result


def test_weights_are_made_once(folder):
    size = sum(tensor.nbytes for tensor in tensors_of(folder).values())
    with Allocated() as allocated:
        load(folder)
    assert allocated.nbytes == pytest.approx(size, rel=0.01)


def test_a_folder_that_is_not_there(tmp_path):
    refused(tmp_path / "nowhere", UsageError, "there is no folder", "nowhere")
    assert "hf download some/model --local-dir model" in refused("some/model", UsageError)
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", UsageError, "is a file", str(tmp_path))


def test_config_json_missing_or_broken(folder):
    config = folder / "config.json"
    for broken in ("{", "\x00\x01", "[1, 2]", ""):
        config.write_text(broken)
        refused(folder, LongwaveError, "config.json", "copy the file again")
    config.write_bytes(b"\xff\xfe\xff")
    refused(folder, LongwaveError, "config.json")
    config.unlink()
    refused(folder, UsageError, "has no config.json")


UNSUPPORTED = {
    "'rwkv'": {"model_type": "rwkv"},
    "Did you mean 'mamba2'": {"model_type": "mamba-2"},
    "hidden_act 'gelu'": {"hidden_act": "gelu"},
    "quantization_config": {"quantization_config": {"bits": 4}},
    "MambaForSequenceClassification": {"architectures": ["MambaForSequenceClassification"]},
    "vocab_size must be int": {"vocab_size": "many"},
    "state_size must be at least 1": {"state_size": 0},
    "tie_word_embeddings must be bool": {"tie_word_embeddings": "yes"},
    "layer_norm_epsilon must be float": {"layer_norm_epsilon": "small"},
    "num_heads 3 times head_dim 8": {"model_type": "mamba2", "num_heads": 3, "head_dim": 8, "architectures": None},
    "time_step_limit must be two numbers": {
        "model_type": "mamba2",
        "num_heads": 8,
        "head_dim": 8,
        "architectures": None,
        "time_step_limit": [0.1],
    },
}


@pytest.mark.parametrize(("named", "changes"), UNSUPPORTED.items(), ids=UNSUPPORTED)
def test_unsupported_families_and_options_are_named_before_any_weight_is_read(folder, named, changes):
    (folder / "model.safetensors").unlink()
    edit_config(folder, **changes)
    refused(folder, UsageError, named)


def test_a_config_of_no_known_format(folder):
    (folder / "config.json").write_text('{"layers": 3, "colour": "red"}')
    refused(folder, UsageError, "colour, layers", "state_spaces")


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    refused(folder, LongwaveError, "no weights", "pytorch_model.bin")


@pytest.mark.parametrize("convert", [None, as_bin, as_old_bin])
@pytest.mark.parametrize("keep", [0, 5, 200, 0.5, 0.999])
def test_truncated_weights(folder, convert, keep):
    file = folder / "model.safetensors"
    if convert:
        convert(folder)
        file.unlink()
        file = folder / "pytorch_model.bin"
    data = file.read_bytes()
    file.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    refused(folder, LongwaveError, file.name)


class Malicious:
    def __reduce__(self):
        return (exec, ("raise SystemExit('unpickled')",))


@pytest.mark.parametrize("content", [Malicious(), {"a": Malicious()}, [1, 2], {"state_dict": {"a": 1}}, {"a": 1}])
def test_nothing_but_named_tensors_is_taken_from_a_pickle(folder, content):
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    torch.save(content, file)
    refused(folder, LongwaveError, "pytorch_model.bin")
    file.write_bytes(pickle.dumps(content, protocol=2) if not isinstance(content, dict) else b"GIF89a")
    refused(folder, LongwaveError, "pytorch_model.bin")


def test_shards_missing_or_elsewhere(folder):
    as_safetensors_shards(folder)
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    name = next(iter(good["weight_map"]))
    for shard in ("../model.safetensors", "/etc/passwd", 3):
        index.write_text(json.dumps({"weight_map": good["weight_map"] | {name: shard}}))
        refused(folder, LongwaveError, "plain file name")
    index.write_text(json.dumps({"weight_map": good["weight_map"] | {"extra": "model-00001-of-00003.safetensors"}}))
    refused(folder, LongwaveError, "places extra in model-00001-of-00003.safetensors")
    index.write_text("{}")
    refused(folder, LongwaveError, "weight_map")
    index.write_text(json.dumps(good))
    (folder / "model-00002-of-00003.safetensors").unlink()
    refused(folder, LongwaveError, "model-00002-of-00003.safetensors")


def test_tensors_that_do_not_fit_are_listed(folder):
    tensors = tensors_of(folder)
    del tensors["backbone.norm_f.weight"]
    tensors["backbone.layers.0.mixer.D"] = torch.zeros(5)
    tensors["backbone.layers.7.mixer.D"] = torch.zeros(64)
    save_file(tensors, folder / "model.safetensors")
    refused(
        folder,
        LongwaveError,
        "3 differ",
        "backbone.norm_f.weight: expected [32], missing",
        "backbone.layers.0.mixer.D: expected [64], found [5]",
        "backbone.layers.7.mixer.D: not expected, found [64]",
    )


def test_of_many_tensors_that_do_not_fit_ten_are_listed(folder):
    edit_config(folder, num_hidden_layers=4)
    message = refused(folder, LongwaveError, "20 differ", "and 10 more")
    assert message.count("missing") == 10


def test_tensors_that_are_not_floating_point(folder):
    tensors = tensors_of(folder)
    tensors["backbone.layers.0.mixer.D"] = torch.ones(64, dtype=torch.int8)
    save_file(tensors, folder / "model.safetensors")
    refused(folder, LongwaveError, "backbone.layers.0.mixer.D", "int8")


def test_a_tied_head_that_differs(folder):
    tensors = tensors_of(folder)
    tensors["lm_head.weight"] = torch.zeros(97, 32)
    save_file(tensors, folder / "model.safetensors")
    refused(folder, LongwaveError, "lm_head.weight", "tie_word_embeddings")
    edit_config(folder, tie_word_embeddings=False)
    assert not load(folder).model.lm_head.weight.any()


def test_a_tokenizer_that_does_not_match(folder):
    ByteTokenizer().save(folder)
    refused(folder, UsageError, "257", "97")


def test_unknown_dtype_and_format(folder, tmp_path):
    with pytest.raises(UsageError, match="Did you mean 'bfloat16'"):
        load(folder, dtype="bflot16")
    with pytest.raises(UsageError, match="Did you mean 'falcon_mamba'"):
        export(small_model(), tmp_path, "falcon_mmba")


@pytest.mark.parametrize("format", ["mamba", "state_spaces"])
def test_export_fails_in_one_line_and_leaves_what_was_there(tmp_path, format, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    export(small_model(), tmp_path, format)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    monkeypatch.setattr("torch.save", full)
    monkeypatch.setattr("longwave.models.saving.save_file", full)
    with pytest.raises(LongwaveError, match="No space left"):
        export(small_model(), tmp_path, format)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_export_beside_other_weights_is_refused(folder):
    with pytest.raises(UsageError, match=r"model\.safetensors"):
        export(small_model(), folder, "state_spaces")
    export(small_model(), folder, "mamba")  # its own may be replaced


def test_export_where_a_file_is(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LongwaveError, match="cannot make the folder"):
        export(small_model(), tmp_path / "file", "mamba")


def test_a_loaded_model_outlives_its_folder(folder):
    model = load(folder).model
    shutil.rmtree(folder)
    tokens = torch.randint(0, 97, (1, 5))
    assert torch.isfinite(model(tokens)[0]).all()
