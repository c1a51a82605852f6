"""The families of transformers: the other library's folders give its logits here, and ours give them there."""

import pytest
import torch

from longwave.hub.export import export
from longwave.hub.load import load
from longwave.models.language_model import LanguageModel

FALCON_H1_MULTIPLIERS = {
    "embedding_multiplier": 2.0,
    "lm_head_multiplier": 0.3,
    "key_multiplier": 0.5,
    "attention_in_multiplier": 1.5,
    "attention_out_multiplier": 0.7,
    "ssm_in_multiplier": 1.2,
    "ssm_out_multiplier": 0.4,
    "ssm_multipliers": [0.3, 0.7, 1.5, 2.0, 0.9],
    "mlp_multipliers": [0.4, 1.7],
}
TURNS_A_QUARTER = {"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 0.25}
CASES = {
    "mamba": ("mamba", {}),
    "mamba with other biases": ("mamba", {"use_bias": True, "use_conv_bias": False}),
    "mamba with a head of its own": ("mamba", {"tie_word_embeddings": False}),
    "mamba with another eps": ("mamba", {"layer_norm_epsilon": 0.1}),
    "mamba, inner width not a multiple of d_model": ("mamba", {"intermediate_size": 48}),
    "mamba, other sizes": ("mamba", {"expand": 3, "conv_kernel": 3, "time_step_rank": "auto", "num_hidden_layers": 3}),
    "mamba2, 1 group": ("mamba2", {"n_groups": 1}),
    "mamba2, 2 groups": ("mamba2", {"n_groups": 2}),
    "mamba2 with dt limits": ("mamba2", {"time_step_limit": (0.005, 0.02)}),
    "mamba2 with other biases, tied": (
        "mamba2",
        {"use_bias": True, "use_conv_bias": False, "tie_word_embeddings": True},
    ),
    "mamba2 with another eps": ("mamba2", {"layer_norm_epsilon": 0.1}),
    "falcon_mamba": ("falcon_mamba", {}),
    "falcon_mamba with another inner eps": ("falcon_mamba", {"mixer_rms_eps": 0.1}),
    "jamba": ("jamba", {}),
    "jamba, published periods": (
        "jamba",
        {"attn_layer_period": 8, "attn_layer_offset": 4, "num_hidden_layers": 9, "num_experts": 16},
    ),
    "jamba without experts, with biases": (
        "jamba",
        {"num_experts": 1, "mamba_proj_bias": True, "mamba_conv_bias": False, "rms_norm_eps": 0.1},
    ),
    "jamba, other sizes, tied": (
        "jamba",
        {"mamba_expand": 3, "mamba_d_conv": 3, "mamba_dt_rank": "auto", "head_dim": 16, "tie_word_embeddings": True},
    ),
    "jamba, 3 experts of 5 in each layer": (
        "jamba",
        {"num_experts": 5, "num_experts_per_tok": 3, "expert_layer_period": 1, "expert_layer_offset": 0},
    ),
    "bamba": ("bamba", {}),
    "bamba with biases, another eps and base": (
        "bamba",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "mamba_proj_bias": True,
            "mamba_conv_bias": False,
            "rms_norm_eps": 0.1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
        },
    ),
    "bamba that turns a quarter": ("bamba", {"rope_parameters": TURNS_A_QUARTER}),
    "bamba with dt limits, other heads": (
        "bamba",
        {"time_step_limit": (0.005, 0.02), "head_dim": 12, "mamba_n_heads": 4, "attn_layer_indices": [0, 2]},
    ),
    "granitemoehybrid": ("granitemoehybrid", {}),
    "granitemoehybrid with positions": (
        "granitemoehybrid",
        {"position_embedding_type": "rope", "num_experts_per_tok": 3},
    ),
    "granitemoehybrid without experts": ("granitemoehybrid", {"num_local_experts": 0, "tie_word_embeddings": True}),
    "granitemoehybrid with biases and limits": (
        "granitemoehybrid",
        {"attention_bias": True, "mamba_proj_bias": True, "time_step_limit": (0.005, 0.02), "rms_norm_eps": 0.1},
    ),
    "granitemoehybrid, no multipliers, no attention": (
        "granitemoehybrid",
        {"layer_types": None}
        | dict.fromkeys(("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"), 1.0),
    ),
    "falcon_h1": ("falcon_h1", {}),
    "falcon_h1 with multipliers": ("falcon_h1", FALCON_H1_MULTIPLIERS),
    "falcon_h1 with norms and biases, tied": (
        "falcon_h1",
        {
            "mamba_rms_norm": True,
            "mamba_norm_before_gate": False,
            "mamba_proj_bias": True,
            "projectors_bias": True,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "rms_norm_eps": 0.1,
        },
    ),
    "falcon_h1, other sizes": (
        "falcon_h1",
        {
            "mamba_rms_norm": True,
            "mamba_d_ssm": None,
            "mamba_n_heads": 8,
            "head_dim": 6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
            "time_step_limit": (0.005, 0.02),
            "mamba_conv_bias": False,
        },
    ),
    "nemotron_h": ("nemotron_h", {}),
    "nemotron_h with biases and another eps": (
        "nemotron_h",
        {
            "hybrid_override_pattern": "M*-",
            "use_bias": True,
            "mlp_bias": True,
            "use_conv_bias": False,
            "layer_norm_epsilon": 0.1,
            "time_step_min": 0.01,
        },
    ),
    "nemotron_h with groups of experts": (
        "nemotron_h",
        {"n_routed_experts": 6, "n_group": 3, "topk_group": 2, "routed_scaling_factor": 2.5, "norm_topk_prob": False},
    ),
    "nemotron_h with latent experts": ("nemotron_h", {"layers_block_type": ["moe", "mamba"], "moe_latent_size": 20}),
    "zamba2": ("zamba2", {}),
    "zamba2, one block, no adapters of attention, no positions": (
        "zamba2",
        {"num_mem_blocks": 1, "use_shared_attention_adapter": False, "use_mem_rope": False, "num_key_value_heads": 2},
    ),
    "zamba2 with biases and another eps": (
        "zamba2",
        {"add_bias_linear": True, "rms_norm_eps": 0.1, "time_step_min": 0.01, "mamba_expand": 1},
    ),
}
FAMILIES = ["mamba", "mamba2", "falcon_mamba"]
HYBRIDS = ["jamba", "bamba", "granitemoehybrid", "falcon_h1", "nemotron_h", "zamba2"]
WRITTEN = {
    "mamba": ("mamba", {"intermediate_size": 48, "layer_norm_epsilon": 1e-3, "time_step_rank": "auto"}),
    "mamba2": ("mamba2", {"time_step_limit": (0.005, 0.02), "use_bias": True, "layer_norm_epsilon": 1e-3}),
    "mamba2, no limits": ("mamba2", {"use_conv_bias": False, "tie_word_embeddings": True}),
    "falcon_mamba": ("falcon_mamba", {"mixer_rms_eps": 1e-3, "tie_word_embeddings": False, "expand": 3}),
    "jamba": ("jamba", {"rms_norm_eps": 1e-3, "head_dim": 16, "mamba_proj_bias": True, "expert_layer_offset": 0}),
    "jamba, attention once, no experts": (
        "jamba",
        {"attn_layer_period": 3, "attn_layer_offset": 1, "num_hidden_layers": 3, "num_experts": 1},
    ),
    "jamba, no attention, all experts": (
        "jamba",
        {"attn_layer_period": 9, "attn_layer_offset": 8, "expert_layer_period": 1, "expert_layer_offset": 0},
    ),
    "bamba": (
        "bamba",
        {
            "time_step_limit": (0.005, 0.02),
            "mlp_bias": True,
            "head_dim": 12,
            "attention_bias": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
        },
    ),
    "bamba that turns a quarter": ("bamba", {"rope_parameters": TURNS_A_QUARTER}),
    "bamba, no attention": ("bamba", {"attn_layer_indices": None, "mamba_proj_bias": True, "rms_norm_eps": 1e-3}),
    "granitemoehybrid": ("granitemoehybrid", {"position_embedding_type": "rope", "attention_bias": True}),
    "granitemoehybrid without experts": ("granitemoehybrid", {"num_local_experts": 0, "mamba_conv_bias": False}),
    "granitemoehybrid, all attention": ("granitemoehybrid", {"layer_types": ["full_attention"] * 3}),
    "falcon_h1": ("falcon_h1", FALCON_H1_MULTIPLIERS | {"head_dim": 6, "attention_bias": True, "rms_norm_eps": 1e-3}),
    "falcon_h1 with norms": ("falcon_h1", {"mamba_rms_norm": True, "mamba_d_ssm": None, "mamba_n_heads": 8}),
    "nemotron_h": ("nemotron_h", {"time_step_min": 0.01, "n_group": 2, "routed_scaling_factor": 2.5}),
    "nemotron_h with latent experts": ("nemotron_h", {"layers_block_type": ["moe", "mamba"], "moe_latent_size": 20}),
    "zamba2": ("zamba2", {"add_bias_linear": True, "time_step_min": 0.01, "rms_norm_eps": 1e-3}),
    "zamba2, more blocks than calls": (
        "zamba2",
        {"num_mem_blocks": 4, "use_shared_attention_adapter": False, "use_mem_rope": False, "chunk_size": 256},
    ),
}
every_case = pytest.mark.parametrize(("model_type", "options"), CASES.values(), ids=CASES)


