// Every operator of torch.ops.q4metal, once. Backends register their kernels with
// TORCH_LIBRARY_IMPL; shapes on the meta device and autograd are in torch_q4metal/ops.py; argument
// checks are in checks.h.
//
// Shared arguments: a packed matrix W [N, K] is `weight` uint32 or int32 [N, K * bits / 32],
// `scales` and `biases` [N, K / group_size] in float32, float16 or bfloat16 (layout.h). `bias` [N]
// is the layer's own vector, added in float32. Results have promote(x, scales, biases) as their
// dtype. `precision`: "fast", "exact" or "int8" (precision.h).
#include <torch/library.h>

TORCH_LIBRARY(q4metal, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag, at::Tag::needs_fixed_stride_order};

  // x [..., K] -> x W^T + bias [..., N]; with transpose=False, x [..., N] -> x W [..., K].
  m.def("matmul(Tensor x, Tensor weight, Tensor scales, Tensor? biases=None, Tensor? bias=None, "
        "bool transpose=True, int group_size=64, int bits=4, str mode=\"affine\", "
        "str precision=\"fast\") -> Tensor",
        tags);
  // x [K] -> W x + bias [N].
  m.def("matvec(Tensor x, Tensor weight, Tensor scales, Tensor? biases=None, Tensor? bias=None, "
        "int group_size=64, int bits=4, str mode=\"affine\", str precision=\"fast\") -> Tensor",
        tags);
  // ids [...] int32 or int64 -> rows of W [..., K] in `dtype` (None: the dtype of scales).
  m.def("embedding(Tensor ids, Tensor weight, Tensor scales, Tensor? biases=None, "
        "int group_size=64, int bits=4, str mode=\"affine\", ScalarType? dtype=None) -> Tensor",
        tags);
  // -> W [N, K] in `dtype` (None: the dtype of scales), rounded as MLX's CPU backend rounds.
  m.def("dequantize(Tensor weight, Tensor scales, Tensor? biases=None, "
        "int group_size=64, int bits=4, str mode=\"affine\", ScalarType? dtype=None) -> Tensor",
        tags);
  // w [N, K] -> (weight int32, scales, biases) with the numbers of mlx.core.quantize on a CPU.
  m.def("quantize(Tensor w, int group_size=64, int bits=4, str mode=\"affine\") "
        "-> (Tensor, Tensor, Tensor)",
        tags);
  // One decoded token for each of R rows, 1 to 8, of the model behind the handle `plan`: input ids
  // int64 [R]; positions int64 [R]; rope float32 [R, 2, head_dim], cos and sin; block_tables int32
  // [R, blocks]; kv: the slabs [2, layers, blocks, kv_heads, 32, head_dim] of a KV pool, appended
  // to; out: logits float32 [R, vocab_size], or greedy token ids int64 [R]. The plan of a stage
  // that does not embed takes residual rows float32 [R, hidden_size] as input, and one that has no
  // head gives them.
  m.def("decode_step(int plan, Tensor input, Tensor positions, Tensor rope, Tensor block_tables, "
        "Tensor? sampling, Tensor(a!)[] kv, Tensor(b!) out) -> ()",
        tags);
}
