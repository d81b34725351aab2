"""Models: caches, chunks and batches change nothing; what is not built is refused."""

import copy
import gc
import pickle
import weakref

import pytest
import tiny
import torch
from sentence import assert_one_sentence
from torch import nn

from torch_q4metal.cache import Sequence
from torch_q4metal.errors import CheckpointError, ContextLengthError, Q4MetalError
from torch_q4metal.linear import Q4Embedding, Q4Linear
from torch_q4metal.models import FAMILIES, base, dense, load_model

LONG = {"max_position_embeddings": 4096}


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny matrices gain nothing from threads, and waiting for a busy core costs a lot."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def load(tmp_path, family="llama", *, dtype=torch.float32, max_kv_size=None, name="m", **options):
    path = tiny.write_tiny(tmp_path / name, family, **options).path
    return load_model(path, dtype=dtype, max_kv_size=max_kv_size)


def random_ids(*shape):
    return torch.randint(tiny.VOCAB_SIZE, shape)


def assert_close(a, b, bound=1e-5):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= bound * b.abs().max()


def test_modules_have_mlx_names_and_the_state_dict_round_trips(tmp_path):
    dense = {"model.layers.0.mlp.up_proj": False}
    options = {"family": "qwen2", "tied": False, "overrides": dense}
    written = tiny.write_tiny(tmp_path / "m", **options)
    model = load_model(written.path)
    state = model.state_dict()
    assert set(state) == set(written.tensors)
    for name, tensor in written.tensors.items():
        saved = state[name]
        packed = saved.dtype == torch.uint32
        assert torch.equal(saved.view(torch.int32) if packed else saved, tensor)
    other = load_model(tiny.write_tiny(tmp_path / "other", seed=1, **options).path)
    ids = random_ids(1, 9)
    assert not torch.equal(model(ids), other(ids))
    other.load_state_dict(state)
    assert torch.equal(model(ids), other(ids))


def test_weights_stay_packed_in_eval_mode_without_gradients(tmp_path):
    model = load(tmp_path, tied=False)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert isinstance(model.model.embed_tokens, Q4Embedding)
    linears = [m for m in model.modules() if isinstance(m, nn.Linear | Q4Linear)]
    assert len(linears) == 2 * 7 + 1
    assert all(isinstance(linear, Q4Linear) for linear in linears)


@pytest.mark.parametrize("family", FAMILIES)
def test_cache_or_not_at_once_or_token_by_token(tmp_path, family):
    model = load(tmp_path, family)
    ids = random_ids(2, 40)
    expected = model(ids)
    assert expected.shape == (2, 40, tiny.VOCAB_SIZE)
    assert expected.dtype == torch.float32
    caches = [model.make_cache(64), model.make_cache(64)]
    assert_close(model(ids, caches), expected)
    assert [cache.tokens for cache in caches] == ids.tolist()
    caches = [model.make_cache(64), model.make_cache(64)]
    parts = [model(ids[:, :11], caches)]
    parts += [model(ids[:, i : i + 3], caches) for i in range(11, 20, 3)]
    parts += [model(ids[:, i : i + 1], caches) for i in range(20, 40)]
    assert_close(torch.cat(parts, 1), expected)


def test_chunks_of_a_long_prompt(tmp_path, monkeypatch):
    model = load(tmp_path, config=LONG)
    ids = random_ids(1, 700)
    expected = model(ids)
    assert_close(model(ids, [model.make_cache()]), expected)
    passes = []
    advance = base.CausalLM._advance
    monkeypatch.setattr(
        base.CausalLM,
        "_advance",
        lambda self, ids, cache, length: (
            passes.append((cache[0].length, ids.shape[1])) or advance(self, ids, cache, length)
        ),
    )
    cache = model.make_cache()
    model(ids[:, :100], [cache])
    assert_close(model(ids[:, 100:], [cache]), expected[:, 100:])
    assert passes == [(0, 100), (100, 412), (512, 188)]