@torch.no_grad()
def logits_in_pieces(model, tokens, lengths):
    pieces, state = [], None
    for piece in tokens.split(lengths, dim=1):
        logits, state = model(piece, state)
        pieces.append(logits)
    return torch.cat(pieces, dim=1)


def logits_by_steps(model, tokens):
    state = model.init_state(len(tokens), length=tokens.shape[1])
    return torch.stack([model.step(column, state) for column in tokens.unbind(1)], dim=1)


@every_case
def test_logits_are_theirs_whole_in_pieces_and_stepped(peer, truth, model_type, options):
    theirs, folder = peer(model_type, **options)
    tokens = torch.randint(0, 97, (2, 21))
    expected = truth(theirs, tokens)
    model = load(folder).model
    for logits in (
        logits_in_pieces(model, tokens, [21]),
        logits_in_pieces(model, tokens, [1, 13, 7]),
        logits_by_steps(model, tokens),
    ):
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("model_type", FAMILIES + HYBRIDS)
def test_greedy_tokens_are_theirs(peer, truth, model_type):
    # Tied, or with layers that do little, it would repeat itself. Untied, zamba2 would not share its Transformers.
    options = {} if model_type == "zamba2" else {"tie_word_embeddings": False}
    theirs, folder = peer(model_type, shake=0.3, **options)
    prompt = torch.randint(0, 97, (1, 8))
    tokens = prompt
    for _ in range(64):
        tokens = torch.cat([tokens, truth(theirs, tokens)[:, -1:].argmax(-1)], dim=1)
    completion = load(folder).complete(prompt[0].tolist(), max_tokens=64, temperature=0)
    assert completion.tokens == tokens[0, 8:].tolist()
    assert len(set(completion.tokens)) > 4, "the sequence is too dull to tell models apart"


