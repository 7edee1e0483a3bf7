// SPDX-License-Identifier: Apache-2.0
// Calls of the CPU kernels on threads of their own, one caller and several at once, for ThreadSanitizer.
// Every result has to have the bits of a call on one thread.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "../../normkit/cpu/arguments.hpp"

extern "C" int normkit_forward(const Forward *);
extern "C" int normkit_backward(const Backward *);

namespace {

constexpr int64_t ROWS = 240, HIDDEN = 64;
typedef std::vector<float> Floats;

struct Results {
    Floats y, h, mean, rstd, dx, dweight, dbias;

    bool operator==(const Results &other) const {
        return y == other.y && h == other.h && mean == other.mean && rstd == other.rstd && dx == other.dx &&
               dweight == other.dweight && dbias == other.dbias;
    }
};

Floats numbers(int64_t count) {
    Floats values(count);
    uint32_t state = 1;
    for (float &value : values) {
        state = state * 1664525u + 1013904223u;
        value = float(state >> 8) / float(1 << 24) - 0.5f;
    }
    return values;
}

// LayerNorm of x + x with a weight and a bias, forward and backward with y as dy.
Results computed(const Floats &x, int64_t threads) {
    Results out{Floats(ROWS * HIDDEN), Floats(ROWS * HIDDEN), Floats(ROWS), Floats(ROWS),
                Floats(ROWS * HIDDEN), Floats(HIDDEN),        Floats(HIDDEN)};
    const Rows rows{HIDDEN, 0};
    Forward forward{};
    forward.x = forward.residual = forward.weight = forward.bias = x.data();
    forward.y = out.y.data(), forward.residual_out = out.h.data(), forward.mean = out.mean.data(), forward.rstd = out.rstd.data();
    forward.x_rows = forward.residual_rows = forward.y_rows = forward.residual_out_rows = rows;
    forward.rows = ROWS, forward.inner_rows = 1, forward.hidden = HIDDEN, forward.eps = 1e-5;
    forward.subtract_mean = 1, forward.threads = threads, forward.level = -1;
    Backward backward{};
    backward.dy = out.y.data(), backward.h = out.h.data(), backward.weight = x.data();
    backward.mean = out.mean.data(), backward.rstd = out.rstd.data();
    backward.dx = out.dx.data(), backward.dweight = out.dweight.data(), backward.dbias = out.dbias.data();
    backward.dy_rows = backward.h_rows = rows;
    backward.rows = ROWS, backward.inner_rows = 1, backward.hidden = HIDDEN;
    backward.threads = threads, backward.level = -1;
    if (normkit_forward(&forward) || normkit_backward(&backward)) {
        std::fprintf(stderr, "a call failed\n");
        std::exit(1);
    }
    return out;
}

void call_often(const Floats &x, const Results &expected, int calls) {
    for (int call = 0; call < calls; ++call) {
        if (!(computed(x, 2 + call % 5) == expected)) {
            std::fprintf(stderr, "call %d on several threads has other bits than on one\n", call);
            std::exit(1);
        }
        if (call % 16 == 0) {
            // longer than a thread of the pool waits awake
            std::this_thread::sleep_for(std::chrono::microseconds(200));
        }
    }
}

}  // namespace

int main(int count, char **arguments) {
    const int calls = count > 1 ? std::atoi(arguments[1]) : 100;
    const Floats x = numbers(ROWS * HIDDEN);
    const Results expected = computed(x, 1);
    call_often(x, expected, calls);
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 4; ++caller) {
        callers.emplace_back([&] { call_often(x, expected, calls); });
    }
    for (std::thread &caller : callers) {
        caller.join();
    }
    std::puts("the same bits");
}