def test_no_pass_holds_all_scores(tmp_path, monkeypatch):
    """Masks are [512, positions] at most, and attention never makes more of them."""
    model = load(tmp_path, config=LONG)
    shapes = []
    attention = base.F.scaled_dot_product_attention

    def watched(queries, *arguments, attn_mask=None, **options):
        shapes.append((queries.shape[2], None if attn_mask is None else tuple(attn_mask.shape)))
        return attention(queries, *arguments, attn_mask=attn_mask, **options)

    monkeypatch.setattr(base.F, "scaled_dot_product_attention", watched)
    model(random_ids(1, 1100), [model.make_cache()], logits_to_keep=1)
    assert set(shapes) == {(512, None), (512, (512, 1024)), (76, (76, 1100))}


@pytest.mark.parametrize("keep", [1, 5, 300, 600])
def test_logits_to_keep(tmp_path, keep):
    model = load(tmp_path, config=LONG)
    ids = random_ids(2, 600)
    expected = model(ids)[:, -keep:]
    assert_close(model(ids, logits_to_keep=keep), expected)
    caches = [model.make_cache(), model.make_cache()]
    assert_close(model(ids, caches, logits_to_keep=keep), expected)
    ids = random_ids(2, 3)
    both = [model(ids, [cache.fork() for cache in caches], logits_to_keep=k) for k in (keep, 0)]
    assert torch.equal(both[0], both[1][:, -keep:])


def test_the_head_sees_only_rows_that_are_wanted(tmp_path):
    model = load(tmp_path, tied=False, config=LONG)
    seen = []
    model.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    model(random_ids(1, 1030), [model.make_cache()], logits_to_keep=1)
    assert seen == [(1, 1, 64)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"overrides": {"model.layers.0.mlp.up_proj": False}},
        {"tied": False, "overrides": {"lm_head": False}},
    ],
    ids=["packed", "dense", "dense head"],
)
def test_a_row_has_the_same_bits_alone_and_in_company(tmp_path, options):
    model = load(tmp_path, **options)
    lengths = (40, 3, 64, 31, 1, 33, 20, 7)
    pool = model.make_pool(4096)
    texts = [random_ids(1, n) for n in lengths]

    def prefilled():
        caches = [Sequence(pool) for _ in lengths]
        for ids, cache in zip(texts, caches, strict=True):
            model(ids, [cache])
        return caches

    together, alone = prefilled(), prefilled()
    for step in range(3):
        ids = random_ids(8, 1)
        logits = model(ids, together)
        for i, cache in enumerate(alone):
            assert torch.equal(model(ids[i : i + 1], [cache]), logits[i : i + 1]), step


def test_prompts_of_a_batch_do_not_share_a_pass(tmp_path):
    model = load(tmp_path)
    ids = random_ids(3, 20)
    caches = [model.make_cache(64) for _ in range(3)]
    together = model(ids, caches)
    for i in range(3):
        assert torch.equal(model(ids[i : i + 1], [model.make_cache(64)])[0], together[i])


def test_dynamic_rope_looks_at_each_text_s_own_length(tmp_path):
    fields = {
        "max_position_embeddings": 16,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
    }
    model = load(tmp_path, config=fields, max_kv_size=64)
    long, short = model.make_cache(), model.make_cache()
    for cache, count in ((long, 30), (short, 5)):
        model(random_ids(1, count), [cache])
    ids = random_ids(2, 1)
    alone = [model(ids[i : i + 1], [c.fork()])[0] for i, c in enumerate((long, short))]
    together = model(ids, [long, short])
    assert torch.equal(together, torch.stack(alone))


def test_dynamic_rope_turns_all_chunks_of_a_prompt_alike(tmp_path):
    fields = {
        "max_position_embeddings": 16,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
    }
    model = load(tmp_path, config=fields, max_kv_size=700)
    ids = random_ids(1, 700)
    assert_close(model(ids, [model.make_cache()]), model(ids))