@pytest.mark.parametrize(("model_type", "options"), WRITTEN.values(), ids=WRITTEN)
def test_what_we_write_they_read(peer, truth, model_type, options, tmp_path):
    from transformers import AutoModelForCausalLM

    theirs, folder = peer(model_type, **options)
    export(load(folder), tmp_path / "ours", model_type)
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    expected = theirs.state_dict()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    tokens = torch.randint(0, 97, (2, 21))
    again.eval()
    torch.testing.assert_close(truth(again, tokens), truth(theirs, tokens), atol=2e-6, rtol=0)


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("residual_fp32", [True, False])
def test_bfloat16_folders_stay_bfloat16_and_lose_no_more_than_theirs(peer, truth, model_type, residual_fp32):
    theirs, folder = peer(model_type, torch.bfloat16, residual_in_fp32=residual_fp32)
    model = load(folder).model
    assert model.config.residual_fp32 == residual_fp32
    assert model.embedding.weight.dtype == torch.bfloat16
    assert model.layers[0].mixer.A_log.dtype == torch.float32
    assert getattr(model.layers[0].mixer.A_log, "_no_weight_decay", False)
    tokens = torch.randint(0, 97, (4, 21))
    coarse = truth(theirs, tokens)
    exact = truth(theirs.double(), tokens).double()
    with torch.no_grad():
        ours = model(tokens)[0].double()
    assert (ours - exact).square().mean() <= 2**2 * (coarse - exact).square().mean()


