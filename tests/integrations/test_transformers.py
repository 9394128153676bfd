"""The patch of Transformers' causal models, compared with the models as they are."""

import copy
import importlib.util
import inspect
import sys

import pytest
import torch
from torch import Tensor

from pgolf.integrations.transformers import patch
from tests.conftest import DEVICES

HAS = importlib.util.find_spec("transformers") is not None
requires_transformers = pytest.mark.skipif(
    not HAS, reason="needs transformers: pip install 'pgolf[transformers]'"
)
SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    "attention_dropout": 0.0,
}  # fmt: skip
# The cap of 1 is below many logits of these small models.
MODELS = {
    "llama": ("Llama", {}),
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "gemma2": ("Gemma2", {"final_logit_softcapping": 30.0}),
    "gemma2 cap 1": ("Gemma2", {"final_logit_softcapping": 1.0}),
    "gemma3": ("Gemma3", {}),
    "gemma3 cap 30": ("Gemma3", {"final_logit_softcapping": 30.0}),
    "qwen3": ("Qwen3", {}),
    "phi, a bias": ("Phi", {"resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "granite, a divisor": ("Granite", {"logits_scaling": 4.0}),
    "cohere, a factor": ("Cohere", {"logit_scale": 0.25}),
    "mixtral, a router loss": ("Mixtral", {"output_router_logits": True, "num_local_experts": 4}),
}


def make(name: str) -> torch.nn.Module:
    import transformers

    kind, changed = MODELS[name]
    config = getattr(transformers, f"{kind}TextConfig" if kind == "Gemma3" else f"{kind}Config")(
        **(SIZES | changed)
    )
    torch.manual_seed(1)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).train()
    with torch.no_grad():
        head = model.get_output_embeddings()
        if not config.tie_word_embeddings:
            head.weight.mul_(20.0)
        if head.bias is not None:
            head.bias.normal_()
    return model


def batch() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(2)
    tokens = torch.randint(1, 97, (2, 16), generator=g)
    labels = tokens.clone()
    labels[0, :5] = -100
    return {"input_ids": tokens, "labels": labels}


def step(model: torch.nn.Module, **inputs) -> tuple[object, dict[str, Tensor]]:
    model.zero_grad()
    out = model(**inputs)
    loss = out[0] if isinstance(out, tuple) else out.loss
    loss.backward()
    return out, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal_steps(usual: torch.nn.Module, fused: torch.nn.Module, **inputs) -> None:
    (want, wanted), (got, grads) = step(usual, **inputs), step(fused, **inputs)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=1e-5)
    assert got.logits is None and wanted.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(
            grad, wanted[name], rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@requires_transformers
@pytest.mark.parametrize("memory", ["low", "fast"])
@pytest.mark.parametrize("name", list(MODELS))
def test_a_training_step_has_the_same_loss_and_gradients(name: str, memory: str) -> None:
    usual = make(name)
    fused = patch(copy.deepcopy(usual), memory=memory)
    assert fused.state_dict().keys() == usual.state_dict().keys()
    for _ in range(2):  # the first step checks what the model does to its logits
        assert_equal_steps(usual, fused, **batch())
    assert_equal_steps(usual, fused, **batch(), num_items_in_batch=torch.tensor(50))
    assert_equal_steps(usual, fused, **batch(), num_items_in_batch=7)


@requires_transformers
@pytest.mark.parametrize("name", ["llama", "gemma2 cap 1"])
def test_logits_are_returned_in_evaluation_and_without_labels(name: str) -> None:
    usual = make(name)
    fused, inputs = patch(copy.deepcopy(usual)), batch()
    labels = inputs.pop("labels")
    assert torch.equal(fused(**inputs).logits, usual(**inputs).logits)
    usual.eval(), fused.eval()
    want, got = usual(**inputs, labels=labels), fused(**inputs, labels=labels)
    assert torch.equal(got.logits, want.logits) and torch.equal(got.loss, want.loss)
    tokens = fused.generate(inputs["input_ids"], max_new_tokens=3, do_sample=False)
    assert torch.equal(tokens, usual.generate(inputs["input_ids"], max_new_tokens=3, do_sample=False))


@requires_transformers
def test_shifted_labels_another_ignore_index_tuples_and_no_labels_at_all() -> None:
    usual = make("gemma2")
    fused, inputs = patch(copy.deepcopy(usual)), batch()
    shifted = torch.roll(inputs["labels"], -1, dims=1)
    assert_equal_steps(usual, fused, **inputs, shift_labels=shifted)
    inputs["labels"] = inputs["labels"].where(inputs["labels"] != -100, 5)
    assert_equal_steps(usual, fused, **inputs, ignore_index=5)
    got, want = (step(m, **inputs, return_dict=False)[0] for m in (fused, usual))
    assert len(got) == len(want) - 1
    torch.testing.assert_close(got[0], want[0])
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    out, grads = step(fused, **inputs)
    assert out.loss == 0 and all((g == 0).all() for g in grads.values())


@requires_transformers
def test_no_logits_are_made_in_a_training_step() -> None:
    model, inputs = patch(make("llama")), batch()
    shapes = set()

    class Shapes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            shapes.update(
                t.shape for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, Tensor)
            )
            return out

    with Shapes():
        step(model, **inputs)
    assert (2, 16, 32) in shapes and not [s for s in shapes if s in ((2, 16, 97), (32, 97), (30, 97))]


