// WKV-7: the formulas of one token, shared by the CPU kernel and the CUDA kernel.
//
// A head's state S is a matrix [value, key]. Its rows do not see each other, so a row (or a vector of rows, type V) walks
// the keys j with scalars (type R) that all rows share:
//
//   forward    removed = sum_j S[j] a[j]            what the state holds under the key that is to be changed
//              S[j]   <- wkv7_step(...)
//              y       = sum_j S[j] r[j]
//
//   backward, with G the gradient of S after the token, P the state before it:
//              G[j]   += gy r[j]
//              gr[j]   = sum over rows of S[j] gy             gv = sum_j G[j] k[j]
//              gk[j]   = sum over rows of G[j] v              gremoved = sum_j G[j] b[j]
//              gb[j]   = sum over rows of G[j] removed        ga[j] = sum over rows of P[j] gremoved
//              gw[j]   = decay[j] * sum over rows of G[j] P[j]
//              G[j]   <- wkv7_back(...)
//
// decay = exp(w). Nothing is ever divided by the decays of many tokens: states before a token are computed again from
// saved ones. (The CPU's backward takes a chunk at once, see wkv7_back.h.)
// The includer defines WKV_FN, the qualifiers of an inlined function. No header is included, because NVRTC has none.
#pragma once

template <class V, class R> WKV_FN V wkv7_step(V s, R decay, V removed, R b, V v, R k) {
    return s * decay + (removed * b + v * k);
}

template <class V, class R> WKV_FN V wkv7_back(V g, R decay, V gremoved, R a) { return g * decay + gremoved * a; }