@pytest.mark.parametrize("model_type", HYBRIDS)
def test_bfloat16_hybrids_lose_no_more_than_theirs(peer, truth, model_type):
    theirs, folder = peer(model_type, torch.bfloat16)
    model = load(folder).model
    decays = [parameter for name, parameter in model.named_parameters() if name.endswith("A_log")]
    assert {parameter.dtype for parameter in decays} == {torch.float32}
    tokens = torch.randint(0, 97, (4, 21))
    coarse = truth(theirs, tokens)
    exact = truth(theirs.double(), tokens).double()
    with torch.no_grad():
        ours = model(tokens)[0].double()
    assert (ours - exact).square().mean() <= 2**2 * (coarse - exact).square().mean()


@pytest.mark.parametrize("dtype", ["float32", torch.float64])
def test_dtype_of_the_weights_can_be_chosen(peer, dtype):
    _, folder = peer("mamba2", torch.bfloat16)
    stored = load(folder).model.state_dict()
    expected = {"float32": torch.float32}.get(dtype, dtype)
    for name, tensor in load(folder, dtype=dtype).model.state_dict().items():
        assert tensor.dtype == expected
        assert torch.equal(tensor, stored[name].to(expected))


def test_bfloat16_goes_out_as_bfloat16(peer, truth, tmp_path):
    from transformers import AutoModelForCausalLM

    theirs, folder = peer("mamba", torch.bfloat16)
    export(load(folder), tmp_path / "ours", "mamba")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    tokens = torch.randint(0, 97, (2, 21))
    assert again.dtype == torch.bfloat16
    assert torch.equal(truth(again, tokens), truth(theirs, tokens))


def test_gradients_flow_into_loaded_weights(peer):
    _, folder = peer("mamba")
    model = load(folder).model
    tokens = torch.randint(0, 97, (2, 9))
    model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.lm_head.weight is model.embedding.weight


def test_both_spellings_of_the_embedding_are_read(peer, truth):
    from safetensors.torch import load_file, save_file

    theirs, folder = peer("mamba")
    tensors = load_file(folder / "model.safetensors")
    tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")
    save_file(tensors, folder / "model.safetensors")
    tokens = torch.randint(0, 97, (1, 9))
    torch.testing.assert_close(
        logits_in_pieces(load(folder).model, tokens, [9]), truth(theirs, tokens), atol=1e-5, rtol=0
    )


def test_a_model_begun_here_is_read_there_with_its_tokenizer(tmp_path, truth):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from longwave.generate.text_model import TextModel
    from longwave.mixers import Mamba2
    from longwave.tasks.tokenizer import ByteTokenizer

    mixer = Mamba2.Config(d_state=16, d_head=8, n_groups=2)
    model = LanguageModel(LanguageModel.Config(vocab_size=264, d_model=32, layers=(mixer, mixer)))
    export(TextModel(model, ByteTokenizer()), tmp_path, "mamba2")
    there = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert there.config.eos_token_id == 256
    ids = tokenizer("Hello, wörld")["input_ids"]
    assert ids == ByteTokenizer().encode("Hello, wörld")
    here = load(tmp_path)
    assert here.tokenizer is not None
    assert here.tokenizer.vocab_size == 257
    tokens = torch.tensor([ids])
    torch.testing.assert_close(
        logits_in_pieces(here.model, tokens, [tokens.shape[1]]), truth(there, tokens), atol=1e-5, rtol=0
    )