def test_forks_and_truncated_sequences_go_on_as_if_nothing_had_been(tmp_path):
    model = load(tmp_path)
    ids = random_ids(1, 40)
    cache = model.make_cache(512)
    model(ids, [cache])
    fork = cache.fork()
    model(random_ids(1, 20), [cache])
    cache.truncate(33)
    expected = model(ids)
    for continued, start in ((fork, 40), (cache, 33)):
        more = torch.cat((ids[:, :start], random_ids(1, 9)), 1)
        logits = model(more[:, start:], [continued])
        assert_close(logits, model(more)[:, start:])
    assert_close(expected, model(ids))


def test_an_interrupt_leaves_whole_passes(tmp_path):
    model = load(tmp_path, config=LONG)
    ids = random_ids(1, 1300)
    expected = model(ids)
    cache = model.make_cache()
    calls = []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 2:  # in the second chunk, whose first layer is already written
            raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(ids, [cache])
    hook.remove()
    assert cache.tokens == ids[0, :512].tolist()
    assert_close(model(ids[:, 512:], [cache]), expected[:, 512:])


def test_dense_matrices_are_computed_in_f32_and_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(dense, "_BLOCK_BYTES", 4 * 64 * 7)
    written = tiny.write_tiny(tmp_path / "m", bits=None, dtype=torch.bfloat16, tied=False)
    model = load_model(written.path)
    assert type(model.lm_head) is dense.DenseLinear
    assert isinstance(model.lm_head, nn.Linear)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.kv_dtype == torch.bfloat16
    for rows in (1, 3, 20):
        x = torch.randn(1, rows, 64)
        expected = x.double() @ model.lm_head.weight.double().T
        torch.testing.assert_close(model.lm_head(x), expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_activations_stay_close_and_the_residual_stays_f32(tmp_path, dtype):
    written = tiny.write_tiny(tmp_path / "m", dtype=dtype)
    model = load_model(written.path, dtype=dtype)
    assert model.dtype == dtype
    seen = []
    model.model.layers[0].register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    model.model.layers[0].mlp.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    ids = random_ids(1, 30)
    logits = model(ids)
    assert logits.dtype == torch.float32
    assert seen == [dtype, torch.float32]
    difference = (logits - load_model(written.path)(ids)).norm() / logits.norm()
    assert 1e-5 < difference < 0.05


@pytest.mark.parametrize(
    ("options", "precision", "dtype", "kv"),
    [
        ({}, "fast", torch.float32, torch.float16),
        ({"dtype": torch.float32}, "exact", torch.float32, torch.float32),
        ({"dtype": torch.bfloat16}, "fast", torch.bfloat16, torch.float16),
        ({"precision": "exact"}, "exact", torch.float32, torch.float32),
        ({"dtype": torch.float32, "precision": "fast"}, "fast", torch.float32, torch.float16),
        ({"dtype": torch.bfloat16, "precision": "exact"}, "exact", torch.bfloat16, torch.float32),
    ],
)
def test_precision_and_dtypes(tmp_path, options, precision, dtype, kv):
    path = tiny.write_tiny(tmp_path / "m", dtype=torch.float16, tied=False).path
    model = load_model(path, **options, device="cpu")
    packed = [m for m in model.modules() if isinstance(m, Q4Linear | Q4Embedding)]
    assert {m.precision for m in packed} == {precision}
    assert (model.dtype, model.kv_dtype, model.make_pool().dtype) == (dtype, kv, kv)
    assert model.model.embed_tokens(torch.tensor([1])).dtype == torch.float32


def test_context(tmp_path, caplog):
    assert load(tmp_path, name="a").max_kv_size == 512
    long = {"max_position_embeddings": 100_000}
    assert load(tmp_path, name="b", config=long).max_kv_size == 8192
    assert load(tmp_path, name="b", config=long, max_kv_size=9000).max_kv_size == 9000
    assert load(tmp_path, name="b", config=long, max_kv_size=9000).make_pool().max_tokens == 9000
    assert not caplog.text
    assert load(tmp_path, name="a", max_kv_size=600).max_kv_size == 600
    assert "600 is beyond the 512 tokens" in caplog.text
    with pytest.raises(Q4MetalError) as error:
        load(tmp_path, name="a", max_kv_size=0)
    assert_one_sentence(error.value, "max_kv_size", "0")


def test_a_text_beyond_the_context_is_named_before_anything_is_computed(tmp_path, monkeypatch):
    model = load(tmp_path, max_kv_size=50)
    cache = model.make_cache()
    model(random_ids(1, 30), [cache])
    monkeypatch.setattr(model.model, "forward", None)
    with pytest.raises(ContextLengthError) as error:
        model(random_ids(1, 21), [cache])
    assert_one_sentence(error.value, "51", "50", "max_kv_size")
    with pytest.raises(ContextLengthError) as error:
        model(random_ids(1, 5), [Sequence(model.make_pool(4))])
    assert_one_sentence(error.value, "4", "5")
    assert cache.length == 30


def test_wrong_arguments(tmp_path):
    model = load(tmp_path)
    for ids in (torch.tensor([1]), torch.ones(1, 2), torch.ones(1, 0, dtype=torch.int64)):
        with pytest.raises(ValueError, match="ids must be int64"):
            model(ids)
    cache = model.make_cache()
    for caches in ([cache], [cache, cache]):
        with pytest.raises(ValueError, match="2 different sequences"):
            model(random_ids(2, 1), caches)
    with pytest.raises(IndexError):
        model(torch.tensor([[tiny.VOCAB_SIZE]]), [cache])
    assert cache.length == 0


def test_whether_the_head_is_tied_is_decided_by_the_files(tmp_path, caplog):
    tied = tiny.write_tiny(tmp_path / "tied", tied=True).path
    untied = tiny.write_tiny(tmp_path / "untied", tied=False).path
    for path in (tied, untied):
        tiny.edit_json(path / "config.json", tie_word_embeddings=None)
    assert load_model(tied).config.tied
    assert not load_model(untied).config.tied
    assert not caplog.text
    expected = load_model(untied)(torch.tensor([[1, 2]]))
    tiny.edit_json(untied / "config.json", tie_word_embeddings=True)
    assert torch.equal(load_model(untied)(torch.tensor([[1, 2]])), expected)
    assert "lm_head.weight is there" in caplog.text


def test_a_head_that_is_promised_and_missing_is_named(tmp_path):
    path = tiny.write_tiny(tmp_path / "m", tied=False, shards=3).path
    (path / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError) as error:
        load_model(path)
    assert_one_sentence(error.value, "lm_head", "model-00003-of-00003.safetensors")


def test_training_through_the_model_reaches_its_inputs(tmp_path):
    """Without a cache gradients flow, as adapters on top need."""
    model = load(tmp_path)
    table = model.model.embed_tokens
    rows = table(random_ids(1, 12)).requires_grad_()
    model.model.embed_tokens.forward = lambda ids: rows
    model(random_ids(1, 12)).square().mean().backward()
    assert rows.grad is not None
    assert rows.grad.abs().min(dim=-1).values.max() > 0


def test_a_nested_checkpoint_of_a_vision_model(tmp_path):
    plain = load(tmp_path, name="plain")
    nested = tiny.write_tiny(tmp_path / "nested", nested=True).path
    ids = random_ids(1, 5)
    assert torch.equal(load_model(nested, dtype=torch.float32)(ids), plain(ids))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_model_can_be_copied(tmp_path, again):
    model = load(tmp_path, overrides={"model.layers.0.mlp.up_proj": False})
    ids = random_ids(1, 9)
    assert torch.equal(again(model)(ids), model(ids))


def test_a_model_can_be_dropped(tmp_path):
    model = load(tmp_path)
    model(random_ids(1, 3), [model.make_cache(32)])
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
