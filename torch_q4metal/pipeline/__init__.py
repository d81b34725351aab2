"""One model over several ranks, each of which holds a contiguous range of layers."""
