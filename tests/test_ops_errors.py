"""What can't work raises one sentence that holds the offending value."""

import pytest
import torch

from torch_q4metal import ops, reference

W = reference.quantize(torch.randn(8, 128), 64, 4)
X = torch.randn(2, 128)


def with_tensor(index, tensor):
    return tuple(tensor if i == index else t for i, t in enumerate(W))


CASES = {
    "bits": (lambda: ops.matmul(X, *W, bits=7), ValueError, "bits=7 is not supported"),
    "group size": (lambda: ops.matmul(X, *W, group_size=48), ValueError, "group_size=48"),
    "mode": (lambda: ops.matmul(X, *W, mode="mxfp4"), ValueError, "mode='mxfp4' is not built"),
    "precision": (
        lambda: ops.matmul(X, *W, precision="int4"),
        ValueError,
        "precision='int4' is unknown",
    ),
    "no biases": (lambda: ops.matmul(X, W[0], W[1]), ValueError, "biases is missing"),
    "x shape": (
        lambda: ops.matmul(torch.randn(2, 64), *W),
        ValueError,
        r"last dimension must be 128",
    ),
    "x scalar": (lambda: ops.matmul(torch.tensor(1.0), *W), ValueError, "x has shape"),
    "x dtype": (lambda: ops.matmul(X.double(), *W), ValueError, "x has dtype Double"),
    "weight dtype": (
        lambda: ops.matmul(X, *with_tensor(0, W[0].long())),
        ValueError,
        "weight has dtype Long",
    ),
    "weight dims": (
        lambda: ops.matmul(X, *with_tensor(0, W[0][0])),
        ValueError,
        "weight has shape",
    ),
    "weight shape": (
        lambda: ops.matmul(X, *with_tensor(0, W[0][:, :8])),
        ValueError,
        r"these scales need a weight of \[8, 16\]",
    ),
    "scales dtype": (
        lambda: ops.matmul(X, *with_tensor(1, W[1].double())),
        ValueError,
        "scales has dtype",
    ),
    "biases shape": (
        lambda: ops.matmul(X, *with_tensor(2, W[2][:4])),
        ValueError,
        "biases has shape",
    ),
    "bias shape": (
        lambda: ops.matmul(X, *W, torch.ones(9)),
        ValueError,
        r"bias has shape \[9\]; it must be \[8\]",
    ),
    "bias dtype": (
        lambda: ops.matmul(X, *W, torch.ones(8).int()),
        ValueError,
        "bias has dtype Int",
    ),
    "matvec rows": (lambda: ops.matvec(X, *W), ValueError, "matvec takes"),
    "ids dtype": (lambda: ops.embedding(torch.ones(1), *W), ValueError, "ids has dtype Float"),
    "ids high": (
        lambda: ops.embedding(torch.tensor([8]), *W),
        IndexError,
        "ids holds 8; .* 0 to 7",
    ),
    "ids low": (lambda: ops.embedding(torch.tensor([-1]), *W), IndexError, "ids holds -1"),
    "out dtype": (
        lambda: ops.dequantize(*W, dtype=torch.int32),
        ValueError,
        "dtype Int is not supported",
    ),
    "quantize K": (
        lambda: ops.quantize(torch.randn(2, 100)),
        ValueError,
        "K=100 must be a multiple",
    ),
    "quantize dims": (lambda: ops.quantize(torch.randn(64)), ValueError, "w has shape"),
    "quantize dtype": (
        lambda: ops.quantize(torch.ones(2, 64, dtype=torch.int32)),
        ValueError,
        "w has dtype",
    ),
    "two devices": (lambda: ops.matmul(X.to("meta"), *W), (ValueError, RuntimeError), "meta"),
    "meta x shape": (
        lambda: ops.matmul(torch.empty(2, 64, device="meta"), *(t.to("meta") for t in W)),
        ValueError,
        "last dimension must be 128",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_error(name):
    call, error, sentence = CASES[name]
    with pytest.raises(error, match=sentence) as caught:
        call()
    assert "\n" not in str(caught.value).strip()