@requires_transformers
def test_a_patched_model_keeps_its_name_signature_copies_and_files(tmp_path) -> None:
    usual = make("llama")
    fused = patch(copy.deepcopy(usual))
    assert type(fused).__name__ == "LlamaForCausalLM" and isinstance(fused, type(usual))
    assert inspect.signature(fused.forward) == inspect.signature(usual.forward)
    assert_equal_steps(usual, copy.deepcopy(fused), **batch())
    fused.save_pretrained(tmp_path)
    again = type(usual).from_pretrained(tmp_path).train()
    assert fused.config.architectures == ["LlamaForCausalLM"] and type(again) is type(usual)
    assert_equal_steps(again, fused, **batch())


@requires_transformers
def test_compile_in_one_graph() -> None:
    usual = make("gemma2 cap 1")
    fused = patch(copy.deepcopy(usual))
    torch.compiler.reset()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    out = compiled(**batch())
    out.loss.backward()
    want, grads = step(usual, **batch())
    torch.testing.assert_close(out.loss, want.loss)
    for name, p in fused.named_parameters():
        torch.testing.assert_close(p.grad, grads[name], rtol=1e-3, atol=1e-5)


@requires_transformers
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["llama", "gemma2 cap 1", "gemma3 cap 30"])
@pytest.mark.parametrize("cast", ["autocast", "model"])
def test_16_bits_come_as_near_as_the_unpatched_model(name: str, cast: str, device: str) -> None:
    inputs = {key: value.to(device) for key, value in batch().items()}
    exact, gradients = step(make(name).double().to(device), **inputs)
    usual = make(name).to(device, torch.bfloat16 if cast == "model" else torch.float32)
    fused = patch(copy.deepcopy(usual))
    with torch.autocast(device, torch.bfloat16, enabled=cast == "autocast"):
        (want, wanted), (got, grads) = step(usual, **inputs), step(fused, **inputs)
    assert got.logits is None
    assert abs(got.loss - exact.loss) <= 2 * abs(want.loss - exact.loss) + 0.01 * exact.loss
    for key, gradient in gradients.items():
        usual_error, error = ((g[key] - gradient).norm() for g in (wanted, grads))
        assert error <= 2 * usual_error + 0.01 * gradient.norm(), key


@requires_transformers
def test_what_cannot_be_patched_is_named() -> None:
    import transformers

    with pytest.raises(TypeError, match="model must be a PreTrainedModel of transformers, got Linear"):
        patch(torch.nn.Linear(3, 3))
    model = patch(make("llama"))
    with pytest.raises(ValueError, match="this LlamaForCausalLM is patched already"):
        patch(model)
    with pytest.raises(TypeError, match=r"the head must be a torch\.nn\.Linear, got NoneType"):
        patch(make("llama").model)
    other = make("llama")
    other.loss_function = lambda logits, labels, **_: logits.sum()
    with pytest.raises(ValueError, match="the loss of LlamaForCausalLM is <lambda>; only ForCausalLMLoss"):
        patch(other)
    model.loss_function = other.loss_function
    with pytest.raises(ValueError, match="only ForCausalLMLoss"):
        model(**batch())
    bart = transformers.BartForCausalLM(
        transformers.BartConfig(
            vocab_size=97, d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=8
        )
    )
    with pytest.raises(TypeError, match=r"BartForCausalLM.forward does not call self.loss_function"):
        patch(bart)


@requires_transformers
def test_an_unknown_change_of_the_logits_is_an_error_and_leaves_the_model_usable() -> None:
    model = patch(make("cohere, a factor"))
    model.logit_scale = torch.tensor(0.25)  # a tensor is not read as a factor
    with pytest.raises(
        RuntimeError, match=r"CohereForCausalLM does something to its logits .* scale 1.0 make"
    ):
        model(**batch())
    inputs = batch()
    inputs.pop("labels")
    assert model(**inputs).logits.shape == (2, 16, 97)


def test_without_transformers_the_error_says_how_to_install_it(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'pgolf\[transformers\]'"):
        patch(torch.nn.Linear(3, 3))
