// Cross entropies, and their gradient in the place of the logits, which are read twice and written once: see
// cross_entropy_ in elementwise.py. A block has a row.
#include "elementwise_gpu.h"

constexpr int IGNORE_INDEX = -100;  // in elementwise.py too

// The largest of some logits, where it is first, and the sum of exp(logit - largest).
struct Top {
    R most, sum;
    int where;

    MEMBER void rise(R to) { sum *= wkv_exp((most - to) * LOG2E), most = to; }
    MEMBER void join(R other, R its_sum, int its_where) {
        if (other > most) rise(other), where = its_where;
        else if (other == most && its_where < where) where = its_where;
        sum += its_sum * wkv_exp((other - most) * LOG2E);
    }
};

// Of the block's threads.
WKV_FN Top join_all(Top mine) {
    __shared__ Top rows[ROWS];
    UNROLL for (int bit = 1; bit < WIDTH; bit *= 2)
        mine.join(exchange(mine.most, bit), exchange(mine.sum, bit), exchange(mine.where, bit));
    if (threadIdx.x == 0) rows[threadIdx.y] = mine;
    __syncthreads();
    Top all = rows[0];
    for (int row = 1; row < ROWS; row++) all.join(rows[row].most, rows[row].sum, rows[row].where);
    return all;
}

// nll [rows] and, in the place of logits [rows, size], their gradient.
KERNEL cross_entropy(Size n, double z_loss, X* logits, const long long* targets, R* nll) {
    const int size = n;
    X* const row = logits + blockIdx.x * n;
    const long long target = targets[blockIdx.x];
    const int thread = (threadIdx.y * WIDTH + threadIdx.x) * V;
    constexpr int STEP = WIDTH * ROWS * V;
    const bool known = 0 <= target && target < size, ignored = target == IGNORE_INDEX;
    const R wanted = known ? real(row[target]) : R(0);  // before others write
    R x[V];
    Top top = {R(-3e38), 0, 0x7fffffff};
    for (int at = thread; at < size && !ignored; at += STEP) {
        load(row + at, x);
        R most = top.most;
        UNROLL for (int j = 0; j < V; j++)
            if (x[j] > most) most = x[j], top.where = at + j;
        if (most > top.most) top.rise(most);
        UNROLL for (int j = 0; j < V; j++) top.sum += wkv_exp((x[j] - top.most) * LOG2E);
    }
    const Top all = join_all(top);
    const R lse = all.most + wkv_log(all.sum) * LN2;
    const R z = R(z_loss) * all.most;
    for (int at = thread; at < size; at += STEP) {
        load(row + at, x);
        UNROLL for (int j = 0; j < V; j++) {
            x[j] = wkv_exp((x[j] - lse) * LOG2E) - (at + j == target) + (at + j == all.where ? z : R(0));
            if (ignored) x[j] = 0;
        }
        put(x, row + at);
    }
    // What is neither a class nor IGNORE_INDEX has no loss, and says so.
    if (threadIdx.x + threadIdx.y == 0) nll[blockIdx.x] = ignored ? R(0) : known ? lse - wanted : wkv_log(R(-1));
}
