// What the elementwise kernels are made of: neighbouring numbers, read and written as one, and where a thread works.
//
// Macros of the build, besides those of gpu.h: WKV_V, numbers of a pack; WKV_Y, how a mix is stored; WKV_N, head size.
#pragma once

#include "gpu.h"

using Y = WKV_Y;
constexpr int V = WKV_V;
constexpr int WIDTH = 32, ROWS = 8;  // threads of a block, at most; in elementwise_cuda.py too
constexpr R LOG2E = R(1.4426950408889634), LN2 = R(0.69314718055994531);

#define KERNEL extern "C" __global__ void __launch_bounds__(WIDTH * ROWS, sizeof(R) == 4 ? 2 : 1)

template <class T> struct alignas(sizeof(T) * V) Pack { T x[V]; };

template <class T> WKV_FN void load(const T* from, R (&to)[V]) {
    const Pack<T> in = *reinterpret_cast<const Pack<T>*>(from);
    UNROLL for (int j = 0; j < V; j++) to[j] = real(in.x[j]);
}
template <class T> WKV_FN void put(const R (&from)[V], T* to) {
    Pack<T> out;
    UNROLL for (int j = 0; j < V; j++) store(from[j], out.x[j]);
    *reinterpret_cast<Pack<T>*>(to) = out;
}
WKV_FN void clear(R (&x)[V]) {
    UNROLL for (int j = 0; j < V; j++) x[j] = 0;
}

WKV_FN R sigmoid(R x) { return 1 / (1 + wkv_exp(-x * LOG2E)); }

// The tokens of a thread, one after another. A block has `strip` tokens for each of its rows, and some of the channels,
// of which there are `groups`.
struct Strip {
    Size tile, first, end;
    int group;

    MEMBER Strip(Size tokens, Size strip, Size groups) {
        tile = blockIdx.x / groups, group = blockIdx.x % groups;
        first = (tile * blockDim.y + threadIdx.y) * strip;
        end = tokens - first < strip ? tokens : first + strip;
    }
};

// A pack of channels, those of a thread. Threads beyond the last channel have no tokens.
struct Place : Strip {
    Size C, c;

    MEMBER Place(Size tokens, Size C, Size strip) : Strip(tokens, strip, (C + WIDTH * V - 1) / (WIDTH * V)), C(C) {
        c = (Size(group) * WIDTH + threadIdx.x) * V;
        if (c >= C) end = first;
    }
};

// In the block's first row the sums over its rows, in their order. All threads come here.
template <int L> WKV_FN void add_rows(R (&x)[L]) {
    __shared__ R parts[ROWS][L][WIDTH];
    UNROLL for (int i = 0; i < L; i++) parts[threadIdx.y][i][threadIdx.x] = x[i];
    __syncthreads();
    if (threadIdx.y == 0)
        UNROLL for (int i = 0; i < L; i++)
            for (int row = 1; row < int(blockDim.y); row++) x[i] += parts[row][i][threadIdx.x];
    __syncthreads();
}

// A tile's sum of a parameter's gradient: number `which` of n, in sums [tiles, n, C].
WKV_FN void put_sum(const Place& p, R (&x)[V], int which, int n, R* sums) {
    add_rows(x);
    if (threadIdx.y == 0 && p.c < p.C) put(x, sums + (p.tile * n + which) * p.C + p.c);
}
