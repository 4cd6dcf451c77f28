# SPDX-License-Identifier: MIT
"""The low-latency methods of a buffer, in a few lines of NumPy, to test what measures them."""

import pickle

import ml_dtypes
import numpy as np

from mscclpp_ep.bench.ll import quantized


class StandIn:
    """A buffer whose rows arrive in an order of its own; `spoil` changes what it gives."""

    def __init__(self, group, spoil=lambda op, array: None):
        self._group = group
        self._spoil = spoil

    def destroy(self):
        self._group.barrier()

    def _gather(self, *arrays):
        return [pickle.loads(each) for each in self._group.all_gather(pickle.dumps(arrays))]

    def low_latency_dispatch(self, x, topk_idx, most, num_experts, use_fp8=True):
        held = -(-num_experts // self._group.size)
        first = self._group.rank * held
        bits = x.view(np.uint16)
        rows, scales = quantized(bits) if use_fp8 else (bits, None)
        slots = self._group.size * most
        recv_x = np.zeros((held, slots, x.shape[1]), rows.dtype)
        # Column-major, as DeepEP's are.
        recv_scales = np.zeros((held, x.shape[1] // 128, slots), np.float32).swapaxes(1, 2)
        counts = np.zeros(held, np.int32)
        places = []
        sent = self._gather(rows, scales, topk_idx)
        for source in reversed(range(self._group.size)):
            their_rows, their_scales, choices = sent[source]
            for token, k in zip(*np.nonzero(choices // held == self._group.rank), strict=True):
                expert = choices[token, k] - first
                slot = counts[expert]
                recv_x[expert, slot] = their_rows[token]
                if use_fp8:
                    recv_scales[expert, slot] = their_scales[token]
                counts[expert] += 1
                places.append((source, token, k, expert, slot))
        self._spoil("FP8 dispatch" if use_fp8 else "dispatch", recv_x)
        if use_fp8:
            self._spoil("scales", recv_scales)
            received = (recv_x.view(ml_dtypes.float8_e4m3fn), recv_scales)
        else:
            received = recv_x.view(ml_dtypes.bfloat16)
        return received, counts, places, None, None

    def low_latency_combine(self, x, topk_idx, topk_weights, handle):
        mine = [(s, t, k, x[e, i].astype(np.float32)) for s, t, k, e, i in handle]
        total = np.zeros((len(topk_idx), x.shape[2]), np.float32)
        for (parts,) in self._gather(mine):
            for source, token, k, row in parts:
                if source == self._group.rank:
                    total[token] += row * topk_weights[token, k]
        out = total.astype(ml_dtypes.bfloat16)
        self._spoil("combine", out)
        return out, None, None
