"""Golden outputs of dual-state linear attention, made with numpy in fp64 and independent of the C++ code.

It does not run the recurrence. With A[t] the cumulative sum of the log gates in the order in which tokens enter, token e enters at
time e + W, and its weight in the output of query t is  sum_f q'[t, f] k'[e, f] exp(A[t, f] - A[e + W, f]):  one explicit matrix of
weights per head, as for softmax attention.

Writes src/ops/dsla/testdata/golden_<name>.bin, little-endian: 8 int32 (H, Hkv, D, F, states, W, S, T), then float32 arrays in the order
phi_q [H,D,D], phi_k [Hkv,D,D], gate_weight [states,Hkv,D,F], gate_bias [states,Hkv,F], mix [H,states], cos [T,D/2], sin [T,D/2],
q [T,H,D], k [T,Hkv,D], v [T,Hkv,D], claim [T,H] (the inputs; q and k rotated), and out [T,H,D], state [Hkv,states*F,D] and
norm [Hkv,states*F] after T tokens (the results). Gate floor -2.5. Run it from the project's root: python3 tools/dsla_golden.py
"""
import os

import numpy as np

FLOOR = -2.5


def rotate(x, cos, sin):
    """x [T, heads, D], pairs (d, d + D/2)."""
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    c, s = cos[:, None], sin[:, None]
    return np.concatenate([a * c - b * s, b * c + a * s], -1)


def softmax(y):
    e = np.exp(y - y.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def features(u, maps, F):
    """u [T, heads, D] -> [T, heads, F]"""
    y = np.einsum('thd,hde->the', u, maps)
    return softmax(y) if F == u.shape[-1] else np.concatenate([softmax(y), softmax(-y)], -1)


def log_gates(k, cos, sin, weight, bias):
    """k [T, Hkv, D] rotated -> [T, Hkv, states, F]"""
    raw = rotate(k, cos, -sin)
    x = np.einsum('thd,ihdf->thif', raw, weight) + bias.transpose(1, 0, 2)
    return np.maximum(-np.logaddexp(0, -x) / 16, FLOOR)


def dsla(p, W, S):
    """p: the inputs as fp64. Returns out, state, norm."""
    T, H, D = p['q'].shape
    Hkv, F, states = p['k'].shape[1], p['gate_bias'].shape[-1], p['gate_bias'].shape[0]
    group = np.arange(H) // (H // Hkv)
    a = log_gates(p['k'], p['cos'], p['sin'], p['gate_weight'], p['gate_bias'])
    keys = -np.expm1(a) * features(p['k'], p['phi_k'], F)[:, :, None]
    queries = features(p['q'], p['phi_q'], F)[:, :, None] * p['mix'][None, :, :, None]
    # By time: the token e = t - W enters at t, if it is no sink.
    enters = np.zeros((T, Hkv, states, F))
    added, values = np.zeros_like(enters), np.zeros((T, Hkv, D + 1))
    for t in range(T):
        e = t - W
        if e >= S:
            enters[t], added[t] = a[e], keys[e]
            values[t, :, :D], values[t, :, D] = p['v'][e], 1
    A = np.cumsum(enters, 0)
    causal = np.tril(np.ones((T, T), bool))[:, :, None, None, None]
    decay = np.where(causal, np.exp(np.minimum(A[:, None] - A[None], 0)), 0)  # [t, s, Hkv, states, F]
    weights = np.einsum('thif,tshif,shif->hts', queries, decay[:, :, group], added[:, group])
    lin = np.einsum('hts,shd->thd', weights, values[:, group])
    denominator = lin[..., D]
    lin = lin[..., :D] / (denominator[..., None] + 1e-6)
    state = np.einsum('shif,shif,shd->hifd', np.exp(A[-1:] - A), added, values).reshape(Hkv, states * F, D + 1)
    if W == 0:
        return lin, state[..., :D], state[..., D]
    scores = np.einsum('thd,shd->hts', p['q'], p['k'][:, group]) / np.sqrt(D)
    t, s = np.arange(T)[:, None], np.arange(T)[None]
    seen = (s <= t) & ((s < S) | (s > t - W))
    scores = np.where(seen, scores, -np.inf)
    lse = np.logaddexp.reduce(scores, -1).T  # [T, H]
    win = np.einsum('hts,shd->thd', softmax(scores), p['v'][:, group])
    w = np.where(denominator < 1e-6, 0, 1 / (1 + np.exp(lse - p['claim'])))[..., None]
    return w * lin + (1 - w) * win, state[..., :D], state[..., D]


def case(name, H, Hkv, D, F, states, W, S, T, floor_share, seed):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape)
    position = np.arange(T)[:, None] * 10000.0 ** (-np.arange(D // 2) * 2 / D)[None]
    bias = rng.uniform(-4, 6, (states, Hkv, F))
    bias[rng.uniform(size=bias.shape) < floor_share] = -60  # at the floor
    mix = normal(H, states)
    p = dict(phi_q=np.eye(D) + 0.1 * normal(H, D, D), phi_k=np.eye(D) + 0.1 * normal(Hkv, D, D),
             gate_weight=0.5 * normal(states, Hkv, D, F), gate_bias=bias, mix=softmax(mix),
             cos=np.cos(position), sin=np.sin(position),
             q=1.5 * normal(T, H, D), k=1.5 * normal(T, Hkv, D), v=normal(T, Hkv, D), claim=4 + normal(T, H))
    p = {key: x.astype('<f4') for key, x in p.items()}  # the inputs are what fp32 holds of them
    out, state, norm = dsla({key: x.astype(np.float64) for key, x in p.items()}, W, S)
    path = f'src/ops/dsla/testdata/golden_{name}.bin'
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, 'wb') as f:
        f.write(np.array([H, Hkv, D, F, states, W, S, T], '<i4').tobytes())
        for x in list(p.values()) + [out, state, norm]:
            f.write(np.ascontiguousarray(x, '<f4').tobytes())
    print(path, os.path.getsize(path), 'bytes, out rms', np.sqrt((out ** 2).mean()))


if __name__ == '__main__':
    case('window', H=4, Hkv=2, D=16, F=32, states=2, W=8, S=2, T=60, floor_share=0.1, seed=1)
    case('states', H=3, Hkv=1, D=32, F=32, states=2, W=0, S=0, T=50, floor_share=0.1, seed=2)
    case('single', H=2, Hkv=2, D=16, F=16, states=1, W=5, S=7, T=40, floor_share=0.5, seed=3)
