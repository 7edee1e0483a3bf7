// SPDX-License-Identifier: Apache-2.0
// Scratch memory of a thread.
#pragma once
#include <cstdint>
#include <cstdlib>

namespace {

// Memory that a thread keeps from call to call, unless it is much: fresh memory costs page faults.
struct Memory {
    static constexpr size_t KEPT = size_t(16) << 20;

    // Gives much memory back in the end.
    struct Use {
        Memory &memory;
        explicit Use(Memory &used) : memory(used) {}
        ~Use() {
            if (memory.size > KEPT) {
                std::free(memory.start);
                memory.start = nullptr;
                memory.size = 0;
            }
        }
    };

    void *start = nullptr;
    size_t size = 0;

    ~Memory() { std::free(start); }

    float *floats(int64_t count) {
        size_t bytes = (size_t(count) * sizeof(float) + 4095) / 4096 * 4096;
        if (bytes > size) {
            std::free(start);
            start = std::aligned_alloc(4096, bytes);
            size = start ? bytes : 0;
        }
        return static_cast<float *>(start);
    }
};

}  // namespace
