// WKV-4: the formulas of one token and one channel, shared by the CPU kernel and the CUDA kernel.
//
// The state (a, b, e) stands for the numerator a * exp(e) and the denominator b * exp(e); empty is (0, 0, -1e38).
// Subtracting the larger of two exponents leaves one weight equal to 1, so a pair of weights costs one exponential.
//
// The includer defines, before including:
//   WKV_FN           qualifiers of an inlined function, e.g. `static inline` or `static __device__ __forceinline__`
//   wkv_exp(R)       for R = float, double; 0 far below the range, arguments never much above 0
//   wkv_log(R)       for positive normal numbers; to any base, that of wkv_exp, in which all exponents then are
//   wkv_max(R, R), and wkv_below(R), -|x|
// No header is included here, because NVRTC has none.
#pragma once

template <class R> struct Wkv4State { R a, b, e; };

// What one token reads: y = numerator / den, and exp(top) * den is the denominator in full.
template <class R> struct Wkv4Output { R y, top, den; };

// The adjoint after a token, in units of exp(f): ga, gb of the state's numerator and denominator; pa, pb their
// derivatives by w, counted from where pa and pb were last set to 0.
template <class R> struct Wkv4Adjoint { R ga, gb, f, pa, pb; };

// What one token adds to the gradients.
template <class R> struct Wkv4Grad { R k, v, u, w; };

template <class R> struct WkvPair { R first, second; };

// Exponents stop at that of an empty state, so that sums of them never reach -inf.
template <class R> WKV_FN R wkv_empty() { return R(-1e38); }
template <class R> WKV_FN R wkv_clamp(R x) { return wkv_max(x, wkv_empty<R>()); }

// exp(p - max(p, q)) and exp(q - max(p, q)).
template <class R> WKV_FN WkvPair<R> wkv_weights(R p, R q) {
    R d = p - q, x = wkv_exp(wkv_below(d));
    return {d > 0 ? R(1) : x, d > 0 ? x : R(1)};
}

template <class R> WKV_FN Wkv4Output<R> wkv4_out(R u, R k, R v, const Wkv4State<R>& s) {
    WkvPair<R> x = wkv_weights(s.e, u + k);
    R den = x.first * s.b + x.second;
    return {(x.first * s.a + x.second * v) / den, wkv_max(s.e, u + k), den};
}

// Adds the sums a * exp(e) and b * exp(e) to a state.
template <class R> WKV_FN void wkv4_add(Wkv4State<R>& s, R a, R b, R e) {
    WkvPair<R> x = wkv_weights(s.e, e);
    s.a = x.first * s.a + x.second * a;
    s.b = x.first * s.b + x.second * b;
    s.e = wkv_max(s.e, e);
}

// Takes a state across a stretch of tokens: it decays, and what the stretch adds from the empty state, `own`, is added.
// Exact and associative. `decay` is n * w for n tokens, or wkv_empty() when one of them opens a document.
template <class R> WKV_FN void wkv4_cross(Wkv4State<R>& s, R decay, const Wkv4State<R>& own) {
    s.e = wkv_clamp(s.e + decay);
    wkv4_add(s, own.a, own.b, own.e);
}

// A token is a stretch of one. No clamp here nor in wkv4_back: the exponent is k or more after every token.
template <class R> WKV_FN void wkv4_step(R w, R k, R v, Wkv4State<R>& s) {
    s.e += w;
    wkv4_add(s, v, R(1), k);
}

// log of the denominator of y; with it and y the backward needs neither states nor divisions.
template <class R> WKV_FN R wkv4_lse(const Wkv4Output<R>& o) { return o.top + wkv_log(o.den); }

// One token of the reverse sweep: takes the adjoint after the token to the adjoint before it.
// 1 / denominator = exp(-lse) turns the gradient gy into that of the sums: gy and -gy * y, in units of exp(-lse).
template <class R>
WKV_FN Wkv4Grad<R> wkv4_back(R w, R u, R k, R v, R y, R lse, R gy, Wkv4Adjoint<R>& g) {
    R own = gy * wkv_exp(u + k - lse), bonus = own * (v - y), kept = wkv_exp(k + g.f);
    Wkv4Grad<R> out = {bonus + kept * (g.ga * v + g.gb), own + kept * g.ga, bonus, kept * (g.pa * v + g.pb)};
    R decayed = w + g.f;
    WkvPair<R> x = wkv_weights(decayed, -lse);
    R z = x.second * gy;
    g.pa = x.first * (g.pa + g.ga);
    g.pb = x.first * (g.pb + g.gb);
    g.ga = x.first * g.ga + z;
    g.gb = x.first * g.gb - z * y;
    g.f = wkv_max(decayed, -lse);
    return out;
}

// The same adjoint can be summed up for a stretch: with z = gy * exp(reach), token i of it adds (z, -z * y) to what its
// tokens before the first reset hand to its left end. An adjoint (ga, gb, f) crosses it, to the left, by wkv4_cross.
template <class R> WKV_FN R wkv4_reach(R w, R i, R lse) { return i * w - lse; }

// At the left end of a stretch, where the state was `s` and pa, pb were counted from the right end: the last of gw.
template <class R> WKV_FN R wkv4_close(const Wkv4State<R>& s, const Wkv4Adjoint<R>& g) {
    return wkv_exp(wkv_clamp(g.f + s.e)) * (g.pa * s.a + g.pb * s.b);
}

// The gradient of the state before the first token, but for the residual.
template <class R> WKV_FN Wkv4State<R> wkv4_initial(const Wkv4State<R>& s, R ga, R gb, R f) {
    R scale = wkv_exp(wkv_clamp(f + s.e));
    ga *= scale, gb *= scale;
    return {ga, gb, ga * s.a + gb * s.b};
}

// The part of an outgoing exponent's gradient that is not the rescaling of a and b: 0 for every consumer that only
// uses a * exp(e) and b * exp(e). It follows the exponent back to the token that last renewed it.
template <class R> WKV_FN R wkv4_residual(Wkv4State<R> s, Wkv4State<R> gs) { return gs.e - (s.a * gs.a + s.b * gs.b); }
